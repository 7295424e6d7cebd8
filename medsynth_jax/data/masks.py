"""Where a scan measured, and where the body is."""

import numpy as np
from scipy import ndimage

FILL = {"mr": lambda a: a == 0, "ct": lambda a: a <= -1024}
OPENING = {"ct": 5.0}  # mm: a patient table is thinner than twice this
WORKING = 2.0          # mm: spacing at which the body is opened; details are put back afterwards


def field_of_view(array: np.ndarray, kind: str) -> np.ndarray:
  """Voxels that were measured: all but fill connected to the border (MR 0, CT <= -1024).

  A PET zero is data. Connected means by faces. bool, the array's shape.
  """
  if kind not in FILL:
    return np.ones(array.shape, bool)
  return ~_border_connected(FILL[kind](array))


def _border_connected(fill: np.ndarray) -> np.ndarray:
  labels, n = ndimage.label(fill)
  if not n:
    return np.zeros_like(fill)
  # An axis of one voxel is a plane of a 2-D image: its two faces are the image, not a border.
  faces = [np.take(labels, i, axis) for axis, size in enumerate(fill.shape) if size > 1
           for i in (0, -1)]
  touched = np.zeros(n + 1, bool)
  for face in faces:
    touched[face.ravel()] = True
  touched[0] = False
  return touched[labels]


def body_mask(foreground: np.ndarray, kind: str, spacing, share: float = 0.02) -> np.ndarray:
  """The body without table and specks, holes filled: bool, the array's shape.

  `foreground` is `intensities.foreground`, `spacing` in mm along its axes. In a CT what is thinner
  than 10 mm goes unless it lies on something thicker (opening); then every connected component
  above `share` of the whole is kept (a second leg is part of the body), and holes are filled in
  the volume and in each slice across the last axis (lungs that the crop cuts open).
  """
  spacing = np.asarray(spacing, float)
  core = _opened(foreground, OPENING.get(kind, 0.0), spacing)
  labels, n = ndimage.label(core)
  if n:
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    core = (sizes > share * sizes.sum())[labels]
  body = ndimage.binary_fill_holes(core)
  for k in range(body.shape[-1]):
    body[..., k] = ndimage.binary_fill_holes(body[..., k])
  return body


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
