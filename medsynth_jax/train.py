"""The one training loop, for every method: stages in order, exact resume, late metrics."""

import contextlib
import functools
import math
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np

from medsynth_jax import checkpoint, memory, serving, sharding, windows
from medsynth_jax.checkpoint import Checkpoints
from medsynth_jax.contract import State, create, served
from medsynth_jax.data import pipeline
from medsynth_jax.data.augment import make_augment
from medsynth_jax.data.dataset import Store
from medsynth_jax.data.examples import case_source, case_target, case_valid, usable
from medsynth_jax.errors import UserError
from medsynth_jax.log import Log
from medsynth_jax.run import Run


class Interrupted(Exception):
  """SIGTERM or Ctrl-C came; the state is saved."""


def train(run: Run, store: Store) -> None:
  """Trains the stages that are not finished, in the config's order.

  Raises:
    UserError: no training example, more memory than is free, or a loss that is not finite.
    Interrupted: asked to stop; everything is saved.
  """
  # all at once: what does not fit a later stage is told now, not after the hours of the first
  steps = {stage: compile_step(run, stage)[0] for stage, section in run.sections.items()
           if (checkpoint.last_step(run.folder / stage) or 0) < section.steps}
  for number, stage in enumerate(run.methods):
    train_stage(run, store, stage, number, steps.pop(stage, None))


def train_stage(run: Run, store: Store, stage: str, number: int, take: Callable | None) -> None:
  """Trains one stage from its latest checkpoint, or from the start, to its last step.

  `take` is its compiled step; a stage that has taken its last one needs none.
  """
  section, folder = run.sections[stage], run.folder / stage
  batches = training_batches(run, store, stage, number)
  with run.tracing(), Checkpoints(folder) as saved, _stop_signals() as stop:
    state = _start(run, stage, saved, batches)
    step = int(state.step)
    if step >= section.steps:
      if saved.latest() is None:  # taken from another run as it is
        saved.save(step, state, batches, None)
        saved.wait()
      return
    log = Log(folder, stage, step, section.steps, section.batch_size, sharding.is_first())
    validate = _Validation(run, store, stage, log)
    log.paused()  # it has compiled synthesis
    metrics = pending = None

    def save(validates=True):
      nonlocal pending
      if pending:
        log.training(pending[0], _check(pending[1], pending[0], folder))
        pending = None
      if metrics is not None:
        _check(metrics | finite(state.nets), step, folder)
      saved.save(step, state, batches, validate(state, step) if validates else None)
      log.paused()

    def leave():
      saved.wait()
      raise Interrupted(f"stage '{stage}' saved at step {step}; the same command continues")

    with contextlib.closing(log):
      first = step
      while step < section.steps:
        due = step > first and step % run.config.validate_every == 0
        # several processes have to leave together, so they ask each other at the same steps only
        if (jax.process_count() == 1 or step % run.config.log_every == 0) \
            and sharding.any_process(bool(stop)):
          if step > first or saved.latest() is None:
            save(validates=due)
          leave()
        if due:
          save()
        state, metrics = take(state, next(batches))
        step += 1
        if pending:  # fetched while the device works on the next step
          log.training(pending[0], _check(pending[1], pending[0], folder))
        pending = (step, metrics) if step % run.config.log_every == 0 else None
        log.advance()
      save()
      if sharding.any_process(bool(stop)):
        leave()
      saved.wait()


def training_batches(run: Run, store: Store, stage: str, number: int):
  """The endless iterator over a stage's training batches, some of them on the devices ahead."""
  store.open()
  section = run.sections[stage]
  augment = make_augment(run.config, section, run.info)
  source = pipeline.training(store, run.task, augment, section, run.config, number,
                             jax.process_index(), jax.process_count())
  return iter(grain.experimental.ThreadPrefetchIterDataset(
    source.map(functools.partial(sharding.put_batch, run.mesh)),
    prefetch_buffer_size=run.config.data.prefetch))


@jax.jit
def finite(nets):
  """{"weights": a number that is finite if all parameters are}."""
  return {"weights": sum(jnp.sum(x * 0.0) for x in jax.tree.leaves(nets))}


def _start(run: Run, stage: str, saved: Checkpoints, batches) -> State:
  """The state to go on from: the latest checkpoint, or a new one."""
  shape = run.shape(stage)
  latest = saved.latest()
  if latest is not None:
    frozen = checkpoint.load_frozen(run.folder / stage, shape.frozen)
    return saved.restore(latest, shape.replace(frozen=frozen), batches)
  section = run.sections[stage]
  frozen, start = _handed_over(run, stage), run.pretrained(stage)
  for net, earlier_stage in section.get("start", {}).items():
    folder = run.folder / earlier_stage
    start[net] = checkpoint.load_state(folder, run.shape(earlier_stage), "latest")[0].nets[net]
  checkpoint.save_frozen(run.folder / stage, frozen)
  return new_state(run, stage, frozen, start)


def new_state(run: Run, stage: str, frozen: dict[str, State], start: dict[str, Any]) -> State:
  """A stage's first state on the run's mesh; see `contract.create`."""
  example = pipeline.example_batch(run.task, run.info)
  places = jax.tree.map(lambda x: x.sharding, run.shape(stage))
  make = functools.partial(create, run.methods[stage])
  return jax.jit(make, out_shardings=places)(run.key(stage), example, frozen, start)


def _handed_over(run: Run, stage: str) -> dict[str, State]:
  """{earlier stage: its served state}, from its last checkpoint unless its handover is "best"."""
  frozen = {}
  for need in run.needs(stage):
    which = run.sections[need].get("handover", "latest")
    frozen[need] = run.restore(need, which)[0].replace(frozen={})
  return frozen


