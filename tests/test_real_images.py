"""Real, de-identified scans: what simulated ones cannot show. Skipped where they are absent.

The folder is given by MEDSYNTH_REAL_DATA (default ../shared/data beside the project). None of its
images belongs in this repository.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from medsynth_jax.data import grids
from medsynth_jax.data.dataset import Store
from medsynth_jax.data.volumes import ImageWarning, read
from medsynth_jax.prepare import default_config, prepare

ROOT = Path(__file__).parents[1]
REAL = Path(os.environ.get("MEDSYNTH_REAL_DATA") or ROOT.parent / "shared" / "data")
IBSI = REAL / "ibsi_sts_petctmr"

pytestmark = pytest.mark.skipif(
  not IBSI.is_dir(), reason=f"no real images in {REAL}; set MEDSYNTH_REAL_DATA to their folder")


def prepared(folder, header, rows, **fields):
  folder.mkdir(exist_ok=True)
  (folder / "cases.csv").write_text("\n".join([header, *rows]) + "\n")
  config = default_config()
  config.update({"table": str(folder / "cases.csv"), "out": str(folder / "data"), "workers": 1})
  config.update(fields)
  return Store(prepare(config))


@pytest.mark.parametrize("series, file, exact", [
  ("CT", "CT_image", 0), ("MR_T1", "MR_T1_image", 0), ("PET", "PET_image", 1e-5)])
def test_a_dicom_series_is_its_nifti_copy(series, file, exact):
  dicom = read(REAL / "dicom" / "ibsi_STS_002" / series)
  nifti = read(IBSI / "STS_002" / f"{file}.nii.gz")
  np.testing.assert_allclose(grids.resample(dicom, nifti.array.shape, nifti.affine), nifti.array,
                             atol=exact)


def test_tilted_head_ct_of_two_thicknesses():
  with pytest.warns(ImageWarning, match="4 to 7 mm, interpolated to 4.00"):
    volume = read(REAL / "dicom" / "ge_head_ct_tilt")
  axes = volume.affine[:3, :3] / volume.spacing
  assert np.degrees(np.arcsin(abs(axes[:, 1] @ axes[:, 2]))) == pytest.approx(18.5, abs=0.05)
  shape, affine = grids.model_grid(volume)
  straight = affine[:3, :3] / np.sqrt((affine[:3, :3] ** 2).sum(0))
  np.testing.assert_allclose(straight.T @ straight, np.eye(3), atol=1e-6)
  assert shape == (512, 534, 9)
  back = grids.resample(read_again(volume, shape, affine), volume.array.shape, volume.affine)
  inside = grids.inside(shape, affine, volume.array.shape, volume.affine)
  assert inside.mean() > 0.99
  bone = (volume.array > 300) & inside
  assert np.corrcoef(back[bone], volume.array[bone])[0, 1] > 0.97


def read_again(volume, shape, affine):
  return type(volume)(grids.resample(volume, shape, affine, fill=-1024), affine)


@pytest.mark.parametrize("patient", ["STS_002", "STS_003", "STS_008", "STS_012", "STS_015",
                                     "STS_024", "STS_025"])
def test_mr_lies_on_the_ct_lattice(patient):
  ct = read(IBSI / patient / "CT_image.nii.gz")
  mr = grids.canonical(read(IBSI / patient / "MR_T1_image.nii.gz"))
  placed = grids.resample(ct, mr.array.shape, mr.affine, fill=-1024)
  assert (placed == placed.round()).all()  # HU were copied, not interpolated


def test_ct_to_mr(tmp_path):
  names = ("STS_002", "STS_019", "STS_025")
  store = prepared(
    tmp_path, "subject,ct,mr_t1,mask_tumour",
    [f"{n},{IBSI}/{n}/CT_image.nii.gz,{IBSI}/{n}/MR_T1_image.nii.gz,{IBSI}/{n}/MR_T1_mask.nii.gz"
     for n in names])
  assert store.info.reference == "mr_t1" and not store.info.anatomical
  for case in store.info.cases:
    found = store.volume(case)
    if case.subject == "STS_019":  # rotated, and not registered
      assert found["valid"]["mr_t1"].mean() < 0.4
      continue
    assert found["valid"]["ct"].all()
    assert 0.6 < found["mask"].mean() < 0.95
    assert (found["mask"] | ~found["rois"]["tumour"]).mean() > 0.999
    tissue = found["images"]["ct"][found["mask"]]
    assert (tissue > -300).mean() > 0.9  # the MR's body is where the CT is no air
    assert 0.002 < case.images["mr_t1"].clipped["all"] < 0.01


def test_pet_to_ct_loses_the_table(tmp_path):
  names = ("STS_002", "STS_008")
  store = prepared(
    tmp_path, "subject,pet,ct,mask_tumour",
    [f"{n},{IBSI}/{n}/PET_image.nii.gz,{IBSI}/{n}/CT_image.nii.gz,{IBSI}/{n}/CT_mask.nii.gz"
     for n in names])
  for case in store.info.cases:
    found = store.volume(case)
    assert (found["valid"]["pet"] & found["mask"]).sum() > 0.95 * found["mask"].sum()
    assert found["images"]["pet"].shape == found["images"]["ct"].shape
    threshold = found["images"]["ct"] > -500
    assert 0.85 < (found["mask"] & threshold).sum() / threshold.sum() <= 1
  patient = store.volume(store.info.cases[0])
  behind = patient["images"]["ct"][:, :, :20] > -500  # the table in the crop's back rows
  assert behind.sum() > 1000 and (patient["mask"][:, :, :20] & behind).mean() < 0.6 * behind.mean()


def test_open_ms_brains_stay_whole(tmp_path):
  cell = f"{REAL}/open_ms/patient"
  store = prepared(tmp_path, "subject,split,t1,t2",
                   [f"{n},{split},{cell}{n}_T1_MNI.nii.gz,{cell}{n}_T2_MNI.nii.gz"
                    for n, split in (("07", "train"), ("26", "test"))])
  assert store.info.anatomical and store.info.plane == 2
  for case in store.info.cases:
    found = store.volume(case)
    brain = found["images"]["t2"] > 0
    assert (found["mask"] == brain).mean() > 0.995  # dark fluid is brain, too
    assert case.shape == (158, 190, 160)


@pytest.mark.slow
@pytest.mark.parametrize("task, only, direction, lut2", [
  ("open_ms", "t1_to_t2_train_07", "t1->t2", {"psnr": 19.37, "ssim": 0.694}),
  ("ibsi", "pet_to_ct_fold_3", "pet->ct", {})])
def test_script_scores_real_patients(tmp_path, task, only, direction, lut2):
  """A few steps of one run: the floor is that of the README, the network a row beside it."""
  command = [sys.executable, ROOT / "launch" / "real_images.py", f"--task={task}",
             f"--data={REAL}", f"--out={tmp_path}", f"--only={only}", "--config.steps=4",
             "--config.generator.channels=(4,8)", "--config.data.size=64,96"]
  subprocess.run(command, check=True)
  found = json.loads((tmp_path / f"{task}.json").read_text())[direction]
  assert found["overall"].keys() == {"constant", "mean_image", "lut", "lut2",
                                     "identity_normalised", "regression"}
  for metric, value in lut2.items():
    assert found["overall"]["lut2"][metric] == pytest.approx(value, rel=0.001)
  assert not found["verdicts"]["regression"]["above_floor"]  # four steps teach nothing
  (fold,) = found["folds"].values()
  if task == "ibsi":
    assert fold["subjects"].keys() == {"STS_025", "STS_019"}
    assert found["overall"]["lut2"]["mae_tumour"] > 0
    assert found["overall"]["lut2"] == pytest.approx(fold["subjects"]["STS_025"]["lut2"])
  assert len(list((tmp_path / only / "evaluation" / "panels").glob("*.png"))) in (1, 2)


@pytest.mark.slow
def test_script_scores_one_model_of_two_targets(tmp_path):
  """A few steps: both directions have the floor, the bound and both networks, codes compared."""
  command = [sys.executable, ROOT / "launch" / "real_images.py", "--task=ibsi_cldm",
             f"--data={REAL}", f"--out={tmp_path}", "--only=fold_3",
             *(f"--config.{f}" for f in (
               "autoencoder.steps=2", "autoencoder.network.channels=(4,8)",
               "autoencoder.network.groups=2", "autoencoder.discriminator.base=4",
               "latent_moments.steps=2", "cldm.steps=2", "cldm.network.base=8",
               "cldm.network.groups=2", "cldm.sampler.steps=2", "unet.steps=2",
               "unet.generator.channels=(4,8)"))]
  subprocess.run(command, check=True)
  found = json.loads((tmp_path / "ibsi_cldm.json").read_text())
  assert found.keys() == {"pet->ct", "pet->mr_t1"}
  for direction, other in (("pet->ct", "mr_t1"), ("pet->mr_t1", "ct")):
    scores = found[direction]
    assert {"constant", "mean_image", "lut", "lut2", "autoencoder", "cldm", "unet"} \
      <= scores["overall"].keys()
    assert scores["bounds"] == ["autoencoder"] and scores["verdicts"].keys() == {"cldm", "unet"}
    assert scores["overall"]["lut2"]["mae_tumour"] > 0
    (fold,) = scores["folds"].values()
    assert fold["subjects"].keys() == {"STS_025", "STS_019"}
    assert fold["switch"]["cldm"]["closer"].keys() == {other, "constant"}


@pytest.mark.slow
@pytest.mark.parametrize("task, only, headings", [
  ("cta", "", ["ncct->cta, semi-synthetic, blocks of one patient (feasibility)"]),
  ("ibsi_reg", "fold_3", ["ct->mr_t1, as they are",
                          "ct->mr_t1, reference moved rigidly onto the CT"]),
  ("open_ms_any", "train_07", [f"{a}->{b}" for a in ("t1", "t1post", "t2", "flair")
                               for b in ("t1", "t1post", "t2", "flair") if a != b])])
def test_script_makes_every_table_of_the_gans(tmp_path, task, only, headings):
  """Two steps: what is trained, moved and scored has a table with the floor and the networks."""
  stages = {"cta": ("cta_gan.", "vessels.")}.get(task, ("",))
  fields = [f"--config.{s}{f}" for s in stages for f in (
    "steps=2", "generator.base=4", "discriminator.base=4")]
  subprocess.run([sys.executable, ROOT / "launch" / "real_images.py", f"--task={task}",
                  f"--data={REAL}", f"--out={tmp_path}", f"--only={only}", *fields], check=True)
  found = json.loads((tmp_path / f"{task}.json").read_text())
  assert list(found) == headings
  networks = {"cta": {"cta_gan", "vessels"}, "ibsi_reg": {"pix2pix", "reg_gan"},
              "open_ms_any": {"unified_gan"}}[task]
  for scores in found.values():
    assert {"constant", "lut2", *networks} <= scores["overall"].keys() and scores["n"] == 1
  if task == "cta":
    identity = found[headings[0]]["overall"]["identity"]
    assert identity["mae_lumen"] > 250 and identity["mae_bone"] == 0
  if task == "ibsi_reg":
    first, second = (scores["overall"]["lut2"]["psnr"] for scores in found.values())
    assert first != second
    assert "| STS_025 |" in (tmp_path / "ibsi_reg_offsets.md").read_text()
