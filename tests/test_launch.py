"""What the scripts of launch/ make and collect, without any training."""

import csv
import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def script(name):
  spec = importlib.util.spec_from_file_location(name, ROOT / "launch" / f"{name}.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.fixture(scope="module")
def real_images():
  return script("real_images")


@pytest.fixture
def ibsi(tmp_path):
  """Empty folders in the names of the eight patients."""
  for number in (2, 3, 8, 12, 15, 19, 24, 25):
    (tmp_path / "ibsi_sts_petctmr" / f"STS_{number:03}").mkdir(parents=True)
  return tmp_path


def sides(fold):
  return {split: {r["subject"] for r in fold.rows if r["split"] == split}
          for split in ("train", "test")}


def test_each_patient_is_scored_once_a_direction_by_others(real_images, ibsi):
  for task in (real_images.open_ms, real_images.ibsi):
    folds = task(ibsi, ibsi)
    assert len({f.run for f in folds}) == len(folds)
    for direction in {f.direction for f in folds}:
      tested = []
      for fold in (f for f in folds if f.direction == direction):
        found = sides(fold)
        assert found["train"] and not found["train"] & found["test"]
        assert {r["split"] for r in fold.rows} == {"train", "test"}  # nobody chooses a checkpoint
        tested += found["test"]
      assert len(tested) == len(set(tested)) == (2 if task is real_images.open_ms else 8)


def test_the_unregistered_patient_never_trains(real_images, ibsi):
  folds = real_images.ibsi(ibsi, ibsi)
  assert len(folds) == 8
  assert all("STS_019" not in sides(f)["train"] for f in folds)
  assert [len(f.rows) for f in folds] == [7, 7, 7, 8] * 2
  assert {f.prepare["reference"] for f in folds} == {"mr_t1", "ct"}


def test_commands_name_the_fold_and_each_field_once(real_images, ibsi, tmp_path, monkeypatch):
  called = []
  monkeypatch.setattr(real_images, "_call", called.append)
  monkeypatch.setattr(real_images, "collect", lambda folds, out: {})
  (tmp_path / "t1_to_t2_train_07").mkdir()
  real_images.main(["--task=open_ms", f"--data={ibsi}", f"--out={tmp_path}", "--only=t2_train_07",
                    "--config.seed=3", "--config.generator.channels=(4,8)"])
  prepare, train = called
  assert f"--config.out={tmp_path / 'data' / 'open_ms_train_07'}" in prepare
  assert f"--config.data.dir={tmp_path / 'data' / 'open_ms_train_07'}" in train
  assert f"--workdir={tmp_path / 't1_to_t2_train_07'}" in train
  assert [a for a in train if "channels" in a] == ["--config.generator.channels=(4,8)"]
  assert "--config.seed=3" in train


def finished(folder, scores, unit="HU"):
  """A run folder as `evaluate` leaves it; scores {subject: {row: (psnr, ssim, mae)}}."""
  (folder / "evaluation").mkdir(parents=True)
  (folder / "seconds.txt").write_text("90\n")
  with open(folder / "evaluation" / "per_subject.csv", "w", newline="") as file:
    writer = csv.writer(file)
    writer.writerow(["direction", "row", "subject", "mae", "psnr", "ssim", "mae_tumour"])
    for subject, rows in scores.items():
      for row, (psnr, ssim, mae) in rows.items():
        writer.writerow(["pet->ct", row, subject, mae, psnr, ssim, ""])
  (folder / "evaluation" / "summary.json").write_text(json.dumps(
    {"protocol": {"targets": {"ct": {"unit": unit}}, "steps": {"regression": 7}}}))


def test_tables_keep_the_apart_patient_out_of_the_mean(real_images, ibsi, tmp_path):
  folds = [f for f in real_images.ibsi(ibsi, tmp_path) if f.direction == "pet->ct"][2:]
  floor, good, bad = (20.0, 0.5, 100.0), (22.0, 0.6, 80.0), (2.0, 0.1, 900.0)
  finished(tmp_path / folds[0].run, {s: {"lut2": floor, "regression": good} for s in "ab"})
  finished(tmp_path / folds[1].run, {"c": {"lut2": floor, "regression": (20.5, 0.4, 90.0)},
                                     "STS_019": {"lut2": floor, "regression": bad}})
  found = real_images.collect(folds, tmp_path)["pet->ct"]
  assert found["n"] == 3 and found["unit"] == "HU"
  network = found["overall"]["regression"]
  assert network["psnr"] == pytest.approx((22 + 22 + 20.5) / 3)
  assert network["mae"] == pytest.approx((80 + 80 + 90) / 3)
  assert found["apart"]["regression"]["mae"] == 900
  assert found["verdict"]["above_floor"]
  assert found["verdict"]["psnr"]["gain_lut2"] == pytest.approx(1.5)
  assert found["folds"]["fold_2"]["verdict"]["above_floor"]
  assert not found["folds"]["fold_3"]["verdict"]["above_floor"]  # SSIM below
  text = real_images.report({"pet->ct": found})
  assert "| regression | 21.50 | 0.533 | 83.33 |" in text
  assert "| regression | 22.00 / 0.600 / 80.00 | 20.50 / 0.400 / 90.00 | 2.00 / 0.100 / 900.00 |" \
    in text
  assert "fold_3: 1.5 min, 7 steps. NOT above the floor" in text


def test_the_best_row_of_the_floor_decides(real_images):
  means = {"lut2": {"psnr": 20.0, "ssim": 0.5}, "mean_image": {"psnr": 21.0, "ssim": 0.4},
           "regression": {"psnr": 20.5, "ssim": 0.6}}
  found = real_images.verdict(means)
  assert not found["above_floor"] and found["psnr"]["best"] == "mean_image"
  assert found["psnr"]["gain_lut2"] == pytest.approx(0.5) and found["ssim"]["best"] == "lut2"


@pytest.mark.parametrize("arguments, message", [
  (["--config.steps"], "unknown argument"), (["--wrong=1"], "unknown argument"),
  (["--data=absent"], "no such folder"), (["--only=nothing"], "no run has this")])
def test_a_wrong_call_is_told(real_images, tmp_path, capsys, arguments, message):
  with pytest.raises(SystemExit) as stopped:
    real_images.main(["--task=open_ms", f"--data={tmp_path}", f"--out={tmp_path}", *arguments])
  assert stopped.value.code == 2 and message in capsys.readouterr().err
