"""Which training slices a stage draws, and how often: rows of the training index, in cells."""

import numpy as np
from ml_collections import ConfigDict

from medsynth_jax import config as configs
from medsynth_jax.data import fusion
from medsynth_jax.data.dataset import Case, Info
from medsynth_jax.data.examples import Task, single_images, usable
from medsynth_jax.errors import UserError

DRAWS = ("pair", "single")
BALANCES = ("", "category", "category,group")


def check(info: Info, task: Task, section: ConfigDict) -> None:
  """What a stage's fields must not ask for.

  Raises:
    UserError: an unknown `draw` or `balance`; "single" of a fusion image, with neighbouring slices
      or with a simulated misalignment; folds that the data set does not have.
  """
  draw, balance, folds = section.draw, section.get("balance", ""), len(configs.folds(section))
  if draw not in DRAWS:
    raise UserError(f"draw={draw!r}: choose one of {', '.join(DRAWS)}")
  if balance not in BALANCES:
    raise UserError(f"balance={balance!r}: choose one of {', '.join(map(repr, BALANCES))}")
  if draw == "single" and fusion.NAME in task.targets:
    raise UserError("draw='single' takes images of one channel, a fusion image has three; learn"
                    f" data.targets={task.fusion}, which is shown as a fusion afterwards")
  if draw == "single" and task.context:
    raise UserError("draw='single' takes slices alone (autoencoders); set data.context=0")
  if draw == "single" and section.misalign:
    raise UserError("draw='single': an image cannot be misaligned with itself; set misalign=0")
  check_folds(info, folds)


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

  The number is that of the target in `task.targets`, or for draw "single" that of the image in
  `single_images`. Only slices with enough foreground are listed: of a source, or of that image.

  Raises:
    UserError: no training case has both sides, none for one of the targets, none is left outside
      the excluded fold, or none of their slices holds foreground.
  """
  single = draw == "single"
  names = [m for m, _ in single_images(task, info)] if single else task.targets
  cases, where = info.split("train"), ""
  if exclude_fold >= 0:
    cases, where = _without(cases, exclude_fold), f" outside fold {exclude_fold}"
  rows, counts = [], [0] * len(names)
  for case in cases:
    for number, name in enumerate(names):
      if name in case.images if single else usable(case, task, name):
        counts[number] += 1
        shown = [name] if single else [m for m in task.sources if m in case.images]
        slices = sorted({k for m in shown for k in case.foreground[m]})
        rows += [(case.volume, k, number) for k in slices]
  pair = f"{task.direction} and {', '.join(task.targets)}"
  if not any(counts):
    raise UserError(f"no training case{where} has {pair}; see the table of counts in dataset.json")
  if not all(counts):
    absent = names[counts.index(0)]
    alone = absent if single else f"{task.direction} and {absent}"
    raise UserError(f"category '{absent}' is absent from the training data: no training case"
                    f"{where} has {alone}; leave it out of the config, or add such cases")
  if not rows:
    raise UserError(f"no slice left: no training slice{where} with {pair} has enough foreground of"
                    " the source; lower `min_foreground` in configs/prepare.py")
  return np.array(rows, np.int32)


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


def cells(info: Info, index: np.ndarray, balance: str) -> list[np.ndarray]:
  """The rows of a training index by what `balance` draws equally often, in a fixed order.

  "category": the row's number (its target, or its single image); "category,group": also the case's
  group, as the table has it.
  """
  if not balance:
    return [index]
  groups = sorted({c.group for c in info.cases}) if balance == "category,group" else []
  of = {c.volume: groups.index(c.group) if groups else 0 for c in info.cases}
  keys = np.array([(number, of[volume]) for volume, _, number in index])
  return [index[(keys == key).all(1)] for key in np.unique(keys, axis=0)]
