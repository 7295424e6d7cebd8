"""Samplers against closed forms: Gaussian pixels, whose optimal denoiser and flow are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medsynth_jax.diffusion import guidance, parametrisation, process, samplers, schedules
from medsynth_jax.errors import UserError

MEAN, SD = 0.3, 0.5
SHAPE = (64, 64, 1)
ALL = [("ddpm", 0.0), ("ddim", 0.0), ("ddim", 0.5), ("ddim", 1.0), ("dpm++", 0.0)]


def gaussian(kind, mean=MEAN, sd=SD):
  """The optimal network for pixels N(mean, sd^2): the posterior mean of x0, or eps, or v."""
  def predict(x, level):
    a, s = (f(level).reshape(-1, *(1,) * (x.ndim - 1))
            for f in (parametrisation.signal, parametrisation.sigma))
    off = (x - a * mean) / (a**2 * sd**2 + s**2)
    return {"x0": mean + a * sd**2 * off, "eps": s * off,
            "v": a * s * (1 - sd**2) * off - s * mean}[kind]
  return predict


def make(name="ddim", steps=50, spacing="trailing", eta=0.0, kind="v", **fields):
  here = process.make({**process.DEFAULTS, "prediction": kind, **fields})
  return samplers.make({"name": name, "steps": steps, "spacing": spacing, "eta": eta}, here)


def keys_of(n=4, seed=0, impl="rbg"):
  """Typed keys [n]; samplers compile twice as fast with rbg."""
  return jax.random.split(jax.random.key(seed, impl=impl), n)


def drawing(sampler, predict=None, shape=SHAPE, **options):
  """keys -> images, compiled once a batch size."""
  predict = predict or gaussian(sampler.process.prediction)
  return jax.jit(lambda keys: samplers.sample(sampler, predict, keys, shape, **options))


def draw(sampler, predict=None, keys=None, shape=SHAPE, **options):
  keys = keys_of() if keys is None else keys
  return np.asarray(drawing(sampler, predict, shape, **options)(keys))


def trajectory(sampler, predict, keys, shape, **options):
  """What the network was asked at every step, [(x, level)], and the image."""
  seen = []

  def recording(x, level):
    jax.debug.callback(lambda *asked: seen.append([np.asarray(a) for a in asked]), x, level,
                       ordered=True)
    return predict(x, level)

  image = draw(sampler, recording, keys, shape, **options)
  jax.effects_barrier()
  return seen, image


def moments(sampler, mean=MEAN, sd=SD):
  """Mean and variance that systems.md's steps give Gaussian pixels, carried in float64."""
  schedule = sampler.process.schedule
  at = 999 - np.arange(sampler.steps) * (1000 // sampler.steps)
  m, var = 0.0, 1.0
  for a, p in zip(schedule.alpha_bar[at], np.append(schedule.alpha_bar[at[1:]], 1.0), strict=True):
    b = 1 - a / p
    fresh = b * (1 - p) / (1 - a) * (1.0 if sampler.name == "ddpm" else sampler.eta**2)
    slope = np.sqrt(a) * sd**2 / (a * sd**2 + 1 - a)  # of x0 in x
    x0 = mean + slope * (m - np.sqrt(a) * mean)
    if sampler.name == "ddpm":
      image, old = np.sqrt(p) * b / (1 - a), np.sqrt(a / p) * (1 - p) / (1 - a)
    else:
      old = np.sqrt(max(1 - p - fresh, 0) / (1 - a))
      image = np.sqrt(p) - np.sqrt(a) * old
    m, var = image * x0 + old * m, (image * slope + old)**2 * var + fresh
  return m, var


def close_to_moments(images, mean, var):
  n = images.size
  assert images.mean() == pytest.approx(mean, abs=4 * np.sqrt(var / n))
  assert images.var() == pytest.approx(var, rel=4 * np.sqrt(2 / n))


@pytest.mark.parametrize("name, eta, steps", [
  ("ddpm", 0.0, 1000), ("ddpm", 0.0, 50), ("ddim", 0.0, 50), ("ddim", 1.0, 50), ("ddim", 0.5, 10)])
def test_samples_have_the_mean_and_variance_of_the_steps(name, eta, steps):
  sampler = make(name, steps, eta=eta)
  close_to_moments(draw(sampler), *moments(sampler))


@pytest.mark.parametrize("name, eta, steps, left", [
  ("ddpm", 0.0, 1000, 0.042), ("ddim", 0.0, 500, 0.011), ("ddim", 1.0, 1000, 0.042),
  ("dpm++", 0.0, 250, 0.0)])
def test_samples_have_the_mean_and_variance_of_the_data(name, eta, steps, left):
  """`left`: share of the variance that so many steps cannot give back."""
  close_to_moments(draw(make(name, steps, eta=eta)), MEAN, SD**2 * (1 - left))


@pytest.mark.parametrize("name, eta, spacing", [
  *[(*which, "trailing") for which in ALL], ("ddpm", 0.0, "leading"), ("ddpm", 0.0, "linspace")])
def test_on_the_way_samples_of_a_point_are_the_point_with_that_steps_noise(name, eta, spacing):
  """Exact for any steps: the fresh noise must fit the previous sampled step, not t - 1."""
  sampler = make(name, 9, spacing, eta, zero_terminal_snr=True)
  seen, image = trajectory(sampler, gaussian("v", sd=0.0), keys_of(2), SHAPE)
  assert len(seen) == 9
  for x, level in seen[0 if spacing != "leading" else 1:]:
    snr = np.exp(level[0].astype(np.float64))
    close_to_moments(x, MEAN * np.sqrt(snr / (1 + snr)), 1 / (1 + snr))
  np.testing.assert_allclose(image, MEAN, atol=1e-5)


@pytest.mark.parametrize("name, eta", [("ddpm", 0.0), ("ddim", 0.0), ("dpm++", 0.0)])
def test_predictions_of_eps_x0_and_v_give_the_same_image(name, eta):
  images = [draw(make(name, 20, eta=eta, kind=kind)) for kind in parametrisation.KINDS]
  np.testing.assert_allclose(images[0], images[1], atol=1e-5)
  np.testing.assert_allclose(images[2], images[1], atol=1e-5)


def error_of_flow(name, steps, level):
  """Distance from the exact probability flow of the same noise, at the last level of the steps."""
  snr = np.exp(level)
  here = process.Process(schedules.Schedule(snr / (1 + snr), 1 / (1 + snr)), "x0")
  sampler = samplers.make({"name": name, "steps": steps, "spacing": "trailing", "eta": 0.0}, here)
  keys, shape = keys_of(2), (8, 8, 1)
  image = draw(sampler, keys=keys, shape=shape)
  noise = np.stack([jax.random.normal(jax.random.fold_in(k, len(level)), shape) for k in keys])
  at = samplers.timesteps(len(level), steps, "trailing")[[0, -1]]
  a = here.schedule.alpha_bar[at]
  sd = np.sqrt(a * SD**2 + 1 - a)  # of x: the flow keeps (x - mean) / sd
  z = (noise - np.sqrt(a[0]) * MEAN) / sd[0]
  return np.sqrt(np.mean(np.square(image - (MEAN + np.sqrt(a[1]) * SD**2 / sd[1] * z))))


@pytest.mark.parametrize("name, order", [("ddim", 1), ("dpm++", 2)])
def test_samplers_converge_to_the_flow_at_their_order(name, order):
  errors = [error_of_flow(name, n, np.linspace(6, -6, 1024)) for n in (32, 64, 128)]
  assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.08)
  assert errors[1] / errors[2] == pytest.approx(2**order, rel=0.04)


