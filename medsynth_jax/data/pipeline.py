"""Training batches: a deterministic Grain pipeline over the slices (or patches) of a data set."""

import dataclasses

import grain
import numpy as np
from ml_collections import ConfigDict
from scipy import ndimage

from medsynth_jax.data import draws, fusion
from medsynth_jax.data.dataset import Info, Store
from medsynth_jax.data.examples import (
  BACKGROUND,
  Task,
  case_image,
  case_source,
  case_target,
  case_valid,
  neighbours,
  single_images,
  stack_context,
  usable,
)
from medsynth_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Augment:
  """Random in-plane transforms, one draw for all modalities of an example, and source intensities.

  flip: left-right mirror with probability 1/2; rotate: degrees; shift, scale: shares of the size;
  zoom: fixed magnification (1.117 with shift 0.058 is pix2pix's 286 -> random crop 256);
  misalign: level n of a simulated misalignment, drawn for source and target apart (RegGAN).
  gamma, contrast: the source's share u of its range becomes c u^g, with log g in -+gamma and c in
  1 -+ contrast; background stays. Scanners differ like that where a modality has no units.
  """
  flip: bool = False
  rotate: float = 0.0
  shift: float = 0.0
  scale: float = 0.0
  zoom: float = 1.0
  gamma: float = 0.0
  contrast: float = 0.0
  misalign: float = 0.0


def make_augment(augment: ConfigDict, misalign: float, info: Info) -> Augment:
  """The augmentation of a stage; a UserError where a left-right flip has no axis in the slice."""
  if augment.flip and info.plane == 0:
    raise UserError("data.augment.flip mirrors left and right, which a sagittal slice does not"
                    " hold; set it to False")
  return Augment(**augment.to_dict(), misalign=misalign)


def skipped(info: Info, task: Task) -> dict[str, int]:
  """{target: training cases that cannot be used for it}, to be told to the user."""
  train = info.split("train")
  return {t: sum(not usable(c, task, t) for c in train) for t in task.targets}


class Examples:
  """Turns a row of the training index into one example; a Grain random map."""

  def __init__(self, store: Store, task: Task, augment: Augment, draw: str = "pair"):
    self.store, self.task, self.augment = store, task, augment
    self.singles = single_images(task, store.info) if draw == "single" else ()
    self.subjects = {s: i for i, s in enumerate(sorted({c.subject for c in store.info.cases}))}

  def __call__(self, row: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
    volume, k, number = (int(x) for x in row)
    info, task = self.store.info, self.task
    case = info.cases[volume]
    count = case.shape[info.plane]
    deep = len(task.size) == 3
    if deep:
      first, depth = _depth_window(k, count, task.size[0], rng)
      numbers, centre = np.arange(first, first + depth), slice(None)
    else:
      numbers, centre = neighbours(k, count, task.context), slice(task.context, task.context + 1)
    arrays = self.store.slices(case, numbers)
    sides, source, target, valid = self._images(arrays, case, number)
    mask = valid & arrays["mask"]
    if not deep:
      source = stack_context(source)[None]
    if sides[0] in task.sources:
      # from a stream of its own, so that these fields change no other draw
      source = _recoloured(source, self.augment, rng.spawn(1)[0])
    target = source if self.singles else target[centre]
    parts = self._augmented(source, target, valid[centre], mask[centre], rng)
    example = dict(zip(("source", "target", "valid", "mask"), parts, strict=True))
    if deep:
      example = {n: _fit_depth(x, task.size[0], n) for n, x in example.items()}
    else:
      example = {n: x[0] for n, x in example.items()}
    return {**example, "source_modality": np.int32(info.index(sides[0])),
            "target_modality": np.int32(info.index(sides[1])),
            "subject": np.int32(self.subjects[case.subject]), "volume": np.int32(volume),
            "slice": np.int32(k), "fold": np.int32(case.fold), "paired": np.float32(1)}

  def _images(self, arrays, case, number):
    """(source's and target's names), source, target and where they were measured, of a row."""
    task, info = self.task, self.store.info
    if self.singles:
      name, channel = self.singles[number]
      image = case_image(arrays, case, name, channel)
      return (name, name), image, image, arrays["valid"][name]
    target = task.targets[number]
    return ((task.sources[0], target), case_source(arrays, case, task, info),
            case_target(arrays, case, task, info, target), case_valid(arrays, case, task, target))

  def _augmented(self, source, target, valid, mask, rng):
    """Warps, mirrors, crops: [n, H, W, ...] -> [n, *in-plane size, C], one draw for all."""
    a, plane = self.augment, self.task.size[-2:]
    flip = a.flip and rng.random() < 0.5
    shared = _transform(rng, a.rotate, a.shift, a.scale, a.zoom, source.shape[1:3])
    sides = [_transform(rng, a.misalign, 0.02 * a.misalign, 0.02 * a.misalign, 1.0,
                        source.shape[1:3]) for _ in range(2)]
    corner = tuple(int(rng.integers(0, max(0, n - m) + 1))
                   for n, m in zip(source.shape[1:3], plane, strict=True))
    parts = []
    for array, side, order in ((source, 0, 1), (target, 1, 1), (valid, None, 0), (mask, None, 0)):
      array = array if array.ndim == 4 else array[..., None].astype(np.float32)
      if side is None:  # measured where both sides are: the target's warp, then the source's
        warped = np.minimum(_warp(array, shared @ sides[0], 0), _warp(array, shared @ sides[1], 0))
      else:
        warped = _warp(array, shared @ sides[side], order)
      if flip:
        warped = warped[:, ::-1]
      parts.append(_window(warped, corner, plane, 0.0 if side is None else BACKGROUND))
    return parts


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


def _transform(rng, rotate: float, shift: float, scale: float, zoom: float, shape) -> np.ndarray:
  """A random 3x3 map from output to input pixels about the slice's centre.

  Always takes the same four numbers from `rng`, so that a field changes no other draw.
  """
  angle, zoom_by, *moved = rng.uniform(-1, 1, 4)
  angle, factor = np.deg2rad(rotate * angle), zoom * (1 + scale * zoom_by)
  linear = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) / factor
  centre = (np.array(shape) - 1) / 2
  matrix = np.eye(3)
  matrix[:2, :2] = linear
  matrix[:2, 2] = centre - linear @ centre - shift * np.array(moved) * np.array(shape)
  return matrix


