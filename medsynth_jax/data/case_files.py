"""One case's work in `prepare`: from its scans to one .npz, and what is read back from that."""

import dataclasses
import hashlib
import json
import os
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

from medsynth_jax.data import case, grids, qc
from medsynth_jax.data.case import Placed, Scan
from medsynth_jax.data.dataset import CEILING, quantise
from medsynth_jax.data.intensities import Rules, Scaling, clipped
from medsynth_jax.data.table import Row
from medsynth_jax.data.volumes import ImageWarning, read
from medsynth_jax.errors import UserError

FORMAT = 1
COARSEST = 2e-3  # of a scaling's range: the largest step that 16 bits may have
CT_SHOWN = Scaling("linear", -200.0, 300.0)  # HU; soft tissue and bone on the sheet


@dataclasses.dataclass(frozen=True)
class Job:
  """All that a worker needs for one case; its result goes to `path`.

  `rules` has every image column of the table and `rois` every region, in the order of their bits.
  """
  table: str
  row: Row
  rules: Mapping[str, Rules]
  rois: tuple[str, ...]
  reference: str
  spacing: tuple[float, ...] | None
  size: tuple[int, ...] | None
  path: str


def make(job: Job) -> None:
  """Prepares one case into `job.path`, complete or not at all; UserError names row and file."""
  with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    try:
      arrays, meta = _make(job)
    except UserError as error:
      raise UserError(f"row {job.row.line} of {job.table}: {error}") from None
  meta["notes"] += [str(w.message) for w in seen if issubclass(w.category, ImageWarning)]
  temporary = f"{job.path}.{os.getpid()}.tmp"
  try:
    with open(temporary, "wb") as file:
      np.savez(file, meta=np.array(json.dumps(meta)), **arrays)
    os.replace(temporary, job.path)
  finally:
    if os.path.exists(temporary):
      os.unlink(temporary)


def load_meta(path: str) -> dict[str, Any]:
  """What `make` found out about a case: geometry, scalings, shares, notes, digest."""
  with np.load(path) as file:
    return json.loads(str(file["meta"]))


def load_slices(path: str, plane: int) -> dict[str, np.ndarray]:
  """A case's stored arrays, slice axis first, as `dataset.write_records` takes them."""
  with np.load(path) as file:
    arrays = {n.removeprefix("image/"): np.moveaxis(file[n], plane, 0)
              for n in file.files if n.startswith("image/")}
    bits = {n: np.moveaxis(file[n], plane, 0).astype(np.uint32) for n in ("valid", "regions")}
  return arrays | bits


def load_strip(path: str) -> np.ndarray:
  """A case's row of the QC sheet."""
  with np.load(path) as file:
    return file["strip"]


# --- the work --------------------------------------------------------------------------------


def _make(job: Job) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
  names = tuple(n for n in job.rules if n in job.row.images)
  kinds = {n: job.rules[n].type for n in names}
  reference = case.reference_of(names, job.reference, kinds)
  scan = _understand(job, reference)
  shape, affine = grids.fit_to(*grids.model_grid(scan.volume, job.spacing), job.size)
  placed, images, notes = {}, {}, []
  for name in (reference, *(n for n in names if n != reference)):
    scan = scan if name == reference else _understand(job, name)
    placed[name] = case.place(scan, shape, affine)
    images[name] = _facts(scan)
    notes += scan.notes
  del scan  # only what lies on the model grid is needed from here on
  body = _body(job, reference, placed[reference].foreground, affine)
  notes += _check_overlap(job, reference, placed, body)
  rois = _regions(job, shape, affine, notes)
  for name in names:
    # A noise-free image is compared with its modality's images, so it takes their scaling.
    scaled = images.get(name.removeprefix(CEILING), images[name])
    images[name] = images[name] | {
      "source": scaled["source"], "target": scaled["target"],
      "clipped": _clipped(Scaling(**scaled["target"]), placed[name], body, rois)}
  arrays, quantised = _arrays(job, placed, body, rois)
  for name in names:
    _check_spread(job, name, quantised[name], Scaling(**images[name]["target"]))
  shown = {n: placed[n] for n in names if not n.startswith(CEILING)}
  strip = qc.strip(job.row.name, {n: p.image for n, p in shown.items()},
                   {n: CT_SHOWN if kinds[n] == "ct" else Scaling(**images[n]["target"])
                    for n in shown}, reference, body, affine)
  meta = {
    "reference": reference, "shape": list(shape), "affine": affine.tolist(), "rois": list(rois),
    "images": {n: images[n] | quantised[n] for n in names}, "notes": notes,
    "foreground": {n: _shares(p.foreground) for n, p in shown.items()}, "digest": _digest(arrays)}
  return arrays | {"strip": strip}, meta


