"""A folder that holds one DICOM series -> an array with its geometry (used by `volumes` only)."""

import os
import warnings
from pathlib import Path

import numpy as np

from medsynth_jax.data.volumes import LPS, ImageWarning
from medsynth_jax.errors import UserError


def read_series(folder: Path) -> tuple[np.ndarray, np.ndarray]:
  """Reads the one series of single-slice DICOM files in a folder.

  Returns float32 [column, row, slice] with each slice's rescale slope and intercept applied, and
  the affine to RAS+ mm from ImagePositionPatient, so that a gantry tilt stays as the shear that it
  is (PS3.3, C.7.6.2.1.1). Raises UserError for no or several series, several images at one place,
  missing or unevenly spaced slices, colour and multi-frame files.
  """
  slices = _one_series(folder, _headers(folder))
  first = slices[0]
  across = np.array(first.ImageOrientationPatient, float)
  columns, rows = across[:3], across[3:]
  normal = np.cross(columns, rows)
  slices.sort(key=lambda s: float(np.dot(normal, np.array(s.ImagePositionPatient, float))))
  positions = np.array([s.ImagePositionPatient for s in slices], float)
  array = np.stack([_pixels(s) for s in slices], axis=-1)
  if len(slices) == 1:
    step = normal * abs(float(first.get("SpacingBetweenSlices") or first.get("SliceThickness")
                              or 1.0))
  elif len({float(s.get("SliceThickness") or 0) for s in slices}) > 1:
    array, step = _evened(folder, slices, positions, normal, array)
  else:
    step = _step(folder, slices, positions, normal)
  row_spacing, column_spacing = (float(s) for s in first.PixelSpacing)
  affine = np.eye(4)
  affine[:3, 0] = columns * column_spacing
  affine[:3, 1] = rows * row_spacing
  affine[:3, 2] = step
  affine[:3, 3] = positions[0]
  if str(first.get("Units", "")) == "BQML":
    warnings.warn(f"{folder}: PET in Bq/ml, not SUV; convert it (SUV = Bq/ml x body weight in g /"
                  " decay-corrected injected dose in Bq)", ImageWarning, stacklevel=2)
  return array, LPS @ affine


def _headers(folder: Path) -> list:
  """The headers of the DICOM images in a folder; other files are passed over."""
  import pydicom

  images, broken = [], []
  for name in sorted(os.listdir(folder)):
    path = folder / name
    if not path.is_file() or name.startswith("."):
      continue
    try:
      header = pydicom.dcmread(path, stop_before_pixels=True)
    except pydicom.errors.InvalidDicomError:
      continue
    except Exception as error:  # pydicom raises many types on damaged files
      broken.append(f"{name} ({type(error).__name__})")
      continue
    if "Rows" in header and "SeriesInstanceUID" in header:
      header.path = str(path)
      images.append(header)
  if broken:
    raise UserError(f"{folder}: damaged DICOM file {broken[0]}; copy the series again")
  if not images:
    raise UserError(f"{folder}: no DICOM image in this folder; give the folder of one series or"
                    " an image file")
  return images


def _one_series(folder: Path, images: list) -> list:
  series = {}
  for image in images:
    series.setdefault(str(image.SeriesInstanceUID), []).append(image)
  if len(series) > 1:
    names = [f"'{s[0].get('SeriesDescription', '') or s[0].get('Modality', '?')}' ({len(s)} files)"
             for s in series.values()]
    raise UserError(f"{folder}: {len(series)} DICOM series ({', '.join(names[:4])}); put each"
                    " series into a folder of its own")
  for image in images:
    name = os.path.basename(image.path)
    if int(image.get("NumberOfFrames", 1) or 1) > 1:
      raise UserError(f"{folder}/{name}: multi-frame DICOM; convert it to NIfTI (dcm2niix)")
    if int(image.get("SamplesPerPixel", 1)) > 1:
      raise UserError(f"{folder}/{name}: a colour image; give the series of measured values")
    if "ImagePositionPatient" not in image or "PixelSpacing" not in image:
      raise UserError(f"{folder}/{name}: no ImagePositionPatient or PixelSpacing, so its place in"
                      " the patient is unknown; give the original axial series")
  first = images[0]
  for image in images:
    same = (np.allclose(image.ImageOrientationPatient, first.ImageOrientationPatient, atol=1e-3)
            and np.allclose(image.PixelSpacing, first.PixelSpacing, rtol=1e-3)
            and (image.Rows, image.Columns) == (first.Rows, first.Columns))
    if not same:
      raise UserError(f"{folder}/{os.path.basename(image.path)}: orientation, pixel spacing or"
                      " matrix differs from the other slices (a localizer?); keep one stack only")
  return images


