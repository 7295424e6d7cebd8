"""Training batches: a deterministic Grain pipeline over the slices (or patches) of a data set."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import grain
import numpy as np
from ml_collections import ConfigDict

from medsynth_jax.data import augment as augmentation
from medsynth_jax.data import draws, fusion
from medsynth_jax.data.augment import Augment, Misplaced, Pose
from medsynth_jax.data.dataset import Case, Info, Store
from medsynth_jax.data.examples import (
  BACKGROUND,
  Task,
  case_image,
  case_source,
  case_target,
  case_valid,
  directions,
  has_sources,
  in_plane,
  neighbours,
  single_images,
  stack_context,
  usable,
)
from medsynth_jax.errors import UserError


def told(info: Info, task: Task, drawn: Iterable[str]) -> list[str]:
  """What a user has to know of the training cases that are not whole; `drawn` are the `draw`s."""
  train, source = info.split("train"), task.direction
  if task.any_source:
    have = [sum(m in c.images for m in task.targets) for c in train]
    lines = {f"have one of {', '.join(task.targets)} only: they train the unpaired losses": 1,
             f"are skipped: they have none of {', '.join(task.targets)}": 0}
    return [f"{have.count(n)} training cases {text}" for text, n in lines.items() if n in have]
  if set(drawn) == {"unpaired"}:
    counts = {source: sum(has_sources(c, task) for c in train),
              **{t: sum(t in c.images for c in train) for t in task.targets}}
    return [f"unpaired: {n} of {len(train)} training cases have {name}"
            for name, n in counts.items() if n < len(train)]
  lacking = {t: sum(not usable(c, task, t) for c in train) for t in task.targets}
  return [f"{n} training cases are skipped: they lack {source} or {t}"
          for t, n in lacking.items() if n]


@dataclasses.dataclass(frozen=True)
class _Taken:
  """Slices of a case for one example: `keep` are those that it shows, others lie around them."""
  case: Case
  arrays: dict[str, Any]
  keep: slice
  pose: Pose
  misplaced: Misplaced
  plane: tuple[int, int]

  def as_source(self, array: np.ndarray, order: int = 0) -> np.ndarray:
    """Slices [n, H, W] or [n, H, W, C] where the source's go."""
    return augmentation.placed(_channelled(array), self.pose, self.misplaced.source, None,
                               self.plane, order)

  def as_target(self, array: np.ndarray, order: int = 0) -> np.ndarray:
    """The same of the target: of all slices at hand, those that the example shows."""
    array, u = _channelled(array), self.misplaced.u
    deep = u is not None and u.ndim == 4
    moved = augmentation.placed(array if deep else array[self.keep], self.pose,
                                self.misplaced.target, u, self.plane, order)
    return moved[self.keep] if deep else moved


