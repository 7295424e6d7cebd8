"""Uptake of synthetic PET, and its correlation with scores, against closed forms."""

import numpy as np
import pytest
from scipy import stats

from medsynth_jax.metrics import summary, uptake, volume


def volumes():
  """Reference and image in SUV, a mask with a hot focus, and regions."""
  reference = np.ones((3, 6, 6))
  reference[1, 2:4, 2:4] = [[3, 4], [5, 8]]
  image = reference * 0.5 + 1
  mask = np.ones(reference.shape, bool)
  mask[:, 0] = False
  reference[0, 0, 0] = 20  # outside: does not count
  return reference, image, mask


def test_uptake_in_closed_form():
  reference, image, mask = volumes()
  focus, rest = reference > 2.5, np.zeros(reference.shape, bool)
  got = uptake.uptake_scores(reference, image, mask, {"focus": focus, "none": rest})
  hot = np.array([3, 4, 5, 8.0])
  error = 1 - 0.5 * hot
  assert got["mae_hot"] == pytest.approx(np.abs(error).mean())
  assert got["bias_hot"] == pytest.approx(error.mean()) and got["bias_hot"] < 0
  assert got["auc_hot"] == 1
  assert got["suvmax_bias"] == 5 - 8  # not the 20 outside the mask
  n = mask.sum()
  assert got["suvmean_bias"] == pytest.approx((0.5 * (n - 4) + error.sum()) / n)
  assert got["suvmax_bias_focus"] == -3
  assert got["suvmean_bias_focus"] == pytest.approx(error.mean())
  assert np.isnan(got["suvmax_bias_none"]) and np.isnan(got["suvmean_bias_none"])
  cold = uptake.uptake_scores(np.ones((1, 4, 4)), np.ones((1, 4, 4)), np.ones((1, 4, 4)), {})
  assert all(np.isnan(cold[m]) for m in ("mae_hot", "bias_hot", "auc_hot"))
  assert cold["suvmax_bias"] == 0


def test_auc_counts_pairs_and_halves_ties():
  rng = np.random.default_rng(0)
  reference = rng.uniform(0, 5, (2, 7, 9))
  image = np.round(reference + rng.normal(0, 2, reference.shape))  # whole numbers: many ties
  mask = rng.random(reference.shape) < 0.7
  hot, other = image[mask & (reference > 2.5)], image[mask & (reference <= 2.5)]
  pairs = [(a > b) + 0.5 * (a == b) for a in hot for b in other]
  assert uptake.hot_auc(reference, image, mask) == pytest.approx(np.mean(pairs), abs=1e-12)
  assert uptake.hot_auc(reference, -image, mask) == pytest.approx(1 - np.mean(pairs), abs=1e-12)
  assert uptake.hot_auc(reference, np.zeros_like(image), mask) == 0.5
  assert np.isnan(uptake.hot_auc(reference, image, mask, threshold=9))
  assert np.isnan(uptake.hot_auc(reference, image, mask, threshold=-1))


def test_uptake_of_slices():
  reference, _, mask = volumes()
  mask[2] = False
  got = uptake.slice_uptake(reference, mask)
  assert got["suvmax"][:2].tolist() == [1, 8] and np.isnan(got["suvmax"][2])
  assert got["suvmean"][1] == pytest.approx((26 + 3 + 4 + 5 + 8) / 30)
  assert np.isnan(got["suvmean"][2])


def test_correlation_in_closed_form():
  x = np.arange(1.0, 11)
  got = uptake.correlate(x, x ** 3)
  assert got["n"] == 10 and got["spearman"] == pytest.approx(1)
  assert got["pearson"] == pytest.approx(np.corrcoef(x, x ** 3)[0, 1])
  assert got["spearman_ci95"] == pytest.approx([1, 1])
  y = np.array([2, 1, 4, 3, 6, 5, 8, 7, 10, 9.0])
  rho = 1 - 6 * 10 / (10 * 99)  # 1 - 6 sum d^2 / (n (n^2 - 1))
  got = uptake.correlate(x, y)
  assert got["spearman"] == pytest.approx(rho)
  half = 1.959964 * np.sqrt(1.06 / 7)
  assert got["spearman_ci95"] == pytest.approx(np.tanh(np.arctanh(rho) + np.array([-half, half])))
  wanted = stats.pearsonr(x, y).confidence_interval()
  assert got["pearson_ci95"] == pytest.approx([wanted.low, wanted.high])


