import json
import math
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medsynth_jax.metrics import image as voxel
from medsynth_jax.metrics import similarity, summary, volume

GOLDEN = Path(
  os.environ.get("MEDSYNTH_GOLDEN", Path(__file__).resolve().parents[2] / "shared" / "golden")
)
# Scores of `images()` by float64 formulas, checked against scikit-image, torchmetrics and sewar.
FROZEN = {
  2: {
    "mae/all": 0.06971048953,
    "mae/masked": 0.068779368,
    "mse/all": 0.007677668171,
    "mse/masked": 0.007635326789,
    "nmae/ref_minmax": 0.06971048953,
    "nmae/ref_max": 0.06971048953,
    "nmae/ref_mean_abs": 0.1376064632,
    "nmae/foreground_div_range": 0.06971399818,
    "psnr/range1": 21.14770662,
    "psnr/range_refminmax": 21.14770662,
    "psnr/masked_range1": 21.17172371,
    "psnr/s2_255sq": 69.27851023,
    "ncc/zero_mean": 0.9246974738,
    "ncc/zero_mean_masked": 0.9089233827,
    "ncc/no_mean": 0.9886195854,
    "ssim/gauss11_valid_popcov": 0.6320356689,
    "ssim/uniform7_valid_samplecov": 0.7220363925,
    "ssim/uniform7 masked map mean": 0.7868316729,
    "ssim/uniform7 data_range=2 on [-1,1]": 0.5741459096,
    "ssim/gauss11_reflectpad_full": 0.6175661989,
    "ssim/uniform11_valid_popcov": 0.840628512,
  },
  3: {
    "mae/all": 0.07916780764,
    "mae/masked": 0.08116624694,
    "mse/all": 0.009898164894,
    "mse/masked": 0.01019780633,
    "nmae/ref_minmax": 0.07916780764,
    "nmae/ref_max": 0.07916780764,
    "nmae/ref_mean_abs": 0.1550890376,
    "nmae/foreground_div_range": 0.079130359,
    "psnr/range1": 20.04445316,
    "psnr/range_refminmax": 20.04445316,
    "psnr/masked_range1": 19.9149324,
    "psnr/s2_255sq": 68.17525676,
    "ncc/zero_mean": 0.8959210509,
    "ncc/zero_mean_masked": 0.8755547465,
    "ncc/no_mean": 0.9849123622,
    "ssim/gauss11_valid_popcov": 0.8049416165,
    "ssim/uniform7_valid_samplecov": 0.8558612997,
    "ssim/uniform7 masked map mean": 0.9408567334,
    "ssim/uniform7 data_range=2 on [-1,1]": 0.4671319667,
    "ssim/gauss11_reflectpad_full": 0.8168635017,
    "ssim/uniform11_valid_popcov": 0.882746138,
  },
}


def images(ndim: int):
  """A reference in [0, 1], a blurred and noisy image of it, and a mask; 40 x 48 or 16 x 20 x 24."""
  shape = (40, 48) if ndim == 2 else (16, 20, 24)
  rng = np.random.default_rng(ndim)
  axes = np.meshgrid(*(np.linspace(0, 1, n) for n in shape), indexing="ij")
  x = 0.5 + 0.4 * np.sin(9 * axes[0]) * np.cos(7 * axes[-1]) + 0.05 * rng.standard_normal(shape)
  y = 0.9 * np.roll(x, 1, axis=-1) + 0.03 * rng.standard_normal(shape) + 0.02
  mask = sum((a - 0.5) ** 2 for a in axes) < 0.17
  return np.clip(x, 0, 1).astype(np.float32), np.clip(y, 0, 1).astype(np.float32), mask


