"""Several devices and several processes give the run of one."""

import csv
import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AxisType
from test_diffusion_methods import filled
from test_train import command, get_config, toy_config, trained

from medsynth_jax import config as configs
from medsynth_jax import evaluate, processes, run, sharding, train
from medsynth_jax.contract import served
from medsynth_jax.data.dataset import Store, load_info
from medsynth_jax.data.pipeline import example_batch
from medsynth_jax.errors import UserError
from medsynth_jax.methods import METHODS

ROOT = Path(__file__).parents[1]

# --- steps of every method on several devices ------------------------------------------------

STAGES = {"regression": ("unet", "regression"), "pix2pix": ("pix2pix", "pix2pix"),
          "autoencoder": ("cldm", "autoencoder"), "latent_moments": ("cldm", "latent_moments"),
          "cldm": ("cldm", "cldm"), "ddpm": ("pix2pix_ddpm", "ddpm"),
          "unified_gan": ("unified_gan", "unified_gan"), "reg_gan": ("cta_gan", "vessels"),
          "cyclegan": ("cyclegan", "cyclegan")}  # a config's stage for each method
STEPS = """
import json, sys
sys.path.insert(0, "tests")
import test_devices
test_devices.tell_steps(*json.loads(sys.argv[1]))
"""


def tell_steps(data, stages, meshes):
  """Prints a line of JSON a stage: how far each mesh is from one device (see `apart`)."""
  sharding.SMALL = 64  # the nets are small, and all of their arrays shall be split
  for name, stage, fields in stages:
    alone = steps(data, name, stage, fields, (1, 1))
    print(json.dumps({"stage": f"{name} {stage} {fields}", "apart": {
      str(mesh): apart(steps(data, name, stage, fields, mesh), alone) for mesh in meshes}}))


def steps(data, name, stage, fields, shape):
  """({(step, loss): value} of three steps, optimiser states and `aux` after the first)."""
  config = get_config(name)
  config.update(fields)
  if config.data.source == "any":
    config.data.targets = ""
  else:
    config.data.update(source="a", targets="b,c" if name == "cldm" else "b", fusion="")
  if "pool" in config:
    config.pool = 16  # two batches fill it, the third is exchanged
  mesh = jax.make_mesh(shape, ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2,
                       devices=jax.devices()[:shape[0] * shape[1]])
  here = dataclasses.replace(run.build(config, load_info(data), "nowhere"), mesh=mesh)
  section, losses = here.sections[stage], {}
  section.batch_size = 8
  with jax.set_mesh(mesh):
    state = first_state(here, stage)
    arrays = jax.tree.leaves(state.nets or state.frozen)
    assert any(not x.is_fully_replicated for x in arrays) == (shape[1] > 1)
    take = train.compile_step(here, stage)[0]
    for number in range(3):
      state, metrics = take(state, sharding.put_batch(mesh, batch_of(here, section, number)))
      losses |= {(number, k): float(v) for k, v in metrics.items()}
      if not number:
        first = jax.device_get({**state.opts, "aux": state.aux})
  return losses, first


def first_state(here, stage):
  """A stage's state before its first step, all weights random, where the run's mesh has it."""
  names, shape = list(here.methods), here.shape(stage)
  states = {n: filled(here.shape(n), names.index(n)) for n in (*here.needs(stage), stage)}
  frozen = {n: served(states[n], here.methods[n].keeps).replace(frozen={}) for n in shape.frozen}
  if "latent_moments" in frozen:
    moments = frozen["latent_moments"]
    frozen["latent_moments"] = moments.replace(aux={**moments.aux, "scale": np.float32(1)})
  def put(x, like):  # a copy each: the step is given a net and its moving average to overwrite
    key = jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
    return jax.device_put(x if key else np.array(x), like.sharding)
  return jax.tree.map(put, states[stage].replace(frozen=frozen), shape)


