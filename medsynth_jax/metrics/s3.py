"""S3's five metrics of an MR volume: NMAE, PSNR, SSIM, VIF (two codes), NIQE (two models).

Dai et al., Medical Physics 47(12), 2020. The paper states no normaliser, region or NIQE model. Here
one range serves all that need one, the reference's maximum less its minimum in the mask, and
outside the mask both images are set to that minimum. The published NMAE and PSNR cannot both hold
on one range and region, so that values are for comparison among rows, not with the paper.
"""

import numpy as np

from medsynth_jax.metrics import niqe, vif
from medsynth_jax.metrics.volume import volume_scores

METRICS = ("nmae_s3", "psnr_s3", "ssim_s3", "vifp_s3", "vif_wavelet_s3", "niqe_live_s3",
           "niqe_fitted_s3")
ENOUGH = 0.05  # share of a slice's pixels in the mask from which it counts in VIF and NIQE
BLOCKS = (48, 32)  # sizes for a fitted model: the first of which two lie along each side
SHARPNESS = 0.0  # of a fitted model: every block that is not flat
NEEDS = {
  "ssim_s3": "slices of 11 x 11 pixels", "vifp_s3": f"slices of {vif.LEAST} x {vif.LEAST} pixels",
  "vif_wavelet_s3": f"slices of {vif.LEAST_WAVELET} x {vif.LEAST_WAVELET} pixels",
  "niqe_live_s3": "two blocks of 96 x 96 pixels in a volume that show anything",
  "niqe_fitted_s3": "a fitted model, and two blocks of its size in a volume that show anything"}


def block_size(side: int) -> int:
  """The block size of a model that is fitted on slices of `side` pixels or more a side."""
  return next((b for b in BLOCKS if side >= 2 * b), BLOCKS[-1])


def enough(mask: np.ndarray) -> np.ndarray:
  """Which slices of a mask [n, H, W] count in VIF and NIQE, bool [n]."""
  return mask.mean((1, 2)) >= ENOUGH


def shown(image: np.ndarray, mask: np.ndarray, background: float) -> np.ndarray:
  """The slices of a volume that NIQE sees, with background outside the mask."""
  return np.where(mask, image, background)[enough(mask)]


def scores(reference, image, mask) -> dict[str, float]:
  """nmae_s3, psnr_s3, ssim_s3, vifp_s3, vif_wavelet_s3 of a volume [n, H, W] in any unit.

  SSIM (Wang) averaged over the mask; VIF of each slice with ENOUGH mask, its 0..255 the range, mean
  weighted by mask voxels. NaN where slices are too small (NEEDS) or hold too little. ValueError for
  an empty mask and for a reference that is constant in it.
  """
  mask = np.asarray(mask) != 0
  inside = np.asarray(reference)[mask]
  if not inside.size:
    raise ValueError("scores need a voxel in the mask; it is empty")
  low, high = float(inside.min()), float(inside.max())
  if low == high:
    raise ValueError("S3's metrics, VIF among them, are not defined for a reference that is"
                     " constant in the mask")
  pair = [np.where(mask, x, np.float32(low)) for x in (reference, image)]
  found = volume_scores(*pair, mask, data_range=high - low)
  return {**{f"{name}_s3": found[name] for name in ("nmae", "psnr", "ssim")},
          "vifp_s3": _slices(vif.vifp, vif.LEAST, *pair, mask, high - low),
          "vif_wavelet_s3": _slices(vif.vif_wavelet, vif.LEAST_WAVELET, *pair, mask, high - low)}


def _slices(metric, least: int, reference, image, mask, data_range: float) -> float:
  """The mean of a metric over slices weighted by their mask's voxels; NaN where there are none."""
  used = enough(mask) & (np.ptp(reference, (1, 2)) > 0)
  if min(mask.shape[1:]) < least or not used.any():
    return float("nan")
  values = [float(metric(reference[k], image[k], data_range)) for k in np.flatnonzero(used)]
  return float(np.average(values, weights=mask.sum((1, 2))[used]))


def naturalness(slices: np.ndarray, data_range: float, fitted: niqe.Model | None
                ) -> dict[str, float]:
  """niqe_live_s3 and niqe_fitted_s3 of the slices that `shown` gives, their blocks pooled.

  `data_range`: the top of their scale, which begins at 0. NaN where there are too few blocks, and
  without a fitted model.
  """
  found = {}
  for name, model in (("niqe_live_s3", niqe.live()), ("niqe_fitted_s3", fitted)):
    try:
      found[name] = niqe.pooled(slices, model, data_range) if model else float("nan")
    except niqe.TooFewBlocks:
      found[name] = float("nan")
  return found
