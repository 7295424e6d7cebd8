"""Whole volumes through a network of fixed size: slices or windows in jitted batches."""

import collections
import itertools
from collections.abc import Callable, Iterator

import jax
import numpy as np

from medsynth_jax.data.examples import BACKGROUND, Task, neighbours, stack_context


def starts(length: int, size: int, overlap: float) -> list[int]:
  """First positions of windows of `size` that cover `length`, evenly spread.

  A shorter axis gets one window that holds it in the middle (a negative start).
  """
  if length <= size:
    return [-((size - length) // 2)]
  count = int(np.ceil((length - size) / (size * (1 - overlap)))) + 1
  return sorted({int(s) for s in np.round(np.linspace(0, length - size, count))})


def blending(size: tuple[int, ...], counts: tuple[int, ...]) -> np.ndarray:
  """Weights of a window [*size, 1]: a triangle along each axis that has several windows."""
  weight = np.ones(size, np.float32)
  for axis, (n, count) in enumerate(zip(size, counts, strict=True)):
    if count > 1:
      ramp = np.minimum(np.arange(1, n + 1), np.arange(n, 0, -1)) / ((n + 1) // 2)
      weight = weight * np.expand_dims(ramp, tuple(i for i in range(len(size)) if i != axis))
  return weight[..., None].astype(np.float32)


def cut(volume: np.ndarray, start: tuple[int, ...], size: tuple[int, ...]) -> np.ndarray:
  """A window of [*space, C]; what lies outside the volume is background."""
  inner = tuple(slice(max(0, s), s + n) for s, n in zip(start, size, strict=True))
  part = volume[inner]
  before = [max(0, -s) for s in start]
  pads = [(b, n - b - m) for b, n, m in zip(before, size, part.shape, strict=False)]
  if not any(a or b for a, b in pads):
    return part
  return np.pad(part, [*pads, (0, 0)], constant_values=BACKGROUND)


def _windows(shape: tuple[int, ...], task: Task, overlap: float) -> Iterator[tuple[tuple, int]]:
  """(start of the window [3], number of its slice) of every window of a volume."""
  size = task.size if len(task.size) == 3 else (1, *task.size)
  along = [starts(n, s, overlap) for n, s in zip(shape[:3], size, strict=True)]
  if len(task.size) == 3:
    along[0] = [max(0, s) for s in along[0]]  # training pads a short volume at its end
  for start in itertools.product(*along):
    yield start, start[0]


def count(shape: tuple[int, ...], task: Task, overlap: float = 0.25) -> int:
  """Number of windows that `synthesise` makes of a volume [n, H, W, C]."""
  return sum(1 for _ in _windows(shape, task, overlap))


def synthesise(predict: Callable, state, source: np.ndarray, task: Task, *, source_modality: int,
               target_modality: int, key: jax.Array, batch_size: int, overlap: float = 0.25,
               target: np.ndarray | None = None, put: Callable = jax.device_put,
               numbers: np.ndarray | None = None, progress: Callable = lambda n: None,
               sample: int = 0) -> np.ndarray:
  """The synthetic image of a volume.

  Args:
    predict: jitted `method.synthesize`.
    source: [n, H, W, C] model units, without context.
    target: [n, H, W, C'], only for methods that see the target.
    put: puts a host batch on the devices.
    numbers: make these slices only (2-D); others stay background.
    progress: called with the number of windows done.
    sample: number of the random draw, for methods that make another image each time.

  Returns:
    float32 [n, H, W, channels] in [-1, 1].
  """
  deep = len(task.size) == 3
  size = task.size if deep else (1, *task.size)
  jobs = list(_windows(source.shape, task, overlap))
  if numbers is not None and not deep:
    wanted = set(int(n) for n in numbers)
    jobs = [job for job in jobs if job[1] in wanted]
  if not jobs:
    return np.full((*source.shape[:3], 1), BACKGROUND, np.float32)
  counts = tuple(len({job[0][axis] for job in jobs}) for axis in range(3))
  weight = blending(size, counts if deep else (1, *counts[1:]))
  total = mass = None
  pending = collections.deque()

  def collect():
    nonlocal total, mass
    images, chunk = pending.popleft()
    images = np.asarray(images)[:len(chunk)].reshape(len(chunk), *size, -1)
    if total is None:
      total = np.zeros((*source.shape[:3], images.shape[-1]), np.float32)
      mass = np.zeros((*source.shape[:3], 1), np.float32)
    for image, (start, _) in zip(images, chunk, strict=True):
      _add(total, image * weight, start)
      _add(mass, weight, start)
    progress(len(chunk))

  for first in range(0, len(jobs), batch_size):
    chunk = jobs[first:first + batch_size]
    batch = _batch(source, target, task, size, chunk, batch_size)
    batch["source_modality"] = np.full(batch_size, source_modality, np.int32)
    batch["target_modality"] = np.full(batch_size, target_modality, np.int32)
    batch["sample"] = np.full(batch_size, sample, np.int32)
    pending.append((predict(state, put(batch), key), chunk))
    if len(pending) > 2:  # the device works on while the host collects
      collect()
  while pending:
    collect()
  return np.where(mass > 0, total / np.maximum(mass, 1e-6), BACKGROUND)


def _batch(source, target, task: Task, size, chunk, batch_size: int) -> dict[str, np.ndarray]:
  filled = chunk + [chunk[-1]] * (batch_size - len(chunk))
  deep = len(task.size) == 3
  def window(volume, start, context):
    if deep:
      return cut(volume, start, size)
    slices = volume[neighbours(start[0], len(volume), context)]
    return cut(stack_context(slices), start[1:], task.size)
  batch = {"source": np.stack([window(source, s, task.context) for s, _ in filled]),
           "slice": np.array([k for _, k in filled], np.int32),
           "weight": np.array([i < len(chunk) for i in range(batch_size)], np.float32)}
  if target is not None:
    batch["target"] = np.stack([window(target, s, 0) for s, _ in filled])
  return batch


def _add(total: np.ndarray, part: np.ndarray, start: tuple[int, ...]) -> None:
  """Adds a window to the volume, without what lies outside it."""
  inside, used = [], []
  for s, n, m in zip(start, part.shape, total.shape, strict=False):
    inside.append(slice(max(0, s), min(m, s + n)))
    used.append(slice(max(0, -s), max(0, -s) + min(m, s + n) - max(0, s)))
  total[tuple(inside[:3])] += part[tuple(used[:3])]
