"""Simulated subjects: repeatable, anatomically sane, and hiding what they claim to hide."""

import csv
import gzip
import os
import subprocess
import sys
from collections import Counter
from importlib import resources
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from medsynth_jax.data import anatomy, displacements, phantom, scanner
from medsynth_jax.errors import UserError

COARSE = (6.0, 6.0, 6.0)


@pytest.fixture(scope="module")
def everything():
  return phantom.subject(11, scanner.MODALITIES, ("t1",), spacing=(3, 3, 3))


@pytest.fixture(scope="module")
def purest():
  """Flat indices of each tissue's 25 purest voxels without abnormality."""
  body = anatomy.anatomy(11, (64, 75, 64))
  well = sum(body.abnormal.values()) < 0.01
  return {t: body.inside[np.argsort(share * well)[-25:]] for t, share in body.tissues.items()}


def _levels(subject, purest, modality, tissues):
  return [np.median(subject.images[modality].ravel()[purest[t]]) for t in tissues]


def test_asset_is_small_and_ships_with_its_notice():
  assets = resources.files("medsynth_jax.data").joinpath("assets")
  assert len(assets.joinpath("icbm152_2mm.npz").read_bytes()) < 1_500_000
  notice = assets.joinpath("NOTICE").read_text()
  assert "Copyright (C) 1993-2009 Louis Collins" in notice and "2 mm" in notice


def test_same_seed_same_subject_whatever_else_is_asked_for(everything):
  again = phantom.subject(11, ("t2",), ("t1",), spacing=(3, 3, 3))
  np.testing.assert_array_equal(again.images["t2"], everything.images["t2"])
  np.testing.assert_array_equal(again.masks["lesion"], everything.masks["lesion"])
  assert anatomy.anatomy(12, (32, 37, 32)).jacobian != anatomy.anatomy(11, (32, 37, 32)).jacobian


def test_anatomy_is_the_same_at_every_spacing():
  fine, coarse = (anatomy.anatomy(3, s).tissues for s in ((64, 75, 64), (32, 37, 32)))
  for tissue in ("gm", "wm", "csf", "bone", "muscle", "eye", "blood"):
    ratio = coarse[tissue].sum() / fine[tissue].sum() * (64 * 75 * 64) / (32 * 37 * 32)
    assert ratio == pytest.approx(1, abs=0.06), tissue


def test_seeds_are_disjoint():
  seeds = {phantom.subject_seed(s, i) for s in range(20) for i in (0, 1, 2, 99, 2**20 - 1)}
  assert len(seeds) == 100


@pytest.mark.parametrize("seed", range(4))
def test_deformation_is_invertible(seed):
  points, least = anatomy._pose(seed, (32, 37, 32))
  determinant = anatomy.jacobian(points, anatomy.FIELD / (32, 37, 32))
  assert least == pytest.approx(determinant.min()) and least > 0.2
  assert 0.7 < np.median(determinant) < 1.4


def test_jacobian_of_a_known_map():
  x, y, z = np.meshgrid(*(np.arange(5.0) * s for s in (1, 2, 3)), indexing="ij")
  determinant = anatomy.jacobian(np.stack([2 * x + y, 3 * y, -z + x]), (1, 2, 3))
  np.testing.assert_allclose(determinant, -6)


@pytest.mark.parametrize("modality, order", [
  ("t1", ("fat", "wm", "gm", "csf", "bone")),
  ("t1c", ("fat", "wm", "gm", "csf")),
  ("t2", ("csf", "gm", "wm", "muscle")),
  ("pd", ("gm", "wm", "bone")),
  ("flair", ("gm", "wm", "csf")),
  ("pet", ("gm", "wm", "muscle")),
  ("ct", ("bone", "muscle", "gm", "wm", "csf", "fat", "air")),
])
def test_contrast(everything, purest, modality, order):
  levels = _levels(everything, purest, modality, order)
  assert levels == sorted(levels, reverse=True)


