"""Perceptual distance: a slow reference, files refused, gradients. No real weights are needed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.signal import correlate2d

from medsynth_jax.errors import UserError
from medsynth_jax.nets import perceptual

WIDTHS = (4, 4, 8, 8, 6)  # of the five blocks; VGG16 has 64, 128, 256, 512, 512


@pytest.fixture(scope="module")
def weights():
  rng, result, inputs, layers = np.random.default_rng(0), {}, 3, iter(perceptual.LAYERS)
  for width, count in zip(WIDTHS, perceptual.BLOCKS, strict=True):
    for _ in range(count):
      layer = next(layers)
      scale = np.sqrt(2 / (9 * inputs))
      result[f"{layer}/kernel"] = scale * rng.normal(size=(3, 3, inputs, width))
      result[f"{layer}/bias"] = 0.1 * rng.normal(size=width)
      inputs = width
  return {key: value.astype(np.float32) for key, value in result.items()}


@pytest.fixture(scope="module")
def heads():
  rng = np.random.default_rng(1)
  return {f"lin{i}": rng.uniform(size=n).astype(np.float32) for i, n in enumerate(WIDTHS)}


@pytest.fixture(scope="module")
def images():
  rng = np.random.default_rng(2)
  return [rng.uniform(-1, 1, (2, 17, 22, 1)).astype(np.float32) for _ in range(2)]


distance = jax.jit(perceptual.perceptual_distance)


def reference(weights, a, b):
  """One example, the definition written out."""
  def maps(image):
    colour = np.repeat((image + 1) / 2, 3, -1)
    x = (colour - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    for block, count in enumerate(perceptual.BLOCKS, 1):
      if block > 1:
        h, w = (n // 2 for n in x.shape[:2])
        x = x[:2 * h, :2 * w].reshape(h, 2, w, 2, -1).max((1, 3))
      for index in range(1, count + 1):
        kernel = weights[f"conv{block}_{index}/kernel"]
        y = [sum(correlate2d(x[..., i], kernel[..., i, o], "same") for i in range(x.shape[-1]))
             for o in range(kernel.shape[-1])]
        x = np.maximum(np.stack(y, -1) + weights[f"conv{block}_{index}/bias"], 0)
      yield x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-9)

  pairs = zip(maps(a.astype(np.float64)), maps(b.astype(np.float64)), strict=True)
  return sum(((x - y) ** 2 * weights.get(f"lin{i}", 1)).sum(-1).mean()
             for i, (x, y) in enumerate(pairs))


def test_it_is_the_definition(weights, heads, images):
  for used in (weights, weights | heads):
    wanted = [reference(used, a, b) for a, b in zip(*images, strict=True)]
    got = distance(used, *images)
    assert got.shape == (2,) and got.dtype == jnp.float32 and min(wanted) > 1e-3
    np.testing.assert_allclose(got, wanted, rtol=1e-4)


def test_identity_colour_and_gradient(weights, images):
  a, b = images
  assert distance(weights, a, a).max() < 1e-12
  colour = distance(weights, *(np.repeat(x, 3, -1) for x in images))
  np.testing.assert_allclose(colour, distance(weights, a, b), rtol=1e-5)
  slope = jax.jit(jax.grad(lambda a, w: perceptual.perceptual_distance(w, a, b).sum()))
  assert (np.abs(slope(a, weights)) > 0).mean() > 0.9
  # Where every feature is dead the distance is flat, not undefined.
  dead = {key: np.minimum(value, 0) - 1 if key.endswith("bias") else 0 * value
          for key, value in weights.items()}
  np.testing.assert_array_equal(slope(a, dead), 0)


def test_files(weights, heads, tmp_path):
  path = tmp_path / "vgg.npz"
  np.savez(path, **weights, **{"fc6/kernel": np.zeros(3)})
  assert set(perceptual.load_weights(path)) == set(weights)
  np.savez(path, **{key: value.astype(np.float64) for key, value in (weights | heads).items()})
  loaded = perceptual.load_weights(path)
  assert set(loaded) == set(weights | heads)
  for key, value in (weights | heads).items():
    assert loaded[key].dtype == np.float32
    np.testing.assert_array_equal(loaded[key], value)


def test_files_refused(weights, heads, tmp_path):
  path = tmp_path / "vgg.npz"

  def refused(match, **changed):
    arrays = weights | changed
    np.savez(path, **{key: value for key, value in arrays.items() if value is not None})
    with pytest.raises(UserError, match=match):
      perceptual.load_weights(path)

  refused("no array 'conv3_2/bias'.*1 of 26", **{"conv3_2/bias": None})
  refused("no array 'lin1'.*4 of 31", lin0=heads["lin0"])
  refused("conv2_1/kernel has the shape .3, 3, 5, 4., but .3, 3, 4, 4.",
          **{"conv2_1/kernel": np.zeros((3, 3, 5, 4))})
  refused("conv1_1/bias has", **{"conv1_1/bias": np.zeros((1, 4))})
  refused("lin0 has", **heads | {"lin0": np.zeros((1, 4))})
  refused("plain arrays", **{"conv1_1/bias": np.array([None] * 4)})
  with pytest.raises(UserError, match="no such file"):
    perceptual.load_weights(tmp_path / "absent.npz")
  np.save(tmp_path / "one.npy", np.zeros(3))
  (tmp_path / "empty.npz").touch()
  (tmp_path / "text.npz").write_text("weights")
  for name in ("one.npy", "empty.npz", "text.npz", "."):
    with pytest.raises(UserError, match="not an .npz file"):
      perceptual.load_weights(tmp_path / name)


@pytest.mark.parametrize("a, b, wanted", [
  ((1, 16, 16, 1), (1, 16, 16, 3), "same shape"), ((1, 16, 16, 2), (1, 16, 16, 2), "1 or 3"),
  ((1, 8, 16, 16, 1), (1, 8, 16, 16, 1), "1 or 3"), ((1, 12, 16, 1), (1, 12, 16, 1), "below 16"),
])
def test_images_refused(weights, a, b, wanted):
  with pytest.raises(UserError, match=wanted):
    perceptual.perceptual_distance(weights, jnp.zeros(a), jnp.zeros(b))
