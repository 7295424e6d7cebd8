"""Displacements of slices and volumes: their length, smoothness, direction and folds."""

import numpy as np
import pytest
from scipy import ndimage

from medsynth_jax.data.displacements import determinants, displaced, displacement
from medsynth_jax.errors import UserError


@pytest.mark.parametrize("shape, spacing", [((96, 112), (2.0, 2.0)), ((64, 40), (1.5, 4.0)),
                                            ((24, 48, 40), (5.0, 2.0, 3.0))])
@pytest.mark.parametrize("mm", [1.0, 4.0, 8.0])
def test_length_in_mm_and_no_fold(shape, spacing, mm):
  u = displacement(shape, spacing, mm, np.random.default_rng(3))
  assert u.shape == (*shape, len(shape)) and u.dtype == np.float32
  assert np.linalg.norm(u * spacing, axis=-1).mean() == pytest.approx(mm, rel=1e-4)
  assert determinants(u).min() > 0


def test_a_field_is_smooth_over_40_mm():
  """Finer pixels sample the same field, which changes little over 8 mm and wholly over 80."""
  coarse, fine = (displacement((n, n), (192 / n,) * 2, 4.0, np.random.default_rng(0)) * (192 / n)
                  for n in (24, 48))
  np.testing.assert_allclose(fine.reshape(24, 2, 24, 2, 2).mean((1, 3)), coarse, atol=0.1)
  assert np.abs(np.diff(coarse, axis=0)).mean() < 0.4 * np.abs(coarse).mean()
  assert np.corrcoef(coarse[:-10, :, 0].ravel(), coarse[10:, :, 0].ravel())[0, 1] < 0.5


def test_the_same_generator_gives_the_same_field():
  one, same, other = (displacement((20, 24), (2, 2), 2.0, np.random.default_rng(s))
                      for s in (1, 1, 2))
  np.testing.assert_array_equal(one, same)
  assert np.abs(one - other).max() > 0.1
  assert not displacement((20, 24), (2, 2), 0.0, np.random.default_rng(1)).any()


def test_a_displaced_image_shows_at_p_what_lies_at_p_plus_u():
  image = np.arange(20, dtype=np.float32)[:, None] + 100 * np.arange(24, dtype=np.float32)
  u = np.zeros((20, 24, 2), np.float32)
  u[..., 0], u[..., 1] = 2.5, -1
  moved = displaced(image, u, fill=-1)
  np.testing.assert_allclose(moved[:17, 1:], image[:17, 1:] + 2.5 - 100, rtol=1e-6)
  assert (moved[18:] == -1).all() and (moved[:, :1] == -1).all()
  np.testing.assert_array_equal(displaced(image, u)[18:, 1], image[19:, 0].repeat(2))
  both = displaced(np.stack([image, -image], -1), u, fill=-1)
  np.testing.assert_array_equal(both[..., 0], moved)


def test_displaced_along_the_slice_axis_too():
  volume = ndimage.gaussian_filter(np.random.default_rng(0).standard_normal((8, 9, 10)), 1)
  u = np.zeros((8, 9, 10, 3), np.float32)
  u[..., 0] = 1
  np.testing.assert_allclose(displaced(volume, u)[:-1], volume[1:], atol=1e-6)


def test_determinants_of_known_maps():
  y, x = np.meshgrid(np.arange(6.0), np.arange(5.0), indexing="ij")
  np.testing.assert_allclose(determinants(np.stack([y, 0.5 * x], -1)), 3.0)  # 2 y, 1.5 x
  np.testing.assert_allclose(determinants(np.stack([-2 * y, x * 0], -1)), -1.0)


def test_a_displacement_that_folds_is_refused():
  with pytest.raises(UserError, match="90 mm on average folds a grid of 192 x 224 mm: use"):
    displacement((96, 112), (2, 2), 90.0, np.random.default_rng(0))
