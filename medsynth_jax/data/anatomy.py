"""Simulated head anatomy: tissue shares of one random subject on any grid.

The brain is the ICBM 2009a average (assets/NOTICE), randomly deformed. Skull, scalp, sinuses,
face and vessels are invented around it, and so are all abnormalities: nothing here is a patient.
"""

from __future__ import annotations

import functools
import zlib
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from .atlas import STEP, atlas

FIELD = np.array([192.0, 224.0, 192.0])  # mm, the field of view of every simulated scan
CORNER = np.array([-96.0, -122.0, -84.0])  # its low corner in MNI mm
TISSUES = ("air", "skin", "fat", "muscle", "bone", "marrow", "mucosa", "eye", "csf", "gm", "wm",
           "blood")

# What is drawn into a subject: count = (least, mean of the Poisson rest), radius range in mm.
# Half of the PET foci have an MR sign (`_sign`), the others none.
ABNORMAL = {
  "lesion": ((3, 6.0), (2.5, 6.0), "white"),
  "hot_focus": ((1, 0.3), (5.0, 9.0), "brain"),
  "hot_focus_sign": ((1, 0.3), (5.0, 9.0), "brain"),
  "cold_focus": ((1, 0.3), (6.0, 10.0), "brain"),
  "cold_focus_sign": ((1, 0.3), (6.0, 10.0), "brain"),
}
ENHANCING_SHARE = 0.4  # of the lesions

# Courses of the large vessels in MNI mm (right side; mirrored where x > 0) and radii in mm.
VESSELS = (
  (2.6, ((0, 62, 28), (0, 45, 58), (0, 5, 79), (0, -40, 78), (0, -80, 50), (0, -104, 10),
         (0, -106, -10))),  # superior sagittal sinus
  (2.6, ((0, -106, -10), (30, -97, -18), (56, -70, -28), (60, -50, -34), (50, -38, -52),
         (30, -30, -70), (30, -30, -86))),  # transverse, sigmoid sinus, jugular vein
  (2.2, ((26, -8, -86), (24, -8, -60), (14, -2, -42), (11, 6, -22), (8, 4, -14))),  # carotid
  (1.5, ((8, 4, -14), (24, 4, -16), (38, 2, -10), (44, -8, 2), (42, -24, 14))),  # middle cerebral
  (1.4, ((6, 6, -12), (3, 26, -8), (3, 40, 10), (3, 28, 30), (3, 0, 38))),  # anterior cerebral
  (1.8, ((0, -36, -80), (0, -30, -52), (0, -20, -24))),  # basilar artery
  (1.3, ((0, -20, -24), (18, -24, -14), (22, -48, -4), (12, -78, 2))),  # posterior cerebral
)


@dataclass(frozen=True)
class Anatomy:
  """One subject's anatomy on a grid: values at the voxels `inside` (flat indices) of the head."""

  shape: tuple[int, int, int]
  inside: np.ndarray
  tissues: dict[str, np.ndarray]  # shares [n], their sum is 1
  abnormal: dict[str, np.ndarray]  # coverage [n], 0..1
  expected: dict[str, np.ndarray]  # its mean over subjects [n]
  detail: np.ndarray  # relative change of relaxation times [n]
  region: np.ndarray  # smooth unit-variance field [n], for regional uptake
  head: np.ndarray  # bool [x, y, z]
  brain: np.ndarray  # bool [x, y, z]
  jacobian: float  # least determinant of the deformation


def stream(seed: int, purpose: str) -> np.random.Generator:
  """Random numbers of one purpose, so that asking for another modality changes no anatomy."""
  return np.random.default_rng([seed, zlib.crc32(purpose.encode())])


def spline_basis(positions: np.ndarray, count: int) -> np.ndarray:
  """Cubic B-spline weights [len(positions), count] at positions in units of knots."""
  distance = np.abs(positions[:, None] - (np.arange(count)[None] - 1.0))
  near = 2 / 3 - distance**2 + distance**3 / 2
  far = np.clip(2 - distance, 0, None) ** 3 / 6
  return np.where(distance < 1, near, far).astype(np.float32)


