"""Diffusion U-Net and KL autoencoder: counts of the papers, blocks, levels, codes, remat, types."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medsynth_jax.diffusion import schedules
from medsynth_jax.errors import UserError
from medsynth_jax.nets import registry
from medsynth_jax.nets.autoencoder_kl import AutoencoderKL
from medsynth_jax.nets.blocks import Attention, GroupNorm, ResidualBlock, attend, shrink
from medsynth_jax.nets.conv import enlarge
from medsynth_jax.nets.diffusion_unet import DiffusionUNet, level_time, sinusoids

UNET = DiffusionUNet(base=4, multiples=(1, 2), blocks=1, attention=(2,), heads=2, groups=2,
                     classes=3, dropout=0.5)
AUTOENCODER = AutoencoderKL(channels=(4, 8), blocks=1, attention=True, groups=2)
FLAT = UNET.clone(multiples=(1,), attention=())  # for what needs gradients: they compile for long
# Half the time to compile, and these networks are run once.
jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0,
                                         "xla_llvm_disable_expensive_passes": True})
MONAI = {"resampling": "conv", "scale_shift": False, "classes": 3, "attention": (2, 4)}


def spec(*shape, dtype=jnp.float32):
  return jax.ShapeDtypeStruct(shape, dtype)


def array(seed, *shape):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def inputs(net, *shape):
  """Shapes of the arguments for an image of `shape`."""
  if isinstance(net, AutoencoderKL):
    return (spec(*shape),)
  code = (spec(shape[0], dtype=jnp.int32),) if net.classes else ()
  return (spec(*shape), spec(shape[0]), *code)


def shapes(net, *shape):
  """Output and parameters as shapes; nothing is computed."""
  return jax.eval_shape(net.init_with_output, jax.random.key(0), *inputs(net, *shape))


def filled(module, *arguments, sd=0.2):
  """Parameters drawn with NumPy: the real initialisers cost seconds of compilation."""
  variables = jax.eval_shape(module.init, jax.random.key(0), *arguments)
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda s: jnp.asarray(sd * rng.normal(size=s.shape), jnp.float32), variables)


def example(net, rank=2):
  """Parameters and arguments of two different examples."""
  space = (8, 4, 4)[:rank]
  if isinstance(net, AutoencoderKL):
    values = (array(1, 2, *space, 1),)
  else:
    values = (array(1, 2, *space, 2), jnp.array([-2.0, 3.0]), jnp.array([0, 2]))
  return filled(net, *values), values


# -- layouts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("net, channels, parameters", [
  (DiffusionUNet(), 2, 62_637_889),
  (DiffusionUNet(3), 7, 62_641_923),
  (DiffusionUNet(3, 128, (1, 2, 4), **MONAI), 6, 64_148_611),
  (DiffusionUNet(3, 256, (1, 2, 3), **MONAI), 6, 171_264_771),
  (AutoencoderKL(), 1, 7_040_232),
  (AutoencoderKL((128, 256, 512), attention=True), 1, 49_095_080),
  (AutoencoderKL((128, 256, 512, 512), latent_channels=4, attention=True), 1, 72_710_593),
])
def test_parameters_of_the_papers(net, channels, parameters):
  y, variables = shapes(net, 2, 64, 32, channels)
  assert set(variables) == {"params"}
  assert sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(variables)) == parameters
  assert y.shape == (2, 64, 32, getattr(net, "out_channels", 1))
  if isinstance(net, AutoencoderKL):
    moments = jax.eval_shape(lambda v, x: net.apply(v, x, method="encode"), variables,
                             spec(2, 64, 32, 1))
    latents = (2, 64 // net.factor, 32 // net.factor, net.latent_channels)
    assert [m.shape for m in moments] == [latents] * 2


def test_attention_stands_where_the_field_says():
  """Palette's own [8, 16] gives six blocks, its [16] only the one in the middle."""
  for attention, levels, blocks in (((), [], 1), ((8,), [3], 6), ((2, 8), [1, 3], 11)):
    _, variables = shapes(DiffusionUNet(base=8, attention=attention), 1, 16, 16, 2)
    names = [name for name in variables["params"] if name.endswith("attention")]
    assert len(names) == blocks and "middle_attention" in names
    found = {int(name.split("_")[1]) for name in names if name != "middle_attention"}
    assert sorted(found) == levels


@pytest.mark.parametrize("net", [UNET, UNET.clone(resampling="conv"), AUTOENCODER])
def test_volumes(net):
  """Rank 3: only 5-D kernels, any multiple of the factor, finite numbers."""
  y, variables = shapes(net, 2, 6, 10, 4, 1)
  assert y.shape == (2, 6, 10, 4, 1)
  kernels = [leaf for leaf in jax.tree.leaves(variables) if leaf.ndim > 2]
  assert kernels and {leaf.ndim for leaf in kernels} == {5}
  variables, values = example(net, rank=3)
  out = jit(net.apply)(variables, *values)
  assert out.shape == (2, 8, 4, 4, 1) and np.isfinite(out).all() and np.ptp(out) > 1e-3


