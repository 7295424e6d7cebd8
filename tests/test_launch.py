"""What the scripts of launch/ make and collect, without any training."""

import csv
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

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
  for task in ("open_ms", "open_ms_any", "ibsi", "ibsi_cldm"):
    folds = real_images.TASKS[task](ibsi, ibsi)
    assert len({f.run for f in folds}) == len(folds)
    for direction in {d for f in folds for d in f.directions}:
      tested = []
      for fold in (f for f in folds if direction in f.directions):
        found = sides(fold)
        assert found["train"] and not found["train"] & found["test"]
        assert {r["split"] for r in fold.rows} == {"train", "test"}  # nobody chooses a checkpoint
        tested += found["test"]
      assert len(tested) == len(set(tested)) == (2 if "open_ms" in task else 8)


def test_the_unregistered_patient_never_trains(real_images, ibsi):
  folds = real_images.TASKS["ibsi"](ibsi, ibsi)
  assert len(folds) == 8
  assert all("STS_019" not in sides(f)["train"] for f in folds)
  assert [len(f.rows) for f in folds] == [7, 7, 7, 8] * 2
  assert {f.prepare["reference"] for f in folds} == {"mr_t1", "ct"}


def test_one_model_makes_ct_and_mr_of_the_same_folds(real_images, ibsi):
  folds, single = real_images.TASKS["ibsi_cldm"](ibsi, ibsi), real_images.TASKS["ibsi"](ibsi, ibsi)
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
  for task, config, targets in (("ibsi", "unet", "mr_t1"), ("ibsi_cldm", "cldm", "ct,mr_t1")):
    fold = real_images.TASKS[task](ibsi, ibsi)[0]
    prepare, train = real_images.commands(fold, ibsi, {"seed": 3})
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


def test_any_contrast_is_made_from_any_other(real_images, tmp_path):
  first, second = real_images.TASKS["open_ms_any"](tmp_path, tmp_path)
  assert len(first.directions) == 12 and first.directions["t2->t1post"] == "t1post"
  assert sides(first) == {"train": {"patient07"}, "test": {"patient26"}}
  assert sides(second) == {"train": {"patient26"}, "test": {"patient07"}}
  assert Path(first.rows[0]["t1post"]).name == "patient07_T1POST_MNI.nii.gz"
  assert first.data != real_images.TASKS["open_ms"](tmp_path, tmp_path)[0].data
  _, train = real_images.commands(first, tmp_path, {})
  assert {"--config=configs/unified_gan.py", "--config.data.source=any",
          "--config.data.targets=t1,t1post,t2,flair"} < {*train}


@pytest.fixture
def registered(ibsi, monkeypatch):
  """`align` that writes nothing: each patient's offset is his number in mm."""
  alignment, called = sys.modules["alignment"], []
  def align(fixed, moving, mask, to):
    called.append((fixed.name, moving.name, mask.name, to.name))
    mm = float(to.name[-3:])
    return alignment.Rigid(np.eye(4), (mm, 0.0, 0.0), 1.5, 0.25, 0.5)
  monkeypatch.setattr(alignment, "align", align)
  return called


def test_references_are_moved_onto_the_ct_once_and_only_to_be_scored(
    real_images, ibsi, tmp_path, registered, capsys):
  folds = real_images.TASKS["ibsi_reg"](ibsi, tmp_path)
  assert len(registered) == 8
  assert registered[0] == ("CT_image.nii.gz", "MR_T1_image.nii.gz", "MR_T1_mask.nii.gz", "STS_002")
  table = (tmp_path / "ibsi_reg_offsets.md").read_text()
  assert "| STS_024 | +24.0 | +0.0 | +0.0 | 24.0 | 1.5 | 0.250 | 0.500 |" in table
  assert table in capsys.readouterr().out
  assert real_images.TASKS["ibsi_reg"](ibsi, tmp_path) == folds and len(registered) == 8
  single = {f.name: f for f in real_images.TASKS["ibsi"](ibsi, tmp_path) if f.source == "ct"}
  trained, scored = folds[:8], folds[8:]
  assert not any(f.taken for f in trained) and all(f.taken for f in scored)
  assert {f.config for f in trained} == {"reg_gan:pix2pix", "reg_gan"}
  assert len({f.run for f in folds}) == 16
  for fold in trained:
    assert (fold.rows, fold.data) == (single[fold.name].rows, single[fold.name].data)
  for fold in scored:
    (first,) = [f for f in trained if f.run == fold.taken]
    assert (first.config, first.name, first.row) == (fold.config, fold.name, fold.row)
    assert fold.data != first.data and fold.group != first.group
    for row, own in zip(fold.rows, first.rows, strict=True):
      different = {k for k in row if row[k] != own[k]}
      assert different == ({"mr_t1", "mask_tumour"} if row["split"] == "test" else set())
      assert all(Path(row[k]).parent == tmp_path / "scans" / "aligned" / row["subject"]
                 for k in different)


