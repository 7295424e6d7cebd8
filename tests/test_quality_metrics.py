"""VIF and NIQE against the reference codes, frozen values, and what cannot be scored."""

import hashlib
import json
import os
from importlib import resources
from pathlib import Path

import jax
import numpy as np
import pytest
from scipy import ndimage

from medsynth_jax.metrics import image as voxel
from medsynth_jax.metrics import niqe, s3, similarity, vif

GOLDEN = Path(
  os.environ.get("MEDSYNTH_GOLDEN", Path(__file__).resolve().parents[2] / "shared" / "golden"))
# Scores of `images()` by other float64 formulas, which agree with LIVE's MATLAB code in Octave.
FROZEN_VIF = {"vifp": 0.4338901390007115, "vif_wavelet": 0.5151629084247373}
FROZEN_CORNER = {"vifp": 0.4230855390906962, "vif_wavelet": 0.5102110817852992}  # 72 x 80
FROZEN_NIQE = (9.297663120428615, 8.81004839840393)
FROZEN_FITTED = (1.2731635738203928, 18.056730280393463)


def images():
  """A texture in [0, 1] and a blurred, noisy image of it; 192 x 200."""
  rng = np.random.default_rng(4)
  x = ndimage.gaussian_filter(rng.standard_normal((192, 200)), 1.0)
  x = (x - x.min()) / np.ptp(x)
  y = 0.8 * ndimage.gaussian_filter(x, 0.7) + 0.02 * rng.standard_normal(x.shape) + 0.1
  return x.astype(np.float32), np.clip(y, 0, 1).astype(np.float32)


def tiles(x):
  """Nine tiles of 64 x 64, and the same turned."""
  own = [x[i:i + 64, j:j + 64] for i in (0, 64, 128) for j in (0, 64, 128)]
  return [*own, *(tile[::-1].T for tile in own)]


@pytest.fixture(scope="module")
def golden():
  if not (GOLDEN / "golden.json").exists():
    pytest.skip(f"no golden values in {GOLDEN}; set MEDSYNTH_GOLDEN")
  octave = json.loads((GOLDEN / "golden_octave.json").read_text())
  return json.loads((GOLDEN / "golden.json").read_text()), octave, np.load(GOLDEN / "pairs.npz")


# --- against other codes ---------------------------------------------------------------------


def test_vif_equals_the_reference_codes(golden):
  values, octave, arrays = golden
  metrics = {"vifp": (jax.jit(vif.vifp), 1e-3), "vif_wavelet": (vif.vif_wavelet, 1e-6)}
  rows = [(r["pair"], r["metric"], r["value"]) for r in values["values"]
          if r["metric"] in metrics and "WRONG" not in r["setting"]]
  rows += [(pair, m, found[m]) for pair, found in octave["pairs"].items() for m in metrics
           if m in found]
  pairs = {name for name, *_ in rows}
  got = {(name, m): float(f(*(arrays[values["pairs"][name][k]] for k in ("ref", "dist")), 1.0))
         for name in pairs for m, (f, _) in metrics.items()}
  wrong = [(name, m, got[name, m], value) for name, m, value in rows
           if abs(got[name, m] - value) > metrics[m][1]]
  assert not wrong, wrong[:10]
  assert len(pairs) == 31 and len(rows) == 31 * (4 + 1 + 2)


def test_niqe_equals_the_reference_codes(golden):
  values, octave, arrays = golden
  fitted = niqe.fit([arrays[f"niqe_{k}512"] for k in ("gravel", "grass", "brick")], 96, 0.75, 255)
  assert fitted.blocks == values["niqe_fit"]["blocks"] and fitted.images == 3
  np.testing.assert_allclose(fitted.mean, values["niqe_fit"]["mu"], rtol=1e-9)
  assert np.trace(fitted.covariance) == pytest.approx(values["niqe_fit"]["cov_trace"], rel=1e-9)
  rows = [(r["pair"], "LIVE" in r["setting"], r["value"], r["dtype"] == "float64")
          for r in values["values"] if r["metric"] == "niqe"]
  rows += [(name, True, value, True) for name, value in octave["niqe"].items() if name in arrays]
  assert len(rows) == 32 + 14
  for name, by_live, value, double in rows:
    image = arrays[name]
    got = niqe.niqe(image, niqe.live() if by_live else fitted, 255 if image.dtype == "uint8" else 1)
    textured = double and any(word in name for word in ("gravel", "grass", "noise"))
    assert abs(got - value) < (1e-3 if textured else 3e-2), (name, got, value)