def _recoloured(source: np.ndarray, augment: Augment, rng: np.random.Generator) -> np.ndarray:
  """The source with another gamma and contrast; -1 stays -1."""
  if not (augment.gamma or augment.contrast):
    return source
  power, factor = rng.uniform(-1, 1, 2)
  share = np.clip((source + 1) / 2, 0, 1) ** np.exp(augment.gamma * power)
  share = np.clip(share * (1 + augment.contrast * factor), 0, 1)
  return (2 * share - 1).astype(np.float32)


def _warp(array: np.ndarray, matrix: np.ndarray, order: int) -> np.ndarray:
  """Every slice and channel of [n, H, W, C] through one in-plane map; outside: background."""
  if np.array_equal(matrix, np.eye(3)):
    return array
  fill = BACKGROUND if order else 0.0
  out = np.empty_like(array)
  for n in range(array.shape[0]):
    for c in range(array.shape[-1]):
      ndimage.affine_transform(array[n, ..., c], matrix[:2, :2], matrix[:2, 2], order=order,
                               cval=fill, output=out[n, ..., c])
  return out


def _window(array: np.ndarray, corner, plane, fill: float) -> np.ndarray:
  """Crops [n, H, W, C] at `corner`, or pads about the centre, to the in-plane size."""
  (i, j), (h, w) = corner, plane
  array = array[:, i:i + h, j:j + w]
  pads = [((m - n) // 2, m - n - (m - n) // 2)
          for n, m in zip(array.shape[1:3], plane, strict=True)]
  if any(a or b for a, b in pads):
    array = np.pad(array, ((0, 0), *pads, (0, 0)), constant_values=fill)
  return np.ascontiguousarray(array)


def training(store: Store, task: Task, augment: Augment, section: ConfigDict, config: ConfigDict,
             stage: int, process: int = 0, processes: int = 1) -> grain.IterDataset:
  """An endless, checkpointable iterator of this process's share of the training batches.

  Slicing by process comes after shuffling and repeating, so that global batch k is the same set of
  examples for any number of processes. With `section.balance` every cell (see `draws.cells`) gives
  one example to each run of as many examples as there are cells, in random order.

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
  rows = _mixed(draws.cells(store.info, index, section.get("balance", "")), seed)
  examples = rows.random_map(Examples(store, task, augment, section.draw))
  # without drop_remainder Grain rounds the endless length up, beyond what len() may return at 1
  batches = examples[process::processes].batch(section.batch_size // processes,
                                               drop_remainder=True)
  options = grain.ReadOptions(num_threads=config.data.threads,
                              prefetch_buffer_size=max(1, 2 * config.data.threads))
  return batches.to_iter_dataset(options)


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
            "target": 1 if single else task.target_channels, "valid": 1, "mask": 1}
  numbers = ("source_modality", "target_modality", "subject", "volume", "slice", "fold")
  return {**{n: np.zeros((*space, c), np.float32) for n, c in images.items()},
          **{n: np.zeros(1, np.int32) for n in numbers}, "paired": np.zeros(1, np.float32)}