# -- blocks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels, wanted, groups", [(8, 4, 4), (8, 32, 8), (12, 8, 4)])
def test_group_norm(channels, wanted, groups):
  x = 3 * array(0, 2, 3, 4, 2, channels) + 50
  variables = filled(GroupNorm(wanted), x)
  peer = nn.GroupNorm(groups, epsilon=1e-5, use_fast_variance=False).apply(variables, x)
  y = GroupNorm(wanted).apply(variables, x)
  np.testing.assert_allclose(y, peer, atol=2e-5)
  scale, shift = array(1, 2, channels), array(2, 2, channels)
  each = (2, 1, 1, 1, channels)
  np.testing.assert_allclose(GroupNorm(wanted).apply(variables, x, scale, shift),
                             y * (1 + scale.reshape(each)) + shift.reshape(each), atol=2e-5)


def test_group_norm_counts_in_float32():
  """At a mean of 100, bfloat16 sums would lose the variance."""
  x = (100 + array(0, 2, 16, 16, 8)).astype(jnp.bfloat16)
  net = GroupNorm(2, dtype=jnp.bfloat16)
  y = net.apply(net.init(jax.random.key(0), x), x)
  assert y.dtype == jnp.bfloat16
  y = y.astype(jnp.float32).reshape(2, 256, 2, 4)
  np.testing.assert_allclose(y.mean((1, 3)), 0, atol=0.01)
  np.testing.assert_allclose(y.std((1, 3)), 1, atol=0.01)


