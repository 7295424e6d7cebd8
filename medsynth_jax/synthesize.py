"""A synthetic scan from a new scan: prepared as in training, made, put back on its grid, written.

python -m medsynth_jax.synthesize --workdir=RUN --input=ct.nii.gz --output=smr.nii.gz

Reads the run folder only. Input: a file, a folder of files, a folder that holds a DICOM series, or
t1=FILE,flair=FILE for a run with several sources. A run with several targets makes all of them, or
--target. Of a diffusion stage --samples=N writes the mean of N samples and their standard
deviation; --steps and --guidance change its sampler. Beside each image lies a JSON sidecar.

A run of any source (data.source=any) takes t1=FILE or a folder of <case>_<modality> files, and
makes the modalities that are not given: from several sources each image apart, in files
NAME_<target>_from_<source>, and with --combine=mean beside them their mean, in NAME_<target>, on
the grid of the first. With --save-flow=TARGET the field by which a registration network lays the
synthetic image on that scan is written beside it: see `flows`.
"""

import dataclasses
import functools
import hashlib
import json
import time
import warnings
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from tqdm import tqdm

from medsynth_jax import checkpoint, cli, flows, outputs, placing, windows
from medsynth_jax import config as configs
from medsynth_jax import run as runs
from medsynth_jax.contract import State
from medsynth_jax.data import case, fusion, grids, volumes
from medsynth_jax.data.examples import Task, source_channels
from medsynth_jax.data.intensities import from_model, to_model
from medsynth_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Synthesizer:
  """A trained stage, compiled once, that turns scans on disk into synthetic scans on disk."""
  run: runs.Run
  stage: str
  step: int
  predict: Callable
  state: State
  digest: str  # of the config and the weights: another model has another
  samples: int = 1  # of a stage that draws them: their mean is the image

  @functools.cached_property
  def told(self) -> dict[str, Any]:
    """What sidecars tell of the model."""
    run, section = self.run, self.run.sections[self.stage]
    sampler = dict(section.get("sampler", {}))
    if "guidance" in section:
      sampler["guidance"] = section.guidance
    return {
      "run": {"folder": run.folder.resolve().name, "stage": self.stage, "method": section.method,
              "step": self.step, "seed": run.config.seed, "sha256": self.digest},
      **({"samples": self.samples} if run.methods[self.stage].stochastic else {}),
      **({"sampler": sampler} if sampler else {}),
      "trained_on": {"name": run.info.name, "hash": run.info.hash, "simulated": run.info.simulated},
    }

  def views(self, names: Collection[str]) -> list[Task]:
    """The task, or of one of any source that of each source among `names`."""
    task = self.run.task
    return [v for v in task.views if v.sources[0] in names] if task.any_source else [task]

  def channels(self, source: case.Source, task: Task) -> np.ndarray:
    """The network's input of a scan, [n, H, W, C] slice axis first."""
    slices = {n: np.moveaxis(x, self.run.info.plane, 0) for n, x in source.images.items()}
    scalings = {n: task.scalings(scan) for n, scan in source.scans.items()}
    return source_channels(slices, scalings, task, self.run.info)

  def image(self, source: case.Source, target: str, sample: int = 0) -> np.ndarray:
    """The synthetic image in physical units on the model grid [x, y, z]; a fusion's [x, y, z, 3].

    What lies outside the body and the field of view is not yet the target's background. From
    several scans of a run of any source it is the mean of the images from each.
    """
    views = self.views(source.images)
    return sum(self._image(source, target, sample, view) for view in views) / len(views)

  def _image(self, source: case.Source, target: str, sample: int, task: Task) -> np.ndarray:
    run, info = self.run, self.run.info
    channels, synthesis = self.channels(source, task), run.config.synthesis
    with tqdm(total=windows.count(channels.shape, task, synthesis.overlap), unit="window",
              desc=target, leave=False) as bar:
      model = windows.synthesise(
        self.predict, self.state, channels, task, source_modality=info.index(task.sources[0]),
        target_modality=info.index(target), key=run.key(self.stage),
        batch_size=synthesis.batch_size, overlap=synthesis.overlap, put=run.put,
        progress=bar.update, sample=sample)
    physical = from_model(info.modality(target).typical, model).astype(np.float32)
    return np.moveaxis(physical if physical.shape[-1] > 1 else physical[..., 0], 0, info.plane)


