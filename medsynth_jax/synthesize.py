"""A synthetic scan from a new scan: prepared as in training, made, put back on its grid, written.

python -m medsynth_jax.synthesize --workdir=RUN --input=ct.nii.gz --output=smr.nii.gz

Reads the run folder only. Input: a file, a folder of files, a folder that holds a DICOM series, or
t1=FILE,flair=FILE for a run with several sources. Beside each image lies a JSON sidecar.
"""

import dataclasses
import hashlib
import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import numpy as np
from absl import flags
from tqdm import tqdm

import medsynth_jax
from medsynth_jax import checkpoint, cli, windows
from medsynth_jax import config as configs
from medsynth_jax import run as runs
from medsynth_jax.contract import State
from medsynth_jax.data import case, grids, volumes
from medsynth_jax.data.examples import source_channels
from medsynth_jax.data.intensities import from_model
from medsynth_jax.errors import UserError

GRIDS = ("source", "model")


@dataclasses.dataclass(frozen=True)
class Synthesizer:
  """A trained stage, compiled once, that turns scans on disk into synthetic scans on disk."""
  run: runs.Run
  stage: str
  step: int
  predict: Callable
  state: State
  digest: str  # of the config and the weights: another model has another

  def image(self, source: case.Source, target: str) -> np.ndarray:
    """The synthetic image in physical units on the model grid [x, y, z].

    Outside the body and the field of view it is the target modality's background.
    """
    run, info, task = self.run, self.run.info, self.run.task
    slices = {n: np.moveaxis(x, info.plane, 0) for n, x in source.images.items()}
    channels = source_channels(slices, source.scalings, task, info)
    synthesis = run.config.synthesis
    with tqdm(total=windows.count(channels.shape, task, synthesis.overlap), unit="window",
              desc=target, leave=False) as bar:
      model = windows.synthesise(
        self.predict, self.state, channels, task, source_modality=info.index(task.sources[0]),
        target_modality=info.index(target), key=run.key(self.stage),
        batch_size=synthesis.batch_size, overlap=synthesis.overlap, put=run.put,
        progress=bar.update)
    physical = from_model(info.modality(target).typical, model[..., 0])
    return np.moveaxis(physical, 0, info.plane).astype(np.float32)


def load(workdir: str | Path, which: str = "best", stage: str = "") -> Synthesizer:
  """Opens RUN for synthesis; `stage` is its last one that makes images, unless named.

  Raises:
    UserError: no run folder, no checkpoint, or no such stage.
  """
  run = runs.open_run(workdir)
  able = [s for s, m in run.methods.items() if m.synthesize and not m.sees_target]
  if stage and stage not in able:
    raise UserError(f"--stage={stage}: this run makes images in {', '.join(able)}")
  stage = stage or able[-1]
  state, step = run.restore(stage, which)
  digest = hashlib.sha256(configs.to_json(run.config).encode())
  for leaf in jax.tree.leaves((state.nets, {n: s.nets for n, s in state.frozen.items()})):
    digest.update(np.asarray(leaf).tobytes())
  return Synthesizer(run, stage, step, run.predictor(stage), state, digest.hexdigest())


def scan(synthesizer: Synthesizer, inputs: Mapping[str, Path], outputs: Mapping[str, Path],
         grid: str = "") -> list[Path]:
  """Synthesises one scan and writes {target: file} with sidecars; returns the files written.

  Args:
    inputs: {source modality: file or DICOM folder}.
    grid: "source", "model", or a file whose grid is used; "": source, but model for a PET.

  Raises:
    UserError: unreadable or unsuitable input, or an output that exists with other content.
  """
  info, first = synthesizer.run.info, next(iter(inputs))
  grid = grid or ("model" if info.modality(first).type == "pet" else "source")
  sidecars = {t: _sidecar(synthesizer, inputs, t, grid) for t in outputs}
  todo = {t: path for t, path in outputs.items() if not _done(path, sidecars[t])}
  if not todo:
    return []
  scans = {name: volumes.read(path) for name, path in inputs.items()}
  other = None if grid in GRIDS else volumes.read(grid)
  source = case.prepare_source(scans, info)
  for note in source.notes:
    print(f"warning: {note}")
  body = source.valid & source.mask
  if not body.any():
    raise UserError(f"{inputs[first]}: no body found in the image; is it a {first} scan?")
  for target, path in todo.items():
    image = synthesizer.image(source, target)
    on = other or (scans[first] if grid == "source" else None)
    shape, affine = (on.array.shape, on.affine) if on else (body.shape, source.affine)
    image = _regridded(image, body, source.affine, shape, affine, info.modality(target))
    volumes.write(path, image, affine, like=_header_of(grid, inputs[first]))
    sidecar = path.with_name(_stem(path) + ".json")
    checkpoint.write_text(sidecar, json.dumps(sidecars[target], indent=1) + "\n")
  return list(todo.values())


