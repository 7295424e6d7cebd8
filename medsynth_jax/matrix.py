"""How well each modality is made from each other: a matrix of sources by targets, text and picture.

For runs with data.source=any. Incomplete cases leave each direction its own subjects; so a second
matrix has only the cases with every modality, on which directions can be compared.
"""

import dataclasses
import itertools
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medsynth_jax.data.examples import Task
from medsynth_jax.layout import aligned, number
from medsynth_jax.metrics import s3
from medsynth_jax.metrics.summary import higher_is_better
from medsynth_jax.results import Results
from medsynth_jax.scoring import ssim_name

BESIDE = ("lut2", "constant")  # the rows of the floor that stand in the matrix
WIDE = 4  # panels side by side
DIGITS = {"psnr": ".1f", "niqe": ".2f"}  # of the picture's numbers; else .3f
Cells = Mapping[tuple[str, str], tuple[float, int]]  # {(source, target): (mean, subjects)}


@dataclasses.dataclass(frozen=True)
class Matrix:
  """The scores of all directions.

  `stages` are those whose image does not hold the target, `scores` {metric: {row: cells}}, `common`
  the same of the `complete` cases; `alone` are cases without a second modality, `heading` says whom
  was scored.
  """
  names: tuple[str, ...]
  stages: tuple[str, ...]
  units: Mapping[str, str]
  scores: Mapping[str, Mapping[str, Cells]]
  common: Mapping[str, Mapping[str, Cells]]
  complete: tuple[str, ...]
  differ: bool
  alone: tuple[str, ...]
  heading: str

  @property
  def directions(self) -> list[tuple[str, str]]:
    """(source, target) of all that can be made."""
    return [(s, t) for s in self.names for t in self.names if s != t]

  @property
  def absent(self) -> list[str]:
    """The directions that nobody scores."""
    scored = {pair for rows in self.scores.values() for cells in rows.values() for pair in cells}
    return [f"{s}->{t}" for s, t in self.directions if (s, t) not in scored]

  def above(self, stage: str) -> dict[str, bool | None]:
    """{direction: whether the stage beats lut2 in PSNR and SSIM}; None where one is missing."""
    found = {}
    for pair in self.directions:
      both = [(rows[stage].get(pair), rows.get("lut2", {}).get(pair))
              for metric, rows in self.scores.items() if metric not in ("mae", *s3.METRICS)]
      if both[0][0] is not None:
        known = all(own and floor and not np.isnan(own[0] - floor[0]) for own, floor in both)
        found["->".join(pair)] = all(own[0] > floor[0] for own, floor in both) if known else None
    return found

  # --- text ----------------------------------------------------------------------------------

  def text(self) -> str:
    """What the table begins with."""
    blocks = [[self.heading], *self._grids(self.scores), [*map(self._verdict, self.stages)]]
    notes = []
    if self.absent:
      notes.append(f"Not scored, for no subject has both: {', '.join(self.absent)}.")
    if self.alone:
      notes.append(f"Not scored, for they have no second modality: {', '.join(self.alone)}.")
    if not self.complete:
      notes.append("No case has all modalities: each direction has its own subjects, and their"
                   " scores cannot be compared.")
    blocks.append(notes)
    if self.differ and self.complete:
      blocks += [[f"The same on common subjects: the {len(self.complete)} cases that have all"
                  " modalities."], *self._grids(self.common)]
    return "\n\n".join("\n".join(lines) for lines in blocks if lines)

  def _grids(self, scores) -> list[list[str]]:
    grids = []
    for metric, rows in scores.items():
      body = [[row if i == 0 else "", source, *(self._cell(cells, source, t) for t in self.names)]
              for row, cells in rows.items() for i, source in enumerate(self.names)]
      unit = self.units[metric]
      title = metric.upper() + (f" [{unit}]" if unit else "")
      grids.append([title, *aligned([["row", "source", *self.names], *body], left=2)])
    return grids

  def _cell(self, cells: Cells, source: str, target: str) -> str:
    if (source, target) not in cells:
      return "-"
    mean, n = cells[source, target]
    return f"{'-' if np.isnan(mean) else number(mean)} ({n})"

  def _verdict(self, stage: str) -> str:
    above = self.above(stage)
    parts = [f"{stage} above lut2 in PSNR and SSIM: in {sum(x is True for x in above.values())} of"
             f" {len(above)} directions"]
    for value, word in ((False, "not in"), (None, "cannot be said of")):
      names = [name for name, x in above.items() if x is value]
      parts += [f"{word} {', '.join(names)}"] if names else []
    return "; ".join(parts)

  def described(self) -> dict[str, Any]:
    """For summary.json."""
    def plain(scores):
      return {metric: {row: {f"{s}->{t}": {"mean": mean, "n": n} for (s, t), (mean, n)
                             in cells.items()} for row, cells in rows.items()}
              for metric, rows in scores.items()}
    return {
      "modalities": self.names, "units": self.units, "scores": plain(self.scores),
      "above_lut2": {stage: self.above(stage) for stage in self.stages},
      "directions_not_scored": self.absent, "cases_not_scored": self.alone,
      "common_cases": self.complete, "common": plain(self.common) if self.complete else None}

  # --- picture -------------------------------------------------------------------------------

  def draw(self, path: Path) -> None:
    """PSNR and SSIM of each stage, and under them how far they are above lut2; below these S3's
    metrics, if they were asked for."""
    from matplotlib.figure import Figure  # slow to import, and only evaluation draws

    by_s3 = [m for m in self.scores if m in s3.METRICS]
    lines = [[m for m in self.scores if m not in ("mae", *by_s3)],
             *(by_s3[i:i + WIDE] for i in range(0, len(by_s3), WIDE))]
    lines, wide = [*itertools.product(self.stages, lines)], max(map(len, lines))
    side = max(2.4, 0.95 * len(self.names))
    figure = Figure(figsize=(wide * (side + 1.6), 2 * len(lines) * (side + 0.9)),
                    layout="constrained")
    figure.suptitle(self.heading.replace(". ", ".\n"), fontsize=10)
    grid = figure.subplots(2 * len(lines), wide, squeeze=False)
    for i, (stage, metrics) in enumerate(lines):
      for metric, above, below in zip(metrics, grid[2 * i], grid[2 * i + 1], strict=False):
        rows = self.scores[metric]
        own, floor = rows[stage], rows.get("lut2", {})
        gain = {pair: (own[pair][0] - floor[pair][0], own[pair][1])
                for pair in own if pair in floor}
        self._panel(above, own, stage, metric)
        self._panel(below, gain, f"{stage} - lut2", metric, signed=True)
      for axes in grid[2 * i:2 * i + 2, len(metrics):].flat:
        axes.set_axis_off()
    figure.savefig(path, dpi=110)

  def _panel(self, axes, cells: Cells, name: str, metric: str, signed: bool = False) -> None:
    """One matrix in colours, its numbers and n in the cells; grey where nothing was scored.

    What is better is brighter, of differences bluer.
    """
    image = np.array([[cells.get((s, t), (np.nan,))[0] for t in self.names] for s in self.names])
    low, high = _limits(image[np.isfinite(image)], signed)
    turned = "" if higher_is_better(metric) else "_r"
    drawn = axes.imshow(image, cmap=("RdBu" if signed else "viridis") + turned, vmin=low, vmax=high)
    form = ("+" if signed else "") + DIGITS.get(metric.split("_")[0], ".3f")
    axes.set_facecolor("0.85")
    for i, source in enumerate(self.names):
      for j, target in enumerate(self.names):
        if (source, target) in cells:
          mean, n = cells[source, target]
          share = (mean - low) / (high - low) if np.isfinite(mean) else 0.5
          dark = abs(share - 0.5) > 0.35 if signed else (1 - share if turned else share) < 0.55
          axes.text(j, i, f"{mean:{form}}\nn = {n}" if n else "-", ha="center", va="center",
                    fontsize=9, color="white" if dark and n else "black")
        elif source != target:
          axes.text(j, i, "not\nscored", ha="center", va="center", fontsize=8, color="0.3")
    axes.set_xticks(range(len(self.names)), self.names)
    axes.set_yticks(range(len(self.names)), self.names)
    axes.set(xlabel="target", ylabel="source")
    axes.set_title(f"{name}: {_titled(metric)}", fontsize=10)
    axes.figure.colorbar(drawn, ax=axes, shrink=0.8).ax.tick_params(labelsize=8)


