"""GAN with a registration network that takes up the misalignment of its pairs (S4, RegGAN).

Kong et al., NeurIPS 2021 (arXiv 2110.06465): a misaligned target is an aligned one under a
displacement that a second network learns. CTA-GAN (Radiology 2023) is this, with a loss of bright
vessels in its second stage.
"""

import jax
import jax.numpy as jnp

from medsynth_jax import losses, optim
from medsynth_jax.config import check_symmetric, names, stages, target_channels
from medsynth_jax.contract import Method, update
from medsynth_jax.errors import UserError
from medsynth_jax.nets import registry, warp
from medsynth_jax.nets.patchgan import over_scales


def build(config, stage, info, methods) -> Method:
  """Fields: `generator`, `discriminator`, `registration`, `gan`, `conditional`, `optim`, `bright`
  and the weights of the generator's loss:

    adversarial  (D(G(x)) - 1)^2; D sees the image alone, with `conditional` the source too
    correction   L1 of warp(G(x), phi) against the target y, phi = R(G(x), y) in pixels
    smoothness   squared differences of phi between neighbours, everywhere: phi has to go on where
                 nothing was measured
    mean_flow    |mean of phi| of each example: G and R could share a global shift, which only a
                 conditional D sees; a shift that a pair really has is punished too
    l1           L1 of G(x) itself against y
    change       L1 of G(x) against the source x, SimGAN's self-regularisation (arXiv 1612.07828),
                 for a target in the source's units: what is as likely brighter as darker stays
    cycle        L1 of each image made there and back, by a second generator and discriminator
    bright       `weight` times L1 after the warp where y is `above` (physical units), averaged over
                 all voxels, as in CTA-GAN's second stage

  A net whose weight is 0 does not exist, so that these are RegGAN's modes: NC+R as configured, NC
  (the adversarial loss alone) with correction 0, C+R with cycle 10, C with both. RegGAN shows D a
  pool of earlier images in all modes but NC+R; here there is none. All gradients are taken at the
  old weights. Synthesis uses G alone; `flow` gives phi.

  Raises:
    UserError: a cycle or a change with sources in other channels than a target's, `mean_flow`
      without R.
  """
  del methods
  section = stages(config)[stage]
  if section.cycle:
    check_symmetric(config, stage)
  change = section.get("change", 0.0)  # runs from before this field have none
  if change:
    check_symmetric(config, stage, f"compares its image with the source (change={change})")
  registers = bool(section.correction)
  if section.mean_flow and not registers:
    raise UserError(f"{stage}: mean_flow={section.mean_flow} is of the registration network, which"
                    " correction=0 leaves out; set mean_flow=0 or correction=20")
  objective = losses.gan(section.gan)
  generator = registry.make({**section.generator, "out_channels": target_channels(config)},
                            config.dtype)
  discriminator = registry.make(section.discriminator, config.dtype)
  registration = registry.make(section.registration, config.dtype)
  bright = info.to_model(names(config.data.targets)[0], section.bright.above)

  def make(params, image):
    return generator.apply({"params": params}, image)

  def judged(condition, image, seen):
    image = losses.outside_background(image, seen)
    return jnp.concatenate([condition, image], -1) if section.conditional else image

  def adversarial(params, condition, image, seen, real):
    logits = discriminator.apply({"params": params}, judged(condition, image, seen))
    return over_scales(discriminator, logits, lambda scale: objective(scale, real).mean())

  def register(params, image, target):
    return registration.apply({"params": params}, jnp.concatenate([image, target], -1))

  def init(key, batch):
    keys = jax.random.split(key, 5)
    a, b, seen = batch["source"], batch["target"], batch["valid"]
    nets = {"generator": generator.init(keys[0], a),
            "discriminator": discriminator.init(keys[1], judged(a, b, seen))}
    if registers:
      nets["registration"] = registration.init(keys[2], jnp.concatenate([b, b], -1))
    if section.cycle:
      nets["generator_back"] = generator.init(keys[3], b)
      nets["discriminator_back"] = discriminator.init(keys[4], judged(b, a, seen))
    return {name: variables["params"] for name, variables in nets.items()}

  def step(state, batch, key):
    del key
    a, b, seen, nets = batch["source"], batch["target"], batch["valid"], state.nets
    weight = losses.pixel_weight(batch)

    def g_loss(trained):
      fake = make(trained["generator"], a)
      parts = {"adversarial": adversarial(nets["discriminator"], a, fake, seen, True)}
      fakes = {"discriminator": fake}
      if section.l1:
        parts["l1"] = losses.l1(fake, b, weight)
      if change:
        parts["change"] = losses.l1(fake, a, seen)
      shown = fake
      if registers:
        flow = register(trained["registration"], fake, b)
        shown = warp.warp(fake, flow)
        parts |= {"correction": losses.l1(shown, b, weight), "smoothness": warp.smoothness(flow)}
        if section.mean_flow:
          space = tuple(range(1, flow.ndim - 1))
          parts["mean_flow"] = jnp.abs(flow.mean(space)).mean()
      if section.bright.weight:
        parts["bright"] = losses.weighted_mean(jnp.abs(shown - b) * (b >= bright), weight)
      if section.cycle:
        fakes["discriminator_back"] = back = make(trained["generator_back"], b)
        parts["adversarial_back"] = adversarial(nets["discriminator_back"], b, back, seen, True)
        parts["cycle"] = (losses.l1(make(trained["generator_back"], fake), a, seen)
                          + losses.l1(make(trained["generator"], back), b, seen))
      return sum(weights[name] * value for name, value in parts.items()), (parts, fakes)
    trained = {name: nets[name] for name in nets if not name.startswith("discriminator")}
    updates, (parts, fakes) = jax.grad(g_loss, has_aux=True)(trained)

    def d_loss(params, condition, real, fake):
      return (adversarial(params, condition, real, seen, True)
              + adversarial(params, condition, fake, seen, False))
    for name, (condition, real) in {"discriminator": (a, b), "discriminator_back": (b, a)}.items():
      if name in fakes:
        parts[name], updates[name] = jax.value_and_grad(d_loss)(nets[name], condition, real,
                                                                fakes[name])
    return update(state, txs, **updates), parts

  def synthesize(state, batch, key):
    del key
    return make(state.nets["generator"], batch["source"])

  def flow(state, batch):
    return register(state.nets["registration"], make(state.nets["generator"], batch["source"]),
                    batch["target"])

  trained = ["generator", "discriminator", *(["registration"] if registers else []),
             *(["generator_back", "discriminator_back"] if section.cycle else [])]
  txs = {name: optim.make(section.optim, section.steps, ema=name in ("generator", "registration"))
         for name in trained}
  weights = {**{name: section[name] for name in ("adversarial", "correction", "smoothness",
                                                 "mean_flow", "l1", "cycle")}, "change": change,
             "adversarial_back": section.adversarial, "bright": section.bright.weight}
  keeps = ("generator", "registration") if registers else ("generator",)
  return Method(init, step, synthesize, txs, keeps=keeps, factor=generator.factor,
                flow=flow if registers else None)

