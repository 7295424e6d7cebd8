"""Whether a network that makes several modalities makes the one that its code names.

Each code's image of a case is compared with every target that the case has: the image of code ct
has to be closer to the CT than the image of code t2 is.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from medsynth_jax.layout import aligned, number

CONSTANT = "constant"  # the floor's row, beside the codes


@dataclasses.dataclass
class Switch:
  """Errors of one stage: masked MAE in model units halved, so that the range is 1.

  `codes` are the targets that it makes; `errors` {(target, code or CONSTANT): {subject: one a
  case}}.
  """
  codes: Sequence[str]
  errors: dict[tuple[str, str], dict[str, list[float]]] = dataclasses.field(default_factory=dict)

  def add(self, target: str, code: str, subject: str, truth: np.ndarray, image: np.ndarray,
          mask: np.ndarray) -> None:
    """Adds the error of an image against a target, both in model units, in the mask."""
    error = float(np.abs(image[mask].astype(np.float64) - truth[mask]).mean() / 2)
    self.errors.setdefault((target, code), {}).setdefault(subject, []).append(error)

  @property
  def targets(self) -> list[str]:
    """The targets that test subjects have."""
    return [t for t in self.codes if (t, CONSTANT) in self.errors]

  def count(self, target: str) -> int:
    """Number of subjects compared."""
    return len(self.errors[target, CONSTANT])

  def mean(self, target: str, code: str) -> float:
    """Mean over a subject's cases, then over subjects."""
    return float(np.mean([np.mean(e) for e in self.errors[target, code].values()]))

  def closer(self, code: str, other: str) -> bool:
    """Whether the image of a code is closer to its own target than that of another code (or the
    constant image)."""
    return self.mean(code, code) < self.mean(code, other)

  def described(self) -> dict[str, Any]:
    """For summary.json."""
    return {
      "error": "masked MAE in model units, range 1, mean over subjects",
      "n": {t: self.count(t) for t in self.targets},
      "mae": {t: {c: self.mean(t, c) for c in (*self.codes, CONSTANT)} for t in self.targets},
      "closer_to_own_target_than": {t: {c: self.closer(t, c) for c in (*self.codes, CONSTANT)
                                        if c != t} for t in self.targets}}

  def verdicts(self) -> list[str]:
    """A line for each code whose target somebody has."""
    word = {True: "yes", False: "no"}
    return [", ".join([
      f"code {t}: closer to its own target than the image of"
      + ",".join(f" code {c} is: {word[self.closer(t, c)]}" for c in self.codes if c != t),
      f"beats {CONSTANT}: {word[self.closer(t, CONSTANT)]}"]) for t in self.targets]


def lines(stage: str, switches: Mapping[str, Switch]) -> list[str]:
  """What is printed of a stage, from {source: its switch}; of several sources in short."""
  pairs = [(source, target) for source, s in switches.items() for target in s.targets]
  made = [c for s in switches.values() for c in s.codes]
  codes = list(dict.fromkeys((*(s for s in switches if s in made), *made)))
  several = len(switches) > 1
  def cells(source, target):
    own = switches[source]
    means = [number(own.mean(target, c)) if (target, c) in own.errors else "-"
             for c in (*codes, CONSTANT)]
    return [f"{source}->{target}" if several else target, *means, str(own.count(target))]
  heads = ["direction" if several else "target", *(f"code {c}" for c in codes), CONSTANT, "n"]
  found = [
    f"Code switch of {stage}: masked MAE in model units (range 1) of the image of each code,"
    " against each target of the same cases; mean over subjects:",
    *aligned([heads, *(cells(*pair) for pair in pairs)])]
  if not several:
    return found + [line for s in switches.values() for line in s.verdicts()]
  def where(beats):
    lost = [f"{s}->{t}" for s, t in pairs if not beats(switches[s], t)]
    return f"{len(pairs) - len(lost)} of {len(pairs)} directions" \
      + (f" (not in {', '.join(lost)})" if lost else "")
  closest = where(lambda s, t: all(s.closer(t, c) for c in s.codes if c != t))
  return [*found, f"The image of its own code is the closest to the target in {closest}; it beats"
          f" {CONSTANT} in {where(lambda s, t: s.closer(t, CONSTANT))}."]
