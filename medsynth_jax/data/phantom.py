"""Simulated subjects: image pairs whose truth is known, written as files and a table.

Every image of this module is simulated. It exists so that all commands run without a download, and
as an oracle for tests: noise-free images bound what any method can score, and each modality shows
tissue that another cannot (white-matter lesions in T2 and FLAIR alone; PET foci, half of them
without an MR sign; contrast agent in T1c and CTA alone). The way from the average brain to a
subject is in anatomy.py, from a subject to images in scanner.py; known misalignment is in
displacements.py.
"""

from __future__ import annotations

import csv
import gzip
import json
import multiprocessing
import os
import shutil
from collections.abc import Sequence
from concurrent import futures
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from tqdm import tqdm

from ..errors import UserError
from . import scanner as physics
from .anatomy import CORNER, ENHANCING_SHARE, FIELD, anatomy, stream
from .displacements import displacement_field, pull
from .scanner import MODALITIES, SCANNERS, SHOWS

VERSION = 1  # of the simulation: raise it when images change
RECIPE = "simulated.json"  # the arguments of `write`, beside cases.csv
MISSING = ("none", "random", "group", "confounded")  # why images are absent: see `write`
ROIS = {"lesion": ("lesion",), "enhancing": ("enhancing",),
        "hot_focus": ("hot_focus", "hot_focus_sign"),
        "cold_focus": ("cold_focus", "cold_focus_sign")}


@dataclass(frozen=True)
class Subject:
  """One simulated subject: arrays [x, y, z] on a common grid in RAS+ order.

  Units: HU for ct and cta, SUV for pet, arbitrary for MR.
  """

  name: str
  seed: int
  affine: np.ndarray  # voxel -> mm, float64 [4, 4]
  images: dict[str, np.ndarray]  # {modality: float32}, as measured
  clean: dict[str, np.ndarray]  # without noise
  ceiling: dict[str, np.ndarray]  # without noise, tissue hidden from the sources at its prior mean
  masks: dict[str, np.ndarray]  # {region: bool}: head, brain, vessel, lesion, ...
  displacement: dict[str, np.ndarray | None]  # {modality: float32 [x, y, z, 3] mm}
  jacobian: float  # least determinant of the subject's deformation; positive: it is invertible


def subject_seed(seed: int, index: int) -> int:
  """The seed of subject `index` of data set `seed`: no two pairs share one (index < 2^20)."""
  return (seed << 20) + index


def grid(spacing: Sequence[float]) -> tuple[tuple[int, int, int], np.ndarray]:
  """Shape and affine of a scan; the field of view is 192 x 224 x 192 mm at every spacing."""
  shape = tuple(int(n) for n in np.maximum(np.rint(FIELD / np.asarray(spacing, float)), 1))
  affine = np.diag([*(FIELD / shape), 1.0])
  affine[:3, 3] = CORNER + 0.5 * FIELD / shape
  return shape, affine


def _prior(body, sources):
  """Coverages as far as the sources show them: others are replaced by their mean over subjects."""
  known = {name for name, shown in SHOWS.items() if set(shown) & set(sources)}
  covers = {name: body.abnormal[name] if name in known else body.expected[name] for name in SHOWS}
  if "enhancing" not in known and "lesion" in known:  # where it may enhance is known, not whether
    covers["enhancing"] = ENHANCING_SHARE * body.abnormal["lesion"]
  return covers


def _bin(array, factors):
  """Means over blocks: thick slices of a finer image."""
  for axis, factor in enumerate(factors):
    shape = array.shape[:axis] + (-1, factor) + array.shape[axis + 1:]
    array = array.reshape(shape).mean(axis + 1) if factor > 1 else array
  return array


def _check(modalities, sources, misaligned):
  for name in (*modalities, *sources, *((misaligned,) if misaligned else ())):
    if name not in MODALITIES:
      raise UserError(f"simulated modality {name!r}: known are {', '.join(MODALITIES)}")
  if misaligned and misaligned not in modalities:
    raise UserError(f"misaligned={misaligned!r} is not among the modalities "
                    f"{', '.join(modalities)}")