def test_clipping_bounds_the_image_and_every_x0():
  sampler = make("ddpm", 10)
  free, clipped = draw(sampler), draw(sampler, limits=(-0.1, 0.4))
  assert free.min() < -0.1 and free.max() > 0.4
  assert clipped.min() >= -0.1 - 1e-6 and clipped.max() <= 0.4 + 1e-6
  high = np.full(SHAPE, 0.4, np.float32)
  high[:32] = 9.0
  bounded = draw(sampler, limits=(-9.0, jnp.asarray(high)))
  assert bounded[:, :32].max() > 0.9 and bounded[:, 32:].max() <= 0.4 + 1e-6


def test_clipped_ddim_of_eta_1_is_ddpm():
  """Both take the noise from x and the clipped x0."""
  images = [draw(make(name, 20, eta=eta), limits=(0.0, 0.5))
            for name, eta in (("ddpm", 0.0), ("ddim", 1.0))]
  np.testing.assert_array_equal(*images)


def test_trailing_steps_from_noise_without_signal_recover_the_mean(monkeypatch):
  """The mean image comes of zero noise, as everything is linear."""
  monkeypatch.setattr(samplers, "_noise", lambda keys, t, shape: jnp.zeros((len(keys), *shape)))
  predict = gaussian("v", mean=2.0)

  def sampled(zero, spacing):
    here = process.make({**process.DEFAULTS, "schedule": "scaled_linear", "beta_start": 0.00085,
                         "beta_end": 0.012, "prediction": "v", "zero_terminal_snr": zero})
    sampler = samplers.make({**samplers.DEFAULTS, "steps": 50, "spacing": spacing}, here)
    return float(draw(sampler, predict).mean())

  assert sampled(True, "trailing") == pytest.approx(2.0, abs=2e-6)
  assert 2.0 - sampled(False, "trailing") > 0.05  # SD's schedule keeps 6.8 % of the signal at T
  assert 2.0 - sampled(False, "leading") > 0.06
  assert 2.0 - sampled(True, "leading") > 0.005


