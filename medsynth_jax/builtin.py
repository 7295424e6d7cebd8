"""The built-in simulated data set of a run, made by the same `prepare` as anybody's scans."""

import shutil
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from medsynth_jax import config as configs
from medsynth_jax import prepare
from medsynth_jax.data import fusion, intensities, phantom
from medsynth_jax.data.dataset import Case, Info, Modality
from medsynth_jax.data.examples import ANY
from medsynth_jax.errors import UserError


def make(config: ConfigDict, workdir: Path) -> Path:
  """Writes RUN/scans (NIfTI files, cases.csv) and prepares RUN/data from it; returns RUN/data.

  What is there already, from the same fields, is kept. Of a fusion image its PET is simulated. With
  data.source=any all modalities are sources. They depend on `config.data` alone, so that runs of
  other methods can share them.

  Raises:
    UserError: fields that cannot be simulated.
  """
  for left in workdir.glob(".scans.part*"):  # of a simulation that was killed
    shutil.rmtree(left, ignore_errors=True)
  simulated, data = config.data.simulated, config.data
  sources, modalities = _modalities(data)
  table = phantom.write(
    workdir / "scans", n_subjects=simulated.n_subjects, seed=simulated.seed,
    modalities=modalities, sources=sources, spacing=_spacing(simulated.spacing),
    misaligned=simulated.misaligned or None, misalignment=simulated.misalignment,
    missing=(simulated.missing, simulated.missing_share), groups=simulated.groups,
    permute=simulated.permute)
  fields = prepare.default_config()
  fields.update(table=str(table), out=str(workdir / "data"), name="built-in simulated subjects",
                seed=simulated.seed, folds=simulated.folds,
                # else a fold might hold all that is known of a target
                stratify="modalities" if simulated.missing == "confounded" else "")
  return prepare.prepare(fields)


def outline(config: ConfigDict) -> Info:
  """The description of the data set that `make` would make, as far as networks depend on it.

  Modalities, units and the size of slices; one case without images, MR from 0 to 1.
  """
  spacing = _spacing(config.data.simulated.spacing)
  (shape, affine), rules = phantom.grid(spacing), {
    name: intensities.rules_for(name) for name in _modalities(config.data)[1]}
  modalities = {name: Modality(name, r.type, r.unit, r.background, r.source, r.target,
                               intensities.fit(r.target, np.array([0.0, 1.0])))
                for name, r in rules.items()}
  case = Case(0, "simulated", "", "train", 0, "", shape, tuple(map(tuple, affine.tolist())), 0, {},
              (), {}, {})
  plane = max((2, 1, 0), key=lambda axis: spacing[axis])
  return Info("outline", True, next(iter(modalities)), plane, spacing, False, modalities, (),
              (case,), {}, {}, {})


def _modalities(data: ConfigDict) -> tuple[tuple[str, ...], tuple[str, ...]]:
  """(sources, all modalities) of the simulated subjects."""
  sources, targets = configs.names(data.source), _simulable(data)
  more = configs.names(data.simulated.modalities)
  if sources == (ANY,):
    sources = tuple(dict.fromkeys((*targets, *more)))
    if len(sources) < 2:
      raise UserError("data.source=any on simulated subjects: name two modalities or more in"
                      " data.targets, as t1,t2,flair")
    if data.simulated.permute:
      raise UserError("data.simulated.permute takes the targets of another subject: with"
                      " data.source=any there are none; set it to False")
  return sources, tuple(dict.fromkeys((*sources, *targets, *more)))


def _simulable(data: ConfigDict) -> tuple[str, ...]:
  """The targets, a fusion image by its PET."""
  targets = configs.names(data.targets)
  if fusion.NAME in targets and not data.fusion:
    raise UserError("data.targets=fusion shows a PET on the source: set data.fusion=pet")
  return tuple(data.fusion if t == fusion.NAME else t for t in targets)


def _spacing(text: str) -> tuple[float, ...]:
  try:
    spacing = tuple(float(n) for n in configs.names(text))
  except ValueError:
    spacing = ()
  if len(spacing) != 3 or min(spacing) <= 0:
    raise UserError(f"data.simulated.spacing={text!r}: give three numbers in mm, as 2,2,2")
  return spacing