def _titled(metric: str) -> str:
  """ "PSNR [dB]", "NMAE_S3 (lower is better)"."""
  unit = " [dB]" if metric.startswith("psnr") else ""
  return metric.upper() + unit + ("" if higher_is_better(metric) else " (lower is better)")


def _limits(values: np.ndarray, signed: bool) -> tuple[float, float]:
  """The ends of the colour map; of differences they lie evenly about zero."""
  if signed:
    most = float(np.abs(values).max(initial=0.0)) or 1.0
    return -most, most
  low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 1.0)
  return (low, high) if high > low else (low - 0.5, low + 0.5)


# --- from the results of every source --------------------------------------------------------


def make(parts: Sequence[Results], task: Task, split: str) -> Matrix:
  """The matrix of an evaluation, from its parts: one a source, as `Run.views` has them."""
  first, names = parts[0], task.targets
  stages = [name for name, stage in first.stages.items() if not stage.bound]
  cases = {c.name: [m for m in names if m in c.images] for c in first.info.split(split)}
  complete = tuple(c for c, own in cases.items() if len(own) == len(names))
  scored = {c for p in parts for found in p.volumes.values() for *_, c in found}
  ssim = ssim_name(next(iter(first.protocols.values()))[0])
  unit = {t: p.scales[t].unit for p in parts for t in p.scales}
  groups = {u: [t for t in names if unit.get(t) == u] for u in unit.values()}
  mae = [u if len(groups) == 1 else f"{u} ({', '.join(own)})" for u, own in groups.items()]
  def scores(metrics, of=None):
    return {metric: {row: _cells(parts, row, metric, of) for row in (*stages, *BESIDE)}
            for metric in metrics}
  by_s3 = [metric for metric, rows in scores(s3.METRICS).items()  # small slices do not have all
           if any(n for cells in rows.values() for _, n in cells.values())]
  metrics = ("psnr", ssim, "mae", *by_s3)
  subjects = len({s for p in parts for found in p.volumes.values() for s, *_ in found})
  heading = (f"The matrix of all directions: {'simulated data, ' if first.info.simulated else ''}"
             f"{subjects} {split} subjects. Mean over subjects (number of subjects).")
  units = {"psnr": "dB", ssim: "", "mae": ", ".join(mae),
           **{m: "dB" if m == "psnr_s3" else "" for m in by_s3}}
  alone = tuple(c for c, own in cases.items() if len(own) < 2)
  return Matrix(names, tuple(stages), units, scores(metrics), scores(metrics, complete),
                complete, scored != set(complete), alone, heading)


def _cells(parts: Sequence[Results], row: str, metric: str, cases: Collection[str] | None) -> Cells:
  """A row's mean over subjects in every direction that has it; of some cases only, if named."""
  found = {}
  for part in parts:
    for target in part.scales:
      if (target, row) not in part.volumes or (metric in s3.METRICS and target not in part.s3):
        continue
      values = np.array([s[metric] for s in part.subjects(target, row, cases=cases).values()])
      values = values[~np.isnan(values)]
      if len(values) or cases is None:
        found[part.source, target] = (float(values.mean()) if len(values) else float("nan"),
                                      len(values))
  return found