def test_what_cannot_be_correlated():
  nothing = uptake.correlate([1, 2.0], [1, 2.0])
  assert nothing["n"] == 2 and nothing["spearman"] is nothing["pearson"] is None
  assert nothing["spearman_ci95"] is nothing["pearson_ci95"] is None
  flat = uptake.correlate([1, 1, 1.0, 1], [1, 2, 3, 4.0])
  assert flat["spearman"] is flat["pearson"] is None
  three = uptake.correlate([1, 2, 3.0], [3, 2, 1.0])
  assert three["spearman"] == pytest.approx(-1) and three["spearman_ci95"] is None
  # an infinite PSNR has a rank, but no place on a line; a NaN has neither
  got = uptake.correlate([np.inf, 30, 20, 10, np.nan], [1, 2, 3, 5, 4.0])
  assert got["n"] == 4 and got["spearman"] == pytest.approx(-1)
  assert got["pearson"] == pytest.approx(np.corrcoef([30, 20, 10], [2, 3, 5])[0, 1])


def made_slices(subjects):
  """Slices whose MSE rises with their uptake, in some more than in others."""
  rng, found = np.random.default_rng(1), {}
  for i in range(subjects):
    suv = rng.uniform(1, 9, 12)
    mse = 1e-3 * suv + rng.normal(0, 1e-3 * (1 + i), 12) ** 2
    found[f"s{i}"] = {"suvmax": suv, "suvmean": suv / 3 + i, "mse": mse,
                      "psnr": -10 * np.log10(mse)}
  return found


def test_correlations_are_means_over_subjects():
  slices = made_slices(6)
  got = uptake.correlations(slices, ("psnr", "mse"))
  each = [stats.spearmanr(s["mse"], s["suvmax"]).statistic for s in slices.values()]
  found = got["mse"]["suvmax"]
  assert found["mean"] == pytest.approx(np.mean(each)) and found["n"] == 6
  assert found["ci95"] == pytest.approx(summary.confidence(np.array(each)))
  assert found["ci95"][0] < found["mean"] < found["ci95"][1]
  assert [c["spearman"] for c in found["subjects"].values()] == pytest.approx(each)
  # ranks turn round with the sign: what S0 says of PSNR and MSE cannot both fall
  assert got["psnr"]["suvmax"]["mean"] == pytest.approx(-found["mean"])
  means = [[np.mean(s[m]) for s in slices.values()] for m in ("mse", "suvmean")]
  assert got["mse"]["suvmean"]["means"]["spearman"] == pytest.approx(
    stats.spearmanr(*means).statistic)
  assert uptake.correlations(made_slices(4), ("mse",))["mse"]["suvmax"]["ci95"] is None


def test_a_subject_without_correlation_does_not_count():
  slices = made_slices(2)
  slices["short"] = {m: x[:2] for m, x in slices["s0"].items()}
  got = uptake.correlations(slices, ("mse",))["mse"]["suvmax"]
  assert got["n"] == 2 and got["subjects"]["short"]["spearman"] is None
  alone = uptake.correlations({"short": slices["short"]}, ("mse",))["mse"]["suvmax"]
  assert alone["mean"] is None and alone["n"] == 0
  empty = {m: x[:0] for m, x in slices["s0"].items()}
  assert uptake.correlations({"none": empty}, ("mse",))["mse"]["suvmax"]["mean"] is None


def test_units_and_worst_of_uptake():
  assert summary.unit_of("auc_hot", "SUV") == "1" and summary.unit_of("bias_hot", "SUV") == "SUV"
  assert summary.unit_of("suvmax_bias", "SUV") == "SUV"
  assert summary.unit_of("mse", "1") == summary.unit_of("mae_hot", "1") == "1"
  assert summary.summarise([-3.0, 1.0], "suvmax_bias", "SUV")["worst"] == -3
  assert summary.summarise([0.9, 0.6], "auc_hot", "1")["worst"] == 0.6