def subject(seed: int, modalities: Sequence[str] = ("t1", "t2"),
            sources: Sequence[str] = ("t1",), *, spacing: Sequence[float] = (2.0, 2.0, 2.0),
            misaligned: str | None = None, misalignment: float = 0.0,
            scanner: int = 0, name: str | None = None) -> Subject:
  """Simulates one subject; the same seed is the same anatomy, whatever else is asked for.

  Args:
    seed: of the subject.
    modalities: of t1, t1c, t2, pd, flair, ct, cta, pet.
    sources: the modalities that a method sees; all others get a `ceiling`.
    spacing: mm along x, y, z. A thick axis is simulated finer and averaged.
    misaligned: a modality to displace by a smooth random field u, returned in `displacement`
      [x, y, z, 3] in mm along RAS axes: its voxel x shows the tissue that all others, and the
      masks, have at x + u(x). Its `clean` and `ceiling` are displaced too.
    misalignment: mean length of u in mm.
    scanner: index into scanner.SCANNERS (noise, echo time, MR bias, PET resolution).

  Raises:
    UserError: unknown modality or a misalignment so large that it folds the image.
  """
  _check(modalities, sources, misaligned)
  shape, affine = grid(spacing)
  spacing = FIELD / shape
  factors = [int(f) for f in np.maximum(np.rint(spacing / spacing.min()), 1)]
  fine = tuple(n * f for n, f in zip(shape, factors, strict=True))
  body, site = anatomy(seed, fine), SCANNERS[scanner]
  shift = displacement_field(seed, misaligned, fine, misalignment) if misaligned else None

  def scan(modality, covers):
    image = physics.noise_free(body, modality, covers, seed, site)
    if modality == misaligned:
      image = pull(image, shift, FIELD / fine)
    return _bin(physics.receive(image, seed, modality, site), factors)

  clean = {m: scan(m, body.abnormal) for m in modalities}
  known = _prior(body, sources)
  return Subject(
    name=name or f"sim{seed:07d}", seed=seed, affine=affine, clean=clean,
    images={m: physics.add_noise(c, spacing, seed, m, site) for m, c in clean.items()},
    ceiling={m: scan(m, known) for m in modalities if m not in sources},
    masks=_masks(body, factors), jacobian=body.jacobian,
    displacement={m: _bin(shift, factors) if m == misaligned else None for m in modalities})


def _masks(body, factors):
  masks = {"head": body.head, "brain": body.brain}
  shares = {"vessel": body.tissues["blood"]}
  shares |= {roi: sum(body.abnormal[k] for k in kinds) for roi, kinds in ROIS.items()}
  for roi, share in shares.items():
    volume = np.zeros(body.shape, np.float32)
    volume.reshape(-1)[body.inside] = share
    masks[roi] = volume
  return {roi: _bin(m.astype(np.float32), factors) >= 0.5 for roi, m in masks.items()}


def regions(modalities: Sequence[str]) -> tuple[str, ...]:
  """The regions that at least one of the modalities shows."""
  shown = [roi for roi, kinds in ROIS.items()
           if any(set(SHOWS[kind]) & set(modalities) for kind in kinds)]
  return ("brain", *(("vessel",) if {"t1c", "cta"} & set(modalities) else ()), *shown)


