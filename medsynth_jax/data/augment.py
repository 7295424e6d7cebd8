"""Where the pixels of an example come from: random transforms and simulated misalignment."""

import dataclasses
import functools

import numpy as np
from ml_collections import ConfigDict
from scipy import ndimage

from medsynth_jax.data.dataset import Info
from medsynth_jax.data.displacements import displacement, pixels, sample
from medsynth_jax.data.examples import BACKGROUND
from medsynth_jax.errors import UserError

# how many fixed misalignments are kept, of slices and of whole volumes (0.1 GB each)
REMEMBERED = {2: 64, 3: 2}


@dataclasses.dataclass(frozen=True)
class Augment:
  """Random in-plane transforms, one draw for all modalities of an example, and source intensities.

  flip: left-right mirror with probability 1/2; rotate: degrees; shift, scale: shares of the size;
  zoom: fixed magnification (1.117 with shift 0.058 is pix2pix's 286 -> random crop 256).
  gamma, contrast: the source's share u of its range becomes c u^g, with log g in -+gamma and c in
  1 -+ contrast; background stays. Scanners differ like that where a modality has no units.

  Simulated misalignment, in the slices as they are stored, before those transforms:
  misalign: level n: n degrees, 2n % shift and scale, drawn for source and target apart (RegGAN);
  displace: mean length in mm of a smooth displacement u of the target alone, in the slice (of
  patches in three dimensions): it shows at p what it showed at p + u(p), see `displacements`.
  Both are fixed for each volume by `seed`, the same on all its slices, as a scan would be; with
  `redraw` they are drawn anew for every example, as RegGAN does.
  """
  flip: bool = False
  rotate: float = 0.0
  shift: float = 0.0
  scale: float = 0.0
  zoom: float = 1.0
  gamma: float = 0.0
  contrast: float = 0.0
  misalign: float = 0.0
  displace: float = 0.0
  redraw: bool = False
  seed: int = 0


def make_augment(config: ConfigDict, section: ConfigDict, info: Info) -> Augment:
  """The augmentation of a stage; a UserError where a left-right flip has no axis in the slice."""
  augment = config.data.augment
  if augment.flip and info.plane == 0:
    raise UserError("data.augment.flip mirrors left and right, which a sagittal slice does not"
                    " hold; set it to False")
  return Augment(**augment.to_dict(), misalign=section.misalign, displace=section.displace,
                 redraw=section.redraw, seed=config.seed)


@dataclasses.dataclass(frozen=True)
class Misplaced:
  """A simulated misalignment: 3x3 maps of pixels of source and target, a field u of the target.

  u is None, [H, W, 2] for slices or [n, H, W, 3] for patches, in pixels.
  """
  source: np.ndarray
  target: np.ndarray
  u: np.ndarray | None


def child(rng: np.random.Generator) -> np.random.Generator:
  """A stream of its own, by the state of `rng`, which it leaves as it is.

  Not `rng.spawn`: that counts in the seed of the generator, which Grain uses again for other
  examples, so that a child would depend on what was read before.
  """
  ahead = np.random.Generator(rng.bit_generator.jumped())
  return np.random.default_rng(ahead.integers(2**63, size=4))


def misplaced(augment: Augment, volume: int, shape: tuple[int, ...], spacing: tuple[float, ...],
              rng: np.random.Generator) -> Misplaced:
  """The misalignment of an example.

  Args:
    shape, spacing: of its slice, or of its volume where patches are trained on; spacing in mm.
    rng: the example's; nothing is taken of it, so that no other draw changes.
  """
  if augment.redraw:
    return _misplaced(augment, shape, spacing, child(rng))
  return _FIXED[len(shape)](augment, volume, shape, spacing)


def _fixed(augment: Augment, volume: int, shape, spacing) -> Misplaced:
  return _misplaced(augment, shape, spacing, np.random.default_rng([augment.seed, volume]))


_FIXED = {rank: functools.lru_cache(most)(_fixed) for rank, most in REMEMBERED.items()}


def _misplaced(augment: Augment, shape, spacing, rng: np.random.Generator) -> Misplaced:
  level, plane = augment.misalign, shape[-2:]
  sides = [transform(rng, level, 0.02 * level, 0.02 * level, 1.0, plane) for _ in range(2)]
  u = displacement(shape, spacing, augment.displace, rng) if augment.displace else None
  return Misplaced(*sides, u)


@dataclasses.dataclass(frozen=True)
class Pose:
  """What is drawn once for the images of one subject: mirrored, a 3x3 map, the crop's corner."""
  flip: bool
  matrix: np.ndarray  # from pixels of the example to those of the stored slice
  corner: tuple[int, int]