def test_moved_references_are_scored_with_the_weights_as_they_are(
    real_images, ibsi, tmp_path, registered):
  fold = real_images.TASKS["ibsi_reg"](ibsi, tmp_path)[8]
  _, train = real_images.commands(fold, tmp_path, {"steps": 7, "seed": 1})
  assert "--config=configs/reg_gan.py:pix2pix" in train
  assert [a for a in train if "steps" in a] == ["--config.steps=0"]  # whatever was asked for
  assert f"--config.pretrained={tmp_path / fold.taken}" in train and "--config.seed=1" in train
  assert f"--workdir={tmp_path / fold.run}" in train


def test_the_angiogram_has_the_rows_that_were_made(real_images, tmp_path, monkeypatch):
  made = []
  def make(images, out):
    made.append(images)
    out.mkdir(parents=True)
    (out / "cases.csv").write_text("subject,split,ncct,cta,mask_lumen\na,train,1.nii,2.nii,3.nii\n"
                                   "b,test,4.nii,5.nii,6.nii\n")
  monkeypatch.setattr(sys.modules["semi_synthetic_cta"], "make", make)
  for _ in range(2):
    (fold,) = real_images.TASKS["cta"](tmp_path / "images", tmp_path)
  assert made == [tmp_path / "images"]
  assert fold.directions == {"ncct->cta": "cta"} and fold.config == "cta_gan"
  assert fold.rows[1] == {"subject": "b", "split": "test", **{
    k: str(tmp_path / "scans" / "cta" / f"{n}.nii")
    for k, n in (("ncct", 4), ("cta", 5), ("mask_lumen", 6))}}


@pytest.mark.parametrize("task", ["ibsi", "ibsi_cldm", "ibsi_reg", "cta", "open_ms", "open_ms_any",
                                  "tuning"])
def test_settings_are_fields_of_the_config(real_images, task):
  """A misspelled field would be told only by the run."""
  from medsynth_jax import cli
  flags = [f"--config.{k}={v}" for k, v in real_images.SETTINGS[task].items()]
  configs = {"ibsi_cldm": ["cldm.py"], "ibsi_reg": ["reg_gan.py:pix2pix", "reg_gan.py"],
             "cta": ["cta_gan.py"], "open_ms_any": ["unified_gan.py"]}.get(task, ["unet.py"])
  for config in configs:
    read = cli.read_config(str(ROOT / "configs" / config), flags)
    assert not read.get("displace", 0)
    assert not any(read[stage].get("displace", 0) for stage in read.get("stages", ()))


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
  folds = [f for f in real_images.TASKS["ibsi"](ibsi, tmp_path) if "pet->ct" in f.directions][2:]
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
  fold = real_images.TASKS["ibsi_cldm"](ibsi, tmp_path)[0]
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


def test_networks_of_one_fold_share_a_table_and_moved_references_have_their_own(
    real_images, ibsi, tmp_path, registered):
  folds = [f for f in real_images.TASKS["ibsi_reg"](ibsi, tmp_path) if f.name == "fold_0"]
  for fold in folds:
    gain = 1.0 * bool(fold.taken) + 0.5 * (fold.row == "pix2pix")
    finished(tmp_path / fold.run, {"ct->mr_t1": {"a": {
      "lut2": (12.0, 0.3, 0.2), "reg_gan": (13.0 + gain, 0.4, 0.1)}}})  # the stage of both
  found = real_images.collect(folds, tmp_path)
  asis, moved = found.values()
  assert [*found] == ["ct->mr_t1, as they are",
                      "ct->mr_t1, reference moved rigidly onto the CT"]
  assert asis["stages"] == moved["stages"] == ["pix2pix", "reg_gan"]
  assert asis["overall"]["reg_gan"]["psnr"] == 13 and moved["overall"]["pix2pix"]["psnr"] == 14.5
  assert asis["folds"]["fold_0"]["seconds"] == 180  # of both networks
  text = real_images.report(found)
  assert "### ct->mr_t1, reference moved rigidly onto the CT, mean of 1 subject, each" in text


def test_twelve_directions_have_a_table_each(real_images, tmp_path):
  fold = real_images.TASKS["open_ms_any"](tmp_path, tmp_path)[0]
  closer = {t: {u: True for u in fold.targets if u not in ("t1", t)} for t in fold.targets[1:]}
  mae = {t: {u: 0.1 for u in fold.targets[1:]} for t in fold.targets[1:]}
  finished(tmp_path / fold.run, {
    d: {"a": {"lut2": (12.0, 0.3, 0.2), "unified_gan": (13.0, 0.4, 0.1)}} for d in fold.directions},
    switch={"t1": {"unified_gan": {"mae": mae, "closer_to_own_target_than": closer}}})
  path = tmp_path / fold.run / "evaluation" / "summary.json"
  summary = json.loads(path.read_text())
  summary["protocol"]["targets"] = {d: {"unit": "normalised"} for d in fold.directions}
  path.write_text(json.dumps(summary))
  found = real_images.collect([fold], tmp_path)
  assert found.keys() == fold.directions.keys()
  assert found["t2->t1"]["unit"] == "normalised" and not found["t2->t1"]["folds"]["train_07"][
    "switch"]
  assert found["t1->t2"]["folds"]["train_07"]["switch"]["unified_gan"]["closer"] == closer["t2"]
  assert "### flair->t1post, mean of 1 subject" in real_images.report(found)


