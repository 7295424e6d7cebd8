"""DICOM series: sorted, rescaled, placed, interpolated, and refused."""

import shutil

import numpy as np
import pydicom
import pytest
from conftest import smooth
from pydicom.dataset import FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from medsynth_jax.data import grids
from medsynth_jax.data.volumes import ImageWarning, Volume, read
from medsynth_jax.errors import UserError


def dicom_series(folder, positions, orientation=(1, 0, 0, 0, 1, 0), series=None, **fields):
  """Slices of 5 rows x 4 columns; the pixels of slice k are 100 k + row-major count."""
  folder.mkdir(exist_ok=True)
  series = series or generate_uid()
  for k, position in enumerate(positions):
    d = pydicom.Dataset()
    d.file_meta = FileMetaDataset()
    d.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    d.SOPClassUID = d.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.2"
    d.SOPInstanceUID = d.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    d.SeriesInstanceUID, d.Modality = series, "CT"
    d.Rows, d.Columns, d.PixelSpacing, d.SliceThickness = 5, 4, [2.0, 1.5], 3.0
    d.ImageOrientationPatient, d.ImagePositionPatient = list(orientation), list(position)
    d.BitsAllocated = d.BitsStored = 16
    d.HighBit, d.PixelRepresentation, d.SamplesPerPixel = 15, 1, 1
    d.PhotometricInterpretation = "MONOCHROME2"
    d.RescaleSlope, d.RescaleIntercept = 2 + k, -1000
    for name, value in fields.items():
      setattr(d, name, value[k] if isinstance(value, list) else value)
    d.PixelData = (100 * k + np.arange(20, dtype=np.int16)).tobytes()
    d.save_as(folder / f"{(7 * k) % 11:02d}.dcm", enforce_file_format=True)
  return folder


def test_dicom_series_is_sorted_rescaled_and_placed(tmp_path):
  folder = dicom_series(tmp_path / "ct", [(10, 20, -30 + 3 * k) for k in range(4)])
  (folder / "notes.txt").write_text("no image")
  volume = read(folder)
  assert volume.array.shape == (4, 5, 4)
  assert volume.array[1, 2, 3] == (300 + 9) * 5 - 1000  # column 1, row 2 of slice 3, slope 5
  np.testing.assert_allclose(volume.affine, [
    [-1.5, 0, 0, -10], [0, -2, 0, -20], [0, 0, 3, -30], [0, 0, 0, 1]], atol=1e-9)


def test_gantry_tilt_stays_a_shear_and_is_straightened_for_the_model(tmp_path):
  c, s = np.cos(0.3), np.sin(0.3)
  folder = dicom_series(tmp_path / "ct", [(0, 0, 3 * k) for k in range(6)], (1, 0, 0, 0, c, -s))
  volume = read(folder)
  axes = volume.affine[:3, :3] / volume.spacing
  assert abs(axes[:, 1] @ axes[:, 2]) == pytest.approx(s, abs=1e-6)
  shape, affine = grids.model_grid(volume)
  straight = affine[:3, :3] / np.sqrt((affine[:3, :3] ** 2).sum(0))
  np.testing.assert_allclose(straight.T @ straight, np.eye(3), atol=1e-9)
  assert shape[2] == 6 and shape[1] > 5  # the planes stay, the stack needs more rows
  known = Volume(smooth(volume.array.shape, volume.affine), volume.affine)
  there = grids.inside(known.array.shape, known.affine, shape, affine)
  placed = grids.resample(known, shape, affine)
  inner = there.copy()
  for axis in range(3):  # half a voxel at the edge repeats the edge
    inner &= np.roll(there, 1, axis) & np.roll(there, -1, axis)
  inner[:, [0, -1]] = inner[[0, -1]] = False
  assert inner.sum() > 5
  np.testing.assert_allclose(placed[inner], smooth(shape, affine)[inner], atol=1e-3)


def test_series_of_two_thicknesses_is_interpolated(tmp_path):
  z = [0, 3, 6, 9, 15, 21]
  folder = dicom_series(tmp_path / "ct", [(0, 0, v) for v in z], RescaleSlope=1,
                        SliceThickness=[3, 3, 3, 3, 6, 6])
  with pytest.warns(ImageWarning, match="interpolated to 3.00 mm"):
    volume = read(folder)
  assert volume.array.shape == (4, 5, 8)
  np.testing.assert_allclose(volume.array[0, 0] + 1000, [0, 100, 200, 300, 350, 400, 450, 500])


@pytest.mark.parametrize("change, says", [
  ({"positions": [(0, 0, 0), (0, 0, 3), (0, 0, 9), (0, 0, 12)]}, "missing slices"),
  ({"positions": [(0, 0, 0), (0, 0, 3), (0, 0, 3), (0, 0, 6)]}, "same place"),
  ({"positions": [(0, 0, 0), (0, 0, 3), (0, 0, 6.5), (0, 0, 9.5)]}, "unevenly spaced"),
  ({"positions": [(0, 0, 0), (4, 0, 3), (0, 0, 6), (4, 0, 9)]}, "one line"),
  ({"SamplesPerPixel": 3}, "colour"),
  ({"NumberOfFrames": 2}, "multi-frame"),
  ({"Rows": [5, 5, 4, 5]}, "differs from the other slices"),
  ({"BitsAllocated": [16, 16, 32, 16]}, "damaged or truncated")])
def test_dicom_refusals(tmp_path, change, says):
  positions = change.pop("positions", [(0, 0, 3 * k) for k in range(4)])
  folder = dicom_series(tmp_path / "ct", positions, **change)
  with pytest.raises(UserError, match=says) as error:
    read(folder)
  assert str(folder) in str(error.value)


def test_folder_without_or_with_several_series(tmp_path):
  (tmp_path / "none").mkdir()
  with pytest.raises(UserError, match="no DICOM image"):
    read(tmp_path / "none")
  folder = dicom_series(tmp_path / "two", [(0, 0, 0), (0, 0, 3)])
  other = dicom_series(tmp_path / "other", [(0, 0, 0), (0, 0, 3)])
  shutil.copy(next(other.iterdir()), folder / "other.dcm")
  with pytest.raises(UserError, match="2 DICOM series"):
    read(folder)