def test_ct_is_in_hounsfield_units(everything, purest):
  bone, brain, fat = _levels(everything, purest, "ct", ("bone", "wm", "fat"))
  assert 1000 < bone < 1500 and 22 < brain < 36 and -120 < fat < -70
  background = everything.images["ct"][~everything.masks["head"]]
  assert np.median(background) == pytest.approx(-1000, abs=2)
  assert everything.images["ct"].min() >= -1024


def test_sinuses_hold_air_inside_the_head(everything):
  air = (everything.clean["ct"] < -700) & everything.masks["head"]
  assert air[:, 38:].sum() > 100  # before the middle of the head


def test_tissue_sums_to_one():
  body = anatomy.anatomy(5, (32, 37, 32))
  np.testing.assert_allclose(sum(body.tissues.values()), 1, atol=1e-5)
  assert min(s.min() for s in body.tissues.values()) >= 0
  assert set(body.tissues) == set(anatomy.TISSUES)


def test_spin_echo_and_inversion_recovery():
  assert scanner.mr_signal("t1", 600.0, 80.0, 1.0) == pytest.approx(
    (1 - np.exp(-520 / 600)) * np.exp(-12 / 80))
  null = 2500 / np.log(2)  # inverted magnetisation passes zero at TI = T1 ln 2, for a long TR
  assert scanner.mr_signal("flair", null, 1e9, 1.0) == pytest.approx(np.exp(-9000 / null))


def test_rician_and_gaussian_noise(everything):
  level = scanner.MR_NOISE * np.percentile(everything.clean["t1"], 99)
  outside = everything.images["t1"][everything.clean["t1"] == 0]
  assert outside.mean() == pytest.approx(level * np.sqrt(np.pi / 2), rel=0.02)
  brain = everything.masks["brain"]
  noise = (everything.images["ct"] - everything.clean["ct"])[brain]
  assert noise.std() == pytest.approx(6, rel=0.05)


def test_pet_is_nonnegative_and_unbiased(everything):
  image, clean = everything.images["pet"], everything.clean["pet"]
  brain = everything.masks["brain"]
  assert image.min() >= 0
  assert image[brain].mean() == pytest.approx(clean[brain].mean(), rel=0.01)


def _without(body, name):
  return {k: np.zeros_like(v) if k == name else v for k, v in body.abnormal.items()}


MR = {"t1", "t1c", "t2", "pd", "flair"}


@pytest.mark.parametrize("name, shown", [
  ("lesion", {"t2", "flair"}), ("enhancing", {"t1c", "cta"}), ("hot_focus", {"pet"}),
  ("cold_focus", {"pet"}), ("hot_focus_sign", MR | {"pet"}), ("cold_focus_sign", MR | {"pet"}),
])
def test_abnormal_tissue_shows_in_its_modalities_alone(name, shown):
  body = anatomy.anatomy(7, (48, 56, 48))
  assert body.abnormal[name].max() > 0.3
  for modality in scanner.MODALITIES:
    images = [scanner.noise_free(body, modality, covers, 7, scanner.SCANNERS[0])
              for covers in (body.abnormal, _without(body, name))]
    assert np.array_equal(*images) == (modality not in shown), modality


def test_ceiling_replaces_what_the_source_cannot_show(everything):
  lesion = everything.masks["lesion"]
  lost = everything.clean["t2"] - everything.ceiling["t2"]
  assert lost[lesion].mean() > 0.1 * everything.clean["t2"].max()
  seen = phantom.subject(11, ("t2", "flair"), ("flair",), spacing=COARSE)
  np.testing.assert_array_equal(seen.ceiling["t2"], seen.clean["t2"])
  assert "flair" not in seen.ceiling and "t1" not in everything.ceiling


def test_prior_is_the_mean_over_subjects():
  drawn = [{k: m.sum() for k, m in anatomy._draw_abnormalities(s).items()} for s in range(25)]
  for name in drawn[0]:
    mean = np.mean([d[name] for d in drawn])
    assert anatomy.expected_coverage(name).sum() == pytest.approx(mean, rel=0.35), name


