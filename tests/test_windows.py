"""Whole volumes through a network of fixed size: cover, blend, pad, context, any batch size."""

import jax
import numpy as np
import pytest

from medsynth_jax.data.examples import BACKGROUND, Task
from medsynth_jax.windows import blending, cut, starts, synthesise

KEY = jax.random.key(0)


def volume(*shape, seed=0):
  return np.random.default_rng(seed).uniform(-1, 1, (*shape, 1)).astype(np.float32)


def run(predict, source, size, context=0, **options):
  task = Task(("a",), ("b",), size, context)
  options = {"batch_size": 4, **options}
  return synthesise(predict, None, source, task, source_modality=0, target_modality=1, key=KEY,
                    put=lambda batch: batch, **options)


def pointwise(state, batch, key):
  return np.sin(3 * batch["source"][..., :1])


@pytest.mark.parametrize("length, size, overlap", [
  (100, 32, 0.25), (33, 32, 0.25), (64, 32, 0.0), (97, 16, 0.5), (10, 1, 0.25), (7, 2, 0.9)])
def test_windows_cover_the_axis_once_each(length, size, overlap):
  first = starts(length, size, overlap)
  assert first[0] == 0 and first[-1] == length - size
  assert len(first) == len(set(first)) and first == sorted(first)
  steps = np.diff(first)
  assert steps.max() <= max(1, np.ceil(size * (1 - overlap)))


def test_slices_are_taken_once():
  assert starts(10, 1, 0.25) == list(range(10))


def test_short_axis_lies_in_the_middle():
  assert starts(5, 8, 0.25) == [-1] and starts(8, 8, 0.25) == [0]
  part = cut(np.ones((5, 4, 1)), (-1, 0), (8, 4))
  assert part.shape == (8, 4, 1)
  assert (part[[0, 6, 7]] == BACKGROUND).all() and (part[1:6] == 1).all()


def test_blending_is_a_triangle_along_axes_with_several_windows():
  weight = blending((1, 4, 5), (1, 1, 3))[0, :, :, 0]
  assert np.allclose(weight, np.array([1, 2, 3, 2, 1]) / 3)
  assert (blending((1, 4, 5), (1, 1, 1)) == 1).all()
  assert (blending((4, 4, 4), (2, 2, 2)) > 0).all()


@pytest.mark.parametrize("shape, size", [
  ((3, 16, 16), (16, 16)),       # one window a slice
  ((3, 37, 29), (16, 16)),       # overlapping windows
  ((3, 9, 29), (16, 16)),        # padded along one axis, cut along the other
  ((11, 21, 18), (8, 8, 16)),    # 3-D
  ((5, 21, 10), (8, 8, 16)),     # 3-D, shorter than the window
])
@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.6])
def test_a_pointwise_network_gives_what_it_gives_on_the_whole(shape, size, overlap):
  source = volume(*shape)
  image = run(pointwise, source, size, overlap=overlap)
  assert image.shape == source.shape and image.dtype == np.float32
  np.testing.assert_allclose(image, np.sin(3 * source), atol=1e-6)


def test_windows_are_blended_without_a_step():
  """Windows that disagree (each its own constant) meet in a ramp, not in a seam."""
  seen = iter(range(100))
  def constant(state, batch, key):
    values = np.array([next(seen) for _ in batch["source"]], np.float32)
    return np.broadcast_to(values[:, None, None, None], batch["source"].shape)
  image = run(constant, volume(1, 8, 24), (8, 16), batch_size=1, overlap=0.5)[0, 0, :, 0]
  assert image[0] == 0 and image[-1] == 1
  assert (np.diff(image) >= 0).all() and np.diff(image).max() < 0.2


def test_context_brings_the_neighbouring_slices():
  source = volume(5, 8, 8)
  before = run(lambda s, b, k: b["source"][..., :1], source, (8, 8), context=1)
  after = run(lambda s, b, k: b["source"][..., 2:], source, (8, 8), context=1)
  np.testing.assert_array_equal(before, source[[0, 0, 1, 2, 3]])
  np.testing.assert_array_equal(after, source[[1, 2, 3, 4, 4]])


@pytest.mark.parametrize("size", [(8, 8), (4, 8, 8)])
def test_batch_size_does_not_matter(size):
  """Random numbers go by the slice, so that each batch size gives the same image."""
  source = volume(7, 13, 9)
  def noisy(state, batch, key):
    keys = [jax.random.fold_in(key, int(k)) for k in batch["slice"]]
    noise = [jax.random.normal(k, size + (1,)) for k in keys]
    return np.asarray(batch["source"] + np.stack(noise))
  images = [run(noisy, source, size, batch_size=n) for n in (1, 3, 64)]
  np.testing.assert_array_equal(images[0], images[1])
  np.testing.assert_array_equal(images[0], images[2])


def test_what_a_batch_holds():
  """The last batch is filled up with weight 0; the target is there only where it is given."""
  batches, done = [], []
  def keep(state, batch, key):
    batches.append(batch)
    return batch["source"]
  source = volume(5, 8, 8)
  run(keep, source, (8, 8), batch_size=4, progress=done.append)
  assert [b["weight"].tolist() for b in batches] == [[1, 1, 1, 1], [1, 0, 0, 0]]
  assert [b["slice"].tolist() for b in batches] == [[0, 1, 2, 3], [4, 4, 4, 4]]
  assert all("target" not in b for b in batches) and done == [4, 1]
  assert batches[0]["source_modality"].tolist() == [0] * 4
  assert batches[0]["target_modality"].tolist() == [1] * 4
  assert batches[0]["sample"].tolist() == [0] * 4 and batches[0]["sample"].dtype == np.int32
  run(keep, source, (8, 8), sample=5)
  assert batches[-1]["sample"].tolist() == [5] * 4
  image = run(lambda s, b, k: b["target"], source, (8, 8), target=volume(5, 8, 8, seed=1))
  np.testing.assert_array_equal(image, volume(5, 8, 8, seed=1))


def test_some_slices_only():
  source = volume(6, 8, 8)
  image = run(pointwise, source, (8, 8), numbers=np.array([1, 4]))
  np.testing.assert_allclose(image[[1, 4]], np.sin(3 * source[[1, 4]]), atol=1e-6)
  assert (image[[0, 2, 3, 5]] == BACKGROUND).all()


def test_no_slice_gives_background():
  image = run(pointwise, volume(6, 8, 8), (8, 8), numbers=np.array([], int))
  assert image.shape == (6, 8, 8, 1) and (image == BACKGROUND).all()


@pytest.mark.parametrize("size", [(16, 16), (4, 16, 16)])
def test_channels_are_blended_each_as_it_is(size):
  """A colour image of three channels passes through overlapping windows."""
  source = volume(9, 37, 29)
  scale = np.array([1.0, -0.5, 0.25], np.float32)
  image = run(lambda s, b, k: b["source"] * scale, source, size)
  assert image.shape == (9, 37, 29, 3)
  np.testing.assert_allclose(image, source * scale, atol=1e-6)