def write(folder: str | Path, *, n_subjects: int, seed: int = 0,
          modalities: Sequence[str] = ("t1", "t2"), sources: Sequence[str] = ("t1",),
          spacing: Sequence[float] = (2.0, 2.0, 2.0), misaligned: str | None = None,
          misalignment: float = 0.0, missing: tuple[str, float] = ("none", 0.0),
          groups: int = 1, permute: bool = False, workers: int | None = None) -> Path:
  """Writes a simulated data set (NIfTI files and cases.csv) and returns the table's path.

  Columns: subject, group, (split,) one a modality, mask (the head), mask_<region> for the regions
  that the modalities show, ceiling_<modality> for each modality that is not a source. Cells are
  relative paths; a region that a subject lacks has an empty cell. Displacement fields (see
  `subject`) lie in displacement/<subject>.nii.gz. The folder appears when it is complete; a second
  call with the same arguments returns at once.

  Args:
    folder: made here.
    missing: ("random", p): each image is absent with probability p, never all of a subject's;
      ("group", p): in group g the modality number g (modulo their count) is absent for a share p;
      ("confounded", p): of the targets (the modalities that are no source) a training or validation
      subject of group g has number g (modulo their count) for certain, and lacks each other with
      probability p. With source pet, targets ct and t2 and two groups: CT with sharp PET, MR with
      blurred PET.
      The test subjects of all three have all, at least two a group, so that every target can be
      scored for every scanner; the table gets a column `split`, about 8:1:1 within each group.
    groups: number of sites; site g uses scanner g modulo 3 (the second has blurred PET and more
      noise), so that with "group" and "confounded" the scanner tells which modalities there are.
    permute: the modalities that are no sources come from the next subject, masks and ceiling too:
      no method can learn from such pairs.
    workers: parallel processes; default one a CPU core, or one alone for a small data set.

  Raises:
    UserError: bad arguments, or `folder` holds something else.
  """
  folder = Path(folder)
  recipe = {
    "simulated": True, "version": VERSION, "n_subjects": n_subjects, "seed": seed,
    "modalities": list(modalities), "sources": list(sources),
    "spacing": [float(s) for s in spacing], "misaligned": misaligned,
    "misalignment": float(misalignment), "missing": list(missing), "groups": groups,
    "permute": permute,
    # so that a folder of an older version, whose test subjects may lack images, is told apart
    **({"whole_test": True} if missing[0] in ("random", "group") else {})}
  _check(modalities, sources, misaligned)
  _check_recipe(recipe)
  if folder.exists() and any(folder.iterdir()):
    _check_same(folder, recipe)
    return folder / "cases.csv"
  folder.parent.mkdir(parents=True, exist_ok=True)
  part = folder.with_name(f".{folder.name}.part{os.getpid()}")
  try:
    (part / "images").mkdir(parents=True)
    rows = _write_subjects(part, recipe, workers)
    with (part / "cases.csv").open("w", newline="") as file:
      table = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
      table.writeheader()
      table.writerows(rows)
    (part / RECIPE).write_text(json.dumps(recipe, indent=2) + "\n")
    part.replace(folder)
  finally:
    shutil.rmtree(part, ignore_errors=True)
  return folder / "cases.csv"


def _check_recipe(recipe):
  least = 2 if recipe["permute"] else 1  # a subject alone cannot lend its target to another
  if not least <= recipe["n_subjects"] <= 2**20:
    raise UserError(f"simulated data: n_subjects={recipe['n_subjects']}: need {least} to {2**20}")
  if recipe["groups"] < 1 or recipe["seed"] < 0 or min(recipe["spacing"]) <= 0:
    raise UserError(f"simulated data: groups={recipe['groups']}, seed={recipe['seed']}, "
                    f"spacing={recipe['spacing']}: need groups >= 1, seed >= 0, spacing > 0")
  kind, share = recipe["missing"]
  if kind not in MISSING or not 0 <= share <= 1:
    raise UserError(f"simulated data: missing=({kind!r}, {share}): need one of "
                    f"{', '.join(MISSING)} and a share from 0 to 1")
  n, groups, targets = recipe["n_subjects"], recipe["groups"], _targets(recipe)
  if kind == "confounded" and (groups < 2 or len(targets) < 2 or n < 4 * groups):
    raise UserError(f"simulated data: missing='confounded' with groups={groups}, n_subjects={n} "
                    f"and targets {', '.join(targets) or 'none'}: need two groups, two targets and "
                    "four subjects a group (one to train, one to validate, two to test) or more")
  if kind != "none" and n < 4 * groups:
    raise UserError(f"simulated data: missing={kind!r} with groups={groups}, n_subjects={n}: need"
                    " four subjects a group (one to train, one to validate, two to test) or more")
  absent = [m for m in recipe["sources"] if m not in recipe["modalities"]]
  if absent:
    raise UserError(f"simulated data: source {absent[0]!r} is not among the modalities "
                    f"{', '.join(recipe['modalities'])}")


def recipe(folder: str | Path) -> dict | None:
  """The arguments of the `write` that made a folder; None if its images are no simulated ones."""
  path = Path(folder) / RECIPE
  return json.loads(path.read_text()) if path.is_file() else None


def _check_same(folder, recipe):
  path = folder / RECIPE
  if not path.exists():
    raise UserError(f"{folder}: not empty and no simulated data set; choose another folder")
  stored = json.loads(path.read_text())
  different = [k for k in recipe if stored.get(k) != recipe[k]]
  if different:
    raise UserError(f"{folder}: holds a simulated data set with other {', '.join(different)}; "
                    "choose another folder or delete it")


