"""Where a scan measured, and where the body is."""

import numpy as np
from scipy import ndimage

FILL = {"mr": lambda a: a == 0, "ct": lambda a: a <= -1024}
OPENING = {"ct": 8.0}  # mm: a patient table is thinner than twice this
WORKING = 2.0          # mm: spacing at which the body is opened; details are put back afterwards


def field_of_view(array: np.ndarray, kind: str) -> np.ndarray:
  """Voxels that were measured: all but fill connected to the border (MR 0, CT <= -1024).

  A PET zero is data. Connected means by faces. bool, the array's shape.
  """
  if kind not in FILL:
    return np.ones(array.shape, bool)
  return ~_border_connected(FILL[kind](array))


def _border_connected(fill: np.ndarray, across: int | None = None) -> np.ndarray:
  """What of `fill` is connected to the border; with `across`, in each slice across that axis."""
  joined = ndimage.generate_binary_structure(fill.ndim, 1)
  if across is not None:
    joined = joined & np.moveaxis(np.array([False, True, False])[:, None, None], 0, across)
  labels, n = ndimage.label(fill, joined)
  # An axis of one voxel is a plane of a 2-D image: its two faces are the image, not a border.
  faces = [np.take(labels, i, axis) for axis, size in enumerate(fill.shape)
           if size > 1 and axis != across for i in (0, -1)]
  touched = np.zeros(n + 1, bool)
  for face in faces:
    touched[face.ravel()] = True
  touched[0] = False
  return touched[labels]


def body_mask(foreground: np.ndarray, kind: str, affine: np.ndarray,
              share: float = 0.02) -> np.ndarray:
  """The body without table and specks, holes filled: bool, the array's shape.

  `foreground` is `intensities.foreground`. In a CT what is thinner than 16 mm goes unless it lies
  on something thicker (opening); then every connected component above `share` of the whole is kept
  (a second leg is part of the body), and holes are filled in the volume and in each axial slice
  (lungs that the crop cuts open).
  """
  spacing = np.sqrt((affine[:3, :3] ** 2).sum(0))
  axial = int(np.abs(affine[2, :3] / spacing).argmax())
  core = _opened(foreground, OPENING.get(kind, 0.0), spacing)
  labels, n = ndimage.label(core)
  if n:
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    core = (sizes > share * sizes.sum())[labels]
  for across in (None, axial):
    core = ~_border_connected(~core, across)
  return core


def _opened(mask: np.ndarray, radius: float, spacing: np.ndarray) -> np.ndarray:
  """Opening by a ball, then what of the mask lies within a working voxel of the result."""
  if not radius or not mask.any():
    return mask
  # On a coarse copy, since a distance transform of a whole CT takes minutes and gigabytes.
  step = np.maximum(1, np.floor(WORKING / spacing + 1e-6)).astype(int)
  coarse = mask[tuple(slice(None, None, s) for s in step)]
  grid = spacing * step
  if coarse.all():
    return mask
  core = ndimage.distance_transform_edt(coarse, grid) > radius
  if not core.any():
    return mask
  near = ndimage.distance_transform_edt(~core, grid) <= radius + WORKING
  for axis, s in enumerate(step):
    near = np.repeat(near, s, axis)
  return mask & near[tuple(slice(n) for n in mask.shape)]
