"""Known misalignment: random smooth displacements of a slice or a volume, applied and inverted.

Convention: a field u displaces an image to one that shows at p what the image showed at p + u(p).
So a registration field phi with G(x)(p + phi(p)) = displaced target(p) equals u where G(x) is the
target before. `displacement` and `displaced` count in pixels along the array's axes, as a network's
flow does; the fields of the simulated scanner in mm along RAS+.
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from ..errors import UserError
from .anatomy import FIELD, jacobian, smooth_field, stream

DRAWS = 20  # of a field, until one does not fold


def displacement(shape, spacing, mm: float, rng: np.random.Generator) -> np.ndarray:
  """A random smooth field u [*shape, rank] in pixels, float32, that does not fold.

  Args:
    shape, spacing: of a slice or a volume; spacing in mm along each axis.
    mm: mean length of u over the grid, in mm.

  Raises:
    UserError: so long a field folds, however it is drawn.
  """
  if not mm:
    return np.zeros((*shape, len(shape)), np.float32)
  spacing = np.asarray(spacing, np.float32)
  for _ in range(DRAWS):
    field = smooth_field(rng, shape, _knot(mm), len(shape), np.asarray(shape) * spacing)
    u = (field * (mm / np.linalg.norm(field, axis=-1).mean()) / spacing).astype(np.float32)
    if determinants(u).min() > 0:
      return u
  raise UserError(f"a smooth displacement of {mm:g} mm on average folds a grid of"
                  f" {' x '.join(f'{n * s:.0f}' for n, s in zip(shape, spacing, strict=True))} mm:"
                  " use a smaller one")


def displaced(image: np.ndarray, u: np.ndarray, order: int = 1,
              fill: float | None = None) -> np.ndarray:
  """The image that shows at p what `image` [*shape] or [*shape, C] shows at p + u(p).

  u [*shape, rank] in pixels; `order` of the interpolation; `fill` lies outside, None: the border.
  """
  return sample(image, pixels(u.shape[:-1]) + u, order, fill)


def sample(image: np.ndarray, at: np.ndarray, order: int, fill: float | None) -> np.ndarray:
  """Values of `image` [*space] or [*space, C] at the points `at` [..., rank] in pixels."""
  if image.ndim > at.shape[-1]:
    return np.stack([sample(c, at, order, fill) for c in np.moveaxis(image, -1, 0)], -1)
  outside = {"mode": "nearest"} if fill is None else {"mode": "constant", "cval": fill}
  return ndimage.map_coordinates(image, np.moveaxis(at, -1, 0), order=order, **outside)


def pixels(shape) -> np.ndarray:
  """The place [*shape, rank] of every pixel, float32."""
  return np.stack(np.meshgrid(*(np.arange(n, dtype=np.float32) for n in shape), indexing="ij"), -1)


def determinants(u: np.ndarray) -> np.ndarray:
  """Jacobian determinant [*shape] of p -> p + u(p), u [*shape, rank] in pixels; a fold is <= 0."""
  places = np.moveaxis(pixels(u.shape[:-1]) + u, -1, 0)
  if len(places) == 3:
    return jacobian(places, (1, 1, 1))
  (a, b), (c, d) = (np.gradient(p) for p in places)
  return a * d - b * c


def _knot(mm: float) -> float:
  """Spacing in mm of the knots of a field of that mean length: a long one has to be smoother."""
  return float(np.clip(8.0 * mm, 40.0, 80.0))


# --- of the simulated scanner, in mm ---------------------------------------------------------


def displacement_field(seed: int, modality: str, shape, level: float) -> np.ndarray:
  """A random smooth invertible field [x, y, z, 3] in mm whose mean length is `level` mm.

  Raises:
    UserError: the level is so large that the field folds.
  """
  field = smooth_field(stream(seed, f"displacement {modality}"), shape, _knot(level), 3)
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
  pulled = displaced(image, displacement / np.asarray(spacing, np.float32), order)
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