def _write_subjects(part, recipe, workers):
  n = recipe["n_subjects"]
  voxels = n * float(np.prod(FIELD / recipe["spacing"]))
  if workers is None:  # a small set is done before new processes have started
    workers = (os.cpu_count() or 1) if voxels > 6e6 else 1
  workers = min(workers, n)
  jobs = [(part, recipe, i) for i in range(n)]
  bar = {"total": n, "desc": "simulated subjects", "unit": "subject"}
  if workers == 1:
    return list(tqdm(map(_write_one, jobs), **bar))
  # spawn: the caller may hold JAX's threads, which a forked process would inherit half dead
  context = multiprocessing.get_context("spawn")
  try:
    with futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
      return list(tqdm(pool.map(_write_one, jobs), **bar))
  except BrokenProcessPool as error:
    raise UserError(
      f"simulated data: one of {workers} worker processes died: too little memory, or a script "
      "that is not guarded by `if __name__ == '__main__':`; use workers=1") from error


def _targets(recipe):
  return [m for m in recipe["modalities"] if m not in recipe["sources"]]


def _has_splits(recipe):
  """Whether the simulation says who tests, since the test subjects are whole."""
  return recipe["missing"][0] != "none"


def _split(recipe, index):
  """The side of a subject of such a set: each group's last test, those before validate."""
  group, number = index % recipe["groups"], index // recipe["groups"]
  count = len(range(group, recipe["n_subjects"], recipe["groups"]))
  test, validation = max(2, round(count / 10)), max(1, round(count / 10))
  return "test" if number >= count - test else \
    "validation" if number >= count - test - validation else "train"


def _present(recipe, index):
  """The modalities that subject `index` has."""
  modalities, (kind, share) = recipe["modalities"], recipe["missing"]
  rng = stream(subject_seed(recipe["seed"], index), "missing")
  if _has_splits(recipe) and _split(recipe, index) == "test":
    return modalities
  if kind == "confounded":
    targets = _targets(recipe)
    own = targets[index % recipe["groups"] % len(targets)]
    return [m for m in modalities if m in (own, *recipe["sources"]) or rng.random() >= share]
  if kind == "group":
    lacking = modalities[index % recipe["groups"] % len(modalities)]
    return [m for m in modalities if m != lacking or rng.random() >= share]
  if kind == "random":
    kept = [m for m in modalities if rng.random() >= share]
    return kept or [modalities[rng.integers(len(modalities))]]
  return modalities


def _simulate(recipe, index, modalities):
  return subject(
    subject_seed(recipe["seed"], index), modalities, recipe["sources"],
    spacing=recipe["spacing"], misaligned=recipe["misaligned"] if
    recipe["misaligned"] in modalities else None, misalignment=recipe["misalignment"],
    scanner=index % recipe["groups"] % len(SCANNERS))


def _write_one(job):
  """Writes one subject's files; returns its row of the table."""
  part, recipe, index = job
  name, present = f"sim{index:04d}", _present(recipe, index)
  sources = [m for m in present if m in recipe["sources"]]
  targets = [m for m in present if m not in recipe["sources"]]
  if recipe["permute"]:
    first = _simulate(recipe, index, sources)
    second = _simulate(recipe, (index + 1) % recipe["n_subjects"], targets)
  else:
    first = second = _simulate(recipe, index, present)
  row = {"subject": name, "group": f"site{index % recipe['groups']}"}
  if _has_splits(recipe):
    row["split"] = _split(recipe, index)

  def save(column, array, wanted=True):
    row[column] = f"images/{name}_{column}.nii.gz" if wanted else ""
    if wanted:
      _save(part / row[column], array, second.affine, f"simulated {column}, no patient")

  for m in recipe["modalities"]:
    save(m, (first if m in sources else second).images.get(m), m in present)
  save("mask", second.masks["head"])
  for roi in regions(recipe["modalities"]):
    save(f"mask_{roi}", second.masks[roi], second.masks[roi].any())
  for m in recipe["modalities"]:
    if m not in recipe["sources"]:
      save(f"ceiling_{m}", second.ceiling.get(m), m in present)
  for image in (first, second):
    field = image.displacement.get(recipe["misaligned"])
    if field is not None:
      (part / "displacement").mkdir(exist_ok=True)
      _save(part / f"displacement/{name}.nii.gz", field, image.affine,
            "simulated displacement, mm RAS")
  return row


def _save(path, array, affine, description):
  """NIfTI, 16 bits a voxel (8 for masks, 32 for fields); the same bytes for the same image."""
  mask = array.dtype == bool
  image = nib.Nifti1Image(array.astype(np.uint8) if mask else array, affine)
  if not mask and array.ndim == 3:
    image.set_data_dtype(np.int16)
  image.header["descrip"] = description.encode()
  image.header.set_xyzt_units("mm")
  path.write_bytes(gzip.compress(image.to_bytes(), 1, mtime=0))
