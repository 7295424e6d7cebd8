"""The loop: every config's nets move, resume is bitwise, NaN and signals end it as they should."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from medsynth_jax import checkpoint, methods, optim, run, train
from medsynth_jax import config as configs
from medsynth_jax.contract import Method, create, earlier, served, update
from medsynth_jax.data.dataset import Store
from medsynth_jax.data.pipeline import example_batch
from medsynth_jax.errors import UserError

pytestmark = pytest.mark.usefixtures("unoptimised")

ROOT = Path(__file__).parents[1]
STAGED = ("cldm", "pix2pix_ddpm")  # their stages resume in test_diffusion_methods.py
CONFIGS = sorted(p.stem for p in (ROOT / "configs").glob("*.py")
                 if p.stem not in ("prepare", *STAGED))


def get_config(name: str, variant: str = "test") -> ConfigDict:
  spec = importlib.util.spec_from_file_location(name, ROOT / "configs" / f"{name}.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config(variant)


def toy_config(name: str, data, **fields) -> ConfigDict:
  config = get_config(name)
  any_source = config.data.source == "any"
  config.data.update(dir=str(data), source="any" if any_source else "a",
                     targets="" if any_source else "b", fusion="")
  config.update(fields)
  return config


def equal(a, b) -> bool:
  """Whether two states are equal bit for bit."""
  def same(x, y):
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
      x, y = jax.random.key_data(x), jax.random.key_data(y)
    return np.array_equal(np.asarray(x), np.asarray(y))
  return jax.tree.all(jax.tree.map(same, a, b))


def trained(config, folder):
  here = run.start(config, Store(config.data.dir).info, folder)
  train.train(here, Store(config.data.dir))
  return here


def last_state(here, stage):
  return checkpoint.load_state(here.folder / stage, here.shape(stage), "latest")[0]


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_trains_and_resumes_bitwise(name, toy_data, tmp_path):
  """All nets move, synthesis is in [-1, 1], and a run in two parts equals the run in one."""
  config = toy_config(name, toy_data)
  whole = trained(config, tmp_path / "whole")
  stage = list(whole.methods)[-1]
  state = last_state(whole, stage)
  fresh = jax.jit(lambda k: create(whole.methods[stage], k, example_batch(whole.task, whole.info),
                                   {}))(whole.key(stage))
  assert set(state.nets) == set(whole.methods[stage].txs)
  for net in state.nets:
    moved = jax.tree.map(lambda a, b: not np.array_equal(a, b), state.nets[net], fresh.nets[net])
    assert jax.tree.all(moved), f"{net}: some parameters did not move"

  store = Store(toy_data)
  half = toy_config(name, toy_data)
  section = configs.stages(half)[stage]
  full = section.steps
  section.steps = full // 2
  here = run.start(half, store.info, tmp_path / "parts")
  train.train(here, store)
  assert int(last_state(here, stage).step) == full // 2
  here = run.start(config, store.info, tmp_path / "parts")
  train.train(here, store)
  assert equal(last_state(here, stage), state)


def test_validation_chooses_the_best(toy_data, tmp_path):
  here = trained(toy_config("unet", toy_data), tmp_path / "run")
  lines = [json.loads(x) for x in (here.folder / "regression/train.jsonl").read_text().splitlines()]
  scores = {x["step"]: x["validation_mae"] for x in lines if "validation_mae" in x}
  assert set(scores) == {2, 4}
  assert here.restore("regression")[1] == min(scores, key=scores.get)
  assert {x["step"] for x in lines if "l1" in x} == {1, 2, 3, 4}


def test_nan_stops_with_one_line(toy_data, tmp_path):
  config = toy_config("unet", toy_data, validate_every=100, steps=50)
  config.optim.lr = 1e30
  with pytest.raises(UserError, match="not finite at step"):
    trained(config, tmp_path / "run")


def command(config_name, folder, data, *more):
  fields = ["--config.data.source=a", "--config.data.targets=b", f"--config.data.dir={data}"]
  return [sys.executable, "-m", "medsynth_jax.main", f"--config=configs/{config_name}.py:test",
          f"--workdir={folder}", *fields, "--noevaluate", *more]


def start_and_wait(folder, data, until, *more):
  """Starts a training command and returns it when `until` lines are in its log."""
  process = subprocess.Popen(command("pix2pix", folder, data, *more), cwd=ROOT,
                             stderr=subprocess.PIPE, text=True)
  log = folder / "pix2pix" / "train.jsonl"
  limit = time.time() + 120
  while time.time() < limit and process.poll() is None:
    if log.exists() and len(log.read_text().splitlines()) >= until:
      return process
    time.sleep(0.01)
  raise AssertionError(f"no {until} lines of log: {process.communicate()[1]}")


def test_killed_and_rerun_is_bitwise_the_same(toy_data, tmp_path):
  """SIGKILL at some moment, then SIGTERM at another: the final state is that of the whole run."""
  steps = "--config.steps=60"
  whole = trained(toy_config("pix2pix", toy_data, steps=60), tmp_path / "whole")
  folder = tmp_path / "killed"
  killed = start_and_wait(folder, toy_data, 12, steps)
  killed.send_signal(signal.SIGKILL)
  killed.wait()
  stopped = start_and_wait(folder, toy_data, 25, steps)
  stopped.send_signal(signal.SIGTERM)
  _, message = stopped.communicate(timeout=120)
  assert stopped.returncode == 130 and "saved at step" in message, message
  done = subprocess.run(command("pix2pix", folder, toy_data, steps), cwd=ROOT, text=True,
                        capture_output=True)
  assert done.returncode == 0, done.stderr
  here = run.open_run(folder)
  assert equal(last_state(here, "pix2pix"), last_state(whole, "pix2pix"))


def test_run_of_another_config_is_refused(toy_data, tmp_path):
  trained(toy_config("unet", toy_data, steps=1), tmp_path / "run")
  other = toy_config("unet", toy_data, steps=1)
  other.optim.lr = 0.5
  with pytest.raises(UserError, match=r"optim\.lr: 0\.0002 -> 0\.5"):
    trained(other, tmp_path / "run")
  longer = toy_config("unet", toy_data, steps=2)
  assert int(last_state(trained(longer, tmp_path / "run"), "regression").step) == 2


def test_longer_run_needs_a_constant_schedule(toy_data, tmp_path):
  config = toy_config("unet", toy_data, steps=1)
  config.optim.schedule = "cosine"
  trained(config, tmp_path / "run")
  config.steps = 2
  with pytest.raises(UserError, match="steps: 1 -> 2"):
    trained(config, tmp_path / "run")


def test_workdir_with_other_files_is_refused(toy_data, tmp_path):
  (tmp_path / "thesis.txt").write_text("mine")
  with pytest.raises(UserError, match="thesis.txt"):
    trained(toy_config("unet", toy_data), tmp_path)
  assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


# --- a new method: one build function, one line in METHODS, one config -----------------------


def scale_build(config, stage, info, methods):
  """A toy method: image = scale * source, or scale * (the earlier stage's image)."""
  section = configs.stages(config)[stage]
  needs = configs.needs(section)

  def coarse(state, batch, key):
    if not needs:
      return batch["source"]
    return methods[needs[0]].synthesize(earlier(state, needs[0]), batch, key)

  def init(key, batch):
    return {"scale": {"factor": jax.random.normal(key, ())}}

  def step(state, batch, key):
    def loss(params):
      return jnp.square(params["factor"] * coarse(state, batch, key) - batch["target"]).mean()
    value, grads = jax.value_and_grad(loss)(state.nets["scale"])
    return update(state, txs, scale=grads), {"l2": value}

  def synthesize(state, batch, key):
    return jnp.clip(state.nets["scale"]["factor"] * coarse(state, batch, key), -1, 1)

  txs = {"scale": optim.make(section.optim, section.steps)}
  return Method(init, step, synthesize, txs, keeps=("scale",), draws=("pair", "unpaired"))


def two_stages(data):
  config = configs.base(stages=("first", "second"))
  config.first = configs.stage("scale", steps=3, batch_size=2)
  config.second = configs.stage("scale", steps=4, batch_size=2, needs=("first",),
                                start={"scale": "first"})
  config.data.update(dir=str(data), source="a", targets="b", size="16,16")
  config.update(log_every=1, validate_every=2)
  return config


def test_a_new_method_and_stages(toy_data, tmp_path, monkeypatch):
  """Stages run in order; the frozen one stays as handed over; the last resumes bitwise."""
  monkeypatch.setitem(methods.METHODS, "scale", scale_build)
  config = two_stages(toy_data)
  whole = trained(config, tmp_path / "whole")
  first, second = last_state(whole, "first"), whole.restore("second", "latest")[0]
  assert int(first.step) == 3 and int(second.step) == 4
  assert equal(second.frozen["first"], served(first, ("scale",)))

  store = Store(toy_data)
  config.second.steps = 2
  train.train(run.start(config, store.info, tmp_path / "parts"), store)
  config.second.steps = 4
  parts = trained(config, tmp_path / "parts")
  assert equal(last_state(parts, "second"), last_state(whole, "second"))
  assert equal(parts.restore("second", "latest")[0], second)


def test_stage_that_needs_a_later_one_is_refused(toy_data, monkeypatch):
  monkeypatch.setitem(methods.METHODS, "scale", scale_build)
  config = two_stages(toy_data)
  config.stages = ("second", "first")
  with pytest.raises(UserError, match="needs 'first'"):
    run.check(config, Path("nowhere"))


# --- what bad settings get -------------------------------------------------------------------


@pytest.mark.parametrize("field, value, message", [
  ("data.source", "c", "unknown modality 'c'"),
  ("data.targets", "a", "share"),
  ("data.size", "32,33", "not divisible"),
  ("data.size", "big", "whole numbers"),
  ("data.missing", "guess", "data.missing"),
  ("data.context", -1, "data.context"),
  ("method", "magic", "method='magic'"),
  ("dtype", "float16", "dtype"),
  ("generator.name", "transformer", "network 'transformer'"),
  ("loss", "l3", "loss='l3'"),
  ("optim.schedule", "stairs", "optim.schedule"),
  ("draw", "dice", "draw="),
  ("mesh.fsdp", 3, "mesh.fsdp=3"),
])
def test_bad_fields_get_one_clear_line(field, value, message, toy_data, tmp_path):
  config = toy_config("unet", toy_data)
  config.update_from_flattened_dict({field: value})
  with pytest.raises(UserError, match=message) as error:
    trained(config, tmp_path / "run")
  assert "\n" not in str(error.value)
  assert not (tmp_path / "run" / "regression" / "checkpoints").exists()


def test_unknown_field_on_the_command_line(toy_data, tmp_path):
  done = subprocess.run(command("unet", tmp_path / "run", toy_data, "--config.stepz=3"), cwd=ROOT,
                        capture_output=True, text=True)
  assert done.returncode == 2
  assert done.stderr.startswith("error: ") and "stepz" in done.stderr
  assert "Traceback" not in done.stderr and len(done.stderr.splitlines()) == 1
  assert not (tmp_path / "run").exists()


def test_batch_not_divisible_by_devices(toy_data, tmp_path):
  done = subprocess.run(command("unet", tmp_path / "run", toy_data), cwd=ROOT, capture_output=True,
                        text=True, env=os.environ | {
                          "XLA_FLAGS": "--xla_force_host_platform_device_count=8"})
  assert done.returncode == 2 and "batch_size=2 does not divide over 8 devices" in done.stderr


def test_run_without_checkpoint(toy_data, tmp_path):
  config = toy_config("unet", toy_data)
  here = run.start(config, Store(toy_data).info, tmp_path / "run")
  with pytest.raises(UserError, match="no checkpoint"):
    here.restore("regression")
  with pytest.raises(UserError, match="no config.json"):
    run.open_run(tmp_path)


# --- what a killed or broken run leaves --------------------------------------------------------


def test_a_kill_before_config_json_is_no_obstacle(toy_data, tmp_path):
  """Leftovers of a run that was killed while it was being made do not stop the next."""
  folder = tmp_path / "run"
  folder.mkdir()
  (folder / "dataset.json").write_text("{")
  (folder / ".scans.part99").mkdir()
  here = run.start(toy_config("unet", toy_data), Store(toy_data).info, folder)
  assert run.open_run(here.folder).info == Store(toy_data).info


def test_a_torn_log_line_is_dropped(toy_data, tmp_path):
  config = toy_config("unet", toy_data)
  trained(config, tmp_path / "run")
  log = tmp_path / "run" / "regression" / "train.jsonl"
  whole = log.read_text()
  log.write_text(whole + '{"step": 4, "l')
  config.steps = 5
  trained(config, tmp_path / "run")
  lines = [json.loads(line) for line in log.read_text().splitlines()]
  assert log.read_text().startswith(whole) and lines[-1]["step"] == 5


def test_weights_that_are_not_finite_are_never_stored(toy_data, tmp_path):
  """The update after the last good loss is checked too."""
  config = toy_config("unet", toy_data, steps=1)
  config.optim.lr = 1e39
  with pytest.raises(UserError, match="weights not finite at step 1"):
    trained(config, tmp_path / "run")
  with pytest.raises(UserError, match="no checkpoint"):
    run.open_run(tmp_path / "run").restore("regression")


def test_little_disk_is_told_before_a_save(toy_data, tmp_path, monkeypatch):
  import shutil
  monkeypatch.setattr(checkpoint.shutil, "disk_usage",
                      lambda folder: shutil._ntuple_diskusage(10**9, 10**9, 10**5))
  with pytest.raises(UserError, match="the disk is full"):
    trained(toy_config("unet", toy_data), tmp_path / "run")


def test_damaged_files_of_a_run(toy_data, tmp_path):
  here = trained(toy_config("unet", toy_data), tmp_path / "run")
  for part in (here.folder / "regression" / "checkpoints").rglob("*"):
    if part.is_file() and part.parent.name == "d":
      part.write_bytes(part.read_bytes()[:20])
  with pytest.raises(UserError, match="checkpoint is damaged"):
    here.restore("regression")
  (here.folder / "config.json").write_text("{")
  with pytest.raises(UserError, match="damaged"):
    run.open_run(here.folder)


def test_signal_at_the_last_step_is_not_forgotten(toy_data, tmp_path, monkeypatch):
  """A SIGTERM while the last validation runs ends the program, not only the stage."""
  validate = train._Validation.__call__
  def interrupted(self, state, step):
    if step == 4:
      os.kill(os.getpid(), signal.SIGTERM)
    return validate(self, state, step)
  monkeypatch.setattr(train._Validation, "__call__", interrupted)
  with pytest.raises(train.Interrupted, match="saved at step 4"):
    trained(toy_config("unet", toy_data), tmp_path / "run")


@pytest.mark.parametrize("field, value", [
  ("log_every", 0), ("validate_every", 0), ("batch_size", 0), ("steps", -1), ("seed", -1),
  ("optim.accumulate", 0), ("optim.hold", 2.0), ("synthesis.batch_size", 0), ("data.threads", -1),
  ("synthesis.overlap", 1.0), ("data.augment.zoom", 0.0)])
def test_fields_outside_their_range(field, value, toy_data, tmp_path):
  config = toy_config("unet", toy_data)
  config.update_from_flattened_dict({field: value})
  with pytest.raises(UserError, match=f"config.{field}="):
    trained(config, tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_several_targets_need_a_method_that_tells_them_apart(toy_data, tmp_path):
  from conftest import make_toy_data
  data = make_toy_data(tmp_path / "three", modalities=("a", "b", "c"))
  config = toy_config("pix2pix", data)
  config.data.targets = "[b,c]"
  with pytest.raises(UserError, match="makes one target"):
    trained(config, tmp_path / "run")


def test_a_run_opens_where_its_batch_does_not_divide(toy_data, tmp_path):
  """Batch 1 trains on one device; the run is opened on eight."""
  trained(toy_config("unet", toy_data, batch_size=1, steps=1), tmp_path / "run")
  code = ("import jax; from medsynth_jax import run; assert jax.device_count() == 8;"
          f" print(run.open_run({str(tmp_path / 'run')!r}).restore('regression')[1])")
  done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                        env=os.environ | {
                          "XLA_FLAGS": "--xla_force_host_platform_device_count=8"})
  assert done.stdout.split() == ["1"], done.stderr
