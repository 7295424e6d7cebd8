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
config = toy_config("pix2pix", data, batch_size=8, log_every=1,
                    steps=int(os.environ.get("STEPS", 3)))
config.mesh.fsdp = fsdp
config.generator.base = 16
here = run.start(config, Store(data).info, folder)
train.train(here, Store(data))
if jax.process_count() > 1:
  evaluate.evaluate(here, Store(data))
"""


def start(data, folder, devices, fsdp, *distributed):
  flags = f"--xla_force_host_platform_device_count={devices}"
  return subprocess.Popen(
    [sys.executable, "-c", SCRIPT, str(data), str(folder), str(fsdp), *distributed], cwd=ROOT,
    env=os.environ | {"XLA_FLAGS": flags}, stderr=subprocess.PIPE, stdout=subprocess.PIPE,
    text=True)


def finish(*processes):
  for process in processes:
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, out + errors


def losses(folder):
  lines = [json.loads(x) for x in (folder / "pix2pix/train.jsonl").read_text().splitlines()]
  return {(x["step"], name): value for x in lines for name, value in x.items()
          if name not in ("step", "images_per_second")}


@pytest.fixture(scope="module")
def one_device(toy_data, tmp_path_factory):
  folder = tmp_path_factory.mktemp("one") / "run"
  finish(start(toy_data, folder, 1, 1))
  return losses(folder)


def close(a, b):
  """Equal but for the order of sums: Adam's first steps are signs, which turn with the last bit."""
  assert a.keys() == b.keys()
  for name in a:
    np.testing.assert_allclose(a[name], b[name], rtol=2e-4, atol=1e-5, err_msg=str(name))


@pytest.mark.parametrize("fsdp", [1, 4])
def test_eight_devices_equal_one(fsdp, one_device, toy_data, tmp_path):
  finish(start(toy_data, tmp_path / "run", 8, fsdp))
  close(losses(tmp_path / "run"), one_device)


def two_processes(data, folder):
  with socket.socket() as s:
    s.bind(("localhost", 0))
    address = f"localhost:{s.getsockname()[1]}"
  return [start(data, folder, 2, 1, address, str(rank)) for rank in range(2)]


def test_two_processes_equal_one(one_device, toy_data, tmp_path):
  finish(*two_processes(toy_data, tmp_path / "run"))
  close(losses(tmp_path / "run"), one_device)
  assert (tmp_path / "run" / "evaluation" / "summary.json").exists()


def test_two_processes_leave_together(toy_data, tmp_path, monkeypatch):
  """SIGTERM reaches them at different steps; they save one state and stop."""
  monkeypatch.setenv("STEPS", "100000")
  both = two_processes(toy_data, tmp_path / "run")
  log, limit = tmp_path / "run" / "pix2pix" / "train.jsonl", time.time() + 240
  while time.time() < limit and not (log.exists() and len(log.read_text().splitlines()) > 4):
    time.sleep(0.05)
  for process in both:
    process.send_signal(signal.SIGTERM)
    time.sleep(0.1)
  for process in both:
    assert "saved at step" in process.communicate(timeout=120)[1]
  assert list((tmp_path / "run" / "pix2pix" / "checkpoints").iterdir())


def test_saved_on_eight_devices_opens_on_one(toy_data, tmp_path):
  from medsynth_jax import run
  finish(start(toy_data, tmp_path / "run", 8, 4))
  state, step = run.open_run(tmp_path / "run").restore("pix2pix", "latest")
  assert step == 3 and jax.device_count() == 1
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.nets))
