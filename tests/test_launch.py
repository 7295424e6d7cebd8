"""What the scripts of launch/ make and collect, without any training."""

import csv
import importlib.util
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def script(name):
  sys.path.insert(0, str(ROOT / "launch"))  # as Python does for a script
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
  for task in (real_images.open_ms, real_images.ibsi, real_images.ibsi_cldm):
    folds = task(ibsi, ibsi)
    assert len({f.run for f in folds}) == len(folds)
    for direction in {d for f in folds for d in f.directions}:
      tested = []
      for fold in (f for f in folds if direction in f.directions):
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


def test_one_model_makes_ct_and_mr_of_the_same_folds(real_images, ibsi):
  folds, single = real_images.ibsi_cldm(ibsi, ibsi), real_images.ibsi(ibsi, ibsi)
  assert [f.run for f in folds] == [f"pet_to_ct_mr_t1_fold_{i}" for i in range(4)]
  assert folds[0].directions == {"pet->ct": "ct", "pet->mr_t1": "mr_t1"}
  assert not {f.data for f in folds} & {f.data for f in single}
  for fold, alone in zip(folds, single[4:], strict=True):
    assert sides(fold) == sides(alone)
    assert fold.prepare == {**alone.prepare, "spacing": "2.25,2.25,0"}  # on the CT's grid
    row = fold.rows[0]
    assert {m: Path(f).name for m, f in row.items() if m not in ("subject", "split")} == {
      "pet": "PET_image.nii.gz", "ct": "CT_image.nii.gz", "mr_t1": "MR_T1_image.nii.gz",
      "mask_tumour": "CT_mask.nii.gz"}
    assert len({Path(f).parent for m, f in row.items() if m not in ("subject", "split")}) == 1


def test_a_task_trains_its_own_config(real_images, ibsi):
  for task, config, targets in ((real_images.ibsi, "unet", "mr_t1"),
                                (real_images.ibsi_cldm, "cldm", "ct,mr_t1")):
    prepare, train = real_images.commands(task(ibsi, ibsi)[0], ibsi, {"seed": 3})
    assert f"--config=configs/{config}.py" in train and "--config.seed=3" in train
    assert f"--config.data.targets={targets}" in train
    assert f"--config.reference={targets.split(',')[0]}" in prepare


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


def finished(folder, scores, bounds=(), switch=None):
  """A run folder as `evaluate` leaves it.

  scores {direction: {subject: {row: (psnr, ssim, mae)}}}; rows that are no lut2 are stages.
  """
  (folder / "evaluation").mkdir(parents=True)
  (folder / "seconds.txt").write_text("90\n")
  stages = {}
  with open(folder / "evaluation" / "per_subject.csv", "w", newline="") as file:
    writer = csv.writer(file)
    writer.writerow(["direction", "row", "subject", "mae", "psnr", "ssim", "mae_tumour"])
    for direction, subjects in scores.items():
      for subject, rows in subjects.items():
        for row, (psnr, ssim, mae) in rows.items():
          writer.writerow([direction, row, subject, mae, psnr, ssim, ""])
          stages |= {row: 7} if row != "lut2" else {}
  summary = {"protocol": {"targets": {"ct": {"unit": "HU"}, "mr_t1": {"unit": "1"}},
                          "steps": stages, "bounds": list(bounds)}}
  (folder / "evaluation" / "summary.json").write_text(json.dumps(
    {**summary, "code_switch": switch} if switch else summary))


def test_tables_keep_the_apart_patient_out_of_the_mean(real_images, ibsi, tmp_path):
  folds = [f for f in real_images.ibsi(ibsi, tmp_path) if "pet->ct" in f.directions][2:]
  floor, good, bad = (20.0, 0.5, 100.0), (22.0, 0.6, 80.0), (2.0, 0.1, 900.0)
  finished(tmp_path / folds[0].run,
           {"pet->ct": {s: {"lut2": floor, "regression": good} for s in "ab"}})
  finished(tmp_path / folds[1].run,
           {"pet->ct": {"c": {"lut2": floor, "regression": (20.5, 0.4, 90.0)},
                        "STS_019": {"lut2": floor, "regression": bad}}})
  found = real_images.collect(folds, tmp_path)["pet->ct"]
  assert found["n"] == 3 and found["unit"] == "HU"
  network = found["overall"]["regression"]
  assert network["psnr"] == pytest.approx((22 + 22 + 20.5) / 3)
  assert network["mae"] == pytest.approx((80 + 80 + 90) / 3)
  assert found["apart"]["regression"]["mae"] == 900
  assert found["verdicts"]["regression"]["above_floor"]
  assert found["verdicts"]["regression"]["psnr"]["gain_lut2"] == pytest.approx(1.5)
  assert found["folds"]["fold_2"]["verdicts"]["regression"]["above_floor"]
  assert not found["folds"]["fold_3"]["verdicts"]["regression"]["above_floor"]  # SSIM below
  text = real_images.report({"pet->ct": found})
  assert "| regression | 21.50 | 0.533 | 83.33 |" in text
  assert "| regression | 22.00 / 0.600 / 80.00 | 20.50 / 0.400 / 90.00 | 2.00 / 0.100 / 900.00 |" \
    in text
  assert "regression: above the floor" in text
  assert "- fold_3: 1.5 min. regression, 7 steps: NOT above the floor" in text
  assert "each code" not in text  # a network without codes


