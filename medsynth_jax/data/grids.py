"""Voxel grids: canonical orientation, the model grid, and resampling between grids.

A grid is (shape, affine) with affine voxel -> RAS+ mm; positions are voxel centres, and a grid's
extent reaches half a voxel beyond the outermost centres.
"""

import numpy as np
from scipy import ndimage

from medsynth_jax.data.volumes import Volume

SNAP = 0.01  # voxels: lattices that agree this well are taken as equal
SHEAR = 1e-3  # cosine between axes up to which a lattice is kept as it is


def canonical(volume: Volume) -> Volume:
  """The same voxels with axes permuted and flipped to RAS+, exactly; obliqueness stays."""
  order, signs = _closest_axes(volume.affine)
  shape, affine = canonical_grid(volume.array.shape, volume.affine)
  array = volume.array.transpose(order)
  array = array[tuple(slice(None, None, int(s)) for s in signs)]
  assert array.shape == shape
  return Volume(np.ascontiguousarray(array), affine, volume.file)


def canonical_grid(shape, affine: np.ndarray) -> tuple[tuple[int, ...], np.ndarray]:
  """The grid of `canonical`."""
  order, signs = _closest_axes(affine)
  shape = tuple(int(shape[a]) for a in order)
  turn = np.zeros((4, 4))
  turn[3, 3] = 1
  for new, (old, sign) in enumerate(zip(order, signs, strict=True)):
    turn[old, new] = sign
    turn[old, 3] = 0 if sign > 0 else shape[new] - 1
  return shape, affine @ turn


def _closest_axes(affine: np.ndarray) -> tuple[tuple[int, ...], np.ndarray]:
  """For each of R, A, S the array axis nearest to it and its sign."""
  import nibabel as nib

  found = nib.orientations.io_orientation(affine)  # [array axis] -> (world axis, sign)
  order = tuple(int(a) for a in np.argsort(found[:, 0]))
  return order, found[list(order), 1]


def model_grid(volume: Volume, spacing=None) -> tuple[tuple[int, ...], np.ndarray]:
  """The grid on which a scan is modelled: its own, RAS+, without shear, optionally re-spaced.

  The lattice of an unsheared scan is kept exactly, oblique or not. Of a sheared one (gantry tilt)
  the slice planes are kept and the stack is straightened, wide enough for all of it. `spacing` in
  mm for x, y, z (None or 0 keeps an axis) covers the same extent about the same centre.
  """
  shape, affine = canonical_grid(volume.array.shape, volume.affine)
  shape, affine = _unsheared(shape, affine)
  own = np.sqrt((affine[:3, :3] ** 2).sum(0))
  wanted = np.array([s or o for s, o in zip(spacing or (0, 0, 0), own, strict=True)], float)
  wanted = np.where(np.abs(wanted / own - 1) < 1e-3, own, wanted)
  new = tuple(max(1, int(round(n * o / w))) for n, o, w in zip(shape, own, wanted, strict=True))
  scaled = affine.copy()
  scaled[:3, :3] *= wanted / own
  return new, _centred(scaled, new, affine, shape)


