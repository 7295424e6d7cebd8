"""Schedules, timesteps and every step of the samplers against diffusers' schedulers.

Both run their own loop around the same network, a fixed formula, with the same fixed noise; the
images are compared before every evaluation and at the end. Where diffusers differs:
  tables      in float32; given ours of float64, its images agree with ours to 1e-5.
  DDIM        takes t - T // n for the previous step whatever the spacing, which is not the next
              sampled timestep of linspace, nor where n does not divide T. Here it is told.
  clipping    DDIM clips x0 but keeps the unclipped eps unless `use_clipped_model_output`, which is
              what we do; DPMSolverMultistep does not clip.
  dpm++       the last step to a clean image (`final_sigmas_type="zero"`) is of first order with
              `lower_order_final` on and off, as ours is.
  trailing    np.arange(T, 0, -T / n) has n + 1 members for some n; ours has n.
  offset      `steps_offset` (0 by default) moves leading timesteps up; we have none, since trailing
              timesteps do better what it is for.
"""

from fractions import Fraction

import jax
import numpy as np
import pytest
from test_samplers import FROZEN, FROZEN_KEYS, FROZEN_SHAPE, fixed_network, fixed_noise, make

from medsynth_jax.diffusion import samplers, schedules

diffusers = pytest.importorskip("diffusers")
torch = pytest.importorskip("torch")

CLASSES = {"ddpm": diffusers.DDPMScheduler, "ddim": diffusers.DDIMScheduler,
           "dpm++": diffusers.DPMSolverMultistepScheduler}
KINDS = {"v": "v_prediction", "eps": "epsilon", "x0": "sample"}
SCHEDULES = {"linear": ("linear", 1e-4, 0.02), "scaled_linear": ("scaled_linear", 0.0015, 0.0195),
             "palette": ("linear", 1e-6, 0.01), "cosine": ("squaredcos_cap_v2", 1e-4, 0.02)}


def torch_noise(step):
  return torch.tensor(np.asarray(fixed_noise(FROZEN_KEYS, step, FROZEN_SHAPE)))


@pytest.fixture(autouse=True)
def same_noise(monkeypatch):
  monkeypatch.setattr(samplers, "_noise", fixed_noise)


def ours(sampler, **options):
  """Images before each evaluation and at the end, [n + 1, B, ...]."""
  seen = []

  def predict(x, level):
    seen.append(np.asarray(x))
    return fixed_network(sampler.process.prediction, x, level[0])

  with jax.disable_jit():
    image = samplers.sample(sampler, predict, FROZEN_KEYS, FROZEN_SHAPE, **options)
  return np.stack([*seen, image])


def scheduler_of(sampler, schedule="linear", exact=True, **fields):
  """diffusers' counterpart; `exact`: with our tables."""
  ours = sampler.process.schedule
  beta, start, end = SCHEDULES[schedule]
  if sampler.name != "dpm++":
    fields.setdefault("clip_sample", False)
  scheduler = CLASSES[sampler.name](
    num_train_timesteps=len(ours.alpha_bar), beta_schedule=beta, beta_start=start, beta_end=end,
    timestep_spacing=sampler.spacing, prediction_type=KINDS[sampler.process.prediction], **fields)
  if exact:
    scheduler.alphas_cumprod = torch.tensor(ours.alpha_bar)
  scheduler.set_timesteps(sampler.steps)
  return scheduler


