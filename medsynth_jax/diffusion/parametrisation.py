"""What a network predicts (noise eps, image x0 or velocity v), and how its errors are weighted.

Throughout x = signal x0 + sigma eps and v = signal eps - sigma x0 (Salimans & Ho 2022). Images are
[B, ...], levels are log-SNRs [B].
"""

import jax
import jax.numpy as jnp

from medsynth_jax.errors import UserError

KINDS = ("eps", "x0", "v")
WEIGHTINGS = ("none", "min_snr")


def signal(level: jax.Array) -> jax.Array:
  """Factor of the image at a log-SNR, sqrt(sigmoid(level)): exactly 0 at -inf."""
  return 1 / jnp.sqrt(1 + jnp.exp(-level))


def sigma(level: jax.Array) -> jax.Array:
  """Factor of the noise at a log-SNR, sqrt(sigmoid(-level)): exactly 1 at -inf."""
  return signal(-level)


def _factors(x, level):
  level = jnp.asarray(level, jnp.float32)
  level = level.reshape(level.shape + (1,) * (x.ndim - level.ndim))
  return signal(level), sigma(level)


def check(kind: str) -> None:
  """A UserError unless `kind` is one of KINDS."""
  if kind not in KINDS:
    raise UserError(f"prediction={kind!r}: choose one of {', '.join(KINDS)}")


def add_noise(x0: jax.Array, noise: jax.Array, level: jax.Array) -> jax.Array:
  """The noisy image x."""
  a, s = _factors(x0, level)
  return a * x0 + s * noise


def target(kind: str, x0: jax.Array, noise: jax.Array, level: jax.Array) -> jax.Array:
  """What a network of that kind should give."""
  check(kind)
  a, s = _factors(x0, level)
  return {"eps": noise, "x0": x0, "v": a * noise - s * x0}[kind]


def to_x0(kind: str, x: jax.Array, output: jax.Array, level: jax.Array) -> jax.Array:
  """The image that an output means; not finite for "eps" at a log-SNR of -inf, where none is."""
  check(kind)
  a, s = _factors(x, level)
  if kind == "eps":
    return (x - s * output) / a
  return output if kind == "x0" else a * x - s * output


def to_eps(kind: str, x: jax.Array, output: jax.Array, level: jax.Array) -> jax.Array:
  """The noise that an output means; not finite for "x0" at a log-SNR of +inf, where none is."""
  check(kind)
  a, s = _factors(x, level)
  if kind == "x0":
    return (x - a * output) / s
  return output if kind == "eps" else s * x + a * output


def to_v(kind: str, x: jax.Array, output: jax.Array, level: jax.Array) -> jax.Array:
  """The velocity that an output means; not finite where `to_x0` or `to_eps` is not."""
  check(kind)
  a, s = _factors(x, level)
  if kind == "eps":
    return (output - s * x) / a
  return output if kind == "v" else (a * x - output) / s


def weight(weighting: str, kind: str, level: jax.Array, gamma: float = 5.0) -> jax.Array:
  """Weights [B] of the squared errors of a network of that kind.

  "min_snr" (Hang et al. 2023) weights the error of x0 by min(SNR, gamma), whatever is predicted:
  an error of eps is 1 / SNR of that, one of v is 1 / (SNR + 1). Finite at every level; for x0 and
  v it is 0 where no signal is left, so that step T of a zero-terminal-SNR schedule is not trained.
  """
  check(kind)
  level = jnp.asarray(level, jnp.float32)
  if weighting == "none":
    return jnp.ones_like(level)
  if weighting != "min_snr":
    raise UserError(f"weighting={weighting!r}: choose one of {', '.join(WEIGHTINGS)}")
  if kind == "eps":
    return jnp.minimum(1.0, gamma * jnp.exp(-level))
  if kind == "x0":
    return jnp.minimum(jnp.exp(level), gamma)
  return jnp.minimum(jnp.square(signal(level)), gamma * jnp.square(sigma(level)))
