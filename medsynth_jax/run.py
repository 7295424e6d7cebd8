"""A run folder opened: its config, data description, methods, and the states it has stored."""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from medsynth_jax import checkpoint, memory, serving, sharding
from medsynth_jax import config as configs
from medsynth_jax.contract import NOISES, Method, State, create, served
from medsynth_jax.data import draws
from medsynth_jax.data.dataset import Info, load_info, save_info
from medsynth_jax.data.examples import Task, make_task
from medsynth_jax.data.pipeline import example_batch
from medsynth_jax.errors import UserError
from medsynth_jax.methods import METHODS
from medsynth_jax.nets.conv import cure_setting

# what may lie in a run folder before its config.json
BESIDE = ("data", "data.partial", "scans", "dataset.json", "dataset.json.partial",
          "config.json.partial")


@dataclasses.dataclass(frozen=True)
class Run:
  """Everything that follows from a config and a data description, before any training."""
  folder: Path
  config: ConfigDict
  info: Info
  methods: Mapping[str, Method]
  task: Task
  mesh: Mesh

  @functools.cached_property
  def sections(self) -> dict[str, ConfigDict]:
    return configs.stages(self.config)

  def views(self) -> "list[Run]":
    """This run, or if its task takes any source a run for each; they share what is compiled."""
    if not self.task.any_source:
      return [self]
    shared = {"_predictors": self._predictors, "compile_seconds": self.compile_seconds}
    found = [dataclasses.replace(self, task=view) for view in self.task.views]
    for view in found:
      vars(view).update(shared)
    return found

  @contextlib.contextmanager
  def tracing(self):
    """Functions traced inside are compiled for the run's mesh, with its kind of convolutions."""
    with jax.set_mesh(self.mesh), cure_setting(self.config.get("conv_cure", "auto")):
      yield

  def key(self, stage: str) -> jax.Array:
    """The stage's root key."""
    index = list(self.methods).index(stage)
    return jax.random.fold_in(jax.random.key(self.config.seed), index)

  def needs(self, stage: str) -> tuple[str, ...]:
    """Earlier stages that a stage sees, theirs included."""
    direct = configs.needs(self.sections[stage])
    return tuple(dict.fromkeys(n for d in direct for n in (*self.needs(d), d)))

  def served_shape(self, stage: str) -> State:
    """Shapes and shardings of a stage's served state, without frozen ones."""
    return self._placed(jax.eval_shape(
      lambda s: served(s, self.methods[stage].keeps).replace(frozen={}), self.shape(stage)))

  def shape(self, stage: str) -> State:
    """Shapes and shardings of a stage's state."""
    frozen = {need: self.served_shape(need) for need in self.needs(stage)}
    example = example_batch(self.task, self.info)
    make = functools.partial(create, self.methods[stage])
    return self._placed(jax.eval_shape(make, self.key(stage), example, frozen))

  def _placed(self, state: State) -> State:
    """A state's shapes with shardings: its nets by the rule for parameters, `aux` replicated."""
    places = sharding.parameter_shardings(self.mesh, state)
    whole = sharding.replicated(self.mesh)
    places = places.replace(aux=jax.tree.map(lambda _: whole, places.aux))
    return jax.tree.map(lambda x, p: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=p),
                        state, places)

  def restore(self, stage: str, which: str = "best") -> tuple[State, int]:
    """(served state, step) of a trained stage, its frozen stages included."""
    folder, shape = self.folder / stage, self.shape(stage)
    state, step = checkpoint.load_state(folder, shape, which)
    frozen = checkpoint.load_frozen(folder, shape.frozen)
    return served(state, self.methods[stage].keeps).replace(frozen=frozen), step

  def lender(self, stage: str) -> "Run | None":
    """The run that the stage's field `pretrained` names, its stage of that name checked.

    Raises:
      UserError: no such run or stage, or nets of other sizes.
    """
    folder = self.sections[stage].get("pretrained", "")
    if not folder:
      return None
    other, where = open_run(folder), f"{stage}.pretrained={folder}"
    if stage not in other.methods:
      raise UserError(f"{where}: that run has no such stage, only {', '.join(other.methods)}")
    apart = modalities_apart(other.info, self.info)
    mine, theirs = _leaves(self.shape(stage).nets), _leaves(other.shape(stage).nets)
    for name in {**mine, **theirs}:
      if mine.get(name) != theirs.get(name):
        raise UserError(f"{where}: {name} is {theirs.get(name, 'absent')} there and"
                        f" {mine.get(name, 'absent')} here{apart}; give the section '{stage}' the"
                        " network fields that stand in that run's config.json")
    return other

  def pretrained(self, stage: str) -> dict[str, Any]:
    """{net: parameters} of the `lender`'s stage, those that synthesis uses as they were served.

    Empty without one; UserError where it has no checkpoint.
    """
    other = self.lender(stage)
    if other is None:
      return {}
    state = checkpoint.load_state(other.folder / stage, other.shape(stage))[0]
    return {**state.nets, **served(state, other.methods[stage].keeps).nets}

  def predictor(self, stage: str, loaded: bool = False):
    """`method.synthesize` of a stage, compiled for batches of `synthesis.batch_size` examples.

    Its images lie on every process. With `config.synthesis.mirror` they are the mean of the image
    and of the one made left-right mirrored. Only shapes are needed, so that what does not fit is
    told before weights are read or trained. All processes have to ask together.

    Args:
      loaded: the stage's state lies on the devices already, in what is not free there.

    Raises:
      UserError: such a batch needs more memory than is free.
    """
    settings = self.config.synthesis
    made = stage, settings.batch_size, settings.mirror
    if made not in self._predictors:
      if idle := sharding.idle(self.mesh, settings.batch_size):
        print(f"{stage}: synthesis: {idle}", flush=True)
      compiled, seconds = serving.compile_ahead(f"{stage}: synthesis",
                                                lambda: self.lower_synthesis(stage))
      self._predictors[made] = compiled, self.served_shapes(stage)
      self.compile_seconds[stage] = seconds
    compiled, (state, batch) = self._predictors[made]
    unit = "patches" if len(self.task.size) == 3 else "slices"
    memory.check(f"stage '{stage}': synthesis of {settings.batch_size} {unit} at once", compiled,
                 (batch, () if loaded else state), memory.synthesis_remedy(settings.batch_size))
    return compiled

  def lower_synthesis(self, stage: str) -> jax.stages.Lowered:
    """What `predictor` compiles, from shapes alone."""
    synthesize = self.methods[stage].synthesize
    if self.config.synthesis.mirror:
      synthesize = serving.mirrored(synthesize, self._left_right())
    shapes = self.served_shapes(stage)
    with self.tracing():
      return serving.lower(synthesize, self.mesh, *shapes)

  @functools.cached_property
  def compile_seconds(self) -> dict[str, float]:
    """{stage: seconds that compiling its synthesis took}, of those that `predictor` was asked."""
    return {}

  @functools.cached_property
  def _predictors(self) -> dict:
    """What `predictor` has compiled, with the shapes that it takes."""
    return {}

  def served_shapes(self, stage: str) -> tuple[State, dict[str, jax.ShapeDtypeStruct]]:
    """Shapes and shardings of what `predictor` takes: the state with its frozen ones, the batch."""
    keeps, example = self.methods[stage].keeps, example_batch(self.task, self.info)
    state = self._placed(jax.eval_shape(lambda s: served(s, keeps), self.shape(stage)))
    seen = ("target",) if self.methods[stage].sees_target else ()
    names = ("source", "slice", "source_modality", "target_modality", *seen)
    batch = {**{name: example[name] for name in names},
             "sample": np.zeros(1, np.int32), "weight": np.zeros(1, np.float32)}
    return state, sharding.same_shapes(self.mesh, batch, self.config.synthesis.batch_size)

  def _left_right(self) -> int:
    """The batch's axis along left and right; a UserError where a sagittal slice has none."""
    deep, sagittal = len(self.task.size) == 3, self.info.plane == 0
    if sagittal and not deep:
      raise UserError("synthesis.mirror: a sagittal slice holds no left and right; set it to False")
    return 2 if deep and not sagittal else 1

  def put(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    return sharding.put_same(self.mesh, batch)


def modalities_apart(other: Info, own: Info) -> str:
  """ "; it knows 2 modalities (a, b), this run 3 modalities (a, b, c)"; of the same nothing."""
  if other.names == own.names:
    return ""
  it, this = (f"{len(info.names)} modalities ({', '.join(info.names)})" for info in (other, own))
  return f"; it knows {it}, this run {this}"


def _leaves(nets) -> dict[str, tuple[int, ...]]:
  """{path: shape} of all parameters."""
  return {jax.tree_util.keystr(path, simple=True, separator="/"): x.shape
          for path, x in jax.tree_util.tree_leaves_with_path(nets)}


def chosen(config: ConfigDict, only: Sequence[str] = ()) -> list[str]:
  """A config's stages, or those in `only`; without folds, each of which is as its coarse stage.

  Raises:
    UserError: `only` has a name that is no such stage.
  """
  sections = configs.stages(config)
  folds = {fold for section in sections.values() for fold in configs.folds(section)}
  stages = [stage for stage in sections if stage not in folds]
  for name in only:
    if name not in stages:
      raise UserError(f"--stage={name}: no such stage; choose from {', '.join(stages)}")
  return [stage for stage in stages if not only or stage in only]


def check(config: ConfigDict, folder: Path) -> None:
  """What can be told of a training run before its data are made.

  Raises:
    UserError: as `check_fields`; a folder that holds something else.
  """
  check_fields(config, sharding.make_mesh(config.mesh.fsdp))
  stray = [] if not folder.is_dir() or (folder / "config.json").exists() else sorted(
    p.name for p in folder.iterdir() if p.name not in BESIDE and not p.name.startswith("."))
  if stray:
    raise UserError(f"{folder} holds other files ({', '.join(stray[:3])}) and no config.json;"
                    " choose an empty or new --workdir")


def check_fields(config: ConfigDict, mesh: Mesh) -> None:
  """What can be told of a config alone.

  Raises:
    UserError: a field outside its range, an unknown method or stage, a batch that does not divide
      over the devices.
  """
  configs.check_ranges(config)
  with cure_setting(config.get("conv_cure", "auto")):
    pass  # a UserError for any other
  known: list[str] = []
  for stage, section in configs.stages(config).items():
    if section.method not in METHODS:
      raise UserError(f"method={section.method!r}: choose one of {', '.join(METHODS)}")
    for need in configs.needs(section):
      if need not in known:
        raise UserError(f"stage '{stage}' needs '{need}', which is no earlier stage")
    if not section.steps and not section.get("pretrained", ""):
      raise UserError(f"stage '{stage}': steps=0 leaves random weights; give steps, or the run that"
                      f" they come from by {stage}.pretrained=RUN")
    known.append(stage)
    sharding.check_batch(section.batch_size, mesh)


def build(config: ConfigDict, info: Info, folder: Path, mesh: Mesh | None = None) -> Run:
  """Builds the methods of a config's stages.

  Args:
    mesh: its devices; by default all of this machine, `config.mesh.fsdp` of which share parameters.

  Raises:
    UserError: a size that a network refuses, several targets for a method that makes one.
  """
  mesh = sharding.make_mesh(config.mesh.fsdp) if mesh is None else mesh
  methods: dict[str, Method] = {}
  make_task(config.data, info)  # what is wrong with the data fields is told first
  for stage, section in configs.stages(config).items():
    methods[stage] = METHODS[section.method](config, stage, info, methods)
  factor = math.lcm(*(m.factor for m in methods.values()))
  run = Run(Path(folder), config, info, methods, make_task(config.data, info, factor), mesh)
  for stage, method in methods.items():
    if run.task.any_source and not method.many_sources:
      raise UserError(f"data.source=any: {run.sections[stage].method} is made from one source; name"
                      " it in data.source")
    if len(run.task.targets) > 1 and not method.many_targets:
      raise UserError(f"data.targets={config.data.targets}: {run.sections[stage].method} makes one"
                      " target; train one run a target")
  for stage in methods:
    run.shape(stage)  # a size that a network refuses is told now, not after hours
  return run


def open_run(folder: str | Path, changes: Mapping[str, Any] | None = None) -> Run:
  """Opens RUN; needs nothing outside it.

  Args:
    changes: {dotted field of its config: value}, for this time only.

  Raises:
    UserError: no run folder, a field that its config does not have, or a value outside its range.
  """
  folder, changes = Path(folder), dict(changes or {})
  config = ConfigDict(checkpoint.read_config(folder))
  unknown = sorted(set(changes) - set(configs.flat(config.to_dict())))
  if unknown:
    raise UserError(f"{folder}: its config has no field {', '.join(unknown)}")
  if changes:
    config.update_from_flattened_dict(changes)
    configs.check_ranges(config)
  config.mesh.fsdp = 1  # the machine that trained may have had more devices
  return build(config, load_info(folder), folder)


def start(config: ConfigDict, info: Info, folder: Path) -> Run:
  """Makes RUN with config.json and dataset.json, or goes on with the one that is there.

  Raises:
    UserError: RUN belongs to another config or data set, or holds something else; see `check`.
  """
  check(config, folder)
  run = build(config, info, folder)
  if config.synthesis.noise not in NOISES:
    raise UserError(f"synthesis.noise={config.synthesis.noise!r}: choose one of"
                    f" {', '.join(NOISES)}")
  for stage, section in run.sections.items():  # refused now, not when its turn has come
    allowed = run.methods[stage].draws
    if section.draw in draws.DRAWS and section.draw not in allowed:
      raise UserError(f"stage '{stage}': draw={section.draw!r} is not for {section.method}; set"
                      f" {' or '.join(map(repr, allowed))}")
    draws.check(info, run.task, section)
    draws.training_index(info, run.task, section.exclude_fold, section.draw)
    if not (folder / stage).exists():
      run.lender(stage)
  if (folder / "config.json").exists():
    changed = configs.differences(checkpoint.read_config(folder), config)
    if changed:
      raise UserError(f"{folder} is the run of another config ({'; '.join(changed)});"
                      " choose another --workdir")
    if load_info(folder).hash != info.hash:
      raise UserError(f"{folder} was trained on another data set than {config.data.dir or 'data'}"
                      " (their hashes differ); choose another --workdir")
  if sharding.is_first():
    folder.mkdir(parents=True, exist_ok=True)
    save_info(info, folder / "dataset.json")
    checkpoint.write_text(folder / "config.json", configs.to_json(config))  # last: RUN is whole
  return run