def smooth_field(rng, shape, knot: float, components: int = 0, extent=FIELD) -> np.ndarray:
  """A smooth random field of zero mean and unit variance over the field of view.

  Args:
    rng: drawn from in amounts that do not depend on `shape`: every grid samples one same field.
    shape: voxels along each axis of `extent`.
    knot: spacing of the cubic B-spline's knots in mm.
    components: vector length; 0 gives [*shape], else [*shape, components].
    extent: mm along each axis, of any number of axes.
  """
  counts = [int(np.ceil(length / knot)) + 4 for length in extent]
  coefficients = rng.standard_normal((*counts, components or 1)).astype(np.float32)
  for axis, (n, length, count) in enumerate(zip(shape, extent, counts, strict=True)):
    positions = (np.arange(n) + 0.5) * (length / n) / knot
    basis = spline_basis(positions, count)
    coefficients = np.moveaxis(np.tensordot(basis, coefficients, (1, axis)), 0, axis)
  # standard deviation of the spline along three axes, averaged over positions
  field = coefficients / 0.3315 ** (len(counts) / 3)
  return field if components else field[..., 0]


def _soft(distance, width=STEP):
  """Share of a voxel inside a surface, from the signed distance of its centre."""
  return np.clip(0.5 - distance / width, 0, 1)


def _stamp(canvas, centre, reach, distance):
  """Draws max(canvas, share inside) of one small object, given its signed-distance function."""
  bounds = [(max(int(c - reach), 0), min(int(c + reach) + 2, n))
            for c, n in zip(centre, canvas.shape, strict=True)]
  if any(low >= high for low, high in bounds):
    return
  x, y, z = ((np.arange(low, high, dtype=np.float32) - np.float32(c)) * STEP
             for (low, high), c in zip(bounds, centre, strict=True))
  window = canvas[tuple(slice(*b) for b in bounds)]
  np.maximum(window, _soft(distance(x[:, None, None], y[:, None], z)), out=window)


def _draw_blob(rng, canvas, centre, radius):
  """An ellipsoid of random half-axes whose product is radius^3."""
  stretch = np.exp(rng.normal(0, 0.2, 3))
  axes = radius * stretch / np.prod(stretch) ** (1 / 3)
  _stamp(canvas, centre, axes.max() / STEP + 1, lambda x, y, z: (
    np.sqrt((x / axes[0]) ** 2 + (y / axes[1]) ** 2 + (z / axes[2]) ** 2) - 1) * radius)


@functools.cache
def _cumulative(where):
  return np.cumsum(atlas().density[where].ravel(), dtype=np.float64)


def _draw_abnormalities(seed):
  """Coverage maps on the canvas, one a kind."""
  a, maps = atlas(), {}
  enhancing = np.zeros(a.gm.shape, np.float32)
  for name, ((least, rest), radii, where) in ABNORMAL.items():
    rng = stream(seed, name)
    maps[name] = np.zeros(a.gm.shape, np.float32)
    cumulative = _cumulative(where)
    for _ in range(least + rng.poisson(rest)):
      flat = np.searchsorted(cumulative, rng.random() * cumulative[-1])
      centre = np.array(np.unravel_index(flat, a.gm.shape), float)
      radius, shape_seed = rng.uniform(*radii), rng.integers(2**32)
      _draw_blob(np.random.default_rng(shape_seed), maps[name], centre, radius)
      if rng.random() < ENHANCING_SHARE and name == "lesion":
        _draw_blob(np.random.default_rng(shape_seed), enhancing, centre, radius)
  return {**maps, "enhancing": enhancing}


def _draw_vessels(seed):
  """Share of blood on the canvas: the large vessels with jittered courses, and small branches."""
  a, rng = atlas(), stream(seed, "vessels")
  canvas = np.zeros(a.gm.shape, np.float32)
  for radius, course in VESSELS:
    for side in (1, -1) if any(x > 0 for x, _, _ in course) else (1,):
      points = np.array(course, float) * (side, 1, 1)
      points[:, 1:] += rng.normal(0, 2.0, (len(points), 2))
      points[:, 0] += rng.normal(0, 1.0, len(points)) + 0.5 * side
      _draw_course(canvas, points, radius * np.exp(rng.normal(0, 0.15)), a.origin)
  for _ in range(14):  # cortical branches run along the surface of the brain
    start = rng.normal(0, 1, 3) * (1, 1, 0.7)
    turn = rng.normal(0, 0.5, 3)
    ways = start + np.linspace(0, 1, 6)[:, None] * turn
    ways = ways / np.linalg.norm(ways, axis=1, keepdims=True) * (66, 86, 72) + (0, -18, 8)
    _draw_course(canvas, ways, rng.uniform(0.7, 1.2), a.origin)
  return canvas


