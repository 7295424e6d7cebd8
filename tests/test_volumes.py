"""Files and grids: what is read, written, resampled and refused."""

import errno

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from conftest import smooth

from medsynth_jax.data import grids, volumes
from medsynth_jax.data.volumes import EXTENSIONS, ImageWarning, Volume, read, write
from medsynth_jax.errors import UserError

RNG = np.random.default_rng(0)
ARRAY = RNG.normal(size=(7, 6, 5)).astype(np.float32)


def rotation(x=0.0, y=0.0, z=0.0):
  cx, sx, cy, sy, cz, sz = (f(a) for a in (x, y, z) for f in (np.cos, np.sin))
  return (np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
          @ np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
          @ np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]]))


def affine_of(spacing=(1, 1, 1), turn=None, origin=(0, 0, 0)):
  affine = np.eye(4)
  affine[:3, :3] = (np.eye(3) if turn is None else turn) * np.asarray(spacing, float)
  affine[:3, 3] = origin
  return affine


OBLIQUE = affine_of((0.9, 1.1, 3), rotation(0.1, -0.2, 0.3) @ np.diag([-1, -1, 1]), (5, -7, 11))
SHEARED = OBLIQUE @ np.array([[1, 0, 0, 0], [0, 1, 0.8, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])



# --- files -----------------------------------------------------------------------------------


@pytest.mark.parametrize("extension", EXTENSIONS)
@pytest.mark.parametrize("affine", [affine_of((1, 2, 3), origin=(1, 2, 3)), OBLIQUE, SHEARED],
                         ids=["plain", "oblique", "sheared"])
def test_what_is_written_is_read_back(tmp_path, extension, affine):
  path = tmp_path / f"scan.name{extension}"
  write(path, ARRAY, affine)
  volume = read(path)
  np.testing.assert_array_equal(volume.array, ARRAY)
  np.testing.assert_allclose(volume.affine, affine, atol=1e-5)
  assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
    ["scan.name.mhd", "scan.name.raw"] if extension == ".mhd" else [path.name])


@pytest.mark.parametrize("extension", [".mha", ".mhd", ".nrrd"])
def test_itk_and_nifti_files_mean_the_same_place(tmp_path, extension):
  write(tmp_path / "a.nii.gz", ARRAY, OBLIQUE)
  sitk.WriteImage(sitk.ReadImage(str(tmp_path / "a.nii.gz")), str(tmp_path / f"b{extension}"))
  volume = read(tmp_path / f"b{extension}")
  np.testing.assert_allclose(volume.affine, OBLIQUE, atol=1e-4)
  np.testing.assert_array_equal(volume.array, ARRAY)


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_colour_is_written_in_its_place_and_not_read_as_a_scan(tmp_path, extension):
  """RGB24 of NIfTI, vectors of ITK: the bytes, channel by channel, at the place of the affine."""
  path, colours = tmp_path / f"a{extension}", RNG.integers(0, 256, (7, 6, 5, 3), np.uint8)
  write(path, colours, OBLIQUE)
  write(tmp_path / "grey.nii", ARRAY, OBLIQUE)
  if extension in volumes.NIFTI:
    image = nib.load(path)
    assert int(image.header["datatype"]) == 128 and image.shape == (7, 6, 5)
    stored = np.stack([np.asarray(image.dataobj)[c] for c in "RGB"], -1)
    np.testing.assert_allclose(image.affine, OBLIQUE, atol=1e-5)
  else:
    image, grey = sitk.ReadImage(str(path)), sitk.ReadImage(str(tmp_path / "grey.nii"))
    stored = sitk.GetArrayFromImage(image).transpose(2, 1, 0, 3)
    for part in ("GetOrigin", "GetSpacing", "GetDirection"):
      np.testing.assert_allclose(getattr(image, part)(), getattr(grey, part)(), atol=1e-4)
  np.testing.assert_array_equal(stored, colours)
  with pytest.raises(UserError, match="colour"):
    read(path)


