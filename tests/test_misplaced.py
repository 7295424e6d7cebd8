"""Simulated misalignment of training pairs: its direction, and what it is the same for."""

import dataclasses

import numpy as np
import pytest
from ml_collections import ConfigDict
from test_pipeline import ROW, batches, fields

from medsynth_jax import config as configs
from medsynth_jax.data.augment import Augment, draw_pose, make_augment, misplaced, placed
from medsynth_jax.data.dataset import Store
from medsynth_jax.data.displacements import displaced
from medsynth_jax.data.draws import check
from medsynth_jax.data.examples import make_task
from medsynth_jax.data.pipeline import Examples, _depth_window
from medsynth_jax.errors import UserError

INNER = (slice(6, 26), slice(4, 28))  # of 32 x 32, where the toy slices of 20 x 24 lie
PLANE = (20, 24), (2.0, 2.0)
AUGMENT = Augment(misalign=2, displace=3)


@pytest.fixture(scope="module")
def store(toy_data):
  return Store(toy_data)


def example(store, augment, row=ROW, seed=0, **data):
  task = make_task(fields(**data).data, store.info)
  return Examples(store, task, augment)(row, np.random.default_rng(seed))


def moved(augment, volume=1, seed=0, shape=PLANE[0], spacing=PLANE[1]):
  return misplaced(augment, volume, shape, spacing, np.random.default_rng(seed))


def equal(one, other) -> bool:
  return all(np.array_equal(a, b) for a, b in
             zip(vars(one).values(), vars(other).values(), strict=True))


def test_fixed_for_a_volume_whatever_the_slice_or_the_epoch():
  one = moved(AUGMENT)
  assert equal(one, moved(AUGMENT, seed=1))
  assert not equal(one, moved(AUGMENT, volume=2))
  assert not equal(one, moved(dataclasses.replace(AUGMENT, seed=1)))
  assert not np.array_equal(one.source, one.target)
  assert np.linalg.norm(one.u * PLANE[1], axis=-1).mean() == pytest.approx(3, rel=1e-4)


def test_drawn_anew_for_an_example():
  anew = dataclasses.replace(AUGMENT, redraw=True)
  assert equal(moved(anew), moved(anew, volume=2))
  one, other = moved(anew), moved(anew, seed=1)
  assert not np.array_equal(one.target, other.target) and not np.array_equal(one.u, other.u)


def test_neither_field_changes_the_other():
  both = moved(AUGMENT)
  np.testing.assert_array_equal(moved(Augment(displace=3)).u, both.u)
  np.testing.assert_array_equal(moved(Augment(misalign=2)).target, both.target)


def test_the_displaced_target_of_an_example(store):
  """It shows at p what the target shows at p + u(p); the source stays."""
  plain, apart = (example(store, Augment(displace=d)) for d in (0, 3))
  u = moved(Augment(displace=3)).u
  np.testing.assert_allclose(apart["target"][INNER], displaced(plain["target"][INNER], u, fill=-1),
                             atol=1e-5)
  assert np.abs(apart["target"] - plain["target"]).max() > 0.1
  np.testing.assert_array_equal(apart["source"], plain["source"])
  valid = displaced(plain["valid"][INNER], u, 0, 0)
  assert 0.5 < valid.mean() < 1
  for name in ("valid", "target_valid"):
    np.testing.assert_array_equal(apart[name][INNER], valid)
  assert (apart["mask"] <= apart["valid"]).all() and apart["paired"] == 1


@pytest.mark.parametrize("redraw", [False, True])
def test_no_other_draw_changes(store, redraw):
  augment = Augment(flip=True, rotate=10, shift=0.1)
  other = dataclasses.replace(augment, displace=2, redraw=redraw)
  for seed in range(4):
    one, two = (example(store, a, seed=seed, size="16,16") for a in (augment, other))
    np.testing.assert_array_equal(one["source"], two["source"])


