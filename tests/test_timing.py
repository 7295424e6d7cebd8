"""Seconds of synthesis and training, from what was measured and logged."""

import json

import pytest

from medsynth_jax import timing


def test_speed_is_that_of_the_volumes_after_the_first():
  found = timing.speed([(10, 9.0), (10, 2.0), (20, 4.0), (10, 6.0)], 2, 3.0)
  assert found == timing.Speed(0.1, 4.0, 3.0)
  assert timing.speed([(10, 5.0)], 1, 0.01) == timing.Speed(0.5, 5.0, 0.01)


def test_training_time_from_the_log(tmp_path):
  def log(*lines):
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    return timing.trained(tmp_path, 4)
  assert timing.trained(tmp_path, 4) is None
  assert log({"step": 5, "validation_mae": 1.0}) is None
  got = log({"step": 10, "loss": 1.0, "images_per_second": 20.0}, {"step": 10, "validation": 1.0},
            {"step": 20, "images_per_second": 10.0}, {"step": 25, "validation": 0.5})
  assert got == (25, pytest.approx(10 * 4 / 20 + 10 * 4 / 10 + 5 * 4 / 10))