def load(workdir: str | Path, which: str = "best", stage: str = "", *, samples: int | None = None,
         batch_size: int | None = None, steps: int | None = None, guidance: float | None = None,
         ) -> Synthesizer:
  """Opens RUN for synthesis by `stage`, or the run's system: see `_stage`.

  Args:
    samples, batch_size: instead of the fields `config.synthesis` of the run.
    steps, guidance: instead of the stage's fields `sampler.steps` and `guidance`.

  Raises:
    UserError: no run folder, no checkpoint, no such stage, a field that the stage does not have,
      more memory than is free.
  """
  changes = {} if batch_size is None else {"synthesis.batch_size": batch_size}
  run = runs.open_run(workdir, changes)
  stage = _stage(run, stage)
  asked = _sampling(run, stage, steps, guidance)
  if asked:
    run = runs.open_run(workdir, changes | asked)
  samples = _samples(run, stage, samples)
  predict = run.predictor(stage)  # first: what does not fit the memory is told before it is filled
  state, step = run.restore(stage, which)
  return Synthesizer(run, stage, step, predict, state, _model_digest(run, state), samples)


def _stage(run: runs.Run, asked: str) -> str:
  """The stage that makes the images: as asked, else the last that is built on earlier ones.

  A stage that needs none beside others that do is a baseline of them; where all are such, the last.
  """
  able = [s for s, m in run.methods.items() if m.synthesize and not m.sees_target]
  if asked and asked not in able:
    raise UserError(f"--stage={asked}: this run makes images in {', '.join(able)}")
  return asked or ([s for s in able if run.needs(s)] or able)[-1]


def _sampling(run: runs.Run, stage: str, steps: int | None, guidance: float | None
              ) -> dict[str, int | float]:
  """The fields of the config that --steps and --guidance change."""
  section, changes = run.sections[stage], {}
  prefix = f"{stage}." if "stages" in run.config else ""
  for flag, value, there, field in (
      ("steps", steps, "sampler" in section, "sampler.steps"),
      ("guidance", guidance, "guidance" in section, "guidance")):
    if value is not None:
      if not there:
        raise UserError(f"--{flag}={value}: stage '{stage}' ({section.method}) has no {flag} of"
                        f" sampling; leave it out")
      changes[prefix + field] = value
  return changes


def _samples(run: runs.Run, stage: str, samples: int | None) -> int:
  """Images to be averaged: as asked, else as evaluation does."""
  if not run.methods[stage].stochastic:
    if samples is not None and samples > 1:
      raise UserError(f"--samples={samples}: stage '{stage}' ({run.sections[stage].method}) makes"
                      " the same image each time; leave it out")
    return 1
  samples = run.config.synthesis.get("samples", 1) if samples is None else samples
  if samples < 1:
    raise UserError(f"--samples={samples}: give 1 or more")
  return samples


def _model_digest(run: runs.Run, state: State) -> str:
  """Of all that an image depends on but its source: the config without batch size, the weights."""
  fields = configs.flat(run.config.to_dict())
  fields.pop("synthesis.batch_size")
  digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode())
  arrays = {name: (s.nets, s.aux) for name, s in {"": state, **state.frozen}.items()}
  for leaf in jax.tree.leaves(arrays):
    digest.update(np.asarray(leaf).tobytes())
  return digest.hexdigest()


# --- one scan --------------------------------------------------------------------------------


