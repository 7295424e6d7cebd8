"""CycleGAN: two generators that undo each other, for scans of different patients.

Zhu et al., ICCV 2017 (arXiv 1703.10593).
"""

import jax
import jax.numpy as jnp

from medsynth_jax import losses, optim, pool
from medsynth_jax.config import check_symmetric, stages
from medsynth_jax.contract import Method, update
from medsynth_jax.nets import registry
from medsynth_jax.nets.patchgan import over_scales


def build(config, stage, info, methods) -> Method:
  """Fields: `generator`, `discriminator` (of both directions), `gan`, `cycle`, `identity`, `pool`.

  Generators: fooling both discriminators + `cycle` * L1 of each image made there and back
  + `cycle` * `identity` * L1 of what a generator makes of an image that is its target already.
  Discriminators: half of the real and the fake error; the fakes come from a pool of `pool` earlier
  images. No term compares with the case's own target. All gradients are taken at the old weights.
  Synthesis uses the generator from source to target.

  Raises:
    UserError: sources in other channels than a target's, 2.5-D context.
  """
  del info, methods
  section = stages(config)[stage]
  check_symmetric(config, stage)
  objective = losses.gan(section.gan)
  generator = registry.make(section.generator, config.dtype)
  discriminator = registry.make(section.discriminator, config.dtype)

  def make(params, image):
    return generator.apply({"params": params}, image)

  def judge(params, image, seen, real):
    logits = discriminator.apply({"params": params}, losses.outside_background(image, seen))
    return over_scales(discriminator, logits, lambda scale: objective(scale, real).mean())

  def init(key, batch):
    keys = jax.random.split(key, 4)
    nets = {name: generator.init(k, batch["source"])["params"]
            for name, k in zip(("generator", "generator_back"), keys[:2], strict=True)}
    return nets | {name: discriminator.init(k, batch["source"])["params"] for name, k in
                   zip(("discriminator", "discriminator_back"), keys[2:], strict=True)}

  def step(state, batch, key):
    a, b = batch["source"], batch["target"]
    seen_a, seen_b = batch["valid"], batch["target_valid"]
    nets = state.nets

    def g_loss(there, back):
      fake_b, fake_a = make(there, a), make(back, b)
      parts = {
        "gan": judge(nets["discriminator"], fake_b, seen_a, True),
        "gan_back": judge(nets["discriminator_back"], fake_a, seen_b, True),
        "cycle": (losses.l1(make(back, fake_b), a, seen_a)
                  + losses.l1(make(there, fake_a), b, seen_b))}
      total = parts["gan"] + parts["gan_back"] + section.cycle * parts["cycle"]
      if section.identity:
        parts["identity"] = (losses.l1(make(there, b), b, seen_b)
                             + losses.l1(make(back, a), a, seen_a))
        total += section.cycle * section.identity * parts["identity"]
      fakes = (losses.outside_background(fake_b, seen_a), losses.outside_background(fake_a, seen_b))
      return total, (parts, fakes)
    grads, (parts, fakes) = jax.grad(g_loss, argnums=(0, 1), has_aux=True)(
      nets["generator"], nets["generator_back"])

    def d_loss(params, real, seen, fake):
      everywhere = jnp.ones_like(seen)  # fakes have their background already
      return 0.5 * (judge(params, real, seen, True) + judge(params, fake, everywhere, False))
    updates, aux = dict(zip(("generator", "generator_back"), grads, strict=True)), {}
    for name, real, seen, fake, k in zip(
        ("discriminator", "discriminator_back"), (b, a), (seen_b, seen_a), fakes,
        jax.random.split(key), strict=True):
      aux[name], shown = pool.exchange(state.aux[name], fake, k)
      parts[name], updates[name] = jax.value_and_grad(d_loss)(nets[name], real, seen, shown)
    return update(state, txs, **updates).replace(aux=aux), parts

  def aux(batch):
    return {name: pool.empty(section.pool, batch["source"])
            for name in ("discriminator", "discriminator_back")}

  def synthesize(state, batch, key):
    del key
    return make(state.nets["generator"], batch["source"])

  txs = {name: optim.make(section.optim, section.steps, ema=name == "generator") for name in
         ("generator", "generator_back", "discriminator", "discriminator_back")}
  return Method(init, step, synthesize, txs, keeps=("generator",), aux=aux,
                factor=generator.factor, draws=("unpaired", "pair"))
