"""Field of view and body."""

import numpy as np
import pytest

from medsynth_jax.data.masks import body_mask, field_of_view

SPACING = np.diag([2.0, 2.0, 3.0, 1.0])


def ellipse(shape, centre, radii):
  index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
  return (((index - centre) / radii) ** 2).sum(-1) < 1


def test_fill_is_what_touches_the_border():
  mr = np.ones((8, 8, 8), np.float32)
  mr[:3] = 0       # outside the field of view
  mr[5, 5, 5] = 0  # a dark voxel
  field = field_of_view(mr, "mr")
  assert not field[:3].any() and field[3:].all()
  ct = np.where(mr == 0, -2000.0, -1000.0)
  np.testing.assert_array_equal(field_of_view(ct, "ct"), field)
  assert field_of_view(np.where(mr == 0, -1023.0, 0), "ct").all()
  assert field_of_view(mr, "pet").all()  # a PET zero is data


def test_fill_of_a_single_slice():
  image = np.ones((8, 8, 1), np.float32)
  image[:2], image[5, 5] = 0, 0
  field = field_of_view(image, "mr")
  assert not field[:2].any() and field[5, 5, 0]


@pytest.fixture(scope="module")
def torso():
  """Two limbs above a table, one with a lung that the crop cuts open."""
  shape = (90, 70, 16)
  limbs = [ellipse(shape, (30, 30, 8), (20, 22, 99)), ellipse(shape, (72, 30, 8), (9, 9, 99))]
  lung = ellipse(shape, (30, 30, 8), (8, 8, 99))
  table = np.zeros(shape, bool)
  table[5:85, 58:60] = True
  speck = np.zeros(shape, bool)
  speck[80:84, 5:9, 3:5] = True
  return limbs, lung, table, speck


def test_body_loses_table_and_specks_and_keeps_every_limb(torso):
  limbs, lung, table, speck = torso
  whole = limbs[0] | limbs[1]
  body = body_mask((whole & ~lung) | table | speck, "ct", SPACING)
  assert not body[table].any() and not body[speck].any()
  assert body[lung].all()
  assert (body == whole).mean() > 0.999
  assert body[limbs[1]].mean() > 0.99


def test_body_follows_the_affine_to_the_axial_slices(torso):
  limbs, lung, table, _ = torso
  seen = ((limbs[0] | limbs[1]) & ~lung) | table
  turned = np.array([[0, 2.0, 0, 0], [0, 0, 2.0, 0], [3.0, 0, 0, 0], [0, 0, 0, 1]])
  np.testing.assert_array_equal(body_mask(seen.transpose(2, 0, 1), "ct", turned),
                                body_mask(seen, "ct", SPACING).transpose(2, 0, 1))


def test_table_is_no_matter_of_mr(torso):
  limbs, _, table, speck = torso
  assert body_mask(limbs[0] | table, "mr", SPACING)[table].all()
  assert not body_mask(limbs[0] | speck, "mr", SPACING)[speck].any()
  assert body_mask(np.ones((5, 5, 5), bool), "ct", SPACING).all()
  assert not body_mask(np.zeros((5, 5, 5), bool), "ct", SPACING).any()
