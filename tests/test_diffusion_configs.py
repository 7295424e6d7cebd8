"""The staged diffusion configs: exact resume, weights of another run, refusals, published sizes."""

import functools
import shutil

import jax
import pytest
from test_diffusion_methods import config_for
from test_train import STAGED, equal, get_config, last_state, toy_config

from medsynth_jax import run, train
from medsynth_jax.data.dataset import Store, load_info
from medsynth_jax.errors import UserError

pytestmark = pytest.mark.usefixtures("unoptimised")

# --- exact resume inside stage 2 -------------------------------------------------------------

# every config of several stages, without the baseline that nobody needs
SECOND = {"cldm": ("autoencoder", "latent_moments", "cldm"), "pix2pix_ddpm": ("pix2pix", "ddpm")}


def test_every_config_of_stages_is_here():
  assert tuple(SECOND) == STAGED


def started(name, data, folder, steps=4):
  """The run of a config's stages, the last of so many steps."""
  config = config_for(name, data)
  config.stages = SECOND[name]
  config[SECOND[name][-1]].steps = steps
  return run.start(config, load_info(data), folder)


@pytest.fixture(scope="module")
def whole(three, tmp_path_factory):
  """{config: its run, trained in one}, each trained when it is asked for first."""
  @functools.cache
  def trained(name):
    here = started(name, three, tmp_path_factory.mktemp("whole") / "run")
    train.train(here, Store(three))
    return here
  return trained


@pytest.mark.parametrize("name", SECOND)
def test_second_stage_resumes_bitwise(name, whole, three, tmp_path):
  """A run stopped inside its last stage and continued equals the run in one, frozen nets too."""
  one, last = whole(name), SECOND[name][-1]
  parts = started(name, three, tmp_path / "parts", 2)
  if name == "pix2pix_ddpm":  # pix2pix trains to the same bits again in test_train.py
    for stage in list(one.methods)[:-1]:
      shutil.copytree(one.folder / stage, parts.folder / stage)
  train.train(parts, Store(three))
  assert int(last_state(parts, last).step) == 2
  parts = started(name, three, tmp_path / "parts")
  train.train(parts, Store(three))
  assert equal(last_state(parts, last), last_state(one, last))
  assert equal(parts.restore(last, "latest")[0], one.restore(last, "latest")[0])
  if name == "cldm":
    assert float(one.restore("cldm")[0].frozen["latent_moments"].aux["scale"]) > 0


# --- weights of another run ------------------------------------------------------------------


def test_pretrained_autoencoder(whole, three, tmp_path):
  store, first = Store(three), whole("cldm")
  taken = config_for("cldm", three, ("autoencoder.pretrained", str(first.folder)),
                     ("autoencoder.steps", 0))
  taken.stages = ("autoencoder", "latent_moments")
  second = run.start(taken, store.info, tmp_path / "second")
  train.train(second, store)
  assert equal(second.restore("autoencoder")[0].nets, first.restore("autoencoder")[0].nets)

  other = config_for("cldm", three, ("autoencoder.pretrained", str(first.folder)),
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
