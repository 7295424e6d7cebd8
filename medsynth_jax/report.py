"""What an evaluation found, as per_subject.csv, summary.json and the printed table.

summary.json holds strict JSON: a number that cannot be computed is null, an infinite one (the PSNR
of two equal images) the string "inf".
"""

import csv
import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from medsynth_jax.data.dataset import Case, Info
from medsynth_jax.metrics.baselines import BLUR_MM
from medsynth_jax.metrics.summary import FEWEST, aggregate, per_subject
from medsynth_jax.metrics.volume import PAPERS
from medsynth_jax.scoring import Scale, roi_label, ssim_name

FLOOR = ("constant", "mean_image", "lut", "lut2", "identity", "identity_normalised")


@dataclasses.dataclass(frozen=True)
class Stage:
  """A stage's row: the step of its checkpoint, and whether it sees the target (a bound)."""
  step: int
  bound: bool


@dataclasses.dataclass
class Results:
  """Scores of every row of every direction, volume by volume.

  `floor` is the source channel that each target's look-up tables read.
  """
  config: ConfigDict
  info: Info
  source: str
  split: str
  which: str
  scales: Mapping[str, Scale]
  protocols: Mapping[str, Sequence[str]]
  stages: dict[str, Stage] = dataclasses.field(default_factory=dict)
  floor: dict[str, int] = dataclasses.field(default_factory=dict)
  volumes: dict[tuple[str, str], list] = dataclasses.field(default_factory=dict)
  _summaries: dict[str, dict] = dataclasses.field(default_factory=dict)

  def add(self, target: str, row: str, case: Case, scores: Mapping[str, float]) -> None:
    """Adds the scores of one volume."""
    self._summaries.pop(target, None)
    self.volumes.setdefault((target, row), []).append((case.subject, scores))

  def direction(self, target: str) -> str:
    """ "t1->t2"."""
    return f"{self.source}->{target}"

  def rows(self, target: str) -> list[str]:
    """The floor, then the stages in their order, then the ceiling."""
    order = (*FLOOR, *self.stages, "ceiling")
    return [row for row in order if (target, row) in self.volumes]

  def subjects(self, target: str, row: str) -> dict[str, dict[str, float]]:
    """{subject: {metric: mean over the subject's volumes}}."""
    return per_subject(self.volumes[target, row])

  def summary(self, target: str) -> dict[str, dict[str, Any]]:
    """{row: {metric: summary over subjects}}."""
    if target not in self._summaries:  # the bootstrap takes a while
      unit = self.scales[target].unit
      self._summaries[target] = {row: aggregate(self.subjects(target, row), unit)
                                 for row in self.rows(target)}
    return self._summaries[target]

  def count(self, target: str) -> int:
    """Number of subjects scored."""
    return len(self.subjects(target, self.rows(target)[0]))


# --- above the floor -------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Verdict:
  """Whether a row beats the floor in masked PSNR and SSIM; None where one cannot be computed.

  `best` is {metric: (row's mean, best floor row, that row's mean)}.
  """
  above: bool | None
  best: Mapping[str, tuple[float | None, str, float]]


def verdict(summary: Mapping[str, Mapping[str, Any]], row: str, ssim: str) -> Verdict:
  """Compares a row of `Results.summary` with the best floor row, metric by metric."""
  best, beaten = {}, []
  for metric in ("psnr", ssim):
    means = {r: summary[r][metric]["mean"] for r in FLOOR if r in summary}
    means = {r: mean for r, mean in means.items() if mean is not None}
    own = summary[row][metric]["mean"]
    if own is None or not means:
      beaten.append(None)
      continue
    top = max(means, key=means.get)
    best[metric] = (own, top, means[top])
    beaten.append(own > means[top])
  above = False if False in beaten else None if None in beaten else True
  return Verdict(above, best)


def verdicts(results: Results, target: str) -> dict[str, Verdict]:
  """{stage: verdict} of the stages that do not see the target."""
  summary, ssim = results.summary(target), ssim_name(results.protocols[target][0])
  return {stage: verdict(summary, stage, ssim) for stage, s in results.stages.items()
          if not s.bound}


# --- files -----------------------------------------------------------------------------------


def write(results: Results, folder: Path) -> None:
  """Writes per_subject.csv and summary.json."""
  lines = [{"direction": results.direction(t), "row": row, "subject": subject, **scores}
           for t in results.scales for row in results.rows(t)
           for subject, scores in results.subjects(t, row).items()]
  with open(folder / "per_subject.csv", "w", newline="") as file:
    writer = csv.DictWriter(file, list(dict.fromkeys(k for line in lines for k in line)))
    writer.writeheader()
    for line in lines:
      writer.writerow({k: "" if v != v else v for k, v in line.items()})
  text = json.dumps(_plain(described(results)), indent=1, allow_nan=False)
  (folder / "summary.json").write_text(text + "\n")


def described(results: Results) -> dict[str, Any]:
  """The content of summary.json."""
  info, targets = results.info, results.scales
  return {
    "config": results.config.to_dict(),
    "dataset": {"name": info.name, "hash": info.hash, "simulated": info.simulated},
    "n_subjects": len({s for v in results.volumes.values() for s, _ in v}),
    "protocol": {
      "split": results.split,
      "checkpoint": results.which,
      "steps": {name: stage.step for name, stage in results.stages.items()},
      "bounds": [name for name, stage in results.stages.items() if stage.bound],
      "region": "body mask, within the fields of view of source and target",
      "aggregation": "voxels pooled over a volume, mean of a subject's volumes, then subjects",
      "ssim_outside_mask": "background in reference and image",
      "targets": {t: _scaling(results, t) for t in targets}},
    "above_floor": {results.direction(t): {row: v.above for row, v in verdicts(results, t).items()}
                    for t in targets},
    "scores": {results.direction(t): results.summary(t) for t in targets}}