def batch_shapes(run: Run, stage: str) -> dict[str, jax.ShapeDtypeStruct]:
  """Shapes and shardings of a stage's training batches."""
  section = run.sections[stage]
  example = pipeline.example_batch(run.task, run.info, section.draw)
  return sharding.batch_shapes(run.mesh, example, section.batch_size)


def lower_step(run: Run, stage: str) -> jax.stages.Lowered:
  """(state, batch) -> (the next state, metrics), lowered from shapes alone for the run's mesh.

  The state is donated.
  """
  method, shape = run.methods[stage], run.shape(stage)
  def step(state, batch):
    new, metrics = method.step(state, batch, jax.random.fold_in(state.key, state.step))
    return new.replace(step=state.step + 1), metrics
  places = jax.tree.map(lambda x: x.sharding, shape)
  with run.tracing():
    return jax.jit(step, donate_argnums=0, out_shardings=(places, None)).lower(
      shape, batch_shapes(run, stage))


def compile_step(run: Run, stage: str):
  """(the training step of a stage compiled ahead of its state, the seconds that took).

  All processes have to ask together.

  Raises:
    UserError: step, state and the batches in flight need more memory than is free.
  """
  compiled, seconds = serving.compile_ahead(f"{stage}: training step",
                                            lambda: lower_step(run, stage))
  batches = [batch_shapes(run, stage)] * (1 + run.config.data.prefetch)
  memory.check(f"stage '{stage}': a training step of batch_size={run.sections[stage].batch_size}",
               compiled, (run.shape(stage), batches),
               memory.training_remedy(run.config, stage, run.methods[stage], run.mesh))
  return compiled, seconds


def _check(metrics, step: int, folder: Path) -> dict[str, float]:
  """Fetches metrics; a UserError where one is not finite."""
  values = {name: float(v) for name, v in jax.device_get(metrics).items()}
  bad = [name for name, v in values.items() if not math.isfinite(v)]
  if bad:
    raise UserError(f"{', '.join(bad)} not finite at step {step}: training stopped, the checkpoints"
                    f" in {folder} are from before; lower optim.lr or set optim.clip=1.0")
  return values


class _Validation:
  """Masked MAE in model units of served synthesis on the validation subjects."""

  def __init__(self, run: Run, store: Store, stage: str, log: Log):
    self.run, self.store, self.stage, self.log = run, store, stage, log
    self.method = run.methods[stage]
    views = run.views()
    pairs = [(view, case, target) for case in run.info.split("validation") for view in views
             for target in view.task.targets if usable(case, view.task, target)]
    # a stage without one fold only serves a later one, which takes its last state
    chosen = self.method.synthesize and run.sections[stage].exclude_fold < 0
    self.pairs = pairs if chosen else []
    # of all views: what is made from what only changes the numbers in the batch
    self.predict = run.predictor(stage, loaded=True) if self.pairs else None

  def __call__(self, state: State, step: int) -> float | None:
    """The score (mean over subjects), logged with a panel; None where nobody is held out."""
    if not self.pairs:
      return None
    shown = served(state, self.method.keeps)
    errors: dict[str, list[float]] = {}
    for i, (run, case, target) in enumerate(self.pairs):
      error, panel = self._case(shown, run, case, target)
      if error is not None:
        errors.setdefault(case.subject, []).append(error)
      if i == 0:
        self.log.image(step, f"validation/{case.name}", panel)
    if not errors:
      return None
    score = float(np.mean([np.mean(e) for e in errors.values()]))
    if not math.isfinite(score):
      raise UserError(f"stage '{self.stage}': synthesis on the validation subjects is not finite at"
                      f" step {step}; lower optim.lr or set optim.clip=1.0")
    self.log.scalars(step, {f"validation_{checkpoint.SCORE}": score})
    return score

  def _case(self, shown: State, run: Run, case, target: str):
    config = run.config
    arrays = self.store.volume(case)
    count = len(arrays["mask"])
    share = max(1, config.validation_slices // len(self.pairs))
    inside = np.flatnonzero(arrays["mask"].any((1, 2)))
    if not inside.size:
      raise UserError(f"validation case {case.name}: empty mask; check its `mask` in the table")
    spread = np.linspace(0, len(inside) - 1, min(share, len(inside)))
    numbers = inside[np.unique(spread.astype(int))]
    if len(run.task.size) == 3:
      numbers = np.arange(count)
    source = case_source(arrays, case, run.task, run.info)
    truth = case_target(arrays, case, run.task, run.info, target)
    image = windows.synthesise(
      self.predict, shown, source, run.task, source_modality=run.info.index(run.task.sources[0]),
      target_modality=run.info.index(target), key=run.key(self.stage),
      batch_size=config.synthesis.batch_size, overlap=config.synthesis.overlap, put=run.put,
      numbers=numbers, target=truth if self.method.sees_target else None)
    mask = (case_valid(arrays, case, run.task, target) & arrays["mask"])[numbers]
    error = np.abs(image - truth)[numbers].mean(-1)[mask]
    k = numbers[len(numbers) // 2]
    panel = np.concatenate([x[k].mean(-1).T[::-1] for x in (source[..., :1], truth, image)], 1)
    return (float(error.mean()) if error.size else None), (panel + 1) / 2


@contextlib.contextmanager
def _stop_signals():
  """A list that is not empty once SIGTERM or Ctrl-C has come (a second Ctrl-C ends at once)."""
  asked: list[int] = []
  def ask(number, frame):
    if asked and number == signal.SIGINT:
      raise KeyboardInterrupt
    asked.append(number)
  old = {s: signal.signal(s, ask) for s in (signal.SIGTERM, signal.SIGINT)}
  try:
    yield asked
  finally:
    for number, handler in old.items():
      signal.signal(number, handler)
