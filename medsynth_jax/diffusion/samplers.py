"""Samplers: from noise to an image in one `lax.scan` over precomputed coefficients.

All three are linear in what they know. With a step from (signal, sigma) to (signal', sigma'), the
cleaner of two neighbouring sampled levels (the last step ends at signal' = 1, sigma' = 0):

  x' = A x + B x0 + C (x0 of the step before) + D noise

  ddim    DDIM (Song et al. 2021, eq. 12, 16): D = eta times the posterior's standard deviation,
          A = sqrt(sigma'^2 - D^2) / sigma, B = signal' - signal A. The noise is thereby taken from
          x and the clipped x0, never from an unclipped output.
  ddpm    Ancestral (Ho et al. 2020, eq. 6, 7, with alpha_bar at the previous SAMPLED step):
          identical to ddim with eta = 1.
  dpm++   DPM-Solver++ 2M (Lu et al. 2022, algorithm 2): ddim's A; its B, call it E, is shared
          between x0 and the one before: B = E (1 + r / 2), C = -E r / 2, with r the step in
          log-SNR over the step before it. First order in the first step, in the last (which is
          infinite) and after a level without signal.

Timesteps are positions 0..T-1 in the schedule, as diffusers spaces them with steps_offset = 0:
  trailing  round(T - i T / n) - 1: starts at the last step, where training ends
  leading   multiples of T // n from 0 upwards: never reaches the last step
  linspace  n points from the last step down to 0
For dpm++, leading and linspace are made for n + 1 points and leave 0 out, whose level is so clean
that an evaluation of the network there changes nothing.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from medsynth_jax.diffusion import parametrisation
from medsynth_jax.diffusion.process import Process
from medsynth_jax.errors import UserError

NAMES = ("ddpm", "ddim", "dpm++")
SPACINGS = ("trailing", "leading", "linspace")

# fields of a config section, for `make`
DEFAULTS = {
  "name": "ddim",         # or "ddpm", "dpm++"
  "steps": 50,            # evaluations of the network (twice that with guidance)
  "spacing": "trailing",  # or "leading", "linspace"
  "eta": 0.0,             # ddim's share of fresh noise: 0 none, 1 as ddpm
}


@dataclasses.dataclass(frozen=True, eq=False)
class Sampler:
  """How an image is drawn: see `make`."""

  name: str
  steps: int
  spacing: str
  eta: float
  process: Process


def make(fields: Mapping[str, Any], process: Process) -> Sampler:
  """The sampler that a config section with the fields of DEFAULTS describes.

  `process` need not be the one of training: a network that is told the log-SNR can be sampled on
  another schedule, as Palette does.

  Raises:
    UserError: unknown name or spacing, more steps than the process has, eta where it means nothing.
  """
  name, steps, spacing, eta = (fields[key] for key in ("name", "steps", "spacing", "eta"))
  if name not in NAMES:
    raise UserError(f"sampler {name!r}: choose one of {', '.join(NAMES)}")
  if spacing not in SPACINGS:
    raise UserError(f"spacing={spacing!r}: choose one of {', '.join(SPACINGS)}")
  total = len(process.schedule.alpha_bar)
  most = total - 1 if name == "dpm++" and spacing != "trailing" else total
  if not 1 <= steps <= most:
    raise UserError(f"sampler steps={steps}: {name} with {spacing} spacing takes 1 to {most} of the"
                    f" process's {total} steps")
  if not 0 <= eta <= 1 or (eta and name != "ddim"):
    raise UserError(f"eta={eta}: from 0 to 1 for ddim, 0 for ddpm and dpm++")
  return Sampler(name, int(steps), spacing, float(eta), process)


def timesteps(total: int, steps: int, spacing: str, skip_first: bool = False) -> np.ndarray:
  """Sampled positions 0..total-1 in the schedule, falling, int [steps].

  `skip_first`: leading and linspace with one point more, less the last of them (position 0).
  """
  if spacing == "trailing":
    falling = np.arange(total, 0, -total / steps)[:steps]  # rounding may add one that is ~ 0
    return np.round(falling).astype(int) - 1
  points = steps + skip_first
  if spacing == "leading":
    rising = np.arange(points) * (total // points)
  else:
    rising = np.round(np.linspace(0, total - 1, points)).astype(int)
  return rising[::-1][:steps]


def _sampled(sampler: Sampler) -> np.ndarray:
  return timesteps(len(sampler.process.schedule.alpha_bar), sampler.steps, sampler.spacing,
                   sampler.name == "dpm++")


def coefficients(sampler: Sampler, times: np.ndarray) -> np.ndarray:
  """A, B, C, D of the steps from each of `times` to the next, the last to a clean image.

  float64 [n, 4]; see the head of this file.
  """
  schedule = sampler.process.schedule
  a, noise = schedule.alpha_bar[times], schedule.one_minus[times]
  p, noise_p = np.append(a[1:], 1.0), np.append(noise[1:], 0.0)
  beta = np.append((noise[:-1] - noise_p[:-1]) / p[:-1], noise[-1])  # 1 - a / p
  eta = {"ddpm": 1.0, "ddim": sampler.eta, "dpm++": 0.0}[sampler.name]
  fresh = eta**2 * beta * noise_p / noise
  keep = np.sqrt(np.maximum(noise_p - fresh, 0.0) / noise)
  image = np.sqrt(p) - np.sqrt(a) * keep
  earlier = np.zeros_like(image)
  if sampler.name == "dpm++":
    step = np.diff(schedule.log_snr[times])  # infinite after a level without signal
    earlier[1:-1] = -image[1:-1] * step[1:] / step[:-1] / 2
  return np.stack([keep, image - earlier, earlier, np.sqrt(fresh)], -1)


def _noise(keys: jax.Array, step: jax.Array, shape: Sequence[int]) -> jax.Array:
  """Standard normal [B, *shape], each example's from its own key."""
  def one(key):
    return jax.random.normal(jax.random.fold_in(key, step), shape)

  if "threefry" in str(jax.random.key_impl(keys)):
    return jax.vmap(one)(keys)
  # under vmap, the rbg generators draw the whole batch from its first key
  return jax.lax.map(one, keys)