def test_slope_and_trailing_axes_and_masks(tmp_path):
  stored = np.arange(24, dtype=np.int16).reshape(2, 3, 4, 1)
  nib.save(nib.Nifti1Image(stored, np.eye(4)), tmp_path / "a.nii")
  raw = bytearray((tmp_path / "a.nii").read_bytes())
  raw[112:120] = np.array([2, -10], "<f4").tobytes()  # scl_slope, scl_inter
  (tmp_path / "a.nii").write_bytes(raw)
  np.testing.assert_array_equal(read(tmp_path / "a.nii").array, 2.0 * stored[..., 0] - 10)
  assert read(tmp_path / "a.nii").array.shape == (2, 3, 4)
  assert read(tmp_path / "a.nii", mask=True).array.dtype == bool


def test_like_keeps_the_codes_of_the_source(tmp_path):
  image = nib.Nifti1Image(ARRAY, OBLIQUE)
  image.set_sform(OBLIQUE, 4)
  image.set_qform(None, 0)
  nib.save(image, tmp_path / "a.nii.gz")
  write(tmp_path / "b.nii.gz", ARRAY, OBLIQUE, like=tmp_path / "a.nii.gz")
  assert nib.load(tmp_path / "b.nii.gz").header["sform_code"] == 4


def _save(path, array=ARRAY, affine=OBLIQUE):
  nib.save(nib.Nifti1Image(array, affine), path)
  return path


def _broken(path, kind):
  if kind == "missing":
    return path
  if kind == "empty":
    path.write_bytes(b"")
  elif kind == "text":
    path.write_text("not an image at all" * 30)
  elif kind == "truncated":
    write(path, RNG.normal(size=(20, 20, 20)).astype(np.float32), OBLIQUE)
    data = path.with_suffix(".raw") if path.suffix == ".mhd" else path
    data.write_bytes(data.read_bytes()[:4000])
  return path


@pytest.mark.parametrize("extension", EXTENSIONS)
@pytest.mark.parametrize("kind, says", [
  ("missing", "no such file"), ("empty", "empty"), ("text", "damaged|not an image"),
  ("truncated", "truncated")])
def test_damaged_files_are_refused(tmp_path, extension, kind, says):
  path = _broken(tmp_path / f"scan{extension}", kind)
  with pytest.raises(UserError, match=says) as error:
    read(path)
  assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_voxel_file_of_mhd_missing_or_short(tmp_path):
  with pytest.raises(UserError, match="truncated, 4000 of 32000 bytes"):
    read(_broken(tmp_path / "b.mhd", "truncated"))
  write(tmp_path / "a.mhd", ARRAY, OBLIQUE)
  (tmp_path / "a.raw").unlink()
  with pytest.raises(UserError, match="a.raw is missing"):
    read(tmp_path / "a.mhd")


@pytest.mark.parametrize("array, says", [
  (np.zeros((3, 4, 5, 2)) + np.arange(2), "4-D"),
  (np.where(ARRAY > 1, np.nan, ARRAY), "NaN or Inf"),
  (np.where(ARRAY > 1, np.inf, ARRAY), "NaN or Inf"),
  (np.full((3, 4, 5), 7.0), "constant"),
  (ARRAY.astype(np.complex64), "one channel")])
def test_voxels_that_are_no_scan_are_refused(tmp_path, array, says):
  with pytest.raises(UserError, match=says):
    read(_save(tmp_path / "a.nii.gz", array))


def test_other_refusals(tmp_path):
  with pytest.raises(UserError, match="empty mask"):
    read(_save(tmp_path / "m.nii.gz", np.zeros((3, 4, 5), np.uint8)), mask=True)
  (tmp_path / "scan.png").write_bytes(b"x")
  with pytest.raises(UserError, match="not an image file"):
    read(tmp_path / "scan.png")
  rgb = sitk.GetImageFromArray(np.zeros((4, 4, 4, 3), np.uint8), isVector=True)
  sitk.WriteImage(rgb, str(tmp_path / "rgb.mha"))
  with pytest.raises(UserError, match="3 channels"):
    read(tmp_path / "rgb.mha")
  with pytest.raises(UserError, match="cannot write this format"):
    write(tmp_path / "a.png", ARRAY, OBLIQUE)


