"""How a run is stored. The only file that knows Orbax.

RUN/config.json, RUN/dataset.json       what the run was made from
RUN/<stage>/frozen/                     served states of the stages that this one needs, once
RUN/<stage>/checkpoints/<step>/         state, data iterator and validation score; latest and best
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import grain
import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from medsynth_jax import processes
from medsynth_jax.contract import State
from medsynth_jax.errors import UserError

SPARE = 2**20  # bytes of free disk beside a checkpoint
SCORE = "mae"  # masked, of served synthesis on validation subjects: the lowest is the best


class Checkpoints:
  """The checkpoints of one stage: the latest, and the best by validation score."""

  def __init__(self, stage_folder: Path):
    self.folder = Path(stage_folder).absolute() / "checkpoints"
    keep = policies.AnyPreservationPolicy([
      policies.LatestN(1),
      policies.BestN(get_metric_fn=lambda m: m[SCORE], n=1, reverse=True,
                     keep_checkpoints_without_metrics=False)])
    self._manager = ocp.CheckpointManager(
      self.folder, options=ocp.CheckpointManagerOptions(
        preservation_policy=keep, best_fn=lambda m: m[SCORE], best_mode="min"))

  def __enter__(self):
    return self

  def __exit__(self, kind, error, trace):
    if not processes.lost(error):  # a save that waits for a process that is gone would wait long
      self._manager.close()

  def latest(self) -> int | None:
    """The last saved step, or None."""
    return self._manager.latest_step()

  def best(self) -> int | None:
    """The step of the lowest validation score; the latest where nothing was validated."""
    scores = {step: self.score(step) for step in self._manager.all_steps()}
    scored = [(score, -step) for step, score in scores.items() if score is not None]
    return -min(scored)[1] if scored else self.latest()

  def score(self, step: int) -> float | None:
    """Validation score of a saved step, or None where it was saved without one."""
    metrics = self._manager.metrics(step)
    return metrics[SCORE] if metrics else None

  def save(self, step: int, state: State, batches: Any, score: float | None) -> None:
    """Saves in the background; `state.frozen` is stored apart, by `save_frozen`.

    Raises:
      UserError: too little space on the disk, told before anything is written.
    """
    size = sum(x.nbytes for x in jax.tree.leaves((state.nets, state.opts, state.aux)))
    free = shutil.disk_usage(self.folder).free
    if free < size + SPARE:
      raise UserError(f"{self.folder}: the disk is full ({free / 1e6:.0f} MB free, a checkpoint"
                      f" takes {size / 1e6:.0f} MB); free space and run the same command again,"
                      " it continues")
    self._manager.save(
      step, metrics=None if score is None else {SCORE: score},
      args=ocp.args.Composite(state=ocp.args.StandardSave(state.replace(frozen={})),
                              data=grain.checkpoint.CheckpointSave(batches)))

  def restore(self, step: int, shape: State, batches: Any = None) -> State:
    """The state of a step, in the shapes and shardings of `shape`; sets the iterator, if given."""
    args = ocp.args.Composite(state=ocp.args.StandardRestore(shape.replace(frozen={})))
    state = self._manager.restore(step, args=args).state
    if batches is not None:  # the place in the order of batches, the same on every process:
      # Grain would ask for as many files as there are processes now
      (place, *_) = (self.folder / str(step) / "data").glob("process_0-of-*.json")
      batches.set_state(json.loads(place.read_text()))
    return state.replace(frozen=shape.frozen)

  def wait(self) -> None:
    """Returns when the last save is on disk."""
    self._manager.wait_until_finished()


def last_step(stage_folder: Path) -> int | None:
  """The last saved step of a stage, or None."""
  if not (Path(stage_folder) / "checkpoints").is_dir():
    return None
  with Checkpoints(stage_folder) as checkpoints:
    return checkpoints.latest()


def save_frozen(stage_folder: Path, frozen: dict[str, State]) -> None:
  """Stores the served states of earlier stages, once; a finished copy is left as it is."""
  folder = Path(stage_folder).absolute() / "frozen"
  if frozen and not folder.exists():
    with ocp.StandardCheckpointer() as checkpointer:
      checkpointer.save(folder, frozen)


def load_frozen(stage_folder: Path, shapes: dict[str, State]) -> dict[str, State]:
  """The frozen states of a stage, in the shapes and shardings given."""
  if not shapes:
    return {}
  with ocp.StandardCheckpointer() as checkpointer:
    return checkpointer.restore(Path(stage_folder).absolute() / "frozen", shapes)


def load_state(stage_folder: Path, shape: State, which: str = "best") -> tuple[State, int]:
  """(state without frozen ones, step) of a stage; `which` is "best" or "latest".

  Raises:
    UserError: the stage has no checkpoint.
  """
  if not (Path(stage_folder) / "checkpoints").is_dir():
    raise UserError(f"{stage_folder}: no checkpoint; train with `python -m medsynth_jax.main`")
  with Checkpoints(stage_folder) as checkpoints:
    step = checkpoints.best() if which == "best" else checkpoints.latest()
    if step is None:
      raise UserError(f"{stage_folder}: no checkpoint yet; let the training run to its first save")
    try:
      return checkpoints.restore(step, shape.replace(frozen={})), step
    except (ValueError, OSError, KeyError) as error:
      raise UserError(f"{checkpoints.folder}/{step}: the checkpoint is damaged"
                      f" ({str(error).splitlines()[0][:120]}); delete that folder and continue the"
                      " training, or take the other one by --checkpoint") from None


def write_text(path: Path, text: str) -> None:
  """Writes a file whole or not at all."""
  partial = path.with_name(path.name + ".partial")
  partial.write_text(text)
  os.replace(partial, path)


def read_config(run: Path) -> dict[str, Any]:
  """RUN/config.json as nested fields; UserError where RUN is no run folder."""
  path = Path(run) / "config.json"
  if not path.is_file():
    raise UserError(f"{run}: no config.json, so this is no run folder;"
                    " train with `python -m medsynth_jax.main --workdir=...` first")
  try:
    return json.loads(path.read_text())
  except json.JSONDecodeError as error:
    raise UserError(f"{path}: damaged ({error}); train again in a new --workdir") from None
