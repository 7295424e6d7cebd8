"""The whole line from the command: simulated scans to a table, between floor and bound."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from test_train import get_config

from medsynth_jax import builtin, evaluate, run, train
from medsynth_jax.data.dataset import Store, load_info
from medsynth_jax.errors import UserError

ROOT = Path(__file__).parents[1]
FLOOR = ("constant", "lut", "lut2", "mean_image", "identity_normalised")


def command(folder, *more):
  return subprocess.run(
    [sys.executable, "-m", "medsynth_jax.main", "--config=configs/unet.py:test",
     f"--workdir={folder}", *more], cwd=ROOT, capture_output=True, text=True)


def test_one_command_from_nothing_to_a_table(tmp_path):
  """Scans, data set, training and evaluation; the same command again changes nothing."""
  done = command(tmp_path / "run")
  assert done.returncode == 0, done.stderr
  assert "t1->t2: simulated data, n = 1 test" in done.stdout and "ceiling" in done.stdout
  summary = json.loads((tmp_path / "run/evaluation/summary.json").read_text())
  assert {*FLOOR, "regression", "ceiling"} <= set(summary["scores"]["t1->t2"])
  assert load_info(tmp_path / "run").simulated
  before = (tmp_path / "run/regression/train.jsonl").read_text()
  again = command(tmp_path / "run")
  assert again.returncode == 0 and "nothing to do" in again.stdout
  assert (tmp_path / "run/regression/train.jsonl").read_text() == before


@pytest.mark.parametrize("flags, message", [
  (["--config.data.dir=nowhere"], "no dataset.json"),
  (["--config.data.simulated.spacing=thick"], "three numbers in mm"),
  (["--config.data.source=t9"], "t9"),
])
def test_bad_flags_get_one_line(flags, message, tmp_path):
  done = command(tmp_path / "run", *flags)
  assert done.returncode == 2 and message in done.stderr
  assert "Traceback" not in done.stderr
  assert not (tmp_path / "run" / "config.json").exists()


def test_every_option_of_the_simulation_is_a_field(tmp_path):
  """Missing images, scanner groups, anisotropic voxels and misalignment reach the data set."""
  config = get_config("unet")
  config.data.simulated.update(n_subjects=8, spacing="8,8,16", missing="random", missing_share=0.3,
                               groups=2, modalities="flair", misaligned="t2", misalignment=2.0,
                               seed=3)
  info = Store(builtin.make(config, tmp_path)).info
  assert info.names == ("t1", "t2", "flair") and info.simulated
  assert len({c.group for c in info.cases}) == 2
  assert sum(len(c.images) for c in info.cases) < 8 * len(info.modalities)
  assert info.spacing == (8.0, 8.0, 16.0)
  assert info.notes["ceiling_sources"] == ["t1"]


def quick(permute: bool):
  """Minutes become half a minute: eight subjects at 4 mm and a small U-Net."""
  config = get_config("unet")
  config.data.update(size="48,64")
  config.data.simulated.update(n_subjects=10, spacing="4,4,4", permute=permute)
  config.generator.channels = (8, 16, 32)
  config.update(steps=400, batch_size=4, log_every=50, validate_every=400)
  config.optim.update(lr=4e-3, schedule="cosine", ema=0.98)
  return config


def scores(config, folder):
  store = Store(builtin.make(config, folder))
  here = run.start(config, store.info, folder)
  train.train(here, store)
  evaluate.evaluate(here, store)
  rows = json.loads((folder / "evaluation/summary.json").read_text())["scores"]["t1->t2"]
  return {row: (metrics["psnr"]["mean"], metrics["ssim"]["mean"]) for row, metrics in rows.items()}


def test_learns_above_the_floor_and_below_the_ceiling(tmp_path):
  """floor + 1 dB <= score <= ceiling + 0.2 dB: a score above the ceiling would be a leak."""
  rows = scores(quick(permute=False), tmp_path)
  floor = [max(rows[r][i] for r in FLOOR) for i in (0, 1)]
  assert rows["regression"][0] > floor[0] + 1.0 and rows["regression"][1] > floor[1] + 0.03
  assert rows["regression"][0] <= rows["ceiling"][0] + 0.2


def test_permuted_pairs_fall_to_the_floor(tmp_path):
  """With targets of other subjects there is nothing to learn but where a head lies."""
  rows = scores(quick(permute=True), tmp_path)
  assert rows["regression"][0] <= max(rows[r][0] for r in FLOOR) + 0.5


def test_no_test_subject_is_told_before_training(toy_data, tmp_path):
  import dataclasses
  config = get_config("unet")
  config.data.update(dir=str(toy_data), source="a", targets="b")
  info = load_info(toy_data)
  info = dataclasses.replace(info, cases=tuple(c for c in info.cases if c.split != "test"))
  with pytest.raises(UserError, match="no test subject"):
    evaluate.scored_cases(run.build(config, info, tmp_path), "test")
