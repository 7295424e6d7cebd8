"""Units of modalities: fitted, invertible maps between physical values and the model's [-1, 1]."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from medsynth_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Scaling:
  """A fitted, invertible map physical <-> [-1, 1]; `curve` is "linear" or "sqrt"."""
  curve: str
  low: float
  high: float


def to_model(scaling: Scaling, x, clip: bool = True):
  """Physical values to model units (NumPy or JAX arrays)."""
  unit = (x - scaling.low) / (scaling.high - scaling.low)
  if clip:
    unit = unit.clip(0.0, 1.0)
  if scaling.curve == "sqrt":
    unit = abs(unit) ** 0.5
  return 2.0 * unit - 1.0


def from_model(scaling: Scaling, y):
  """Model units back to physical values, the inverse of `to_model`."""
  unit = (y + 1.0) / 2.0
  if scaling.curve == "sqrt":
    unit = unit ** 2
  return unit * (scaling.high - scaling.low) + scaling.low


# --- rules -----------------------------------------------------------------------------------

# A rule's fields with their defaults; None must be given.
RULES = {
  "window": {"low": None, "high": None},        # fixed physical values
  "sqrt": {"low": 0.0, "high": None},           # fixed, under a square root
  "percentile": {"low": 0.5, "high": 99.9},     # of the volume's own foreground
  # mean -+ width standard deviations of it; its -1 (padding, absent sources) lies below background
  "zscore": {"width": 3.0},
}

_WINDOW = {"kind": "window", "low": -1024.0, "high": 3071.0}
_MR = {"kind": "percentile", "low": 0.5, "high": 99.9}
_PET = {"kind": "sqrt", "low": 0.0, "high": 25.0}

DEFAULTS: Mapping[str, Mapping[str, Any]] = {
  "ct": {"unit": "HU", "background": -1024.0, "target": _WINDOW,
         "source": (_WINDOW, {"kind": "window", "low": -160.0, "high": 240.0},
                    {"kind": "window", "low": 0.0, "high": 80.0})},
  "pet": {"unit": "SUV", "background": 0.0, "target": _PET, "source": (_PET,)},
  "mr": {"unit": "arbitrary", "background": 0.0, "target": _MR, "source": (_MR,)},
}


@dataclasses.dataclass(frozen=True)
class Rules:
  """How one modality is read: its type, unit, background, and a rule per source channel."""
  type: str
  unit: str
  background: float
  source: tuple[Mapping[str, Any], ...]
  target: Mapping[str, Any]


def rules_for(name: str, kind: str = "", source="", target="") -> Rules:
  """The rules of a modality: the defaults of its type, or what is given (see `parse_rules`)."""
  where = f"config.modalities.{name}"
  kind = kind or modality_type(name)
  if kind not in DEFAULTS:
    raise UserError(f"{where}.type: '{kind}'; use {', '.join(DEFAULTS)}")
  default = DEFAULTS[kind]
  return Rules(
    kind, default["unit"], default["background"],
    parse_rules(source, f"{where}.source") if source else tuple(dict(r) for r in default["source"]),
    parse_rule(target, f"{where}.target") if target else dict(default["target"]))


_TOKENS = {"ct": {"ct", "cta", "cbct", "ncct", "cect", "ldct", "sct"},
           "pet": {"pet", "suv", "fdg"}}


def modality_type(name: str) -> str:
  """ "ct", "pet" or (anything else) "mr", by the words of a modality's name: `ct_arterial`."""
  words = set(re.split(r"[^a-z0-9]+", name.lower()))
  return next((kind for kind, tokens in _TOKENS.items() if words & tokens), "mr")


def parse_rule(text, where: str) -> dict[str, Any]:
  """A rule with all its fields, from "window -160 240" or a mapping; UserError names `where`."""
  if isinstance(text, Mapping):
    kind, given = text.get("kind"), {k: v for k, v in text.items() if k != "kind"}
  else:
    kind, *numbers = str(text).replace(",", " ").split() or [""]
    fields = tuple(RULES.get(kind, ()))
    if kind == "sqrt" and len(numbers) == 1:
      fields = ("high",)
    if len(numbers) > len(fields) and kind in RULES:
      raise UserError(f"{where}: '{text}' has too many numbers; {_usage(kind)}")
    given = dict(zip(fields, numbers, strict=False))
  if kind not in RULES:
    raise UserError(f"{where}: unknown rule '{kind}'; use " + "; ".join(_usage(k) for k in RULES))
  rule = {"kind": kind, **RULES[kind], **given}
  try:
    rule = {k: v if k == "kind" else float(v) for k, v in rule.items()}
  except (TypeError, ValueError):
    raise UserError(f"{where}: '{text}' lacks a number; {_usage(kind)}") from None
  wrong = set(rule) - {"kind", *RULES[kind]}
  if wrong:
    raise UserError(f"{where}: rule '{kind}' has no field {', '.join(sorted(wrong))}")
  if rule.get("high", 1) <= rule.get("low", 0) or rule.get("width", 1) <= 0:
    raise UserError(f"{where}: '{text}' is no range (low must be below high, width above 0)")
  if kind == "percentile" and not 0 <= rule["low"] < rule["high"] <= 100:
    raise UserError(f"{where}: '{text}': percentiles lie in 0..100")
  return rule