def _scaling(results: Results, target: str) -> dict[str, Any]:
  scale = results.scales[target]
  return {
    "unit": scale.unit, "data_range": scale.data_range, "clip": scale.clip,
    "reference": "its own volume's target scaling, not clipped" if scale.own else "physical",
    "output": dataclasses.asdict(scale.output), "background": scale.background,
    "ssim": list(results.protocols[target]), "lut_channel": results.floor.get(target),
    "lut2_blur_mm": BLUR_MM}


def _plain(value):
  """The value with tuples as lists, NaN as None and infinities as strings, for strict JSON."""
  if isinstance(value, Mapping):
    return {k: _plain(v) for k, v in value.items()}
  if isinstance(value, (list, tuple)):
    return [_plain(v) for v in value]
  if isinstance(value, float) and not math.isfinite(value):
    return None if math.isnan(value) else str(value)
  return value


# --- the table -------------------------------------------------------------------------------


def table(results: Results) -> str:
  """The printed tables, one a direction, with what was measured and how."""
  return "\n\n".join(_direction(results, t) for t in results.scales)


def _direction(results: Results, target: str) -> str:
  scale, protocols = results.scales[target], results.protocols[target]
  summary = results.summary(target)
  ssims = [ssim_name(p) for p in protocols]
  main = ["psnr", *ssims, "mae", "mse", "nmae"]
  regions = [f"{m}_{roi_label(r)}" for r in results.info.rois for m in ("mae", "psnr")]
  papers = [m for p in PAPERS for m in next(iter(summary.values())) if m.endswith(f"_{p}")]
  lines = [_title(results, target), "", *_grid(results, summary, main, spread=True)]
  regions = [m for m in regions if any(s.get(m, {}).get("n") for s in summary.values())]
  if regions:
    lines += ["", "In regions:", *_grid(results, summary, regions)]
  lines += ["", "By the papers' own conventions, means of whole slices with background outside"
            " the body (for their tables only; s2 doubles the peak: +48.13 dB):",
            *_grid(results, summary, papers)]
  lines += ["", *_caption(results, target, scale, protocols)]
  return "\n".join([*lines, "", *_verdict_lines(results, target)])


def _title(results: Results, target: str) -> str:
  n = results.count(target)
  split = {"test": "test subjects", "train": "TRAINING subjects (the networks have seen them)",
           "validation": "VALIDATION subjects (they chose the checkpoint)"}[results.split]
  simulated = "simulated data, " if results.info.simulated else ""
  return f"{results.direction(target)}: {simulated}n = {n} {split}"


def _grid(results: Results, summary, metrics: Sequence[str], spread: bool = False) -> list[str]:
  """Aligned lines: a heading with units, then a line a row; mean, with `spread` also the SD."""
  first = next(iter(summary.values()))
  heads = [[""], ["row"]]
  for metric in metrics:
    unit = first[metric]["unit"]
    heads[0].append(metric)
    heads[1].append("" if unit == "1" else unit)
  body = [[_label(results, row), *(_cell(s.get(m), spread) for m in metrics)]
          for row, s in summary.items()]
  return _aligned([*heads, *body])


def _label(results: Results, row: str) -> str:
  stage = results.stages.get(row)
  if stage and stage.bound:
    return f"{row} (bound: sees the target)"
  return f"{row} (bound: noise-free)" if row == "ceiling" else row


def _cell(entry: Mapping[str, Any] | None, spread: bool) -> str:
  if not entry or entry["mean"] is None:
    return "-"
  sd = f" ± {_number(entry['sd'])}" if spread and entry["sd"] is not None else ""
  return _number(entry["mean"]) + sd


def _number(x: float) -> str:
  return f"{x:.2f}" if abs(x) >= 10 else f"{x:.3f}" if abs(x) >= 0.01 or x == 0 else f"{x:.2g}"


def _aligned(cells: Sequence[Sequence[str]]) -> list[str]:
  widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
  return ["  ".join([line[0].ljust(widths[0])]
                    + [c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True)]).rstrip()
          for line in cells]


def _caption(results: Results, target: str, scale: Scale, protocols: Iterable[str]) -> list[str]:
  steps = ", ".join(f"{name} at step {s.step}" for name, s in results.stages.items())
  reference = (" of each volume's own scaling (not clipped, never fitted to the image)"
               if scale.own else f", clipped to {scale.clip[0]:g}..{scale.clip[1]:g}"
               if scale.clip else "")
  lines = [
    "Mean ± SD over subjects; voxels of a volume pooled over its body mask.",
    f"Unit: {scale.unit}{reference}; PSNR and SSIM range {scale.data_range:g}.",
    f"SSIM: {', '.join(protocols)}; outside the mask both images are set to background first,"
    " in every row.",
    f"Checkpoints ({results.which}): {steps or 'none'}."]
  if results.count(target) < FEWEST:
    lines.append(f"Fewer than {FEWEST} subjects: no confidence interval.")
  return lines


def _verdict_lines(results: Results, target: str) -> list[str]:
  lines = []
  for stage, found in verdicts(results, target).items():
    word = {True: "yes", False: "no", None: "cannot be said (no PSNR or no SSIM)"}[found.above]
    parts = [f"{m.upper()} {_number(own)} vs {_number(top)} of {row}"
             for m, (own, row, top) in found.best.items()]
    lines.append(f"{stage} above the floor: {word}" + (f" ({', '.join(parts)})" if parts else ""))
  return lines
