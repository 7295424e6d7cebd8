"""Training batches: deterministic, checkpointable, the same set on any number of processes."""

import dataclasses

import numpy as np
import pytest
from ml_collections import ConfigDict

from medsynth_jax import config as configs
from medsynth_jax.data import augment as augmentation
from medsynth_jax.data.dataset import Store, dequantise
from medsynth_jax.data.draws import training_index
from medsynth_jax.data.examples import make_task
from medsynth_jax.data.intensities import to_model
from medsynth_jax.data.pipeline import Augment, Examples, example_batch, training
from medsynth_jax.errors import UserError

ROW = np.array([1, 4, 0], np.int32)  # volume 1, slice 4


def fields(**changes) -> ConfigDict:
  config = configs.base()
  config.data.update(source="a", targets="b", size="32,32", threads=0)
  config.data.update(changes)
  return config


def batches(store, config, n, augment=None, process=0, processes=1, **section):
  section = ConfigDict(configs.stage("pix2pix", batch_size=4, **section))
  task = make_task(config.data, store.info)
  stream = iter(training(store, task, augment or Augment(), section, config, 0, process, processes))
  return [next(stream) for _ in range(n)]


@pytest.fixture(scope="module")
def store(toy_data):
  return Store(toy_data)


def test_example_is_the_stored_slice(store):
  """Source and target are the scaled slice, padded about its centre; valid marks what was there."""
  task = make_task(fields().data, store.info)
  example = Examples(store, task, Augment())(ROW, np.random.default_rng(0))
  case = store.info.cases[1]
  image = store.volume(case)["images"]["b"][4]
  inner = (slice(6, 26), slice(4, 28))
  np.testing.assert_allclose(example["target"][inner][..., 0],
                             to_model(case.images["b"].target, image), atol=1e-6)
  assert example["valid"].sum() == 20 * 24 and example["valid"][inner].all()
  assert (example["target"][:6] == -1).all() and (example["source"][:, :4] == -1).all()
  assert example["mask"].sum() == 14 * 18
  assert {k: (v.shape, v.dtype) for k, v in example.items()} == {
    k: (v.shape[1:], v.dtype) for k, v in example_batch(task, store.info).items()}
  assert (example["volume"], example["slice"]) == (1, 4)


def test_only_training_subjects_are_drawn(store):
  drawn = np.concatenate([b["volume"] for b in batches(store, fields(), 20)])
  assert set(drawn) == {c.volume for c in store.info.split("train")}


def test_batch_of_one(store):
  """The published recipes' batch."""
  config, section = fields(), ConfigDict(configs.stage("pix2pix", batch_size=1))
  stream = iter(training(store, make_task(config.data, store.info), Augment(), section, config, 0))
  four = batches(store, config, 1)[0]
  for k in range(4):
    np.testing.assert_array_equal(next(stream)["source"][0], four["source"][k])


def test_excluded_fold_is_not_drawn(store):
  drawn = np.concatenate([b["fold"] for b in batches(store, fields(), 10, exclude_fold=1)])
  assert set(drawn) == {0}


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_each_batch(store, processes):
  """In its order: what is drawn by the place in the batch, noise and dropout, stays the same."""
  config, augment = fields(), Augment(rotate=10, shift=0.1, scale=0.1, flip=True)
  whole = batches(store, config, 5, augment)
  parts = [batches(store, config, 5, augment, p, processes) for p in range(processes)]
  for k in range(5):
    for name in whole[k]:
      together = np.concatenate([part[k][name] for part in parts])
      np.testing.assert_array_equal(together, whole[k][name])


def test_iterator_state_continues_exactly(store):
  config = fields(threads=2)
  section = ConfigDict(configs.stage("pix2pix", batch_size=4))
  task, augment = make_task(config.data, store.info), Augment(rotate=10)
  stream = iter(training(store, task, augment, section, config, 0))
  for _ in range(3):
    next(stream)
  state = stream.get_state()
  expected = [next(stream) for _ in range(3)]
  again = iter(training(store, task, augment, section, config, 0))
  again.set_state(state)
  for batch in expected:
    other = next(again)
    assert all(np.array_equal(batch[n], other[n]) for n in batch)


