"""Pictures of an evaluation: source, target, synthetic image and error of a subject.

Slices are shown as radiologists look at them: the patient's right on the left, anterior (axial)
or superior (coronal, sagittal) on top.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from medsynth_jax.data.dataset import Case, Info
from medsynth_jax.metrics.summary import ranked


@dataclasses.dataclass(frozen=True)
class Picture:
  """One slice of a volume as stored, [H, W] each (a fusion [H, W, 3]), and the volume's scores.

  `aspect` is a displayed pixel's height over its width; `sources` are {title: physical values}.
  """
  subject: str
  case: str
  number: int
  sources: Mapping[str, np.ndarray]
  target: np.ndarray
  synthetic: np.ndarray
  mask: np.ndarray
  aspect: float
  psnr: float
  ssim: float


def take(info: Info, case: Case, sources: Mapping[str, np.ndarray], target: np.ndarray,
         synthetic: np.ndarray, mask: np.ndarray, psnr: float, ssim: float) -> Picture:
  """The slice of a volume with the largest mask (the middle one of several).

  Arrays [n, H, W], a fusion [n, H, W, 3]; `sources` in physical units.
  """
  sizes = mask.sum((1, 2))
  largest = np.flatnonzero(sizes == sizes.max())
  k = int(largest[len(largest) // 2])
  _, rows, columns = info.spacing_of(case)
  titles = {f"{m} [{info.modality(m).unit}]": x[k] for m, x in sources.items()}
  return Picture(case.subject, case.name, k, titles, target[k], synthetic[k], mask[k],
                 columns / rows, psnr, ssim)


def radiological(image: np.ndarray) -> np.ndarray:
  """A RAS+ slice (axial [x, y], coronal [x, z], sagittal [y, z]) as rows from top to bottom.

  Colours [..., 3] stay where they are.
  """
  return np.swapaxes(image[::-1, ::-1], 0, 1)


def chosen(pictures: Sequence[Picture], subjects: Mapping[str, Mapping[str, float]],
           count: int) -> dict[str, Picture]:
  """{"median": picture, "worst": ..., "best": ...}, the first `count`, by the subjects' PSNR.

  Of a subject with several sessions, the session with the lowest PSNR. One subject alone is
  "median".
  """
  order = ranked(subjects, "psnr")
  places = {"median": len(order) // 2, "worst": len(order) - 1, "best": 0}
  found: dict[str, Picture] = {}
  for name, place in list(places.items())[:count]:
    own = [p for p in pictures if p.subject == order[place]]
    picture = min(own, key=lambda p: p.psnr)
    if not any(picture is p for p in found.values()):
      found[name] = picture
  return found


def write(folder: Path, pictures: Sequence[Picture],
          subjects: Mapping[str, Mapping[str, float]], *, row: str, direction: str, unit: str,
          simulated: bool, count: int) -> None:
  """Writes <direction>_<row>_<median|worst>.png. `unit` is that of target and synthetic image."""
  for place, picture in chosen(pictures, subjects, count).items():
    title = (f"{'simulated data, ' if simulated else ''}{direction}, {row}: {place} subject"
             f" {picture.case}, slice {picture.number}; PSNR {picture.psnr:.2f} dB,"
             f" SSIM {picture.ssim:.3f}")
    name = re.sub(r"[^\w.+-]+", "_", f"{direction.replace('->', '_to_')}_{row}_{place}")
    draw(folder / f"{name}.png", picture, title, unit)


def draw(path: Path, picture: Picture, title: str, unit: str) -> None:
  """One picture: sources, target, synthetic image and error.

  Target and synthetic image share their grey scale, and the error is synthetic minus target; of
  colours it is the absolute difference, mean over channels.
  """
  from matplotlib.figure import Figure  # slow to import, and only evaluation draws

  shown = [(name, x, window(x), "gray") for name, x in picture.sources.items()]
  shown += _colours(picture) if picture.target.ndim == 3 else _greys(picture, unit)
  first = radiological(picture.target)
  height = 3.2 * np.clip(first.shape[0] * picture.aspect / first.shape[1], 0.4, 2.0) + 0.8
  figure = Figure(figsize=(3.6 * len(shown), height), layout="constrained")
  figure.suptitle(title, fontsize=10)
  for axes, (name, image, (a, b), colours) in zip(
      figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
    drawn = axes.imshow(radiological(image), cmap=colours, vmin=a, vmax=b, aspect=picture.aspect,
                        interpolation="nearest")
    axes.set_title(name, fontsize=9)
    axes.set_axis_off()
    if image.ndim == 2:
      figure.colorbar(drawn, ax=axes, shrink=0.8).ax.tick_params(labelsize=7)
  figure.savefig(path, dpi=110)


def _greys(picture: Picture, unit: str) -> list[tuple]:
  """(title, image, limits, colour map) of target, synthetic image and signed error."""
  levels = window(picture.target[picture.mask] if picture.mask.any() else picture.target)
  error = np.where(picture.mask, picture.synthetic - picture.target, 0)
  limit = _limit(error, picture.mask)
  return [(f"target [{unit}]", picture.target, levels, "gray"),
          (f"synthetic [{unit}]", picture.synthetic, levels, "gray"),
          (f"synthetic - target [{unit}]", error, (-limit, limit), "RdBu_r")]


def _colours(picture: Picture) -> list[tuple]:
  """The same of colour images in 0..1."""
  error = np.where(picture.mask, np.abs(picture.synthetic - picture.target).mean(-1), 0)
  limit = _limit(error, picture.mask)
  return [("target", picture.target, (0, 1), None), ("synthetic", picture.synthetic, (0, 1), None),
          ("|synthetic - target|, mean of channels", error, (0, limit), "magma")]


def _limit(error: np.ndarray, mask: np.ndarray) -> float:
  """The error that the colour map ends at: the 99th percentile."""
  return (float(np.percentile(np.abs(error[mask]), 99)) if mask.any() else 0.0) or 1.0


def window(values: np.ndarray) -> tuple[float, float]:
  """Grey levels from black to white: the 0.5 and 99.5 percentiles."""
  low, high = (float(x) for x in np.percentile(values, (0.5, 99.5)))
  return (low, high) if high > low else (low, low + 1.0)
