"""Units of modalities: fitted, invertible maps between physical values and the model's [-1, 1]."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Scaling:
  """A fitted, invertible map physical <-> [-1, 1]; `curve` is "linear" or "sqrt"."""
  curve: str
  low: float
  high: float


def to_model(scaling: Scaling, x, clip: bool = True):
  """Physical values to model units (NumPy or JAX arrays)."""
  unit = (x - scaling.low) / (scaling.high - scaling.low)
  if clip:
    unit = unit.clip(0.0, 1.0)
  if scaling.curve == "sqrt":
    unit = abs(unit) ** 0.5
  return 2.0 * unit - 1.0


def from_model(scaling: Scaling, y):
  """Model units back to physical values, the inverse of `to_model`."""
  unit = (y + 1.0) / 2.0
  if scaling.curve == "sqrt":
    unit = unit ** 2
  return unit * (scaling.high - scaling.low) + scaling.low
