"""The paired systems: losses reach the parameters they should, and no others."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_train import get_config, toy_config

from medsynth_jax import losses, run
from medsynth_jax.contract import create
from medsynth_jax.data.dataset import load_info
from medsynth_jax.data.pipeline import example_batch
from medsynth_jax.nets import registry

pytestmark = pytest.mark.usefixtures("unoptimised")


@functools.cache
def start(name, data, fields=()):
  """(method, its first state, an example of zeros) of a config's test variant."""
  config = toy_config(name, data)
  config.update_from_flattened_dict(dict(fields))
  here = run.build(config, load_info(data), "nowhere")
  method = here.methods[config.method]
  example = example_batch(here.task, here.info)
  make = jax.jit(lambda key: create(method, key, example, {}))
  return method, make(here.key(config.method)), example


def build(name, data):
  method, state, example = start(name, data)
  rng = np.random.default_rng(0)
  batch = {k: rng.uniform(-1, 1, (2, *v.shape[1:])).astype(np.float32)
           for k, v in example.items() if k in ("source", "target")}
  batch |= {"valid": np.ones((2, 32, 32, 1), np.float32), "paired": np.ones(2, np.float32)}
  return method, state, batch


def moved(before, after, net):
  return not all(np.array_equal(a, b) for a, b in zip(
    jax.tree.leaves(before.nets[net]), jax.tree.leaves(after.nets[net]), strict=True))


@pytest.mark.parametrize("name", ["pix2pix", "spine_ct2mr"])
def test_gan_step_trains_both_nets(name, toy_data):
  method, state, batch = build(name, toy_data)
  after, metrics = jax.jit(method.step)(state, batch, jax.random.key(1))
  assert moved(state, after, "generator") and moved(state, after, "discriminator")
  assert set(metrics) == {"gan", "l1", "discriminator"}
  image = method.synthesize(after, {"source": batch["source"]}, jax.random.key(0))
  assert image.shape == (2, 32, 32, 1) and float(jnp.abs(image).max()) <= 1


def test_generator_follows_the_updated_discriminator(toy_data):
  """The pulled-back gradient equals the plain one through generator and updated discriminator."""
  config = get_config("pix2pix")
  method, state, batch = build("pix2pix", toy_data)
  after, _ = jax.jit(method.step)(state, batch, jax.random.key(1))
  nets = {n: registry.make(config[n], "float32") for n in ("generator", "discriminator")}

  def loss(params):
    image = nets["generator"].apply({"params": params}, batch["source"], deterministic=False,
                                    rngs={"dropout": jax.random.key(1)})
    logits = nets["discriminator"].apply({"params": after.nets["discriminator"]},
                                         jnp.concatenate([batch["source"], image], -1))
    return jnp.square(logits - 1).mean() + 100 * jnp.abs(image - batch["target"]).mean()

  from medsynth_jax.contract import update
  direct = update(state, method.txs, generator=jax.jit(jax.grad(loss))(state.nets["generator"]))
  for a, b in zip(jax.tree.leaves(direct.nets["generator"]),
                  jax.tree.leaves(after.nets["generator"]), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-4)  # Adam's first step is lr * sign


def test_invalid_voxels_and_unpaired_examples_do_not_count(toy_data):
  """Losses do not change when the target changes outside `valid` or where `paired` is 0."""
  method, state, batch = build("pix2pix", toy_data)
  batch["valid"][:, :16] = 0
  batch["paired"][1] = 0
  step = jax.jit(method.step)
  _, before = step(state, batch, jax.random.key(1))
  batch["target"] = batch["target"].copy()
  batch["target"][:, :16] = 0.9
  batch["target"][1] = -0.9
  _, after = step(state, batch, jax.random.key(1))
  assert {k: float(v) for k, v in before.items()} == {k: float(v) for k, v in after.items()}