@pytest.mark.parametrize("space", [(4, 6), (4, 2, 6)])
def test_resampling(space):
  x = array(0, 2, *space, 3)
  double = (2, *(2 * n for n in space), 3)
  np.testing.assert_array_equal(enlarge(x), jax.image.resize(x, double, "nearest"))
  np.testing.assert_allclose(shrink(enlarge(x)), x, atol=1e-6)
  half = (2, *(n // 2 for n in space), 3)
  linear = jax.image.resize(x, half, "linear", antialias=False)  # at half size, the mean of blocks
  np.testing.assert_allclose(shrink(x), linear, atol=1e-6)


def test_attention_is_softmax_over_all_positions():
  x, net = array(0, 2, 3, 2, 8), Attention(heads=2, groups=4)
  variables = filled(net, x)
  p = jax.tree.map(np.asarray, variables["params"])
  y = np.asarray(GroupNorm(4).apply({"params": p["norm"]}, x)).reshape(2, 6, 8)
  q, k, v = np.split(y @ p["qkv"]["kernel"] + p["qkv"]["bias"], 3, -1)
  heads = []
  for part in (slice(0, 4), slice(4, 8)):
    logits = q[..., part] @ k[..., part].swapaxes(1, 2) / 2  # root of 4 channels a head
    weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    heads.append(weights @ v[..., part])
  out = np.concatenate(heads, -1) @ p["out"]["kernel"] + p["out"]["bias"]
  np.testing.assert_allclose(net.apply(variables, x), x + out.reshape(x.shape), atol=1e-5)


@pytest.mark.parametrize("dtype, error", [(jnp.float32, 1e-5), (jnp.bfloat16, 3e-2)])
def test_attention_by_every_kernel(dtype, error):
  """Values and gradients; cuDNN's is XLA's where there is no GPU."""
  q, k, v, g = (array(seed, 2, 6, 2, 8).astype(dtype) for seed in range(4))
  def pulled(kernel):
    y, pull = jax.vjp(lambda *qkv: attend(*qkv, kernel), q, k, v)
    return y, *pull(g)
  wanted = pulled("xla")
  for kernel in ("plain", *(("cudnn",) if dtype == jnp.bfloat16 else ())):
    for got, value in zip(pulled(kernel), wanted, strict=True):
      assert got.dtype == value.dtype == dtype
      np.testing.assert_allclose(got.astype(jnp.float32), value.astype(jnp.float32), atol=error)


@pytest.mark.parametrize("fields, message", [
  ({"attention_kernel": "flash"}, "choose one of xla, cudnn, plain"),
  ({"attention_kernel": "cudnn"}, "config.dtype=bfloat16"),
  ({"attention_kernel": "cudnn", "dtype": jnp.bfloat16}, "not [48]: set the network's heads")])
@pytest.mark.parametrize("net", [UNET, AUTOENCODER])
def test_a_kernel_that_cannot_do_it_is_refused(net, fields, message):
  many = {"base": 4, "heads": 2} if net is UNET else {"channels": (4, 4)}
  with pytest.raises(UserError, match=message):
    shapes(net.clone(**many, **fields), 1, 8, 8, 1)


@pytest.mark.parametrize("scale_shift", [True, False])
def test_residual_block_takes_the_embedding(scale_shift):
  block = ResidualBlock(6, groups=2, scale_shift=scale_shift)
  x, embedding = array(0, 2, 4, 4, 4), array(1, 2, 5)
  variables = filled(block, x, embedding)
  first, second = (block.apply(variables, x, e) for e in (embedding, embedding.at[1].add(1)))
  np.testing.assert_array_equal(first[0], second[0])
  assert np.abs(first[1] - second[1]).max() > 0.05


def test_what_starts_at_zero():
  """The U-Net's output and each block's last layer; an autoencoder must not start blank."""
  net = FLAT.clone(classes=0)
  x = array(0, 1, 4, 4, 2)
  key = jax.random.key(0, impl="rbg")  # compiles much faster
  drawn = jit(net.init)(key, x, jnp.zeros(1))
  np.testing.assert_array_equal(net.apply(drawn, x, jnp.zeros(1)), 0)
  params = drawn["params"]
  for block in (params["down_0_0"]["conv_1"], params["middle_attention"]["out"], params["head"]):
    assert not np.any(block["kernel"])
  assert np.any(params["down_0_0"]["conv_0"]["kernel"])
  small = AutoencoderKL(channels=(4,), blocks=1, groups=2)
  drawn = jit(small.init)(key, x[..., :1])
  assert np.ptp(small.apply(drawn, x[..., :1])) > 1e-3


# -- noise level and category --------------------------------------------------------------------


def test_neighbouring_levels_differ():
  """Palette's 2000 levels, which its own embedding (the share of signal, 0..1) hardly tells."""
  schedule = schedules.make("palette", 2000)
  level = jnp.asarray(schedule.log_snr, jnp.float32)

  def step(time):
    """Distances between the embeddings of neighbouring levels: the smallest and the median."""
    distance = np.linalg.norm(np.diff(sinusoids(time, 64), axis=0), axis=1)
    return distance.min(), np.median(distance)

  log_snr, gamma, raw = (step(level_time(level, "log_snr")), step(level_time(level, "gamma_1000")),
                         step(jax.nn.sigmoid(level)))
  assert log_snr[0] > 0.1 and log_snr[1] > 0.1
  assert gamma[0] > 1e-4 and gamma[1] > 0.1
  assert raw[0] < 1e-5 and raw[1] < 1e-3


def test_levels_are_cut_at_20():
  level = jnp.array([-jnp.inf, -20.0, 0.0, 20.0, jnp.inf])
  np.testing.assert_allclose(level_time(level, "log_snr"), [0, 0, 500, 1000, 1000])
  np.testing.assert_allclose(level_time(level, "gamma_1000"), [0, 2e-6, 500, 1000, 1000], atol=1e-5)
  variables, (x, _, code) = example(UNET)
  run = jit(UNET.apply)
  y = run(variables, x, jnp.array([-jnp.inf, jnp.inf]), code)
  assert np.isfinite(y).all()
  np.testing.assert_array_equal(y, run(variables, x, jnp.array([-20.0, 20.0]), code))


def test_level_and_category_change_their_own_example_only():
  variables, (x, level, code) = example(UNET)
  run = jit(UNET.apply)
  y = run(variables, x, level, code)
  for other in (run(variables, x, level.at[1].add(0.1), code),
                run(variables, x, level, code.at[1].set(1)),
                run(variables, x.at[1].add(0.1), level, code)):
    np.testing.assert_array_equal(other[0], y[0])
    assert np.abs(other[1] - y[1]).max() > 1e-4
  for wrong in (3, -1):  # neither clamped nor counted from the end
    y = run(variables, x, level, code.at[1].set(wrong))
    assert np.isfinite(y[0]).all() and np.isnan(y[1]).all()


# -- computing -----------------------------------------------------------------------------------


@pytest.mark.parametrize("net", [FLAT, AUTOENCODER.clone(channels=(4,))])
def test_remat_changes_memory_only(net):
  variables, values = example(net)
  again = net.clone(remat=True)
  assert jax.tree.structure(filled(again, *values)) == jax.tree.structure(variables)

  def loss(net):
    return lambda v: jnp.square(net.apply(v, *values) - values[0][..., :1]).mean()

  assert "remat" in str(jax.make_jaxpr(loss(again))(variables))
  assert "remat" not in str(jax.make_jaxpr(loss(net))(variables))
  (plain, slope), (value, gradient) = (
    jit(jax.value_and_grad(loss(n)))(variables) for n in (net, again))
  np.testing.assert_allclose(value, plain, rtol=1e-5)
  for got, wanted in zip(*map(jax.tree.leaves, (gradient, slope)), strict=True):
    np.testing.assert_allclose(got, wanted, rtol=1e-3, atol=1e-5)


def test_dropout_needs_a_key_and_training():
  variables, values = example(FLAT)
  run = jit(lambda key: FLAT.apply(variables, *values, deterministic=False, rngs={"dropout": key}))
  first, second = (run(jax.random.key(seed)) for seed in (0, 1))
  still = jit(FLAT.apply)(variables, *values)
  assert np.abs(first - second).max() > 1e-3 and np.abs(first - still).max() > 1e-3


@pytest.mark.parametrize("net", [UNET, AUTOENCODER])
def test_bfloat16_stays_inside(net):
  variables, values = example(net)
  full, half = (jit(n.apply)(variables, *values) for n in (net, net.clone(dtype=jnp.bfloat16)))
  assert full.dtype == half.dtype == jnp.float32
  assert 0 < np.abs(full - half).max() < 0.1 * np.abs(full).max()
  _, drawn = shapes(net.clone(dtype=jnp.bfloat16), 2, 8, 4, 1)
  assert {leaf.dtype for leaf in jax.tree.leaves(drawn)} == {jnp.dtype("float32")}


def test_posterior_and_its_clip():
  variables, (x,) = example(AUTOENCODER)
  apply = jit(lambda v, x, method: AUTOENCODER.apply(v, x, method=method),
                  static_argnames="method")
  mean, std = apply(variables, x, "encode")
  assert mean.dtype == std.dtype == jnp.float32 and np.all(std > 0) and np.ptp(mean) > 1e-3
  np.testing.assert_allclose(apply(variables, x, "__call__"), apply(variables, mean, "decode"),
                             rtol=1e-5, atol=1e-5)
  bias = variables["params"]["encoder"]["log_variance"]["bias"]
  for shift, wanted in ((jnp.array([1e3, -1e3, 0.0]), (np.exp(10.0), np.exp(-15.0))),
                        (jnp.full(3, 2 * np.log(2)), 2 * std)):
    moved = jax.tree.map(lambda leaf, s=shift: leaf + s if leaf is bias else leaf, variables)
    got = apply(moved, x, "encode")[1]
    if np.ndim(wanted) == 1:
      np.testing.assert_allclose(got[..., 0], wanted[0], rtol=1e-5)
      np.testing.assert_allclose(got[..., 1], wanted[1], rtol=1e-5)
    else:
      np.testing.assert_allclose(got, wanted, rtol=1e-4)


# -- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize("net, size, wanted", [
  (DiffusionUNet(base=8), 12, "multiple of 8"), (AutoencoderKL((4, 8)), 5, "multiple of 2"),
  (DiffusionUNet(base=8, attention=(16,)), 16, r"\(16,\).*no level.*\[1, 2, 4, 8\]"),
  (DiffusionUNet(base=8, resampling="pool"), 16, "resampling='pool'"),
  (DiffusionUNet(base=8, embedding="gamma"), 16, "embedding='gamma'"),
  (DiffusionUNet(base=8, multiples=(1,), heads=3), 16, "heads=3 .* 8 channels"),
  (DiffusionUNet(base=8, multiples=(1, 2)), 2, "one position.*fewer groups"),
])
def test_fields_and_sizes_refused(net, size, wanted):
  with pytest.raises(UserError, match=wanted):
    shapes(net, 1, size, size, 1)


def test_categories_and_classes_go_together():
  x, level = spec(1, 8, 8, 1), spec(1)
  key, code = jax.random.key(0), jax.ShapeDtypeStruct((1,), jnp.int32)
  with pytest.raises(UserError, match="3 classes and needs a category"):
    jax.eval_shape(UNET.init, key, x, level)
  with pytest.raises(UserError, match="classes=0"):
    jax.eval_shape(UNET.clone(classes=0).init, key, x, level, code)


def test_registry_makes_them_from_a_config():
  net = registry.make({"name": "diffusion_unet", "base": 4, "multiples": [1, 2], "attention": [2]},
                      "bfloat16")
  assert isinstance(net, DiffusionUNet) and net.dtype == jnp.bfloat16 and net.factor == 2
  net = registry.make({"name": "autoencoder_kl", "channels": [4, 8, 8]}, "float32")
  assert isinstance(net, AutoencoderKL) and net.factor == 4
  for net_fields in ({"name": "diffusion_unet", "levels": 3}, {"name": "autoencoder_kl", "z": 3}):
    with pytest.raises(UserError, match=net_fields["name"]):
      registry.make(net_fields, "float32")