def scan(synthesizer: Synthesizer, inputs: Mapping[str, Path], images: Mapping[str, Path],
         grid: str = "") -> list[Path]:
  """Synthesises one scan, writes `images` {target: file} with sidecars, and returns the files.

  Beside the image: of several samples their standard deviation (`_std`), of a PET that the run
  shows in fusion the colour image (`_fusion`).

  Args:
    inputs: {source modality: file or DICOM folder}; of a run of any source several are averaged.
    grid: "source", "model", or a file whose grid is used; "": source, but model for a PET.

  Raises:
    UserError: unreadable or unsuitable input, or an output that exists with other content.
  """
  info, first = synthesizer.run.info, next(iter(inputs))
  grid = grid or ("model" if info.modality(first).type == "pet" else "source")
  todo = {target: missing for target, path in images.items()
          if (missing := _missing(synthesizer, inputs, target, Path(path), grid))}
  if not todo:
    return []
  scans = {name: volumes.read(path) for name, path in inputs.items()}
  other = None if grid in outputs.GRIDS else volumes.read(grid)
  source = case.prepare_source(scans, info)
  for note in source.notes:
    print(f"warning: {note}")
  if not (source.valid & source.mask).any():
    raise UserError(f"{inputs[first]}: no body found in the image; is it a {first} scan?")
  on = other or (scans[first] if grid == "source" else None)
  shape, affine = (on.array.shape, on.affine) if on else (source.mask.shape, source.affine)
  for target, files in todo.items():
    made = _made(synthesizer, source, scans, target, files, shape, affine)
    for kind, (path, sidecar) in files.items():
      volumes.write(path, made[kind], affine, like=_header_of(grid, inputs[first]))
      checkpoint.write_text(outputs.sidecar_of(path), json.dumps(sidecar, indent=1) + "\n")
  return [path for files in todo.values() for path, _ in files.values()]


def _missing(synthesizer: Synthesizer, inputs: Mapping[str, Path], target: str, path: Path,
             grid: str) -> dict[str, tuple[Path, dict]]:
  """{kind: (file, sidecar)} of what is to be written for a target and is not yet there."""
  run, samples, shown = synthesizer.run, synthesizer.samples, synthesizer.run.task.fusion
  averaged = run.task.any_source and len(inputs) > 1
  if averaged and samples > 1:
    raise UserError(f"--samples={samples}: the mean over {', '.join(inputs)} is of one image each;"
                    " set --samples=1 or leave --combine out")
  if shown and run.task.measured(target) == shown and run.task.sources[0] not in inputs:
    raise UserError(f"{shown} is shown in colour on {run.task.sources[0]}: give that by --input")
  files = outputs.files(path, samples, target == shown)
  found = {kind: (file, outputs.sidecar(synthesizer.told, run.info, target, kind, samples, inputs,
                                        grid, averaged)) for kind, file in files.items()}
  return {kind: parts for kind, parts in found.items() if not outputs.done(*parts)}


def _made(synthesizer: Synthesizer, source: case.Source, scans: Mapping[str, volumes.Volume],
          target: str, kinds: Collection[str], shape, affine) -> dict[str, np.ndarray]:
  """{kind: image} on the output grid, as they are written.

  Samples are put on that grid one by one, so that their deviation is that of the images which each
  alone would have given. The mask goes apart from the values: edges are not blurred with air.
  """
  run, modality = synthesizer.run, synthesizer.run.info.modality(target)
  moments, seconds = placing.Moments(), 0.0
  for sample in range(synthesizer.samples):
    then = time.perf_counter()
    image = synthesizer.image(source, target, sample)
    seconds += time.perf_counter() - then
    moments.add(placing.placed(image, source.affine, shape, affine, modality.background))
  slices = source.mask.shape[run.info.plane] * len(synthesizer.views(source.images))
  _tell(target, slices, synthesizer.samples, seconds)
  body = volumes.Volume(source.valid & source.mask, source.affine)
  inside = grids.resample(body, shape, affine, order=0, fill=False)
  image = placing.masked(moments.mean, inside, modality.background)
  made = {"image": placing.as_written(image, modality.type)}
  if "std" in kinds:
    made["std"] = placing.masked(placing.one_channel(moments.deviation()), inside, 0)
  if "fusion" in kinds:
    name = run.task.sources[0]
    scan = placing.placed(scans[name].array, scans[name].affine, shape, affine,
                          run.info.modality(name).background)
    grey = (to_model(source.scans[name].source[0], scan) + 1) / 2
    made["fusion"] = placing.as_written(fusion.render(grey, image), "rgb")
  return made


