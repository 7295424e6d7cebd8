"""Which training slices a stage draws, and how often: rows of the training index, in cells."""

from collections.abc import Sequence

import numpy as np
from ml_collections import ConfigDict

from medsynth_jax import config as configs
from medsynth_jax.data import fusion
from medsynth_jax.data.dataset import Case, Info
from medsynth_jax.data.displacements import displacement
from medsynth_jax.data.examples import (
  Task,
  directions,
  has_sources,
  in_plane,
  single_images,
  usable,
)
from medsynth_jax.errors import UserError

DRAWS = ("pair", "unpaired", "single", "any")
BALANCES = ("", "category", "category,group")


def check(info: Info, task: Task, section: ConfigDict) -> None:
  """What a stage's fields must not ask for.

  Raises:
    UserError: an unknown `draw` or `balance`; a draw that does not fit the task; a simulated
      misalignment of what has no other side, one that folds, or of whole volumes at every draw;
      folds that the data set does not have.
  """
  draw, balance, folds = section.draw, section.get("balance", ""), len(configs.folds(section))
  if draw not in DRAWS:
    raise UserError(f"draw={draw!r}: choose one of {', '.join(DRAWS)}")
  if balance not in BALANCES:
    raise UserError(f"balance={balance!r}: choose one of {', '.join(map(repr, BALANCES))}")
  _check_task(task, draw)
  apart = next((f for f in ("misalign", "displace") if section.get(f, 0)), "")
  if draw in ("single", "any") and apart:
    why = "an image cannot be misaligned with itself" if draw == "single" else \
      "every image is source and target, so that none is the misaligned one"
    raise UserError(f"draw={draw!r}: {why}; set {apart}=0")
  if section.get("displace", 0):
    if section.get("redraw", False) and len(task.size) == 3:
      raise UserError("redraw with 3-D patches: each patch would need the displacement of its whole"
                      " volume anew; set redraw=False, or displace=0")
    _check_displacement(info, task, section.displace)
  check_folds(info, folds)


def _check_task(task: Task, draw: str) -> None:
  """Whether a task can be drawn so."""
  if task.any_source and draw not in ("any", "single"):
    raise UserError(f"draw={draw!r}: with data.source=any every modality is made from any other;"
                    " set draw='any', or name one source in data.source")
  if draw == "any" and not task.any_source:
    raise UserError("draw='any' makes every modality from any other: set data.source=any and name"
                    " the modalities in data.targets")
  if draw == "single" and fusion.NAME in task.targets:
    raise UserError("draw='single' takes images of one channel, a fusion image has three; learn"
                    f" data.targets={task.fusion}, which is shown as a fusion afterwards")
  if draw == "unpaired" and fusion.NAME in task.targets:
    raise UserError("draw='unpaired' takes source and target of two subjects, a fusion image is"
                    f" shown on its own source; learn data.targets={task.fusion}, which is shown"
                    " as a fusion afterwards")
  if draw == "single" and task.context:
    raise UserError("draw='single' takes slices alone (autoencoders); set data.context=0")


def _check_displacement(info: Info, task: Task, mm: float) -> None:
  """A UserError now, not when it is drawn first, for a field that folds."""
  case = info.split("train")[0]
  shape, spacing = (case.shape[info.plane], *in_plane(case, info)), info.spacing_of(case)
  rank = len(task.size)
  displacement(shape[-rank:], spacing[-rank:], mm, np.random.default_rng(0))


def check_folds(info: Info, folds: int) -> None:
  """A UserError unless the training subjects lie in folds 0 .. folds - 1; 0 asks for none."""
  there = sorted({c.fold for c in info.split("train")} - {-1})
  unassigned = any(c.fold < 0 for c in info.split("train"))
  if folds and (unassigned or there != list(range(folds))):
    has = f"folds {', '.join(map(str, there))}" if there else "no folds"
    raise UserError(f"folds={folds}: the training subjects of this data set have {has}; prepare it"
                    f" with --config.folds={folds} (simulated: data.simulated.folds={folds})")


def training_index(info: Info, task: Task, exclude_fold: int = -1,
                   draw: str = "pair") -> np.ndarray:
  """Rows (volume, slice, number) of the training cases, int32 [n, 3].

  The number is that of the target in `task.targets`, for draw "single" that of the image in
  `single_images`, for draw "any" that of the direction in `directions`. Only slices with enough
  foreground are listed: of a source, or of that image. For "any" each case is listed equally often
  in a direction, also if it lacks the target.

  Raises:
    UserError: no training case has both sides, none for one of the targets, none is left outside
      the excluded fold, or none of their slices holds foreground.
  """
  cases, where = _training_cases(info, exclude_fold)
  if draw == "any":
    return _any_index(cases, task, where)
  if draw == "unpaired":
    return _unpaired_index(cases, task, where)
  single = draw == "single"
  names = [m for m, _ in single_images(task, info)] if single else task.targets
  rows, counts = [], [0] * len(names)
  for case in cases:
    for number, name in enumerate(names):
      if name in case.images if single else usable(case, task, name):
        counts[number] += 1
        slices = _slices(case, [name] if single else task.sources)
        rows += [(case.volume, k, number) for k in slices]
  pair = f"{task.direction} and {', '.join(task.targets)}"
  if not any(counts):
    raise UserError(f"no training case{where} has {pair}; see the table of counts in dataset.json")
  if not all(counts):
    absent = names[counts.index(0)]
    alone = absent if single else f"{task.direction} and {absent}"
    raise UserError(f"category '{absent}' is absent from the training data: no training case"
                    f"{where} has {alone}; leave it out of the config, or add such cases")
  return _filled(rows, where, pair)