def parse_rules(text, where: str) -> tuple[dict[str, Any], ...]:
  """Several rules, one a channel, from "window -1024 3071; window 0 80" or a list of rules."""
  parts = [p for p in text.split(";") if p.strip()] if isinstance(text, str) else \
    [text] if isinstance(text, Mapping) else list(text)
  return tuple(parse_rule(p, where) for p in parts)


def _usage(kind: str) -> str:
  return " ".join([f"'{kind}", *(f"<{f}>" for f in RULES[kind])]) + "'"


def fit(rule: Mapping[str, Any], values: np.ndarray) -> Scaling:
  """The scaling that a rule gives for one volume.

  `values` [n]: the volume's foreground voxels (fixed rules do not look at them). ValueError where
  they have no spread.
  """
  kind = rule["kind"]
  if kind in ("window", "sqrt"):
    return Scaling("sqrt" if kind == "sqrt" else "linear", float(rule["low"]), float(rule["high"]))
  if values.size == 0:
    raise ValueError("no foreground voxel to scale by")
  if kind == "percentile":
    low, high = (float(p) for p in np.percentile(values, (rule["low"], rule["high"])))
  elif kind == "zscore":
    mean, spread = float(np.mean(values, dtype=np.float64)), float(np.std(values, dtype=np.float64))
    low, high = mean - rule["width"] * spread, mean + rule["width"] * spread
  else:
    raise ValueError(f"unknown rule {kind}")
  if not high > low:
    raise ValueError("the foreground is constant")
  return Scaling("linear", low, high)


def clipped(scaling: Scaling, values: np.ndarray) -> float:
  """Share of values outside a scaling's range."""
  if values.size == 0:
    return 0.0
  return float(((values < scaling.low) | (values > scaling.high)).mean())


# --- what an image shows of itself -----------------------------------------------------------


def foreground(array: np.ndarray, kind: str, field: np.ndarray | None = None) -> np.ndarray:
  """Voxels brighter than what is around the patient, from this image alone: bool, array's shape.

  CT: above -500 HU. PET: above 2 % of the 98th percentile of positive voxels. MR: above the
  threshold between noise and tissue, at 10 to 20 % of the 98th percentile (10 % as in BET: Smith,
  Hum Brain Mapp 2002; more where Otsu's threshold of the logarithm says that noise is strong). But
  where the background was cut away (a stripped brain: fill all around, and what meets it is
  tissue) all of `field`, the voxels that are no border-connected fill (`masks.field_of_view`).
  """
  if kind == "ct":
    return array > -500
  if kind == "pet":
    positive = array[array > 0]
    return array > 0.02 * (np.percentile(positive, 98) if positive.size else 0.0)
  from scipy import ndimage
  inner = array.ravel() if field is None else array[field]
  if not inner.size:
    return np.zeros(array.shape, bool)
  low = min(float(inner.min()), 0.0)
  high = float(np.percentile(inner, 98)) - low
  if high <= 0:
    return array > low
  if field is not None and _surrounded(field):
    rim = field & ndimage.binary_dilation(~field)
    if np.median(array[rim]) > low + 0.1 * high:
      return field.copy()
  split = float(np.exp(otsu(np.log((inner - low).clip(high / 1000, high)))))
  return array > low + np.clip(split, 0.1 * high, 0.2 * high)


def _surrounded(field: np.ndarray) -> bool:
  """Whether four fifths of the volume's faces lie outside the field of view."""
  faces = [np.take(field, i, axis).ravel() for axis, n in enumerate(field.shape) if n > 2
           for i in (0, -1)]
  return bool(faces) and float(np.concatenate(faces).mean()) < 0.2


def otsu(values: np.ndarray) -> float:
  """The value that splits a histogram best in two (Otsu, IEEE Trans SMC 1979)."""
  counts, edges = np.histogram(values, bins=128)
  middle = (edges[1:] + edges[:-1]) / 2
  below = np.cumsum(counts)[:-1].astype(float)
  above = counts.sum() - below
  first = np.cumsum(counts * middle)
  with np.errstate(divide="ignore", invalid="ignore"):
    apart = (first[-1] - first[:-1]) / above - first[:-1] / below
    split = int(np.nan_to_num(below * above * apart ** 2).argmax())
  return float(edges[split + 1])


def suspicions(array: np.ndarray, kind: str, shown: np.ndarray) -> list[str]:
  """What makes an image look as if it had other units than its type's, each with the remedy.

  `shown` is its foreground.
  """
  low = float(array.min())
  if kind == "ct" and (array < -500).mean() < 1e-3:
    return [f"a CT without air (lowest value {low:g}), so perhaps not in HU; apply the rescale"
            " slope and intercept (often -1024), or ignore this if the scan is cropped inside"
            " the body"]
  if kind == "pet" and shown.any() and float(np.median(array[shown])) > 100:
    return [f"a PET with median {float(np.median(array[shown])):.4g} looks like Bq/ml, not SUV;"
            " multiply by body weight in g / decay-corrected injected dose in Bq"]
  if kind == "mr" and low < -500:
    return [f"values down to {low:g} look like a CT, but its column name says MR; set its"
            " `type` in config.modalities"]
  return []
