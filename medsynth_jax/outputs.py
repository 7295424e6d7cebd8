"""The files of synthesis: what is read, what is written, and the sidecars that say what each is."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import medsynth_jax
from medsynth_jax.data import fusion, volumes
from medsynth_jax.data.dataset import Info
from medsynth_jax.data.examples import Task
from medsynth_jax.errors import UserError

GRIDS = ("source", "model")


def jobs(source: str, output: str, task: Task, target: str
         ) -> list[tuple[dict[str, Path], dict[str, Path]]]:
  """[({source: file}, {target: file})] for every scan that the flags name.

  Raises:
    UserError: nothing to read, sources that the task does not know or lacks, an unknown target.
  """
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
    return [(inputs, _named_by(Path(output), targets, volumes.extension(output) or ".nii.gz"))]
  if len(task.sources) > 1:
    raise UserError(f"this run is made from {', '.join(task.sources)}: give --input="
                    + ",".join(f"{s}=FILE" for s in task.sources))
  path, name = Path(source), task.sources[0]
  if not path.exists():
    raise UserError(f"{path}: no such file or folder; check --input")
  files = sorted(p for p in path.iterdir() if volumes.extension(p)) if path.is_dir() else []
  if not files:
    return [({name: path}, _named_by(Path(output), targets, volumes.extension(output)))]
  if volumes.extension(output):
    raise UserError(f"--output={output}: the input is a folder of {len(files)} files, so the output"
                    " is a folder too")
  if Path(output).resolve() == path.resolve():
    raise UserError(f"--output={output}: is the input folder; choose another")
  found = []
  for file in files:
    kind = volumes.extension(file)
    found.append(({name: file}, {t: Path(output) / f"{stem(file)}_{t}{kind}" for t in targets}))
  return found


def _named(part: str) -> tuple[str, Path]:
  name, _, path = part.partition("=")
  return name.strip(), Path(path.strip())


def _named_by(output: Path, targets: tuple[str, ...], kind: str) -> dict[str, Path]:
  """{target: file}; several targets get their names before the extension."""
  if not kind:
    raise UserError(f"--output={output}: name a file that ends in {', '.join(volumes.EXTENSIONS)}")
  if len(targets) == 1:
    return {targets[0]: output}
  return {t: output.with_name(f"{stem(output)}_{t}{kind}") for t in targets}


def files(path: Path, samples: int, shown: bool) -> dict[str, Path]:
  """{"image", "std", "fusion": file} of a target.

  Args:
    samples: of how many the image is the mean; their deviation is written too.
    shown: whether the image is rendered in colour beside.
  """
  kinds = ["std"] * (samples > 1) + ["fusion"] * shown
  kind_of = volumes.extension(path)
  return {"image": path} | {k: path.with_name(f"{stem(path)}_{k}{kind_of}") for k in kinds}


def sidecar(model: Mapping[str, Any], info: Info, target: str, kind: str, samples: int,
            inputs: Mapping[str, Path], grid: str) -> dict[str, Any]:
  """What the JSON file beside an image tells.

  Args:
    model: what made the image: `Synthesizer.told`.
    kind: which of `files`.
    grid: as `synthesize.scan` has it.
  """
  modality = info.modality(fusion.NAME if kind == "fusion" else target)
  colour = modality.type == "rgb"
  notice = "Computer-made image, no measurement; not for diagnosis."
  if colour:
    notice += " Colours are no measurement: uptake is measured on the SUV volume."
  return {
    "synthetic": True, "notice": notice, "modality": modality.name,
    "units": _unit(kind) if colour else modality.unit,
    **({"image": _meaning(kind, samples)} if samples > 1 else {}),
    "made_from": {name: {"file": Path(p).name, "sha256": _digest(Path(p))}
                  for name, p in inputs.items()},
    **model,
    "grid": grid if grid in GRIDS else {"file": Path(grid).name, "sha256": _digest(Path(grid))},
    "software": f"medsynth_jax {medsynth_jax.__version__}",
  }


def _unit(kind: str) -> str:
  return "levels of 0..255, root mean square over the channels" if kind == "std" else "RGB"


def _meaning(kind: str, samples: int) -> str:
  if kind == "std":
    return (f"standard deviation of each voxel over {samples} samples (divided by {samples - 1}),"
            " 0 outside the body")
  return f"mean of {samples} samples" if kind == "image" else (
    f"rendered from the mean of {samples} samples")


def done(path: Path, expected: Mapping[str, Any]) -> bool:
  """Whether the output is there already from the same input and run; UserError if from another."""
  parts = [path, sidecar_of(path)]
  if volumes.extension(path) == ".mhd":
    parts.append(path.with_suffix(".raw"))
  there = [f for f in parts if f.exists()]
  if not there:
    return False
  if there == parts and _parsed(parts[1]) == expected:
    print(f"{path}: already made from this input by this run, nothing to do")
    return True
  raise UserError(f"{there[0]}: exists with other content; move it away or choose another --output")


def sidecar_of(path: Path) -> Path:
  """The JSON file beside an image."""
  return path.with_name(stem(path) + ".json")


def stem(path: Path) -> str:
  """A file's name without its image extension."""
  return path.name[:len(path.name) - len(volumes.extension(path))] or path.name


def _parsed(path: Path) -> object:
  """A JSON file's content; None if it is none."""
  try:
    return json.loads(path.read_text())
  except ValueError:
    return None


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