def _understand(job: Job, name: str) -> Scan:
  return case.understand(read(job.row.images[name]), job.rules[name])


def _facts(scan: Scan) -> dict[str, Any]:
  return {"file": scan.volume.file, "shape": list(scan.volume.array.shape),
          "affine": scan.volume.affine.tolist(),
          "source": [dataclasses.asdict(s) for s in scan.source],
          "target": dataclasses.asdict(scan.target)}


def _body(job: Job, reference: str, made: np.ndarray, affine: np.ndarray) -> np.ndarray:
  """The body of the case: the mask that its row names, else the one made from the reference."""
  if job.row.mask:
    mask = case.place_mask(read(job.row.mask, mask=True), made.shape, affine)
    if not mask.any():
      raise UserError(f"{job.row.mask}: the mask has no voxel on the grid of"
                      f" {job.row.images[reference]}; check that it belongs to this case")
    return mask
  if not made.any():
    raise UserError(f"{job.row.images[reference]}: no body found in it, so the mask would be"
                    " empty; give one in the column 'mask'")
  return made


def _check_overlap(job: Job, reference: str, placed: Mapping[str, Placed],
                   body: np.ndarray) -> list[str]:
  notes, files = [], job.row.images
  for name, one in placed.items():
    share = float((one.valid & body).sum() / body.sum())
    if share == 0:
      raise UserError(f"no overlap: '{name}' ({files[name]}) shows nothing of the body on the grid"
                      f" of '{reference}' ({files[reference]}); check that both are of one patient"
                      " in one position")
    if share < 0.1:
      notes.append(f"{files[name]}: covers {share:.1%} of the body on the grid of '{reference}'")
  return notes


def _regions(job: Job, shape, affine: np.ndarray, notes: list[str]) -> dict[str, np.ndarray]:
  regions = {}
  for name in (r for r in job.rois if r in job.row.rois):
    file = job.row.rois[name]
    region = case.place_mask(read(file, mask=True), shape, affine)
    if region.any():
      regions[name] = region
    else:
      notes.append(f"{file}: region '{name}' has no voxel on the model grid and is left out")
  return regions


def _clipped(scaling, placed: Placed, body: np.ndarray,
             rois: Mapping[str, np.ndarray]) -> dict[str, float]:
  """Share of measured voxels outside the target scaling, in the body and in each region."""
  return {name: clipped(scaling, placed.image[region & placed.valid])
          for name, region in {"all": body, **rois}.items()}


def _arrays(job: Job, placed: Mapping[str, Placed], body: np.ndarray,
            rois: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], dict[str, dict]]:
  """The arrays to store, and each image's slope and intercept."""
  arrays, quantised = {}, {}
  valid = np.zeros(body.shape, np.uint8 if len(job.rules) <= 8 else np.uint32)
  regions = body.astype(np.uint8 if len(job.rois) < 8 else np.uint32)
  for bit, name in enumerate(job.rules):
    if name in placed:
      stored, slope, intercept = quantise(placed[name].image)
      arrays[f"image/{name}"] = stored
      quantised[name] = {"slope": slope, "intercept": intercept}
      valid |= placed[name].valid.astype(valid.dtype) << valid.dtype.type(bit)
  for bit, name in enumerate(job.rois, start=1):
    if name in rois:
      regions |= rois[name].astype(regions.dtype) << regions.dtype.type(bit)
  return arrays | {"valid": valid, "regions": regions}, quantised


def _check_spread(job: Job, name: str, stored: Mapping[str, float], scaling: Scaling) -> None:
  """Refuses a volume of whose 16 bits a few extreme voxels leave too little for the patient."""
  if stored["slope"] > COARSEST * (scaling.high - scaling.low):
    low, high = stored["intercept"], stored["intercept"] + 65535 * stored["slope"]
    raise UserError(f"{job.row.images[name]}: voxels from {low:.4g} to {high:.4g}, but {name} is"
                    f" scaled from {scaling.low:.4g} to {scaling.high:.4g}: spikes or padding;"
                    " clip them in the file")


def _shares(foreground: np.ndarray) -> list[list[float]]:
  """Per axis, the share of each slice that shows the patient."""
  return [foreground.mean(tuple(b for b in range(3) if b != axis)).tolist() for axis in range(3)]


def _digest(arrays: Mapping[str, np.ndarray]) -> str:
  digest = hashlib.sha256()
  for name in sorted(arrays):
    digest.update(name.encode())
    digest.update(np.ascontiguousarray(arrays[name]))
  return digest.hexdigest()
