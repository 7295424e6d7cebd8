"""The images (and flows) that a trained stage makes of held-out volumes, and the time they take."""

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from medsynth_jax import sharding, timing, windows
from medsynth_jax.data.dataset import Case
from medsynth_jax.results import Stage
from medsynth_jax.run import Run
from medsynth_jax.scorer import Volume
from medsynth_jax.scoring import scale_of


def samples(here: Run, stage: str) -> int:
  """Of how many samples a stage's scored image is the mean; one where all would be the same."""
  return here.config.synthesis.samples if here.methods[stage].stochastic else 1


def count(here: Run, case: Case) -> int:
  """Network inputs that a case is cut into."""
  plane = here.info.plane
  shape = (case.shape[plane], *np.delete(case.shape, plane))
  return windows.count(shape, here.task, here.config.synthesis.overlap)


class Maker:
  """Makes the images of a trained stage and takes the time."""

  def __init__(self, here: Run, stage: str, which: str, progress: Callable[[int], Any]):
    self.run, self.stage, self.progress = here, stage, progress
    self.method, self.samples, self.times = here.methods[stage], samples(here, stage), []
    with here.tracing():
      self.predict = here.predictor(stage)
      self.state, self.step = here.restore(stage, which)

  def image(self, volume: Volume, target: str, truth: np.ndarray | None
            ) -> tuple[np.ndarray, np.ndarray]:
    """The image of a volume's source as a target, [n, H, W] or in colours [n, H, W, 3].

    Returns (in the unit of scores, in [-1, 1]), each the mean of the samples. `truth` is what a
    bound sees.
    """
    here, then, scored, model = self.run, time.perf_counter(), 0.0, 0.0
    scale = scale_of(here.info.modality(target))
    for sample in range(self.samples):
      image = self._made(self.predict, volume, target, truth, progress=self.progress, sample=sample)
      image = image if scale.colour else image[..., 0]
      scored = scored + scale.prediction(image) / self.samples
      model = model + image / self.samples
    self.times.append((count(here, volume.case), time.perf_counter() - then))
    return scored, model

  def flow(self, volume: Volume, target: str, shown: np.ndarray) -> np.ndarray:
    """The flow [n, H, W, 2] in pixels from a volume's image to `shown`, a target in model units.

    Slices without a voxel to score hold nothing of use.
    """
    numbers = np.flatnonzero(volume.mask.any((1, 2)))
    return self._made(self._flow, volume, target, shown, numbers=numbers)

  @functools.cached_property
  def _flow(self) -> Callable:
    def flow(state, batch, key):
      del key
      return self.method.flow(state, batch)
    return jax.jit(flow, out_shardings=sharding.replicated(self.run.mesh))

  def _made(self, predict: Callable, volume: Volume, target: str, truth: np.ndarray | None,
            **how: Any) -> np.ndarray:
    """What a compiled function gives for all windows of a volume, [n, H, W, C]."""
    here, settings = self.run, self.run.config.synthesis
    with here.tracing():
      return windows.synthesise(
        predict, self.state, volume.source, here.task,
        source_modality=here.info.index(here.task.sources[0]),
        target_modality=here.info.index(target), key=here.key(self.stage),
        batch_size=settings.batch_size, overlap=settings.overlap, target=truth, put=here.put, **how)

  def row(self) -> Stage:
    """The stage as a row of the table."""
    return Stage(self.step, self.method.sees_target, self.samples, self.method.note,
                 timing.speed(self.times, self.samples, self.run.compile_seconds[self.stage]))
