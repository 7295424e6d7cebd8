"""Several devices and several processes give the run of one."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

ROOT = Path(__file__).parents[1]

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
data, folder, fsdp = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
for name in os.environ.get("METHODS", "pix2pix").split(","):
  config = toy_config(name, data, batch_size=8, log_every=1, validate_every=100,
                      steps=int(os.environ.get("STEPS", 3)))
  config.mesh.fsdp = fsdp
  config.generator.base = 16  # so that arrays are large enough to be split over devices
  if name == "unified_gan":
    config.n_critic = 2
  if name == "cyclegan":
    config.pool = 16  # two batches fill it, the third is exchanged
  here = run.start(config, Store(data).info, folder / name)
  train.train(here, Store(data))
  if jax.process_count() > 1:
    evaluate.evaluate(here, Store(data))
"""
METHODS = ("pix2pix", "unified_gan", "cyclegan")  # a step, one with a condition, one with a pool


def start(data, folder, devices, fsdp, *distributed, names=("pix2pix",)):
  """A process that trains each method in a folder of its name."""
  flags = f"--xla_force_host_platform_device_count={devices}"
  return subprocess.Popen(
    [sys.executable, "-c", SCRIPT, str(data), str(folder), str(fsdp), *distributed], cwd=ROOT,
    env=os.environ | {"XLA_FLAGS": flags, "METHODS": ",".join(names)}, stderr=subprocess.PIPE,
    stdout=subprocess.PIPE, text=True)


def finish(*processes):
  for process in processes:
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, out + errors


def losses(folder, name="pix2pix"):
  lines = [json.loads(x) for x in (folder / name / name / "train.jsonl").read_text().splitlines()]
  return {(x["step"], name): value for x in lines for name, value in x.items()
          if name not in ("step", "images_per_second")}


@pytest.fixture(scope="module")
def folders(three, tmp_path_factory):
  """{(devices, fsdp): folder of the runs of METHODS, of (8, 1) of the first alone}."""
  names = {(1, 1): METHODS, (8, 1): METHODS[:1], (8, 4): METHODS}
  made = {kind: tmp_path_factory.mktemp("devices") for kind in names}
  finish(*(start(three, folder, *kind, names=names[kind]) for kind, folder in made.items()))
  return made


def close(a, b):
  """Equal but for the order of sums: Adam's first steps are signs, which turn with the last bit."""
  assert a.keys() == b.keys()
  for name in a:
    np.testing.assert_allclose(a[name], b[name], rtol=2e-4, atol=1e-5, err_msg=str(name))


@pytest.mark.parametrize("fsdp, name", [(1, METHODS[0]), *((4, name) for name in METHODS)])
def test_eight_devices_equal_one(fsdp, name, folders):
  close(losses(folders[8, fsdp], name), losses(folders[1, 1], name))


def two_processes(data, folder):
  with socket.socket() as s:
    s.bind(("localhost", 0))
    address = f"localhost:{s.getsockname()[1]}"
  return [start(data, folder, 2, 1, address, str(rank)) for rank in range(2)]


def test_two_processes_equal_one(folders, three, tmp_path):
  finish(*two_processes(three, tmp_path))
  close(losses(tmp_path), losses(folders[1, 1]))
  assert (tmp_path / "pix2pix" / "evaluation" / "summary.json").exists()


def test_two_processes_leave_together(toy_data, tmp_path, monkeypatch):
  """SIGTERM reaches them at different steps; they save one state and stop."""
  monkeypatch.setenv("STEPS", "100000")
  both = two_processes(toy_data, tmp_path)
  log, limit = tmp_path / "pix2pix" / "pix2pix" / "train.jsonl", time.time() + 240
  while time.time() < limit and not (log.exists() and len(log.read_text().splitlines()) > 4):
    time.sleep(0.05)
  for process in both:
    process.send_signal(signal.SIGTERM)
    time.sleep(0.1)
  for process in both:
    assert "saved at step" in process.communicate(timeout=120)[1]
  assert list((tmp_path / "pix2pix" / "pix2pix" / "checkpoints").iterdir())


@pytest.mark.parametrize("name", METHODS)
def test_saved_on_eight_devices_opens_on_one(name, folders):
  from medsynth_jax import run
  state, step = run.open_run(folders[8, 4] / name).restore(name, "latest")
  assert step == 3 and jax.device_count() == 1
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.nets))
