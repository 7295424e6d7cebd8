"""The description of a data set (`Info`) from its prepared cases."""

import dataclasses
import importlib.metadata
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from medsynth_jax import __version__
from medsynth_jax.data import dataset, phantom
from medsynth_jax.data.case import reference_of
from medsynth_jax.data.dataset import Case, Info, Modality
from medsynth_jax.data.intensities import Rules, Scaling
from medsynth_jax.data.table import Table
from medsynth_jax.errors import UserError

PLANES = ("sagittal", "coronal", "axial")


def recorded(config: ConfigDict) -> dict[str, Any]:
  """The config as dataset.json keeps it: all that changes what is in the data set."""
  return {k: v for k, v in config.to_dict().items() if k not in ("out", "workers")}


def reference_name(config: ConfigDict, table: Table, rules: Mapping[str, Rules]) -> str:
  """The modality that gives the grid: as said, else the last column that is no PET."""
  kinds = {m: r.type for m, r in rules.items()}
  return config.reference or reference_of(table.modalities, "", kinds)


def describe(config: ConfigDict, table: Table, rules: Mapping[str, Rules],
             plan: Mapping[str, tuple[str, int]], made: Sequence[Mapping[str, Any]],
             key: str) -> Info:
  """Brings together what the cases' files say (`case_files.load_meta`), in the table's order.

  `plan` is {subject: (split, fold)}, `key` what the folder is recognised by. Raises UserError if no
  training slice shows enough of the patient.
  """
  reference = reference_name(config, table, rules)
  plane = _plane(config.plane, [m for m in made if m["reference"] == reference] or made)
  described = _cases(config, table, plan, made, plane)
  trained = [c for c in described if c.split == "train"]
  _check_slices(config, described)
  warnings = list(dict.fromkeys(w for m in made for w in m["notes"]))
  modalities = {}
  for name in table.modalities:
    scalings = [c.images[name].target for c in trained if name in c.images]
    if not scalings:
      warnings.append(f"{name}: no training subject has it, so no network can learn it")
      scalings = [c.images[name].target for c in described if name in c.images]
    modalities[name] = _modality(name, rules[name], scalings)
  if not any(c.split == "validation" for c in described):
    warnings.append("no validation subject: `best` will be the latest checkpoint")
  spacing = [np.sqrt((np.asarray(c.affine)[:3, :3] ** 2).sum(0)) for c in trained]
  recipe = phantom.recipe(Path(table.path).parent)
  simulation = {"simulation": recipe, "ceiling_sources": recipe["sources"]} if recipe else {}
  info = Info(
    name=config.name or Path(config.out).name, reference=reference,
    simulated=config.simulated or bool(recipe),
    plane=plane, spacing=tuple(float(s) for s in np.median(spacing, 0)),
    anatomical=_anatomical(config.anatomical, described), modalities=modalities, rois=table.rois,
    cases=described, config=recorded(config), versions=_versions(),
    notes={"inputs": key, "metadata": list(table.metadata), "warnings": warnings,
           "counts": _counts(described, modalities), **simulation})
  digests = {i: m["digest"] for i, m in enumerate(made)}
  return dataclasses.replace(info, hash=dataset.content_hash(info, digests))


def _cases(config: ConfigDict, table: Table, plan: Mapping[str, tuple[str, int]],
           made: Sequence[Mapping[str, Any]], plane: int) -> tuple[Case, ...]:
  first, result = dict.fromkeys(dataset.SPLITS, 0), []
  for number, (row, meta) in enumerate(zip(table.rows, made, strict=True)):
    split, fold = plan[row.subject]
    shown = {n: tuple(k for k, share in enumerate(shares[plane]) if share >= config.min_foreground
                      and share > 0) for n, shares in meta["foreground"].items()}
    result.append(dataset.case_of({
      "volume": number, "subject": row.subject, "session": row.session, "split": split,
      "fold": fold, "group": row.group, "shape": meta["shape"], "affine": meta["affine"],
      "first": first[split], "images": meta["images"], "rois": meta["rois"], "foreground": shown,
      "metadata": dict(row.metadata)}))
    first[split] += meta["shape"][plane]
  return tuple(result)


def _plane(wanted: str, made: Sequence[Mapping[str, Any]]) -> int:
  """The slice axis: as said, or by majority the axis of the coarsest spacing (isotropic: axial)."""
  if wanted != "auto":
    return PLANES.index(wanted)
  votes = [0, 0, 0]
  for meta in made:
    spacing = np.sqrt((np.asarray(meta["affine"])[:3, :3] ** 2).sum(0))
    votes[int(np.flatnonzero(spacing > 0.95 * spacing.max())[-1])] += 1
  return max((2, 1, 0), key=lambda a: votes[a])


def _check_slices(config: ConfigDict, described: tuple[Case, ...]) -> None:
  trained = [c for c in described if c.split == "train"]
  for name in {n: None for c in trained for n in c.foreground}:
    if not any(c.foreground.get(name) for c in trained):
      raise UserError(f"no slice left: in no training slice of '{name}' does the patient fill"
                      f" {config.min_foreground:.0%}; lower --config.min_foreground")


def _modality(name: str, rules: Rules, scalings: list[Scaling]) -> Modality:
  typical = Scaling(scalings[0].curve, float(np.median([s.low for s in scalings])),
                    float(np.median([s.high for s in scalings])))
  return Modality(name, rules.type, rules.unit, rules.background, rules.source, rules.target,
                  typical)


def _anatomical(wanted: str, described: tuple[Case, ...]) -> bool:
  if wanted != "auto":
    return wanted == "yes"
  one = described[0]
  return len(described) > 1 and all(
    c.shape == one.shape and np.allclose(c.affine, one.affine, atol=1e-3) for c in described)


def _counts(described: tuple[Case, ...], modalities) -> dict[str, Any]:
  return {split: {
    "subjects": len({c.subject for c in described if c.split == split}),
    "cases": sum(c.split == split for c in described),
    **{n: sum(c.split == split and n in c.images for c in described) for n in modalities}}
    for split in dataset.SPLITS}


def _versions() -> dict[str, str]:
  packages = ("numpy", "scipy", "nibabel", "SimpleITK", "pydicom", "tensorflow-datasets")
  return {"medsynth_jax": __version__, "python": platform.python_version(),
          **{p: importlib.metadata.version(p) for p in packages}}
