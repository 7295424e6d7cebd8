"""A diffusion process as a config describes it: schedule, prediction, weights, training levels."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from medsynth_jax.diffusion import parametrisation, schedules
from medsynth_jax.diffusion.schedules import Schedule
from medsynth_jax.errors import UserError

# fields of a config section, for `make`
DEFAULTS = {
  "schedule": "linear",        # see `schedules.SCHEDULES`
  "steps": 1000,               # T: "palette" is meant for 2000
  "beta_start": 0.0, "beta_end": 0.0,  # 0: the schedule's own
  "zero_terminal_snr": False,  # no signal at all after step T; not with "eps"
  "prediction": "eps",         # what the network gives: "eps", "x0" or "v"
  "weighting": "none",         # or "min_snr"
  "min_snr_gamma": 5.0,
  "continuous": False,         # train on levels between the steps too, as Palette does
}


@dataclasses.dataclass(frozen=True, eq=False)
class Process:
  """A noise schedule, what the network predicts, and how it is trained."""

  schedule: Schedule
  prediction: str = "eps"
  weighting: str = "none"
  gamma: float = 5.0
  continuous: bool = False

  def levels(self, key: jax.Array, n: int) -> jax.Array:
    """Log-SNRs float32 [n] to train on: steps drawn uniformly, independently of each other.

    If `continuous`, alpha_bar is drawn uniformly between a step's value and that of the step
    before it, which is 1 before the first (Chen et al. 2021, WaveGrad, algorithm 1).
    """
    step_key, place_key = jax.random.split(key)
    step = jax.random.randint(step_key, (n,), 0, len(self.schedule.alpha_bar))
    if not self.continuous:
      return jnp.asarray(self.schedule.log_snr, jnp.float32)[step]
    place = 1 - jax.random.uniform(place_key, (n,))  # above 0: never an image without noise

    def between(values, before):  # noise and signal apart: no difference of almost equal numbers
      values = jnp.asarray(np.concatenate([[before], values]), jnp.float32)
      return (1 - place) * values[step] + place * values[step + 1]

    return (jnp.log(between(self.schedule.alpha_bar, 1.0))
            - jnp.log(between(self.schedule.one_minus, 0.0)))

  def weight(self, level: jax.Array) -> jax.Array:
    """Weights [B] of the network's squared errors at these levels."""
    return parametrisation.weight(self.weighting, self.prediction, level, self.gamma)

  def corrupted(self, key: jax.Array, clean: jax.Array
                ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """A training example of each image of `clean` [B, ...].

    Returns (noisy image, its level [B], what the network should give for it, the weight [B, 1, ...]
    of its squared error).
    """
    level_key, noise_key = jax.random.split(key)
    level = self.levels(level_key, len(clean))
    noise = jax.random.normal(noise_key, clean.shape)
    return (parametrisation.add_noise(clean, noise, level), level,
            parametrisation.target(self.prediction, clean, noise, level),
            self.weight(level).reshape((-1,) + (1,) * (clean.ndim - 1)))


def make(fields: Mapping[str, Any]) -> Process:
  """The process that a config section with the fields of DEFAULTS describes.

  Raises:
    UserError: a name that is none, numbers out of range, "eps" without any signal at the end.
  """
  parametrisation.check(fields["prediction"])
  if fields["weighting"] not in parametrisation.WEIGHTINGS:
    raise UserError(f"weighting={fields['weighting']!r}: choose one of"
                    f" {', '.join(parametrisation.WEIGHTINGS)}")
  if fields["min_snr_gamma"] <= 0:
    raise UserError(f"min_snr_gamma={fields['min_snr_gamma']}: must be above 0")
  if fields["zero_terminal_snr"] and fields["prediction"] == "eps":
    raise UserError("zero_terminal_snr with prediction='eps': noise alone says nothing of the image"
                    " at step T; set prediction to 'v' or 'x0'")
  schedule = schedules.make(fields["schedule"], fields["steps"], fields["beta_start"],
                            fields["beta_end"], fields["zero_terminal_snr"])
  return Process(schedule, fields["prediction"], fields["weighting"],
                 float(fields["min_snr_gamma"]), bool(fields["continuous"]))
