"""The diffusion systems: what reaches which net, out-of-fold coarse images, codes, refusals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_train import equal, get_config

from medsynth_jax import run
from medsynth_jax.contract import Average, create, served
from medsynth_jax.data.dataset import load_info
from medsynth_jax.data.pipeline import example_batch
from medsynth_jax.methods import ddpm

pytestmark = pytest.mark.usefixtures("unoptimised")


def config_for(name, data, *changes, targets=None):
  """The test variant of a diffusion config on toy data."""
  config = get_config(name)
  targets = targets or ("b,c" if name == "cldm" else "b")
  config.data.update(dir=str(data), source="a", targets=targets, fusion="")
  config.update_from_flattened_dict(dict(changes))
  return config


def _averaging(opt, params):
  """An optimiser's state whose moving average is the net."""
  def is_average(x):
    return isinstance(x, Average)
  return jax.tree.map(lambda x: x._replace(params=params) if is_average(x) else x, opt,
                      is_leaf=is_average)


def filled(shape, seed):
  """A first state with random weights from NumPy: compiling their own initialisation takes long."""
  rng = np.random.default_rng(seed)
  def draw(x):
    return jnp.asarray(rng.normal(size=x.shape) * (0.3 / max(1, x.shape[-2] if x.ndim > 1 else 9)
                                                   ** 0.5), x.dtype)
  nets = jax.tree.map(draw, shape.nets)
  opts = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shape.opts)
  opts = {name: _averaging(opts[name], nets[name]) for name in opts}
  aux = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shape.aux)
  return shape.replace(step=jnp.int32(0), key=jax.random.key(seed), nets=nets, opts=opts, aux=aux,
                       frozen={})


@functools.cache
def built(name, data, *changes):
  """(run, {stage: a first state}) with the served first states of earlier stages frozen."""
  here = run.build(config_for(name, data, *changes), load_info(data), "nowhere")
  states = {}
  for seed, (stage, method) in enumerate(here.methods.items()):
    frozen = {n: served(states[n], here.methods[n].keeps).replace(frozen={})
              for n in here.needs(stage)}
    if "latent_moments" in frozen:
      moments = frozen["latent_moments"]
      frozen["latent_moments"] = moments.replace(aux={**moments.aux, "scale": jnp.float32(1)})
    states[stage] = filled(here.shape(stage), seed).replace(frozen=frozen)
    assert set(states[stage].nets) == set(method.txs)
  return here, states


def batch_of(here, n=2, seed=0):
  """A random batch of the run's task, all of it valid, its targets in turn."""
  rng = np.random.default_rng(seed)
  example = example_batch(here.task, here.info)
  batch = {k: np.zeros((n, *v.shape[1:]), v.dtype) for k, v in example.items()}
  for name in ("source", "target"):
    batch[name] = rng.uniform(-1, 1, batch[name].shape).astype(np.float32)
  for name in ("valid", "mask", "paired"):
    batch[name] = np.ones_like(batch[name])
  codes = [here.info.index(t) for t in here.task.targets]
  batch["target_modality"] = np.array([codes[i % len(codes)] for i in range(n)], np.int32)
  batch["slice"] = np.arange(n, dtype=np.int32)
  return batch


def moved(before, after, net):
  return not jax.tree.all(jax.tree.map(np.array_equal, before.nets[net], after.nets[net]))


# --- autoencoder and latent scale ------------------------------------------------------------


def test_autoencoder_trains_both_nets(three):
  here, states = built("cldm", three)
  state, method = states["autoencoder"], here.methods["autoencoder"]
  after, metrics = jax.jit(method.step)(state, batch_of(here), jax.random.key(1))
  assert moved(state, after, "autoencoder") and moved(state, after, "discriminator")
  assert set(metrics) == {"l1", "kl", "gan", "discriminator"}
  image = jax.jit(method.synthesize)(after, batch_of(here), jax.random.key(0))
  assert image.shape == (2, 32, 32, 1) and float(jnp.abs(image).max()) <= 1


def test_adversarial_term_waits_for_its_step(three):
  """Before `adversarial_from` the autoencoder's step is that of a weight of 0, after it is not."""
  def stepped(*changes):
    here, states = built("cldm", three, *changes)
    step = jax.jit(here.methods["autoencoder"].step)
    def weights(number):
      state = states["autoencoder"].replace(step=jnp.int32(number))
      return jax.tree.leaves(step(state, batch_of(here), jax.random.key(1))[0].nets["autoencoder"])
    return weights
  strong = stepped(("autoencoder.adversarial", 10.0), ("autoencoder.adversarial_from", 6))
  none, waits, acts = stepped(("autoencoder.adversarial", 1e-9))(5), strong(5), strong(6)
  assert all(np.allclose(a, b, atol=1e-6) for a, b in zip(none, waits, strict=True))
  assert not all(np.allclose(a, b, atol=1e-6) for a, b in zip(none, acts, strict=True))


def test_autoencoder_without_adversary_has_one_net(three):
  here, states = built("cldm", three, ("autoencoder.adversarial", 0.0))
  assert set(states["autoencoder"].nets) == {"autoencoder"}


