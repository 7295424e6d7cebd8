"""Noise schedules: how much of an image is left after each step of the forward process."""

import dataclasses

import numpy as np

from medsynth_jax.errors import UserError


@dataclasses.dataclass(frozen=True, eq=False)
class Schedule:
  """Signal and noise after steps 1..T, at positions 0..T-1.

  1 - alpha_bar has an array of its own, since the difference loses a beta of 1e-6 to rounding.

  Attributes:
    alpha_bar: share of the variance that is signal, float64 [T], decreasing.
    one_minus: 1 - alpha_bar, float64 [T].
  """

  alpha_bar: np.ndarray
  one_minus: np.ndarray

  @property
  def log_snr(self) -> np.ndarray:
    """log(alpha_bar) - log(1 - alpha_bar), float64 [T]; -inf where no signal is left."""
    with np.errstate(divide="ignore"):
      return np.log(self.alpha_bar) - np.log(self.one_minus)


def _linear(steps: int, start: float, end: float) -> np.ndarray:
  return np.linspace(start, end, steps)


def _scaled_linear(steps: int, start: float, end: float) -> np.ndarray:
  return np.square(np.linspace(np.sqrt(start), np.sqrt(end), steps))


def _cosine(steps: int, start: float, end: float) -> np.ndarray:
  del start, end
  signal = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * np.pi / 2)
  return np.minimum(1 - np.square(signal[1:] / signal[:-1]), 0.999)


# name: (betas, first and last beta unless given)
SCHEDULES = {
  "linear": (_linear, 1e-4, 0.02),                   # Ho et al. 2020, T = 1000
  "scaled_linear": (_scaled_linear, 0.0015, 0.0195),  # Rombach et al. 2022, T = 1000
  "cosine": (_cosine, 0.0, 0.0),                     # Nichol & Dhariwal 2021
  "palette": (_linear, 1e-6, 0.01),                  # Saharia et al. 2022, T = 2000
}


def make(name: str, steps: int, start: float = 0.0, end: float = 0.0,
         zero_terminal_snr: bool = False) -> Schedule:
  """The schedule of that name with T = `steps`.

  "linear" is linear in beta; "scaled_linear" in its root, which latent diffusion calls linear. The
  betas do not depend on T: another T than the schedule's own leaves more or less signal at its end.

  Args:
    name: one of SCHEDULES.
    steps: T, 2 or more.
    start: first beta; 0 for the schedule's own.
    end: last beta; 0 for the schedule's own.
    zero_terminal_snr: shift and stretch the signal to be exactly 0 after the last step and
      unchanged after the first (Lin et al. 2024, algorithm 1).

  Raises:
    UserError: unknown name, fewer than 2 steps, betas outside 0..1 or not rising, betas for cosine.
  """
  if name not in SCHEDULES:
    raise UserError(f"schedule={name!r}: choose one of {', '.join(SCHEDULES)}")
  if steps < 2:
    raise UserError(f"steps={steps}: a noise schedule needs 2 steps or more")
  betas, default_start, default_end = SCHEDULES[name]
  if name == "cosine" and (start or end):
    raise UserError("beta_start, beta_end: the cosine schedule has none, leave them at 0")
  start, end = start or default_start, end or default_end
  if name != "cosine" and not 0 < start <= end < 1:
    raise UserError(f"beta_start={start}, beta_end={end}: must be above 0, below 1 and rising")
  log_alpha_bar = np.cumsum(np.log1p(-betas(steps, start, end)))
  if zero_terminal_snr:
    return _zero_terminal(log_alpha_bar)
  return Schedule(np.exp(log_alpha_bar), -np.expm1(log_alpha_bar))


def _zero_terminal(log_alpha_bar: np.ndarray) -> Schedule:
  lost = -np.expm1(log_alpha_bar / 2)  # 1 - signal, precise where the signal is almost 1
  first, last = lost[0], lost[-1]
  signal = (last - lost) * (1 - first) / (last - first)
  lost = first + (lost - first) * (1 - first) / (last - first)
  return Schedule(np.square(signal), lost * (1 + signal))
