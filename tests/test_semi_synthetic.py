"""The semi-synthetic non-contrast CT: of a made-up chest, and of the real scan where it is."""

import csv
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from medsynth_jax.data.volumes import read, write
from medsynth_jax.errors import UserError

ROOT = Path(__file__).parents[1]
REAL = Path(os.environ.get("MEDSYNTH_REAL_DATA") or ROOT.parent / "shared" / "data")
sys.path.insert(0, str(ROOT / "launch"))  # as Python does for a script

import semi_synthetic_cta as cta  # noqa: E402

NOISE = 25.0


def blurred(shape, centre, radius, axes=(0, 1, 2)):
  """A ball or (over two axes) a cylinder with an edge of about 1.5 mm: 1 inside, 0 outside."""
  grid = np.meshgrid(*map(np.arange, shape), indexing="ij")
  r = np.sqrt(sum((grid[a] - centre[a]) ** 2 for a in axes))
  return ndimage.gaussian_filter((r < radius).astype(np.float32), 0.45)


@pytest.fixture(scope="module")
def chest():
  """Truth and scan of 60 x 60 x 40 voxels of 1.5 mm: fat, muscle, lung, blood, bone, a strut.

  {name: array}: `plain` (HU without contrast agent and noise), `ct`, `vessels` (the given mask),
  `heart`, `bone`, `strut`, `noise`.
  """
  shape, rng = (60, 60, 40), np.random.default_rng(0)
  lung = blurred(shape, (48, 30, 20), 9, (0, 1))
  plain = np.full(shape, -100.0)
  plain += 150 * blurred(shape, (24, 30, 0), 21, (0, 1))  # muscle of 50 HU in fat
  plain = plain * (1 - lung) - 850 * lung
  aorta, heart = blurred(shape, (12, 30, 0), 5, (0, 1)), blurred(shape, (30, 30, 20), 10)
  branch = blurred(shape, (48, 30, 20), 1.6, (0, 1))  # a thin vessel in the lung, from the heart
  stalk = blurred(shape, (0, 30, 20), 1.6, (1, 2)) * (np.arange(60)[:, None, None] > 30) \
    * (np.arange(60)[:, None, None] < 49)
  bone = blurred(shape, (13, 41, 0), 5.5, (0, 1))
  marrow = blurred(shape, (13, 41, 0), 3.8, (0, 1))
  blood = np.clip(aorta + heart + np.maximum(branch, stalk), 0, 1)
  plain = plain * (1 - blood) + 40 * blood
  plain = plain * (1 - bone) + 800 * bone - 600 * marrow
  level = 450 + 100 * np.linspace(0, 1, 40)  # more agent above: a regional level, not one for all
  ct = plain + blood * (level - 40)
  strut = np.zeros(shape, bool)
  strut[12, 34, 2:16:2] = True  # below; the vessel above is free
  ct[strut] = 2500
  noise = rng.normal(0, NOISE, shape)
  ct = np.round(ct + noise).astype(np.float32)
  vessels = aorta > 0.5
  smooth = cta.denoised(ct)
  parts = cta.parts(ct, smooth, vessels)
  return {"plain": plain, "ct": ct, "vessels": vessels, "heart": heart > 0.5, "bone": bone > 0.9,
          "strut": strut, "noise": noise, "thin": np.maximum(branch, stalk) > 0.9, "lung": lung,
          "parts": parts, "smooth": smooth, "made": cta.non_contrast(ct, smooth, parts),
          "share": blood}


def eroded(mask, by=2):
  return ndimage.binary_erosion(mask, iterations=by)


def test_blood_and_bone_are_told_apart(chest):
  parts = chest["parts"]
  assert cta.dice(parts.lumen, chest["vessels"]) > 0.95
  assert parts.enhanced[eroded(chest["heart"], 1)].mean() > 0.99
  assert parts.enhanced[chest["thin"] & ~chest["heart"]].mean() > 0.9
  assert not (parts.blood & eroded(chest["bone"], 1)).any()
  assert parts.bone[chest["bone"]].mean() > 0.95  # it touches the aorta
  assert not (parts.lumen & parts.enhanced).any() and not (parts.bone & parts.blood).any()


def test_blood_has_no_agent_left_and_keeps_its_noise(chest):
  made = chest["made"]
  for name in ("vessels", "heart"):
    region = eroded(chest[name])
    region[:, :, :22] = False
    error = made[region] - chest["plain"][region]
    assert abs(error.mean()) < 6 and 0.85 * NOISE < error.std() < 1.1 * NOISE
    assert np.corrcoef(error, chest["noise"][region])[0, 1] > 0.95
  assert np.abs(made[chest["thin"] & ~chest["heart"]] - 40).mean() < 25


def test_edges_have_neither_halo_nor_rim(chest):
  """Mean HU by the share of blood in a voxel, in muscle of 50 HU, away from bone and strut.

  What is under 100 HU stays as it is: that is the excess left where blood is less than a third.
  """
  made, ct, share = chest["made"], chest["ct"], chest["share"]
  apart = ~ndimage.binary_dilation(chest["bone"] | chest["strut"], iterations=4) \
    & (ndimage.minimum_filter(chest["plain"], 5) > 0)
  for low, high in ((0.7, 0.98), (0.98, 1.1)):
    region = apart & (share > low) & (share < high)
    assert region.sum() > 500
    assert abs(made[region].mean() - 45) < 25 and made[region].std() > 0.6 * NOISE
  little = apart & (share > 0.1) & (share < 0.3)
  assert ct[little].mean() > 110 and 40 < made[little].mean() < 90
  assert abs(made[apart & (share > 0.02)].mean() - 45) < 12


