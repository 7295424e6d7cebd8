"""Shared fixtures: a compilation cache, and tiny data sets made once a session."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
import pytest
from scipy import ndimage

from medsynth_jax.data.dataset import (
  Case,
  Image,
  Info,
  Modality,
  content_hash,
  quantise,
  save_info,
  write_records,
)
from medsynth_jax.data.intensities import Scaling


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(tmp_path_factory):
  """Compiled code is shared by the tests of one run, on all workers."""
  base = tmp_path_factory.getbasetemp()
  base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
  folder = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(base / "xla")
  jax.config.update("jax_compilation_cache_dir", folder)
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
  os.environ["JAX_COMPILATION_CACHE_DIR"] = folder  # for the commands that tests start
  os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
  return folder


@pytest.fixture(scope="module")
def unoptimised():
  """Compiles without LLVM's optimisations: two thirds of the time, for what runs a few steps only.

  The commands that tests start do so too, so that their results are the same bits.
  """
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def modality(kind, scaling, name="x"):
  """A modality of an info.json: its unit and background by kind."""
  unit, background = {"ct": ("HU", -1024), "pet": ("SUV", 0), "mr": ("arbitrary", 0)}[kind]
  return Modality(name, kind, unit, background, ({},), {}, scaling)


def smooth(shape, affine):
  """A linear function of the place in mm, which linear interpolation reproduces."""
  index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
  place = index @ affine[:3, :3].T + affine[:3, 3]
  return (place @ [1.0, 2.0, -0.5]).astype(np.float32)


def make_toy_data(folder, shape=(20, 24, 10), splits=("train",) * 4 + ("validation", "test"),
                  modalities=("a", "b"), seed=0, ct=False, subjects=None):
  """A data set of smooth random volumes, written without `prepare`; b is a function of a.

  `ct`: all are CT of -1000..2000 HU; `subjects`: a number a volume, for several sessions of one.
  """
  rng = np.random.default_rng(seed)
  affine = tuple(map(tuple, np.diag([2.0, 2.0, 3.0, 1.0]).tolist()))
  scaling = Scaling("linear", 0.0, 100.0)
  if ct:
    scaling = Scaling("linear", -1024.0, 3071.0)
  rule = {"kind": "window", "low": scaling.low, "high": scaling.high}
  cases, stored = [], {}
  first = dict.fromkeys(("train", "validation", "test"), 0)
  n = shape[2]
  for volume, split in enumerate(splits):
    a = ndimage.gaussian_filter(rng.standard_normal(shape), 1.5)
    a = 100 * (a - a.min()) / (a.max() - a.min())
    images, arrays = {}, {}
    for i, name in enumerate(modalities):
      x = np.moveaxis(a if i == 0 else 100 * np.sin(a / 60 + 0.2 * i) ** 2, 2, 0)
      x = 30 * x - 1000 if ct else x
      arrays[name], slope, intercept = quantise(x.astype(np.float32))
      images[name] = Image("none", shape, affine, (scaling,), scaling, slope, intercept, {"all": 0})
    arrays["valid"] = np.full((n, *shape[:2]), 2 ** len(modalities) - 1, np.uint32)
    arrays["regions"] = np.zeros((n, *shape[:2]), np.uint32)
    arrays["regions"][:, 3:-3, 3:-3] = 1
    stored[volume] = arrays
    subject, session = (volume, "") if subjects is None else (subjects[volume], f"v{volume}")
    cases.append(Case(volume, f"s{subject}", session, split, volume % 2, "", shape, affine,
                      first[split], images, (), {m: tuple(range(1, n - 1)) for m in modalities},
                      {}))
    first[split] += n
  kind = ("ct", "HU", -1024.0) if ct else ("mr", "arbitrary", 0.0)
  kinds = {m: Modality(m, *kind, (rule,), rule, scaling) for m in modalities}
  info = Info("toy", True, modalities[-1], 2, (2.0, 2.0, 3.0), True, kinds, (), tuple(cases), {},
              {}, {})
  digests = {v: repr({k: x.tobytes() for k, x in a.items()}) for v, a in stored.items()}
  info = Info(**{**vars(info), "hash": content_hash(info, digests)})
  write_records(folder, info, stored.__getitem__)
  save_info(info, folder / "dataset.json")
  return folder


@pytest.fixture(scope="session")
def toy_data(tmp_path_factory):
  """Folder of a data set with modalities a and b: 4 training, 1 validation, 1 test subject."""
  return make_toy_data(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
  """RUN of the whole line on six tiny simulated heads: scans, data, a trained net, evaluation."""
  from test_train import get_config

  from medsynth_jax import builtin, evaluate, run, train
  from medsynth_jax.data.dataset import Store
  config, folder = get_config("unet"), tmp_path_factory.mktemp("tiny") / "run"
  store = Store(builtin.make(config, folder))
  here = run.start(config, store.info, folder)
  train.train(here, store)
  evaluate.evaluate(here, store)
  return folder


@pytest.fixture(scope="module")
def maker(tiny_run):
  from medsynth_jax import synthesize
  return synthesize.load(tiny_run)


@pytest.fixture(scope="module")
def case(maker):
  return maker.run.info.split("test")[0]


@pytest.fixture(scope="module")
def t1(tiny_run, case):
  return tiny_run / "scans" / "images" / f"{case.subject}_t1.nii.gz"


@pytest.fixture(scope="session")
def three(tmp_path_factory):
  """A data set with modalities a, b, c in two folds."""
  return make_toy_data(tmp_path_factory.mktemp("three"), modalities=("a", "b", "c"))


@pytest.fixture(scope="session")
def table(tmp_path_factory):
  """A table of four simulated subjects' scans."""
  from test_prepare import write_cases
  return write_cases(tmp_path_factory.mktemp("scans"))


@pytest.fixture(scope="session")
def data(table):
  """The data set that `prepare` makes of `table`."""
  from test_prepare import config_for, prepare
  return prepare(config_for(table, table.parent / "data"))