def test_streams_apart_do_not_depend_on_what_was_read_before(store):
  """Recolouring and redrawn misalignment too resume exactly, and are shared by two processes.

  Grain uses a generator again for other examples: `Generator.spawn` would count on.
  """
  augment = Augment(gamma=0.3, displace=2.0, misalign=1.0, redraw=True)
  config = fields(threads=2)
  section = ConfigDict(configs.stage("pix2pix", batch_size=4))
  task = make_task(config.data, store.info)
  stream = iter(training(store, task, augment, section, config, 0))
  for _ in range(3):
    next(stream)
  state, later = stream.get_state(), next(stream)
  again = iter(training(store, task, augment, section, config, 0))
  again.set_state(state)
  resumed = next(again)
  for name, array in later.items():
    np.testing.assert_array_equal(resumed[name], array)
  halves = [batches(store, config, 4, augment, process, 2)[3] for process in (0, 1)]
  together = np.concatenate([half["source"] for half in halves])
  np.testing.assert_array_equal(together, later["source"])


def test_one_draw_for_all_modalities(toy_data, store):
  """A target equal to the source stays equal under every shared transform, not under misalign."""
  case = store.info.cases[1]
  same = dataclasses.replace(
    store.info, cases=tuple(dataclasses.replace(c, images={**c.images, "b": c.images["a"]})
                            for c in store.info.cases))
  class Twice(Store):
    def slices(self, case, numbers):
      arrays = super().slices(case, numbers)
      arrays["images"]["b"] = arrays["images"]["a"]
      return arrays
  task = make_task(fields().data, same)
  shared = Augment(flip=True, rotate=15, shift=0.1, scale=0.1, zoom=1.1)
  twin = Twice(toy_data, same)
  for seed in range(5):
    example = Examples(twin, task, shared)(ROW, np.random.default_rng(seed))
    np.testing.assert_array_equal(example["source"], example["target"])
  apart = Examples(twin, task, Augment(misalign=5))(ROW, np.random.default_rng(0))
  assert np.abs(apart["source"] - apart["target"]).max() > 0.05
  assert case.name == "s1"


def test_flip_mirrors_left_and_right(store):
  task = make_task(fields().data, store.info)
  rng = [np.random.default_rng(s) for s in range(8)]
  seen = {Examples(store, task, Augment(flip=True))(ROW, r)["source"].tobytes() for r in rng}
  plain = Examples(store, task, Augment())(ROW, rng[0])["source"]
  assert seen == {plain.tobytes(), np.ascontiguousarray(plain[::-1]).tobytes()}


def test_shift_moves_by_whole_pixels():
  """A known draw: the transform shifts by the stated share of the slice."""
  class Draw:
    def uniform(self, low, high, n):
      return np.array([0, 0, 1, 0])
  matrix = augmentation.transform(Draw(), 0, 0.1, 0, 1.0, (20, 24))
  image = np.arange(480, dtype=np.float32).reshape(1, 20, 24, 1)
  moved = augmentation._warp(image, matrix, 1, -1.0)
  np.testing.assert_allclose(moved[0, 2:], image[0, :-2], atol=1e-3)
  assert (moved[0, :2] == -1).all()


def test_gamma_and_contrast_change_the_source_alone(store):
  """u -> c u^g, monotone; background, target and every other draw stay as they are."""
  task = make_task(fields().data, store.info)
  moved = Augment(rotate=10)
  plain = Examples(store, task, moved)(ROW, np.random.default_rng(5))
  coloured = Examples(store, task, dataclasses.replace(moved, gamma=0.3, contrast=0.1))(
    ROW, np.random.default_rng(5))
  assert all(np.array_equal(plain[n], coloured[n]) for n in plain if n != "source")
  before, after = plain["source"].ravel(), coloured["source"].ravel()
  assert np.abs(before - after).max() > 0.02 and after.min() >= -1 and after.max() <= 1
  assert (after[before == -1] == -1).all()
  assert np.corrcoef(before.argsort().argsort(), after.argsort().argsort())[0, 1] > 0.99


