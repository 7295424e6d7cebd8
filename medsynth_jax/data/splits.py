"""Which subjects train, validate and test: never a subject on two sides."""

from collections.abc import Mapping, Sequence

import numpy as np

from medsynth_jax.data.table import Row, Table
from medsynth_jax.errors import UserError

STRATA = ("group", "modalities")


def assign(table: Table, ratios: Sequence[float] = (8, 1, 1), folds: int = 0,
           stratify: Sequence[str] = (), seed: int = 0) -> dict[str, tuple[str, int]]:
  """{subject: (split, fold)}, from the table's `split` and `fold` columns or drawn by `seed`.

  `ratios` are train : validation : test; with fewer than 10 subjects validation may stay empty,
  test never does. `folds` divides the training subjects; the others have fold -1. `stratify` keeps
  the shares of "group" and of the "modalities" present alike on all sides. Raises UserError for a
  subject in two splits or folds and for a side that must not be empty.
  """
  unknown = [s for s in stratify if s not in STRATA]
  if unknown:
    raise UserError(f"config.stratify: unknown '{unknown[0]}'; use {' and '.join(STRATA)}")
  subjects = _by_subject(table)
  rng = np.random.default_rng(seed)
  strata = {s: _stratum(rows, stratify) for s, rows in subjects.items()}
  split = _given(table, subjects, "split", "")
  if split is None:
    split = _draw(table, subjects, strata, ratios, rng)
  for side in ("train", "test"):
    if side not in split.values():
      raise UserError(f"{table.path}: no {side} subject; mark at least one in the column 'split'")
  trained = [s for s in subjects if split[s] == "train"]
  fold = _given(table, {s: subjects[s] for s in trained}, "fold", -1)
  if fold is None:
    fold = _folds(table, trained, strata, folds, rng) if folds else {}
  return {s: (split[s], fold.get(s, -1)) for s in subjects}


def _by_subject(table: Table) -> dict[str, list[Row]]:
  subjects = {}
  for row in table.rows:
    subjects.setdefault(row.subject, []).append(row)
  return subjects


def _given(table: Table, subjects: Mapping[str, list[Row]], field: str, empty) -> dict | None:
  """What the table says of each subject; None if its column is absent or empty throughout."""
  said = {}
  for subject, rows in subjects.items():
    values = {getattr(r, field): r.line for r in rows}
    if len(values) > 1:
      (a, i), (b, j) = list(values.items())[:2]
      raise UserError(f"{table.path}: subject '{subject}' has two values of '{field}' ('{a}' in row"
                      f" {i}, '{b}' in row {j}); a subject belongs to one side only")
    said[subject] = next(iter(values))
  if all(v == empty for v in said.values()):
    return None
  for subject, value in said.items():
    if value == empty:
      raise UserError(f"{table.path}: row {subjects[subject][0].line}, column '{field}': empty,"
                      " while others are filled; fill it, or empty the whole column")
  return said


def _stratum(rows: Sequence[Row], stratify: Sequence[str]) -> tuple:
  group = rows[0].group if "group" in stratify else ""
  present = sorted({m for r in rows for m in r.images}) if "modalities" in stratify else []
  return (group, *present)


def _mixed(subjects: Sequence[str], strata: Mapping[str, tuple], rng) -> list[str]:
  """A random order in which every stretch holds the strata in their proportions."""
  members = {}
  for subject in sorted(subjects):
    members.setdefault(strata[subject], []).append(subject)
  places = []
  for stratum in sorted(members):
    order = rng.permutation(len(members[stratum]))
    offset = rng.random()  # else the first side would always get the largest strata
    places += [((i + offset) / len(order), members[stratum][k]) for i, k in enumerate(order)]
  return [subject for _, subject in sorted(places)]


def _draw(table: Table, subjects, strata, ratios, rng) -> dict[str, str]:
  n = len(subjects)
  ratios = np.asarray(ratios, float)
  if ratios.shape != (3,) or (ratios < 0).any() or ratios[0] <= 0 or ratios[2] <= 0:
    raise UserError(f"config.split: {list(ratios)}; give three shares, train:validation:test, as"
                    " 8:1:1 (only validation may be 0)")
  if n < 2:
    raise UserError(f"{table.path}: {n} subject; at least 2 are needed, one to train on and one"
                    " to test")
  share = ratios / ratios.sum()
  test = max(1, round(n * share[2]))
  validation = round(n * share[1])
  if n >= 10 and share[1] > 0:
    validation = max(1, validation)
  validation = min(validation, n - test - 1)
  if n - test < 1:
    raise UserError(f"config.split: {list(ratios)} leaves no training subject of {n}")
  order = _mixed(list(subjects), strata, rng)
  sides = ["test"] * test + ["validation"] * validation + ["train"] * (n - test - validation)
  return dict(zip(order, sides, strict=True))


def _folds(table: Table, trained, strata, folds: int, rng) -> dict[str, int]:
  if not 2 <= folds <= len(trained):
    raise UserError(f"config.folds={folds}: {len(trained)} training subjects of {table.path} can"
                    f" be divided into 2 to {len(trained)} folds")
  # stratum after stratum: in the mixed order alternating strata would get a fold each
  order = sorted(_mixed(trained, strata, rng), key=strata.__getitem__)
  return {s: i % folds for i, s in enumerate(order)}
