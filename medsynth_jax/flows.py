"""The field of a registration network against a given scan, as a file to look at.

Synthesis itself uses the generator alone: the field says where the network believes that the target
lies off the source, and how far.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import medsynth_jax
from medsynth_jax import checkpoint, outputs, windows
from medsynth_jax.data import case, volumes
from medsynth_jax.data.intensities import to_model
from medsynth_jax.errors import UserError
from medsynth_jax.nets.warp import folding

FOUND = ("folded", "mean_length_mm")  # what the sidecar tells of the field
CONVENTION = ("displacement in mm along the axes x (to the patient's right), y (to the front) and z"
              " (upwards), on the model grid: the target shows at p what the synthetic image shows"
              " at p + field(p)")


def check(synthesizer, jobs: Sequence) -> None:
  """A UserError where a stage has no registration network, or more than one image is made."""
  run, stage = synthesizer.run, synthesizer.stage
  if run.methods[stage].flow is None:
    able = [s for s, m in run.methods.items() if m.flow]
    raise UserError(f"--save-flow: stage '{stage}' ({run.sections[stage].method}) has no"
                    " registration network; " + (f"give --stage={able[-1]}" if able else
                                                 "this run has no stage that has one"))
  if len(jobs) != 1 or len(jobs[0][1]) != 1 or (run.task.any_source and len(jobs[0][0]) != 1):
    raise UserError("--save-flow: the target is one scan, so give one scan by --input and one"
                    " modality by --target")


def save(synthesizer, inputs: Mapping[str, Path], images: Mapping[str, Path],
         target_file: str) -> Path | None:
  """Writes <image>_flow.nii.gz and its sidecar, prints how long the field is and where it folds.

  Args:
    synthesizer: a `synthesize.Synthesizer`.
    inputs, images: as `synthesize.scan` takes them.
    target_file: a scan of the target modality, of the same patient.

  Returns:
    The file; None if it is there already.

  Raises:
    UserError: an unsuitable scan, or a file that exists with other content.
  """
  info, ((target, image),) = synthesizer.run.info, images.items()
  path = Path(image).with_name(f"{outputs.stem(Path(image))}_flow.nii.gz")
  sidecar = {
    "notice": "Computed by a registration network, no measurement; not for diagnosis.",
    "field": CONVENTION, "units": "mm", "target": {target: outputs.named(target_file)},
    "made_from": {name: outputs.named(file) for name, file in inputs.items()},
    **synthesizer.told, "software": f"medsynth_jax {medsynth_jax.__version__}"}
  if outputs.done(path, sidecar, FOUND):
    return None
  source = case.prepare_source({n: volumes.read(file) for n, file in inputs.items()}, info)
  pixels, inside = flow(synthesizer, source, target, volumes.read(target_file))
  field = in_mm(pixels, source.affine, info.plane)
  sidecar |= measured(pixels, field, inside, info.plane)
  volumes.write(path, field, source.affine)
  checkpoint.write_text(outputs.sidecar_of(path), json.dumps(sidecar, indent=1) + "\n")
  print(f"{path}: field of {sidecar['mean_length_mm']:.2f} mm on average written, folded in"
        f" {sidecar['folded']:.2%} of the body")
  return path


def flow(synthesizer, source: case.Source, target: str, scan: volumes.Volume
         ) -> tuple[np.ndarray, np.ndarray]:
  """(pixels [n, H, W, rank] slice axis first, where both were measured in the body [x, y, z])."""
  run, info = synthesizer.run, synthesizer.run.info
  task, = synthesizer.views(source.images)
  shown = case.understand(scan, info.modality(target))
  placed = case.place(shown, source.mask.shape, source.affine)
  inside = placed.valid & source.valid & source.mask
  if not inside.any():
    raise UserError(f"--save-flow: {scan.file} shows nothing of the body in the input; give a scan"
                    " of the same patient in the same position")
  truth = np.moveaxis(to_model(shown.target, placed.image), info.plane, 0)[..., None]
  register, synthesis = run.methods[synthesizer.stage].flow, run.config.synthesis
  with run.tracing():
    predict = jax.jit(lambda state, batch, key: register(state, batch))
    pixels = windows.synthesise(
      predict, synthesizer.state, synthesizer.channels(source, task), task,
      source_modality=info.index(task.sources[0]), target_modality=info.index(target),
      key=run.key(synthesizer.stage), batch_size=synthesis.batch_size, overlap=synthesis.overlap,
      put=run.put, target=truth.astype(np.float32))
  return pixels, inside


def in_mm(pixels: np.ndarray, affine: np.ndarray, plane: int) -> np.ndarray:
  """A field [n, H, W, rank] in pixels, slice axis first, as [x, y, z, 3] in mm along RAS+ axes.

  Of slices (rank 2) it has no part along the slice axis of the grid.
  """
  axes = [plane, *(a for a in range(3) if a != plane)][-pixels.shape[-1]:]
  steps = affine[:3, :3].T[axes]  # mm along x, y, z of one pixel along each axis of the field
  return np.moveaxis(pixels @ steps, 0, plane).astype(np.float32)


def measured(pixels: np.ndarray, field: np.ndarray, inside: np.ndarray, plane: int
             ) -> dict[str, Any]:
  """The share of the voxels `inside` where the field folds, and its mean length there.

  Folds are counted as evaluation counts them, see `warp.folding`; of slices in the slice.
  """
  mask = np.moveaxis(inside, plane, 0)[..., None].astype(np.float32)
  deep = pixels.shape[-1] == 3
  folded = folding(pixels[None], mask[None]) if deep else folding(pixels, mask)
  return dict(zip(FOUND, (float(folded), float(np.linalg.norm(field[inside], axis=-1).mean())),
                  strict=True))