def test_frozen_values():
  x, y = images()
  for name, metric in (("vifp", jax.jit(vif.vifp)), ("vif_wavelet", vif.vif_wavelet)):
    close = 1e-4 if name == "vifp" else 1e-9
    assert float(metric(x, y, 1.0)) == pytest.approx(FROZEN_VIF[name], abs=close)
    corner = float(metric(x[:72, :80], y[:72, :80], 1.0))
    assert corner == pytest.approx(FROZEN_CORNER[name], abs=close)
  live, own = niqe.live(), niqe.fit(tiles(x), 32, 0.0, 1.0)
  assert (own.blocks, own.images, own.block) == (72, 18, 32)
  for image, by_live, by_own in zip((x, y), FROZEN_NIQE, FROZEN_FITTED, strict=True):
    assert niqe.niqe(image, live, 1.0) == pytest.approx(by_live, abs=1e-6)
    assert niqe.niqe(image, own, 1.0) == pytest.approx(by_own, abs=1e-6)


def test_assets_are_those_of_the_release_and_ship_with_their_notices():
  live = niqe.live()
  digests = [hashlib.sha256(np.ascontiguousarray(x, "<f8").tobytes()).hexdigest()[:8]
             for x in (live.mean, live.covariance)]
  assert digests == ["7e45b7ff", "62e3a43c"] and (live.block, live.images) == (96, 125)
  notice = (resources.files("medsynth_jax.metrics") / "assets/NOTICE").read_text()
  for words in ("Copyright (c) 2011 The University of Texas at Austin", "NIQE Software Release",
                "COPYRIGHT NOTICE ENDS", "LabForComputationalVision", "MIT License"):
    assert words in notice


# --- VIF -------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", [jax.jit(vif.vifp), vif.vif_wavelet], ids=["vifp", "wavelet"])
def test_vif_of_other_scales_and_orders(metric):
  x, y = images()
  value = float(metric(x, y, 1.0))
  assert float(metric(x, x, 1.0)) == pytest.approx(1, abs=1e-4)
  assert float(metric(300 * x - 100, 300 * y - 100, 300.0)) == pytest.approx(value, abs=1e-4)
  noisy = x + 0.1 * np.random.default_rng(0).standard_normal(x.shape)
  assert float(metric(x, noisy, 1.0)) < 0.7
  assert float(metric(x, noisy, 255.0)) > 0.95  # [0, 1] taken as grey levels flatters
  assert float(metric(y, x, 1.0)) > value + 0.05  # the reference comes first
  assert float(metric(x, 1 - x, 1.0)) < 1e-3  # an inverted image keeps nothing
  assert float(metric(x, 0 * x, 1.0)) == pytest.approx(0, abs=1e-6)
  background = np.where(x > 0.5, x, 0)  # exactly flat areas
  assert 0 < float(metric(background, np.where(x > 0.5, y, 0), 1.0)) < 1


def test_vif_refuses_what_it_is_not_defined_for():
  x, y = images()
  flat = np.full_like(x, 0.3)
  for metric in (vif.vifp, vif.vif_wavelet):
    with pytest.raises(ValueError, match="VIF is not defined for a constant image"):
      metric(flat, y, 1.0)
    with pytest.raises(ValueError, match="image"):
      metric(x, y[:-1], 1.0)
  assert np.isnan(jax.jit(vif.vifp)(flat, y, 1.0))
  with pytest.raises(ValueError, match="vifp needs an image .* of 41 pixels"):
    vif.vifp(x[:40, :80], y[:40, :80], 1.0)
  with pytest.raises(ValueError, match="vif_wavelet needs an image .* of 65 pixels"):
    vif.vif_wavelet(x[:80, :64], y[:80, :64], 1.0)
  assert np.isfinite(vif.vifp(x[:41, :41], y[:41, :41], 1.0))
  assert np.isfinite(vif.vif_wavelet(x[:65, :65], y[:65, :65], 1.0))