def scores(x, y, mask):
  """Every metric under every setting that the oracle has, {(metric, setting): value}."""

  def ssim(protocol):
    return similarity.ssim(x, y, 1.0, protocol=protocol)

  return {
    ("mae", "all"): voxel.mae(x, y),
    ("mae", "masked"): voxel.mae(x, y, mask),
    ("mse", "all"): voxel.mse(x, y),
    ("mse", "masked"): voxel.mse(x, y, mask),
    ("nmae", "ref_minmax"): voxel.nmae(x, y, "ref_minmax"),
    ("nmae", "ref_max"): voxel.nmae(x, y, "ref_max"),
    ("nmae", "ref_mean_abs"): voxel.nmae(x, y, "ref_mean_abs"),
    ("nmae", "foreground_div_range"): voxel.nmae(x, y, "range", 1.0, mask=x != 0),
    ("psnr", "range1"): voxel.psnr(x, y, 1.0),
    ("psnr", "range_refminmax"): voxel.psnr(x, y, jnp.max(x) - jnp.min(x)),
    ("psnr", "masked_range1"): voxel.psnr(x, y, 1.0, mask),
    ("psnr", "s2_255sq"): voxel.psnr_s2(x, y, 1.0),
    ("ncc", "zero_mean"): voxel.ncc(x, y),
    ("ncc", "zero_mean_masked"): voxel.ncc(x, y, mask),
    ("ncc", "no_mean"): voxel.ncc(x, y, zero_mean=False),
    ("ssim", "gauss11_valid_popcov"): ssim("wang"),
    ("ssim", "uniform7_valid_samplecov"): ssim("skimage"),
    ("ssim", "uniform7 masked map mean"): similarity.ssim(
      x, y, 1.0, mask, "synthrad", background=0.0
    ),
    ("ssim", "uniform7 data_range=2 on [-1,1]"): similarity.ssim(
      2 * x - 1, 2 * y - 1, 2.0, protocol="reggan"
    ),
    ("ssim", "gauss11_reflectpad_full"): ssim("torchmetrics"),
    ("ssim", "uniform11_valid_popcov"): ssim("sewar"),
  }


def key(row):
  return row["metric"], row["setting"].split(" (")[0]


def close(metric: str, got: float, want: float) -> bool:
  if metric == "psnr":
    return abs(got - want) <= 1e-3
  if metric == "ssim":
    return abs(got - want) <= 1e-4
  return abs(got - want) <= 1e-7 + 1e-5 * abs(want)


def test_every_score_equals_the_reference_libraries():
  if not (GOLDEN / "golden.json").exists():
    pytest.skip(f"no golden values in {GOLDEN}; set MEDSYNTH_GOLDEN")
  golden = json.loads((GOLDEN / "golden.json").read_text())
  arrays = np.load(GOLDEN / "pairs.npz")
  compiled = jax.jit(scores)
  wrong, seen = [], {}
  for name, pair in golden["pairs"].items():
    got = jax.device_get(compiled(*(arrays[pair[k]] for k in ("ref", "dist", "mask"))))
    for row in golden["values"]:
      if row["pair"] != name or key(row) not in got:
        continue
      if row["lib"].startswith(("pytorch", "monai")) and row["metric"] == "ssim":
        continue  # the oracle marks these rows as approximate
      value = float(got[key(row)])
      seen[key(row)] = seen.get(key(row), 0) + 1
      if not close(row["metric"], value, row["value"]):
        wrong.append((name, row["setting"], row["lib"], value, row["value"]))
  assert not wrong, wrong[:10]
  assert set(seen) == set(got)
  # 34 pairs; identity has no finite PSNR, the 3 volumes no sewar.
  assert min(seen.values()) == 31 and seen["mae", "all"] == 34 and seen["psnr", "range1"] == 99


@pytest.mark.parametrize("ndim", [2, 3])
def test_frozen_scores(ndim):
  got = jax.device_get(jax.jit(scores)(*images(ndim)))
  want = FROZEN[ndim]
  assert {f"{m}/{s}" for m, s in got} == set(want)
  for (metric, setting), value in got.items():
    expected = want[f"{metric}/{setting}"]
    assert close(metric, float(value), expected), (setting, float(value), expected)


def test_scores_hold_in_hounsfield_units():
  # The same images as HU: ratios must not move, although float32 squares reach 1e7.
  x, y, mask = images(2)
  hu = [a.astype(np.float64) * 4024 - 1024 for a in (x, y)]
  assert float(voxel.mae(*hu, mask)) == pytest.approx(4024 * float(voxel.mae(x, y, mask)), rel=1e-5)
  assert float(voxel.psnr(*hu, 4024, mask)) == pytest.approx(
    float(voxel.psnr(x, y, 1, mask)), abs=1e-3
  )
  assert float(voxel.ncc(*hu)) == pytest.approx(float(voxel.ncc(x, y)), rel=1e-5)
  blanked = similarity.ssim(*hu, 4024, mask, "synthrad", background=-1024)
  assert np.isfinite(blanked)


