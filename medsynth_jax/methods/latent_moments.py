"""Scale of an autoencoder's latents over the training images: a pass over them, without a net."""

import jax
import jax.numpy as jnp

from medsynth_jax.config import stages
from medsynth_jax.contract import Method, earlier
from medsynth_jax.nets import registry


def build(config, stage, info, methods) -> Method:
  """Fields: `autoencoder` (its stage).

  `aux` holds the number of latents seen, their sum and sum of squares (each posterior sampled, as
  training of the later stage does), and `scale`, 1 / standard deviation over all latents
  (arXiv 2112.10752, appendix G).
  """
  del info, methods
  sections = stages(config)
  section = sections[stage]
  autoencoder = registry.make(sections[section.autoencoder].network, config.dtype)

  def step(state, batch, key):
    nets = earlier(state, section.autoencoder).nets
    mean, std = autoencoder.apply({"params": nets["autoencoder"]}, batch["target"], method="encode")
    z = mean + std * jax.random.normal(key, mean.shape)
    aux = {"count": state.aux["count"] + z.size, "sum": state.aux["sum"] + z.sum(),
           "squares": state.aux["squares"] + jnp.square(z).sum()}
    variance = aux["squares"] / aux["count"] - jnp.square(aux["sum"] / aux["count"])
    aux["scale"] = jax.lax.rsqrt(variance)
    return state.replace(aux=aux), {"latent_std": 1 / aux["scale"]}

  def aux(batch):
    del batch
    return {name: jnp.zeros(()) for name in ("count", "sum", "squares", "scale")}

  return Method(lambda key, batch: {}, step, None, {}, aux=aux, many_targets=True,
                factor=autoencoder.factor, draws=("pair", "single"))
