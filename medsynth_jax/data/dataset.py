"""The data set on disk: `dataset.json` (Info) and TFDS array_record shards (Store).

Layout of a data set folder:

  dataset.json        Info: modalities, splits, geometry and scaling of every case, hash
  records/1.0.0/      TFDS array_record shards, one TFDS split per data split
  cases.csv, qc.png   the table that was read, and the sheet to look at

A record is a slice. It holds the physical values of every modality as uint16 with a slope and an
intercept per volume (as NIfTI stores them; the error is at most 1/131070 of the volume's own
range), the field of view of each modality as bits of `valid`, and the body mask and the named
regions as bits of `regions`.
"""

import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from medsynth_jax.data import fusion
from medsynth_jax.data.intensities import Scaling, to_model
from medsynth_jax.errors import UserError

FORMAT = 1
SPLITS = ("train", "validation", "test")
CEILING = "ceiling_"  # prefix of the noise-free images that simulated data carry


@dataclasses.dataclass(frozen=True)
class Modality:
  """What a data set knows of one modality.

  `source` and `target` are the rules of `intensities`; `typical` is the training set's median
  target scaling, by which a synthetic image without units (MR) is written.
  """
  name: str
  type: str
  unit: str
  background: float
  source: tuple[Mapping[str, Any], ...]
  target: Mapping[str, Any]
  typical: Scaling

  @property
  def channels(self) -> int:
    """Number of channels of this modality as a source."""
    return len(self.source)


# what is derived of a source MR and a PET, never stored: see `data/fusion.py`
FUSION = Modality(fusion.NAME, "rgb", "1", 0.0, (), {"kind": "window", "low": 0.0, "high": 1.0},
                  Scaling("linear", 0.0, 1.0))


@dataclasses.dataclass(frozen=True)
class Image:
  """One volume of a case: where it came from, its scaling, and how its records are quantised.

  `shape` and `affine` are the grid of the file; `clipped` is the share of voxels outside the
  target scaling, `{"all": share, roi: share}`.
  """
  file: str
  shape: tuple[int, ...]
  affine: tuple[tuple[float, ...], ...]
  source: tuple[Scaling, ...]
  target: Scaling
  slope: float
  intercept: float
  clipped: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Case:
  """One patient visit on its model grid (RAS+ axis order).

  `first` is the number of its first record inside its split; `foreground` lists, per modality,
  the slices that training may draw when that modality is the source.
  """
  volume: int
  subject: str
  session: str
  split: str
  fold: int
  group: str
  shape: tuple[int, int, int]
  affine: tuple[tuple[float, ...], ...]
  first: int
  images: Mapping[str, Image]
  rois: tuple[str, ...]
  foreground: Mapping[str, tuple[int, ...]]
  metadata: Mapping[str, str]

  @property
  def name(self) -> str:
    return f"{self.subject}_{self.session}" if self.session else self.subject


@dataclasses.dataclass(frozen=True)
class Info:
  """A data set's description, a plain value: `dataset.json`.

  `plane` is the slice axis of the RAS+ arrays (0 sagittal, 1 coronal, 2 axial); `spacing` is the
  median model-grid spacing in mm along x, y, z; `anatomical` says that one voxel is one place in
  all cases (a common grid, or lesion-centred crops), which the `mean_image` baseline needs.
  """
  name: str
  simulated: bool
  reference: str
  plane: int
  spacing: tuple[float, float, float]
  anatomical: bool
  modalities: Mapping[str, Modality]
  rois: tuple[str, ...]
  cases: tuple[Case, ...]
  config: Mapping[str, Any]
  versions: Mapping[str, str]
  notes: Mapping[str, Any]
  hash: str = ""
  format: int = FORMAT

  @property
  def names(self) -> tuple[str, ...]:
    """Modalities that a user may ask for, in the table's order (no noise-free images)."""
    return tuple(n for n in self.modalities if not n.startswith(CEILING))

  def index(self, modality: str) -> int:
    """The number of a modality in batches and in the bits of `valid`; a fusion's is behind them."""
    return (*self.modalities, fusion.NAME).index(self.modality(modality).name)

  def modality(self, name: str) -> Modality:
    """The modality of that name, "fusion" included; a UserError lists the known names."""
    if name == fusion.NAME and name not in self.modalities:
      return FUSION
    if name not in self.modalities:
      raise UserError(f"unknown modality '{name}': the data set has {', '.join(self.names)}")
    return self.modalities[name]

  def to_model(self, modality: str, physical: float) -> float:
    """A physical value (HU, SUV) in the model units of that modality as a target."""
    return float(to_model(self.modality(modality).typical, np.asarray(physical), clip=False))

  def split(self, name: str) -> tuple[Case, ...]:
    """The cases of one split."""
    return tuple(c for c in self.cases if c.split == name)

  def spacing_of(self, case: Case) -> tuple[float, float, float]:
    """Spacing in mm of a case, slice axis first."""
    spacing = np.sqrt((np.asarray(case.affine)[:3, :3] ** 2).sum(0))
    return tuple(float(s) for s in np.r_[spacing[self.plane], np.delete(spacing, self.plane)])


