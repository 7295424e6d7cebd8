"""What an evaluation found: scores by row and direction, verdicts, per_subject.csv, summary.json.

An evaluation has a part for each source, one in all runs but those with data.source=any.

summary.json holds strict JSON: a number that cannot be computed is null, an infinite one (the PSNR
of two equal images) the string "inf".
"""

import csv
import dataclasses
import json
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from medsynth_jax.code_switch import Switch
from medsynth_jax.data.dataset import Case, Info
from medsynth_jax.metrics import niqe, uptake
from medsynth_jax.metrics.baselines import BLUR_MM
from medsynth_jax.metrics.lumen import REACH
from medsynth_jax.metrics.summary import aggregate, per_subject
from medsynth_jax.registered import Registration
from medsynth_jax.s3_scorer import S3Scorer
from medsynth_jax.scoring import Scale, ssim_name
from medsynth_jax.timing import Speed

FLOOR = ("constant", "mean_image", "lut", "lut2", "identity", "identity_normalised")
SLICE_METRICS = ("psnr", "ssim", "mae", "mse")  # S0's, correlated with uptake


@dataclasses.dataclass(frozen=True)
class Stage:
  """A stage's row: the step of its checkpoint, whether it sees the target (a bound), the number of
  samples whose mean is scored, what its readers have to know, and its speed."""
  step: int
  bound: bool
  samples: int
  note: str
  speed: Speed


@dataclasses.dataclass
class Results:
  """Scores of every row of every direction, volume by volume.

  A direction is named by its target; `rendered` says that "fusion" was rendered from synthetic PET,
  `lumen` is the region and the HU of vessels. `floor` is the source channel that each target's
  look-up tables read, `volumes` are (subject, group, scores, case), `slices` {subject: {metric:
  values of its slices}}, `training` (steps, seconds).
  """
  config: ConfigDict
  info: Info
  source: str
  split: str
  which: str
  scales: Mapping[str, Scale]
  protocols: Mapping[str, Sequence[str]]
  rendered: bool = False
  lumen: tuple[str, float] | None = None
  s3: Mapping[str, S3Scorer] = dataclasses.field(default_factory=dict)
  stages: dict[str, Stage] = dataclasses.field(default_factory=dict)
  floor: dict[str, int | list[int] | None] = dataclasses.field(default_factory=dict)
  volumes: dict[tuple[str, str], list] = dataclasses.field(default_factory=dict)
  slices: dict[tuple[str, str], dict] = dataclasses.field(default_factory=dict)
  switches: dict[str, Switch] = dataclasses.field(default_factory=dict)
  registrations: dict[tuple[str, str], Registration] = dataclasses.field(default_factory=dict)
  training: dict[str, tuple[int, float]] = dataclasses.field(default_factory=dict)
  _summaries: dict[str, dict] = dataclasses.field(default_factory=dict)

  def add(self, target: str, row: str, case: Case, scores: Mapping[str, float]) -> None:
    """Adds the scores of one volume."""
    self._summaries.pop(target, None)
    self.volumes.setdefault((target, row), []).append(
      (case.subject, case.group, scores, case.name))

  def add_slices(self, target: str, row: str, case: Case,
                 scores: Mapping[str, np.ndarray]) -> None:
    """Adds what one volume's slices scored and took up; too small ones are left out."""
    found = self.slices.setdefault((target, row), {}).setdefault(case.subject, {})
    large = scores["voxels"] >= uptake.LEAST
    for name in (*SLICE_METRICS, *uptake.UPTAKES):
      found.setdefault(name, []).extend(scores[name][large])

  def direction(self, target: str) -> str:
    """ "t1->t2"."""
    return f"{self.source}->{target}"

  def rows(self, target: str) -> list[str]:
    """The floor, then the stages in their order, then the ceiling."""
    order = (*FLOOR, *self.stages, "ceiling")
    return [row for row in order if (target, row) in self.volumes]

  def subjects(self, target: str, row: str, group: str | None = None,
               cases: Collection[str] | None = None) -> dict[str, dict[str, float]]:
    """{subject: {metric: mean over the subject's volumes}}; of a group or of cases, if named."""
    return per_subject((subject, scores) for subject, of, scores, case in self.volumes[target, row]
                       if group in (None, of) and (cases is None or case in cases))

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

  def groups(self, subject: str | None = None) -> list[str]:
    """The groups (scanners) of all volumes, or of a subject's."""
    return sorted({group for found in self.volumes.values() for name, group, *_ in found
                   if subject in (None, name)})

  def by_group(self, target: str) -> dict[str, dict[str, dict[str, Any]]]:
    """{row: {group: {metric: summary}}} of lut2 and the stages; nothing where all are alike."""
    if len(self.groups()) < 2:
      return {}
    metrics, unit = ("psnr", ssim_name(self.protocols[target][0]), "mae"), self.scales[target].unit
    def cell(row, group):
      subjects = self.subjects(target, row, group)
      return aggregate({s: {m: x[m] for m in metrics} for s, x in subjects.items()}, unit)
    found = {row: {g: cell(row, g) for g in self.groups()} for row in self.rows(target)
             if row == "lut2" or row in self.stages}
    return {row: {g: c for g, c in cells.items() if c} for row, cells in found.items()}

  def correlations(self, target: str) -> dict[str, dict]:
    """{stage: `uptake.correlations` of its slices}, without bounds; {} where no uptake is shown."""
    return {row: uptake.correlations(self.slices[target, row], SLICE_METRICS)
            for row, stage in self.stages.items()
            if (target, row) in self.slices and not stage.bound}

  def registered(self, target: str) -> dict[str, Registration]:
    """{stage: what was measured of its flow}."""
    return {stage: found for (of, stage), found in self.registrations.items() if of == target}

  def not_told(self, target: str) -> tuple[list[str], list[str]]:
    """Subjects of a PET target (without a voxel above `uptake.HOT`, with no other voxel)."""
    subjects = self.subjects(target, self.rows(target)[0])
    cold = [s for s, scores in subjects.items() if math.isnan(scores["mae_hot"])]
    hot = [s for s, scores in subjects.items() if math.isnan(scores["auc_hot"]) and s not in cold]
    return cold, hot


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