def _header_of(grid: str, source: Path) -> Path | None:
  """The file whose header codes the output takes over."""
  path = source if grid == "source" else None if grid == "model" else Path(grid)
  return path if path and path.is_file() else None


def _regridded(image, body, affine, shape, out_affine, modality) -> np.ndarray:
  """On the output grid; the mask apart from the values, so that edges are not blurred with air."""
  values = grids.resample(volumes.Volume(image, affine), shape, out_affine, order=1,
                          fill=modality.background)
  inside = grids.resample(volumes.Volume(body, affine), shape, out_affine, order=0, fill=False)
  result = np.where(inside, values, np.float32(modality.background))
  return np.round(result).astype(np.int16) if modality.type == "ct" else result


def _sidecar(synthesizer: Synthesizer, inputs: Mapping[str, Path], target: str, grid: str) -> dict:
  run, info = synthesizer.run, synthesizer.run.info
  return {
    "synthetic": True,
    "notice": "Computer-made image, no measurement; not for diagnosis.",
    "modality": target, "units": info.modality(target).unit,
    "made_from": {name: {"file": Path(p).name, "sha256": _digest(Path(p))}
                  for name, p in inputs.items()},
    "run": {"folder": run.folder.resolve().name, "stage": synthesizer.stage,
            "method": run.sections[synthesizer.stage].method, "step": synthesizer.step,
            "seed": run.config.seed, "sha256": synthesizer.digest},
    "trained_on": {"name": info.name, "hash": info.hash, "simulated": info.simulated},
    "grid": grid if grid in GRIDS else {"file": Path(grid).name, "sha256": _digest(Path(grid))},
    "software": f"medsynth_jax {medsynth_jax.__version__}",
  }


def _digest(path: Path) -> str:
  digest = hashlib.sha256()
  for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
    if not file.exists():
      raise UserError(f"{file}: no such file; check --input")
    if file.is_file():
      with file.open("rb") as stream:
        while block := stream.read(1 << 20):
          digest.update(block)
  return digest.hexdigest()


def _done(path: Path, sidecar: dict) -> bool:
  """Whether the output is there already from the same input and run; UserError if from another."""
  files = [path, path.with_name(_stem(path) + ".json")]
  if volumes.extension(path) == ".mhd":
    files.append(path.with_suffix(".raw"))
  there = [f for f in files if f.exists()]
  if not there:
    return False
  if there == files and _parsed(files[1]) == sidecar:
    print(f"{path}: already made from this input by this run, nothing to do")
    return True
  raise UserError(f"{there[0]}: exists with other content; move it away or choose another --output")


def _parsed(path: Path) -> object:
  """A JSON file's content; None if it is none."""
  try:
    return json.loads(path.read_text())
  except ValueError:
    return None


def _stem(path: Path) -> str:
  return path.name[:len(path.name) - len(volumes.extension(path))] or path.name


# --- the command -----------------------------------------------------------------------------


