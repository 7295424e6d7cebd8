"""Image files <-> arrays with their geometry: the only file that knows formats.

Coordinates are NIfTI's everywhere in the package: millimetres, x to the patient's right, y to the
front, z upwards (RAS+). What ITK and DICOM say in LPS is turned on the way in and out.
"""

import contextlib
import dataclasses
import errno
import os
import shutil
import tempfile
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from medsynth_jax.errors import UserError

NIFTI = (".nii.gz", ".nii")
ITK = (".mha", ".mhd", ".nrrd")
EXTENSIONS = NIFTI + ITK
LPS = np.diag([-1.0, -1.0, 1.0, 1.0])  # LPS <-> RAS, its own inverse


class ImageWarning(UserWarning):
  """Something about an image that its user should look at; `prepare` collects them."""


@dataclasses.dataclass(frozen=True)
class Volume:
  """One scan: `array` [i, j, k] in the file's own axis order, `affine` voxel -> RAS+ mm (4 x 4).

  `file` is the name that messages give it.
  """
  array: np.ndarray
  affine: np.ndarray
  file: str = ""

  @property
  def spacing(self) -> np.ndarray:
    """Voxel size in mm along the array's axes."""
    return np.sqrt((self.affine[:3, :3] ** 2).sum(0))


def extension(path: str | os.PathLike) -> str:
  """The image extension that a file name ends in, "" if it is none of EXTENSIONS."""
  name = str(path).lower()
  return next((e for e in EXTENSIONS if name.endswith(e)), "")


def read(path: str | os.PathLike, mask: bool = False) -> Volume:
  """Reads a scan: .nii, .nii.gz, .mha, .mhd, .nrrd, or a folder that holds one DICOM series.

  Values are float32 with the file's scaling applied (`mask`: bool, value > 0.5). Raises UserError,
  naming the file and the remedy, for what is absent, damaged, no 3-D scalar image, not finite,
  constant (a mask: empty), or has no usable geometry.
  """
  path = Path(path)
  if path.is_dir():
    from medsynth_jax.data import dicom
    array, affine = dicom.read_series(path)
  elif not path.exists():
    raise UserError(f"{path}: no such file; check the path (a relative one counts from the table)")
  elif not extension(path):
    raise UserError(f"{path}: not an image file this program reads; give {', '.join(EXTENSIONS)}"
                    " or the folder of a DICOM series")
  elif path.stat().st_size == 0:
    raise UserError(f"{path}: the file is empty; copy or export it again")
  else:
    array, affine = (_read_nifti if extension(path) in NIFTI else _read_itk)(path)
  return _checked(array, affine, path, mask)


def write(path: str | os.PathLike, array: np.ndarray, affine: np.ndarray,
          like: str | os.PathLike | None = None) -> None:
  """Writes a scan in the format that the name's extension says, complete or not at all.

  `array` [i, j, k] (bool is stored as uint8), or what `read` refuses: [i, j, k, 3] uint8, a colour
  image, or float, a field of vectors along RAS+ axes (NIfTI only). `affine` voxel -> RAS+ mm;
  `like` is a NIfTI file whose orientation codes are taken over.
  Raises UserError for an unknown extension, an unwritable folder or a full disk.
  """
  path = Path(path)
  kind = extension(path)
  if not kind:
    raise UserError(f"{path}: cannot write this format; use one of {', '.join(EXTENSIONS)}")
  array = np.asarray(array)
  if array.dtype == bool:
    array = array.astype(np.uint8)
  elif array.dtype.kind == "f":
    array = array.astype(np.float32)
  with _disk(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=".partial-", dir=path.parent))
    try:
      # Under its final name in a folder beside it: the header of .mhd names its data file.
      temporary = folder / path.name
      if kind in NIFTI:
        _write_nifti(temporary, array, affine, like)
      else:
        _write_itk(temporary, array, affine)
      for part in sorted(folder.iterdir(), key=lambda p: p.name == path.name):  # the header last
        os.replace(part, path.parent / part.name)
    finally:
      shutil.rmtree(folder, ignore_errors=True)


# --- checks ----------------------------------------------------------------------------------


