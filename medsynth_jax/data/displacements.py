"""Known misalignment: random smooth displacement fields in millimetres, applied and inverted.

Convention: a field u [x, y, z, 3] holds mm along the grid's axes (RAS+ for simulated scans);
pulling an image by u gives at voxel x what the image shows at x + u(x).
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from ..errors import UserError
from .anatomy import FIELD, jacobian, smooth_field, stream


def displacement_field(seed: int, modality: str, shape, level: float) -> np.ndarray:
  """A random smooth invertible field [x, y, z, 3] in mm whose mean length is `level` mm.

  Raises:
    UserError: the level is so large that the field folds.
  """
  knot = float(np.clip(8.0 * level, 40.0, 80.0))
  field = smooth_field(stream(seed, f"displacement {modality}"), shape, knot, 3)
  field = field * (level / np.linalg.norm(field, axis=-1).mean())
  spacing = FIELD / shape
  points = np.stack(np.meshgrid(*(np.arange(n) * s for n, s in zip(shape, spacing, strict=True)),
                                indexing="ij"))
  least = jacobian(points + np.moveaxis(field, -1, 0), spacing).min()
  if least <= 0:
    raise UserError(f"simulated misalignment of {level:g} mm folds the image: use a smaller one")
  return field.astype(np.float32)


def pull(image: np.ndarray, displacement: np.ndarray, spacing, order: int = 3) -> np.ndarray:
  """The image that shows at x what `image` [x, y, z] shows at x + displacement(x), in mm."""
  at = np.stack(np.meshgrid(*(np.arange(n, dtype=np.float32) for n in image.shape), indexing="ij"))
  at += np.moveaxis(displacement, -1, 0) / np.asarray(spacing, np.float32)[:, None, None, None]
  pulled = ndimage.map_coordinates(image, at, order=order, mode="nearest")
  return np.clip(pulled, image.min(), image.max())


def inverse_displacement(displacement: np.ndarray, spacing, rounds: int = 10) -> np.ndarray:
  """The field v with v(x) = -u(x + v(x)) in mm: pulling by u and then by v changes nothing.

  Fixed-point iteration (Chen et al. 2008, doi 10.1118/1.2816107).
  """
  inverse = -displacement
  for _ in range(rounds):
    inverse = -np.stack([pull(displacement[..., k], inverse, spacing, order=1)
                         for k in range(3)], axis=-1)
  return inverse
