"""From the scores of volumes to those of subjects, and from subjects to a table."""

from collections.abc import Iterable, Mapping

import numpy as np
from scipy import stats

from medsynth_jax.metrics.volume import PAPERS

FEWEST = 5  # subjects for a confidence interval
RESAMPLES = 9999
HIGHER = ("psnr", "ssim", "ncc", "auc", "vifp", "vif", "dice")  # better; all others are errors


def higher_is_better(metric: str) -> bool:
  """Whether a larger value of the metric is the better one ("ssim_synthrad" goes as "ssim")."""
  return metric.split("_")[0] in HIGHER


def unit_of(metric: str, scale: str) -> str:
  """The metric's unit, where images are in `scale` ("HU", "SUV", "normalised"; "1": colours).

  A name may end in a paper ("mae_s2") or a region ("mae_lesion").
  """
  base, _, paper = metric.partition("_")
  if base == "psnr":
    return "dB"
  if base in ("ssim", "ncc", "nmae", "auc", "vifp", "vif", "niqe", "dice") or scale == "1":
    return "1"
  if paper in PAPERS:  # a paper's convention has a scale of its own, whatever the images' unit
    scale = "grey levels of 255" if paper == "s2" else "[0, 1]"
  return f"({scale})^2" if base == "mse" else scale


def per_subject(volumes: Iterable[tuple[str, Mapping[str, float]]]) -> dict[str, dict[str, float]]:
  """{subject: {metric: mean over the subject's volumes}} from (subject, scores) pairs.

  A volume where a metric is NaN (no SSIM window fits) does not count for that metric; a metric
  without a value is NaN. Subjects keep their first order.
  """
  grouped: dict[str, list[Mapping[str, float]]] = {}
  for subject, scores in volumes:
    grouped.setdefault(subject, []).append(scores)
  return {
    subject: {
      metric: _mean([s[metric] for s in rows if metric in s])
      for metric in dict.fromkeys(m for s in rows for m in s)
    }
    for subject, rows in grouped.items()
  }


def _mean(values) -> float:
  values = np.asarray(values, np.float64)
  values = values[~np.isnan(values)]
  return float(values.mean()) if len(values) else float("nan")


def summarise(values: Iterable[float], metric: str, unit: str, seed: int = 0) -> dict:
  """One metric over subjects: n, mean, sd (n - 1), median, worst, ci95 of the mean, unit.

  NaN values are left out and lower `n`. `ci95` is a bias-corrected accelerated (BCa) bootstrap
  over subjects (Efron 1987), seeded; None below 5 subjects or with an infinite value. What cannot
  be computed is None, so that the result is valid JSON except for an infinite mean.
  """
  values = np.asarray(list(values), np.float64)
  values = values[~np.isnan(values)]
  if not len(values):
    nothing = dict.fromkeys(("mean", "sd", "median", "worst", "ci95"))
    return {"n": 0, **nothing, "unit": unit}
  finite = bool(np.isfinite(values).all())
  return {
    "n": len(values),
    "mean": float(values.mean()),
    "sd": float(values.std(ddof=1)) if finite and len(values) > 1 else None,
    "median": float(np.median(values)),
    "worst": _worst(values, metric),
    "ci95": confidence(values, seed) if finite and len(values) >= FEWEST else None,
    "unit": unit,
  }


def _worst(values: np.ndarray, metric: str) -> float:
  """The value of the worst subject; of a bias, which has a sign, the one farthest from zero."""
  if "bias" in metric.split("_")[:2]:
    return float(values[np.abs(values).argmax()])
  return float(values.min() if higher_is_better(metric) else values.max())


def confidence(values: np.ndarray, seed: int = 0) -> list[float]:
  """[low, high], the 95 % BCa bootstrap interval of the mean; the value itself if all are equal."""
  if np.ptp(values) == 0:  # BCa divides by the jackknife's spread
    return [float(values[0])] * 2
  rng = np.random.default_rng(seed)
  result = stats.bootstrap((values,), np.mean, n_resamples=RESAMPLES, method="BCa", rng=rng)
  return [float(x) for x in result.confidence_interval]


def aggregate(subjects: Mapping[str, Mapping[str, float]], scale: str, seed: int = 0) -> dict:
  """{metric: summary over subjects}, from `per_subject`; `scale` is the images' unit."""
  metrics = dict.fromkeys(m for scores in subjects.values() for m in scores)
  return {
    metric: summarise(
      (scores[metric] for scores in subjects.values() if metric in scores),
      metric,
      unit_of(metric, scale),
      seed,
    )
    for metric in metrics
  }


def ranked(subjects: Mapping[str, Mapping[str, float]], metric: str) -> list[str]:
  """The subjects from best to worst by a metric, those without a value left out.

  The worst is the last; the median one is at len // 2.
  """
  scored = [s for s, scores in subjects.items() if not np.isnan(scores.get(metric, np.nan))]
  return sorted(scored, key=lambda s: subjects[s][metric], reverse=higher_is_better(metric))