def _draw_course(canvas, points, radius, origin):
  lengths = np.r_[0, np.cumsum(np.linalg.norm(np.diff(points, axis=0), axis=1))]
  along = np.arange(0, lengths[-1], 1.5)
  for centre in np.stack([np.interp(along, lengths, p) for p in points.T], axis=1):
    _stamp(canvas, (centre - origin) / STEP, radius / STEP + 1.5,
           lambda x, y, z: np.sqrt(x**2 + y**2 + z**2) - radius)


def expected_coverage(name: str) -> np.ndarray:
  """Mean over subjects of an abnormality's coverage on the canvas (Campbell's theorem).

  The density of centres times mean count times mean volume, spread over the mean radius.
  """
  if name == "enhancing":
    return ENHANCING_SHARE * expected_coverage("lesion")
  (least, rest), (low, high), where = ABNORMAL[name]
  cube = (high**4 - low**4) / (4 * (high - low))  # mean of radius^3, uniform radius
  edge = (low + high) / 2 * STEP**2 / 4  # what the soft edge adds to a ball
  volume = (least + rest) * 4 / 3 * np.pi * (cube + edge)
  spread = ndimage.gaussian_filter(atlas().density[where], 0.45 * (low + high) / 2 / STEP)
  return np.clip(volume * spread, 0, 1)


_expected = functools.cache(expected_coverage)


def _pose(seed, shape):
  """MNI mm [3, x, y, z] of every voxel and the least Jacobian determinant of that map."""
  rng = stream(seed, "pose")
  angles = np.deg2rad(rng.normal(0, (5, 3, 4)).clip(-12, 12))
  scale = np.exp(rng.normal(0, 0.04, 3).clip(-0.09, 0.09))
  shift = rng.normal(0, (2.5, 3, 3)).clip(-7, 7)
  cx, cy, cz = np.cos(angles)
  sx, sy, sz = np.sin(angles)
  rotation = (np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
              @ np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
              @ np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]]))
  linear = (rotation * scale).astype(np.float32)
  centre = np.array([0, -18, 8])
  spacing = FIELD / shape
  world = [CORNER[k] + (np.arange(n) + 0.5) * spacing[k] - centre[k] - shift[k]
           for k, n in enumerate(shape)]
  x, y, z = np.meshgrid(*(w.astype(np.float32) for w in world), indexing="ij", sparse=True)
  bend = (4.0 * smooth_field(rng, shape, 45.0, 3) + 1.2 * smooth_field(rng, shape, 22.0, 3))
  while True:
    points = np.stack([linear[k, 0] * x + linear[k, 1] * y + linear[k, 2] * z + centre[k]
                       + bend[..., k] for k in range(3)])
    least = float(jacobian(points, spacing).min())
    if least > 0.2:
      return points, least
    bend *= 0.8  # folds are rare; a weaker bend of the same shape has none


def jacobian(points: np.ndarray, spacing) -> np.ndarray:
  """Determinant [x, y, z] of the map `points` [3, x, y, z] in mm on a grid of that spacing."""
  g = [np.gradient(p, *(float(s) for s in spacing)) for p in points]
  return (g[0][0] * (g[1][1] * g[2][2] - g[1][2] * g[2][1])
          - g[0][1] * (g[1][0] * g[2][2] - g[1][2] * g[2][0])
          + g[0][2] * (g[1][0] * g[2][1] - g[1][1] * g[2][0]))


def _smooth_minimum(a, b, blend):
  overlap = np.clip(blend - np.abs(a - b), 0, None) / blend
  return np.minimum(a, b) - overlap**2 * blend / 4