def test_what_is_no_blood_is_untouched(chest):
  made, ct = chest["made"], chest["ct"]
  assert np.array_equal(made[ct < 100], ct[ct < 100])
  assert np.array_equal(made[chest["parts"].bone], ct[chest["parts"].bone])
  assert np.array_equal(made[~chest["parts"].blood], ct[~chest["parts"].blood])
  assert np.array_equal(made[ct > cta.METAL], ct[ct > cta.METAL]) and chest["strut"].sum() == 7
  assert (made <= ct).all()


def test_texture_does_not_give_the_lumen_away(chest):
  body = ndimage.binary_fill_holes(chest["ct"] > -300)
  flat = np.where(chest["parts"].blood, np.float32(cta.PLAIN), chest["ct"])
  only = np.where(chest["parts"].lumen, np.float32(cta.PLAIN), chest["ct"])
  assert cta.texture_dice(flat, chest["parts"].blood, body) > 0.8  # the trap, and it is found
  assert cta.texture_dice(only, chest["parts"].lumen, body) > 0.8
  assert cta.texture_dice(chest["made"], chest["parts"].lumen, body) < 0.3


def test_dense_inflow_is_blood_and_loses_its_streaks(chest):
  """Undiluted agent in the heart: the level follows it, and its texture is scaled to noise."""
  rng = np.random.default_rng(1)
  ct = chest["ct"].copy()
  jet = eroded(chest["heart"], 3)
  streaks = ndimage.gaussian_filter(rng.normal(0, 1, ct.shape), 1)
  ct[jet] += (1500 + 600 * streaks / streaks.std())[jet]
  smooth = cta.denoised(ct)
  made = cta.non_contrast(ct, smooth, cta.parts(ct, smooth, chest["vessels"]))
  assert ct[jet].std() > 500
  assert abs(np.median(made[jet]) - 40) < 20 and made[jet].std() < 2.5 * NOISE


def test_the_regional_median_sees_blood_alone():
  values = np.full((9, 9, 9), 1000.0)
  inside = np.zeros(values.shape, bool)
  inside[2:7, 2:7, 2:7] = True
  values[inside] = 300
  values[4, 4, 4] = 9000
  found = cta.regional_median(values, inside)
  assert (found[inside] == 300).all() and found[1, 4, 4] == 300 and np.isnan(found[0, 0, 0])


def test_no_contrast_agent_is_told(chest):
  with pytest.raises(UserError, match="is it a CT angiogram"):
    cta.parts(chest["plain"].astype(np.float32).clip(-1000, 250), chest["smooth"],
              chest["vessels"])


def test_files_are_two_blocks_of_one_patient(chest, tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(cta, "BLOCKS", {"train": (0, 25), "test": (29, None)})
  folder, affine = tmp_path / "totalseg_cta", np.diag([-1.5, -1.5, 1.5, 1.0])
  affine[:3, 3] = 5, 6, 7
  write(folder / cta.IMAGE, chest["ct"].astype(np.int16), affine)
  write(folder / "aorta_aorta.nii.gz", chest["vessels"], affine)
  table = cta.make(tmp_path, tmp_path / "out")
  with open(table, newline="") as file:
    train, test = csv.DictReader(file)
  assert list(train) == ["subject", "split", "ncct", "cta", "mask_lumen", "mask_enhanced",
                         "mask_bone"]
  assert (train["split"], test["split"]) == ("train", "test")
  assert train["subject"] != test["subject"]
  made, real = (read(table.parent / test[m]) for m in ("ncct", "cta"))
  assert np.array_equal(real.array, chest["ct"][:, :, 29:])
  assert np.allclose(real.affine[:3, 3], [5, 6, 7 + 29 * 1.5])
  assert np.abs(made.array - chest["made"][:, :, 29:]).max() <= 0.5
  enhanced = read(table.parent / train["mask_enhanced"], mask=True).array
  changed = read(table.parent / train["ncct"]).array != read(table.parent / train["cta"]).array
  assert changed[enhanced].all()
  told = capsys.readouterr().out
  assert "SEMI-SYNTHETIC" in told and "| lumen (masked vessels) |" in told
  assert (table.parent / "before_after.png").exists()


def test_absent_data_are_told(tmp_path):
  with pytest.raises(SystemExit, match="no such file"):
    cta.main([f"--data={tmp_path}", f"--out={tmp_path / 'out'}"])


@pytest.mark.skipif(not (REAL / "totalseg_cta").is_dir(),
                    reason=f"no real images in {REAL}; set MEDSYNTH_REAL_DATA to their folder")
def test_the_real_scan(tmp_path):
  """The lumen ends at blood's HU, bone and what is below 100 HU stay, and no texture tells it."""
  table = cta.make(REAL, tmp_path)
  for split in ("train", "test"):
    image = {n: read(tmp_path / f"{split}_{n}.nii.gz").array for n in ("ncct", "cta")}
    lumen, enhanced, bone = (read(tmp_path / f"{split}_mask_{n}.nii.gz", mask=True).array
                             for n in ("lumen", "enhanced", "bone"))
    assert image["cta"].shape[2] == (100 if split == "train" else 54)
    assert np.median(image["cta"][lumen]) > 300 and 30 < np.median(image["ncct"][lumen]) < 65
    assert 30 < np.median(image["ncct"][enhanced]) < 60
    for same in (bone, image["cta"] < 100, lumen & (image["cta"] > cta.METAL)):
      assert np.array_equal(image["ncct"][same], image["cta"][same])
  text = (table.parent / "statistics.md").read_text()
  cells = {line.split("|")[1].strip(): line.split("|")[2:4] for line in text.splitlines()
           if line.startswith("| ") and line.count("|") == 4}
  assert float(cells["this one"][0]) < 0.3
  assert float(cells["all blood set to 40 HU"][1]) > 0.85
