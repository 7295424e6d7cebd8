"""How long a run's stages took to train and take to make an image."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np


@dataclasses.dataclass(frozen=True)
class Speed:
  """Seconds that synthesis takes: for one window (a slice, a 3-D patch) of one sample, for a volume
  with all its samples, and to compile."""
  window: float
  volume: float
  compiling: float


def speed(times: Sequence[tuple[int, float]], samples: int, compiling: float) -> Speed:
  """The speed from (windows, seconds with all samples) of each volume, in order.

  Medians over the volumes after the first, which warms up, where there are several.
  """
  used = times[1:] or times
  return Speed(float(np.median([seconds / (windows * samples) for windows, seconds in used])),
               float(np.median([seconds for _, seconds in used])),
               compiling)


def trained(folder: Path, batch_size: int) -> tuple[int, float] | None:
  """(steps, seconds) of a stage's training, from the speed in its train.jsonl; None without it.

  Compiling, validating and saving do not count. Steps between a pause and the next line are taken
  to be as fast as that line says, those behind the last line as fast as the last.
  """
  path = folder / "train.jsonl"
  lines = [json.loads(x) for x in path.read_text().splitlines()] if path.is_file() else []
  step, seconds, each = 0, 0.0, None
  for line in lines:
    if "images_per_second" in line:
      each = batch_size / line["images_per_second"]
      seconds, step = seconds + (line["step"] - step) * each, line["step"]
  if each is None:
    return None
  last = max(line["step"] for line in lines)
  return last, seconds + (last - step) * each