def _checked(array: np.ndarray, affine: np.ndarray, path: Path, mask: bool) -> Volume:
  if array.dtype.kind not in "buif":
    raise UserError(f"{path}: voxels of type {array.dtype} (colour or complex); give one channel")
  while array.ndim > 3 and array.shape[-1] == 1:
    array = array[..., 0]
  if array.ndim > 3:
    raise UserError(f"{path}: {array.ndim}-D volume of shape {'x'.join(map(str, array.shape))};"
                    " save the 3-D volume that you mean as a file of its own")
  array = array.reshape(array.shape + (1,) * (3 - array.ndim))
  if array.size == 0:
    raise UserError(f"{path}: the image has no voxels; export it again")
  check_affine(affine, path)
  if array.dtype.kind == "f" and not np.isfinite(array).all():
    bad = int((~np.isfinite(array)).sum())
    raise UserError(f"{path}: {bad} NaN or Inf voxels; replace them (e.g. by the background)")
  if mask:
    array = array > 0.5
    if not array.any():
      raise UserError(f"{path}: empty mask (no voxel above 0.5); leave the cell empty where the"
                      " region is absent, or give the right file")
  elif array.min() == array.max():
    raise UserError(f"{path}: constant image (every voxel is {array.flat[0]}); export it again or"
                    " leave the cell empty")
  else:
    array = np.ascontiguousarray(array, np.float32)
  return Volume(array, np.asarray(affine, np.float64), str(path))


def check_affine(affine: np.ndarray, path: str | os.PathLike) -> None:
  """Raises UserError if an affine is not finite or singular."""
  lengths = np.sqrt((np.asarray(affine)[:3, :3] ** 2).sum(0))
  if (not np.isfinite(affine).all() or lengths.min() < 1e-9
      or abs(np.linalg.det(affine[:3, :3] / lengths)) < 1e-6):
    raise UserError(f"{path}: singular affine (voxel axes of no length or in one plane);"
                    " the header is damaged, convert the image again from its original")


def reason(error: BaseException) -> str:
  """The last line of a library's message, short enough for one line of ours."""
  lines = [line.strip() for line in str(error).splitlines() if line.strip()]
  return (lines[-1] if lines else type(error).__name__)[:160]


@contextlib.contextmanager
def _disk(path: Path) -> Iterator[None]:
  try:
    yield
  except OSError as error:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
      raise UserError(f"{path}: the disk is full; nothing was written, free space and run the"
                      " command again") from None
    raise UserError(f"{path}: cannot be written ({error.strerror or error}); check the folder"
                    " and its permissions") from None


# --- NIfTI -----------------------------------------------------------------------------------


def _read_nifti(path: Path) -> tuple[np.ndarray, np.ndarray]:
  import nibabel as nib

  try:
    image = nib.load(path)
    if not isinstance(image, nib.Nifti1Image):  # Nifti2Image is one
      raise UserError(f"{path}: not a NIfTI file ({type(image).__name__}); convert it to .nii.gz")
    array = np.asanyarray(image.dataobj)  # scl_slope and scl_inter applied
    if array.dtype.kind == "f":
      array = array.astype(np.float32, copy=False)
    return array, _nifti_affine(image, path)
  except (OSError, EOFError, ValueError, zlib.error, nib.filebasedimages.ImageFileError,
          nib.spatialimages.HeaderDataError) as error:
    raise UserError(f"{path}: damaged, truncated or not an image ({reason(error)});"
                    " copy or export it again") from None


def _nifti_affine(image, path: Path) -> np.ndarray:
  """The sform if it is set, else the qform; UserError if both are and differ by > 0.1 voxel."""
  header = image.header
  to_mm = np.diag([*[{"meter": 1e3, "micron": 1e-3}.get(header.get_xyzt_units()[0], 1.0)] * 3, 1])
  sform, scode = header.get_sform(coded=True)
  qform, qcode = header.get_qform(coded=True)
  sform, qform = (None if form is None else to_mm @ form for form in (sform, qform))
  if not scode and not qcode:
    warnings.warn(f"{path}: the header has no orientation; axes taken as in old Analyze files"
                  " (check left and right on the QC sheet)", ImageWarning, stacklevel=2)
    return to_mm @ image.affine
  if not scode:
    return qform
  check_affine(sform, path)
  if qcode:
    corners = np.array([[*c, 1] for c in np.ndindex(2, 2, 2)], float).T
    corners[:3] *= np.array([*image.shape, 1, 1])[:3, None] - 1
    apart = np.abs((np.linalg.solve(sform, qform @ corners) - corners)[:3]).max()
    if not apart <= 0.1:
      raise UserError(f"{path}: sform and qform differ by {apart:.3g} voxels; keep the right one"
                      " (`fslorient -copysform2qform` or `-copyqform2sform`, or set the wrong"
                      " one's code to 0)")
  return sform