def test_perceptual_term_reads_a_local_file(three, tmp_path):
  from medsynth_jax.nets import perceptual
  rng, arrays, width = np.random.default_rng(0), {}, 3
  for layer in perceptual.LAYERS:
    arrays[f"{layer}/kernel"] = rng.normal(size=(3, 3, width, 2)).astype(np.float32)
    arrays[f"{layer}/bias"], width = np.zeros(2, np.float32), 2
  np.savez(tmp_path / "vgg.npz", **arrays)
  fields = {"autoencoder.perceptual.weight": 1.0,
            "autoencoder.perceptual.weights": str(tmp_path / "vgg.npz")}
  here, states = built("cldm", three, *fields.items())
  step = jax.jit(here.methods["autoencoder"].step)
  _, metrics = step(states["autoencoder"], batch_of(here), jax.random.key(1))
  assert float(metrics["perceptual"]) > 0
  (tmp_path / "vgg.npz").unlink()
  run.build(here.config, here.info, "nowhere")  # a trained run needs the file no more


def test_latent_scale_is_one_over_the_standard_deviation(three):
  """Over two batches; the posterior's own spread counts."""
  from medsynth_jax.nets import registry
  here, states = built("cldm", three)
  state, step = states["latent_moments"], jax.jit(here.methods["latent_moments"].step)
  net = registry.make(here.sections["autoencoder"].network, "float32")
  params = {"params": states["autoencoder"].nets["autoencoder"]}
  seen = []
  for seed in (0, 1):
    batch, key = batch_of(here, seed=seed), jax.random.key(seed)
    state, metrics = step(state, batch, key)
    mean, std = net.apply(params, batch["target"], method="encode")
    seen.append(np.asarray(mean + std * jax.random.normal(key, mean.shape)).ravel())
  np.testing.assert_allclose(1 / state.aux["scale"], np.concatenate(seen).std(), rtol=1e-4)
  np.testing.assert_allclose(metrics["latent_std"], np.concatenate(seen).std(), rtol=1e-4)


# --- latent diffusion ------------------------------------------------------------------------


def synthesised(here, state, stage, batch):
  without = {k: v for k, v in batch.items() if k != "target"}
  return np.asarray(jax.jit(here.methods[stage].synthesize)(state, without, here.key(stage)))


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_each_code_makes_its_own_image_wherever_it_stands(three, guidance):
  here, states = built("cldm", three, ("cldm.guidance", guidance))
  state, batch = states["cldm"], batch_of(here, 4)
  for k in ("source", "slice"):  # one slice four times; codes b, c, b, c
    batch[k] = np.repeat(batch[k][:1], 4, 0)
  images = synthesised(here, state, "cldm", batch)
  np.testing.assert_array_equal(images[0], images[2])
  assert np.abs(images[0] - images[1]).max() > 1e-4
  turned = {k: v[::-1] for k, v in batch.items()}
  np.testing.assert_allclose(synthesised(here, state, "cldm", turned)[::-1], images, atol=1e-5)


def test_samples_and_slices_have_noise_of_their_own(three):
  here, states = built("cldm", three)
  state, batch = states["cldm"], batch_of(here, 3)
  for k in ("source", "target_modality"):
    batch[k] = np.repeat(batch[k][:1], 3, 0)
  batch["slice"], batch["sample"] = np.array([4, 4, 5], np.int32), np.array([0, 1, 0], np.int32)
  one, other_sample, other_slice = synthesised(here, state, "cldm", batch)
  assert np.abs(one - other_sample).max() > 1e-3 and np.abs(one - other_slice).max() > 1e-3
  there, states = built("cldm", three, ("synthesis.noise", "volume"))
  one, other_sample, other_slice = synthesised(there, state, "cldm", batch)
  assert np.abs(one - other_sample).max() > 1e-3
  np.testing.assert_array_equal(one, other_slice)


def test_frozen_nets_stay_and_the_denoiser_moves(three):
  here, states = built("cldm", three)
  state = states["cldm"]
  after, metrics = jax.jit(here.methods["cldm"].step)(state, batch_of(here), jax.random.key(1))
  assert moved(state, after, "denoiser") and equal(state.frozen, after.frozen)
  assert np.isfinite(float(metrics["eps"]))


def test_invalid_voxels_do_not_count_in_latents(three):
  """Targets that differ where nothing was measured, and there only, give the same loss."""
  here, states = built("cldm", three)
  state, step = states["cldm"], jax.jit(here.methods["cldm"].step)
  batch = batch_of(here)
  batch["paired"][1] = 0
  before = float(step(state, batch, jax.random.key(1))[1]["eps"])
  batch["target"] = batch["target"].copy()
  batch["target"][1] = 0.9
  assert float(step(state, batch, jax.random.key(1))[1]["eps"]) == pytest.approx(before, rel=1e-5)


# --- diffusion of images ---------------------------------------------------------------------


class Echo:
  """In place of a network: gain * the last channel of its input, which is the coarse image."""

  factor = 1

  def init(self, key, x, level):
    return {"params": {"gain": jnp.ones(())}}

  def apply(self, variables, x, level, **options):
    return variables["params"]["gain"] * x[..., -1:]