def test_context_stacks_neighbours(store):
  task = make_task(fields(context=1).data, store.info)
  example = Examples(store, task, Augment())(ROW, np.random.default_rng(0))
  case = store.info.cases[1]
  image = dequantise_slices(store, case, (3, 4, 5))
  assert example["source"].shape == (32, 32, 3)
  np.testing.assert_allclose(np.moveaxis(example["source"], -1, 0)[:, 6:26, 4:28],
                             to_model(case.images["a"].source[0], image), atol=1e-6)


def dequantise_slices(store, case, numbers):
  return store.slices(case, numbers)["images"]["a"]


def test_patches_3d_hold_their_slice(store):
  task = make_task(fields(size="8,16,16").data, store.info)
  example = Examples(store, task, Augment())(ROW, np.random.default_rng(3))
  assert example["source"].shape == (8, 16, 16, 1)
  deeper = make_task(fields(size="16,16,16").data, store.info)
  example = Examples(store, deeper, Augment())(ROW, np.random.default_rng(3))
  assert example["valid"][:10].all() and not example["valid"][10:].any()


def test_stacked_sources_and_a_missing_one(store):
  """skip: the case is not drawn; zero: its channel is background and its presence -1."""
  case = store.info.cases[0]
  info = dataclasses.replace(store.info, cases=(
    dataclasses.replace(case, images={"b": case.images["b"]}), *store.info.cases[1:]))
  modalities = {**info.modalities, "c": dataclasses.replace(info.modalities["b"], name="c")}
  cases = tuple(dataclasses.replace(c, images={**c.images, "c": c.images["b"]},
                                    foreground={**c.foreground, "c": (4,)}) for c in info.cases)
  info = dataclasses.replace(info, modalities=modalities, cases=cases)
  skip = make_task(fields(source="[a,b]", targets="c").data, info)
  assert 0 not in training_index(info, skip)[:, 0] and skip.channels(info) == 2
  zero = make_task(fields(source="[a,b]", targets="c", missing="zero").data, info)
  assert 0 in training_index(info, zero)[:, 0] and zero.channels(info) == 4
  from medsynth_jax.data.examples import case_source
  arrays = store.volume(store.info.cases[0])
  arrays["images"].pop("a")
  source = case_source(arrays, info.cases[0], zero, info)
  assert (source[..., 0] == -1).all() and (source[..., 1] == -1).all()
  assert (source[..., 3] == 1).all()


def test_no_foreground_slice_is_refused(store):
  cases = tuple(dataclasses.replace(c, foreground={"a": (), "b": ()}) for c in store.info.cases)
  info = dataclasses.replace(store.info, cases=cases)
  with pytest.raises(UserError, match="no slice left"):
    training_index(info, make_task(fields().data, info))


def test_no_common_training_case_is_refused(store):
  cases = tuple(dataclasses.replace(c, images={"a": c.images["a"]}) for c in store.info.cases)
  info = dataclasses.replace(store.info, cases=cases)
  with pytest.raises(UserError, match="no training case has a and b"):
    training_index(info, make_task(fields().data, info))


def test_sagittal_flip_is_refused(store):
  config = fields()
  config.data.augment.flip = True
  with pytest.raises(UserError, match="sagittal"):
    augmentation.make_augment(config, ConfigDict(configs.stage("pix2pix")),
                              dataclasses.replace(store.info, plane=0))


def test_quantisation_error_is_bounded():
  from medsynth_jax.data.dataset import Image, quantise
  from medsynth_jax.data.intensities import Scaling
  x = np.random.default_rng(0).uniform(-1024, 3071, (4, 5, 6)).astype(np.float32)
  stored, slope, intercept = quantise(x)
  image = Image("", (), (), (), Scaling("linear", 0, 1), slope, intercept, {})
  assert np.abs(dequantise(stored, image) - x).max() <= 4095 / 131070 * 1.02