def draw_pose(augment: Augment, shape: tuple[int, int], plane: tuple[int, int],
              rng: np.random.Generator) -> Pose:
  """A random pose of slices of `shape`, of which the network takes `plane`."""
  a = augment
  flip = bool(a.flip and rng.random() < 0.5)
  matrix = transform(rng, a.rotate, a.shift, a.scale, a.zoom, shape)
  corner = tuple(int(rng.integers(0, max(0, n - m) + 1)) for n, m in zip(shape, plane, strict=True))
  return Pose(flip, matrix, corner)


def placed(array: np.ndarray, pose: Pose, own: np.ndarray, u: np.ndarray | None,
           plane: tuple[int, int], order: int) -> np.ndarray:
  """Stored slices [n, H, W, C] as an example shows them, [n, *plane, C], interpolated once.

  A pixel p shows what lies at own(q + u(q)), q = pose.matrix(p). What lies outside is background,
  of masks (`order` 0) 0.

  Args:
    own, u: as `Misplaced` has them; u [n, H, W, 3] of the slices at hand.
  """
  fill = BACKGROUND if order else 0.0
  if u is None:
    warped = _warp(array, own @ pose.matrix, order, fill)
  else:
    warped = _displaced(array, pose.matrix, own, u, order, fill)
  return _window(warped[:, ::-1] if pose.flip else warped, pose.corner, plane, fill)


def transform(rng, rotate: float, shift: float, scale: float, zoom: float, shape) -> np.ndarray:
  """A random 3x3 map from output to input pixels about the slice's centre.

  Always takes the same four numbers from `rng`, so that a field changes no other draw.
  """
  angle, zoom_by, *moved = rng.uniform(-1, 1, 4)
  angle, factor = np.deg2rad(rotate * angle), zoom * (1 + scale * zoom_by)
  linear = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) / factor
  centre = (np.array(shape) - 1) / 2
  matrix = np.eye(3)
  matrix[:2, :2] = linear
  matrix[:2, 2] = centre - linear @ centre - shift * np.array(moved) * np.array(shape)
  return matrix


def recoloured(source: np.ndarray, augment: Augment, rng: np.random.Generator) -> np.ndarray:
  """The source with another gamma and contrast; -1 stays -1."""
  if not (augment.gamma or augment.contrast):
    return source
  power, factor = rng.uniform(-1, 1, 2)
  share = np.clip((source + 1) / 2, 0, 1) ** np.exp(augment.gamma * power)
  share = np.clip(share * (1 + augment.contrast * factor), 0, 1)
  return (2 * share - 1).astype(np.float32)


def _warp(array: np.ndarray, matrix: np.ndarray, order: int, fill: float) -> np.ndarray:
  """Every slice and channel of [n, H, W, C] through one in-plane map."""
  if np.array_equal(matrix, np.eye(3)):
    return array
  out = np.empty_like(array)
  for n in range(array.shape[0]):
    for c in range(array.shape[-1]):
      ndimage.affine_transform(array[n, ..., c], matrix[:2, :2], matrix[:2, 2], order=order,
                               cval=fill, output=out[n, ..., c])
  return out


def _displaced(array, matrix, own, u, order: int, fill: float) -> np.ndarray:
  """[n, H, W, C] through a map, a displacement and the misalignment's map, in one go."""
  at = _mapped(matrix, pixels(array.shape[1:3]))
  if u.shape[-1] == 2:
    at = _mapped(own, at + sample(u, at, 1, None))
    return np.stack([sample(x, at, order, fill) for x in array])
  numbers = np.arange(len(array), dtype=np.float32)
  depth = np.broadcast_to(numbers[:, None, None, None], (len(array), *at.shape[:2], 1))
  at = np.concatenate([depth, np.broadcast_to(at, (len(array), *at.shape))], -1)
  at = at + sample(u, at, 1, None)
  at = np.concatenate([at[..., :1], _mapped(own, at[..., 1:])], -1)
  return sample(array, at, order, fill)


def _mapped(matrix: np.ndarray, at: np.ndarray) -> np.ndarray:
  """Points [..., 2] through a 3x3 map."""
  return at @ matrix[:2, :2].T + matrix[:2, 2]


def _window(array: np.ndarray, corner, plane, fill: float) -> np.ndarray:
  """Crops [n, H, W, C] at `corner`, or pads about the centre, to the in-plane size."""
  (i, j), (h, w) = corner, plane
  array = array[:, i:i + h, j:j + w]
  pads = [((m - n) // 2, m - n - (m - n) // 2)
          for n, m in zip(array.shape[1:3], plane, strict=True)]
  if any(a or b for a, b in pads):
    array = np.pad(array, ((0, 0), *pads, (0, 0)), constant_values=fill)
  return np.ascontiguousarray(array)
