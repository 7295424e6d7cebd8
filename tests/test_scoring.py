"""Scores of arrays: units, ranges, masks, and the channel that a table of grey levels reads."""

import numpy as np
import pytest
from conftest import modality

from medsynth_jax import floors, scoring
from medsynth_jax.data.intensities import Scaling
from medsynth_jax.errors import UserError


def test_units_and_ranges():
  ct = scoring.scale_of(modality("ct", Scaling("linear", -1024, 3071)))
  assert ct.reference(np.array([-2000, 0, 4000]), None).tolist() == [-1024, 0, 3000]
  assert ct.prediction(np.array([-1.0, 1.0])).tolist() == [-1024, 3000]
  assert (ct.unit, ct.data_range, ct.background) == ("HU", 4024, -1024)
  pet = scoring.scale_of(modality("pet", Scaling("sqrt", 0, 25)))
  assert pet.reference(np.array([30.0]), None) == 30  # uptake above the range is an error
  assert pet.prediction(np.array([-1, 0, 1.0])).tolist() == [0, 6.25, 25]
  assert (pet.unit, pet.data_range) == ("SUV", 25)
  mr = scoring.scale_of(modality("mr", Scaling("linear", 5, 500)))
  own = Scaling("linear", 10, 210)
  assert mr.reference(np.array([-10, 10, 110, 310.0]), own).tolist() == pytest.approx(
    [-0.1, 0, 0.5, 1.5])
  assert mr.prediction(np.array([-1, 0, 1.0])).tolist() == [0, 0.5, 1]
  for scale in (ct, pet, mr):
    y = np.linspace(-1, 0.9, 7)
    np.testing.assert_allclose(scale.model(scale.prediction(y)), y, atol=1e-5)


def test_what_lies_outside_the_mask_does_not_count():
  """Not even for the papers' conventions of whole slices: synthesis writes background there."""
  rng = np.random.default_rng(0)
  reference, image = rng.uniform(0, 1, (2, 3, 24, 24)).astype(np.float32)
  mask = np.zeros(reference.shape, bool)
  mask[:, 6:18, 6:18] = True
  other = np.where(mask, image, 1 - image)
  scale = scoring.scale_of(modality("mr", Scaling("linear", 0, 1)))
  rois = {"lesion": mask & (reference > 0.5), "s2": mask, "none": ~mask}
  a, b = (scoring.score(scale, reference, x, mask, rois, ("wang",)) for x in (image, other))
  assert not {m for m in a if a[m] != b[m] and a[m] == a[m]}
  inside = np.abs(reference - image)[rois["lesion"]].mean()
  assert a["mae_lesion"] == pytest.approx(inside, rel=1e-5)
  assert a["mae_roi_s2"] == pytest.approx(a["mae"]) and np.isnan(a["mae_none"])
  assert a["psnr_s2"] != a["psnr_roi_s2"]


def test_lut_reads_the_channel_that_tells_most():
  rng = np.random.default_rng(0)
  source = rng.uniform(-1, 1, (4, 8, 8, 3)).astype(np.float32)
  target, mask = source[..., 1] ** 2, np.ones((4, 8, 8), bool)
  fit, empty = (floors.Fit(channels=3, common_grid=True, direction="a->b") for _ in range(2))
  for _ in range(floors.CHOOSE + 1):
    fit.add(source, target, mask, (1, 1, 1))
  floor = fit.done()
  assert floor.parts[0].lut.count.sum() == (floors.CHOOSE + 1) * mask.size
  rows = floor.predict(source, (1, 1, 1))
  assert floor.channel == 1 and np.abs(rows["lut"] - target).max() < 0.05
  np.testing.assert_allclose(rows["mean_image"], target, atol=1e-6)
  empty.add(source, target, ~mask, (1, 1, 1))
  with pytest.raises(UserError, match="a->b: no training subject"):
    empty.done()
