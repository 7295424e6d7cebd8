"""Conditional GAN for paired images: pix2pix (Isola et al., CVPR 2017, arXiv 1611.07004).

Serves S0's first stage (U-Net generator, least-squares objective) and S2 (ResNet-9, cross-entropy
objective; Lee et al. 2020) by fields of its config.
"""

import jax
import jax.numpy as jnp

from medsynth_jax import losses, optim
from medsynth_jax.config import stages, target_channels
from medsynth_jax.contract import Method, update
from medsynth_jax.nets import registry
from medsynth_jax.nets.patchgan import over_scales


def build(config, stage, info, methods) -> Method:
  """Fields: `generator`, `discriminator`, `gan` ("lsgan", "cross_entropy"), `l1` (weight), `optim`.

  The discriminator sees source and image; outside the field of view both real and fake are
  background. It has no moving average. Synthesis is deterministic: dropout acts in training only.
  """
  del info, methods
  section = stages(config)[stage]
  objective = losses.gan(section.gan)
  generator = registry.make({**section.generator, "out_channels": target_channels(config)},
                            config.dtype)
  discriminator = registry.make(section.discriminator, config.dtype)

  def judge(params, batch, image):
    image = losses.outside_background(image, batch["valid"])
    return discriminator.apply({"params": params}, jnp.concatenate([batch["source"], image], -1))

  def init(key, batch):
    keys = jax.random.split(key)
    pair = jnp.concatenate([batch["source"], batch["target"]], -1)
    return {"generator": generator.init(keys[0], batch["source"])["params"],
            "discriminator": discriminator.init(keys[1], pair)["params"]}

  def step(state, batch, key):
    def generate(params):
      return generator.apply({"params": params}, batch["source"], deterministic=False,
                             rngs={"dropout": key})
    def adversarial(logits, real):
      return over_scales(discriminator, logits, lambda scale: losses.per_example(
        objective(scale, real), batch["paired"]))

    fake, pull_back = jax.vjp(generate, state.nets["generator"])

    def d_loss(params):
      real_logits = judge(params, batch, batch["target"])
      return 0.5 * (adversarial(real_logits, True) + adversarial(judge(params, batch, fake), False))
    d_value, d_grads = jax.value_and_grad(d_loss)(state.nets["discriminator"])
    state = update(state, txs, discriminator=d_grads)

    def g_loss(image):
      fooled = adversarial(judge(state.nets["discriminator"], batch, image), True)
      pixel = losses.l1(image, batch["target"], losses.pixel_weight(batch))
      return fooled + section.l1 * pixel, {"gan": fooled, "l1": pixel}
    fake_grad, parts = jax.grad(g_loss, has_aux=True)(fake)
    state = update(state, txs, generator=pull_back(fake_grad)[0])
    return state, {**parts, "discriminator": d_value}

  def synthesize(state, batch, key):
    del key
    return generator.apply({"params": state.nets["generator"]}, batch["source"])

  txs = {"generator": optim.make(section.optim, section.steps),
         "discriminator": optim.make(section.optim, section.steps, ema=False)}
  return Method(init, step, synthesize, txs, keeps=("generator",), factor=generator.factor)