class Examples:
  """Turns a row of the training index into one example; a Grain random map."""

  def __init__(self, store: Store, task: Task, augment: Augment, draw: str = "pair",
               exclude_fold: int = -1):
    self.store, self.task, self.augment, self.draw = store, task, augment, draw
    self.singles = single_images(task, store.info) if draw == "single" else ()
    pairs = directions(task) if draw == "any" else [(n, n) for n, _ in self.singles]
    # (the task with the source, the target) of each number of a row
    self.sides = [(dataclasses.replace(task, sources=(s,)), t) for s, t in pairs] or \
      [(task, t) for t in task.targets]
    self.subjects = {s: i for i, s in enumerate(sorted({c.subject for c in store.info.cases}))}
    self.lenders = draws.lenders(store.info, task, exclude_fold) if draw == "unpaired" else ()

  def __call__(self, row: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
    volume, k, number = (int(x) for x in row)
    info, (task, target) = self.store.info, self.sides[number]
    given = self._take(info.cases[volume], k, rng)
    lent = self._take(*self._lender(given.case, number, rng), rng) if self.lenders else given
    parts = {"source": self._source(given, task, number, rng),
             **self._measured(given, lent, task, target)}
    there = target in lent.case.images or target == fusion.NAME
    if self.singles:
      parts["target"] = parts["source"]
    elif there:
      image = case_target(lent.arrays, lent.case, task, info, target)
      parts["target"] = lent.as_target(image, 1)
    else:
      parts["target"] = np.full((*parts["valid"].shape[:-1], 1), BACKGROUND, np.float32)
    deep = len(self.task.size) == 3
    example = {n: _fit_depth(x, self.task.size[0], n) if deep else x[0] for n, x in parts.items()}
    return {**example, "source_modality": np.int32(info.index(task.sources[0])),
            "target_modality": np.int32(info.index(target)),
            "subject": np.int32(self.subjects[given.case.subject]), "volume": np.int32(volume),
            "slice": np.int32(k), "fold": np.int32(given.case.fold),
            "paired": np.float32(there and lent is given)}

  def _take(self, case: Case, k: int, rng: np.random.Generator) -> _Taken:
    """The slices of a case around slice k, and where they go."""
    info, task, plane = self.store.info, self.task, in_plane(case, self.store.info)
    deep, count, spacing = len(task.size) == 3, case.shape[info.plane], info.spacing_of(case)
    first, depth = _depth_window(k, count, task.size[0], rng) if deep else (k, 1)
    misplaced = augmentation.misplaced(
      self.augment, case.volume, (count, *plane) if deep else plane,
      spacing if deep else spacing[1:], rng)
    numbers, keep = neighbours(k, count, task.context), slice(task.context, task.context + 1)
    if deep:
      u = misplaced.u
      reach = 0 if u is None else int(np.ceil(np.abs(u[..., 0]).max()))
      numbers = np.arange(max(0, first - reach), min(count, first + depth + reach))
      keep = slice(first - numbers[0], first - numbers[0] + depth)
      misplaced = dataclasses.replace(misplaced, u=None if u is None else u[numbers])
    pose = augmentation.draw_pose(self.augment, plane, task.size[-2:], rng)
    return _Taken(case, self.store.slices(case, numbers), keep, pose, misplaced, task.size[-2:])

  def _lender(self, case: Case, number: int, rng: np.random.Generator) -> tuple[Case, int]:
    """(case of another subject, slice) for the target."""
    cases, rows = self.store.info.cases, self.lenders[number]
    own = [c.volume for c in cases if c.subject == case.subject]
    others = np.flatnonzero(~np.isin(rows[:, 0], own))
    volume, k = rows[others[rng.integers(len(others))]]
    return cases[volume], int(k)

  def _source(self, given: _Taken, task: Task, number: int, rng) -> np.ndarray:
    if self.singles:
      source = case_image(given.arrays, given.case, *self.singles[number])
    else:
      source = case_source(given.arrays, given.case, task, self.store.info)
    deep = len(task.size) == 3
    source = source[given.keep] if deep else stack_context(source)[None]
    if task.sources[0] in self.task.sources:
      # from a stream of its own, so that these fields change no other draw
      source = augmentation.recoloured(source, self.augment, augmentation.child(rng))
    return given.as_source(source, 1)

  def _measured(self, given: _Taken, lent: _Taken, task: Task, target: str
                ) -> dict[str, np.ndarray]:
    """`valid`, `target_valid` and `mask` of an example."""
    if lent is not given:
      valid = case_valid(given.arrays, given.case, task, task.sources[0])[given.keep]
      body = valid & given.arrays["mask"][given.keep]
      return {"valid": given.as_source(valid), "mask": given.as_source(body),
              "target_valid": lent.as_target(lent.arrays["valid"][target])}
    valid = case_valid(given.arrays, given.case, task, target)
    def both(mask):  # measured where both sides are
      return np.minimum(given.as_source(mask[given.keep]), given.as_target(mask))
    measured = both(valid)
    return {"valid": measured, "target_valid": measured, "mask": both(valid & given.arrays["mask"])}


def _channelled(array: np.ndarray) -> np.ndarray:
  return array if array.ndim == 4 else array[..., None].astype(np.float32)


def _depth_window(k: int, count: int, depth: int, rng: np.random.Generator) -> tuple[int, int]:
  """First slice and number of slices of a patch that holds slice k."""
  if count <= depth:
    return 0, count
  return int(rng.integers(max(0, k - depth + 1), min(k, count - depth) + 1)), depth


def _fit_depth(array: np.ndarray, depth: int, name: str) -> np.ndarray:
  """Pads a shorter volume to the patch's depth with background, which is not valid."""
  missing = depth - len(array)
  fill = BACKGROUND if name in ("source", "target") else 0.0
  return np.pad(array, ((0, missing), (0, 0), (0, 0), (0, 0)), constant_values=fill)


def training(store: Store, task: Task, augment: Augment, section: ConfigDict, config: ConfigDict,
             stage: int, process: int = 0, processes: int = 1) -> grain.IterDataset:
  """An endless, checkpointable iterator of this process's share of the training batches.

  Slicing by process comes after shuffling and repeating, so that global batch k holds the same
  examples in the same order for any number of processes. With `section.balance` every cell (see
  `draws.cells`) gives one example to each run of as many examples as there are cells, in random
  order; so does every direction of draw "any".

  Raises:
    UserError: nothing to train on, a bad `draw`, `balance` or fold, a recoloured source below a
      fusion image, a batch that does not divide over processes.
  """
  draws.check(store.info, task, section)
  if fusion.NAME in task.targets and (augment.gamma or augment.contrast):
    raise UserError("data.augment.gamma and contrast recolour the source, which a fusion image"
                    " holds in grey; set both to 0")
  if section.batch_size % processes:
    raise UserError(f"batch_size={section.batch_size} does not divide over {processes} processes")
  index = draws.training_index(store.info, task, section.exclude_fold, section.draw)
  seed = config.seed + stage
  balance = section.get("balance", "") or ("category" if section.draw == "any" else "")
  rows = _mixed(draws.cells(store.info, index, balance), seed)
  examples = rows.random_map(Examples(store, task, augment, section.draw, section.exclude_fold))
  share = section.batch_size // processes
  # without drop_remainder Grain rounds the endless length up, beyond what len() may return at 1
  batches = _Share(examples, section.batch_size, process * share, share).batch(share,
                                                                               drop_remainder=True)
  options = grain.ReadOptions(num_threads=config.data.threads,
                              prefetch_buffer_size=max(1, 2 * config.data.threads))
  return batches.to_iter_dataset(options)


class _Share(grain.MapDataset):
  """Examples first .. first + count of each batch: what lies together in the global batch."""

  def __init__(self, examples: grain.MapDataset, batch_size: int, first: int, count: int):
    super().__init__(examples)
    self._batch_size, self._first, self._count = batch_size, first, count

  def __len__(self) -> int:
    return len(self.parents[0]) // self._batch_size * self._count

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    batch, place = divmod(index, self._count)
    return self.parents[0][batch * self._batch_size + self._first + place]


def _mixed(cells: list[np.ndarray], seed: int) -> grain.MapDataset:
  """Endless rows: of each cell a shuffled pass after another, as many of each."""
  if len(cells) == 1:
    return grain.MapDataset.source(cells[0]).seed(seed).shuffle().repeat()
  parts = [grain.MapDataset.source(rows).seed(int(s)).shuffle().repeat() for rows, s in
           zip(cells, np.random.SeedSequence(seed).generate_state(len(cells)), strict=True)]
  mixed = grain.MapDataset.mix(parts)
  # Grain mixes in turn: with two processes one would see every other cell only
  return grain.experimental.WindowShuffleMapDataset(mixed, window_size=len(cells),
                                                    seed=seed).seed(seed)


def example_batch(task: Task, info: Info, draw: str = "pair") -> dict[str, np.ndarray]:
  """A batch of one example of zeros, in the shapes of training by `draw`."""
  space = (1, *task.size)
  single = draw == "single"
  images = {"source": 1 if single else task.channels(info),
            "target": 1 if single else task.target_channels,
            "valid": 1, "target_valid": 1, "mask": 1}
  numbers = ("source_modality", "target_modality", "subject", "volume", "slice", "fold")
  return {**{n: np.zeros((*space, c), np.float32) for n, c in images.items()},
          **{n: np.zeros(1, np.int32) for n in numbers}, "paired": np.zeros(1, np.float32)}