def _first(times: np.ndarray, share: float, total: int) -> int:
  if not 0 < share <= 1:
    raise UserError(f"start share={share}: must be above 0 and at most 1")
  below = np.flatnonzero(times <= round(share * total) - 1)
  if not len(below):
    raise UserError(f"start share={share}: none of the sampler's {len(times)} steps is that low;"
                    " take a larger share or more steps")
  return int(below[0])


def sample(sampler: Sampler, predict: Callable, keys: jax.Array, shape: Sequence[int], *,
           limits=None, start=None) -> jax.Array:
  """Draws an image for each key, to be traced inside jit together with the network.

  Args:
    sampler: from `make`.
    predict: (x float32 [B, *shape], level float32 [B]) -> output [B, *shape] of the kind that
      `sampler.process.prediction` names; level is the log-SNR of x.
    keys: typed keys [B]; an example's noise depends on its own key alone: that of the step from
      position t is drawn with fold_in(key, t), the first image with fold_in(key, T).
    shape: of one image, channels last.
    limits: (low, high), numbers or arrays, to which every predicted x0 is clipped (pixels); None
      for latents.
    start: (image [B, *shape], share): begin from the image with the noise of step share * T, and
      take only the sampled steps at or below it, share above 0 and at most 1.

  Returns:
    float32 [B, *shape].

  Raises:
    UserError: a share out of range, or below all sampled steps.
  """
  schedule, kind = sampler.process.schedule, sampler.process.prediction
  total, times = len(schedule.alpha_bar), _sampled(sampler)
  if start is not None:
    times = times[_first(times, start[1], total):]
  table = coefficients(sampler, times)
  levels = schedule.log_snr[times].astype(np.float32)
  draws, looks_back = bool(table[:, 3].any()), sampler.name == "dpm++"

  def step(carry, now):
    x, before = carry
    time, level, (keep, image, earlier, fresh) = now
    level = jnp.broadcast_to(level, keys.shape)
    x0 = to_image(x, level)
    x = keep * x + image * x0
    if looks_back:
      x = x + earlier * before
    if draws:
      x = x + fresh * _noise(keys, time, shape)
    return (x, x0 if looks_back else None), None

  def to_image(x, level):
    x0 = parametrisation.to_x0(kind, x, predict(x, level).astype(jnp.float32), level)
    return x0 if limits is None else jnp.clip(x0, *limits)

  x = _noise(keys, total, shape)
  if start is not None:
    level = jnp.full(keys.shape, levels[0])
    x = parametrisation.add_noise(jnp.asarray(start[0], jnp.float32), x, level)
  scanned = (jnp.asarray(times), jnp.asarray(levels), jnp.asarray(table, jnp.float32))
  (x, _), _ = jax.lax.scan(step, (x, jnp.zeros_like(x) if looks_back else None), scanned)
  return x