def test_one_interpolation_of_all_maps():
  """An image of its own coordinates tells where each pixel came from: own(q + u(q)), q = S p."""
  augment = dataclasses.replace(AUGMENT, rotate=20, scale=0.1)
  pose = draw_pose(augment, *PLANE[:1], PLANE[0], np.random.default_rng(3))
  where = moved(augment)
  p = np.stack(np.meshgrid(np.arange(20.0), np.arange(24.0), indexing="ij"), -1)
  image = p[None].astype(np.float32)
  q = p @ pose.matrix[:2, :2].T + pose.matrix[:2, 2]
  shift = np.stack([displaced(where.u[..., i], q - p) for i in range(2)], -1)
  wanted = (q + shift) @ where.target[:2, :2].T + where.target[:2, 2]
  found = placed(image, pose, where.target, where.u, PLANE[0], 1)[0]
  inside = ((wanted > 0) & (wanted < (19, 23))).all(-1)
  assert inside.mean() > 0.5
  np.testing.assert_allclose(found[inside], wanted[inside], atol=1e-3)
  assert (found[~((wanted > -0.01) & (wanted < (19.01, 23.01))).all(-1)] == -1).all()
  affine = placed(image, pose, where.source, None, PLANE[0], 1)[0]
  wanted = q @ where.source[:2, :2].T + where.source[:2, 2]
  inside = ((wanted > 0) & (wanted < (19, 23))).all(-1)
  np.testing.assert_allclose(affine[inside], wanted[inside], atol=1e-3)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_patches_are_displaced_along_the_slice_axis_too(store, seed):
  """A patch shows the displaced volume, slices beyond its own included."""
  augment = Augment(displace=4)
  part = example(store, augment, seed=seed, size="4,32,32")
  u = misplaced(augment, 1, (10, 20, 24), (3.0, 2.0, 2.0), np.random.default_rng(0)).u
  assert u.shape == (10, 20, 24, 3) and np.abs(u[..., 0]).max() > 0.7
  plain = example(store, Augment(), size="16,32,32")
  inner = (slice(0, 10), *INNER)
  whole = displaced(plain["target"][inner], u, fill=-1)
  first, _ = _depth_window(int(ROW[1]), 10, 4, np.random.default_rng(seed))
  np.testing.assert_allclose(part["target"][:, *INNER], whole[first:first + 4], atol=1e-5)
  np.testing.assert_array_equal(part["source"][:, *INNER], plain["source"][inner][first:first + 4])
  valid = displaced(np.ones((10, 20, 24)), u, 0, 0)[first:first + 4]
  np.testing.assert_array_equal(part["valid"][:, *INNER, 0], valid)


def test_a_stage_sets_it(store):
  config, section = fields(), ConfigDict(configs.stage("x", misalign=3.0, displace=2.0,
                                                       redraw=True))
  config.seed = 7
  augment = make_augment(config, section, store.info)
  assert (augment.misalign, augment.displace, augment.redraw, augment.seed) == (3, 2, True, 7)


def test_a_displacement_that_folds_is_refused_at_once(store):
  wide = tuple(map(tuple, np.diag([10.0, 10.0, 10.0, 1.0]).tolist()))
  info = dataclasses.replace(store.info, cases=tuple(
    dataclasses.replace(c, affine=wide) for c in store.info.cases))
  with pytest.raises(UserError, match="90 mm on average folds a grid of 200 x 240 mm"):
    check(info, make_task(fields().data, info), ConfigDict(configs.stage("x", displace=90.0)))


def test_a_volume_is_not_displaced_anew_for_each_patch(store):
  section = ConfigDict(configs.stage("x", displace=1.0, redraw=True))
  task = make_task(fields(size="4,32,32").data, store.info)
  with pytest.raises(UserError, match="redraw with 3-D patches: .* set redraw=False, or displace"):
    check(store.info, task, section)
  for changes in ({"displace": 0.0, "misalign": 1.0}, {"redraw": False}):
    check(store.info, task, ConfigDict({**section, **changes}))
  check(store.info, make_task(fields().data, store.info), section)


def test_few_fields_of_whole_volumes_are_kept():
  """Many of slices, which are small: those of a volume of 256 x 256 x 128 take 0.1 GB each."""
  augment = Augment(displace=1)
  for shape, kept in (((20, 24), 5), ((6, 8, 8), 2)):
    one, *_ = (moved(augment, v, shape=shape, spacing=(5.0,) * len(shape)) for v in range(5))
    again = moved(augment, 0, shape=shape, spacing=(5.0,) * len(shape))
    assert (again is one) == (kept == 5) and equal(one, again)


def test_an_image_is_not_displaced_against_itself(store):
  with pytest.raises(UserError, match="cannot be misaligned with itself; set displace=0"):
    batches(store, fields(), 1, draw="single", displace=1.0)