def test_vif_of_a_reference_without_structure_in_one_direction():
  """A band without information, whose covariance has no inverse, counts for nothing."""
  x, y = images()
  with pytest.raises(ValueError, match="without structure in any band"):
    vif.vif_wavelet(1e-20 * x, y, 1.0)  # rounding errors around a constant
  wave = np.tile(np.sin(np.arange(96) / 3), (80, 1)) / 2 + 0.5
  noisy = wave + 0.05 * np.random.default_rng(0).standard_normal(wave.shape)
  assert 0 < vif.vif_wavelet(wave, noisy, 1.0) < 1
  assert vif.vif_wavelet(wave, wave, 1.0) == pytest.approx(1)


# --- NIQE ------------------------------------------------------------------------------------


def test_niqe_says_how_large_an_image_must_be():
  x, _ = images()
  with pytest.raises(niqe.TooFewBlocks, match="image of 96 x 192 holds; images of 95 x 200"):
    niqe.niqe(x[:95], niqe.live(), 1.0)
  with pytest.raises(ValueError, match="two blocks of 96 x 96"):
    niqe.niqe(x[:96, :191], niqe.live(), 1.0)  # one block
  with pytest.raises(niqe.TooFewBlocks, match="show anything"):
    niqe.niqe(np.zeros((192, 192)), niqe.live(), 1.0)
  with pytest.raises(niqe.TooFewBlocks):
    niqe.slice_mean(np.stack([x[:96, :96]] * 3), niqe.live(), 1.0)
  assert np.isfinite(niqe.niqe(x[:96, :192], niqe.live(), 1.0))
  with pytest.raises(ValueError, match="H, W"):
    niqe.niqe(x[None], niqe.live(), 1.0)
  with pytest.raises(ValueError, match="even block"):
    niqe.block_features(x, 31, 1.0)


def test_niqe_fitted_on_images():
  x, y = images()
  with pytest.raises(niqe.TooFewBlocks, match="more than 36 blocks of 48 x 48 .* 2 images have 32"):
    niqe.fit([x, y], 48, 0.0, 1.0)
  with pytest.raises(niqe.TooFewBlocks, match="0 images have 0"):
    niqe.fit([], 48, 0.0, 1.0)
  empty = np.zeros((64, 64))
  model = niqe.fit([*tiles(x), empty, np.stack(tiles(y))], 32, 0.0, 1.0)
  assert (model.images, model.blocks) == (37, 144)  # a volume's slices; none of the flat image
  sharp = niqe.fit([*tiles(x), *tiles(y)], 32, 0.98, 1.0)
  assert 36 < sharp.blocks < 144 and sharp.sharpness == 0.98


def test_niqe_rises_with_blur_and_noise():
  x, _ = images()
  model = niqe.fit(tiles(x), 32, 0.0, 1.0)
  noise = 0.1 * np.random.default_rng(1).standard_normal(x.shape)
  scores = [niqe.niqe(image, model, 1.0)
            for image in (x, ndimage.gaussian_filter(x, 1), x + noise)]
  assert scores[0] < 2 and min(scores[1:]) > 3 * scores[0]
  assert niqe.niqe(300 * x, model, 300.0) == pytest.approx(scores[0], abs=0.01)


def test_niqe_of_a_volume():
  x, y = images()
  volume = np.stack([x[:, :192], y[:, :192]] * 10)  # more than are held in memory at once
  features, sharpness = niqe.block_features(volume, 32, 1.0)
  assert features.shape == (20, 36, 36) and sharpness.shape == (20, 36)
  again, _ = niqe.block_features(volume[1], 32, 1.0)
  np.testing.assert_array_equal(features[1], again[0])
  model = niqe.fit(tiles(x), 32, 0.0, 1.0)
  each = [niqe.niqe(image, model, 1.0) for image in volume[:2]]
  assert niqe.slice_mean(volume, model, 1.0) == pytest.approx(np.mean(each))
  blank = np.zeros_like(volume[:1])
  assert niqe.slice_mean(np.concatenate([volume, blank]), model, 1.0) == pytest.approx(
    np.mean(each))
  rows = features[:3].reshape(-1, 36)  # all blocks as those of one image
  away, both = model.mean - rows.mean(0), (model.covariance + np.cov(rows.T)) / 2
  assert niqe.pooled(volume[:3], model, 1.0) == pytest.approx(
    np.sqrt(away @ np.linalg.pinv(both) @ away))


