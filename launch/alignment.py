"""Residual offset of a scan from another of the same patient, by mutual information, and its cure.

The moving scan is registered rigidly to the FIXED one (the source of synthesis), never to a
synthetic image: a reference that was moved onto what a network made would hide its errors.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from medsynth_jax.data.volumes import LPS, Volume, read, write


@dataclasses.dataclass(frozen=True)
class Rigid:
  """A rigid registration: `matrix` maps RAS+ mm of the fixed scan to the moving one's (4 x 4).

  `translation` is what it does to the centre of the moving scan (mm, x y z), `rotation` the angle
  in degrees, `before` and `after` the mutual information in nats where both scans measured.
  """
  matrix: np.ndarray
  translation: tuple[float, float, float]
  rotation: float
  before: float
  after: float

  @property
  def length(self) -> float:
    """Of the translation, mm."""
    return float(np.linalg.norm(self.translation))


def register(fixed: Volume, moving: Volume) -> Rigid:
  """Mattes mutual information, from the positions in the headers; zeros of `moving` do not count.

  Deterministic: every voxel of the fixed scan is used, in three resolutions.
  """
  import SimpleITK as sitk
  a, b = _itk(fixed), _itk(moving)
  centre = LPS @ moving.affine @ [*((np.array(moving.array.shape) - 1) / 2), 1]
  start = sitk.Euler3DTransform(centre[:3].tolist())
  method = sitk.ImageRegistrationMethod()
  method.SetMetricAsMattesMutualInformation(32)
  method.SetMetricSamplingStrategy(method.NONE)
  method.SetMetricMovingMask(b != 0)
  method.SetInterpolator(sitk.sitkLinear)
  method.SetOptimizerAsRegularStepGradientDescent(1.0, 1e-3, 200, relaxationFactor=0.6)
  method.SetOptimizerScalesFromPhysicalShift()
  method.SetShrinkFactorsPerLevel([4, 2, 1])
  method.SetSmoothingSigmasPerLevel([3, 1.5, 0])
  method.SmoothingSigmasAreSpecifiedInPhysicalUnitsOn()
  method.SetInitialTransform(start, inPlace=False)
  before = -method.MetricEvaluate(a, b)
  found = sitk.Euler3DTransform(sitk.CompositeTransform(method.Execute(a, b)).GetBackTransform())
  method.SetInitialTransform(found, inPlace=False)
  matrix = np.eye(4)
  matrix[:3, :3] = np.array(found.GetMatrix()).reshape(3, 3)
  matrix[:3, 3] = np.array(found.TransformPoint((0.0, 0.0, 0.0)))
  matrix = LPS @ matrix @ LPS
  middle = LPS @ centre
  angle = np.degrees(np.arccos(np.clip((np.trace(matrix[:3, :3]) - 1) / 2, -1, 1)))
  return Rigid(matrix, tuple((matrix @ middle - middle)[:3]), float(angle), before,
               -method.MetricEvaluate(a, b))


def _itk(volume: Volume):
  import SimpleITK as sitk
  image = sitk.GetImageFromArray(np.ascontiguousarray(volume.array.T, np.float32))
  affine = LPS @ volume.affine
  image.SetSpacing(volume.spacing.tolist())
  image.SetOrigin(affine[:3, 3].tolist())
  image.SetDirection((affine[:3, :3] / volume.spacing).ravel().tolist())
  return image


def moved(volume: Volume, found: Rigid, nearest: bool = False) -> np.ndarray:
  """The moving scan on its own grid, in the position of the fixed one; 0 outside its extent."""
  from scipy import ndimage
  index = np.linalg.solve(volume.affine, found.matrix @ volume.affine)
  values = volume.array.astype(np.float32)
  return ndimage.affine_transform(values, index[:3, :3], index[:3, 3], order=0 if nearest else 1,
                                  mode="constant", cval=0.0)


def align(fixed: Path, moving: Path, mask: Path, to: Path) -> Rigid:
  """Writes the moving scan and its mask in the position of the fixed one, into the folder `to`."""
  scan, region = read(moving), read(mask, mask=True)
  found = register(read(fixed), scan)
  write(to / moving.name, moved(scan, found), scan.affine)
  write(to / mask.name, moved(region, found, nearest=True) > 0.5, region.affine)
  return found


def table(found: Mapping[str, Rigid]) -> str:
  """Markdown, a line a patient."""
  lines = ["| patient | x | y | z | length (mm) | rotation (degrees) | MI before | after |",
           "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"]
  for name, one in found.items():
    cells = [*(f"{t:+.1f}" for t in one.translation), f"{one.length:.1f}", f"{one.rotation:.1f}",
             f"{one.before:.3f}", f"{one.after:.3f}"]
    lines.append(f"| {name} | {' | '.join(cells)} |")
  return "\n".join(lines)
