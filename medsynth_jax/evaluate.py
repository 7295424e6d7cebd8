"""Scores of a run on held-out subjects, beside the floor that it must beat.

python -m medsynth_jax.evaluate --workdir=RUN [--data=DATA] [--checkpoint=latest] [--split=test]
    [--samples=8] [--batch_size=4] [--s3] [--lumen=vessel]

Writes RUN/evaluation/: per_subject.csv, summary.json, table.txt, panels/*.png, with --s3 the NIQE
models niqe_<target>.npz, with data.source=any matrix.png of all directions. RUN is not changed
otherwise; another split goes to RUN/evaluation_<split>/.
"""

import dataclasses
import functools
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from tqdm import tqdm

from medsynth_jax import floors, matrix, panels, report, run, sharding, timing
from medsynth_jax.code_switch import CONSTANT, Switch
from medsynth_jax.data import fusion
from medsynth_jax.data.dataset import CEILING, SPLITS, Case, Store
from medsynth_jax.data.examples import usable
from medsynth_jax.errors import UserError
from medsynth_jax.maker import Maker, count, samples
from medsynth_jax.metrics import uptake
from medsynth_jax.metrics.volume import slice_scores
from medsynth_jax.registered import Registration, known, measure
from medsynth_jax.results import Results, write
from medsynth_jax.run import Run
from medsynth_jax.scorer import Scorer, Volume, fit_floors, lumen_of
from medsynth_jax.scoring import ssim_name


def evaluate(here: Run, store: Store, *, which: str = "best", split: str = "test") -> str:
  """Scores every stage that makes images on the subjects of a split; returns the printed table.

  Stages trained without one fold only serve later ones and are no rows. In a run of several
  processes all call this, and process 0 writes.

  Args:
    store: the data set that the run was trained on.
    which: the checkpoints, "best" (by validation) or "latest".

  Raises:
    UserError: another data set, no subject with both sides, an empty mask, no checkpoint.
  """
  _same_data(here, store)
  lumen, s3 = lumen_of(here), {}
  scorers = [(Scorer(view, store, targets, lumen, s3), targets)
             for view, targets in scored_cases(here, split)]
  works = [_part(scorer, targets, floor, split, which)
           for (scorer, targets), floor in zip(scorers, fit_floors(scorers), strict=True)]
  parts = [work.results for work in works]
  text = report.table(parts)
  all_of = matrix.make(parts, here.task, split) if here.task.any_source else None
  if all_of:
    text = f"{all_of.text()}\n\n{text}"
  else:
    absent = [parts[0].direction(t) for t in here.task.targets if t not in parts[0].scales]
    text = "\n".join([text, *(f"\n{d}: not scored, no {split} subject has both" for d in absent)])
  if sharding.is_first():
    _write(here, works, text, all_of)
  return text


def _part(scorer: Scorer, targets: Mapping[str, list[Case]],
          floor: Mapping[str, floors.Fitted | floors.Constant], split: str, which: str) -> "_Work":
  """Scores all rows of a run of one source (or of several at once)."""
  here = scorer.run
  results = Results(here.config, here.info, here.task.direction, split, which, scorer.scales,
                    scorer.protocols, scorer.rendered, scorer.lumen, scorer.s3)
  work = _Work(scorer, results, floor)
  for target, cases in targets.items():
    _baselines(work, target, cases)
  stages = [s for s, m in here.methods.items()
            if m.synthesize and here.sections[s].exclude_fold < 0]
  with tqdm(total=sum(_total(here, s, targets) for s in stages), unit="image",
            desc=f"evaluate {here.task.direction}", disable=not sharding.is_first()) as bar:
    for stage in stages:
      _stage(work, stage, targets, bar.update)
  for stage, section in here.sections.items():
    found = timing.trained(here.folder / stage, section.batch_size)
    results.training |= {stage: found} if found else {}
  return work


def _same_data(here: Run, store: Store) -> None:
  if store.info.hash != here.info.hash:
    raise UserError(f"{store.folder} is not the data set that {here.folder} was trained on (their"
                    f" hashes differ{run.modalities_apart(store.info, here.info)}); give that one"
                    " by --data=DATA")