def _training_cases(info: Info, exclude_fold: int) -> tuple[tuple[Case, ...], str]:
  """(the training cases outside a fold, how messages say that); -1: no fold."""
  if exclude_fold < 0:
    return info.split("train"), ""
  return _without(info.split("train"), exclude_fold), f" outside fold {exclude_fold}"


def _without(cases: tuple[Case, ...], fold: int) -> tuple[Case, ...]:
  """The cases outside a fold; a UserError if that fold is empty or holds all."""
  kept = tuple(c for c in cases if c.fold != fold)
  if len(kept) == len(cases):
    raise UserError(f"exclude_fold={fold}: no training subject is in that fold; prepare the data"
                    " set with --config.folds (simulated: data.simulated.folds)")
  if not kept:
    raise UserError(f"exclude_fold={fold} leaves no training subject; prepare the data set with"
                    " more folds")
  return kept


def _slices(case: Case, shown: Sequence[str]) -> list[int]:
  """The slices in which one of the modalities, if the case has it, shows enough foreground."""
  return sorted({k for m in shown if m in case.images for k in case.foreground[m]})


def _filled(rows: list[tuple[int, int, int]], where: str, pair: str) -> np.ndarray:
  if not rows:
    raise UserError(f"no slice left: no training slice{where} with {pair} has enough foreground of"
                    " the source; lower `min_foreground` in configs/prepare.py")
  return np.array(rows, np.int32)


# --- any modality from any other -------------------------------------------------------------


def _any_index(cases: Sequence[Case], task: Task, where: str) -> np.ndarray:
  """Of each direction all cases that have its source, each equally often.

  A case with fewer slices than another has them listed several times, as evenly as it goes, so that
  a shuffled pass over a direction is uniform over its cases.
  """
  _check_modalities(cases, task, where)
  rows = []
  for number, (source, _) in enumerate(directions(task)):
    slices = {c.volume: _slices(c, (source,)) for c in cases if source in c.images}
    most = max(map(len, slices.values()))
    found = [(volume, own[i * len(own) // most], number)
             for volume, own in slices.items() if own for i in range(most)]
    _filled(found, where, source)
    rows += found
  return np.array(rows, np.int32)


def _check_modalities(cases: Sequence[Case], task: Task, where: str) -> None:
  """A UserError where a modality is absent from the training data, or no two are of one case."""
  there = [[m for m in task.targets if m in c.images] for c in cases]
  for name in task.targets:
    if not any(name in have for have in there):
      raise UserError(f"'{name}' is absent from the training data: no training case{where} has it;"
                      " leave it out of data.targets, or add such cases")
  if max(map(len, there)) < 2:
    raise UserError(f"no training case{where} has two of {', '.join(task.targets)}: nothing is"
                    " paired; add cases with two or more, or train one pair with draw='unpaired'")


# --- unpaired --------------------------------------------------------------------------------


def _unpaired_index(cases: Sequence[Case], task: Task, where: str) -> np.ndarray:
  """Of each target the source slices of the subjects for whom another subject has that target."""
  rows = []
  givers = {c.subject for c in cases if has_sources(c, task)}
  for number, target in enumerate(task.targets):
    lenders = {c.subject for c in cases if _slices(c, (target,))}
    found = [(c.volume, k, number) for c in cases
             if has_sources(c, task) and lenders - {c.subject} for k in _slices(c, task.sources)]
    if not (givers and any(lenders - {s} for s in givers)):
      raise UserError(f"draw='unpaired' takes {task.direction} of one training subject and {target}"
                      f" of another: {len(givers)} subjects{where} have {task.direction},"
                      f" {len(lenders)} have {target}; there must be two who differ")
    _filled(found, where, task.direction)
    rows += found
  return np.array(rows, np.int32)


def lenders(info: Info, task: Task, exclude_fold: int = -1) -> list[np.ndarray]:
  """Of each target all training slices (volume, slice) in which it shows enough foreground."""
  cases, _ = _training_cases(info, exclude_fold)
  return [np.array([(c.volume, k) for c in cases for k in _slices(c, (target,))], np.int32)
          for target in task.targets]


# --- how often -------------------------------------------------------------------------------


def cells(info: Info, index: np.ndarray, balance: str) -> list[np.ndarray]:
  """The rows of a training index by what `balance` draws equally often, in a fixed order.

  "category": the row's number (its target, single image or direction); "category,group": also the
  case's group, as the table has it.
  """
  if not balance:
    return [index]
  groups = sorted({c.group for c in info.cases}) if balance == "category,group" else []
  of = {c.volume: groups.index(c.group) if groups else 0 for c in info.cases}
  keys = np.array([(number, of[volume]) for volume, _, number in index])
  return [index[(keys == key).all(1)] for key in np.unique(keys, axis=0)]
