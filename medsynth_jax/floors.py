"""The rows of an evaluation that need no network: the floor, the identity, the ceiling."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from medsynth_jax import scoring
from medsynth_jax.data.dataset import CEILING, Case, Info
from medsynth_jax.data.examples import Task, fused
from medsynth_jax.errors import UserError
from medsynth_jax.metrics.baselines import Floor

CHOOSE = 8  # training volumes by which the source channel is chosen


@dataclasses.dataclass(frozen=True)
class Fitted:
  """The fitted floor of a target: one `Floor` a channel of it."""
  parts: tuple[Floor, ...]

  @property
  def channel(self) -> int | list[int]:
    """The source channel that the tables read (of each channel of a fusion)."""
    found = [part.channel for part in self.parts]
    return found[0] if len(found) == 1 else found

  @property
  def constant(self) -> float:
    """The mean of a target of one channel, in the unit of scores."""
    (part,) = self.parts
    return float(part.fitted["constant"])

  def predict(self, source: np.ndarray, spacing) -> dict[str, np.ndarray]:
    """{row: image [n, H, W], or [n, H, W, C] of several channels}; see `Floor.predict`."""
    rows = [part.predict(source, spacing) for part in self.parts]
    return rows[0] if len(rows) == 1 else {r: np.stack([x[r] for x in rows], -1) for r in rows[0]}


@dataclasses.dataclass(frozen=True)
class Constant:
  """The floor of a direction that no training subject has both sides of: the target's mean, in the
  unit of scores."""
  constant: float
  channel: None = None

  def predict(self, source: np.ndarray, spacing) -> dict[str, np.ndarray]:
    """{"constant": image [n, H, W]}."""
    del spacing
    return {"constant": np.full(source.shape[:3], self.constant, np.float32)}


class Fit:
  """The floor of one direction in the making: `add` each training volume that has both sides.

  Its tables read the source channel that tells most, chosen by the first CHOOSE volumes. A CT has a
  channel for each of its windows, and a table over all of -1024..3071 HU would see all soft tissue
  as one bin: a floor too easily passed. Holds tables and mean images, no volume.

  Args:
    channels: of the source.
    common_grid: whether a mean image makes sense.
    direction: for messages.
  """

  def __init__(self, *, channels: int, common_grid: bool, direction: str):
    self.channels, self.common_grid, self.direction = channels, common_grid, direction
    self._number, self._fitted = 0, []  # of each target channel a Floor for each source channel

  def add(self, source: np.ndarray, target: np.ndarray, mask: np.ndarray, spacing) -> None:
    """Source [n, H, W, C] in model units, target [n, H, W] or [n, H, W, 3] in the unit of scores,
    mask [n, H, W], spacing in mm."""
    parts = np.moveaxis(target, -1, 0) if target.ndim == 4 else target[None]
    if not self._fitted:
      self._fitted = [[Floor(self.common_grid and i == 0, channel=i) for i in range(self.channels)]
                      for _ in parts]
    if self._number == CHOOSE:
      self._fitted = [[_best(floors)] for floors in self._fitted]
    for floors, part in zip(self._fitted, parts, strict=True):
      for floor in floors:
        floor.add(source, part, mask, spacing)
    self._number += 1

  def done(self) -> Fitted:
    """The fitted floor.

    Raises:
      UserError: no training voxel.
    """
    if not self._fitted or not self._fitted[0][0].lut.count.sum():
      raise UserError(f"{self.direction}: no training subject has both inside its mask, so that the"
                      " floor of the table cannot be fitted; prepare the data set again")
    return Fitted(tuple(_best(floors).fit() for floors in self._fitted))


class Mean:
  """The mean of a direction's target, of which no training subject has both sides."""

  def __init__(self, direction: str):
    self.direction, self._sum, self._size = direction, 0.0, 0

  def add(self, voxels: np.ndarray) -> None:
    """A training target's voxels in its mask, float64."""
    self._sum += voxels.sum()
    self._size += voxels.size

  def done(self) -> Constant:
    """The floor.

    Raises:
      UserError: there were no voxels.
    """
    if not self._size:
      raise UserError(f"{self.direction}: no training subject shows the target in its mask, so"
                      " that there is no floor to compare with; prepare the data set with such a"
                      " subject")
    return Constant(float(self._sum / self._size))


def _best(fitted: Sequence[Floor]) -> Floor:
  """The floor whose lut2 explains most of the target's variance, with the mean image of all."""
  def between(floor):
    return (floor.lut2.total ** 2 / np.maximum(floor.lut2.count, 1)).sum()
  best = max(fitted, key=between)
  best.image = fitted[0].image
  return best


def identity(source: np.ndarray, shown: Mapping[str, np.ndarray], task: Task, info: Info,
             target: str) -> tuple[str, np.ndarray]:
  """(row name, the source taken for the target), in the unit of the target's scores.

  `identity` keeps HU and SUV; else `identity_normalised` takes the first source channel as if a
  network had made it. A fusion's is the MR without uptake. `source` [n, H, W, C] model units;
  `shown` {source: physical volume}.
  """
  modality = info.modality(target)
  scale = scoring.scale_of(modality)
  if scale.colour:
    return "identity", fused(source, np.zeros(source.shape[:3], np.float32))
  same = [m for m in task.sources if not scale.own and info.modality(m).type == modality.type
          and info.modality(m).unit == modality.unit]
  if not same:
    return "identity_normalised", scale.prediction(source[..., 0])
  there = [m for m in same if m in shown]
  if not there:  # a source that data.missing=zero filled with background
    return "identity", np.full(source.shape[:3], scale.background, np.float32)
  return "identity", scale.reference(shown[there[0]], modality.typical)


def has_ceiling(info: Info, task: Task, target: str, cases: Sequence[Case]) -> bool:
  """Whether simulated data hold the noise-free target (a fusion's PET) for these sources."""
  made_for = info.notes.get("ceiling_sources")
  if made_for is not None and set(made_for) != set(task.sources):
    return False
  return all(CEILING + task.measured(target) in case.images for case in cases)
