"""One generator and one discriminator for all modalities, in every direction (S3).

Dai et al., Med Phys 2020;47(12):6343, on StarGAN (Choi et al., arXiv 1711.09020): the generator
gets an image of any modality and the label of the wanted one.
"""

import jax
import jax.numpy as jnp

from medsynth_jax import losses, optim
from medsynth_jax.config import names, stages
from medsynth_jax.contract import Method, category, update
from medsynth_jax.errors import UserError
from medsynth_jax.nets import registry

GENERATOR = ("gan", "classification", "cycle", "l1")  # parts of the generator's loss


def build(config, stage, info, methods) -> Method:
  """Fields: `generator`, `discriminator`, `n_critic`, `optim`, and the weights of the loss terms.

  Discriminator: D(fake) - D(real) + `penalty` * gradient penalty + `classification` *
  cross-entropy of the real image's own label. The real image is the source, so that cases with
  missing modalities serve too. Generator, every `n_critic` batches: -D(fake) + `classification` *
  cross-entropy of the wanted label + `cycle` * L1 of the image made back from it + `l1` * L1
  against the target where the case has it (0: the unpaired original). The wanted label is never
  the image's own, which StarGAN draws too.

  Raises:
    UserError: another data.source than "any".
  """
  del methods
  section = stages(config)[stage]
  if config.data.source != "any":
    raise UserError(f"data.source={config.data.source}: {section.method} makes each modality from"
                    " each; set data.source=any and name the modalities in data.targets")
  codes = tuple(info.index(name) for name in names(config.data.targets) or info.names)
  generator = registry.make({**section.generator, "labels": len(codes)}, config.dtype)
  discriminator = registry.make({**section.discriminator, "labels": len(codes)}, config.dtype)

  def make(params, image, code):
    return generator.apply({"params": params}, image, code)

  def judge(params, image):
    return discriminator.apply({"params": params}, image)

  def init(key, batch):
    keys = jax.random.split(key)
    code = jnp.zeros(len(batch["source"]), jnp.int32)
    return {"generator": generator.init(keys[0], batch["source"], code)["params"],
            "discriminator": discriminator.init(keys[1], batch["source"])["params"]}

  def step(state, batch, key):
    image, seen = batch["source"], batch["valid"]
    own, wanted = (category(batch[n], codes) for n in ("source_modality", "target_modality"))
    real = losses.outside_background(image, seen)
    fake = losses.outside_background(make(state.nets["generator"], image, wanted), seen)

    def d_loss(params):
      values, logits = judge(params, real)
      parts = {"wasserstein": judge(params, fake)[0].mean() - values.mean(),
               "penalty": losses.gradient_penalty(lambda z: judge(params, z)[0], real, fake, key),
               "own_class": losses.class_error(logits, own)}
      return (parts["wasserstein"] + section.penalty * parts["penalty"]
              + section.classification * parts["own_class"]), parts
    grads, metrics = jax.grad(d_loss, has_aux=True)(state.nets["discriminator"])
    state = update(state, txs, discriminator=grads)

    def g_loss(params):
      made = make(params, image, wanted)
      values, logits = judge(state.nets["discriminator"], losses.outside_background(made, seen))
      parts = {"gan": -values.mean(), "classification": losses.class_error(logits, wanted),
               "cycle": losses.l1(make(params, made, own), image, seen),
               "l1": losses.l1(made, batch["target"], losses.pixel_weight(batch))}
      return (parts["gan"] + section.classification * parts["classification"]
              + section.cycle * parts["cycle"] + section.l1 * parts["l1"]), parts

    def train_generator(state):
      grads, parts = jax.grad(g_loss, has_aux=True)(state.nets["generator"])
      return update(state, txs, generator=grads).replace(aux=parts)

    due = (state.step + 1) % section.n_critic == 0
    state = jax.lax.cond(due, train_generator, lambda state: state, state)
    return state, {**metrics, **state.aux}

  def aux(batch):
    del batch
    return {name: jnp.zeros(()) for name in GENERATOR}  # repeated until the generator's next update

  def synthesize(state, batch, key):
    del key
    return make(state.nets["generator"], batch["source"], category(batch["target_modality"], codes))

  txs = {"generator": optim.make(section.optim, section.steps, every=section.n_critic),
         "discriminator": optim.make(section.optim, section.steps, ema=False)}
  return Method(init, step, synthesize, txs, keeps=("generator",), aux=aux,
                factor=generator.factor, many_targets=True, many_sources=True,
                draws=("any",))