def jobs(source: str, output: str, run: runs.Run, target: str
         ) -> list[tuple[dict[str, Path], dict[str, Path]]]:
  """[({source: file}, {target: file})] for every scan that the flags name.

  Raises:
    UserError: nothing to read, sources that the run does not know or lacks, an unknown target.
  """
  task = run.task
  targets = (target,) if target else task.targets
  for name in targets:
    if name not in task.targets:
      raise UserError(f"--target={name}: this run makes {', '.join(task.targets)}")
  if "=" in source and not Path(source).exists():
    inputs = dict(_named(part) for part in source.split(","))
    unknown, missing = set(inputs) - set(task.sources), set(task.sources) - set(inputs)
    if unknown or (missing and not task.presence):
      raise UserError(f"--input={source}: this run is made from {', '.join(task.sources)}; name"
                      f" {'each' if not task.presence else 'some'} of them")
    return [(inputs, _outputs(Path(output), targets, volumes.extension(output) or ".nii.gz"))]
  if len(task.sources) > 1:
    raise UserError(f"this run is made from {', '.join(task.sources)}: give --input="
                    + ",".join(f"{s}=FILE" for s in task.sources))
  path, name = Path(source), task.sources[0]
  if not path.exists():
    raise UserError(f"{path}: no such file or folder; check --input")
  files = sorted(p for p in path.iterdir() if volumes.extension(p)) if path.is_dir() else []
  if not files:
    return [({name: path}, _outputs(Path(output), targets, volumes.extension(output)))]
  if volumes.extension(output):
    raise UserError(f"--output={output}: the input is a folder of {len(files)} files, so the output"
                    " is a folder too")
  if Path(output).resolve() == path.resolve():
    raise UserError(f"--output={output}: is the input folder; choose another")
  found = []
  for file in files:
    kind = volumes.extension(file)
    found.append(({name: file}, {t: Path(output) / f"{_stem(file)}_{t}{kind}" for t in targets}))
  return found


def _named(part: str) -> tuple[str, Path]:
  name, _, path = part.partition("=")
  return name.strip(), Path(path.strip())


def _outputs(output: Path, targets: tuple[str, ...], kind: str) -> dict[str, Path]:
  """{target: file}; several targets get their names before the extension."""
  if not kind:
    raise UserError(f"--output={output}: name a file that ends in {', '.join(volumes.EXTENSIONS)}")
  if len(targets) == 1:
    return {targets[0]: output}
  return {t: output.with_name(f"{_stem(output)}_{t}{kind}") for t in targets}


def main(argv: list[str]) -> None:
  del argv
  if not (WORKDIR.value and INPUT.value and OUTPUT.value):
    raise UserError("give --workdir=RUN, --input=SCAN and --output=FILE")
  if GRID.value not in ("", *GRIDS) and not Path(GRID.value).exists():
    raise UserError(f"--grid={GRID.value}: neither source, model nor a file")
  synthesizer = load(WORKDIR.value, CHECKPOINT.value, STAGE.value)
  found = jobs(INPUT.value, OUTPUT.value, synthesizer.run, TARGET.value)
  with warnings.catch_warnings():
    warnings.showwarning = lambda message, *rest, **more: print(f"warning: {message}")
    for inputs, outputs in tqdm(found, unit="scan", disable=len(found) == 1):
      for path in scan(synthesizer, inputs, outputs, GRID.value):
        print(f"{path}: synthetic image written")


if __name__ == "__main__":
  WORKDIR = flags.DEFINE_string("workdir", None, "Run folder.")
  INPUT = flags.DEFINE_string("input", None, "A scan, a folder of scans, or t1=FILE,flair=FILE.")
  OUTPUT = flags.DEFINE_string("output", None, "Image file to write (a folder for a folder).")
  TARGET = flags.DEFINE_string("target", "", "Modality to make; default: all that the run makes.")
  GRID = flags.DEFINE_string(
    "grid", "", "source, model, or a FILE whose grid is used; default source, model for a PET.")
  CHECKPOINT = flags.DEFINE_enum("checkpoint", "best", ["best", "latest"], "Which checkpoint.")
  STAGE = flags.DEFINE_string("stage", "", "Stage of the run; default: the last that makes images.")
  cli.run(main)