def fit_to(shape, affine: np.ndarray, size) -> tuple[tuple[int, ...], np.ndarray]:
  """Crops or pads a grid about its centre to `size` voxels along x, y, z (0 keeps an axis)."""
  new = tuple(int(s) or int(n) for s, n in zip(size or (0, 0, 0), shape, strict=True))
  start = [(n - s) // 2 for n, s in zip(shape, new, strict=True)]
  moved = affine.copy()
  moved[:3, 3] = (affine @ np.array([*start, 1.0]))[:3]
  return new, moved


def resample(volume: Volume, shape, affine: np.ndarray, order: int = 1, fill: float = 0.0):
  """The volume's values on another grid, `fill` outside its extent.

  `order` 1 is linear (float32), after a Gaussian along the axes that are downsampled by more than
  1.5 (Cardoso et al., MICCAI 2015: its width makes up the difference of the two voxels'), clipped
  to the input's range; 0 is nearest (the input's type). Equal lattices give equal values.
  """
  matrix = _source_index(volume.affine, affine, shape)
  shifted = _lattice_copy(volume.array, matrix, shape, fill)
  if shifted is not None:
    return shifted
  array = volume.array
  if order:
    array = _smoothed(array, np.sqrt((matrix[:3, :3] ** 2).sum(1)))
  linear = array.astype(np.float32, copy=False) if order else array.view(np.uint8) \
    if array.dtype == bool else array
  result = ndimage.affine_transform(linear, matrix[:3, :3], matrix[:3, 3], tuple(shape),
                                    order=order, mode="nearest")
  if order:
    result = result.clip(volume.array.min(), volume.array.max())
  elif volume.array.dtype == bool:
    result = result.astype(bool)
  result[~inside(volume.array.shape, volume.affine, shape, affine)] = fill
  return result


def inside(source_shape, source_affine: np.ndarray, shape, affine: np.ndarray) -> np.ndarray:
  """Where the voxels of a grid lie within the extent of a source grid: bool [*shape]."""
  matrix = _source_index(source_affine, affine, shape)
  result = np.ones(tuple(shape), bool)
  steps = [np.arange(n, dtype=np.float64) for n in shape]
  for axis, n in enumerate(source_shape):
    position = (matrix[axis, 0] * steps[0][:, None, None] + matrix[axis, 1] * steps[1][:, None]
                + (matrix[axis, 2] * steps[2] + matrix[axis, 3]))
    result &= (position > -0.5 - SNAP) & (position < n - 0.5 + SNAP)
  return result


# --- parts -----------------------------------------------------------------------------------


def _source_index(source: np.ndarray, target: np.ndarray, shape) -> np.ndarray:
  """Matrix from target voxel index to source voxel index, integers where it nearly is."""
  matrix = np.linalg.solve(source, target)
  rounded = np.round(matrix)
  off = np.abs(matrix - rounded)[:3] @ np.array([*(max(n - 1, 1) for n in shape), 1.0])
  return rounded if off.max() < SNAP else matrix


def _lattice_copy(array: np.ndarray, matrix: np.ndarray, shape, fill):
  """The values by indexing if the two grids are one lattice, else None."""
  turn = matrix[:3, :3]
  if not (np.array_equal(np.abs(turn).sum(0), np.ones(3)) and np.array_equal(matrix, matrix.round())
          and np.array_equal(np.abs(turn).sum(1), np.ones(3))):
    return None
  axes = np.abs(turn).argmax(0)  # source axis of each target axis
  result = np.full(tuple(shape), fill, array.dtype)
  view = array.transpose(axes)
  here, there = [], []
  for target_axis, source_axis in enumerate(axes):
    index = np.arange(shape[target_axis]) * int(turn[source_axis, target_axis]) \
      + int(matrix[source_axis, 3])
    kept = np.flatnonzero((index >= 0) & (index < array.shape[source_axis]))
    if not kept.size:
      return result
    here.append(kept)
    there.append(index[kept])
  result[np.ix_(*here)] = view[np.ix_(*there)]
  return result


def _smoothed(array: np.ndarray, factors: np.ndarray) -> np.ndarray:
  """Gaussian whose full width at half maximum is sqrt(factor^2 - 1) voxels where factor > 1.5."""
  sigma = [np.sqrt(f * f - 1) / 2.3548 if f > 1.5 else 0.0 for f in factors]
  if not any(sigma):
    return array
  return ndimage.gaussian_filter(array.astype(np.float32, copy=False), sigma, mode="nearest")


def _unsheared(shape, affine: np.ndarray) -> tuple[tuple[int, ...], np.ndarray]:
  lengths = np.sqrt((affine[:3, :3] ** 2).sum(0))
  axes = affine[:3, :3] / lengths
  cosines = {k: abs(axes[:, i] @ axes[:, j]) for k, (i, j) in enumerate(((1, 2), (0, 2), (0, 1)))}
  if max(cosines.values()) < SHEAR:
    return tuple(shape), affine
  # The axis across the plane of two orthogonal ones; of several, the slice axis (the coarsest).
  through = min(cosines, key=lambda k: (max(cosines[k], SHEAR), -lengths[k]))
  i, j = (a for a in range(3) if a != through)
  straight = np.empty((3, 3))
  straight[:, i] = axes[:, i]
  straight[:, j] = axes[:, j] - (axes[:, j] @ axes[:, i]) * axes[:, i]
  straight[:, j] /= np.linalg.norm(straight[:, j])
  normal = np.cross(straight[:, i], straight[:, j])
  straight[:, through] = normal * np.sign(normal @ axes[:, through])
  spacing = lengths.copy()
  spacing[through] *= abs(straight[:, through] @ axes[:, through])
  corners = np.array([[*c, 1] for c in np.ndindex(2, 2, 2)], float)
  corners[:, :3] *= np.array(shape) - 1
  places = (affine @ corners.T)[:3].T @ straight / spacing  # in voxels of the straight grid
  low, high = places.min(0), places.max(0)
  result = np.eye(4)
  result[:3, :3] = straight * spacing
  result[:3, 3] = straight @ (low * spacing)
  return tuple(int(np.ceil(e - SNAP)) + 1 for e in high - low), result


def _centred(affine: np.ndarray, shape, other: np.ndarray, other_shape) -> np.ndarray:
  """`affine` moved so that the centre of its grid is the centre of the other grid."""
  centre = other @ np.array([*((n - 1) / 2 for n in other_shape), 1.0])
  here = affine @ np.array([*((n - 1) / 2 for n in shape), 1.0])
  moved = affine.copy()
  moved[:3, 3] += (centre - here)[:3]
  return moved