def test_ssim_in_float32_survives_a_large_offset():
  # E[x^2] - E[x]^2 of the images as they are would be off by 4e-3 here.
  x, y, _ = images(2)
  x, y = 20 * (x - x.mean()), 20 * (y - x.mean())
  parts = jax.jit(similarity.ssim_map)
  near, far = parts(x + 1000, y + 1000, 400.0), parts(x + 3000, y + 3000, 400.0)
  # Far from zero the luminance term is 1, so that only the variances could differ.
  assert float(jnp.max(jnp.abs(near - far))) < 1e-4


def test_identical_images():
  x, _, mask = images(2)
  assert float(voxel.mae(x, x)) == 0 and float(voxel.psnr(x, x, 1.0, mask)) == math.inf
  for name, protocol in similarity.PROTOCOLS.items():
    data_range = protocol.data_range or 1.0
    value = jax.jit(lambda a, n=name, r=data_range: similarity.ssim(a, a, r, protocol=n))(x)
    assert float(value) == pytest.approx(1, abs=1e-6)


def test_s2_convention_is_48_db_high():
  x, y, _ = images(2)
  assert float(voxel.psnr_s2(x, y, 1.0) - voxel.psnr(x, y, 1.0)) == pytest.approx(48.1308, abs=1e-3)
  # Their published mean, 64.92 dB, is 16.79 dB; at MAE 21.19 no image can exceed 21.61 dB.
  assert 64.92 - voxel.S2_OFFSET_DB == pytest.approx(16.79, abs=0.01)
  assert 64.92 > 20 * math.log10(255 / 21.19)


def test_what_cannot_be_scored_is_nan():
  x, y, _ = images(2)
  nothing, flat = np.zeros(x.shape, bool), np.full(x.shape, 0.5)
  for value in (
    voxel.mae(x, y, nothing),
    voxel.psnr(x, y, 1.0, nothing),
    voxel.nmae(x, y, "ref_minmax", mask=nothing),
    similarity.ssim(x, y, 1.0, nothing),
    voxel.ncc(flat, y),
    voxel.nmae(flat, y, "ref_minmax"),
  ):
    assert np.isnan(value)
  corner = nothing.copy()
  corner[:3, :3] = True  # no whole window is centred here
  assert np.isnan(similarity.ssim(x, y, 1.0, corner))
  assert np.isfinite(similarity.ssim(x, y, 1.0, corner, "torchmetrics"))


def test_mistakes_are_refused():
  x, y, mask = images(2)
  with pytest.raises(ValueError, match="shape"):
    voxel.mae(x, y[..., None])
  with pytest.raises(ValueError, match="mask"):
    voxel.mae(x, y, mask[:, :1])
  with pytest.raises(ValueError, match="unknown normaliser 'max'"):
    voxel.nmae(x, y, "max")
  with pytest.raises(ValueError, match="needs data_range"):
    voxel.nmae(x, y, "range")
  with pytest.raises(ValueError, match="known: wang"):
    similarity.ssim(x, y, 1.0, protocol="default")
  with pytest.raises(ValueError, match="data_range 2"):
    similarity.ssim(x, y, 1.0, protocol="reggan")
  with pytest.raises(ValueError, match="needs background"):
    similarity.ssim(x, y, 1.0, mask, "synthrad")
  with pytest.raises(ValueError, match="11 voxels"):
    similarity.ssim(x[:10], y[:10], 1.0)


def test_ssim_can_be_differentiated():
  x, y, _ = images(2)
  value = jax.jit(jax.value_and_grad(lambda a: similarity.ssim(x, a, 1.0)))
  before, gradient = value(y)
  after, _ = value(y + 1e-2 * gradient / jnp.linalg.norm(gradient))
  assert float(after) > float(before)


# ---------------------------------------------------------------------------------------- volumes


def stack(n=19):
  """A volume of more than two batches of slices, one of them outside the mask."""
  rng = np.random.default_rng(7)
  x = rng.random((n, 24, 20)).astype(np.float32)
  noise = np.linspace(0.02, 0.3, n)[:, None, None] * rng.standard_normal(x.shape)
  y = np.clip(x + noise, 0, 1).astype(np.float32)
  mask = rng.random(x.shape) < np.linspace(0, 0.9, n)[:, None, None]
  return x, y, mask