def test_singular_affine_is_refused(tmp_path):
  image = nib.Nifti1Image(ARRAY, None)
  image.header["sform_code"] = 1
  image.header["srow_x"], image.header["srow_y"] = [1, 0, 0, 0], [0, 1, 0, 0]
  image.header["srow_z"] = [1, 1, 0, 0]
  nib.save(image, tmp_path / "a.nii")
  with pytest.raises(UserError, match="singular affine"):
    read(tmp_path / "a.nii")


@pytest.mark.parametrize("shift, refused", [(0.05, False), (0.2, True)])
def test_sform_and_qform_must_agree_to_a_tenth_of_a_voxel(tmp_path, shift, refused):
  image = nib.Nifti1Image(ARRAY, OBLIQUE)
  moved = OBLIQUE.copy()
  moved[:3, 3] += shift * OBLIQUE[:3, 0]
  image.set_sform(OBLIQUE, 1)
  image.set_qform(moved, 1)
  nib.save(image, tmp_path / "a.nii.gz")
  if refused:
    with pytest.raises(UserError, match="sform and qform differ by 0.2"):
      read(tmp_path / "a.nii.gz")
  else:
    np.testing.assert_allclose(read(tmp_path / "a.nii.gz").affine, OBLIQUE, atol=1e-5)


def test_no_orientation_is_a_warning(tmp_path):
  image = nib.Nifti1Image(ARRAY, None)
  nib.save(image, tmp_path / "a.nii")
  with pytest.warns(ImageWarning, match="no orientation"):
    read(tmp_path / "a.nii")


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, extension):
  path = tmp_path / f"a{extension}"
  write(path, ARRAY, OBLIQUE)
  before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

  def full(temporary, *args, **kwargs):
    temporary.write_bytes(b"half a file")
    raise OSError(errno.ENOSPC, "No space left on device")
  monkeypatch.setattr(volumes, "_write_nifti", full)
  monkeypatch.setattr(volumes, "_write_itk", full)
  with pytest.raises(UserError, match="disk is full"):
    write(path, ARRAY + 1, OBLIQUE)
  assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


# --- grids -----------------------------------------------------------------------------------


@pytest.mark.parametrize("axes, signs", [((0, 1, 2), (1, 1, 1)), ((2, 0, 1), (-1, 1, -1)),
                                         ((1, 2, 0), (-1, -1, 1))])
def test_canonical_is_exact_and_keeps_every_voxels_place(axes, signs):
  turn = rotation(0.1, 0.05, -0.1)[:, list(axes)] * np.array(signs)
  affine = affine_of((1, 2, 3), turn, (4, 5, 6))
  result = grids.canonical(Volume(ARRAY, affine))
  assert nib.aff2axcodes(result.affine) == ("R", "A", "S")
  here = {tuple(np.round((affine @ [*i, 1])[:3], 4)): v for i, v in np.ndenumerate(ARRAY)}
  for i, v in np.ndenumerate(result.array):
    assert here[tuple(np.round((result.affine @ [*i, 1])[:3], 4))] == v


@pytest.mark.parametrize("affine", [OBLIQUE, SHEARED], ids=["oblique", "sheared"])
def test_resampling_is_exact_for_linear_images(affine):
  volume = Volume(smooth((20, 18, 12), affine), affine)
  shape = (9, 8, 7)
  target = affine_of((1.1, 0.9, 1.3), rotation(0.2, 0.1, 0.0))
  centre = affine @ [10, 9, 6, 1]
  target[:3, 3] += (centre - target @ [4, 3.5, 3, 1])[:3]
  np.testing.assert_allclose(grids.resample(volume, shape, target), smooth(shape, target),
                             atol=2e-3)


