"""From the files of one case to arrays on its model grid: one path for training and new scans."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from medsynth_jax.data import grids, intensities, masks
from medsynth_jax.data.dataset import CEILING, Info, Modality
from medsynth_jax.data.intensities import Rules, Scaling
from medsynth_jax.data.volumes import Volume
from medsynth_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Scan:
  """One image understood on its own grid, before any resampling.

  `volume` has its border-connected fill set to the background; `field` is where it measured and
  `foreground` the body that it shows (bool, the volume's shape); `notes` are warnings.
  """
  volume: Volume
  rules: Rules | Modality
  field: np.ndarray
  foreground: np.ndarray
  source: tuple[Scaling, ...]
  target: Scaling
  notes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Placed:
  """A scan on the model grid: physical float32 image, bool `valid` and `foreground` [x, y, z]."""
  image: np.ndarray
  valid: np.ndarray
  foreground: np.ndarray


@dataclasses.dataclass(frozen=True)
class Source:
  """A new scan (or several stacked ones) ready for synthesis, on its model grid [x, y, z], RAS+.

  `images` are physical, `scans` what each was read as (their scalings), `valid` is where all were
  measured, `mask` the body; `affine` voxel -> RAS+ mm.
  """
  images: Mapping[str, np.ndarray]
  scans: Mapping[str, Scan]
  valid: np.ndarray
  mask: np.ndarray
  affine: np.ndarray
  notes: tuple[str, ...]


def understand(volume: Volume, rules: Rules | Modality) -> Scan:
  """Field of view, foreground and scalings of one image, from that image alone.

  Raises UserError where a volume has no foreground to scale by.
  """
  field = masks.field_of_view(volume.array, rules.type)
  shown = intensities.foreground(volume.array, rules.type, field)
  shown = masks.body_mask(shown, rules.type, volume.affine) & field
  values = volume.array[shown]
  try:
    source = tuple(intensities.fit(r, values) for r in rules.source)
    target = intensities.fit(rules.target, values)
  except ValueError as error:
    raise UserError(f"{volume.file}: {error}; is it the right image, and of type"
                    f" '{rules.type}'?") from None
  notes = intensities.suspicions(volume.array, rules.type, shown)
  if not field.all():
    array = np.where(field, volume.array, np.float32(rules.background))
    volume = dataclasses.replace(volume, array=array)
  return Scan(volume, rules, field, shown, source, target,
              tuple(f"{volume.file}: {n}" for n in notes))


def place(scan: Scan, shape, affine: np.ndarray) -> Placed:
  """A scan on another grid; valid where the values came from measured voxels only."""
  volume = scan.volume
  image = grids.resample(volume, shape, affine, order=1, fill=scan.rules.background)
  if scan.field.all():
    valid = grids.inside(volume.array.shape, volume.affine, shape, affine)
  else:
    measured = dataclasses.replace(volume, array=scan.field.astype(np.float32))
    valid = grids.resample(measured, shape, affine, order=1, fill=0) > 0.999
  shown = dataclasses.replace(volume, array=scan.foreground)
  return Placed(image, valid, grids.resample(shown, shape, affine, order=0, fill=False) & valid)


def place_mask(mask: Volume, shape, affine: np.ndarray) -> np.ndarray:
  """A bool mask from its own header to another grid, nearest neighbour."""
  return grids.resample(mask, shape, affine, order=0, fill=False)


def reference_of(present: Sequence[str], reference: str, kinds: Mapping[str, str]) -> str:
  """The modality whose grid and body a case takes: the reference, else the last that is no PET."""
  if reference in present:
    return reference
  images = [m for m in present if not m.startswith(CEILING)]
  return ([m for m in images if kinds[m] != "pet"] or images)[-1]


def prepare_source(volumes: Mapping[str, Volume], info: Info) -> Source:
  """Prepares a new scan exactly as the data set's scans were.

  `volumes` are {modality: Volume as read}. The model grid is that of the data set's reference
  modality if it is among them; else the first scan's own orientation and extent at the data set's
  median spacing, which is what the network saw. Raises UserError for scans that do not overlap.
  """
  scans = {name: understand(v, info.modality(name)) for name, v in volumes.items()}
  lead = info.reference if info.reference in scans else next(iter(scans))
  shape, affine = _new_grid(scans[lead].volume, lead, info)
  placed = {name: place(scan, shape, affine) for name, scan in scans.items()}
  valid = np.logical_and.reduce([p.valid for p in placed.values()])
  if not valid.any():
    files = ", ".join(s.volume.file for s in scans.values())
    raise UserError(f"{files}: no overlap in space; give scans of one patient in one position")
  return Source({n: p.image for n, p in placed.items()}, scans, valid, placed[lead].foreground,
                affine, tuple(note for s in scans.values() for note in s.notes))


def _new_grid(volume: Volume, name: str, info: Info) -> tuple[tuple[int, ...], np.ndarray]:
  if name == info.reference:
    return grids.model_grid(volume, numbers(info.config.get("spacing", ""), "spacing"))
  shape, affine = grids.model_grid(volume)
  own = np.sqrt((affine[:3, :3] ** 2).sum(0))
  if np.abs(own / np.asarray(info.spacing) - 1).max() < 0.01:
    return shape, affine
  return grids.model_grid(volume, info.spacing)


def numbers(text, field: str, kind=float) -> tuple | None:
  """Three numbers >= 0 along x, y, z from "1,1,3" or a sequence; None if empty."""
  parts = text.replace("x", ",").split(",") if isinstance(text, str) else list(text or ())
  parts = [p for p in parts if p != ""]
  if not parts:
    return None
  try:
    values = tuple(kind(p) for p in parts)
  except ValueError:
    values = ()
  if len(values) != 3 or min(values) < 0:
    raise UserError(f"config.{field}: '{text}'; give three numbers for x, y, z as 1,1,3"
                    " (0 keeps an axis as it is)")
  return values