def each_slice(f, *arrays):
  return jax.jit(jax.vmap(f))(*arrays)


def test_volume_pools_voxels_not_slices():
  x, y, mask = stack()
  got = volume.volume_scores(x, y, mask, data_range=1.0)
  d = (x.astype(np.float64) - y)[mask]
  assert got["mae"] == pytest.approx(np.abs(d).mean(), rel=1e-5)
  assert got["mse"] == pytest.approx((d**2).mean(), rel=1e-5)
  inner = mask[:, 5:-5, 5:-5]
  maps = np.asarray(each_slice(lambda a, b: similarity.ssim_map(a, b, 1.0), x, y))
  assert got["ssim"] == pytest.approx(maps[inner].mean(), abs=1e-5)
  slices = [m[k].mean() for m, k in zip(maps, inner, strict=True) if k.any()]
  assert abs(got["ssim"] - np.mean(slices)) > 0.01  # the mean over slices is another number


@pytest.mark.parametrize("data_range", [1.0, 4024.0])
def test_volume_scores_are_consistent(data_range):
  x, y, mask = stack()
  got = volume.volume_scores(x * data_range, y * data_range, mask, data_range=data_range)
  rmse = math.sqrt(got["mse"])
  assert rmse >= got["mae"] > 0
  assert got["psnr"] == pytest.approx(-20 * math.log10(rmse / data_range), abs=1e-9)
  assert got["nmae"] == pytest.approx(got["mae"] / data_range)
  assert got["nmae"] <= 10 ** (-got["psnr"] / 20)


@pytest.mark.parametrize("n", [7, 14, 19])
def test_slabs_equal_the_whole_volume(n):
  x, y, mask = stack(n)
  got = volume.volume_scores(
    x, y, mask, data_range=1.0, protocols=("synthrad", "skimage"), background=0.0
  )
  whole = jax.jit(lambda *a: similarity.ssim(*a[:2], 1.0, a[2], "synthrad", 0.0))(x, y, mask)
  assert got["ssim_synthrad"] == pytest.approx(float(whole), abs=1e-5)
  assert got["ssim_skimage"] != pytest.approx(got["ssim_synthrad"], abs=1e-3)


def test_volume_edge_cases():
  x, y, mask = stack(5)
  got = volume.volume_scores(
    x, y, mask, data_range=1.0, protocols=("wang", "synthrad"), background=0.0
  )
  assert np.isfinite(got["ssim"]) and np.isnan(got["ssim_synthrad"])  # 5 slices, a window of 7
  same = volume.volume_scores(x, x, data_range=1.0)
  assert same["psnr"] == math.inf and same["ssim"] == pytest.approx(1)
  broken = np.where(mask, np.nan, y)
  outside = np.where(mask, y, np.nan)
  for arguments, message in (
    ((x, y, np.zeros_like(mask)), "empty"),
    ((x, y[:4], mask), "one shape"),
    ((x, broken, mask), "image has NaN"),
  ):
    with pytest.raises(ValueError, match=message):
      volume.volume_scores(*arguments, data_range=1.0)
  assert np.isfinite(volume.volume_scores(x, outside, mask, data_range=1.0)["mae"])
  with pytest.raises(ValueError, match="needs background"):
    volume.volume_scores(x, y, mask, data_range=1.0, protocols=("synthrad",))
  with pytest.raises(ValueError, match="data_range 2"):
    volume.volume_scores(x, y, mask, data_range=1.0, protocols=("reggan",))