def test_misalignment_is_the_returned_field():
  options = {"modalities": ("t1", "t2"), "spacing": (4, 4, 4)}
  plain = phantom.subject(9, **options)
  moved = phantom.subject(9, **options, misaligned="t2", misalignment=5.0)
  field = moved.displacement["t2"]
  assert moved.displacement["t1"] is None and plain.displacement["t2"] is None
  assert np.linalg.norm(field, axis=-1).mean() == pytest.approx(5.0, rel=1e-3)
  np.testing.assert_array_equal(moved.images["t1"], plain.images["t1"])
  np.testing.assert_array_equal(moved.masks["brain"], plain.masks["brain"])
  # the bias field stays with the scanner, so the anatomy is compared without it
  bias = scanner.shading(9, "t2", field.shape[:3], scanner.SCANNERS[0])
  still, displaced = (s.clean["t2"] / bias for s in (plain, moved))
  back = displacements.pull(displaced, displacements.inverse_displacement(field, (4, 4, 4)),
                            (4, 4, 4))
  brain = plain.masks["brain"]
  before, after = (np.abs(v - still)[brain].mean() for v in (displaced, back))
  assert after < 0.3 * before


def test_inverse_displacement_undoes_the_field():
  field = displacements.displacement_field(1, "t2", (32, 37, 32), 6.0)
  spacing = anatomy.FIELD / field.shape[:3]
  inverse = displacements.inverse_displacement(field, spacing)
  there = np.stack([displacements.pull(field[..., k], inverse, spacing, 1) for k in range(3)], -1)
  assert np.abs(there + inverse)[4:-4, 4:-4, 4:-4].max() < 0.05


def test_a_pulled_image_shows_what_lies_at_the_displaced_point():
  image = np.zeros((8, 8, 8), np.float32)
  image[5, 4, 4] = 1
  shift = np.broadcast_to(np.float32([4, 0, 0]), (8, 8, 8, 3))
  assert displacements.pull(image, shift, (2, 2, 2))[3, 4, 4] == pytest.approx(1, abs=1e-5)


def test_thick_slices_are_averages():
  thick = phantom.subject(4, ("ct",), (), spacing=(6, 6, 12))
  thin = phantom.subject(4, ("ct",), (), spacing=COARSE)
  assert thick.images["ct"].shape == (32, 37, 16)
  np.testing.assert_allclose(np.diag(thick.affine)[:3], (6, 224 / 37, 12))
  np.testing.assert_allclose(thick.clean["ct"], thin.clean["ct"].reshape(32, 37, 16, 2).mean(3),
                             atol=1e-2)


def test_scanners_differ_in_pet_resolution():
  sharp, blurred = (phantom.subject(2, ("pet",), (), spacing=(4, 4, 4), scanner=s).clean["pet"]
                    for s in (0, 1))
  assert np.abs(np.diff(blurred, axis=0)).sum() < 0.9 * np.abs(np.diff(sharp, axis=0)).sum()


def _table(path):
  with open(path) as file:
    return list(csv.DictReader(file))


def test_write_makes_a_table_of_simulated_files(tmp_path):
  path = phantom.write(tmp_path / "a", n_subjects=3, modalities=("t1", "t2"), spacing=COARSE,
                       misaligned="t2", misalignment=2.0)
  rows = _table(path)
  assert list(rows[0]) == ["subject", "group", "t1", "t2", "mask", "mask_brain", "mask_lesion",
                           "mask_hot_focus", "mask_cold_focus", "ceiling_t2"]
  assert len({row["subject"] for row in rows}) == 3
  for row in rows:
    for column in ("t1", "t2", "mask", "mask_brain", "ceiling_t2"):
      image = nib.load(path.parent / row[column])
      assert image.shape == (32, 37, 32) and b"simulated" in bytes(image.header["descrip"])
    assert set(np.unique(nib.load(path.parent / row["mask"]).dataobj)) == {0, 1}
    assert nib.load(path.parent / f"displacement/{row['subject']}.nii.gz").shape == (32, 37, 32, 3)
  stored = np.asarray(nib.load(path.parent / rows[1]["t1"]).dataobj)
  meant = phantom.subject(phantom.subject_seed(0, 1), spacing=COARSE).images["t1"]
  np.testing.assert_allclose(stored, meant, atol=meant.max() / 30000)