def write(parts: Sequence[Results], folder: Path, more: Mapping[str, Any]) -> None:
  """Writes per_subject.csv and summary.json, with `more` in it."""
  grouped = len({group for p in parts for group in p.groups()}) > 1
  lines = [{"direction": p.direction(t), "row": row, "subject": subject,
            **({"group": "+".join(p.groups(subject))} if grouped else {}), **scores}
           for p in parts for t in p.scales for row in p.rows(t)
           for subject, scores in p.subjects(t, row).items()]
  with open(folder / "per_subject.csv", "w", newline="") as file:
    writer = csv.DictWriter(file, list(dict.fromkeys(k for line in lines for k in line)))
    writer.writeheader()
    for line in lines:
      writer.writerow({k: "" if v != v else v for k, v in line.items()})
  for target, found in {t: x for p in parts for t, x in p.s3.items()}.items():
    if found.model:
      niqe.save(found.model, folder / f"niqe_{target}.npz")
  text = json.dumps(_plain({**described(parts), **more}), indent=1, allow_nan=False)
  (folder / "summary.json").write_text(text + "\n")


def described(parts: Sequence[Results]) -> dict[str, Any]:
  """The content of summary.json; of several sources, what goes by target goes by direction."""
  first, several = parts[0], len(parts) > 1
  info, stages = first.info, first.stages
  each = [(p, t, p.direction(t)) for p in parts for t in p.scales]
  found = {
    "config": first.config.to_dict(),
    "dataset": {"name": info.name, "hash": info.hash, "simulated": info.simulated},
    "n_subjects": len({s for p in parts for v in p.volumes.values() for s, *_ in v}),
    "protocol": {
      "split": first.split,
      "checkpoint": first.which,
      "steps": {name: stage.step for name, stage in stages.items()},
      "bounds": [name for name, stage in stages.items() if stage.bound],
      "notes": {name: stage.note for name, stage in stages.items() if stage.note},
      "region": "body mask, within the fields of view of source and target",
      "aggregation": "voxels pooled over a volume, mean of a subject's volumes, then subjects",
      "ssim_outside_mask": "background in reference and image",
      "targets": {name if several else t: _scaling(p, t) for p, t, name in each}},
    "above_floor": {name: {row: v.above for row, v in verdicts(p, t).items()}
                    for p, t, name in each},
    "scores": {name: p.summary(t) for p, t, name in each},
    "speed": {name: _speed(stage) for name, stage in stages.items()},
    "training": {name: {"steps": steps, "seconds": seconds}
                 for name, (steps, seconds) in first.training.items()}}
  for name, of in (("by_group", Results.by_group), ("uptake_correlation", Results.correlations)):
    of_each = {direction: of(p, t) for p, t, direction in each}
    of_each = {direction: part for direction, part in of_each.items() if part}
    found |= {name: of_each} if of_each else {}
  if any(p.registrations for p in parts):
    found["registration"] = {
      direction: {stage: r.described() for stage, r in p.registered(t).items()}
      for p, t, direction in each if p.registered(t)}
  switches = {p.source: {stage: s.described() for stage, s in p.switches.items()} for p in parts}
  if any(switches.values()):
    found["code_switch"] = switches if several else switches[first.source]
  return found


def _scaling(results: Results, target: str) -> dict[str, Any]:
  scale = results.scales[target]
  reference = "physical"
  if scale.own:
    reference = "its own volume's target scaling, not clipped"
  elif scale.colour:
    reference = "the source MR in grey, by its own volume, under the measured SUV in colour"
  found = {
    "unit": scale.unit, "data_range": scale.data_range, "clip": scale.clip,
    "reference": reference, "output": dataclasses.asdict(scale.output),
    "background": scale.background, "ssim": list(results.protocols[target]),
    "lut_channel": results.floor.get(target), "lut2_blur_mm": BLUR_MM}
  if scale.colour:
    found |= {"made": "rendered from the synthetic SUV" if results.rendered else "learned",
              "correlated_slices": f"{uptake.LEAST} mask voxels or more"}
  if target in results.s3:
    found["s3"] = results.s3[target].described(results.source)
  if results.lumen and scale.unit == "HU":
    found["lumen"] = {"region": results.lumen[0], "above_hu": results.lumen[1],
                      "within_voxels": REACH}
  if scale.uptake:
    cold, hot = results.not_told(target)
    found |= {"hot_suv": uptake.HOT, "subjects_without_hot_voxels": cold,
              "subjects_hot_throughout": hot}
  return found


def _speed(stage: Stage) -> dict[str, Any]:
  speed = stage.speed
  return {"seconds_per_window": speed.window, "seconds_per_volume": speed.volume,
          "samples": stage.samples, "compile_seconds": speed.compiling}


def _plain(value):
  """The value with tuples as lists, NaN as None and infinities as strings, for strict JSON."""
  if isinstance(value, Mapping):
    return {k: _plain(v) for k, v in value.items()}
  if isinstance(value, (list, tuple)):
    return [_plain(v) for v in value]
  if isinstance(value, float) and not math.isfinite(value):
    return None if math.isnan(value) else str(value)
  return value
