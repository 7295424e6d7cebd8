"""Uptake in synthetic PET, measured on SUV, and how scores of slices go with it.

All in float64 NumPy. Nothing here reads colours: a fusion image shows uptake, it does not hold it.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from scipy import stats

from medsynth_jax.metrics.summary import FEWEST, confidence

HOT = 2.5  # SUV above which a voxel is hot
LEAST = 100  # mask voxels of a slice whose score is correlated with its uptake
UPTAKES = ("suvmax", "suvmean")


# --- of one volume ---------------------------------------------------------------------------


def uptake_scores(reference, image, mask, rois: Mapping[str, np.ndarray]) -> dict[str, float]:
  """Uptake of a synthetic PET against the measured one, arrays [n, H, W], SUV.

  mae_hot, bias_hot: error and signed error where the reference is above HOT; auc_hot: see
  `hot_auc`; suvmax_bias, suvmean_bias: the image's maximum and mean less the reference's, in the
  mask, and as suvmax_bias_<roi>, suvmean_bias_<roi> in each region inside it. NaN where no voxel
  counts.
  """
  reference, image = np.asarray(reference, np.float64), np.asarray(image, np.float64)
  mask = np.asarray(mask) != 0
  hot = (image - reference)[mask & (reference > HOT)]
  scores = {"mae_hot": float(np.abs(hot).mean()) if hot.size else float("nan"),
            "bias_hot": float(hot.mean()) if hot.size else float("nan"),
            "auc_hot": hot_auc(reference, image, mask)}
  for name, region in {"": mask, **{f"_{r}": m & mask for r, m in rois.items()}}.items():
    made, true = image[region], reference[region]
    scores[f"suvmax_bias{name}"] = float(made.max() - true.max()) if true.size else float("nan")
    scores[f"suvmean_bias{name}"] = float(made.mean() - true.mean()) if true.size else float("nan")
  return scores


def hot_auc(reference, image, mask, threshold: float = HOT) -> float:
  """How well the image tells hot voxels of the reference from others: area under the ROC curve.

  The share of (hot, other) pairs of voxels in the mask whose hot voxel has the higher synthetic
  value, ties counted half (Mann-Whitney's U by ranks). NaN where all voxels or none are hot.
  """
  mask = np.asarray(mask) != 0
  hot, values = np.asarray(reference)[mask] > threshold, np.asarray(image)[mask]
  positive, negative = int(hot.sum()), int((~hot).sum())
  if not positive or not negative:
    return float("nan")
  above = stats.rankdata(values)[hot].sum() - positive * (positive + 1) / 2
  return float(above / (positive * negative))


def slice_uptake(suv, mask) -> dict[str, np.ndarray]:
  """{"suvmax": [n], "suvmean": [n]} of each slice of an SUV volume in its mask, NaN where empty."""
  suv, mask = np.asarray(suv, np.float64), np.asarray(mask) != 0
  pairs = [suv[k][mask[k]] for k in range(len(suv))]
  return {"suvmax": np.array([x.max() if x.size else np.nan for x in pairs]),
          "suvmean": np.array([x.mean() if x.size else np.nan for x in pairs])}


# --- correlation -----------------------------------------------------------------------------


def correlate(x, y) -> dict:
  """Spearman's and Pearson's correlation of two series, with 95 % intervals.

  Pairs with a NaN are left out; Pearson leaves infinite values out too. Intervals by Fisher's z,
  its standard error 1 / sqrt(n - 3), for Spearman sqrt(1.06 / (n - 3)) (Fieller, Hartley and
  Pearson, Biometrika 1957). What needs more pairs, or values that differ, is None.

  Returns {"n", "spearman", "spearman_ci95", "pearson", "pearson_ci95"}.
  """
  x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
  known, finite = ~(np.isnan(x) | np.isnan(y)), np.isfinite(x) & np.isfinite(y)
  rank = _r(stats.rankdata(x[known]), stats.rankdata(y[known]))
  linear = _r(x[finite], y[finite])
  return {"n": int(known.sum()),
          "spearman": rank, "spearman_ci95": _interval(rank, int(known.sum()), 1.06),
          "pearson": linear, "pearson_ci95": _interval(linear, int(finite.sum()), 1.0)}


def _r(x: np.ndarray, y: np.ndarray) -> float | None:
  """Pearson's r; None for fewer than three pairs or a series that does not vary."""
  if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
    return None
  return float(stats.pearsonr(x, y).statistic)


def _interval(r: float | None, n: int, variance: float) -> list[float] | None:
  if r is None or n <= 3:
    return None
  half = stats.norm.ppf(0.975) * np.sqrt(variance / (n - 3))
  with np.errstate(divide="ignore"):  # r = 1 has an infinite z
    return [float(np.tanh(np.arctanh(r) + sign * half)) for sign in (-1, 1)]


def correlations(slices: Mapping[str, Mapping[str, Sequence[float]]], metrics: Sequence[str],
                 seed: int = 0) -> dict:
  """How each metric of slices goes with their uptake, subject by subject.

  Slices of one patient are alike, so that the interval that counts is the one over subjects; those
  of a subject's own correlation take its slices as independent and are too narrow.

  Args:
    slices: {subject: {metric or name of UPTAKES: a value a slice}}.

  Returns:
    {metric: {uptake: {"mean": rank correlation within a subject, mean over the `n` subjects that
    have one, "n", "ci95": BCa bootstrap over subjects (None below FEWEST), "subjects": {subject:
    `correlate` of its slices}, "means": `correlate` of the subjects' means over slices}}}. Signed:
    at a fixed range PSNR's is the negative of MSE's.
  """
  return {metric: {uptake: _correlation(slices, metric, uptake, seed) for uptake in UPTAKES}
          for metric in metrics}


def _correlation(slices, metric: str, uptake: str, seed: int) -> dict:
  subjects = {s: correlate(found[metric], found[uptake]) for s, found in slices.items()}
  rho = np.array([c["spearman"] for c in subjects.values() if c["spearman"] is not None])
  means = [[_mean(found[name]) for found in slices.values()] for name in (metric, uptake)]
  return {"mean": float(rho.mean()) if len(rho) else None, "n": len(rho),
          "ci95": confidence(rho, seed) if len(rho) >= FEWEST else None,
          "subjects": subjects, "means": correlate(*means)}


def _mean(values) -> float:
  values = np.asarray(values, np.float64)
  values = values[~np.isnan(values)]
  return float(values.mean()) if len(values) else float("nan")
