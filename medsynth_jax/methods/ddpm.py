"""Conditional denoising diffusion in image space (S0's second stage).

Palette (Saharia et al., arXiv 2111.05826) conditioned on the source, and on the coarse image of an
earlier stage.
"""

import jax
import jax.numpy as jnp

from medsynth_jax import losses, optim
from medsynth_jax.config import folds, stages, target_channels
from medsynth_jax.contract import Method, earlier, example_keys, update
from medsynth_jax.diffusion import process as processes
from medsynth_jax.diffusion import samplers
from medsynth_jax.errors import UserError
from medsynth_jax.nets import registry

COMBINE = ("concat", "residual", "start")


def build(config, stage, info, methods) -> Method:
  """Fields: `network`, `diffusion`, `sampler`, `coarse`, `combine`, `start_at`, `folds`, `optim`.

  `coarse` is the stage that makes the coarse image ("": none). `combine`:
    concat    the denoiser sees source and coarse image
    residual  the same, and target - coarse is diffused
    start     the denoiser sees the source; sampling starts at q(x_t | coarse), t = `start_at` T
  With `folds` k the coarse images of training come from fold_0 .. fold_{k-1}, each of a generator
  that has not seen that subject; with 0 from `coarse` itself, in fold: better than on new subjects.

  Raises:
    UserError: unknown `combine`, "residual" or "start" without a coarse stage.
  """
  del info
  section = stages(config)[stage]
  _check(section, stage)
  process = processes.make(section.diffusion)
  sampler = samplers.make(section.sampler, process)
  channels, residual = target_channels(config), section.combine == "residual"
  network = registry.make({**section.network, "out_channels": channels}, config.dtype)
  sees_coarse = bool(section.coarse) and section.combine != "start"

  def image_of(name, state, batch, key):
    return methods[name].synthesize(earlier(state, name), batch, key)

  def training_coarse(state, batch, key):
    """Each example's coarse image, by the generator that was trained without its fold."""
    names = folds(section)
    if not names:
      return image_of(section.coarse, state, batch, key)
    def one(i):
      nets = jax.lax.switch(i, [lambda name=name: state.frozen[name].nets for name in names])
      return methods[names[0]].synthesize(earlier(state, names[0]).replace(nets=nets), batch, key)
    made = jax.lax.map(one, jnp.arange(len(names)))  # compiles one network, not one a fold
    fold = batch["fold"].reshape((-1,) + (1,) * (made[0].ndim - 1))
    return sum(jnp.where(fold == i, image, 0.0) for i, image in enumerate(made))

  def condition(batch, coarse):
    return jnp.concatenate([batch["source"], coarse], -1) if sees_coarse else batch["source"]

  def init(key, batch):
    x = jnp.concatenate([batch["target"], condition(batch, batch["target"])], -1)
    return {"denoiser": network.init(key, x, jnp.zeros(len(x)))["params"]}

  def step(state, batch, key):
    noise_key, dropout_key, coarse_key = jax.random.split(key, 3)
    coarse = training_coarse(state, batch, coarse_key) if sees_coarse else None
    clean = batch["target"] - coarse if residual else batch["target"]
    noisy, level, wanted, weight = process.corrupted(noise_key, clean)
    seen = condition(batch, coarse)

    def loss(params):
      output = network.apply({"params": params}, jnp.concatenate([noisy, seen], -1), level,
                             deterministic=False, rngs={"dropout": dropout_key})
      error = weight * jnp.square(output - wanted)
      return losses.weighted_mean(error, losses.pixel_weight(batch))
    value, grads = jax.value_and_grad(loss)(state.nets["denoiser"])
    return update(state, txs, denoiser=grads), {process.prediction: value}

  def synthesize(state, batch, key):
    coarse = image_of(section.coarse, state, batch, key) if section.coarse else None
    seen = condition(batch, coarse)
    params = {"params": state.nets["denoiser"]}
    def predict(x, level):
      return network.apply(params, jnp.concatenate([x, seen], -1), level)
    image = samplers.sample(
      sampler, predict, example_keys(key, batch, config.synthesis.noise),
      (*batch["source"].shape[1:-1], channels),
      limits=(-1 - coarse, 1 - coarse) if residual else (-1.0, 1.0),
      start=(coarse, section.start_at) if section.combine == "start" else None)
    return jnp.clip(image + coarse if residual else image, -1, 1)

  txs = {"denoiser": optim.make(section.optim, section.steps)}
  note = "coarse images of training in fold" if sees_coarse and not folds(section) else ""
  return Method(init, step, synthesize, txs, keeps=("denoiser",), factor=network.factor,
                stochastic=True, note=note)


def _check(section, stage):
  if section.combine not in COMBINE:
    raise UserError(f"{stage}.combine={section.combine!r}: choose one of {', '.join(COMBINE)}")
  if section.combine != "concat" and not section.coarse:
    raise UserError(f"{stage}.combine={section.combine!r} needs a coarse image: name its stage by"
                    f" {stage}.coarse, or set {stage}.combine=concat")