def scored_cases(here: Run, split: str) -> list[tuple[Run, dict[str, list[Case]]]]:
  """[(run of a source, {target: cases of the split that have both})], without those nobody has.

  Raises:
    UserError: there is none, or `evaluation.lumen` asks for what is not there.
  """
  lumen_of(here)
  found = []
  for view in here.views():
    targets = {t: [c for c in here.info.split(split) if usable(c, view.task, t)]
               for t in view.task.targets}
    found.append((view, {t: cases for t, cases in targets.items() if cases}))
  if not any(targets for _, targets in found):
    sides = (f"two of {', '.join(here.task.targets)}" if here.task.any_source else
             f"{here.task.direction} and {' or '.join(here.task.targets)}")
    raise UserError(f"no {split} subject has {sides}; prepare the data set with such a subject"
                    " in that split, or choose another --split")
  return [(view, targets) for view, targets in found if targets]


@dataclasses.dataclass
class _Work:
  """What the parts of an evaluation share."""
  scorer: Scorer
  results: Results
  floor: Mapping[str, floors.Fitted | floors.Constant]
  pictures: dict[tuple[str, str], list[panels.Picture]] = dataclasses.field(default_factory=dict)


# --- rows without a network ------------------------------------------------------------------


def _baselines(work: _Work, target: str, cases: list[Case]) -> None:
  """Adds the floor's rows and the ceiling's."""
  scorer, results, floor = work.scorer, work.results, work.floor[target]
  info, task = scorer.info, scorer.task
  results.floor[target] = floor.channel
  ceiling = floors.has_ceiling(info, task, target, cases)
  for case in cases:
    volume = scorer.held_out(case, target)
    rows = floor.predict(volume.source, info.spacing_of(case))
    rows |= dict([floors.identity(volume.source, volume.shown, task, info, target)])
    if ceiling:
      clean = volume.images[CEILING + task.measured(target)]
      rows["ceiling"] = scorer.fused(volume, clean) if target == fusion.NAME else \
        scorer.scales[target].reference(clean, case.images[target].target)
    for row, image in rows.items():
      results.add(target, row, case, scorer.score(volume, row, image))
      if volume.fused:
        row, image = _rendered(scorer, volume, row, image)
        results.add(fusion.NAME, row, case, scorer.score(volume.fused, row, image))


def _rendered(scorer: Scorer, volume: Volume, row: str, suv: np.ndarray) -> tuple[str, np.ndarray]:
  """(row, its fusion image) of a row of a PET; the identity's is the MR without uptake."""
  if row.startswith("identity"):
    return floors.identity(volume.source, volume.shown, scorer.task, scorer.info, fusion.NAME)
  return row, scorer.fused(volume, suv)


# --- rows of stages --------------------------------------------------------------------------


def _stage(work: _Work, stage: str, targets: Mapping[str, list[Case]],
           progress: Callable[[int], Any]) -> None:
  """Adds a stage's row for every target, and what its panels and its code switch show."""
  scorer, results, here = work.scorer, work.results, work.scorer.run
  maker = Maker(here, stage, results.which, progress)
  switch = Switch(here.task.targets) if _switched(here, stage) else None
  for case in here.info.split(results.split):
    volumes = {t: scorer.held_out(case, t) for t in targets if usable(case, here.task, t)}
    made = {}
    for code in _codes(here, stage, volumes):
      volume = volumes.get(code) or next(iter(volumes.values()))  # the source is the same
      made[code] = maker.image(
        volume, code, scorer.truth(volume) if here.methods[stage].sees_target else None)
    for target, volume in volumes.items():
      _score(work, stage, volume, made[target][0])
      if here.methods[stage].flow:
        _register(work, maker, volume, made[target][1])
      if switch:
        _compare(work, switch, volume, {code: model for code, (_, model) in made.items()})
  results.stages[stage] = maker.row()
  if switch:
    results.switches[stage] = switch


def _switched(here: Run, stage: str) -> bool:
  """Whether the stage makes several modalities by their codes."""
  method = here.methods[stage]
  return method.many_targets and not method.sees_target and len(here.task.targets) > 1


def _codes(here: Run, stage: str, own) -> list[str]:
  """What is made of a case that has the targets `own`: those, or by all codes."""
  return list(here.task.targets) if own and _switched(here, stage) else list(own)