def test_write_is_deterministic_and_idempotent(tmp_path):
  options = {"n_subjects": 2, "seed": 5, "modalities": ("t1", "ct", "pet"), "spacing": (8, 8, 8)}
  first = phantom.write(tmp_path / "a", workers=1, **options)
  second = phantom.write(tmp_path / "b", workers=2, **options)
  names = sorted(p.relative_to(first.parent) for p in first.parent.rglob("*.*"))
  assert len(names) > 10
  for name in names:
    assert (first.parent / name).read_bytes() == (second.parent / name).read_bytes(), name
  stamp = first.stat().st_mtime_ns
  assert phantom.write(tmp_path / "a", **options) == first and first.stat().st_mtime_ns == stamp
  with pytest.raises(UserError, match="other seed"):
    phantom.write(tmp_path / "a", **{**options, "seed": 6})
  assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_missing_by_group_follows_the_scanner(tmp_path):
  path = phantom.write(tmp_path / "a", n_subjects=8, spacing=(12, 12, 12), groups=2,
                       missing=("group", 1.0))
  rows = _table(path)
  assert [row["split"] for row in rows] == ["train"] * 2 + ["validation"] * 2 + ["test"] * 4
  for row in rows:
    lacking, present = ("t1", "t2") if row["group"] == "site0" else ("t2", "t1")
    if row["split"] == "test":  # whole, so that it can be scored
      assert row["t1"] and row["t2"] and row["ceiling_t2"]
    else:
      assert row[lacking] == "" and row[present] and (row["ceiling_t2"] != "") == (present == "t2")


def test_missing_at_random_leaves_every_subject_an_image():
  recipe = {"modalities": ["t1", "t2", "ct"], "missing": ["random", 0.5], "groups": 1, "seed": 0,
            "n_subjects": 300}
  present = [phantom._present(recipe, i) for i in range(270)]
  assert min(map(len, present)) == 1
  assert np.mean([len(p) for p in present]) == pytest.approx(1.5 + 1 / 8, abs=0.15)
  assert all(phantom._present(recipe, i) == ["t1", "t2", "ct"] for i in range(270, 300))


def _confounded(n, groups=2, share=1.0, modalities=("pet", "ct", "t2"), sources=("pet",)):
  return {"modalities": list(modalities), "sources": list(sources), "groups": groups, "seed": 0,
          "missing": ["confounded", share], "n_subjects": n}


def test_confounded_training_has_a_target_a_group(tmp_path):
  """CT with sharp PET, T2 with blurred PET; only test subjects have both."""
  path = phantom.write(tmp_path / "a", n_subjects=8, spacing=(12, 12, 12), groups=2,
                       modalities=("pet", "ct", "t2"), sources=("pet",),
                       missing=("confounded", 1.0))
  rows = _table(path)
  assert list(rows[0])[:3] == ["subject", "group", "split"]
  has = [(row["split"], row["group"], *(m for m in ("pet", "ct", "t2", "ceiling_ct", "ceiling_t2")
                                        if row[m])) for row in rows]
  everything = ("pet", "ct", "t2", "ceiling_ct", "ceiling_t2")
  assert has == [
    ("train", "site0", "pet", "ct", "ceiling_ct"), ("train", "site1", "pet", "t2", "ceiling_t2"),
    ("validation", "site0", "pet", "ct", "ceiling_ct"),
    ("validation", "site1", "pet", "t2", "ceiling_t2"),
    *(("test", f"site{i % 2}", *everything) for i in range(4))]
  pet = phantom.subject(phantom.subject_seed(0, 1), ("pet",), (), spacing=(12, 12, 12), scanner=1)
  stored = np.asarray(nib.load(path.parent / rows[1]["pet"]).dataobj)
  np.testing.assert_allclose(stored, pet.images["pet"], atol=1e-3)


@pytest.mark.parametrize("n, groups, expected", [
  (8, 2, {"train": 1, "validation": 1, "test": 2}),
  (20, 2, {"train": 7, "validation": 1, "test": 2}),
  (60, 2, {"train": 24, "validation": 3, "test": 3}),
  (12, 3, {"train": 1, "validation": 1, "test": 2})])
