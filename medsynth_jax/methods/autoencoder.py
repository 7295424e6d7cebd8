"""KL autoencoder of single images of any modality: S1's first phase.

After Rombach et al., arXiv 2112.10752.
"""

import jax
import jax.numpy as jnp

from medsynth_jax import losses, optim
from medsynth_jax.config import stages
from medsynth_jax.contract import Method, update
from medsynth_jax.errors import UserError
from medsynth_jax.nets import perceptual, registry
from medsynth_jax.nets.patchgan import over_scales


def build(config, stage, info, methods) -> Method:
  """Fields: `network`, `discriminator`, `kl`, `adversarial`, `adversarial_from`, `perceptual`.

  Loss: mean over valid voxels of |image - reconstruction|
  + `kl` * KL(posterior, N(0, 1)), summed over an image's latents and averaged over images
  + `adversarial` * mean over patches of (D(reconstruction) - 1)^2, from step `adversarial_from` on
  + `perceptual.weight` * distance of VGG16 features, averaged over images (`perceptual.weights` is
    the file that holds them).
  The discriminator learns from the first step on, so that its first word is an informed one; with
  `adversarial` 0 there is none. Synthesis reconstructs the target from its posterior mean: the
  ceiling of any model that works on these latents.

  Raises:
    UserError: 2.5-D context, a perceptual weight without a file of features.
  """
  del info, methods
  section = stages(config)[stage]
  _check(config, stage, section)
  objective = losses.gan("lsgan")
  autoencoder = registry.make(section.network, config.dtype)
  discriminator = registry.make(section.discriminator, config.dtype)
  features = _features(section.perceptual)

  def init(key, batch):
    keys = jax.random.split(key)
    nets = {"autoencoder": autoencoder.init(keys[0], batch["target"])["params"]}
    if section.adversarial:
      nets["discriminator"] = discriminator.init(keys[1], batch["target"])["params"]
    return nets

  def step(state, batch, key):
    target = batch["target"]

    def reconstruct(params):
      apply = lambda x, method: autoencoder.apply({"params": params}, x, method=method)  # noqa: E731
      mean, std = apply(target, "encode")
      return apply(mean + std * jax.random.normal(key, mean.shape), "decode"), mean, std

    (image, mean, std), pull_back = jax.vjp(reconstruct, state.nets["autoencoder"])
    metrics = {}
    if section.adversarial:
      state, metrics["discriminator"] = train_discriminator(state, batch, image)

    def loss(image, mean, std):
      parts = {"l1": losses.l1(image, target, losses.pixel_weight(batch)),
               "kl": losses.kl(mean, std)}
      total = parts["l1"] + section.kl * parts["kl"]
      if section.adversarial:
        parts["gan"] = judge(state.nets["discriminator"], batch, image, real=True)
        started = state.step >= section.adversarial_from
        total += jnp.where(started, section.adversarial, 0.0) * parts["gan"]
      if features:
        shown = (losses.outside_background(x, batch["valid"]) for x in (image, target))
        parts["perceptual"] = perceptual.perceptual_distance(features(), *shown).mean()
        total += section.perceptual.weight * parts["perceptual"]
      return total, parts

    grads, parts = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(image, mean, std)
    state = update(state, txs, autoencoder=pull_back(grads)[0])
    return state, {**metrics, **parts}

  def judge(params, batch, image, real):
    logits = discriminator.apply({"params": params},
                                 losses.outside_background(image, batch["valid"]))
    return over_scales(discriminator, logits, lambda scale: losses.per_example(
      objective(scale, real), batch["paired"]))

  def train_discriminator(state, batch, image):
    def loss(params):
      real = judge(params, batch, batch["target"], True)
      return 0.5 * (real + judge(params, batch, image, False))
    value, grads = jax.value_and_grad(loss)(state.nets["discriminator"])
    return update(state, txs, discriminator=grads), value

  def synthesize(state, batch, key):
    del key
    apply = lambda x, method: autoencoder.apply(  # noqa: E731
      {"params": state.nets["autoencoder"]}, x, method=method)
    return jnp.clip(apply(apply(batch["target"], "encode")[0], "decode"), -1, 1)

  txs = {"autoencoder": optim.make(section.optim, section.steps)}
  if section.adversarial:
    txs["discriminator"] = optim.make(section.optim, section.steps, ema=False,
                                      lr=section.discriminator_lr)
  return Method(init, step, synthesize, txs, keeps=("autoencoder",), sees_target=True,
                factor=autoencoder.factor, many_targets=True, draws=("pair", "single"))


def _check(config, stage, section):
  if config.data.context:
    raise UserError(f"data.context={config.data.context}: the autoencoder '{stage}' takes single"
                    " slices; set data.context=0")
  if section.perceptual.weight and not section.perceptual.weights:
    raise UserError(f"{stage}.perceptual.weight={section.perceptual.weight}: give the file of"
                    f" features by {stage}.perceptual.weights=FILE.npz, or set the weight to 0")


def _features(fields):
  """A function that gives the features' weights, read when training is first traced; or None.

  A finished run is used without the file.
  """
  if not fields.weight:
    return None
  return lambda: perceptual.load_weights(fields.weights)
