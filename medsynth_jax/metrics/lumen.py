"""The lumen of a vessel in a synthetic CT angiogram, found by a threshold near a named region."""

import numpy as np
from scipy import ndimage

REACH = 2  # voxels around the region in which the lumen is looked for


def lumen_dice(image, region, mask, threshold: float) -> float:
  """Dice of the image's lumen and the region inside the mask, arrays [n, H, W].

  The lumen is what is brighter than `threshold` in the mask, in the region or within REACH voxels
  of it, counted along the three axes. 0 where nothing is; NaN where the region is empty.
  """
  region = np.asarray(region, bool) & mask
  if not region.any():
    return float("nan")
  (box,) = ndimage.find_objects(region.astype(np.uint8))
  box = tuple(slice(max(0, s.start - REACH), s.stop + REACH) for s in box)
  region = region[box]
  near = ndimage.binary_dilation(region, iterations=REACH) & mask[box]
  found = near & (np.asarray(image)[box] > threshold)
  return float(2 * (found & region).sum() / (found.sum() + region.sum()))