def _score(work: _Work, stage: str, volume: Volume, image: np.ndarray) -> None:
  """Adds the scores of a stage's image; of a PET also those of the fusion rendered from it."""
  scorer, results, case = work.scorer, work.results, volume.case
  target = volume.target
  scores = scorer.score(volume, stage, image)
  results.add(target, stage, case, scores)
  # no loss sees what lies outside; synthesize writes the background there, so that is shown
  shown = scorer.blanked(volume, image)
  ssim = scores[ssim_name(scorer.protocols[target][0])]
  work.pictures.setdefault((target, stage), []).append(panels.take(
    scorer.info, case, volume.shown, volume.reference, shown, volume.mask, scores["psnr"], ssim))
  if volume.suv is not None:
    reference = scorer.blanked(volume, volume.reference)
    results.add_slices(target, stage, case, {
      **slice_scores(reference, shown, volume.mask, data_range=scorer.scales[target].data_range),
      **uptake.slice_uptake(volume.suv, volume.mask)})
  if volume.fused:
    _score(work, stage, volume.fused, _rendered(scorer, volume, stage, image)[1])


def _register(work: _Work, maker: Maker, volume: Volume, image: np.ndarray) -> None:
  """Measures a stage's flow to a displaced target, and how far its image is shifted."""
  scorer, case, here = work.scorer, volume.case, work.scorer.run
  mm = here.config.evaluation.get("displace", 4.0)
  found = work.results.registrations.setdefault((volume.target, maker.stage), Registration(mm))
  if len(here.task.size) == 2:
    spacing = here.info.spacing_of(case)[1:]
    u = known(volume.mask.shape[1:], spacing, mm, here.config.seed, case.volume)
    found.add(case.subject, measure(scorer.truth(volume), image, volume.mask, spacing, u,
                                    functools.partial(maker.flow, volume, volume.target)))


def _compare(work: _Work, switch: Switch, volume: Volume, made: Mapping[str, np.ndarray]) -> None:
  """Compares the image of every code, in model units, with a target of the case."""
  scale, truth = work.scorer.scales[volume.target], work.scorer.truth(volume)[..., 0]
  constant = scale.model(np.full(truth.shape, work.floor[volume.target].constant))
  for code, image in {**made, CONSTANT: constant}.items():
    switch.add(volume.target, code, volume.case.subject, truth, image, volume.mask)


def _total(here: Run, stage: str, targets: Mapping[str, list[Case]]) -> int:
  """Network inputs of a stage."""
  cases = {c.volume: c for own in targets.values() for c in own}
  made = {v: [t for t in targets if usable(c, here.task, t)] for v, c in cases.items()}
  return sum(count(here, c) * len(_codes(here, stage, made[v])) for v, c in cases.items()) \
    * samples(here, stage)


# --- files and command -----------------------------------------------------------------------


def _write(here: Run, works: list[_Work], text: str, all_of: matrix.Matrix | None) -> None:
  """Puts all files in place at once; those of an earlier evaluation go."""
  parts = [work.results for work in works]
  name = "evaluation" if parts[0].split == "test" else f"evaluation_{parts[0].split}"
  folder = here.folder / name
  partial, old = (here.folder / f".{name}.{end}" for end in ("partial", "old"))
  for leftover in (partial, old):
    shutil.rmtree(leftover, ignore_errors=True)
  (partial / "panels").mkdir(parents=True)
  write(parts, partial, {"matrix": all_of.described()} if all_of else {})
  (partial / "table.txt").write_text(text + "\n")
  if all_of:
    all_of.draw(partial / "matrix.png")
  for work in works:
    results = work.results
    for (target, row), shots in work.pictures.items():
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
  asked = {"synthesis.samples": _SAMPLES.value, "synthesis.batch_size": _BATCH_SIZE.value,
           "evaluation.s3": _S3.value, "evaluation.lumen": _LUMEN.value}
  changes = {field: value for field, value in asked.items() if value is not None}
  here = run.open_run(_WORKDIR.value, changes)
  print(evaluate(here, open_data(here, _DATA.value), which=_CHECKPOINT.value, split=_SPLIT.value))


if __name__ == "__main__":
  from medsynth_jax import cli
  _WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.")
  _DATA = flags.DEFINE_string("data", None, "The data set; default: where the run's config says.")
  _CHECKPOINT = flags.DEFINE_enum("checkpoint", "best", ["best", "latest"], "Which checkpoints.")
  _SPLIT = flags.DEFINE_enum("split", "test", list(SPLITS), "Whose subjects are scored.")
  _SAMPLES = flags.DEFINE_integer("samples", None, "Score the mean of so many samples.")
  _BATCH_SIZE = flags.DEFINE_integer("batch_size", None, "Slices made at once.")
  _S3 = flags.DEFINE_bool("s3", None, "Also S3's metrics of MR targets (VIF, NIQE).")
  _LUMEN = flags.DEFINE_string("lumen", None, "Region in which a CT's lumen is found.")
  cli.run(main)
