"""StarGAN, registration by a flow, pooled and multi-scale discriminators: counts and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from medsynth_jax.errors import UserError
from medsynth_jax.nets import registry, warp
from medsynth_jax.nets.conv import cure_setting
from medsynth_jax.nets.patchgan import MultiScalePatchGAN, PatchGAN, over_scales
from medsynth_jax.nets.registration import RegistrationResUNet
from medsynth_jax.nets.stargan import StarGANDiscriminator, StarGANGenerator

pytestmark = pytest.mark.usefixtures("unoptimised")

SMALL_FLOW = RegistrationResUNet(channels=(4, 6), blocks=1)


def shapes(net, *shape):
  """Output and parameters as shapes; nothing is computed."""
  x = jax.ShapeDtypeStruct(shape, jnp.float32)
  labels = (jax.ShapeDtypeStruct(shape[:1], jnp.int32),) * isinstance(net, StarGANGenerator)
  return jax.eval_shape(net.init_with_output, jax.random.key(0), x, *labels)


def filled(net, *shape):
  rng = np.random.default_rng(0)
  _, variables = shapes(net, *shape)
  return jax.tree.map(lambda s: jnp.asarray(0.2 * rng.normal(size=s.shape), jnp.float32), variables)


def normal(seed, *shape):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.mark.parametrize("net, space, channels, parameters, out", [
  (StarGANGenerator(), (256, 256), 1, 8_414_848, (256, 256, 1)),
  (StarGANDiscriminator(), (128, 128), 1, 44_751_808, ((2, 2, 1), (4,))),
  (StarGANDiscriminator(), (240, 240), 1, 44_792_768, ((3, 3, 1), (4,))),
  (StarGANDiscriminator(), (256, 256), 1, 44_850_112, ((4, 4, 1), (4,))),
  (RegistrationResUNet(), (256, 256), 2, 2_058_018, (256, 256, 2)),
  (PatchGAN(norm="instance", pooled=True), (256, 256), 1, 2_762_689, (1, 1, 1)),
  (PatchGAN(norm="instance", pooled=True), (256, 256), 2, 2_763_713, (1, 1, 1)),
  (MultiScalePatchGAN(), (256, 256), 1, 2 * 2_762_689, ((30, 30, 1), (14, 14, 1))),
])
def test_parameters_and_shapes_of_the_papers(net, space, channels, parameters, out):
  y, variables = shapes(net, 1, *space, channels)
  assert set(variables) == {"params"}
  assert sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(variables)) == parameters
  assert jax.tree.map(lambda s: s.shape[1:], y) == out


@pytest.mark.parametrize("name, fields, out", [
  ("stargan_generator", {"base": 2, "blocks": 1, "out_channels": 3}, (2, 16, 24, 32, 3)),
  ("stargan_generator", {"base": 2, "blocks": 1, "upsampling": "resize"}, (2, 16, 24, 32, 1)),
  ("stargan_discriminator", {"base": 2, "layers": 3, "labels": 5}, ((2, 2, 3, 4, 1), (2, 5))),
  ("registration_resunet", {"channels": (2, 4)}, (2, 16, 24, 32, 3)),
  ("patchgan", {"base": 2, "n_layers": 1, "pooled": True}, (2, 1, 1, 1, 1)),
  ("multiscale_patchgan", {"base": 2, "n_layers": 1}, ((2, 6, 10, 14, 1), (2, 2, 4, 6, 1))),
])
def test_volumes_by_the_registry(name, fields, out):
  net = registry.make({"name": name, **fields}, "bfloat16")
  y, variables = shapes(net, 2, 16, 24, 32, 2)
  assert jax.tree.map(lambda s: s.shape, y) == out
  assert {leaf.dtype for leaf in jax.tree.leaves((y, variables))} == {jnp.dtype("float32")}


@pytest.mark.parametrize("upsampling", ["transposed", "resize"])
def test_the_label_changes_the_image(upsampling):
  net = StarGANGenerator(base=4, blocks=1, upsampling=upsampling)
  variables, x = filled(net, 2, 8, 8, 1), jnp.tile(normal(1, 1, 8, 8, 1), (2, 1, 1, 1))
  run = jax.jit(lambda net, label: net.apply(variables, x, label), static_argnums=0)
  image = run(net, jnp.array([0, 3]))
  assert image.dtype == jnp.float32 and np.abs(image).max() <= 1
  assert np.abs(image[0] - image[1]).max() > 1e-2
  np.testing.assert_array_equal(image, run(net, jnp.array([0, 3])))
  np.testing.assert_allclose(image[0], run(net, jnp.array([3, 0]))[1], atol=1e-5)
  half = run(net.clone(dtype=jnp.bfloat16), jnp.array([0, 3]))
  assert half.dtype == jnp.float32 and 0 < np.abs(half - image).max() < 0.2


def test_the_discriminator_computes_its_heads_in_float32():
  net = StarGANDiscriminator(base=2, layers=2, dtype=jnp.bfloat16)
  variables, x = filled(net, 2, 8, 8, 1), normal(1, 2, 8, 8, 1)
  patches, classes = jax.jit(net.apply)(variables, x)
  assert patches.dtype == classes.dtype == jnp.float32
  for values in (patches, classes):  # float32 has digits that bfloat16 lacks
    assert np.abs(values - values.astype(jnp.bfloat16)).max() > 0


def test_what_does_not_fit_is_refused():
  for net, size, wanted in (
    (StarGANGenerator(), 30, "multiple of 4"),
    (StarGANGenerator(upsampling="bicubic"), 32, "upsampling"),
    (StarGANDiscriminator(), 63, "64 or more"),
    (MultiScalePatchGAN(), 47, "48 or more"),
    (MultiScalePatchGAN(weights=(1.0, 1.0, 1.0)), 95, "96 or more"),
  ):
    with pytest.raises(UserError, match=wanted):
      shapes(net, 1, size, size, 1)
  label = jax.ShapeDtypeStruct((3,), jnp.int32)
  with pytest.raises(UserError, match="one for each image"):
    jax.eval_shape(StarGANGenerator().init, jax.random.key(0),
                   jax.ShapeDtypeStruct((2, 32, 32, 1), jnp.float32), label)


def test_pooled_logits_are_the_mean_of_the_map():
  net = PatchGAN(base=2, n_layers=1)
  variables, x = filled(net, 2, 8, 10, 1), normal(1, 2, 8, 10, 1)
  pooled = net.clone(pooled=True).apply(variables, x)
  np.testing.assert_allclose(pooled, net.apply(variables, x).mean((1, 2), keepdims=True), rtol=1e-5)


def test_scales_see_the_image_and_its_middle():
  net, part = MultiScalePatchGAN(base=2, n_layers=1), PatchGAN(2, 1, "instance")
  variables, x = filled(net, 1, 13, 15, 1), normal(1, 1, 13, 15, 1)
  logits = net.apply(variables, x)
  for scale, seen in enumerate((x, x[:, 3:9, 4:11])):
    params = {"params": variables["params"][f"scale_{scale}"]}
    np.testing.assert_allclose(logits[scale], part.apply(params, seen), atol=1e-6)
  np.testing.assert_allclose(over_scales(net, logits, jnp.mean),
                             1.8 * logits[0].mean() + 0.2 * logits[1].mean(), rtol=1e-6)
  np.testing.assert_array_equal(over_scales(part, logits[0], jnp.mean), logits[0].mean())
  full = net.clone(weights=(1.8,))
  np.testing.assert_array_equal(full.apply(variables, x)[0], logits[0])


@pytest.mark.parametrize("space", [(8, 8), (4, 6, 5)])
def test_gradient_penalty_has_the_gradient_of_finite_differences(space):
  """The gradient of a function of a gradient, through the rewritten and the plain convolutions."""
  net = StarGANDiscriminator(base=3, layers=2)
  variables, x = filled(net, 2, *space, 1), normal(1, 2, *space, 1)
  direction = jax.tree.map(lambda leaf: normal(leaf.size, *leaf.shape), variables)

  def penalty(variables):
    slope = jax.grad(lambda x: net.apply(variables, x)[0].sum())(x)
    return jnp.square(jnp.sqrt(jnp.square(slope).reshape(2, -1).sum(1)) - 1).sum()

  gradients = []
  for setting in ("on", "off"):
    with cure_setting(setting):
      gradients.append(jax.jit(jax.grad(penalty))(variables))
      value = jax.jit(lambda t: penalty(jax.tree.map(lambda v, d: v + t * d, variables, direction)))
      step = 1e-3
      wanted = (value(step) - value(-step)) / (2 * step)
  for gradient in gradients:
    got = sum(jnp.vdot(g, d) for g, d in zip(*map(jax.tree.leaves, (gradient, direction)),
                                             strict=True))
    np.testing.assert_allclose(got, wanted, rtol=1e-2)
  for ours, plain in zip(*map(jax.tree.leaves, gradients), strict=True):
    np.testing.assert_allclose(ours, plain, rtol=1e-4, atol=1e-5 * (1 + np.abs(plain).max()))
  assert np.abs(gradients[0]["params"]["conv_0"]["kernel"]).max() > 0
  assert np.abs(gradients[0]["params"]["class_head"]["kernel"]).max() == 0


@pytest.mark.parametrize("net, space", [
  (RegistrationResUNet(), (96, 128)), (RegistrationResUNet(), (512, 512)),
  (RegistrationResUNet(), (192, 300)), (RegistrationResUNet(channels=(32, 64, 64)), (32, 32)),
  (RegistrationResUNet(channels=(8, 16)), (5, 40, 33)),
])
def test_registration_takes_any_size(net, space):
  assert shapes(net, 1, *space, 2)[0].shape == (1, *space, len(space))


def test_registration_starts_as_the_identity():
  net, x = RegistrationResUNet(channels=(4,), blocks=0), normal(1, 2, 8, 6, 2)
  flow, variables = jax.jit(net.init_with_output)(jax.random.key(0), x)
  assert 0 < np.abs(flow).max() < 1e-3
  assert all(np.ptp(leaf) > 0 for leaf in jax.tree.leaves(variables) if leaf.ndim > 1)
  image = x[..., :1]
  np.testing.assert_allclose(warp.warp(image, flow), image, atol=1e-2)


def test_registration_pads_small_images_by_their_edge_and_crops():
  variables, x = filled(SMALL_FLOW, 1, 8, 8, 2), normal(1, 1, 5, 6, 2)
  run = jax.jit(SMALL_FLOW.apply)
  padded = jnp.pad(x, ((0, 0), (1, 2), (1, 1), (0, 0)), mode="edge")
  np.testing.assert_allclose(run(variables, x), run(variables, padded)[:, 1:6, 1:7], atol=1e-6)


def test_registration_learns_through_the_warp():
  """The gradient reaches every kernel; biases under instance norm have none."""
  variables, x = filled(SMALL_FLOW, 1, 11, 13, 2), normal(1, 1, 11, 13, 2)

  def loss(variables):
    return jnp.abs(warp.warp(x[..., :1], SMALL_FLOW.apply(variables, x)) - x[..., 1:]).mean()

  gradients = jax.jit(jax.grad(loss))(variables)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
  assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradients) if leaf.ndim > 1)


@pytest.mark.parametrize("space", [(9, 7), (5, 6, 4)])
def test_warp_reads_where_scipy_reads(space):
  image, flow = normal(1, 2, *space, 2), 3 * normal(2, 2, *space, len(space))
  moved = jax.jit(warp.warp)(image, flow)
  grid = np.moveaxis(np.indices(space), 0, -1)
  for index in range(2):
    where = np.moveaxis(grid + np.asarray(flow[index]), -1, 0)
    for channel in range(2):
      wanted = ndimage.map_coordinates(np.asarray(image[index, ..., channel]), where, order=1,
                                       mode="nearest")
      np.testing.assert_allclose(moved[index, ..., channel], wanted, atol=1e-5)


def test_warp_by_whole_pixels_reads_ahead_and_repeats_the_edge():
  image = normal(1, 1, 4, 5, 1)
  moved = warp.warp(image, jnp.broadcast_to(jnp.array([1.0, 0.0]), (1, 4, 5, 2)))
  np.testing.assert_array_equal(moved[:, :3], image[:, 1:])
  np.testing.assert_array_equal(moved[:, 3], image[:, 3])


@pytest.mark.parametrize("space", [(6, 5), (4, 3, 5)])
def test_gradients_of_the_warp_are_those_of_finite_differences(space):
  """Between whole pixels, where the derivative exists."""
  rng, shape = np.random.default_rng(0), (2, *space, len(space))
  flow = rng.integers(-2, 3, shape) + rng.uniform(0.2, 0.8, shape)
  arguments = (normal(1, 2, *space, 2), jnp.asarray(flow, jnp.float32))
  weight = normal(3, 2, *space, 2)

  def value(image, flow):
    return jnp.vdot(weight, warp.warp(image, flow))

  gradients, step = jax.jit(jax.grad(value, (0, 1)))(*arguments), 0.01
  for position, gradient in enumerate(gradients):
    direction = jnp.sign(normal(4, *gradient.shape))
    ends = []
    for sign in (step, -step):
      moved = list(arguments)
      moved[position] = moved[position] + sign * direction
      ends.append(value(*moved))
    wanted = (ends[0] - ends[1]) / (2 * step)
    np.testing.assert_allclose(jnp.vdot(gradient, direction), wanted, rtol=1e-2)


def test_smoothness_of_known_flows():
  rows, columns = jnp.meshgrid(jnp.arange(6.0), jnp.arange(4.0), indexing="ij")
  flow = jnp.stack([2 * rows + columns, 0 * rows], -1)[None]
  # Mean over both channels: 4 / 2 along the rows, 1 / 2 along the columns.
  np.testing.assert_allclose(warp.smoothness(flow), 2.5, rtol=1e-6)
  np.testing.assert_allclose(warp.smoothness(flow + 7), 2.5, rtol=1e-6)
  volume = jnp.broadcast_to(jnp.arange(5.0)[:, None, None, None], (1, 5, 3, 3, 3))
  np.testing.assert_allclose(warp.smoothness(volume), 1, rtol=1e-6)


@pytest.mark.parametrize("space", [(6, 4), (6, 4, 3)])
def test_folding_of_known_flows(space):
  rank = len(space)
  flow = jnp.zeros((1, *space, rank))
  assert warp.folding(flow) == 0
  assert warp.folding(flow + 3) == 0
  rows = jnp.broadcast_to(jnp.arange(6.0).reshape(6, *(1,) * (rank - 1)), space)
  # p + flow(p) runs backwards along the rows: twice as far as it came.
  np.testing.assert_allclose(warp.folding(flow.at[..., 0].set(-2 * rows)), 1)
  assert warp.folding(flow.at[..., 0].set(-0.9 * rows)) == 0
  # One row sent past the next: one of the five steps runs backwards.
  crossed = flow.at[:, 2, ..., 0].set(1.5)
  np.testing.assert_allclose(warp.folding(crossed), 1 / 5, rtol=1e-6)
  mask = jnp.zeros((1, *space, 1)).at[:, 2:4].set(1)
  np.testing.assert_allclose(warp.folding(crossed, mask), 1 / 2, rtol=1e-6)
  assert warp.folding(crossed, 0 * mask) == 0
  # Two mirrored axes are a rotation, not a fold.
  columns = jnp.broadcast_to(jnp.arange(4.0).reshape(4, *(1,) * (rank - 2)), space)
  assert warp.folding(jnp.stack([-2 * rows, -2 * columns, 0 * rows][:rank], -1)[None]) == 0
