"""How well a stage's flow finds a known displacement, and how far its image is shifted as a whole.

The reference of a held-out volume is displaced in its slices by a known smooth field u, the same in
all of them; the flow phi from the synthetic image to it has to equal u, and to be zero without a
displacement. A generator and a registration network could also agree on a shift, which neither of
their losses sees: so the image is compared with the reference where that lies in the data set.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy import ndimage, optimize

from medsynth_jax.data.displacements import displaced, displacement
from medsynth_jax.errors import UserError
from medsynth_jax.layout import number
from medsynth_jax.metrics.summary import per_subject, summarise
from medsynth_jax.nets.warp import folding

GRADIENT = 0.05  # of the data range a voxel: 10 to 43 % of the simulated heads' body voxels
SMOOTH = 1.0  # voxels, SD of the Gaussian before a gradient or a shift is taken
RATIO, STILL, SHIFT = 0.5, 0.5, 0.5  # demands: error by the zero flow's, and voxels
FOLDED = 0.001  # share of voxels that is warned of
SLICES, FAR = 32, 8  # of a volume, by which its shift is estimated; voxels that are searched
UNITS = {"error": "mm", "zero_error": "mm", "still": "mm", "still_voxel": "voxel", "folded": "1",
         "used": "1", "shift": "voxel"}


def measure(truth: np.ndarray, image: np.ndarray, mask: np.ndarray, spacing, u: np.ndarray,
            flow: Callable[[np.ndarray], np.ndarray]) -> dict[str, float]:
  """The scores of one volume, named as in UNITS; NaN where no voxel or no contrast allows one.

  error, zero_error  mean |phi - u| and |u| over the voxels of the displaced body with gradient
  still, still_voxel mean |phi| without displacement, over those of the body as it is
  folded             share of the displaced body's voxels where p + phi(p) folds
  used               share of the displaced body's voxels that have gradient
  shift              length of `shift_of` the image

  Args:
    truth, image: [n, H, W, C] and [n, H, W] or [n, H, W, C] in model units.
    spacing: in mm along rows and columns.
    u: [H, W, 2] pixels.
    flow: (the target as shown, [n, H, W, C]) -> phi [n, H, W, 2] pixels.
  """
  shown = np.stack([displaced(x, u) for x in truth])
  body = np.stack([displaced(x.astype(np.float32), u, order=0, fill=0.0) > 0.5 for x in mask])
  phi, still = flow(shown), flow(truth)
  used, used_still = structured(_grey(shown), body), structured(_grey(truth), mask)
  return {
    "error": _length(phi - u, used, spacing), "still": _length(still, used_still, spacing),
    "still_voxel": _length(still, used_still, (1, 1)),
    "zero_error": _length(np.broadcast_to(u, phi.shape), used, spacing),
    "folded": float(folding(phi.astype(np.float32), body[..., None].astype(np.float32))),
    "used": float(used.sum() / body.sum()) if body.any() else float("nan"),
    "shift": float(np.linalg.norm(shift_of(_grey(image), _grey(truth), mask)))}


def known(shape, spacing, mm: float, seed: int, volume: int) -> np.ndarray:
  """The displacement [H, W, 2] in pixels of a volume: the same in each evaluation."""
  try:
    return displacement(shape, spacing, mm, np.random.default_rng([seed, volume]))
  except UserError as error:
    raise UserError(f"evaluation.displace={mm:g}: {error}") from None


def structured(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
  """Voxels [n, H, W] of the mask where a flow can be told: in-plane gradient above GRADIENT."""
  smooth = ndimage.gaussian_filter(image, (0, SMOOTH, SMOOTH))
  return mask & (np.hypot(*np.gradient(smooth, axis=(1, 2))) / 2 > GRADIENT)  # range 2: -1..1


def shift_of(image: np.ndarray, reference: np.ndarray, mask: np.ndarray) -> np.ndarray:
  """The in-plane translation s [2] in voxels of a volume; NaN for an image without contrast.

  The reference shows at p what the image shows at p + s, arrays [n, H, W]: largest normalised
  correlation, up to FAR voxels away, of the squared cosine between their gradients (Haber and
  Modersitzki, MICCAI 2006). Errors of contrast, which synthetic images have, hardly move it; least
  squares of intensities took the aligned lut2 image of a CT from a T1 to be 0.8 voxels off.
  """
  slices = np.flatnonzero(mask.any((1, 2)))
  if len(slices) > SLICES:
    slices = slices[np.linspace(0, len(slices) - 1, SLICES).astype(int)]
  mask = mask[slices]
  a, b = (_orientations(x[slices], mask) for x in (reference, image))
  if a is None or b is None:
    return np.full(2, np.nan)
  alike, energy = _spectrum(a * mask, b), _spectrum(mask[None], (b ** 2).sum(0)[None])
  far = np.minimum(FAR, np.array(mask.shape[1:]) // 2 - 1)
  places = [np.arange(-f, f + 1.0) for f in far]
  near = _at(alike, *places) / np.sqrt(_at(energy, *places))
  start = np.array(np.unravel_index(near.argmax(), near.shape)) - far
  def loss(s):
    return -float(_at(alike, s[:1], s[1:])[0, 0] / np.sqrt(_at(energy, s[:1], s[1:])[0, 0]))
  simplex = start + np.array([[0, 0], [0.3, 0], [0, 0.3]])
  return optimize.minimize(loss, start, method="Nelder-Mead", options={
    "initial_simplex": simplex, "xatol": 1e-3, "fatol": 1e-9 * near.max()}).x


def _spectrum(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  """The Fourier series [H, W] of s -> sum of a(p) b(p + s), arrays [c, n, H, W]."""
  a, b = (np.fft.fft2(x, axes=(-2, -1)) for x in (a, b))
  return (a.conj() * b).sum((0, 1)) / a[0, 0].size


def _at(spectrum: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
  """Its values [len(rows), len(columns)] at places in voxels, whole or between."""
  waves = [np.exp(2j * np.pi * np.outer(s, np.fft.fftfreq(n)))
           for s, n in zip((rows, columns), spectrum.shape, strict=True)]
  return (waves[0] @ spectrum @ waves[1].T).real


def _orientations(image: np.ndarray, mask: np.ndarray) -> np.ndarray | None:
  """Products [3, n, H, W] of an image's normalised gradient, whose dot product with another image's
  is the squared cosine; None without a gradient in the mask."""
  gradient = np.stack([ndimage.gaussian_filter(image.astype(np.float64), (0, SMOOTH, SMOOTH), order)
                       for order in ((0, 1, 0), (0, 0, 1))])
  length = np.linalg.norm(gradient, axis=0)
  typical = length[mask].mean() if mask.any() else 0.0
  if typical < 1e-6:
    return None
  rows, columns = gradient / np.hypot(length, typical)
  return np.stack([rows ** 2, columns ** 2, np.sqrt(2) * rows * columns])


def _grey(image: np.ndarray) -> np.ndarray:
  """[n, H, W], of colours their mean."""
  return image.mean(-1) if image.ndim == 4 else image


def _length(flow: np.ndarray, where: np.ndarray, spacing) -> float:
  """Mean length, by the spacing's unit, of a field [n, H, W, 2] in pixels, over some voxels."""
  lengths = np.linalg.norm(flow[where] * np.asarray(spacing), axis=-1)
  return float(lengths.mean()) if lengths.size else float("nan")


