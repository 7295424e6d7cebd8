"""Scores of a run on held-out subjects, beside the floor that it must beat.

python -m medsynth_jax.evaluate --workdir=RUN [--data=DATA] [--checkpoint=latest] [--split=test]

Writes RUN/evaluation/: per_subject.csv, summary.json, table.txt, panels/*.png. RUN is not changed
otherwise; another split goes to RUN/evaluation_<split>/.
"""

import dataclasses
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from tqdm import tqdm

from medsynth_jax import config as configs
from medsynth_jax import floors, panels, report, run, scoring, sharding, windows
from medsynth_jax.data.dataset import CEILING, SPLITS, Case, Store
from medsynth_jax.data.examples import case_source, case_valid, usable
from medsynth_jax.data.intensities import to_model
from medsynth_jax.errors import UserError
from medsynth_jax.report import Results
from medsynth_jax.run import Run


def evaluate(here: Run, store: Store, *, which: str = "best", split: str = "test") -> str:
  """Scores every stage that makes images on the subjects of a split; returns the printed table.

  In a run of several processes all call this, and process 0 writes.

  Args:
    store: the data set that the run was trained on.
    which: the checkpoints, "best" (by validation) or "latest".

  Raises:
    UserError: another data set, no subject with both sides, an empty mask, no checkpoint.
  """
  _same_data(here, store)
  targets = scored_cases(here, split)
  scorer = _Scorer(here, store, targets)
  results = Results(here.config, here.info, here.task.direction, split, which,
                    {t: scorer.scales[t] for t in targets},
                    {t: scorer.protocols[t] for t in targets})
  for target, cases in targets.items():
    results.floor[target] = _baselines(scorer, target, cases, results)
  stages = [s for s, m in here.methods.items() if m.synthesize]
  total = sum(_windows(here, c) for cases in targets.values() for c in cases) * len(stages)
  with tqdm(total=total, desc="evaluate", unit="image", disable=not sharding.is_first()) as bar:
    for stage in stages:
      _stage(scorer, stage, targets, results, bar.update)
  absent = [results.direction(t) for t in here.task.targets if t not in targets]
  text = "\n".join([report.table(results), *(
    f"\n{direction}: not scored, no {split} subject has both" for direction in absent)])
  if sharding.is_first():
    _write(here, results, text, scorer.pictures)
  return text


def _same_data(here: Run, store: Store) -> None:
  if store.info.hash != here.info.hash:
    raise UserError(f"{store.folder} is not the data set that {here.folder} was trained on (their"
                    " hashes differ); give that one by --data=DATA")


def scored_cases(here: Run, split: str) -> dict[str, list[Case]]:
  """{target: cases of the split that have it and the sources}, without targets nobody has.

  Raises:
    UserError: there is none.
  """
  found = {t: [c for c in here.info.split(split) if usable(c, here.task, t)]
           for t in here.task.targets}
  if not any(found.values()):
    raise UserError(f"no {split} subject has {here.task.direction} and"
                    f" {' or '.join(here.task.targets)}; prepare the data set with such a subject"
                    " in that split, or choose another --split")
  return {t: cases for t, cases in found.items() if cases}


# --- one volume ------------------------------------------------------------------------------


@dataclasses.dataclass
class _Volume:
  """A case ready to be scored against one target; arrays [n, H, W]."""
  case: Case
  source: np.ndarray     # [n, H, W, C] model units
  shown: dict[str, np.ndarray]
  physical: np.ndarray   # the target
  reference: np.ndarray  # the target in the unit of scores
  mask: np.ndarray
  rois: Mapping[str, np.ndarray]
  images: Mapping[str, np.ndarray]


class _Scorer:
  """Loads volumes and scores images of them, by the target's conventions."""

  def __init__(self, here: Run, store: Store, targets):
    self.run, self.store, self.info, self.task = here, store, here.info, here.task
    asked = configs.names(here.config.evaluation.ssim)
    self.scales = {t: scoring.scale_of(self.info.modality(t)) for t in targets}
    self.protocols = {t: scoring.ssim_protocols(asked, self.info.modality(t)) for t in targets}
    self.pictures: dict[tuple[str, str], list[panels.Picture]] = {}

  def load(self, case: Case, target: str) -> _Volume:
    """A case with the target in the unit of scores."""
    arrays = self.store.volume(case)
    physical = arrays["images"][target]
    shown = {m: arrays["images"][m] for m in self.task.sources if m in arrays["images"]}
    return _Volume(
      case, case_source(arrays, case, self.task, self.info), shown, physical,
      self.scales[target].reference(physical, case.images[target].target),
      arrays["mask"] & case_valid(arrays, case, self.task, target), arrays["rois"],
      arrays["images"])

  def held_out(self, case: Case, target: str) -> _Volume:
    """`load` of a case to be scored; UserError where no voxel of it counts."""
    volume = self.load(case, target)
    if not volume.mask.any():
      raise UserError(f"case {case.name}: no voxel lies in the body mask and in the field of view"
                      f" of {self.task.direction} and {target}; repair its mask, or take the row"
                      " out of the table, and prepare the data set again")
    return volume

  def score(self, volume: _Volume, target: str, row: str, image: np.ndarray) -> dict[str, float]:
    """Scores of an image in the unit of scores."""
    try:
      return scoring.score(self.scales[target], volume.reference, image, volume.mask, volume.rois,
                           self.protocols[target])
    except ValueError as error:
      raise UserError(f"case {volume.case.name}, {row}: {error}") from None


# --- rows without a network ------------------------------------------------------------------