def test_an_angiogram_is_scored_beside_identity_in_its_regions(real_images, tmp_path):
  fold = sys.modules["real_folds"].Fold("ncct", ["cta"], "one", "cta", [], {}, "cta_gan",
                                        group="semi-synthetic")
  (tmp_path / fold.run / "evaluation").mkdir(parents=True)
  with open(tmp_path / fold.run / "evaluation" / "per_subject.csv", "w", newline="") as file:
    csv.writer(file).writerows([
      ["direction", "row", "subject", "mae", "psnr", "ssim", "mae_lumen", "mae_enhanced",
       "mae_bone", "dice_lumen"],
      *(["ncct->cta", row, "block", 50, psnr, 0.9, lumen, 200, 5, dice]
        for row, psnr, lumen, dice in (("lut2", 30, 300, 0.1), ("identity", 31, 390, 0),
                                       ("vessels", 33, 90, 0.8)))])
  (tmp_path / fold.run / "evaluation" / "summary.json").write_text(json.dumps({"protocol": {
    "targets": {"cta": {"unit": "HU"}}, "steps": {"vessels": 5}, "bounds": []}}))
  found = real_images.collect([fold], tmp_path)
  text = real_images.report(found)
  assert "### ncct->cta, semi-synthetic, mean of 1 subject" in text
  assert "| MAE in the lumen [HU] | MAE in other enhanced tissue [HU] | MAE in bone [HU] |" in text
  assert "| identity | 31.00 | 0.900 | 50.00 | 390.00 | 200.00 | 5.000 | 0.000 |" in text
  assert found["ncct->cta, semi-synthetic"]["verdicts"]["vessels"]["psnr"]["best"] == "identity"


def test_registration_finds_a_known_offset(real_images):
  """Two scans of unlike contrast, one moved by a known amount and without a part of its field."""
  from medsynth_jax.data.volumes import Volume
  alignment = sys.modules["alignment"]
  shape, affine = (36, 32, 28), np.diag([2.0, 2.0, 3.0, 1.0])
  affine[:3, :3] = [[0.8, -0.6, 0], [0.6, 0.8, 0], [0, 0, 1]] @ affine[:3, :3]  # oblique
  affine[:3, 3] = 20, -5, 40
  body = ndimage.gaussian_filter(np.random.default_rng(0).standard_normal(shape), 2.5)
  body = 100 * body / body.std()
  angle, offset = np.radians(4), np.array([3.0, -4.0, 5.0])
  middle = (affine @ [*((np.array(shape) - 1) / 2), 1])[:3]
  turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0],
                   [0, 0, 1]])
  known = np.eye(4)  # from the fixed scan's mm to the moving one's
  known[:3, :3], known[:3, 3] = turn, middle + offset - turn @ middle
  back = np.linalg.solve(affine, np.linalg.solve(known, affine))
  other = 500 - 2 * np.abs(body)  # not a linear function of it
  moving = ndimage.affine_transform(other, back[:3, :3], back[:3, 3], mode="nearest")
  moving[:3] = 0
  fixed, scan = (Volume(x.astype(np.float32), affine) for x in (body, moving))
  found = alignment.register(fixed, scan)
  assert np.allclose(found.translation, offset, atol=0.6) and abs(found.rotation - 4) < 1
  assert found.after > found.before + 0.1 and found.length == pytest.approx(50 ** 0.5, abs=0.8)
  inside = (slice(8, -8),) * 3
  error = alignment.moved(scan, found) - other
  assert np.abs(error[inside]).mean() < 0.3 * np.abs((moving - other)[inside]).mean()


def test_moving_a_scan_keeps_zeros_outside_and_masks_whole(real_images):
  from medsynth_jax.data.volumes import Volume
  alignment = sys.modules["alignment"]
  array = np.arange(24, dtype=np.float32).reshape(2, 3, 4) + 1
  matrix = np.eye(4)
  matrix[1, 3] = 2.0  # one voxel of 2 mm along y
  found = alignment.Rigid(matrix, (0, 2, 0), 0.0, 0, 1)
  for nearest in (False, True):
    out = alignment.moved(Volume(array, np.diag([1.0, 2.0, 1.0, 1.0])), found, nearest)
    assert np.array_equal(out[:, :-1], array[:, 1:]) and not out[:, -1].any()


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
