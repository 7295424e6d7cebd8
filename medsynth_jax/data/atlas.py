"""The average head on a canvas: the brain of ICBM 2009a, and a skull, face and sinuses around it.

The brain's maps are measured (assets/NOTICE); everything outside it is invented geometry.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from importlib import resources

import numpy as np
from scipy import ndimage

STEP = 2.0  # mm, voxel of the canvas on which anatomy is drawn
PADDING = ((12, 12), (6, 16), (8, 13))  # canvas voxels around the excerpt: room for the head

# Air spaces: centre and radii in MNI mm, right side (mirrored where x > 0).
CAVITIES = (
  ((10, 80, -13), (9, 4.5, 10)),  # frontal sinus
  ((0, 54, -38), (13, 16, 8)),  # ethmoid cells
  ((27, 48, -63), (12, 15, 14)),  # maxillary sinus
  ((6, 64, -58), (4, 24, 15)),  # nasal cavity
  ((0, 14, -76), (9, 8, 26)),  # pharynx
  ((58, -36, -46), (6, 9, 11)),  # mastoid cells
)
GLOBE = ((33, 62, -40), (12, 12, 12))
ORBIT = ((31, 54, -40), (17, 26, 16))



@dataclass(frozen=True)
class Atlas:
  """Static maps on the canvas, float32 [x, y, z]; distances in mm, negative inside."""

  gm: np.ndarray
  wm: np.ndarray
  hull: np.ndarray  # inner surface of the skull, before its random offset
  face: np.ndarray
  air: np.ndarray
  globe: np.ndarray
  orbit: np.ndarray
  detail: np.ndarray  # relative deviation of the T1 template from its tissues' means
  density: dict[str, np.ndarray]  # where abnormalities arise, integrates to 1 over mm^3
  origin: np.ndarray  # MNI mm of voxel (0, 0, 0)


def _ellipsoid(points, centre, radii, mirror=True):
  """Rough signed distance in mm to an ellipsoid, to the pair of them where its centre has x > 0."""
  x, y, z = points
  x = np.abs(x) if mirror and centre[0] > 0 else x
  scaled = np.sqrt(sum(((p - c) / r) ** 2
                       for p, c, r in zip((x, y, z), centre, radii, strict=True)))
  return ((scaled - 1) * min(radii)).astype(np.float32)


def _signed_distance(mask):
  outside = ndimage.distance_transform_edt(~mask, sampling=STEP)
  return (outside - ndimage.distance_transform_edt(mask, sampling=STEP)).astype(np.float32)


def _hull(brain, points):
  """Signed distance to the closed, smoothed outline of brain and spinal canal."""
  x, y, z = points
  canal = (np.hypot(x, y + 46) < 11) & (z < -60)
  filled = ndimage.distance_transform_edt(~(brain | canal), sampling=STEP) <= 7
  closed = ndimage.distance_transform_edt(filled, sampling=STEP) > 7
  return ndimage.gaussian_filter(_signed_distance(closed | brain | canal), 1.0)


def _detail(t1, gm, wm, brain):
  """Relative deviation of the T1 template from the mix of its tissues' means, smoothed a little."""
  shares = np.stack([gm[brain], wm[brain], 1 - gm[brain] - wm[brain]], axis=1)
  means = np.linalg.lstsq(shares, t1[brain], rcond=None)[0]
  deviation = np.zeros_like(t1)
  deviation[brain] = np.clip(t1[brain] / (shares @ means) - 1, -0.25, 0.25)
  return deviation


@functools.cache
def atlas() -> Atlas:
  """Reads the excerpt and draws the head around it (about a second, once a process)."""
  source = resources.files("medsynth_jax.data").joinpath("assets/icbm152_2mm.npz")
  with source.open("rb") as file, np.load(file) as stored:
    t1, gm, wm, brain = (np.pad(stored[name], PADDING).astype(np.float32) / 255
                         for name in ("t1", "gm", "wm", "brain"))
    origin = stored["affine"][:3, 3] - STEP * np.array([before for before, _ in PADDING])
  points = [c.astype(np.float32) for c in np.meshgrid(
    *(o + STEP * np.arange(n) for o, n in zip(origin, t1.shape, strict=True)),
    indexing="ij", sparse=True)]
  x, y, z = points
  cord = np.clip((6 - np.hypot(x, y + 46)) / STEP + 0.5, 0, 1) * np.clip(-z / 2 - 34.5, 0, 1)
  solid = brain > 0.5
  neck = np.maximum((np.hypot(x / 56, (y + 22) / 62) - 1) * 56, z + 45)
  face = np.minimum(_ellipsoid(points, (0, 34, -52), (64, 64, 60)),
                    _ellipsoid(points, (0, 96, -52), (13, 14, 18)))
  white = ndimage.gaussian_filter(wm**2, 1.5) * (z > -30)
  ventricle = ndimage.gaussian_filter(
    np.clip(1 - gm - wm, 0, 1) * ndimage.binary_erosion(solid, iterations=8), 4.0)
  density = {"white": white * (0.15 + ventricle / ventricle.max()),
             "brain": ndimage.gaussian_filter(gm + wm, 2.0) ** 4 * (z > -40)}
  return Atlas(
    gm=gm, wm=np.maximum(wm, cord).astype(np.float32), hull=_hull(solid, points),
    face=np.minimum(face, neck).astype(np.float32),
    air=functools.reduce(np.minimum, (_ellipsoid(points, *cavity) for cavity in CAVITIES)),
    globe=_ellipsoid(points, *GLOBE), orbit=_ellipsoid(points, *ORBIT),
    detail=_detail(t1, gm, wm, solid), origin=origin,
    density={name: (d / (d.sum() * STEP**3)).astype(np.float32) for name, d in density.items()})