@pytest.mark.parametrize("share", [0.35, 1.0])
def test_start_is_the_image_with_the_noise_of_the_first_step_taken(share):
  sampler = make("ddim", 10)
  image = np.linspace(-1, 1, 4 * 64 * 64, dtype=np.float32).reshape(4, *SHAPE)
  seen, _ = trajectory(sampler, gaussian("v"), keys_of(), SHAPE, start=(image, share))
  steps = int(10 * share)  # no step at 0.35: the next one below
  assert len(seen) == steps
  a = sampler.process.schedule.alpha_bar[100 * steps - 1]
  x, level = seen[0]
  assert level == pytest.approx(np.log(a / (1 - a)), abs=1e-5)
  close_to_moments(x - np.sqrt(a) * image, 0.0, 1 - a)


@pytest.mark.parametrize("share", [0.0, 1.01, 0.05])
def test_starts_that_leave_no_step_are_refused(share):
  with pytest.raises(UserError, match="share"):
    samplers.sample(make(steps=10), gaussian("v"), keys_of(), SHAPE,
                    start=(jnp.zeros((4, *SHAPE)), share))


def convolution(x, level):
  """A small network with a fixed kernel: [B, H, W, 1] -> the same."""
  kernel = jnp.asarray(np.random.default_rng(0).standard_normal((3, 3, 1, 1)) / 3, jnp.float32)
  y = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME",
                                   dimension_numbers=("NHWC", "HWIO", "NHWC"))
  return jnp.tanh(y + 0.1 * level.reshape(-1, 1, 1, 1))


@pytest.mark.parametrize("impl, name", [
  ("threefry2x32", "ddpm"), ("rbg", "ddpm"), ("unsafe_rbg", "ddpm"), ("threefry2x32", "dpm++")])
def test_an_image_depends_on_its_own_key_alone(impl, name):
  """Bitwise with a network of elementwise functions; the sampler itself never mixes examples."""
  image, keys = drawing(make(name, 8), shape=(16, 16, 1)), keys_of(8, impl=impl)
  whole = np.asarray(image(keys))
  np.testing.assert_array_equal(whole, image(keys))
  np.testing.assert_array_equal(whole, np.concatenate([image(keys[:4]), image(keys[4:])]))
  order = np.array([3, 1, 7, 0, 2, 6, 5, 4])
  np.testing.assert_array_equal(whole[order], image(keys[order]))
  assert len(np.unique(whole[:, 0, 0, 0])) == 8
  assert abs(image(keys_of(8, seed=1, impl=impl)) - whole).mean() > 0.1


def test_batches_of_another_size_give_the_same_image_with_a_convolution():
  """To 1e-6: convolutions of another batch size may add up in another order."""
  image, keys = drawing(make("ddpm", 8), convolution), keys_of(8)
  halves = np.concatenate([image(keys[:4]), image(keys[4:])])
  np.testing.assert_allclose(image(keys), halves, atol=1e-6)


@pytest.mark.parametrize("name", ["ddim", "dpm++"])
def test_guided_gaussians_move_the_mean_and_keep_the_variance(name):
  """Two codes N(m, s^2), N(n, s^2): guidance by w is exactly N(n + w (m - n), s^2)."""
  here = make(name, 250, zero_terminal_snr=True)
  means = jnp.array([0.6, -0.2, 0.1])  # of codes 0, 1 and of the null code

  def predict(x, level, code):
    return gaussian("v", means[code].reshape(-1, 1, 1, 1))(x, level)

  code = jnp.array([0, 1, 0, 1])
  guided = guidance.classifier_free(predict, 1.5)
  images = draw(here, lambda x, level: guided(x, level, code, 2))
  for image, mean in zip(images, (0.85, -0.35, 0.85, -0.35), strict=True):
    close_to_moments(image, mean, SD**2)