# --- over subjects ---------------------------------------------------------------------------


@dataclasses.dataclass
class Registration:
  """What was measured of a stage in one direction; `mm` is the displacement's mean length.

  Empty where nothing is measured: in 3-D.
  """
  mm: float
  volumes: list[tuple[str, dict[str, float]]] = dataclasses.field(default_factory=list)

  def add(self, subject: str, scores: dict[str, float]) -> None:
    """Adds a volume's `measure`."""
    self.volumes.append((subject, scores))

  def summary(self) -> dict[str, dict[str, Any]]:
    """{score: its summary over subjects}."""
    subjects = per_subject(self.volumes).values()
    return {name: summarise((s[name] for s in subjects), name, unit)
            for name, unit in UNITS.items()}

  def ratio(self) -> float | None:
    """The flow's error over the zero flow's, of their means over subjects."""
    error, zero = (self.summary()[name]["mean"] for name in ("error", "zero_error"))
    return error / zero if error is not None and zero else None

  def described(self) -> dict[str, Any]:
    """For summary.json."""
    if not self.volumes:
      return {"measured": False, "why": "3-D patches"}
    return {
      "measured": True, "displacement_mm": self.mm, "ratio": self.ratio(),
      "gradient_above": GRADIENT, "scores": self.summary(), "subjects": per_subject(self.volumes)}

  def lines(self, stage: str) -> list[str]:
    """What is printed."""
    if not self.volumes:
      return [f"Registration by {stage}: not measured, for this run works on 3-D patches."]
    scores, ratio = self.summary(), self.ratio()
    used = scores["used"]["mean"]
    def told(name):
      return _told(scores[name])
    found = [
      f"Registration by {stage} of the reference displaced in its slices by a known smooth field"
      f" (mean {self.mm:g} mm; n = {scores['error']['n']}), over body voxels with gradient (above"
      f" {GRADIENT:.0%} of the range a voxel, after smoothing by {SMOOTH:g} voxel:"
      f" {'-' if used is None else f'{used:.0%}'} of them):",
      f"  error of the flow {told('error')}, of the zero flow {told('zero_error')}; ratio"
      f" {_demanded(ratio, RATIO)}",
      f"  length of the flow without displacement: {told('still')}; in voxels"
      f" {_demanded(scores['still_voxel']['mean'], STILL)}",
      f"  folded (Jacobian determinant 0 or less): {scores['folded']['mean']:.3%} of body voxels",
      "  shift of the image against the reference where that lies in the data, in voxels (one"
      " translation a volume, by the directions of gradients):"
      f" {_demanded(scores['shift']['mean'], SHIFT)}"]
    if scores["folded"]["mean"] > FOLDED:
      found.append(f"  WARNING: the flow folds in more than {FOLDED:.1%} of the body, where no real"
                   " displacement does; raise the weight of its smoothness")
    return found


def _told(entry: dict[str, Any]) -> str:
  if entry["mean"] is None:
    return "-"
  sd = f" ± {number(entry['sd'])}" if entry["sd"] is not None else ""
  return f"{number(entry['mean'])}{sd} {entry['unit']}"


def _demanded(value: float | None, below: float) -> str:
  if value is None:
    return "-"
  return f"{number(value)} (below {below:g}: {'ok' if value < below else 'not ok'})"