def _baselines(scorer: _Scorer, target: str, cases: list[Case], results: Results) -> int:
  """Adds the floor's rows and the ceiling's; returns the source channel that the tables look up."""
  info, task = scorer.info, scorer.task
  training = tqdm([c for c in info.split("train") if usable(c, task, target)], desc="floor",
                  unit="case", disable=not sharding.is_first())
  floor = floors.fit(
    ((v.source, v.reference, v.mask, info.spacing_of(v.case))
     for v in (scorer.load(case, target) for case in training)),
    channels=task.channels(info) // (2 * task.context + 1), common_grid=info.anatomical,
    direction=results.direction(target))
  ceiling = floors.has_ceiling(info, task, target, cases)
  for case in cases:
    volume = scorer.held_out(case, target)
    rows = floor.predict(volume.source, info.spacing_of(case))
    name, image = floors.identity(volume.source, volume.shown, task, info, target)
    rows[name] = image
    if ceiling:
      rows["ceiling"] = scorer.scales[target].reference(
        volume.images[CEILING + target], case.images[target].target)
    for row, image in rows.items():
      results.add(target, row, case, scorer.score(volume, target, row, image))
  return floor.channel


# --- rows of stages --------------------------------------------------------------------------


def _stage(scorer: _Scorer, stage: str, targets, results: Results,
           progress: Callable[[int], Any]) -> None:
  """Adds a stage's row for every target, and what its panels show."""
  here = scorer.run
  with jax.set_mesh(here.mesh):
    state, step = here.restore(stage, results.which)
    predict = here.predictor(stage)
  results.stages[stage] = report.Stage(step, here.methods[stage].sees_target)
  for target, case in _pairs(targets):
    volume = scorer.held_out(case, target)
    with jax.set_mesh(here.mesh):
      model = _synthesise(here, stage, predict, state, volume, target, progress)
    image = scorer.scales[target].prediction(model)
    scores = scorer.score(volume, target, stage, image)
    results.add(target, stage, case, scores)
    # no loss sees what lies outside; synthesize writes the background there, so that is shown
    shown = scoring.blanked(scorer.scales[target], image, volume.mask)
    picture = panels.take(here.info, case, volume.shown, volume.reference, shown, volume.mask,
                          scores["psnr"], scores[scoring.ssim_name(scorer.protocols[target][0])])
    scorer.pictures.setdefault((target, stage), []).append(picture)


def _pairs(targets: Mapping[str, list[Case]]) -> Iterator[tuple[str, Case]]:
  return ((target, case) for target, cases in targets.items() for case in cases)


def _synthesise(here: Run, stage: str, predict, state, volume: _Volume, target: str,
                progress) -> np.ndarray:
  """The stage's image of a volume, [n, H, W] in [-1, 1]; the target only where a bound sees it."""
  settings, truth = here.config.synthesis, None
  if here.methods[stage].sees_target:
    own = volume.case.images[target].target
    truth = to_model(own, volume.physical)[..., None].astype(np.float32)
  image = windows.synthesise(
    predict, state, volume.source, here.task,
    source_modality=here.info.index(here.task.sources[0]), target_modality=here.info.index(target),
    key=here.key(stage), batch_size=settings.batch_size, overlap=settings.overlap, target=truth,
    put=here.put, progress=progress)
  return image[..., 0]


def _windows(here: Run, case: Case) -> int:
  """Network inputs that a case is cut into."""
  plane = here.info.plane
  shape = (case.shape[plane], *np.delete(case.shape, plane))
  return windows.count(shape, here.task, here.config.synthesis.overlap)


# --- files and command -----------------------------------------------------------------------


def _write(here: Run, results: Results, text: str, pictures) -> None:
  """Puts all files in place at once; those of an earlier evaluation go."""
  name = "evaluation" if results.split == "test" else f"evaluation_{results.split}"
  folder = here.folder / name
  partial, old = (here.folder / f".{name}.{end}" for end in ("partial", "old"))
  for leftover in (partial, old):
    shutil.rmtree(leftover, ignore_errors=True)
  (partial / "panels").mkdir(parents=True)
  report.write(results, partial)
  (partial / "table.txt").write_text(text + "\n")
  for (target, row), shots in pictures.items():
    panels.write(partial / "panels", shots, row=row, subjects=results.subjects(target, row),
                 direction=results.direction(target), unit=results.scales[target].unit,
                 simulated=here.info.simulated, count=here.config.evaluation.panels)
  if folder.exists():
    os.replace(folder, old)
  os.replace(partial, folder)
  shutil.rmtree(old, ignore_errors=True)


def open_data(here: Run, data: str | None = None) -> Store:
  """The data set of a run: `data`, else where its config says, else RUN/data.

  Raises:
    UserError: it is not there, or is another one.
  """
  folder = Path(data or here.config.data.dir or here.folder / "data")
  if not (folder / "dataset.json").is_file():
    raise UserError(f"{folder}: no data set here; say where the one that {here.folder} was trained"
                    " on lies, by --data=DATA")
  store = Store(folder)
  _same_data(here, store)
  return store


def main(argv: list[str]) -> None:
  """The command."""
  del argv
  if _WORKDIR.value is None:
    raise UserError("give --workdir=RUN")
  here = run.open_run(_WORKDIR.value)
  print(evaluate(here, open_data(here, _DATA.value), which=_CHECKPOINT.value, split=_SPLIT.value))


if __name__ == "__main__":
  from medsynth_jax import cli
  _WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.")
  _DATA = flags.DEFINE_string("data", None, "The data set; default: where the run's config says.")
  _CHECKPOINT = flags.DEFINE_enum("checkpoint", "best", ["best", "latest"], "Which checkpoints.")
  _SPLIT = flags.DEFINE_enum("split", "test", list(SPLITS), "Whose subjects are scored.")
  cli.run(main)