# --- images of several channels --------------------------------------------------------------


def colours():
  rng = np.random.default_rng(3)
  x = rng.random((9, 24, 20, 3)).astype(np.float32)
  y = np.clip(x + 0.1 * np.array([1, 2, 3]) * rng.standard_normal(x.shape), 0, 1)
  mask = rng.random(x.shape[:3]) < np.linspace(0, 0.9, 9)[:, None, None]
  return x, y.astype(np.float32), mask


def test_channels_are_pooled():
  x, y, mask = colours()
  got = volume.volume_scores(x, y, mask, data_range=1.0, protocols=("wang", "synthrad"),
                             background=0.0)
  d = (x.astype(np.float64) - y)[mask]
  assert got["mae"] == pytest.approx(np.abs(d).mean(), rel=1e-5)
  assert got["mse"] == pytest.approx((d ** 2).mean(), rel=1e-5)
  assert got["psnr"] == pytest.approx(-10 * np.log10((d ** 2).mean()), abs=1e-4)
  each = [volume.volume_scores(x[..., c], y[..., c], mask, data_range=1.0,
                               protocols=("wang", "synthrad"), background=0.0) for c in range(3)]
  for name in ("ssim", "ssim_synthrad"):
    assert got[name] == pytest.approx(np.mean([e[name] for e in each]))
  assert list(got) == list(each[0])
  assert volume.volume_scores(x, x, mask, data_range=1.0)["psnr"] == np.inf


def test_channels_of_other_number_are_refused():
  x, y, mask = colours()
  with pytest.raises(ValueError, match="one shape"):
    volume.volume_scores(x, y[..., :2], mask, data_range=1.0)
  with pytest.raises(ValueError, match="one shape"):
    volume.paper_scores(x, y, mask[:4], paper="s0")


def test_s0_on_its_own_images():
  """Whole slices of all channels: the PSNR is that of the error of all three."""
  x, y, mask = colours()
  got = volume.paper_scores(2 * x - 1, 2 * y - 1, mask, paper="s0")
  used = mask.any((1, 2))
  mse = ((x.astype(np.float64) - y)[used] ** 2).mean((1, 2, 3))
  assert got["psnr_s0"] == pytest.approx((-10 * np.log10(mse)).mean(), abs=1e-4)
  each = [volume.paper_scores(2 * x[..., c] - 1, 2 * y[..., c] - 1, mask, paper="s0")
          for c in range(3)]
  assert got["ssim_s0"] == pytest.approx(np.mean([e["ssim_s0"] for e in each]), abs=1e-6)
  with pytest.raises(ValueError, match="one channel"):
    volume.paper_scores(2 * x - 1, 2 * y - 1, mask, paper="s2")


@pytest.mark.parametrize("channels", [1, 3])
def test_scores_of_slices(channels):
  x, y, mask = colours()
  if channels == 1:
    x, y = x[..., 0], y[..., 0]
  got = volume.slice_scores(x, y, mask, data_range=1.0)
  assert got["voxels"].tolist() == mask.sum((1, 2)).tolist() and np.isnan(got["mae"][0])
  for k in (3, 8):
    one = volume.volume_scores(x[k:k + 1], y[k:k + 1], mask[k:k + 1], data_range=1.0)
    for name in ("mae", "mse", "psnr", "ssim"):
      assert got[name][k] == pytest.approx(one[name], abs=1e-5), name
  pooled = np.nansum(got["mae"] * got["voxels"]) / mask.sum()
  whole = volume.volume_scores(x, y, mask, data_range=1.0)
  assert pooled == pytest.approx(whole["mae"])
  small = volume.slice_scores(x[:, :8], y[:, :8], mask[:, :8], data_range=1.0)
  assert np.isnan(small["ssim"]).all() and np.isfinite(small["mae"][8])