def batch_of(here, section, seed):
  """Eight random examples, some unpaired, half of them measured in part only."""
  rng, n = np.random.default_rng(seed), section.batch_size
  example = example_batch(here.task, here.info, section.draw)
  batch = {k: np.zeros((n, *v.shape[1:]), v.dtype) for k, v in example.items()}
  for name in ("source", "target"):
    batch[name] = rng.uniform(-1, 1, batch[name].shape).astype(np.float32)
  for name in ("valid", "target_valid", "mask"):
    batch[name] = (rng.uniform(size=batch[name].shape) < 0.7).astype(np.float32)
    batch[name][::2] = 1
  codes, order = [here.info.index(t) for t in here.task.targets], np.arange(n, dtype=np.int32)
  return batch | {"paired": np.float32(order % 4 > 0), "fold": order % 2, "slice": order,
                  "source_modality": np.resize(np.int32([here.info.index("a")]), n),
                  "target_modality": np.resize(np.int32(codes[-2:]), n)}


def apart(one, other):
  """(largest relative difference of the losses, the same of the arrays by their norms).

  Gradients of what a norm layer takes out again are noise: small arrays of a net do not count, nor
  its moving average, as Adam's first steps have the size of its rate whatever the gradient's.
  """
  (losses, arrays), (losses2, arrays2) = one, other
  assert losses.keys() == losses2.keys() and np.isfinite([*losses.values()]).all()
  far = [abs(losses[k] - x) / max(abs(x), 1e-3) for k, x in losses2.items()]
  norm, moments = np.linalg.norm, [0.0]
  for net in arrays2:
    pairs = [[np.asarray(x, np.float64) for x in pair]
             for pair in zip(counted(arrays[net]), counted(arrays2[net]), strict=True)]
    least = 1e-2 * max((norm(x) for _, x in pairs), default=0) + 1e-9
    moments += [norm(a - b) / max(norm(b), least) for a, b in pairs]
  return max(far), max(moments)


def counted(arrays):
  return [x for path, x in jax.tree_util.tree_leaves_with_path(arrays)
          if ".params" not in jax.tree_util.keystr(path)]


def differences(data, stages, meshes, level=0):
  """{stage: {mesh: `apart`}} of one device, as a process with eight of them finds it.

  `level`: of LLVM's optimisations. At 0 XLA:CPU (jax 0.10.2) computes a strided convolution's
  gradient wrongly for some shapes of one example: 6 % off in spine_ct2mr on eight devices; at 1, 2
  and 3 it does not.
  """
  flags = f"--xla_force_host_platform_device_count=8 --xla_backend_optimization_level={level}"
  done = subprocess.run([sys.executable, "-c", STEPS, json.dumps([str(data), stages, meshes])],
                        cwd=ROOT, env=os.environ | {"XLA_FLAGS": flags}, capture_output=True,
                        text=True)
  assert done.returncode == 0, done.stderr
  lines = [json.loads(x) for x in done.stdout.splitlines() if x.startswith("{")]
  return {line["stage"]: line["apart"] for line in lines}


def assert_equal(found, meshes):
  """Equal but for the order of sums."""
  assert found and all(len(of) == len(meshes) for of in found.values())
  wrong = {(stage, mesh): far for stage, of in found.items() for mesh, far in of.items()
           if far[0] > 1e-5 or far[1] > 1e-3}
  assert not wrong, wrong


def test_every_method_on_eight_devices_equals_one(three):
  """A mixed mesh: two groups of four devices, each of which holds the parameters once."""
  assert STAGES.keys() == METHODS.keys()
  stages = [(*stage, {}) for stage in STAGES.values()]
  found = differences(three, stages, [(2, 4)])
  assert len(found) == len(stages)
  assert_equal(found, [(2, 4)])


def all_stages():
  names = sorted(p.stem for p in (ROOT / "configs").glob("*.py") if p.stem != "prepare")
  made = [(name, stage, {}) for name in names for stage in configs.stages(get_config(name))
          if not stage.startswith(configs.FOLD)]
  return [*made, ("reg_gan", "reg_gan", {"cycle": 10.0}),
          ("reg_gan", "reg_gan", {"correction": 0.0, "smoothness": 0.0, "l1": 100.0})]


@pytest.mark.slow
@pytest.mark.parametrize("name, stage, fields", all_stages(), ids=lambda x: str(x))
def test_every_stage_on_every_mesh_equals_one_device(name, stage, fields, three):
  meshes = [(8, 1), (1, 8), (4, 2), (2, 4)]
  assert_equal(differences(three, [(name, stage, fields)], meshes, level=1), meshes)


# --- whole runs ------------------------------------------------------------------------------