def save_info(info: Info, path: Path) -> None:
  """Writes `dataset.json` (temporary name, then rename)."""
  temporary = path.with_name(path.name + ".partial")
  temporary.write_text(json.dumps(dataclasses.asdict(info), indent=1) + "\n")
  os.replace(temporary, path)


def load_info(folder: str | os.PathLike) -> Info:
  """Reads `dataset.json` of a data set or run folder; UserError if absent or of another format."""
  path = Path(folder) / "dataset.json"
  if not path.is_file():
    raise UserError(f"{folder}: no dataset.json, so this is no data set; make one with"
                    " `python -m medsynth_jax.prepare`")
  try:
    raw = json.loads(path.read_text())
  except json.JSONDecodeError as error:
    raise UserError(f"{path}: not readable as JSON ({error}); prepare the data set again") from None
  if raw.get("format") != FORMAT:
    raise UserError(f"{path}: format {raw.get('format')}, this version reads {FORMAT};"
                    " prepare the data set again")
  return _info(raw)


def _info(raw: dict[str, Any]) -> Info:
  modalities = {n: Modality(**{**m, "source": tuple(m["source"]),
                               "typical": Scaling(**m["typical"])})
                for n, m in raw["modalities"].items()}
  cases = tuple(case_of(c) for c in raw["cases"])
  return Info(**{**raw, "modalities": modalities, "cases": cases, "rois": tuple(raw["rois"]),
                 "spacing": tuple(raw["spacing"])})


def case_of(raw: Mapping[str, Any]) -> Case:
  """A case from its fields as JSON has them."""
  images = {n: Image(**{**i, "shape": tuple(i["shape"]), "affine": _rows(i["affine"]),
                        "source": tuple(Scaling(**s) for s in i["source"]),
                        "target": Scaling(**i["target"])})
            for n, i in raw["images"].items()}
  return Case(**{**raw, "shape": tuple(raw["shape"]), "affine": _rows(raw["affine"]),
                 "images": images, "rois": tuple(raw["rois"]),
                 "foreground": {n: tuple(s) for n, s in raw["foreground"].items()}})


def _rows(matrix) -> tuple[tuple[float, ...], ...]:
  return tuple(tuple(float(x) for x in row) for row in matrix)


# --- records ---------------------------------------------------------------------------------


def quantise(volume: np.ndarray) -> tuple[np.ndarray, float, float]:
  """A float volume as uint16 with (slope, intercept); the extremes are exact."""
  low, high = float(volume.min()), float(volume.max())
  slope = (high - low) / 65535 or 1.0
  return np.round((volume - low) / slope).astype(np.uint16), slope, low


def dequantise(stored: np.ndarray, image: Image) -> np.ndarray:
  """Physical float32 values of stored uint16 ones."""
  return stored.astype(np.float32) * np.float32(image.slope) + np.float32(image.intercept)