def test_one_model_has_a_table_a_direction_with_its_bound_and_its_code_switch(
    real_images, ibsi, tmp_path):
  fold = real_images.ibsi_cldm(ibsi, tmp_path)[0]
  rows = {"lut2": (20.0, 0.5, 100.0), "autoencoder": (30.0, 0.9, 9.0), "cldm": (19.0, 0.4, 110.0),
          "unet": (21.0, 0.6, 90.0)}
  other = {**rows, "lut2": (10.0, 0.1, 0.5), "cldm": (11.0, 0.2, 0.25)}
  closer = {"ct": {"mr_t1": True, "constant": True}, "mr_t1": {"ct": True, "constant": False}}
  finished(tmp_path / fold.run, {"pet->ct": {"a": rows}, "pet->mr_t1": {"a": other}},
           ["autoencoder"], {"cldm": {
             "mae": {"ct": {"ct": 0.02, "mr_t1": 0.3, "constant": 0.03},
                     "mr_t1": {"ct": 0.4, "mr_t1": 0.21, "constant": 0.2}},
             "closer_to_own_target_than": closer}})
  found = real_images.collect([fold], tmp_path)
  assert found["pet->ct"]["stages"] == ["autoencoder", "cldm", "unet"]
  assert found["pet->mr_t1"]["unit"] == "1" and found["pet->ct"]["unit"] == "HU"
  assert {d: {s: v["above_floor"] for s, v in f["verdicts"].items()} for d, f in found.items()} == {
    "pet->ct": {"cldm": False, "unet": True}, "pet->mr_t1": {"cldm": True, "unet": True}}
  ct, mr = real_images.report(found).split("### pet->mr_t1")
  assert "| autoencoder (bound) | 30.00 | 0.900 | 9.000 |" in ct
  assert "| cldm | 19.00 | 0.400 | 110.00 |" in ct and "| cldm | 11.00 | 0.200 | 0.250 |" in mr
  assert "| fold | row | code ct | code mr_t1 | constant | own code is closest |" in ct
  assert "| fold_0 | cldm | 0.0200 | 0.3000 | 0.0300 | yes |" in ct
  assert "| fold_0 | cldm | 0.4000 | 0.2100 | 0.2000 | no: constant |" in mr
  assert "- fold_0: 1.5 min. cldm, 7 steps: NOT above the floor" in ct and "unet, 7 steps" in ct


def test_the_best_row_of_the_floor_decides(real_images):
  means = {"lut2": {"psnr": 20.0, "ssim": 0.5}, "mean_image": {"psnr": 21.0, "ssim": 0.4},
           "regression": {"psnr": 20.5, "ssim": 0.6}}
  found = sys.modules["real_tables"].verdict(means, "regression")
  assert not found["above_floor"] and found["psnr"]["best"] == "mean_image"
  assert found["psnr"]["gain_lut2"] == pytest.approx(0.5) and found["ssim"]["best"] == "lut2"


@pytest.mark.parametrize("arguments, message", [
  (["--config.steps"], "unknown argument"), (["--wrong=1"], "unknown argument"),
  (["--data=absent"], "no such folder"), (["--only=nothing"], "no run has this")])
def test_a_wrong_call_is_told(real_images, tmp_path, capsys, arguments, message):
  with pytest.raises(SystemExit) as stopped:
    real_images.main(["--task=open_ms", f"--data={tmp_path}", f"--out={tmp_path}", *arguments])
  assert stopped.value.code == 2 and message in capsys.readouterr().err
