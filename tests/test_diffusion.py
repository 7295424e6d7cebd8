"""Noise schedules, parametrisations, loss weights, training levels, guidance, settings refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medsynth_jax.diffusion import guidance, parametrisation, process, samplers, schedules
from medsynth_jax.errors import UserError

KINDS = parametrisation.KINDS


@pytest.mark.parametrize("name, steps, start, end, last", [
  ("linear", 1000, 0, 0, 4.036e-5),          # DDPM
  ("scaled_linear", 1000, 0, 0, 1.423e-4),   # latent diffusion
  ("linear", 1000, 0.0015, 0.0195, 2.569e-5),
  ("scaled_linear", 1000, 0.00085, 0.012, 4.660e-3),  # Stable Diffusion
  ("palette", 2000, 0, 0, 4.386e-5),
])
def test_signal_left_at_the_end_is_the_published_one(name, steps, start, end, last):
  schedule = schedules.make(name, steps, start, end)
  assert schedule.alpha_bar[-1] == pytest.approx(last, rel=1e-3)
  assert schedule.alpha_bar.dtype == schedule.one_minus.dtype == np.float64


@pytest.mark.parametrize("name", schedules.SCHEDULES)
@pytest.mark.parametrize("zero", [False, True])
def test_schedules_fall_from_almost_1_and_both_arrays_agree(name, zero):
  schedule = schedules.make(name, 1000, zero_terminal_snr=zero)
  assert schedule.alpha_bar.shape == schedule.one_minus.shape == (1000,)
  assert np.all(np.diff(schedule.alpha_bar) < 0) and np.all(np.diff(schedule.log_snr) < 0)
  np.testing.assert_allclose(schedule.alpha_bar + schedule.one_minus, 1, atol=1e-15)


def test_cosine_is_the_papers_but_for_its_last_step():
  """alpha_bar = f(t) / f(0), f = cos^2; no beta is above 0.999."""
  angle = (np.arange(1001) / 1000 + 0.008) / 1.008 * np.pi / 2
  formula = np.square(np.cos(angle[1:]) / np.cos(angle[0]))
  alpha_bar = schedules.make("cosine", 1000).alpha_bar
  np.testing.assert_allclose(alpha_bar[:-1], formula[:-1], rtol=1e-9)
  assert alpha_bar[-1] / alpha_bar[-2] == pytest.approx(0.001)


def test_noise_of_palettes_first_steps_is_exact():
  noise = schedules.make("palette", 2000).one_minus
  step = (0.01 - 1e-6) / 1999
  np.testing.assert_allclose(noise[:2], [1e-6, 1e-6 + (1e-6 + step) * (1 - 1e-6)], rtol=1e-13)
  kept = schedules.make("palette", 2000, zero_terminal_snr=True).one_minus
  np.testing.assert_allclose(kept[0], 1e-6, rtol=1e-13)


@pytest.mark.parametrize("name", schedules.SCHEDULES)
def test_zero_terminal_snr_ends_in_noise_alone_and_keeps_the_first_step(name):
  plain, zero = (np.sqrt(schedules.make(name, 1000, zero_terminal_snr=z).alpha_bar)
                 for z in (False, True))
  assert zero[-1] == 0 and zero[0] == pytest.approx(plain[0], rel=1e-14)
  scaled = (plain - plain[-1]) * plain[0] / (plain[0] - plain[-1])  # systems.md, Lin et al.
  np.testing.assert_allclose(zero, scaled, atol=1e-15)
  assert schedules.make(name, 1000, zero_terminal_snr=True).log_snr[-1] == -np.inf


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("level", [-30.0, -10.0, 0.0, 10.0, 30.0])
def test_conversions_give_back_image_and_noise(kind, level):
  """To the rounding of x, divided by the factor with which the wanted part enters x."""
  x0, noise = np.random.default_rng(0).standard_normal((2, 3, 4, 4, 1)).astype(np.float32)
  levels = jnp.full((3,), level)
  x = parametrisation.add_noise(x0, noise, levels)
  output = parametrisation.target(kind, x0, noise, levels)
  signal, sigma = float(parametrisation.signal(level)), float(parametrisation.sigma(level))
  error_x0 = 1 / signal if kind == "eps" else 1
  error_eps = 1 / sigma if kind == "x0" else 1
  error_v = {"eps": 1 / signal, "x0": 1 / sigma, "v": 1}[kind]
  arguments = (kind, x, output, levels)
  v = signal * noise - sigma * x0
  for value, truth, scale in ((parametrisation.to_x0(*arguments), x0, error_x0),
                              (parametrisation.to_eps(*arguments), noise, error_eps),
                              (parametrisation.to_v(*arguments), v, error_v)):
    np.testing.assert_allclose(value, truth, rtol=0, atol=1e-6 * scale)


def test_conversions_are_exact_without_signal_and_without_noise():
  x0, noise = np.random.default_rng(0).standard_normal((2, 1, 4, 4, 1)).astype(np.float32)
  for level, x, v in ((-np.inf, noise, -x0), (np.inf, x0, noise)):
    levels = jnp.full((1,), level)
    np.testing.assert_array_equal(parametrisation.add_noise(x0, noise, levels), x)
    np.testing.assert_array_equal(parametrisation.target("v", x0, noise, levels), v)
    np.testing.assert_array_equal(parametrisation.to_x0("v", x, v, levels), x0)
    np.testing.assert_array_equal(parametrisation.to_eps("v", x, v, levels), noise)
  lowest = jnp.full((1,), -jnp.inf)  # without signal, an x0 still says what the noise was
  np.testing.assert_array_equal(parametrisation.to_eps("x0", noise, x0, lowest), noise)
  np.testing.assert_array_equal(parametrisation.to_v("x0", noise, x0, lowest), -x0)


def test_noise_and_signal_factors_are_precise_at_both_ends():
  level = np.array([-30, -13.8155, 0, 13.8155, 30], np.float32)
  exact = np.sqrt(1 / (1 + np.exp(-level.astype(np.float64))))
  np.testing.assert_allclose(jax.jit(parametrisation.signal)(level), exact, rtol=1e-6)
  np.testing.assert_allclose(jax.jit(parametrisation.sigma)(level), exact[::-1], rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_min_snr_is_the_formula_and_finite_everywhere(kind):
  gamma = 5.0
  level = np.linspace(-6, 6, 25).astype(np.float32)
  snr = np.exp(level.astype(np.float64))
  formula = np.minimum(snr, gamma) / {"eps": snr, "x0": 1, "v": snr + 1}[kind]
  weight = parametrisation.weight("min_snr", kind, level, gamma)
  np.testing.assert_allclose(weight, formula, rtol=1e-5)
  ends = np.array([-np.inf, -200, 200, np.inf], np.float32)
  weight = parametrisation.weight("min_snr", kind, ends, gamma)
  limits = {"eps": [1, 1, 0, 0], "x0": [0, 0, gamma, gamma], "v": [0, 0, 0, 0]}[kind]
  np.testing.assert_array_equal(weight, limits)
  np.testing.assert_array_equal(parametrisation.weight("none", kind, ends), np.ones(4))


@pytest.mark.parametrize("kind", KINDS)
def test_weighted_errors_are_the_same_whatever_is_predicted(kind):
  """Squared error of the output, weighted: min(SNR, gamma) times that of the x0 it means."""
  x0, noise, output = np.random.default_rng(0).standard_normal((3, 7, 5))
  level = np.linspace(-4, 4, 7).astype(np.float32)
  x = parametrisation.add_noise(x0, noise, level)
  error = np.square(output - parametrisation.target(kind, x0, noise, level)).mean(1)
  meant = np.square(parametrisation.to_x0(kind, x, output, level) - x0).mean(1)
  here = process.make({**process.DEFAULTS, "prediction": kind, "weighting": "min_snr"})
  np.testing.assert_allclose(here.weight(level) * error, np.minimum(np.exp(level), 5) * meant,
                             rtol=2e-4)


def test_levels_are_those_of_the_steps_drawn_evenly():
  here = process.make({**process.DEFAULTS, "steps": 10})
  level = np.asarray(jax.jit(here.levels, static_argnums=1)(jax.random.key(0), 10_000))
  values, counts = np.unique(level, return_counts=True)
  np.testing.assert_array_equal(values, here.schedule.log_snr[::-1].astype(np.float32))
  assert np.all(abs(counts - 1000) < 5 * np.sqrt(900))


@pytest.mark.parametrize("zero", [False, True])
def test_continuous_levels_lie_between_their_neighbours_evenly_in_alpha_bar(zero):
  here = process.make({**process.DEFAULTS, "schedule": "palette", "steps": 50, "continuous": True,
                       "beta_end": 0.2, "prediction": "v", "zero_terminal_snr": zero})
  level = np.asarray(here.levels(jax.random.key(1), 50_000), np.float64)
  assert np.all(level >= here.schedule.log_snr[-1] - 1e-5) and not np.isnan(level).any()
  edges = np.concatenate([[0.0], here.schedule.one_minus])
  noise = 1 / (1 + np.exp(level))
  counts, _ = np.histogram(noise, edges)  # each gap between steps is drawn equally often
  assert np.all(abs(counts - 1000) < 5 * np.sqrt(1000))
  step = np.clip(np.searchsorted(edges, noise) - 1, 0, 49)
  place = (noise - edges[step]) / np.diff(edges)[step]
  assert len(np.unique(level[step == 0])) > 900  # not rounded, where 1 - alpha_bar is below 1e-6
  assert place.mean() == pytest.approx(0.5, abs=5 * 0.29 / np.sqrt(50_000))


def test_guidance_of_weight_1_evaluates_the_conditional_alone():
  calls = []

  def predict(x, level, code):
    calls.append(x.shape)
    return x * code[:, None] + level[:, None]

  x, level, code = jnp.ones((3, 2)), jnp.zeros(3), jnp.array([0, 1, 0])
  alone = guidance.classifier_free(predict, 1.0)(x, level, code, 2)
  np.testing.assert_array_equal(alone, predict(x, level, code))
  traced = [str(jax.make_jaxpr(f)(x, level, code)) for f in (
    predict, lambda x, level, code: guidance.classifier_free(predict, 1)(x, level, code, 2))]
  assert traced[0] == traced[1]
  calls.clear()
  guided = guidance.classifier_free(predict, 1.5)(x, level, code, 2)
  assert calls == [(3, 2)]  # both codes by vmap: traced once, the batch keeps its shape
  null = predict(x, level, jnp.full(3, 2))
  np.testing.assert_allclose(guided, null + 1.5 * (predict(x, level, code) - null))
  np.testing.assert_array_equal(
    guided, guidance.classifier_free(predict, 1.5)(x, level, code, jnp.array([2, 2, 2])))


@pytest.mark.parametrize("fields, message", [
  ({"schedule": "sigmoid"}, "linear, scaled_linear, cosine, palette"),
  ({"prediction": "score"}, "eps, x0, v"),
  ({"weighting": "p2"}, "none, min_snr"),
  ({"min_snr_gamma": 0.0}, "above 0"),
  ({"steps": 1}, "2 steps or more"),
  ({"beta_start": 0.03}, "rising"),
  ({"beta_end": 1.5}, "below 1"),
  ({"schedule": "cosine", "beta_end": 0.02}, "cosine"),
  ({"zero_terminal_snr": True}, "set prediction to 'v' or 'x0'"),
])
def test_processes_that_make_no_sense_are_refused(fields, message):
  with pytest.raises(UserError, match=message):
    process.make({**process.DEFAULTS, **fields})


@pytest.mark.parametrize("fields, message", [
  ({"name": "euler"}, "ddpm, ddim, dpm"),
  ({"spacing": "karras"}, "trailing, leading, linspace"),
  ({"steps": 101}, "1 to 100"),
  ({"steps": 0}, "1 to 100"),
  ({"name": "dpm++", "steps": 100, "spacing": "linspace"}, "1 to 99"),
  ({"eta": 1.5}, "from 0 to 1"),
  ({"name": "ddpm", "eta": 0.5}, "0 for ddpm"),
])
def test_samplers_that_make_no_sense_are_refused(fields, message):
  here = process.make({**process.DEFAULTS, "steps": 100})
  with pytest.raises(UserError, match=message):
    samplers.make({**samplers.DEFAULTS, **fields}, here)