def write_records(folder: Path, info: Info,
                  read: Callable[[int], Mapping[str, np.ndarray]]) -> None:
  """Writes the array_record shards of all cases, in order, holding one case in memory.

  `read(volume)` gives {modality: uint16 [n, H, W] for those present, "valid": uint32 [n, H, W],
  "regions": uint32 [n, H, W]}; bit i of `valid` is modality i, bit 0 of `regions` the body mask,
  bit 1 + j region j.
  """
  import tensorflow_datasets as tfds

  names = tuple(info.modalities)
  def plane(dtype):
    return tfds.features.Tensor(shape=(None, None), dtype=dtype,
                                encoding=tfds.features.Encoding.BYTES)
  features = tfds.features.FeaturesDict({
    "volume": np.int32, "slice": np.int32, "valid": plane(np.uint32), "regions": plane(np.uint32),
    **{n: plane(np.uint16) for n in names}})

  class Records(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """One record a slice, in the order of dataset.json."""
    VERSION = tfds.core.Version("1.0.0")
    name = "records"

    def _info(self):
      return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager):
      return {s: self._generate_examples(s) for s in SPLITS if info.split(s)}

    def _generate_examples(self, split) -> Iterator[tuple[int, dict[str, Any]]]:
      for case in info.split(split):
        arrays = read(case.volume)
        absent = np.zeros(arrays["valid"].shape[1:], np.uint16)
        for k in range(len(arrays["valid"])):
          yield case.first + k, {
            "volume": case.volume, "slice": k, "valid": arrays["valid"][k],
            "regions": arrays["regions"][k],
            **{n: arrays[n][k] if n in arrays else absent for n in names}}

  builder = Records(data_dir=str(folder), file_format="array_record")
  with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
    builder.download_and_prepare()  # it would tell of downloads, of which there are none
  shutil.rmtree(folder / "downloads", ignore_errors=True)  # TFDS makes it, always empty here


def content_hash(info: Info, digests: Mapping[int, str]) -> str:
  """SHA-256 over what a model can see: the records' digests, splits, geometry, scaling, rules."""
  def seen(case: Case):
    raw = dataclasses.asdict(case)
    for image in raw["images"].values():
      del image["file"]
    return raw, digests[case.volume]
  text = json.dumps([[seen(c) for c in info.cases],
                     {n: dataclasses.asdict(m) for n, m in info.modalities.items()}, info.plane])
  return hashlib.sha256(text.encode()).hexdigest()


class Store:
  """Random access to the slices of a prepared data set (picklable; files open on first use)."""

  def __init__(self, folder: str | os.PathLike, info: Info | None = None):
    self.folder = str(folder)
    self.info = info or load_info(folder)

  @functools.cached_property
  def _sources(self):
    import tensorflow_datasets as tfds
    path = Path(self.folder) / "records" / "1.0.0"
    if not path.is_dir():
      raise UserError(f"{path}: missing; the data set is incomplete, prepare it again")
    return tfds.builder_from_directory(str(path)).as_data_source()

  def open(self) -> None:
    """Opens the files and reads a record of each split; to be called before threads read.

    TFDS replaces the import function while it loads lazily; a library that another thread imports
    at that moment would keep unloaded modules for good.
    """
    for source in self._sources.values():
      source[0]

  def __getstate__(self):
    return {"folder": self.folder, "info": self.info}

  def slices(self, case: Case, numbers) -> dict[str, Any]:
    """Slices of a case by number.

    Returns {"images": {modality: float32 [n, H, W] physical}, "valid": {modality: bool},
    "mask": bool, "rois": {name: bool}}; modalities that the case lacks are absent.
    """
    records = self._sources[case.split].__getitems__([case.first + int(k) for k in numbers])
    stack = {n: np.stack([r[n] for r in records]) for n in (*case.images, "valid", "regions")}
    bit = lambda name, i: (stack[name] >> np.uint32(i)) & np.uint32(1) == 1  # noqa: E731
    return {
      "images": {n: dequantise(stack[n], image) for n, image in case.images.items()},
      "valid": {n: bit("valid", self.info.index(n)) for n in case.images},
      "mask": bit("regions", 0),
      "rois": {r: bit("regions", 1 + self.info.rois.index(r)) for r in case.rois},
    }

  def volume(self, case: Case) -> dict[str, Any]:
    """All slices of a case, as `slices`."""
    return self.slices(case, range(case.shape[self.info.plane]))