def echo_run(three, monkeypatch, *changes):
  """(method, its state, a batch): coarse images of 0.1, 0.2 in folds 0, 1 and 0.3 outside."""
  config = config_for("pix2pix_ddpm", three, ("ddpm.diffusion.prediction", "x0"), *changes)
  here = run.build(config, load_info(three), "nowhere")
  def synthesize(state, batch, key):
    return jnp.full_like(batch["source"], state.nets["level"])
  shown = {"fold_0": 0.1, "fold_1": 0.2, "pix2pix": 0.3}
  methods = {n: here.methods[n]._replace(synthesize=synthesize) for n in shown if n in here.methods}
  monkeypatch.setattr(ddpm.registry, "make", lambda fields, dtype: Echo())
  method = ddpm.build(config, "ddpm", here.info, methods)
  example = example_batch(here.task, here.info)
  frozen = {n: create(here.methods[n]._replace(init=lambda k, b: {}, txs={}), jax.random.key(0),
                      example, {}).replace(nets={"level": jnp.array(shown[n])}) for n in methods}
  state = create(method, jax.random.key(0), example, frozen)
  batch = batch_of(here)
  batch["target"][:] = 0.5
  return method, state, batch


@pytest.mark.parametrize("folds, fold, coarse", [(2, 0, 0.1), (2, 1, 0.2), (0, 1, 0.3)])
def test_training_sees_the_coarse_image_of_its_fold(three, monkeypatch, folds, fold, coarse):
  method, state, batch = echo_run(three, monkeypatch, ("ddpm.folds", folds))
  batch["fold"][:] = fold
  _, metrics = method.step(state, batch, jax.random.key(0))
  assert float(metrics["x0"]) == pytest.approx((0.5 - coarse) ** 2, rel=1e-4)
  assert (method.note != "") == (folds == 0)


def test_synthesis_sees_the_coarse_image_of_the_whole_generator(three, monkeypatch):
  method, state, batch = echo_run(three, monkeypatch)
  image = method.synthesize(served(state, method.keeps), batch, jax.random.key(0))
  np.testing.assert_allclose(image, 0.3, atol=1e-5)


def test_residual_is_added_to_the_coarse_image(three, monkeypatch):
  method, state, batch = echo_run(three, monkeypatch, ("ddpm.combine", "residual"))
  image = method.synthesize(served(state, method.keeps), batch, jax.random.key(0))
  np.testing.assert_allclose(image, 0.6, atol=1e-5)  # residual 0.3 on 0.3
  batch["fold"][:] = 1
  _, metrics = method.step(state, batch, jax.random.key(0))
  assert float(metrics["x0"]) == pytest.approx((0.5 - 0.2 - 0.2) ** 2, rel=1e-3)


def test_start_trains_without_coarse_images(three):
  config = config_for("pix2pix_ddpm", three, ("ddpm.combine", "start"))
  here = run.build(config, load_info(three), "nowhere")
  assert list(here.methods) == ["pix2pix", "ddpm", "unet"]
  shapes = here.shape("ddpm").nets["denoiser"]["conv_in"]["kernel"]
  assert shapes.shape[-2] == 2  # noisy image and source


def test_start_begins_at_the_coarse_image(three):
  """With a single step left at hardly any noise the image is the coarse one."""
  here, states = built("pix2pix_ddpm", three, ("ddpm.combine", "start"),
                       ("ddpm.start_at", 0.01), ("ddpm.sampler.steps", 100),
                       ("ddpm.diffusion.prediction", "eps"))
  state, batch = states["ddpm"], batch_of(here)
  image = synthesised(here, state, "ddpm", batch)
  coarse = here.methods["pix2pix"].synthesize(state.frozen["pix2pix"], batch, jax.random.key(0))
  assert np.abs(image - np.asarray(coarse)).max() < 0.3


@pytest.mark.parametrize("targets, channels", [("b", 1)])
def test_each_stage_trains(three, targets, channels):
  here, states = built("pix2pix_ddpm", three)
  state = states["ddpm"]
  batch = batch_of(here)
  after, metrics = jax.jit(here.methods["ddpm"].step)(state, batch, jax.random.key(1))
  assert moved(state, after, "denoiser") and equal(state.frozen, after.frozen)
  image = synthesised(here, after, "ddpm", batch)
  assert image.shape == (2, 32, 32, channels) and np.abs(image).max() <= 1


# --- several targets in one regression -------------------------------------------------------


def test_each_target_has_a_channel(three):
  here, states = built("cldm", three)
  method, state, batch = here.methods["unet"], states["unet"], batch_of(here)
  kernel = state.nets["generator"]["head"]["kernel"]
  assert kernel.shape[-1] == 2
  batch["target_modality"][:] = here.info.index("c")
  after, _ = jax.jit(method.step)(state, batch, jax.random.key(0))
  change = np.abs(after.nets["generator"]["head"]["kernel"] - kernel).reshape(-1, 2).max(0)
  assert change[0] == 0 < change[1]