@pytest.mark.parametrize("name, spacing, expected", [
  ("ddim", "trailing", [9, 7, 4, 1]), ("ddim", "leading", [6, 4, 2, 0]),
  ("ddim", "linspace", [9, 6, 3, 0]), ("dpm++", "trailing", [9, 7, 4, 1]),
  ("dpm++", "leading", [8, 6, 4, 2]), ("dpm++", "linspace", [9, 7, 4, 2])])
def test_timesteps(name, spacing, expected):
  assert samplers.timesteps(10, 4, spacing, name == "dpm++").tolist() == expected
  times = samplers.timesteps(1000, 999, spacing, name == "dpm++")
  assert len(times) == 999 and np.all(np.diff(times) < 0) and times[-1] >= 0


@pytest.mark.parametrize("name, images", [("ddim", 1), ("ddpm", 1), ("dpm++", 2)])
def test_memory_is_the_image_and_what_the_next_step_needs(name, images):
  jaxpr = jax.make_jaxpr(lambda keys: samplers.sample(make(name, 20), gaussian("v"), keys, SHAPE))
  (scan,) = (e for e in jaxpr(keys_of(impl="threefry2x32")).eqns if e.primitive.name == "scan")
  assert scan.params["length"] == 20 and scan.params["num_carry"] == images
  assert [v.aval.shape for v in scan.outvars] == [(4, *SHAPE)] * images


FROZEN_SHAPE, FROZEN_KEYS = (3, 2, 1), jax.random.split(jax.random.key(0), 2)
# first pixels after 4 steps, as diffusers 0.42.1 gives them (tests/peers/test_diffusers.py)
FROZEN = {
  ("ddpm", 0.0, "trailing"): (-0.18691, 0.05201, 0.54308),
  ("ddpm", 0.0, "leading"): (0.26030, -0.12105, 0.24866),
  ("ddpm", 0.0, "linspace"): (-0.06953, 0.30477, 0.02479),
  ("ddim", 0.0, "trailing"): (-0.72658, -0.49256, 0.57543),
  ("ddim", 0.0, "leading"): (0.27382, 0.33718, -0.17978),
  ("ddim", 0.0, "linspace"): (0.28863, 0.33723, -0.22439),
  ("dpm++", 0.0, "trailing"): (-0.70386, -0.54355, 0.50334),
  ("dpm++", 0.0, "leading"): (-0.73735, -0.48551, 0.53575),
  ("dpm++", 0.0, "linspace"): (-0.70311, -0.54347, 0.50418),
  ("ddim", 0.5, "trailing"): (-0.67750, -0.66910, 0.68395),
}


def fixed_network(kind, x, level):
  """A formula that stands for a network: its x0 is not linear in x, and another at each level."""
  x0 = jnp.sin(2 * x + 0.3 * jnp.clip(level, -20, 20)) / 2 + jnp.tanh(x) / 3
  a, s = parametrisation.signal(level), parametrisation.sigma(level)
  return {"x0": x0, "eps": (x - a * x0) / s, "v": (a * x - x0) / s}[kind]


def fixed_noise(keys, step, shape):
  """Instead of random numbers: about the size of normal ones, others from step to step."""
  count = len(keys) * int(np.prod(shape))
  return 1.4 * jnp.sin(1.7 * (step % 7) + 2.3 * jnp.arange(count)).reshape(len(keys), *shape)


@pytest.mark.parametrize("name, eta, spacing", FROZEN)
@pytest.mark.parametrize("kind", ["eps", "v"])
def test_samplers_give_the_numbers_of_diffusers(name, eta, spacing, kind, monkeypatch):
  monkeypatch.setattr(samplers, "_noise", fixed_noise)
  image = draw(make(name, 4, spacing, eta, kind),
               lambda x, level: fixed_network(kind, x, level[0]), FROZEN_KEYS, FROZEN_SHAPE)
  np.testing.assert_allclose(image.ravel()[:3], FROZEN[name, eta, spacing], atol=1e-4)