def test_dropout_is_a_stream(toy_data):
  method, state, example = start("unet", toy_data, (("generator.dropout", 0.5),))
  batch = {**example, "source": np.random.default_rng(0).normal(size=(1, 32, 32, 1)).astype("f4"),
           "valid": np.ones((1, 32, 32, 1), "f4"), "paired": np.ones(1, "f4")}
  step = jax.jit(method.step)
  value = lambda k: float(step(state, batch, jax.random.key(k))[1]["l1"])  # noqa: E731
  assert value(1) == value(1) != value(2)


def test_objectives_closed_form():
  logits = jnp.array([[0.0, 2.0]])
  np.testing.assert_allclose(losses.gan("lsgan")(logits, True), [[1.0, 1.0]])
  np.testing.assert_allclose(losses.gan("cross_entropy")(logits, True),
                             np.log1p(np.exp([[0.0, -2.0]])), rtol=1e-6)
  np.testing.assert_allclose(losses.gan("cross_entropy")(logits, False),
                             np.log1p(np.exp([[0.0, 2.0]])), rtol=1e-6)


def test_three_dimensional_patches_train(toy_data):
  method, state, example = start("unet", toy_data, (("data.size", "8,16,16"),))
  after, metrics = jax.jit(method.step)(state, {**example, "paired": np.ones(1, "f4")},
                                        jax.random.key(0))
  assert np.isfinite(float(metrics["l1"])) and int(after.step) == 0


COUNTS = {"pix2pix": 54_407_809, "unet": 31_036_481, "att_unet": 31_387_045,
          "spine_ct2mr": 11_376_129}


@pytest.mark.parametrize("name", COUNTS)
def test_paper_variants_build(name, toy_data):
  """The published recipes have the published sizes (shapes only, nothing is compiled)."""
  config = get_config(name, "paper")
  config.data.update(source="a", targets="b", size="256,256")
  here = run.build(config, load_info(toy_data), "nowhere")
  shape = here.shape(config.method)
  count = sum(x.size for x in jax.tree.leaves(shape.nets["generator"]))
  assert count == COUNTS[name]


@pytest.mark.parametrize("name, section", [("pix2pix", None), ("cldm", "autoencoder")])
def test_a_discriminator_of_many_scales_fits_in(name, section, toy_data):
  config = toy_config(name, toy_data)
  part = config[section] if section else config
  part.discriminator.update(name="multiscale_patchgan", base=2, n_layers=1)
  here = run.build(config, load_info(toy_data), "nowhere")
  method, example = here.methods[section or config.method], example_batch(here.task, here.info)
  key = jax.random.key(0)
  state = jax.eval_shape(lambda key: create(method, key, example, {}), key)
  assert set(state.nets["discriminator"]) == {"scale_0", "scale_1"}
  after, metrics = jax.eval_shape(method.step, state, example, key)
  assert metrics["discriminator"].shape == () and after.nets == state.nets


class Judge(nn.Module):
  """A toy discriminator: one logit a pixel, which sees that pixel alone."""
  width: int = 2
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x):
    return nn.Dense(1, name="logit")(nn.relu(nn.Dense(self.width, dtype=self.dtype)(x)))


def test_a_new_discriminator_is_a_class_and_a_line(toy_data, monkeypatch):
  """`discriminator.name` finds it, with its fields; no loop and no method is touched."""
  monkeypatch.setitem(registry.NETS, "judge", Judge)
  config = toy_config("pix2pix", toy_data)
  config.discriminator = {"name": "judge", "width": 3}
  here = run.build(config, load_info(toy_data), "nowhere")
  method = here.methods["pix2pix"]
  method.txs.update({net: optax.sgd(0.1) for net in method.txs})
  _, _, batch = build("pix2pix", toy_data)
  state = jax.jit(lambda key: create(method, key, batch, {}))(here.key("pix2pix"))
  assert state.nets["discriminator"]["Dense_0"]["kernel"].shape == (2, 3)  # source and image
  after, metrics = jax.jit(method.step)(state, batch, jax.random.key(1))
  assert moved(state, after, "discriminator") and moved(state, after, "generator")
  assert 0 < float(metrics["discriminator"]) < np.inf