def _write_nifti(path: Path, array: np.ndarray, affine: np.ndarray, like) -> None:
  import nibabel as nib

  codes = (1, 1)
  if like is not None and extension(like) in NIFTI:
    header = nib.load(like).header
    codes = int(header["sform_code"]), int(header["qform_code"])
    codes = codes if any(codes) else (1, 1)
  vectors = array.ndim == 4 and array.dtype.kind == "f"
  if vectors:
    array = array[:, :, :, None]  # the fourth axis is time
  elif array.ndim == 4:
    array = np.ascontiguousarray(array).view([(c, np.uint8) for c in "RGB"])[..., 0]  # RGB24
  image = nib.Nifti1Image(array, affine)
  if vectors:
    image.header.set_intent("vector")
  image.header.set_xyzt_units("mm")
  image.set_sform(affine, codes[0] or codes[1])
  # A qform cannot hold shear: leave it unset rather than let it contradict the sform.
  direction = affine[:3, :3] / np.sqrt((affine[:3, :3] ** 2).sum(0))
  sheared = np.abs(direction.T @ direction - np.eye(3)).max() > 1e-5
  image.set_qform(None if sheared else affine, 0 if sheared else codes[1] or codes[0])
  nib.save(image, path)


# --- ITK -------------------------------------------------------------------------------------


def _read_itk(path: Path) -> tuple[np.ndarray, np.ndarray]:
  import SimpleITK as sitk

  sitk.ProcessObject.SetGlobalWarningDisplay(False)
  _check_data_file(path)
  try:
    image = sitk.ReadImage(str(path))
  except RuntimeError:  # ITK's reason is often "No such file", whatever is wrong
    raise UserError(f"{path}: damaged, truncated or not an image; copy or export it"
                    " again") from None
  if image.GetNumberOfComponentsPerPixel() > 1:
    raise UserError(f"{path}: {image.GetNumberOfComponentsPerPixel()} channels a voxel (colour or"
                    " a vector field); give one channel")
  return sitk.GetArrayFromImage(image).T, _itk_affine(image)


def _check_data_file(path: Path) -> None:
  """Refuses a MetaImage without, or with too little of, its voxels, where ITK gives no reason."""
  if extension(path) not in (".mha", ".mhd"):
    return
  fields, size = {}, 0
  with open(path, "rb") as file:
    for raw in file:
      size += len(raw)
      key, _, value = raw.decode("latin-1").partition("=")
      fields[key.strip()] = value.strip()
      if key.strip() == "ElementDataFile" or len(fields) > 200:
        break
  data = fields.get("ElementDataFile", "")
  if not data or data.split()[0] == "LIST" or "%" in data:
    return
  if data != "LOCAL" and not (path.parent / data).is_file():
    raise UserError(f"{path}: its voxel file {data} is missing; copy both files")
  if fields.get("CompressedData", "False").lower() == "true":
    return  # a truncated stream is an error of the decompression
  bytes_of = {"CHAR": 1, "SHORT": 2, "INT": 4, "LONG": 4, "LONG_LONG": 8, "FLOAT": 4, "DOUBLE": 8}
  kind = fields.get("ElementType", "").removeprefix("MET_").replace("UCHAR", "CHAR")
  voxel = bytes_of.get(kind if kind in bytes_of else kind.removeprefix("U"), 0)
  needed = voxel * int(np.prod([int(n) for n in fields.get("DimSize", "0").split()]))
  there = path.stat().st_size - size if data == "LOCAL" else (path.parent / data).stat().st_size
  if there < needed:
    raise UserError(f"{path}: truncated, {there} of {needed} bytes of voxels; copy it again")


def _itk_affine(image) -> np.ndarray:
  n = min(image.GetDimension(), 3)
  affine = np.eye(4)
  direction = np.array(image.GetDirection()).reshape(image.GetDimension(), -1)[:n, :n]
  affine[:n, :n] = direction * np.array(image.GetSpacing())[:n]
  affine[:n, 3] = image.GetOrigin()[:n]
  return LPS @ affine


def _write_itk(path: Path, array: np.ndarray, affine: np.ndarray) -> None:
  import SimpleITK as sitk

  lps = LPS @ affine
  spacing = np.sqrt((lps[:3, :3] ** 2).sum(0))
  stored = np.ascontiguousarray(array.transpose(2, 1, 0, *range(3, array.ndim)))
  image = sitk.GetImageFromArray(stored, isVector=array.ndim == 4)
  image.SetSpacing(spacing.tolist())
  image.SetOrigin(lps[:3, 3].tolist())
  image.SetDirection((lps[:3, :3] / spacing).ravel().tolist())
  try:
    sitk.WriteImage(image, str(path), useCompression=extension(path) != ".mhd")
    # ITK does not report a full disk in every format: read back what was written.
    written = sitk.ReadImage(str(path))
    if not np.array_equal(sitk.GetArrayViewFromImage(written), stored):
      raise RuntimeError("read back differs")
  except RuntimeError as error:
    full = shutil.disk_usage(path.parent).free < array.nbytes
    raise OSError(errno.ENOSPC if full else errno.EIO, reason(error)) from None
