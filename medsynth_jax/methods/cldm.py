"""Category-guided conditional latent diffusion (S1): one model makes each target modality.

Latent diffusion (Rombach et al., arXiv 2112.10752) conditioned on the source's latents by
concatenation and on the target's category by an embedding, after Zhang et al., ISMRM 2024.
"""

import jax
import jax.numpy as jnp

from medsynth_jax import losses, optim
from medsynth_jax.config import names, stages
from medsynth_jax.contract import Method, category, earlier, example_keys, update
from medsynth_jax.diffusion import guidance, samplers
from medsynth_jax.diffusion import process as processes
from medsynth_jax.errors import UserError
from medsynth_jax.nets import registry


def build(config, stage, info, methods) -> Method:
  """Fields: `network`, `autoencoder` and `moments` (stages), `diffusion`, `sampler`, `optim`,
  `code_dropout`, `guidance`.

  Latents are the autoencoder's times the scale that `moments` found: sampled from the posterior for
  the target of training, its mean for the source. Each source channel is encoded by itself. A share
  `code_dropout` of the examples is trained with the null code, which `guidance` w needs:
  output = null + w (coded - null) (Ho and Salimans, arXiv 2207.12598). Loss: squared error in
  latents, weighted by the valid share of the voxels under each.

  Raises:
    UserError: no such earlier stages, guidance without code dropout.
  """
  sections = stages(config)
  section = sections[stage]
  _check(section, stage, sections)
  process = processes.make(section.diffusion)
  sampler = samplers.make(section.sampler, process)
  autoencoder = registry.make(sections[section.autoencoder].network, config.dtype)
  codes = tuple(info.index(name) for name in names(config.data.targets))
  null = len(codes)
  channels = sections[section.autoencoder].network.latent_channels
  network = registry.make({**section.network, "out_channels": channels, "classes": null + 1},
                          config.dtype)
  space = autoencoder.factor

  def scale(state):
    return earlier(state, section.moments).aux["scale"]

  def apply(state, x, method):
    nets = earlier(state, section.autoencoder).nets
    return autoencoder.apply({"params": nets["autoencoder"]}, x, method=method)

  def encode_source(state, batch):
    """Means of the posteriors of every source channel [B, *latent space, C z]."""
    one_channel = [apply(state, x, "encode")[0]
                   for x in jnp.split(batch["source"], batch["source"].shape[-1], -1)]
    return scale(state) * jnp.concatenate(one_channel, -1)

  def init(key, batch):
    shape = [n // space for n in batch["source"].shape[1:-1]]
    x = jnp.zeros((1, *shape, channels * (1 + batch["source"].shape[-1])))
    code = jnp.zeros(1, jnp.int32)
    return {"denoiser": network.init(key, x, jnp.zeros(1), code)["params"]}

  def step(state, batch, key):
    posterior_key, noise_key, code_key, dropout_key = jax.random.split(key, 4)
    mean, std = apply(state, batch["target"], "encode")
    clean = scale(state) * (mean + std * jax.random.normal(posterior_key, mean.shape))
    source = encode_source(state, batch)
    noisy, level, wanted, weight = process.corrupted(noise_key, clean)
    dropped = jax.random.bernoulli(code_key, section.code_dropout, (len(clean),))
    code = jnp.where(dropped, null, category(batch["target_modality"], codes))
    seen = shrunk(losses.pixel_weight(batch))

    def loss(params):
      output = network.apply({"params": params}, jnp.concatenate([noisy, source], -1), level, code,
                             deterministic=False, rngs={"dropout": dropout_key})
      error = weight * jnp.square(output - wanted)
      return losses.weighted_mean(error, seen)
    value, grads = jax.value_and_grad(loss)(state.nets["denoiser"])
    return update(state, txs, denoiser=grads), {process.prediction: value}

  def shrunk(weights):
    """Means over the voxels of each latent."""
    shape = [len(weights)]
    for n in weights.shape[1:-1]:
      shape += [n // space, space]
    return weights.reshape(*shape, 1).mean(tuple(range(2, 2 * weights.ndim - 3, 2)))

  def synthesize(state, batch, key):
    source = encode_source(state, batch)
    code = category(batch["target_modality"], codes)
    def denoise(x, level, code):
      return network.apply({"params": state.nets["denoiser"]}, jnp.concatenate([x, source], -1),
                           level, code)
    guided = guidance.classifier_free(denoise, section.guidance)
    def predict(x, level):
      return guided(x, level, code, null)
    z = samplers.sample(sampler, predict, example_keys(key, batch, config.synthesis.noise),
                        (*source.shape[1:-1], channels))
    return jnp.clip(apply(state, z / scale(state), "decode"), -1, 1)

  txs = {"denoiser": optim.make(section.optim, section.steps)}
  return Method(init, step, synthesize, txs, keeps=("denoiser",), many_targets=True,
                stochastic=True, factor=space * network.factor)


def _check(section, stage, sections):
  earlier_stages = list(sections)[:list(sections).index(stage)]
  for field, method, what in (("autoencoder", "autoencoder", "latents"),
                              ("moments", "latent_moments", "latent scale")):
    name = section[field]
    if name not in earlier_stages or sections[name].method != method or name not in section.needs:
      raise UserError(f"{stage}.{field}={name!r}: no {what}; name an earlier stage of method"
                      f" '{method}' here and in {stage}.needs")
  if sections[section.moments].autoencoder != section.autoencoder:
    raise UserError(f"{stage}.moments={section.moments!r} measured the latents of"
                    f" '{sections[section.moments].autoencoder}', not of '{section.autoencoder}'")
  if section.guidance != 1 and not section.code_dropout:
    raise UserError(f"{stage}.guidance={section.guidance} needs a model that also knows the null"
                    f" code: train with {stage}.code_dropout=0.1, or set {stage}.guidance=1")