def test_a_model_is_saved_and_loaded(tmp_path):
  model = niqe.fit(tiles(images()[0]), 32, 0.0, 1.0)
  niqe.save(model, tmp_path / "model.npz")
  again = niqe.load(tmp_path / "model.npz")
  np.testing.assert_array_equal(model.covariance, again.covariance)
  assert (again.block, again.sharpness, again.images, again.blocks) == (32, 0.0, 18, 72)
  assert isinstance(again.block, int)


# --- S3's metrics of a volume ----------------------------------------------------------------


def stack():
  """A volume of four slices of 72 x 80, an image of it, and a mask that shrinks to one voxel."""
  x, y = images()
  x, y = (np.stack([a[:72, k:k + 80] for k in (0, 40, 80, 120)]) for a in (x, y))
  mask = np.zeros(x.shape, bool)
  for k, margin in enumerate((4, 12, 20)):
    mask[k, margin:-margin, margin:-margin] = True
  mask[3, 30, 30] = True
  return 2 * x + 1, 2 * y + 1, mask


def test_s3_by_hand():
  x, y, mask = stack()
  got = s3.scores(x, y, mask)
  low, high = x[mask].min(), x[mask].max()
  error = (y - x)[mask].astype(np.float64)
  assert got["nmae_s3"] == pytest.approx(np.abs(error).mean() / (high - low), rel=1e-5)
  rmse = np.sqrt((error**2).mean())
  assert got["psnr_s3"] == pytest.approx(20 * np.log10((high - low) / rmse), abs=1e-3)
  r, i = (np.where(mask, a, low) for a in (x, y))
  weights, inner = mask.sum((1, 2)), mask[:, 5:-5, 5:-5]
  maps = jax.jit(jax.vmap(lambda p, q: similarity.ssim_map(p, q, high - low)))(r, i)
  assert got["ssim_s3"] == pytest.approx(np.asarray(maps)[inner].mean(), abs=1e-5)
  for name, metric in (("vifp_s3", vif.vifp), ("vif_wavelet_s3", vif.vif_wavelet)):
    each = [float(metric(p, q, high - low)) for p, q in zip(r[:3], i[:3], strict=True)]
    assert got[name] == pytest.approx(np.average(each, weights=weights[:3]), abs=1e-5)
    assert got[name] != pytest.approx(np.mean(each), abs=1e-3)
  outside = np.where(mask, y, 99)
  assert s3.scores(x, outside, mask) == got  # what lies outside the mask is not scored
  assert float(voxel.psnr(x, y, high - low, mask)) == pytest.approx(got["psnr_s3"], abs=1e-3)


def test_s3_is_absent_where_slices_are_too_small():
  x, y, mask = stack()
  small = s3.scores(x[:, 10:60, 10:60], y[:, 10:60, 10:60], mask[:, 10:60, 10:60])
  assert np.isnan(small["vif_wavelet_s3"]) and np.isfinite(small["vifp_s3"])
  little = s3.scores(x[3:], y[3:] + 0 * x[3:], mask[3:] | (np.indices(x[3:].shape)[1] == 30))
  assert np.isnan(little["vifp_s3"]) and np.isfinite(little["psnr_s3"])
  with pytest.raises(ValueError, match="constant in the mask"):
    s3.scores(np.where(mask, 1.0, x), y, mask)
  with pytest.raises(ValueError, match="empty"):
    s3.scores(x, y, np.zeros_like(mask))


def test_naturalness_without_a_model_or_blocks():
  x, _ = images()
  got = s3.naturalness(x[None], 1.0, None)
  assert got["niqe_live_s3"] == pytest.approx(FROZEN_NIQE[0], abs=1e-6)
  assert np.isnan(got["niqe_fitted_s3"])
  model = niqe.fit(tiles(x), 32, 0.0, 1.0)
  assert np.isnan(s3.naturalness(x[None, :64], 1.0, model)["niqe_live_s3"])
  assert all(np.isnan(v) for v in s3.naturalness(x[:0][None], 1.0, model).values())
  assert [s3.block_size(n) for n in (20, 95, 96, 240)] == [32, 32, 48, 48]