def _step(folder: Path, slices: list, positions: np.ndarray, normal: np.ndarray) -> np.ndarray:
  """The vector from slice to slice in LPS mm, checked to be the same throughout."""
  gaps = np.diff(positions @ normal)
  usual = float(np.median(gaps))
  _check_gaps(folder, slices, gaps, np.full(len(gaps), usual))
  if np.abs(gaps - usual).max() > 0.05 * usual + 0.01:
    raise UserError(f"{folder}: unevenly spaced slices ({gaps.min():.2f} to {gaps.max():.2f} mm);"
                    " resample the series to even spacing first")
  return _line(folder, positions, np.arange(len(positions)))


def _evened(folder: Path, slices: list, positions: np.ndarray, normal: np.ndarray,
            array: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """A series of several slice thicknesses (sequential head CT), interpolated to the thinnest's."""
  thickness = np.array([float(s.get("SliceThickness") or 0) for s in slices])
  depth = positions @ normal
  gaps = np.diff(depth)
  _check_gaps(folder, slices, gaps, np.maximum(thickness[1:], thickness[:-1]))
  thin = np.flatnonzero((thickness[1:] == thickness.min()) & (thickness[:-1] == thickness.min()))
  spacing = float(np.median(gaps[thin])) if thin.size else float(gaps.min())
  wanted = depth[0] + spacing * np.arange(int((depth[-1] - depth[0]) / spacing + 1e-3) + 1)
  after = np.searchsorted(depth, wanted, side="left").clip(1, len(depth) - 1)
  weight = ((wanted - depth[after - 1]) / gaps[after - 1]).clip(0, 1).astype(np.float32)
  warnings.warn(f"{folder}: slices of {thickness.min():g} to {thickness.max():g} mm, interpolated"
                f" to {spacing:.2f} mm", ImageWarning, stacklevel=3)
  even = array[..., after - 1] * (1 - weight) + array[..., after] * weight
  return even, _line(folder, positions, (depth - depth[0]) / spacing)


def _check_gaps(folder: Path, slices: list, gaps: np.ndarray, expected: np.ndarray) -> None:
  names = [os.path.basename(s.path) for s in slices]
  closest = int(gaps.argmin())
  if gaps[closest] < 1e-3:
    raise UserError(f"{folder}: {names[closest]} and {names[closest + 1]} lie at the same place"
                    " (time points, phases or echoes of one series); put each into its own folder")
  widest = int((gaps / expected).argmax())
  if gaps[widest] > 1.5 * expected[widest]:
    raise UserError(f"{folder}: missing slices between {names[widest]} and {names[widest + 1]}"
                    f" ({gaps[widest]:.2f} mm apart, expected {expected[widest]:.2f});"
                    " copy the series again")


def _line(folder: Path, positions: np.ndarray, numbers: np.ndarray) -> np.ndarray:
  """The vector per unit of `numbers` along which all slice positions lie."""
  step = (positions[-1] - positions[0]) / numbers[-1]
  off = np.abs(positions - positions[0] - numbers[:, None] * step).max()
  if off > 0.1 * np.linalg.norm(step) + 0.1:
    raise UserError(f"{folder}: the slices do not lie on one line (off by {off:.1f} mm);"
                    " keep one stack only")
  return step


def _pixels(header) -> np.ndarray:
  """One slice as float32 [column, row] in the units of the series."""
  import pydicom

  try:
    image = pydicom.dcmread(header.path)
    if image.file_meta.TransferSyntaxUID.is_compressed:
      return _decompressed(header.path)
    slope, intercept = image.get("RescaleSlope"), image.get("RescaleIntercept")
    pixels = image.pixel_array.astype(np.float64)
    pixels = pixels * float(1 if slope is None else slope) + float(intercept or 0)
    return pixels.astype(np.float32).T
  except UserError:
    raise
  except Exception as error:  # pydicom raises many types on damaged files
    raise UserError(f"{header.path}: damaged or truncated ({type(error).__name__});"
                    " copy the series again") from None


def _decompressed(path: str) -> np.ndarray:
  """JPEG-family pixels through GDCM (in SimpleITK), which applies the rescaling itself."""
  import SimpleITK as sitk

  try:
    return sitk.GetArrayFromImage(sitk.ReadImage(path))[0].T.astype(np.float32)
  except RuntimeError:
    raise UserError(f"{path}: its DICOM compression cannot be read; convert the series to NIfTI"
                    " (dcm2niix)") from None
