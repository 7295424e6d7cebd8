"""The staged diffusion configs: exact resume, weights of another run, refusals, published sizes."""


import jax
import pytest
from test_diffusion_methods import config_for
from test_train import STAGED, equal, get_config, last_state, toy_config

from medsynth_jax import run, train
from medsynth_jax.data.dataset import Store, load_info
from medsynth_jax.errors import UserError

# --- exact resume inside stage 2 -------------------------------------------------------------

# every config of several stages, without the baseline that nobody needs
SECOND = {"cldm": ("autoencoder", "latent_moments", "cldm"), "pix2pix_ddpm": ("pix2pix", "ddpm")}


def test_every_config_of_stages_is_here():
  assert tuple(SECOND) == STAGED


@pytest.mark.parametrize("name", SECOND)
def test_second_stage_resumes_bitwise(name, three, tmp_path):
  """A run stopped inside its last stage and continued equals the run in one, frozen nets too."""
  stages, store = SECOND[name], Store(three)
  def trained(folder, steps):
    config = config_for(name, three)
    config.stages = stages
    config[stages[-1]].steps = steps
    here = run.start(config, store.info, folder)
    train.train(here, store)
    return here
  whole, parts = trained(tmp_path / "whole", 4), None
  for steps in (2, 4):
    parts = trained(tmp_path / "parts", steps)
  assert equal(last_state(parts, stages[-1]), last_state(whole, stages[-1]))
  assert equal(parts.restore(stages[-1], "latest")[0], whole.restore(stages[-1], "latest")[0])
  if name == "cldm":
    assert float(whole.restore("cldm")[0].frozen["latent_moments"].aux["scale"]) > 0


# --- weights of another run ------------------------------------------------------------------


def test_pretrained_autoencoder(three, tmp_path):
  store = Store(three)
  config = config_for("cldm", three)
  config.stages = ("autoencoder",)
  first = run.start(config, store.info, tmp_path / "first")
  train.train(first, store)
  taken = config_for("cldm", three, ("autoencoder.pretrained", str(tmp_path / "first")),
                     ("autoencoder.steps", 0))
  taken.stages = ("autoencoder", "latent_moments")
  second = run.start(taken, store.info, tmp_path / "second")
  train.train(second, store)
  assert equal(second.restore("autoencoder")[0].nets, first.restore("autoencoder")[0].nets)

  other = config_for("cldm", three, ("autoencoder.pretrained", str(tmp_path / "first")),
                     ("autoencoder.network.latent_channels", 4))
  with pytest.raises(UserError, match=r"autoencoder.pretrained=.* there and .* here"):
    run.start(other, store.info, tmp_path / "third")
  assert not (tmp_path / "third").exists()


def test_weights_for_other_modalities_are_told(three, toy_data, tmp_path):
  run.start(toy_config("unified_gan", three), Store(three).info, tmp_path / "first")
  config = toy_config("unified_gan", toy_data, pretrained=str(tmp_path / "first"))
  with pytest.raises(UserError, match=r"here; it knows 3 modalities \(a, b, c\), this run 2"
                                      r" modalities \(a, b\); give the section"):
    run.start(config, Store(toy_data).info, tmp_path / "second")


# --- refusals --------------------------------------------------------------------------------


@pytest.mark.parametrize("name, changes, message", [
  ("cldm", {"cldm.guidance": 2.0, "cldm.code_dropout": 0.0}, "code_dropout"),
  ("cldm", {"cldm.moments": "unet"}, "no latent scale"),
  ("cldm", {"cldm.autoencoder": "unet"}, "no latents"),
  ("cldm", {"cldm.sampler.steps": 5000}, "steps=5000"),
  ("cldm", {"cldm.diffusion.schedule": "quadratic"}, "quadratic"),
  ("cldm", {"autoencoder.perceptual.weight": 1.0}, "perceptual.weights"),
  ("cldm", {"data.context": 1}, "context"),
  ("cldm", {"data.targets": "b,ct"}, "unknown modality 'ct'"),
  ("cldm", {"autoencoder.steps": 0}, "steps=0"),
  ("cldm", {"cldm.code_dropout": 1.5}, "code_dropout=1.5"),
  ("cldm", {"synthesis.noise": "pixel"}, "noise"),
  ("pix2pix_ddpm", {"ddpm.combine": "add"}, "combine='add'"),
  ("pix2pix_ddpm", {"ddpm.combine": "start", "ddpm.coarse": ""}, "coarse"),
  ("pix2pix_ddpm", {"ddpm.coarse": "gan"}, "no stage of this config"),
  ("pix2pix_ddpm", {"ddpm.folds": 3}, "exclude_fold=2"),
  ("pix2pix_ddpm", {"ddpm.folds": 1}, "leaves no|folds=1"),
  ("pix2pix_ddpm", {"data.targets": "b,c"}, "makes one target"),
])
def test_bad_settings_are_refused(three, tmp_path, name, changes, message):
  config = config_for(name, three, *changes.items())
  with pytest.raises(UserError, match=message):
    run.start(config, load_info(three), tmp_path / "run")
  assert not (tmp_path / "run").exists()


# with one target channel; 7 -> 3 channels are tested with the network
PAPER = {"pix2pix_ddpm": ("ddpm", "denoiser", 62_638_465), "cldm": ("cldm", "denoiser", 64_148_611)}


@pytest.mark.parametrize("name", PAPER)
def test_paper_variants_have_the_published_sizes(name, three):
  stage, net, count = PAPER[name]
  config = get_config(name, "paper")
  config.data.update(source="a", targets="b,c" if name == "cldm" else "b", fusion="")
  here = run.build(config, load_info(three), "nowhere")
  assert sum(x.size for x in jax.tree.leaves(here.shape(stage).nets[net])) == count
