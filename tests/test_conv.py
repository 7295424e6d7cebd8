"""The CPU's rewritten convolutions equal XLA's, and both follow PyTorch's geometry."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_train import toy_config

from medsynth_jax import run, train
from medsynth_jax.data.dataset import Store
from medsynth_jax.errors import UserError
from medsynth_jax.nets import conv_ops
from medsynth_jax.nets.conv import (
  Conv,
  ConvTranspose,
  cure_setting,
  cured,
  enlarge,
  kernel_init,
)

# kernel, stride, (low, high) padding, input and output channels; 24 -> 3 takes the few-channel path
CONVS = (
  (7, 1, (0, 0), 24, 3), (4, 1, (1, 1), 24, 3), (4, 1, (1, 2), 5, 6), (3, 1, (1, 1), 5, 6),
  (4, 2, (1, 1), 5, 6), (3, 2, (1, 1), 24, 3), (3, 2, (0, 1), 5, 6), (1, 1, (0, 0), 24, 3),
)
# kernel, stride, PyTorch's padding and output padding
TRANSPOSED = ((4, 2, 1, 0), (3, 2, 1, 1), (2, 2, 0, 0), (4, 1, 1, 0))


def array(seed, *shape):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def assert_same(operation, reference, x, kernel, *rest):
  """Value, input gradient and weight gradient within 1e-5 of the largest entry."""

  @jax.jit
  def both(x, kernel, g):
    results = []
    for function in (operation, reference):
      y, pull = jax.vjp(lambda x, w, f=function: f(x, w, *rest), x, kernel)
      results.append((y, *pull(g)))
    return results

  out = jax.eval_shape(lambda x, w: reference(x, w, *rest), x, kernel)
  for got, wanted in zip(*both(x, kernel, array(9, *out.shape)), strict=True):
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("k, stride, pad, inputs, outputs", CONVS)
def test_cured_conv_equals_plain(rank, k, stride, pad, inputs, outputs, monkeypatch):
  monkeypatch.setattr(conv_ops, "STRIP", 16)  # several strips, the last one shorter
  x = array(0, 2, *(12, 9, 5)[:rank], inputs)
  k = 3 if rank == 3 and k == 7 else k  # 7 depth taps, each compiled apart, take long
  kernel = array(1, *(k,) * rank, inputs, outputs)
  settings = (stride,) * rank, (pad,) * rank
  assert_same(conv_ops.cured_conv, conv_ops.plain_conv, x, kernel, *settings)


@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("k, stride, padding, extra", TRANSPOSED)
def test_cured_transposed_conv_equals_plain(rank, k, stride, padding, extra, monkeypatch):
  monkeypatch.setattr(conv_ops, "STRIP", 16)
  x = array(0, 2, *(5, 6, 7)[:rank], 5)
  kernel = array(1, *(k,) * rank, 3, 5)
  pads = ((k - 1 - padding, k - 1 - padding + extra),) * rank
  assert_same(conv_ops.cured_conv_transpose, conv_ops.plain_conv_transpose, x, kernel,
              (stride,) * rank, pads)


@pytest.mark.parametrize("rank, k, stride, pad", [
  (2, 4, 2, (1, 1)), (2, 3, 2, (0, 1)), (2, 3, 1, (1, 1)), (2, 3, 3, (0, 0)), (2, 2, 3, (1, 0)),
  (3, 4, 2, (1, 1))])
def test_small_maps_equal_plain(rank, k, stride, pad):
  x, kernel = array(0, 1, *(4, 5, 3)[:rank], 32), array(1, *(k,) * rank, 32, 40)
  settings = (stride,) * rank, (pad,) * rank
  assert_same(conv_ops.cured_conv, conv_ops.plain_conv, x, kernel, *settings)
  kernel = kernel.swapaxes(-1, -2)
  assert_same(conv_ops.cured_conv_transpose, conv_ops.plain_conv_transpose, x, kernel,
              (stride,) * rank, tuple((k - 1 - low, k - high) for low, high in settings[1]))


@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("size, pad", [
  ((12, 10), (1, 1)), ((9, 11), (1, 1)), ((12, 9), (0, 0)), ((8, 7), (2, 1)), ((8, 7), (0, 2))])
def test_winograds_rule_equals_plain(rank, size, pad, monkeypatch):
  monkeypatch.setattr(conv_ops, "WIDE_CHANNELS", 4)
  x, kernel = array(0, 2, *(*size, 5)[:rank], 4), array(1, *(3,) * rank, 4, 5)
  settings = (1,) * rank, (pad,) * rank
  assert_same(conv_ops.cured_conv, conv_ops.plain_conv, x, kernel, *settings)
  assert_same(conv_ops.cured_conv_transpose, conv_ops.plain_conv_transpose, x,
              kernel.swapaxes(-1, -2), *settings)


def test_winograds_rounding_is_that_of_the_plain_convolution():
  """Against float64, at the width where it is used."""
  x, kernel = array(0, 1, 16, 16, 128), array(1, 3, 3, 128, 128)
  padded = np.pad(np.asarray(x, np.float64), ((0, 0), (1, 1), (1, 1), (0, 0)))
  exact = sum(padded[:, i:i + 16, j:j + 16] @ np.asarray(kernel[i, j], np.float64)
              for i in range(3) for j in range(3))
  errors = [np.abs(conv(x, kernel, (1, 1), ((1, 1),) * 2) - exact).max() / np.abs(exact).max()
            for conv in (conv_ops.cured_conv, conv_ops.plain_conv)]
  assert 0 < errors[0] < 3 * errors[1] < 1e-5


def test_the_rounding_of_winograds_weight_gradient_is_that_of_the_plain_one():
  x, g = array(0, 1, 16, 16, 128), array(1, 1, 16, 16, 128)
  padded = np.pad(np.asarray(x, np.float64), ((0, 0), (1, 1), (1, 1), (0, 0)))
  exact = np.array([[np.einsum("bhwi,bhwo->io", padded[:, i:i + 16, j:j + 16], g)
                     for j in range(3)] for i in range(3)])
  errors = []
  for conv in (conv_ops.cured_conv, conv_ops.plain_conv):
    pull = jax.vjp(lambda w, conv=conv: conv(x, w, (1, 1), ((1, 1),) * 2),
                   jnp.zeros(exact.shape))[1]
    errors.append(np.abs(pull(g)[0] - exact).max() / np.abs(exact).max())
  assert 0 < errors[0] < 3 * errors[1] < 1e-5


@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("k, stride, pad", [
  (4, 2, (1, 1)), (3, 2, (0, 1)), (5, 1, (2, 2)), (1, 1, (0, 0)), (4, 3, (0, 2)), (1, 2, (0, 0))])
def test_weight_gradients_tap_by_tap_equal_plain(rank, k, stride, pad, monkeypatch):
  monkeypatch.setattr(conv_ops, "WIDE_CHANNELS", 4)
  monkeypatch.setattr(conv_ops, "_is_small", lambda *_: False)
  monkeypatch.setattr(conv_ops, "_weight_gradient_in_strips", None)  # they are not made so
  x, kernel = array(0, 2, *(9, 8, 7)[:rank], 4), array(1, *(k,) * rank, 4, 5)
  settings = (stride,) * rank, (pad,) * rank
  assert_same(conv_ops.cured_conv, conv_ops.plain_conv, x, kernel, *settings)
  assert_same(conv_ops.cured_conv_transpose, conv_ops.plain_conv_transpose, x,
              kernel.swapaxes(-1, -2), (stride,) * rank,
              tuple((k - 1 - low, k - 1 - high) for low, high in settings[1]))


@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("k, stride, low, high", [
  (4, 2, 2, 2), (3, 2, 1, 2), (3, 2, 1, 1), (3, 2, 2, 0), (5, 3, 2, 3), (5, 2, 0, 1)])
def test_transposed_convolution_by_phases_equals_plain(rank, k, stride, low, high, monkeypatch):
  monkeypatch.setattr(conv_ops, "SPLIT_CHANNELS", 3)
  monkeypatch.setattr(conv_ops, "_is_small", lambda *_: False)
  x, kernel = array(0, 2, *(5, 6, 4)[:rank], 5), array(1, *(k,) * rank, 3, 5)
  assert_same(conv_ops.cured_conv_transpose, conv_ops.plain_conv_transpose, x, kernel,
              (stride,) * rank, ((low, high),) * rank)


@pytest.mark.parametrize("space", [(5, 6), (3, 4, 5)])
def test_enlarged_convolution_equals_that_of_the_repeated_input(space):
  x, width = array(0, 2, *space, 6), conv_ops.SPLIT_CHANNELS
  params = Conv(width).init(jax.random.key(0), x)

  @jax.jit
  def gradients(params, x):
    results = []
    for layer, change in ((Conv(width, enlarged=True, cure="on"), lambda x: x),
                          (Conv(width, enlarged=True, cure="off"), lambda x: x),
                          (Conv(width, cure="off"), enlarge)):
      y, pull = jax.vjp(lambda p, x, f=layer, g=change: f.apply(p, g(x)), params, x)
      results.append(jax.tree.leaves((y, pull(jnp.sin(y)))))
    return results

  cured, plain, repeated = gradients(params, x)
  for got, same, wanted in zip(cured, plain, repeated, strict=True):
    np.testing.assert_array_equal(same, wanted)
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("other", [
  {"kernel_size": 4}, {"stride": 2}, {"padding": 0}, {"padding_mode": "reflect"}])
def test_only_the_default_convolution_is_enlarged(other):
  with pytest.raises(ValueError, match="enlarged"):
    Conv(2, enlarged=True, **other).init(jax.random.key(0), jnp.zeros((1, 4, 4, 2)))


def test_gradient_of_a_gradient_is_the_plain_one():
  x, first, second = array(0, 1, 8, 8, 2), array(1, 4, 4, 2, 24), array(2, 4, 4, 24, 1)

  def penalty(first, conv):
    def critic(x):
      y = jnp.tanh(conv(x, first, (2, 2), ((1, 1),) * 2))
      return conv(y, second, (1, 1), ((1, 1),) * 2).sum()

    return jnp.square(jax.grad(critic)(x)).sum()

  gradients = [
    jax.jit(jax.grad(lambda w, c=conv: penalty(w, c)))(first)
    for conv in (conv_ops.cured_conv, conv_ops.plain_conv)
  ]
  np.testing.assert_allclose(*gradients, rtol=0, atol=1e-5 * np.abs(gradients[1]).max())


def test_bfloat16_gradients_keep_their_type():
  x, kernel = array(0, 1, 8, 8, 24).astype(jnp.bfloat16), array(1, 3, 3, 24, 3).astype(jnp.bfloat16)
  gradients = jax.grad(
    lambda x, w: conv_ops.cured_conv(x, w, (1, 1), ((1, 1),) * 2).sum(), argnums=(0, 1)
  )(x, kernel)
  assert [g.dtype for g in gradients] == [jnp.bfloat16] * 2


def test_transposed_conv_is_the_adjoint_of_the_strided_one():
  x, y, kernel = array(0, 1, 6, 7, 2), array(1, 1, 12, 14, 3), array(2, 4, 4, 3, 2)
  up = conv_ops.plain_conv_transpose(x, kernel, (2, 2), ((2, 2),) * 2)
  down = conv_ops.plain_conv(y, kernel, (2, 2), ((1, 1),) * 2)
  np.testing.assert_allclose((up * y).sum(), (down * x).sum(), rtol=1e-4)


@pytest.mark.parametrize("layer, sizes", [
  (Conv(2, kernel_size=7, padding=3, padding_mode="reflect"), (12, 12)),
  (Conv(2, kernel_size=3, stride=2, padding=1), (6, 6)),
  (Conv(2, kernel_size=4, stride=1, padding=1), (11, 11)),
  (Conv(2, kernel_size=4, stride=1, padding="same"), (12, 12)),
  (ConvTranspose(2, kernel_size=4, stride=2, padding=1), (24, 24)),
  (ConvTranspose(2, kernel_size=3, stride=2, padding=1, output_padding=1), (24, 24)),
  (ConvTranspose(2, kernel_size=2, stride=2, padding=0), (24, 24)),
  (Conv(2, kernel_size=(1, 3), stride=(1, 2), padding="same"), (12, 6)),
])
def test_sizes_are_pytorchs(layer, sizes):
  x = jax.ShapeDtypeStruct((1, 12, 12, 3), jnp.float32)
  y, _ = jax.eval_shape(layer.init_with_output, jax.random.key(0), x)
  assert y.shape == (1, *sizes, 2)


def test_same_padding_and_transposed_layers_equal_flax():
  x = array(0, 1, 8, 8, 3)
  kernel = array(1, 3, 3, 2, 3)
  ours = ConvTranspose(2, kernel_size=3, padding=1, output_padding=1, bias=False)
  theirs = nn.ConvTranspose(2, (3, 3), (2, 2), padding=((1, 2), (1, 2)), transpose_kernel=True,
                            use_bias=False)
  params = {"params": {"kernel": kernel}}
  np.testing.assert_allclose(ours.apply(params, x), theirs.apply(params, x), atol=1e-4)
  kernel = array(1, 4, 4, 3, 2)
  params = {"params": {"kernel": kernel}}
  ours = Conv(2, kernel_size=4, stride=2, padding="same", bias=False)
  theirs = nn.Conv(2, (4, 4), (2, 2), use_bias=False)
  np.testing.assert_allclose(ours.apply(params, x), theirs.apply(params, x), atol=1e-4)


def test_reflection_uses_the_image_not_zeros():
  x = jnp.ones((1, 5, 5, 1))
  layer = Conv(1, kernel_size=3, padding=1, padding_mode="reflect", bias=False)
  y = layer.apply({"params": {"kernel": jnp.ones((3, 3, 1, 1))}}, x)
  np.testing.assert_allclose(y, 9.0)


def test_initialisers_by_name():
  shape = (40, 1000)
  draw = {
    name: np.asarray(kernel_init(name)(jax.random.key(0), shape, jnp.float32))
    for name in ("normal_0.02", "truncated_0.02", "torch", "kaiming")
  }
  assert abs(draw["normal_0.02"].std() - 0.02) < 5e-4
  assert np.abs(draw["normal_0.02"]).max() > 0.07 > 0.04 >= np.abs(draw["truncated_0.02"]).max()
  assert abs(np.abs(draw["torch"]).max() - 40**-0.5) < 1e-3
  assert abs(draw["kaiming"].std() - (2 / 40) ** 0.5) < 5e-3
  params = Conv(50, initializer="torch").init(jax.random.key(0), jnp.zeros((1, 4, 4, 4)))["params"]
  assert 0.9 / 6 < np.abs(params["bias"]).max() <= 1 / 6
  for name in ("torhc", "normal_x", "normal"):
    with pytest.raises(UserError, match="initializer"):
      kernel_init(name)


def test_the_cure_follows_layer_then_setting_then_backend(monkeypatch):
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  assert not cured() and cured("on")
  monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
  assert cured() and not cured("off")
  with cure_setting("off"):
    assert not cured() and cured("on")
  assert cured()
  for refused in ("yes", ""):
    with pytest.raises(UserError, match="auto"), cure_setting(refused):
      pass


@pytest.mark.parametrize("layer", [
  Conv(1, padding_mode="edge"), Conv(1, kernel_size=(3, 3, 3)), Conv(1, stride=(1, 1, 1)),
])
def test_wrong_settings_are_refused(layer):
  with pytest.raises(UserError):
    layer.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))


def test_the_cure_of_convolutions_is_a_field(toy_data, tmp_path):
  """Training step and synthesis follow it; a run may go on with another setting."""
  texts, store = {}, Store(toy_data)
  for setting in ("on", "off"):
    config = toy_config("pix2pix", toy_data, conv_cure=setting, steps=1)
    here = run.start(config, store.info, tmp_path / "run")  # the second goes on with the first's
    texts[setting] = [train.lower_step(here, "pix2pix").as_text(),
                      here.lower_synthesis("pix2pix").as_text()]
  auto = toy_config("pix2pix", toy_data, steps=1)
  del auto.conv_cure  # a run of an older version
  here = run.build(auto, store.info, tmp_path / "old")
  assert train.lower_step(here, "pix2pix").as_text() == texts["on"][0]
  for on, off in zip(texts["on"], texts["off"], strict=True):
    assert on != off