def test_confounded_splits_hold_every_group(n, groups, expected):
  recipe = _confounded(n, groups)
  sides = Counter((phantom._split(recipe, i), i % groups) for i in range(n))
  assert sides == {(side, g): k for side, k in expected.items() for g in range(groups)}


def test_confounded_share_and_more_groups_than_targets():
  recipe = _confounded(600, groups=3, share=0.75)
  train = [i for i in range(600) if phantom._split(recipe, i) != "test"]
  for group, own, other in ((0, "ct", "t2"), (1, "t2", "ct"), (2, "ct", "t2")):
    present = [phantom._present(recipe, i) for i in train if i % 3 == group]
    assert all(own in p and "pet" in p for p in present)
    assert np.mean([other in p for p in present]) == pytest.approx(0.25, abs=0.08)


@pytest.mark.parametrize("changes", [
  {"groups": 1}, {"n_subjects": 7}, {"modalities": ("pet", "ct")}, {"modalities": ("pet",)}])
def test_what_cannot_be_confounded(tmp_path, changes):
  fields = {"modalities": ("pet", "ct", "t2"), "groups": 2, "n_subjects": 8, **changes}
  with pytest.raises(UserError, match="need two groups, two targets and four subjects a group"):
    phantom.write(tmp_path / "a", sources=("pet",), missing=("confounded", 1.0), **fields)
  assert not list(tmp_path.iterdir())


def test_permuted_targets_come_from_the_next_subject(tmp_path):
  options = {"n_subjects": 2, "spacing": (8, 8, 8)}
  plain = phantom.write(tmp_path / "a", **options).parent
  permuted = phantom.write(tmp_path / "b", permute=True, **options).parent

  def same(first, second):
    return gzip.decompress(first.read_bytes()) == gzip.decompress(second.read_bytes())

  assert same(plain / "images/sim0000_t1.nii.gz", permuted / "images/sim0000_t1.nii.gz")
  for column in ("t2", "mask", "ceiling_t2"):
    assert same(plain / f"images/sim0001_{column}.nii.gz",
                permuted / f"images/sim0000_{column}.nii.gz")


@pytest.mark.parametrize("options, message", [
  ({"modalities": ("t1", "us")}, "'us'"),
  ({"misaligned": "ct"}, "misaligned='ct'"),
  ({"misaligned": "t2", "misalignment": 80.0}, "folds"),
  ({"n_subjects": 0}, "n_subjects=0"),
  ({"n_subjects": 1, "permute": True}, "need 2"),
  ({"missing": ("some", 0.1)}, "'some'"),
  ({"missing": ("random", 0.1), "n_subjects": 3}, "n_subjects=3: need four subjects a group"),
  ({"sources": ("ct",)}, "source 'ct'"),
  ({"spacing": (2, 0, 2)}, "spacing > 0"),
])
def test_bad_arguments(tmp_path, options, message):
  with pytest.raises(UserError, match=message):
    phantom.write(tmp_path / "a", **{"n_subjects": 1, "spacing": (8, 8, 8), **options})
  assert not list(tmp_path.iterdir())


def test_a_folder_of_something_else_is_left_alone(tmp_path):
  (tmp_path / "notes.txt").write_text("mine")
  with pytest.raises(UserError, match="no simulated data set"):
    phantom.write(tmp_path, n_subjects=1, spacing=(8, 8, 8))
  assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_a_dead_worker_is_one_clear_line_and_leaves_nothing(tmp_path):
  script = tmp_path / "unguarded.py"
  script.write_text("from medsynth_jax.data import phantom\n"
                    "phantom.write('data', n_subjects=2, spacing=(8, 8, 8), workers=2)\n")
  done = subprocess.run([sys.executable, script.name], cwd=tmp_path, capture_output=True, text=True,
                        env={**os.environ, "PYTHONPATH": str(Path(phantom.__file__).parents[2])})
  assert done.returncode and "__name__ == '__main__'" in done.stderr.splitlines()[-1]
  assert [p.name for p in tmp_path.iterdir()] == ["unguarded.py"]
