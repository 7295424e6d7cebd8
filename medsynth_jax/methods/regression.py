"""One-step regression: a network trained on the pixel error alone (the baseline to beat)."""

import jax
import jax.numpy as jnp

from medsynth_jax import losses, optim
from medsynth_jax.config import names, stages, target_channels
from medsynth_jax.contract import Method, category, update
from medsynth_jax.errors import UserError
from medsynth_jax.nets import registry


def build(config, stage, info, methods) -> Method:
  """Fields: `generator` (network and its fields), `loss` ("l1" or "l2"), `optim`.

  Several targets are channels of one output, of which the example's category takes its own.
  """
  del methods
  section = stages(config)[stage]
  if section.loss not in losses.PIXEL:
    raise UserError(f"loss={section.loss!r}: choose one of {', '.join(losses.PIXEL)}")
  pixel = losses.PIXEL[section.loss]
  codes = tuple(info.index(name) for name in names(config.data.targets))
  outputs = len(codes) if len(codes) > 1 else target_channels(config)
  generator = registry.make({**section.generator, "out_channels": outputs}, config.dtype)

  def generate(params, batch, **options):
    image = generator.apply({"params": params}, batch["source"], **options)
    if len(codes) == 1:
      return image
    place = category(batch["target_modality"], codes).reshape((-1,) + (1,) * (image.ndim - 1))
    return jnp.take_along_axis(image, place, -1)

  def init(key, batch):
    return {"generator": generator.init(key, batch["source"])["params"]}

  def step(state, batch, key):
    def loss(params):
      image = generate(params, batch, deterministic=False, rngs={"dropout": key})
      return pixel(image, batch["target"], losses.pixel_weight(batch))
    value, grads = jax.value_and_grad(loss)(state.nets["generator"])
    return update(state, txs, generator=grads), {section.loss: value}

  def synthesize(state, batch, key):
    del key
    return jnp.clip(generate(state.nets["generator"], batch), -1, 1)

  txs = {"generator": optim.make(section.optim, section.steps)}
  return Method(init, step, synthesize, txs, keeps=("generator",), factor=generator.factor,
                many_targets=True)
