"""What a training run tells: a progress bar, train.jsonl, TensorBoard scalars and image panels."""

import json
import time
from pathlib import Path

import numpy as np
from tensorboardX import SummaryWriter
from tqdm import tqdm

from medsynth_jax.checkpoint import write_text


class Log:
  """The log of one stage; only the first process writes."""

  def __init__(self, folder: Path, stage: str, step: int, steps: int, images_per_step: int,
               writes: bool = True):
    self.path = Path(folder) / "train.jsonl"
    self.writes, self._per_step = writes, images_per_step
    self._last = (time.perf_counter(), step)
    self._bar = tqdm(total=steps, initial=step, desc=stage, unit="step", disable=not writes,
                     mininterval=1.0, dynamic_ncols=True)
    self._board = None
    if writes:
      Path(folder).mkdir(parents=True, exist_ok=True)
      self._forget_after(step)
      self._board = SummaryWriter(str(folder), purge_step=step + 1 if step else None)

  def _forget_after(self, step: int) -> None:
    """Drops lines beyond the step that a resumed run starts from."""
    if self.path.exists():
      lines = self.path.read_text().splitlines()
      write_text(self.path, "".join(f"{x}\n" for x in lines if _step(x) <= step))

  def advance(self) -> None:
    self._bar.update()

  def training(self, step: int, values: dict[str, float]) -> None:
    """Logs a training step's metrics with the speed since the last ones."""
    now, (then, before) = time.perf_counter(), self._last
    if step > before:
      values = {**values, "images_per_second": (step - before) * self._per_step / (now - then)}
      self._last = (now, step)
    self._bar.set_postfix({k: f"{v:.4g}" for k, v in values.items()}, refresh=False)
    self.scalars(step, values)

  def scalars(self, step: int, values: dict[str, float]) -> None:
    """Appends a line to train.jsonl and points to TensorBoard."""
    if not self.writes:
      return
    with self.path.open("a") as file:
      file.write(json.dumps({"step": step, **values}) + "\n")
    for name, value in values.items():
      self._board.add_scalar(name, value, step)

  def image(self, step: int, name: str, image: np.ndarray) -> None:
    """A picture [H, W] or [H, W, 3] in 0..1 for TensorBoard."""
    if self.writes:
      self._board.add_image(name, image, step, dataformats="HW" if image.ndim == 2 else "HWC")

  def paused(self) -> None:
    """Leaves time that was no training (validation, saving) out of the speed."""
    self._last = (time.perf_counter(), self._bar.n)

  def close(self) -> None:
    self._bar.close()
    if self._board:
      self._board.close()


def _step(line: str) -> float:
  """The step of a line; infinity if the line was cut off."""
  try:
    return json.loads(line)["step"]
  except json.JSONDecodeError:
    return float("inf")