def test_paper_scores_are_means_over_slices():
  x, y, mask = stack()
  x[:, :4] = 0  # what a paper sees as background
  r, i, used = 2 * x - 1, 2 * y - 1, slice(1, None)  # the mask of slice 0 is empty

  def each(f):
    return float(np.mean(each_slice(f, x[used], y[used])))

  s2 = volume.paper_scores(r, i, mask, paper="s2")
  assert s2["mae_s2"] == pytest.approx(255 * each(voxel.mae), rel=1e-5)
  assert s2["psnr_s2"] == pytest.approx(each(lambda a, b: voxel.psnr_s2(a, b, 1.0)), abs=1e-3)
  s0 = volume.paper_scores(r, i, mask, paper="s0")
  assert s0["mse_s0"] == pytest.approx(each(voxel.mse), rel=1e-5)
  assert s0["psnr_s0"] == pytest.approx(s2["psnr_s2"] - voxel.S2_OFFSET_DB, abs=1e-3)
  assert s0["ssim_s0"] == pytest.approx(each(lambda a, b: similarity.ssim(a, b, 1.0)), abs=1e-5)
  rg = volume.paper_scores(r, i, mask, paper="reggan")
  assert rg["mae_reggan"] == pytest.approx(each(lambda a, b: voxel.mae(a, b, a > 0)), rel=1e-5)
  assert rg["ssim_reggan"] == pytest.approx(
    each(lambda a, b: similarity.ssim(2 * a - 1, 2 * b - 1, 2.0, protocol="reggan")), abs=1e-5
  )
  with pytest.raises(ValueError, match="known: s0"):
    volume.paper_scores(r, i, mask, paper="s9")


# ---------------------------------------------------------------------------------------- summary


def test_subjects_count_once_however_many_volumes():
  rows = [("a", {"mae": 1.0, "ssim": float("nan")}), ("b", {"mae": 5.0, "ssim": 0.5})]
  rows += [("a", {"mae": 3.0, "ssim": 0.9})]
  subjects = summary.per_subject(rows)
  assert subjects == {"a": {"mae": 2.0, "ssim": 0.9}, "b": {"mae": 5.0, "ssim": 0.5}}
  table = summary.aggregate(subjects, "HU")
  assert table["mae"]["mean"] == 3.5 and table["mae"]["n"] == 2
  assert table["mae"]["worst"] == 5.0 and table["ssim"]["worst"] == 0.5
  assert table["mae"]["unit"] == "HU" and table["ssim"]["unit"] == "1"
  assert summary.ranked(subjects, "mae") == ["a", "b"] == summary.ranked(subjects, "ssim")


def test_summary_of_one_metric():
  values = [30.914, 26.88, 32.251, 32.822, 24.147, 26.093, 30.384, 29.051]
  got = summary.summarise(values, "psnr", "dB")
  assert got["mean"] == pytest.approx(np.mean(values)) and got["worst"] == 24.147
  assert got["sd"] == pytest.approx(np.std(values, ddof=1)) and got["unit"] == "dB"
  low, high = got["ci95"]
  half = 1.96 * got["sd"] / math.sqrt(8)
  assert abs(low - (got["mean"] - half)) < half / 3 and abs(high - (got["mean"] + half)) < half / 3
  assert got == summary.summarise(values, "psnr", "dB")  # seeded
  assert summary.summarise(values, "mae", "HU")["worst"] == 32.822


def test_interval_equals_the_golden_bca():
  if not (GOLDEN / "golden.json").exists():
    pytest.skip(f"no golden values in {GOLDEN}; set MEDSYNTH_GOLDEN")
  stats = json.loads((GOLDEN / "golden.json").read_text())["stats"]
  difference = np.subtract(stats["inputs"]["a"], stats["inputs"]["b"])
  want = stats["bootstrap_bca_mean_diff"]["ci"]
  assert summary.confidence(difference) == pytest.approx(want, abs=0.03)


def test_summary_of_too_few():
  assert summary.summarise([1.0, 2, 3, 4], "mae", "HU")["ci95"] is None
  assert summary.summarise([1.0] * 5, "mae", "HU")["ci95"] == [1.0, 1.0]
  one = summary.summarise([2.0, float("nan")], "mae", "HU")
  assert (one["n"], one["mean"], one["sd"]) == (1, 2.0, None)
  none = summary.summarise([float("nan")], "ssim", "1")
  assert none["n"] == 0 and none["mean"] is None and none["unit"] == "1"
  perfect = summary.summarise([math.inf] * 6, "psnr", "dB")
  assert perfect["mean"] == math.inf and perfect["ci95"] is None


def test_units():
  assert summary.unit_of("mse", "HU") == "(HU)^2"
  assert summary.unit_of("mae_s2", "HU") == "grey levels of 255"
  assert summary.unit_of("mae_reggan", "HU") == "[0, 1]"
  assert summary.unit_of("psnr_s2", "HU") == "dB" and summary.unit_of("ssim_synthrad", "HU") == "1"