def _tell(target: str, slices: int, samples: int, seconds: float) -> None:
  """Prints how long the network took."""
  what = f"{slices} slices" if samples == 1 else f"{samples} samples of {slices} slices"
  print(f"{target}: {what} in {seconds:.1f} s, {seconds / slices / samples:.2g} s a slice",
        flush=True)


def _header_of(grid: str, source: Path) -> Path | None:
  """The file whose header codes the output takes over."""
  path = source if grid == "source" else None if grid == "model" else Path(grid)
  return path if path and path.is_file() else None


# --- the command -----------------------------------------------------------------------------


def main(argv: list[str]) -> None:
  del argv
  if not (WORKDIR.value and INPUT.value and OUTPUT.value):
    raise UserError("give --workdir=RUN, --input=SCAN and --output=FILE")
  if GRID.value not in ("", *outputs.GRIDS) and not Path(GRID.value).exists():
    raise UserError(f"--grid={GRID.value}: neither source, model nor a file")
  synthesizer = load(WORKDIR.value, CHECKPOINT.value, STAGE.value, samples=SAMPLES.value,
                     batch_size=BATCH_SIZE.value, steps=STEPS.value, guidance=GUIDANCE.value)
  found = outputs.jobs(INPUT.value, OUTPUT.value, synthesizer.run.task, TARGET.value,
                       COMBINE.value)
  if SAVE_FLOW.value:
    flows.check(synthesizer, found)
  with warnings.catch_warnings():
    warnings.showwarning = lambda message, *rest, **more: print(f"warning: {message}")
    for inputs, images in tqdm(found, unit="scan", disable=len(found) == 1):
      for path in scan(synthesizer, inputs, images, GRID.value):
        print(f"{path}: synthetic image written")
    if SAVE_FLOW.value:
      flows.save(synthesizer, *found[0], SAVE_FLOW.value)


if __name__ == "__main__":
  WORKDIR = flags.DEFINE_string("workdir", None, "Run folder.")
  INPUT = flags.DEFINE_string("input", None, "A scan, a folder of scans, or t1=FILE,flair=FILE.")
  OUTPUT = flags.DEFINE_string("output", None, "Image file to write (a folder for a folder).")
  TARGET = flags.DEFINE_string(
    "target", outputs.ALL, "Modality to make; all: what the run makes and is not given.")
  COMBINE = flags.DEFINE_enum(
    "combine", "", outputs.COMBINE, "mean: also the mean of the images from several sources, of a"
    " run of any source.")
  SAVE_FLOW = flags.DEFINE_string(
    "save-flow", "", "A scan of the target: write the field of the registration network for it.")
  GRID = flags.DEFINE_string(
    "grid", "", "source, model, or a FILE whose grid is used; default source, model for a PET.")
  CHECKPOINT = flags.DEFINE_enum("checkpoint", "best", ["best", "latest"], "Which checkpoint.")
  STAGE = flags.DEFINE_string("stage", "", "Stage of the run; default: its system, no baseline.")
  SAMPLES = flags.DEFINE_integer(
    "samples", None, "Write the mean of this many samples, and their standard deviation beside it;"
    " default: as many as evaluation scored.")
  BATCH_SIZE = flags.DEFINE_integer("batch_size", None, "Slices or patches that are made at once.")
  STEPS = flags.DEFINE_integer("steps", None, "Steps of a diffusion stage's sampler.")
  GUIDANCE = flags.DEFINE_float("guidance", None, "Guidance of a stage with a category code.")
  cli.run(main)
