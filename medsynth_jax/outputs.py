"""The files of synthesis: what is read, what is written, and the sidecars that say what each is."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import medsynth_jax
from medsynth_jax.data import fusion, volumes
from medsynth_jax.data.dataset import Info
from medsynth_jax.data.examples import Task
from medsynth_jax.errors import UserError

GRIDS = ("source", "model")
ALL = "all"  # as --target: what there is to make
COMBINE = ("", "mean")

Jobs = list[tuple[dict[str, Path], dict[str, Path]]]


def jobs(source: str, output: str, task: Task, target: str, combine: str = "") -> Jobs:
  """[({source: file}, {target: file})] for every scan that the flags name.

  Of a task of any source several files in one job are those whose images are averaged.

  Args:
    target: one modality, or "" or "all".
    combine: "mean": beside the image from each of several sources also their mean.

  Raises:
    UserError: nothing to read, sources that the task does not know or lacks, an unknown target.
  """
  target = "" if target == ALL else target
  targets = (target,) if target else task.targets
  for name in targets:
    if name not in task.targets:
      raise UserError(f"--target={name}: this run makes {', '.join(task.targets)}")
  named = "=" in source and not Path(source).exists()
  if task.any_source:
    inputs = dict(_named(part) for part in source.split(",")) if named else None
    return _jobs_of_any(source, inputs, Path(output), task, target, combine)
  if combine:
    raise UserError(f"--combine={combine}: this run makes one image from"
                    f" {' and '.join(task.sources)}; leave it out")
  if named:
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
  files = _images_in(path)
  if not files:
    return [({name: path}, _named_by(Path(output), targets, volumes.extension(output)))]
  _check_folder(Path(output), path, files)
  found = []
  for file in files:
    kind = volumes.extension(file)
    found.append(({name: file}, {t: Path(output) / f"{stem(file)}_{t}{kind}" for t in targets}))
  return found


def _images_in(path: Path) -> list[Path]:
  """The image files of a folder; none of a file or of a DICOM series."""
  return sorted(p for p in path.iterdir() if volumes.extension(p)) if path.is_dir() else []


def _check_folder(output: Path, source: Path, files: Sequence[Path]) -> None:
  if volumes.extension(output):
    raise UserError(f"--output={output}: the input is a folder of {len(files)} files, so the output"
                    " is a folder too")
  if output.resolve() == source.resolve():
    raise UserError(f"--output={output}: is the input folder; choose another")


def _jobs_of_any(source: str, inputs: dict[str, Path] | None, output: Path, task: Task,
                 target: str, combine: str) -> Jobs:
  """`jobs` of a run that makes every modality from any other.

  Args:
    inputs: {modality: file} as named; None: `source` is a path.
    target: one modality; "": those that are not given.
  """
  if inputs is None:
    return _jobs_of_folder(Path(source), output, task, target, combine)
  unknown = [name for name in inputs if name not in task.sources]
  if unknown:
    raise UserError(f"--input={source}: '{unknown[0]}' is none of {', '.join(task.sources)}, which"
                    " this run is made from")
  if combine and len(set(inputs) - {target}) < 2:
    raise UserError(f"--combine={combine}: takes the images from two sources or more; give them as"
                    f" --input={','.join(f'{s}=FILE' for s in task.sources[:2])}")
  kind = _kind(output)
  several = len(set(inputs) - {target}) > 1

  def place(made: str, end: str) -> Path:
    if several or not target and len(task.targets) - len(inputs) > 1:
      return output.with_name(f"{stem(output)}_{made}{end}{kind}")
    return _named_by(output, (made,), kind)[made]
  found = _directions(inputs, task, target, combine, place)
  if not found:
    raise UserError(f"--input={source}: " + (
      f"{target} is to be made and is all that is given; give another modality" if target else
      f"all of {', '.join(task.targets)} are given, so that none is missing; name one by --target,"
      " which is then made from the others"))
  return found


def _jobs_of_folder(folder: Path, output: Path, task: Task, target: str, combine: str) -> Jobs:
  """Of each case in a folder of <case>_<modality> files; other files are left out, which is told.
  """
  files = _images_in(folder)
  if not files:
    what = "" if folder.exists() else "no such file or folder; "
    raise UserError(f"--input={folder}: {what}this run is made from any one of"
                    f" {', '.join(task.sources)}: say which it is, as"
                    f" --input={task.sources[0]}=FILE")
  _check_folder(output, folder, files)
  cases: dict[str, dict[str, Path]] = {}
  for file in files:
    ends = [m for m in task.sources if stem(file).endswith(f"_{m}")]
    if ends:
      modality = max(ends, key=len)
      cases.setdefault(stem(file).removesuffix(f"_{modality}"), {})[modality] = file
  left_out = len(files) - sum(map(len, cases.values()))
  if not cases:
    raise UserError(f"--input={folder}: no file there is named <case>_<modality>, as"
                    f" 01_{task.sources[0]}{volumes.extension(files[0])}; name one scan as"
                    f" --input={task.sources[0]}=FILE")
  if left_out:
    print(f"{folder}: {left_out} files whose names end in no modality are left out")
  found = []
  for name, inputs in cases.items():
    kind = volumes.extension(next(iter(inputs.values())))
    place = lambda made, end: output / f"{name}_{made}{end}{kind}"  # noqa: B023, E731
    own = _directions(inputs, task, target, combine, place)
    if not own:
      print(f"{name}: has {', '.join(inputs)}, nothing to make")
    found += own
  return found


def _directions(inputs: Mapping[str, Path], task: Task, target: str, combine: str,
                place: Callable[[str, str], Path]) -> Jobs:
  """The jobs of one case: its targets from each of its sources, then from all.

  `place` gives the file of (target, "" or "_from_<source>").
  """
  targets = [target] if target else [t for t in task.targets if t not in inputs]
  sources = {name: file for name, file in inputs.items() if name not in targets}
  if not targets or not sources:
    return []
  several = len(sources) > 1
  found = [({name: file}, {t: place(t, f"_from_{name}" if several else "") for t in targets})
           for name, file in sources.items()]
  if combine and several:
    found.append((sources, {t: place(t, "") for t in targets}))
  return found


def _named(part: str) -> tuple[str, Path]:
  name, _, path = part.partition("=")
  return name.strip(), Path(path.strip())


def _named_by(output: Path, targets: tuple[str, ...], kind: str) -> dict[str, Path]:
  """{target: file}; several targets get their names before the extension."""
  kind = kind or _kind(output)
  if len(targets) == 1:
    return {targets[0]: output}
  return {t: output.with_name(f"{stem(output)}_{t}{kind}") for t in targets}


def _kind(output: Path) -> str:
  """The extension of an image file; UserError if it has none."""
  if not volumes.extension(output):
    raise UserError(f"--output={output}: name a file that ends in {', '.join(volumes.EXTENSIONS)}")
  return volumes.extension(output)


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
            inputs: Mapping[str, Path], grid: str, averaged: bool = False) -> dict[str, Any]:
  """What the JSON file beside an image tells.

  Args:
    model: what made the image: `Synthesizer.told`.
    kind: which of `files`.
    grid: as `synthesize.scan` has it.
    averaged: whether the image is the mean of the images from each input.
  """
  modality = info.modality(fusion.NAME if kind == "fusion" else target)
  colour = modality.type == "rgb"
  meaning = f"mean of images from {', '.join(inputs)}" if averaged else \
    _meaning(kind, samples) if samples > 1 else ""
  notice = "Computer-made image, no measurement; not for diagnosis."
  if colour:
    notice += " Colours are no measurement: uptake is measured on the SUV volume."
  return {
    "synthetic": True, "notice": notice, "modality": modality.name,
    "units": _unit(kind) if colour else modality.unit,
    **({"image": meaning} if meaning else {}),
    "made_from": {name: named(p) for name, p in inputs.items()},
    **model,
    "grid": grid if grid in GRIDS else named(grid),
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


def done(path: Path, expected: Mapping[str, Any], found: Sequence[str] = ()) -> bool:
  """Whether the output is there already from the same input and run; UserError if from another.

  `found` are fields of its sidecar that are not known before it is made.
  """
  parts = [path, sidecar_of(path)]
  if volumes.extension(path) == ".mhd":
    parts.append(path.with_suffix(".raw"))
  there = [f for f in parts if f.exists()]
  if not there:
    return False
  told = _parsed(parts[1]) if there == parts else None
  if isinstance(told, dict) and {k: v for k, v in told.items() if k not in found} == expected:
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


def named(path: str | Path) -> dict[str, str]:
  """How a sidecar names a file that was read."""
  return {"file": Path(path).name, "sha256": _digest(Path(path))}


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
