"""One-step regression: a network trained on the pixel error alone (the baseline to beat)."""

import jax
import jax.numpy as jnp

from medsynth_jax import losses, optim
from medsynth_jax.config import stages
from medsynth_jax.contract import Method, update
from medsynth_jax.errors import UserError
from medsynth_jax.nets import registry


def build(config, stage, info, methods) -> Method:
  """Fields: `generator` (network and its fields), `loss` ("l1" or "l2"), `optim`."""
  del info, methods
  section = stages(config)[stage]
  if section.loss not in losses.PIXEL:
    raise UserError(f"loss={section.loss!r}: choose one of {', '.join(losses.PIXEL)}")
  pixel = losses.PIXEL[section.loss]
  generator = registry.make(section.generator, config.dtype)

  def init(key, batch):
    return {"generator": generator.init(key, batch["source"])["params"]}

  def step(state, batch, key):
    def loss(params):
      image = generator.apply({"params": params}, batch["source"], deterministic=False,
                              rngs={"dropout": key})
      return pixel(image, batch["target"], losses.pixel_weight(batch))
    value, grads = jax.value_and_grad(loss)(state.nets["generator"])
    return update(state, txs, generator=grads), {section.loss: value}

  def synthesize(state, batch, key):
    del key
    return jnp.clip(generator.apply({"params": state.nets["generator"]}, batch["source"]), -1, 1)

  txs = {"generator": optim.make(section.optim, section.steps)}
  return Method(init, step, synthesize, txs, keeps=("generator",), factor=generator.factor)