SCRIPT = """
import os, sys
sys.path.insert(0, "tests")
import jax
if len(sys.argv) > 4:
  jax.distributed.initialize(sys.argv[4], 2, int(sys.argv[5]), initialization_timeout=60)
from pathlib import Path
from test_train import toy_config
from medsynth_jax import evaluate, run, train
from medsynth_jax.data.dataset import Store
data, folder, fsdp, name = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), os.environ["CONFIG"]
config = toy_config(name, data, batch_size=8, log_every=1, validate_every=100, steps=3)
config.mesh.fsdp = fsdp
config.generator.base = 16  # so that arrays are large enough to be split over devices
here = run.start(config, Store(data).info, folder / name)
train.train(here, Store(data))
if jax.process_count() > 1:
  evaluate.evaluate(here, Store(data))
"""


def start(data, folder, devices, fsdp, *distributed, name="pix2pix"):
  """A process that trains a config in a folder of its name."""
  flags = f"--xla_force_host_platform_device_count={devices}"
  return subprocess.Popen(
    [sys.executable, "-c", SCRIPT, str(data), str(folder), str(fsdp), *distributed], cwd=ROOT,
    env=os.environ | {"XLA_FLAGS": flags, "CONFIG": name}, stderr=subprocess.PIPE,
    stdout=subprocess.PIPE, text=True)


def finish(*processes):
  for process in processes:
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, out + errors


def losses(folder):
  lines = (folder / "pix2pix" / "pix2pix" / "train.jsonl").read_text().splitlines()
  return {(x["step"], name): value for x in map(json.loads, lines) for name, value in x.items()
          if name not in ("step", "images_per_second")}


@pytest.fixture(scope="module")
def folders(three, tmp_path_factory):
  """{(devices, fsdp): folder of a run}."""
  made = {kind: tmp_path_factory.mktemp("devices") for kind in ((1, 1), (8, 4))}
  finish(*(start(three, folder, *kind) for kind, folder in made.items()))
  return made


def close(a, b):
  """Equal but for the order of sums: Adam's first steps are signs, which turn with the last bit."""
  assert a.keys() == b.keys()
  for name in a:
    np.testing.assert_allclose(a[name], b[name], rtol=2e-4, atol=1e-5, err_msg=str(name))


def test_a_run_on_eight_devices_equals_that_on_one(folders):
  close(losses(folders[8, 4]), losses(folders[1, 1]))


def free_port():
  with socket.socket() as s:
    s.bind(("localhost", 0))
    return s.getsockname()[1]


def test_two_processes_equal_one(folders, three, tmp_path):
  address = f"localhost:{free_port()}"
  finish(*(start(three, tmp_path, 2, 1, address, str(rank)) for rank in range(2)))
  close(losses(tmp_path), losses(folders[1, 1]))
  scores = tmp_path / "pix2pix" / "evaluation" / "per_subject.csv"
  made_by_both = cells(scores)  # each batch of synthesis was split over both
  scores.unlink()
  evaluate.evaluate(run.open_run(tmp_path / "pix2pix"), Store(three))
  assert cells(scores) == [one if isinstance(one, str) else pytest.approx(one, rel=1e-3)
                           for one in made_by_both]


def cells(path):
  """All cells of a table, numbers as such."""
  def value(text):
    return text if re.search("[a-df-z]", text) or not text else float(text)
  return [value(x) for row in csv.reader(path.open()) for x in row]


def opened(folder, name="pix2pix"):
  state, step = run.open_run(folder / name).restore(name, "latest")
  assert step == 3 and jax.device_count() == 1
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.nets))


def test_saved_on_eight_devices_opens_on_one(folders):
  opened(folders[8, 4])


@pytest.mark.slow
def test_with_a_pool_saved_on_eight_devices_opens_on_one(three, tmp_path):
  finish(start(three, tmp_path, 8, 4, name="cyclegan"))
  opened(tmp_path, "cyclegan")


# --- processes that meet, go on and die ------------------------------------------------------


FIELDS = ("--config.steps=60", "--config.validate_every=5")


