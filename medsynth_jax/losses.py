"""Losses of images and discriminators, weighted by where and whether both sides were measured."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from medsynth_jax.errors import UserError


def weighted_mean(error: jax.Array, weight: jax.Array) -> jax.Array:
  """Sum of weighted errors over max(1, sum of weights); `weight` broadcasts over channels."""
  weight = jnp.broadcast_to(weight, error.shape)
  return jnp.sum(error * weight) / jnp.maximum(1.0, jnp.sum(weight))


def pixel_weight(batch) -> jax.Array:
  """[B, *space, 1]: valid voxels of paired examples."""
  paired = batch["paired"].reshape((-1,) + (1,) * (batch["valid"].ndim - 1))
  return batch["valid"] * paired


def l1(image: jax.Array, target: jax.Array, weight: jax.Array) -> jax.Array:
  return weighted_mean(jnp.abs(image - target), weight)


def l2(image: jax.Array, target: jax.Array, weight: jax.Array) -> jax.Array:
  return weighted_mean(jnp.square(image - target), weight)


PIXEL = {"l1": l1, "l2": l2}


def kl(mean: jax.Array, std: jax.Array) -> jax.Array:
  """KL divergence of N(mean, std^2) from N(0, 1), summed over an image, averaged over images."""
  each = 0.5 * (jnp.square(mean) + jnp.square(std) - 1) - jnp.log(std)
  return each.reshape(len(each), -1).sum(1).mean()


def outside_background(image: jax.Array, valid: jax.Array) -> jax.Array:
  """The image, -1 outside the field of view: there a discriminator sees real and fake alike."""
  return jnp.where(valid > 0, image, -1.0)


def _least_squares(logits: jax.Array, real: bool) -> jax.Array:
  return jnp.square(logits - (1.0 if real else 0.0))


def _cross_entropy(logits: jax.Array, real: bool) -> jax.Array:
  return jax.nn.softplus(-logits if real else logits)


GAN = {"lsgan": _least_squares, "cross_entropy": _cross_entropy}


def gan(kind: str):
  """The objective of that name: (logits, real) -> per-patch loss.

  "lsgan" (Mao et al. 2017) or "cross_entropy", non-saturating for the generator (Goodfellow 2014).
  """
  if kind not in GAN:
    raise UserError(f"gan={kind!r}: choose one of {', '.join(GAN)}")
  return GAN[kind]


def per_example(loss: jax.Array, weight: jax.Array) -> jax.Array:
  """Patch losses averaged over each example, then over examples by `weight` [B]."""
  return weighted_mean(loss.reshape(len(loss), -1).mean(1), weight)


def gradient_penalty(judge: Callable, real: jax.Array, fake: jax.Array, key: jax.Array
                     ) -> jax.Array:
  """Mean over examples of (|d judge / d z| - 1)^2 at z = u real + (1 - u) fake, u ~ U(0, 1).

  `judge` gives the patch values of images [B, *space, C], of which the sum is derived, as StarGAN
  does; the norm is over all pixels of an example (Gulrajani et al., arXiv 1704.00028).
  """
  u = jax.random.uniform(key, (len(real),) + (1,) * (real.ndim - 1))
  # an example's values depend on that example alone
  slope = jax.grad(lambda z: judge(z).sum())(u * real + (1 - u) * fake).reshape(len(real), -1)
  # the square root has no derivative at 0, where an untrained discriminator may be
  return jnp.square(jnp.sqrt(jnp.square(slope).sum(1) + 1e-12) - 1).mean()


def class_error(logits: jax.Array, category: jax.Array) -> jax.Array:
  """Cross-entropy of class logits [B, n] against categories [B], averaged over examples."""
  return optax.softmax_cross_entropy_with_integer_labels(logits, category).mean()