def anatomy(seed: int, shape: tuple[int, int, int]) -> Anatomy:
  """One random subject on a grid of `shape` voxels over FIELD; the same subject on every grid."""
  points, least = _pose(seed, shape)
  a, rng = atlas(), stream(seed, "head")
  thickness = {name: np.clip(mean * np.exp(spread * smooth_field(rng, shape, 55.0)), low, high)
               for name, mean, spread, low, high in (
                 ("csf", 1.4, 0.4, 0.5, 5), ("skull", 6.0, 0.25, 3, 11),
                 ("scalp", 6.0, 0.3, 3, 12), ("fat", 2.5, 0.4, 0.5, 6))}
  septa, mucosa = smooth_field(rng, shape, 9.0), smooth_field(rng, shape, 12.0)
  cavity = 1.2 * smooth_field(rng, shape, 20.0) + rng.normal(0, 1)
  folds = smooth_field(rng, shape, 7.0), smooth_field(rng, shape, 7.0)
  myelin, region = smooth_field(rng, shape, 30.0), smooth_field(rng, shape, 40.0)
  atrophy, swelling = rng.normal(0, 0.35), rng.normal(0, 1.0)

  voxels = (points - a.origin[:, None, None, None].astype(np.float32)) / STEP
  width = float(np.mean(FIELD / shape))

  def warp(values, at):
    return ndimage.map_coordinates(values, at, order=1, mode="nearest")

  hull = warp(a.hull, voxels) - thickness["csf"]
  surface = _smooth_minimum(hull - thickness["skull"] - thickness["scalp"],
                            warp(a.face, voxels), 10.0)
  inside = np.flatnonzero(surface < width)
  at = voxels.reshape(3, -1)[:, inside]

  def pick(field):
    return field.reshape(-1)[inside]

  hull, depth = pick(hull), -pick(surface)
  skull = pick(thickness["skull"])
  shares = {}
  head = _soft(-depth, width)
  cranium = _soft(hull, width)
  bone = np.clip(_soft(hull - skull, width) - cranium, 0, None) * head
  diploe = _soft(np.abs(hull - skull / 2) - (skull / 2 - 1.8), width)
  air = warp(a.air, at) + pick(cavity)
  outside = np.clip(head - cranium, 0, None)
  hollow = _soft(air, width) * outside
  shell = np.clip(_soft(air - 2.2, width) * outside - hollow, 0, None)
  soft = np.clip(outside - bone, 0, None)
  skin = _soft(depth - 1.8, width)
  fat = _soft(depth - 1.8 - pick(thickness["fat"]), width)
  orbit, globe = _soft(warp(a.orbit, at), width), _soft(warp(a.globe, at), width)
  deep = 1 / (1 + np.exp(-4 * (pick(septa) - 0.9)))  # fat between the muscles
  fatty = np.maximum(np.maximum(fat, deep), orbit)
  filled = _soft(1.5 - pick(mucosa), 0.5)  # a sinus here and there is swollen or full
  lining = np.clip(filled + _soft(-air - 1.2 - 0.3 * swelling, width), 0, 1)

  remain = 1 - hollow - shell
  shares["air"] = (1 - head) + hollow * (1 - lining)
  shares["mucosa"] = hollow * lining
  shares["bone"] = bone * (1 - diploe) * remain + shell
  shares["marrow"] = bone * diploe * remain
  rest = soft * remain
  shares["skin"] = rest * skin
  shares["eye"] = rest * (1 - skin) * globe
  shares["fat"] = rest * (1 - skin) * (1 - globe) * fatty
  shares["muscle"] = rest * (1 - skin) * (1 - globe) * (1 - fatty)
  shares.update(_brain_shares(warp(a.gm, at), warp(a.wm, at), cranium * head,
                              [pick(f) for f in folds], atrophy))
  total = sum(shares.values())
  blood = warp(_draw_vessels(seed), at) * (depth > 1.0)
  shares = {name: share / total * (1 - blood) for name, share in shares.items()}
  shares["blood"] = blood

  covers = {name: warp(m, at) * cranium * (1 - blood)
            for name, m in _draw_abnormalities(seed).items()}
  expected = {name: warp(_expected(name), at) * cranium for name in covers}
  brain_share = shares["gm"] + shares["wm"] + shares["csf"] + blood * cranium

  def full(values):
    volume = np.zeros(shape, bool)
    volume.reshape(-1)[inside] = values
    return volume

  return Anatomy(
    shape=tuple(shape), inside=inside, tissues=shares, abnormal=covers, expected=expected,
    detail=np.clip(-1.5 * warp(a.detail, at) + 0.04 * pick(myelin), -0.5, 0.5),
    region=pick(region), head=full(head > 0.5), brain=full(brain_share > 0.5), jacobian=least)


def _brain_shares(gm, wm, cranium, folds, atrophy):
  """Sharpens the average brain's probabilities into one subject's tissue shares.

  Random folds shift the borders by a millimetre or two, so that no two cortices are alike.
  """
  csf = np.clip(1 - gm - wm, 0, 1)
  scores = (3 * np.log(gm + 0.01) + 0.6 * folds[0], 3 * np.log(wm + 0.01) + 0.6 * folds[1],
            3 * np.log(csf + 0.01) + 0.6 + atrophy)
  top = np.maximum(np.maximum(*scores[:2]), scores[2])
  raised = [np.exp(s - top) for s in scores]
  total = cranium / sum(raised)
  return {name: r * total for name, r in zip(("gm", "wm", "csf"), raised, strict=True)}