def theirs(scheduler, sampler, monkeypatch, **options):
  """The same of diffusers' loop."""
  log_snr = sampler.process.schedule.log_snr.astype(np.float32)
  times = scheduler.timesteps.tolist()
  total = len(log_snr)
  x = torch_noise(total)
  seen = [x.numpy()]
  for t, after in zip(times, [*times[1:], -1], strict=True):
    output = fixed_network(sampler.process.prediction, x.numpy(), log_snr[t])
    output = torch.tensor(np.asarray(output))
    if sampler.name == "ddim":
      if sampler.eta:
        options.update(eta=sampler.eta, variance_noise=torch_noise(t))
      scheduler.num_inference_steps = Fraction(total, t - after)  # so that T // n is the gap
    elif sampler.name == "ddpm":
      monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor",
                          lambda *args, t=t, **kwargs: torch_noise(t))
    x = scheduler.step(output, t, x, **options).prev_sample
    seen.append(x.numpy())
  return np.stack(seen)


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules(name, zero):
  beta, start, end = SCHEDULES[name]
  theirs = diffusers.DDPMScheduler(1000, start, end, beta, rescale_betas_zero_snr=zero)
  ours = schedules.make(name, 1000, zero_terminal_snr=zero).alpha_bar
  # float32 products of 1000 factors, each rounded
  np.testing.assert_allclose(theirs.alphas_cumprod, ours, rtol=0, atol=3e-6)


@pytest.mark.parametrize("name", samplers.NAMES)
@pytest.mark.parametrize("spacing", samplers.SPACINGS)
def test_timesteps(name, spacing):
  extra = 0
  scheduler = CLASSES[name](1000, timestep_spacing=spacing)
  for n in range(1, 1000):
    scheduler.set_timesteps(n)
    theirs = scheduler.timesteps.numpy()
    extra += len(theirs) - n
    ours = samplers.timesteps(1000, n, spacing, name == "dpm++")
    np.testing.assert_array_equal(ours, theirs[:n])
  assert extra == 0 or spacing == "trailing"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spacing", samplers.SPACINGS)
@pytest.mark.parametrize("name, eta, fields", [
  ("ddpm", 0.0, {}), ("ddim", 0.0, {}), ("ddim", 1.0, {}),
  ("dpm++", 0.0, {"lower_order_final": True}), ("dpm++", 0.0, {"lower_order_final": False})])
@pytest.mark.parametrize("steps", [4, 20])
def test_every_step(name, eta, fields, spacing, kind, steps, monkeypatch):
  sampler = make(name, steps, spacing, eta, kind)
  images = theirs(scheduler_of(sampler, **fields), sampler, monkeypatch)
  np.testing.assert_allclose(ours(sampler), images, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name, eta", [("ddpm", 0.0), ("ddim", 0.0), ("ddim", 1.0), ("dpm++", 0.0)])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_step_with_their_tables(name, eta, schedule, monkeypatch):
  sampler = make(name, 10, eta=eta, schedule=schedule)
  images = theirs(scheduler_of(sampler, schedule, exact=False), sampler, monkeypatch)
  np.testing.assert_allclose(ours(sampler), images, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name, eta", [("ddpm", 0.0), ("ddim", 0.0), ("ddim", 1.0)])
def test_clipped_steps(name, eta, monkeypatch):
  sampler = make(name, 10, eta=eta, kind="eps")
  options = {"use_clipped_model_output": True} if name == "ddim" else {}
  scheduler = scheduler_of(sampler, clip_sample=True, clip_sample_range=0.2)
  images = theirs(scheduler, sampler, monkeypatch, **options)
  assert abs(ours(sampler) - images).max() > 0.1
  np.testing.assert_allclose(ours(sampler, limits=(-0.2, 0.2)), images, atol=1e-5)


@pytest.mark.parametrize("name, eta", [("ddpm", 0.0), ("ddim", 0.0), ("ddim", 1.0)])
def test_steps_from_noise_without_signal(name, eta, monkeypatch):
  """Not dpm++: diffusers puts 2^-24 in the place of 0."""
  sampler = make(name, 10, eta=eta, zero_terminal_snr=True)
  scheduler = scheduler_of(sampler, rescale_betas_zero_snr=True)
  np.testing.assert_allclose(ours(sampler), theirs(scheduler, sampler, monkeypatch), atol=1e-5)


@pytest.mark.parametrize("name, eta, spacing", FROZEN)
def test_numbers_frozen_for_machines_without_diffusers(name, eta, spacing, monkeypatch):
  sampler = make(name, 4, spacing, eta)
  image = theirs(scheduler_of(sampler, exact=False), sampler, monkeypatch)[-1]
  np.testing.assert_allclose(image.ravel()[:3], FROZEN[name, eta, spacing], atol=1e-4)
