"""Parameter counts of the papers, shapes, sizes refused, dropout, computing type, patch size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medsynth_jax.errors import UserError
from medsynth_jax.nets.conv import cure_setting
from medsynth_jax.nets.layers import InstanceNorm, activation, max_pool, norm_layer, upsample
from medsynth_jax.nets.patchgan import PatchGAN, SpineDiscriminator
from medsynth_jax.nets.resnet_generator import ResNetGenerator
from medsynth_jax.nets.unet import AttentionUNet, UNet
from medsynth_jax.nets.unet_generator import UNetGenerator, depth_for, factor

SMALL = {
  "unet_generator": UNetGenerator(base=4, max_multiple=1, depth=4),
  "resnet_generator": ResNetGenerator(base=4, blocks=1, dropout=0.5),
  "unet": UNet(channels=(4, 8), dropout=0.5),
  "att_unet": AttentionUNet(channels=(4, 8), dropout=0.5),
}


def shapes(net, *shape):
  """Output and parameters as shapes; nothing is computed."""
  x = jax.ShapeDtypeStruct(shape, jnp.float32)
  return jax.eval_shape(net.init_with_output, jax.random.key(0), x)


def count(net, *shape):
  _, variables = shapes(net, *shape)
  assert set(variables) == {"params"}  # nothing else is kept between batches
  return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(variables))


def filled(net, *shape):
  """Parameters drawn with NumPy: the real initialisers cost seconds of compilation."""
  rng = np.random.default_rng(0)
  _, variables = shapes(net, *shape)
  return jax.tree.map(lambda s: jnp.asarray(0.2 * rng.normal(size=s.shape), jnp.float32), variables)


@pytest.mark.parametrize("net, channels, parameters, out", [
  (UNetGenerator(1), 1, 54_407_809, (256, 256, 1)),
  (UNetGenerator(3), 1, 54_411_907, (256, 256, 3)),
  (UNetGenerator(3), 3, 54_413_955, (256, 256, 3)),
  (PatchGAN(), 2, 2_764_609, (30, 30, 1)),
  (PatchGAN(), 4, 2_766_657, (30, 30, 1)),
  (PatchGAN(norm="instance"), 1, 2_762_689, (30, 30, 1)),
  (PatchGAN(norm="instance"), 2, 2_763_713, (30, 30, 1)),
  (SpineDiscriminator(), 2, 7_027_073, (8, 8, 1)),
  (ResNetGenerator(), 1, 11_365_633, (256, 256, 1)),
  (ResNetGenerator(norm="affine_instance"), 1, 11_376_129, (256, 256, 1)),
  (ResNetGenerator(padding="zero"), 1, 11_365_633, (256, 256, 1)),
  (UNet(), 1, 31_036_481, (256, 256, 1)),
  (AttentionUNet(), 1, 31_387_045, (256, 256, 1)),
])
def test_parameters_and_shapes_of_the_papers(net, channels, parameters, out):
  assert count(net, 1, 256, 256, channels) == parameters
  assert shapes(net, 1, 256, 256, channels)[0].shape == (1, *out)


@pytest.mark.parametrize("net, out", [
  (UNetGenerator(2), (2, 32, 64, 96, 2)), (ResNetGenerator(2), (2, 32, 64, 96, 2)),
  (UNet(2), (2, 32, 64, 96, 2)), (AttentionUNet(2), (2, 32, 64, 96, 2)),
  (PatchGAN(), (2, 2, 6, 10, 1)), (SpineDiscriminator(), (2, 1, 2, 3, 1)),
])
def test_volumes(net, out):
  y, variables = shapes(net, 2, 32, 64, 96, 3)
  assert y.shape == out
  kernels = [leaf for leaf in jax.tree.leaves(variables) if leaf.ndim > 1]
  assert {leaf.ndim for leaf in kernels} == {5}


@pytest.mark.parametrize("name", SMALL)
def test_generators_dropout_type_and_range(name):
  """One small network each: dropout is random with a key, absent without; bfloat16 stays inside."""
  net = SMALL[name]
  variables = filled(net, 2, 16, 16, 1)
  x = jnp.asarray(np.random.default_rng(1).uniform(-1, 1, (2, 16, 16, 1)), jnp.float32)
  run = jax.jit(lambda key: net.apply(variables, x, deterministic=False, rngs={"dropout": key}))
  keys = [jax.random.key(seed) for seed in (0, 1)]
  first, second = run(keys[0]), run(keys[1])
  np.testing.assert_array_equal(first, run(keys[0]))
  assert np.abs(first - second).max() > 1e-3
  assert np.abs(first[0] - first[1]).max() > 1e-3

  still = jax.jit(lambda: net.apply(variables, x))()
  assert np.abs(still - first).max() > 1e-3 and np.isfinite(still).all()
  if "generator" in name:
    assert np.abs(still).max() <= 1

  coarse = net.clone(dtype=jnp.bfloat16)
  half = jax.jit(lambda: coarse.apply(variables, x))()
  assert still.dtype == half.dtype == jnp.float32
  assert 0 < np.abs(half - still).max() < 0.1 * max(1, np.abs(still).max())
  assert {leaf.dtype for leaf in jax.tree.leaves(shapes(coarse, 2, 16, 16, 1)[1])} == {
    jnp.dtype("float32")
  }


def test_a_residual_generator_starts_as_its_source_and_learns_the_change():
  net = ResNetGenerator(base=4, blocks=1, residual=True)
  x = jnp.asarray(np.random.default_rng(1).uniform(-1, 1, (2, 16, 16, 1)), jnp.float32)
  made, variables = jax.jit(net.init_with_output)(jax.random.key(0), x)
  assert 0 < np.abs(made - x).max() < 1e-3
  target = jnp.clip(x + 0.3, -1, 1)
  changed = jax.jit(jax.grad(lambda v: jnp.abs(net.apply(v, x) - target).mean()))(variables)
  assert np.abs(changed["params"]["head"]["kernel"]).max() > 0
  assert np.abs(jax.jit(net.apply)(filled(net, 2, 16, 16, 1), x)).max() <= 1
  with pytest.raises(UserError, match="residual=True.* 3 channels.* 1: set residual=False"):
    shapes(net, 1, 16, 16, 3)


def test_a_network_trains_the_same_with_and_without_the_cure():
  """Every leaf of a small volume network has the gradient of the plain convolutions."""
  net = UNet(channels=(8, 16))
  variables = filled(net, 1, 4, 4, 4, 1)
  x = jnp.asarray(np.random.default_rng(1).uniform(-1, 1, (1, 4, 4, 4, 1)), jnp.float32)
  gradients = []
  for setting in ("on", "off"):
    with cure_setting(setting):
      gradients.append(jax.jit(jax.grad(lambda v: jnp.abs(net.apply(v, x) - x).mean()))(variables))
  for ours, plain in zip(*map(jax.tree.leaves, gradients), strict=True):
    np.testing.assert_allclose(ours, plain, rtol=1e-3, atol=1e-5)
    assert np.abs(plain).max() > 0


def test_dropout_blocks_are_three_at_most_and_never_the_innermost():
  """Counted in the traced network; depth - 5 blocks of full width, as in the reference code."""
  for depth, multiple, blocks in ((8, 8, 3), (7, 8, 2), (6, 8, 1), (5, 8, 0), (7, 1, 3)):
    net = UNetGenerator(base=1, depth=depth, max_multiple=multiple)
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    x = jax.ShapeDtypeStruct((1, 2**depth, 2**depth, 1), jnp.float32)
    traced = jax.make_jaxpr(lambda x, n=net, k=keys: n.apply(
      n.init(k, x), x, deterministic=False, rngs=k))(x)
    dropped = str(traced).count("name=_bernoulli")
    assert dropped == blocks, (depth, dropped)


def test_depth_follows_the_size():
  assert [depth_for((n, 256)) for n in (256, 512, 96, 8)] == [8, 8, 5, 3]
  assert depth_for((64, 64), max_depth=4) == 4 and factor(4) == 16
  assert UNetGenerator(depth=6).factor == 64 and UNetGenerator().factor == 8
  for space in ((100, 256), (255, 255), (4, 64)):
    with pytest.raises(UserError, match="multiple of 8"):
      depth_for(space)
  with pytest.raises(UserError, match="max_depth=2"):
    depth_for((64, 64), max_depth=2)


@pytest.mark.parametrize("net, size, wanted", [
  (UNetGenerator(depth=5), 48, "multiple of 32"),
  (UNetGenerator(), 36, "multiple of 8"),
  (ResNetGenerator(), 30, "multiple of 4"),
  (UNet(), 40, "multiple of 16"),
  (PatchGAN(), 16, "24 or more"),
  (UNet(), 16, "one position"),
  (SpineDiscriminator(), 32, "one position"),
])
def test_sizes_that_do_not_fit_are_refused(net, size, wanted):
  with pytest.raises(UserError, match=wanted):
    shapes(net, 1, size, size, 1)


@pytest.mark.parametrize("net, size", [
  (PatchGAN(base=1, n_layers=1, norm="none"), 40),
  (PatchGAN(base=1, norm="none"), 96),
])
def test_one_patch_value_depends_on_the_receptive_field(net, size):
  assert PatchGAN().receptive_field == 70 and SpineDiscriminator().receptive_field == 193
  variables = jax.tree.map(jnp.abs, filled(net, 1, size, size, 1))

  def value(x):
    y = net.apply(variables, x)
    return y[0, y.shape[1] // 2, y.shape[2] // 2, 0]

  seen = np.asarray(jax.jit(jax.grad(value))(jnp.ones((1, size, size, 1))))[0, :, :, 0] > 0
  assert seen.any(0).sum() == seen.any(1).sum() == net.receptive_field
  assert seen.sum() == net.receptive_field**2


def test_instance_norm():
  x = jnp.asarray(np.random.default_rng(0).normal(5, 3, (2, 8, 8, 3)), jnp.float32)
  y = InstanceNorm(affine=False).apply({}, x)
  np.testing.assert_allclose(y.mean((1, 2)), 0, atol=1e-5)
  np.testing.assert_allclose(y.std((1, 2)), 1, atol=1e-4)
  np.testing.assert_allclose(y[:1], InstanceNorm(affine=False).apply({}, x[:1]), atol=1e-6)
  drawn = norm_layer("affine_instance", "normal_0.02", jnp.float32).init(jax.random.key(0), x)
  scale = np.asarray(drawn["params"]["scale"])
  assert 0 < np.abs(scale - 1).max() < 0.1
  plain = norm_layer("affine_instance", "kaiming", jnp.float32).init(jax.random.key(0), x)
  np.testing.assert_array_equal(plain["params"]["scale"], 1)
  with pytest.raises(UserError, match="norm"):
    norm_layer("batch", "kaiming", jnp.float32)


def test_pooling_and_upsampling_follow_the_rank():
  for rank in (2, 3):
    x = jnp.arange(4.0**rank).reshape(1, *(4,) * rank, 1)
    small = max_pool(x)
    assert small.shape == (1, *(2,) * rank, 1) and small.max() == x.max()
    assert upsample(small).shape == x.shape
    np.testing.assert_array_equal(max_pool(upsample(small)), small)
  np.testing.assert_array_equal(max_pool(jnp.arange(16.0).reshape(1, 4, 4, 1)).ravel(),
                                [5, 7, 13, 15])


def test_activations_by_name():
  x = jnp.array([-1.0, 2.0])
  np.testing.assert_allclose(activation("leaky_relu_0.2")(x), [-0.2, 2.0])
  np.testing.assert_allclose(activation("none")(x), x)
  for name in ("gelu", "leaky_relu_x"):
    with pytest.raises(UserError, match="activation"):
      activation(name)