def two(data, folder, until, slurm=False, lost_after=60):
  """Two processes of one training, with a checkpoint and at least `until` lines in its log.

  Their numbers are given by flags, or as SLURM does.
  """
  port = free_port()
  made = []
  for number in range(2):
    flags, found = [f"--coordinator=localhost:{port}", "--processes=2", f"--process={number}"], {}
    if slurm:
      flags = ["--coordinator=auto"]
      found = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2",
               "SLURM_PROCID": str(number), "SLURM_LOCALID": str(number),
               "JAX_COORDINATOR_PORT": str(port)}
    made.append(subprocess.Popen(
      command("unet", folder, data, *FIELDS, f"--lost_after={lost_after}", *flags), cwd=ROOT,
      env=os.environ | found, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
  log, limit = folder / "regression" / "train.jsonl", time.time() + 240
  saved = log.parent / "checkpoints"
  while time.time() < limit and all(p.poll() is None for p in made):
    if log.exists() and len(log.read_text().splitlines()) >= until and \
        any(p.name.isdigit() for p in saved.iterdir()):
      return made
    time.sleep(0.02)
  raise AssertionError(f"no {until} lines of log: {[p.communicate() for p in made]}")


def ended(process, limit=120):
  """(status, what was told but for the progress bar) of a process that ends within the limit."""
  out, told = process.communicate(timeout=limit)
  lines = [x.rpartition("\r")[2] for x in told.split("\n")]
  return process.returncode, out + "\n".join(x for x in lines if "step/s" not in x)


def test_two_processes_end_with_one_and_go_on(toy_data, tmp_path):
  """kill -9 ends the other with one line; two go on until SIGTERM, then one to the end.

  The losses are those of one process that was never stopped.
  """
  folder = tmp_path / "run"
  one, other = two(toy_data, folder, 8, slurm=True)
  other.kill()
  status, told = ended(one)
  assert status == 1 and "Traceback" not in told
  assert "another process of the run" in told.splitlines()[-1]
  both = two(toy_data, folder, 25)
  for process in both:  # it reaches them at different steps; they save one state and stop
    process.send_signal(signal.SIGTERM)
    time.sleep(0.1)
  (status, told), (status2, silent) = (ended(p) for p in both)
  assert status == status2 == 130 and "saved at step" in told
  assert not silent.replace("[Gloo] Rank 1 is connected to 1 peer ranks."
                            " Expected number of connected peer ranks is : 1", "").strip()
  done = subprocess.run(command("unet", folder, toy_data, *FIELDS), cwd=ROOT, text=True,
                        capture_output=True)
  assert done.returncode == 0, done.stderr
  whole = trained(toy_config("unet", toy_data, steps=60, validate_every=5), tmp_path / "whole")
  told, expected = ([json.loads(x) for x in (f / "regression/train.jsonl").read_text().splitlines()]
                    for f in (folder, whole.folder))
  assert [x["step"] for x in told] == [x["step"] for x in expected]
  for one, other in zip(told, expected, strict=True):
    for name in other.keys() - {"images_per_second"}:
      assert one[name] == pytest.approx(other[name], rel=1e-2), (other["step"], name)


@pytest.mark.slow
@pytest.mark.parametrize("number, end", [(0, signal.SIGKILL), (1, signal.SIGSTOP)])
def test_the_others_of_a_dead_or_silent_process_end(number, end, toy_data, tmp_path):
  """Without process 0, where all meet; and where the connection stays open: by `lost_after`."""
  both = two(toy_data, tmp_path / "run", 8, lost_after=20)
  both[number].send_signal(end)
  status, told = ended(both[1 - number])
  both[number].kill()
  assert status not in (0, 2, 130) and "Traceback" not in told
  assert told.splitlines()[-1].startswith("error: another process of the run")


@pytest.mark.parametrize("coordinator, numbers, message", [
  ("", (2, None), "need the address of process 0"), ("auto", (2, 0), "--coordinator=HOST:PORT"),
  ("here", (2, 0), "give host:port"), ("here:1", (None, 0), "--processes=N"),
  ("here:1", (2, None), "--process, from 0"), ("here:1", (2, 2), "from 0 to N-1")])
def test_what_does_not_fit_is_told_before_joining(coordinator, numbers, message):
  with pytest.raises(UserError, match=message):
    processes.join(coordinator, *numbers, 10)


def test_alone_without_a_coordinator():
  processes.join("", None, None, 10)
  assert not jax.distributed.is_initialized()


def test_without_a_cluster_auto_is_one_line():
  code = "from medsynth_jax import cli, processes\n" \
    "cli.guard(lambda: processes.join('auto', None, None, 10))"
  done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
  assert "found no variables of SLURM or Cloud TPU" in done.stderr