def test_equal_lattices_give_equal_values_in_any_orientation():
  flipped = affine_of((1, 1, 1), np.diag([-1, 1, -1]), (6, 0, 4.001))
  volume = Volume(ARRAY, flipped)
  result = grids.resample(volume, (9, 6, 5), affine_of(origin=(-1, 0, 0)), fill=-5)
  np.testing.assert_array_equal(result[1:8], ARRAY[::-1, :, ::-1])
  assert (result[[0, 8]] == -5).all()
  mask = Volume(ARRAY > 0, flipped)
  np.testing.assert_array_equal(
    grids.resample(mask, (7, 6, 5), affine_of(), order=0, fill=False), (ARRAY > 0)[::-1, :, ::-1])


def test_downsampling_averages_and_stays_in_range():
  fine = RNG.normal(size=(40, 40, 4)).astype(np.float32)
  coarse = grids.model_grid(Volume(fine, np.eye(4)), (4, 4, 1))
  assert coarse[0] == (10, 10, 4)
  np.testing.assert_allclose(coarse[1] @ [-0.5, -0.5, 0, 1], [-0.5, -0.5, 0, 1])  # same extent
  result = grids.resample(Volume(fine, np.eye(4)), *coarse)
  assert result.std() < 0.4 * fine.std()  # noise of 4 x 4 voxels is averaged, not picked
  slight = grids.model_grid(Volume(fine, np.eye(4)), (1.45, 1, 1))  # no smoothing up to 1.5
  x = np.linalg.solve(np.eye(4), slight[1])[0, 3] + 1.45 * np.arange(slight[0][0])
  low = np.floor(x).astype(int)
  part = (x - low)[:, None, None]
  keep = (low >= 0) & (low < 39)
  np.testing.assert_allclose(
    grids.resample(Volume(fine, np.eye(4)), *slight)[keep],
    (fine[low[keep]] * (1 - part[keep]) + fine[low[keep] + 1] * part[keep]), atol=1e-5)
  assert result.min() >= fine.min() and result.max() <= fine.max()


def test_inside_reaches_half_a_voxel_beyond_the_centres():
  fine = affine_of((0.5, 1, 1), origin=(-1.25, 0, 0))
  there = grids.inside((3, 2, 2), np.eye(4), (12, 2, 2), fine)[:, 0, 0]
  places = -1.25 + 0.5 * np.arange(12)
  np.testing.assert_array_equal(there, (places > -0.5) & (places < 2.5))


def test_model_grid_keeps_an_oblique_lattice_and_respaces_about_the_centre():
  volume = Volume(ARRAY, OBLIQUE)
  shape, affine = grids.model_grid(volume)
  assert (shape, affine.tolist()) == (grids.canonical(volume).array.shape,
                                      grids.canonical(volume).affine.tolist())
  new, wider = grids.model_grid(volume, (2, 0, 1))
  np.testing.assert_allclose(np.sqrt((wider[:3, :3] ** 2).sum(0)), [2, volume.spacing[1], 1])
  middle = [*((n - 1) / 2 for n in new), 1]
  np.testing.assert_allclose(wider @ middle, affine @ [*((n - 1) / 2 for n in shape), 1])


@pytest.mark.parametrize("size", [(4, 9, 0), (10, 6, 2)])
def test_fit_to_crops_and_pads_about_the_centre(size):
  shape, affine = grids.fit_to(ARRAY.shape, OBLIQUE, size)
  assert shape == tuple(s or n for s, n in zip(size, ARRAY.shape, strict=True))
  moved = np.linalg.solve(OBLIQUE, affine)[:3, 3]
  np.testing.assert_allclose(moved, [(n - s) // 2 for n, s in zip(ARRAY.shape, shape, strict=True)],
                             atol=1e-9)
  np.testing.assert_allclose(np.linalg.solve(OBLIQUE, affine)[:3, :3], np.eye(3), atol=1e-9)
