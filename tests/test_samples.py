"""Samples and their deviation, several targets, sampler fields and fusion images in synthesis."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from conftest import make_toy_data
from test_train import get_config, scale_build, two_stages

from medsynth_jax import builtin, methods, outputs, placing, run, synthesize, train
from medsynth_jax import config as configs
from medsynth_jax.contract import Method, category, example_keys
from medsynth_jax.data import fusion, volumes
from medsynth_jax.data.case import prepare_source
from medsynth_jax.data.dataset import Store
from medsynth_jax.errors import UserError

ROOT = Path(__file__).parents[1]


# --- samples, several targets, sampler -----------------------------------------------------------


def drawn_build(config, stage, info, stages):
  """A toy diffusion stage: half the source, 0.1 guidance for each code, noise of 0.02 x steps."""
  section = configs.stages(config)[stage]
  codes = [info.index(name) for name in configs.names(config.data.targets)]
  channels = configs.target_channels(config)

  def synthesize(state, batch, key):
    keys = example_keys(key, batch, config.synthesis.noise)
    shape = (*batch["source"].shape[1:-1], channels)
    noise = jax.vmap(lambda k: jax.random.normal(k, shape))(keys)
    code = category(batch["target_modality"], codes)[:, None, None, None]
    image = 0.5 * batch["source"][..., :1] + 0.1 * section.guidance * code
    return jnp.clip(image + 0.02 * section.sampler.steps * noise, -1, 1)

  return Method(lambda key, batch: {}, lambda state, batch, key: (state, {"loss": jnp.zeros(())}),
                synthesize, {}, many_targets=True, stochastic=True)


def drawn_config(data, **fields):
  config = configs.base(stages=("drawn",))
  config.drawn = configs.stage("drawn", steps=1, batch_size=2)
  config.drawn.sampler, config.drawn.guidance = {"name": "toy", "steps": 5}, 1.0
  config.data.update(dir=str(data), size="16,16", **fields)
  return config


def train_run(config, folder):
  store = Store(config.data.dir)
  train.train(run.start(config, store.info, folder), store)
  return folder


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
  """(RUN, source file) of a toy run that draws b and c from a."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(methods.METHODS, "drawn", drawn_build)
    folder = tmp_path_factory.mktemp("drawn")
    data = make_toy_data(folder / "data", modalities=("a", "b", "c"))
    train_run(drawn_config(data, source="a", targets="[b,c]"), folder / "run")
    store = Store(data)
    case = store.info.split("test")[0]
    scan = np.moveaxis(store.volume(case)["images"]["a"], 0, 2)
    volumes.write(folder / "a.nii.gz", scan, np.array(case.affine))
    yield folder / "run", folder / "a.nii.gz"


def drawn_image(drawn, sample=0, **how):
  maker = synthesize.load(drawn[0], **how)
  source = prepare_source({"a": volumes.read(drawn[1])}, maker.run.info)
  return maker.image(source, "b", sample)


@pytest.mark.parametrize("sample", [0, 3])
def test_any_batch_size_gives_the_same_image(sample, drawn):
  """A sampled image too: its keys go by sample and slice, not by the place in the batch."""
  images = [drawn_image(drawn, sample, batch_size=n) for n in (1, 3, 8)]
  np.testing.assert_allclose(images[1], images[0], atol=1e-5)
  np.testing.assert_allclose(images[2], images[0], atol=1e-5)


def test_any_batch_size_gives_the_same_image_of_a_network(tiny_run, t1):
  def made(batch_size):
    maker = synthesize.load(tiny_run, batch_size=batch_size)
    return maker.image(prepare_source({"t1": volumes.read(t1)}, maker.run.info), "t2")
  one, three, eight = made(1), made(3), made(8)
  np.testing.assert_allclose(three, one, atol=1e-4 * np.ptp(one))
  np.testing.assert_allclose(eight, one, atol=1e-4 * np.ptp(one))


def test_eight_devices_share_a_batch(tiny_run, t1, tmp_path):
  code = ("import sys, jax, numpy as np; from medsynth_jax import synthesize;"
          " from medsynth_jax.data import case, volumes; assert jax.device_count() == 8;"
          " maker = synthesize.load(sys.argv[1], batch_size=8);"
          " source = case.prepare_source({'t1': volumes.read(sys.argv[2])}, maker.run.info);"
          " np.save(sys.argv[3], maker.image(source, 't2'))")
  done = subprocess.run([sys.executable, "-c", code, str(tiny_run), str(t1), tmp_path / "x.npy"],
                        cwd=ROOT, capture_output=True, text=True, env=os.environ | {
                          "XLA_FLAGS": "--xla_force_host_platform_device_count=8"})
  assert done.returncode == 0, done.stderr
  maker = synthesize.load(tiny_run)
  alone = maker.image(prepare_source({"t1": volumes.read(t1)}, maker.run.info), "t2")
  np.testing.assert_allclose(np.load(tmp_path / "x.npy"), alone, atol=1e-4 * np.ptp(alone))


def test_mean_and_deviation_of_samples(drawn, tmp_path, capsys):
  each = np.stack([drawn_image(drawn, k) for k in range(4)])
  assert np.abs(each[0] - each[1]).max() > 1
  maker = synthesize.load(drawn[0], samples=4)
  written = synthesize.scan(maker, {"a": drawn[1]}, {"b": tmp_path / "b.nii.gz"})
  assert [p.name for p in written] == ["b.nii.gz", "b_std.nii.gz"]
  assert re.search(r"b: 4 samples of 10 slices in \d+\.\d s, [\d.e-]+ s a slice",
                   capsys.readouterr().out)
  mean, std = (nib.load(p) for p in written)
  inside = mean.get_fdata() != 0
  assert 0.1 < inside.mean() < 1
  np.testing.assert_allclose(mean.get_fdata()[inside], each.mean(0)[inside], atol=1e-3)
  np.testing.assert_allclose(std.get_fdata()[inside], each.std(0, ddof=1)[inside], atol=1e-3)
  assert (std.get_fdata()[~inside] == 0).all() and std.get_data_dtype() == np.float32
  np.testing.assert_array_equal(std.affine, mean.affine)
  told, of_std = (json.loads((tmp_path / n).read_text()) for n in ("b.json", "b_std.json"))
  assert told["samples"] == of_std["samples"] == 4 and told["units"] == of_std["units"]
  assert told["image"] == "mean of 4 samples" and "divided by 3" in of_std["image"]


def test_moments_of_a_stream():
  images = np.random.default_rng(0).normal(1000, 3, (9, 4, 5)).astype(np.float32)
  moments = placing.Moments()
  for image in images:
    moments.add(image)
  np.testing.assert_allclose(moments.mean, images.mean(0), rtol=1e-6)
  np.testing.assert_allclose(moments.deviation(), images.std(0, ddof=1), rtol=1e-3)


def test_files_of_samples_are_not_mistaken(drawn, tmp_path):
  """What is there stays, what is missing is made, what is of another call is refused."""
  def make(**how):
    return synthesize.scan(synthesize.load(drawn[0], **how), {"a": drawn[1]},
                           {"b": tmp_path / "b.nii.gz"})
  assert len(make(samples=2)) == 2 and make(samples=2) == []
  for part in ("b_std.nii.gz", "b_std.json"):
    (tmp_path / part).unlink()
  assert [p.name for p in make(samples=2, batch_size=3)] == ["b_std.nii.gz"]
  with pytest.raises(UserError, match="b.nii.gz: exists"):
    make(samples=3)
  (tmp_path / "b.nii.gz").unlink()
  (tmp_path / "b.json").unlink()
  with pytest.raises(UserError, match="b_std.nii.gz: exists"):
    make(samples=3)


def test_as_many_samples_as_were_scored(drawn, tmp_path):
  config = json.loads((drawn[0] / "config.json").read_text())
  config["synthesis"]["samples"] = 3
  copy = tmp_path / "run"
  shutil.copytree(drawn[0], copy)
  (copy / "config.json").write_text(json.dumps(config))
  assert synthesize.load(copy).samples == 3 and synthesize.load(copy, samples=1).samples == 1


def test_no_samples_of_a_stage_that_draws_none(tiny_run, drawn):
  with pytest.raises(UserError, match="--samples=4: stage 'regression'.*same image each time"):
    synthesize.load(tiny_run, samples=4)
  assert synthesize.load(tiny_run, samples=1).samples == 1
  with pytest.raises(UserError, match="--samples=0"):
    synthesize.load(drawn[0], samples=0)


def test_one_model_makes_each_target_or_all(drawn, tmp_path):
  maker, source = synthesize.load(drawn[0]), str(drawn[1])
  alone = outputs.jobs(source, str(tmp_path / "x.nii.gz"), maker.run.task, "c")
  both = outputs.jobs(source, str(tmp_path / "y.nii.gz"), maker.run.task, "")
  assert [p.name for p in both[0][1].values()] == ["y_b.nii.gz", "y_c.nii.gz"]
  for inputs, images in alone + both:
    synthesize.scan(maker, inputs, images)
  x, b, c = (volumes.read(tmp_path / f"{n}.nii.gz").array for n in ("x", "y_b", "y_c"))
  np.testing.assert_array_equal(x, c)
  low, high = (maker.run.info.modality("c").typical.low, maker.run.info.modality("c").typical.high)
  inside = (b != 0) & (c != 0) & (b < high - 10)
  np.testing.assert_allclose((c - b)[inside], 0.05 * (high - low), rtol=1e-3)  # 0.1 of -1..1
  assert json.loads((tmp_path / "y_c.json").read_text())["modality"] == "c"
  with pytest.raises(UserError, match="--target=d: this run makes b, c"):
    outputs.jobs(source, str(tmp_path / "z.nii.gz"), maker.run.task, "d")


def test_steps_and_guidance_of_the_call(drawn, tmp_path):
  """They change the image, its sidecar and the digest, and not the run."""
  plain, other = synthesize.load(drawn[0]), synthesize.load(drawn[0], steps=2, guidance=3.0)
  assert plain.digest != other.digest
  assert plain.told["sampler"] == {"name": "toy", "steps": 5, "guidance": 1.0}
  assert other.told["sampler"] == {"name": "toy", "steps": 2, "guidance": 3.0}
  synthesize.scan(other, {"a": drawn[1]}, {"c": tmp_path / "c.nii.gz"})
  assert json.loads((tmp_path / "c.json").read_text())["sampler"]["steps"] == 2
  noise = [np.std(drawn_image(drawn, 0, steps=n) - drawn_image(drawn, 1, steps=n)) for n in (1, 4)]
  assert noise[1] == pytest.approx(4 * noise[0], rel=0.2)
  assert synthesize.load(drawn[0]).digest == plain.digest


@pytest.mark.parametrize("how, message", [
  ({"steps": 3}, "--steps=3: stage 'regression' .* has no steps"),
  ({"guidance": 2.0}, "--guidance=2.0: stage 'regression' .* has no guidance")])
def test_no_sampler_to_change(how, message, tiny_run):
  with pytest.raises(UserError, match=message):
    synthesize.load(tiny_run, **how)


def test_changes_of_a_run_are_checked(drawn):
  with pytest.raises(UserError, match="sampler.steps=0: must be 1 or more"):
    synthesize.load(drawn[0], steps=0)
  with pytest.raises(UserError, match="synthesis.batch_size=0"):
    synthesize.load(drawn[0], batch_size=0)
  with pytest.raises(UserError, match="no field drawn.speed"):
    run.open_run(drawn[0], {"drawn.speed": 3})


def test_the_system_makes_the_images_not_its_baseline(toy_data, tmp_path, monkeypatch):
  monkeypatch.setitem(methods.METHODS, "scale", scale_build)
  config = two_stages(toy_data)
  config.stages = ("first", "second", "alone")
  config.alone = configs.stage("scale", steps=1, batch_size=2)
  here = run.build(config, Store(toy_data).info, tmp_path)
  assert synthesize._stage(here, "") == "second" and synthesize._stage(here, "alone") == "alone"
  config.stages = ("first", "alone")
  here = run.build(config, Store(toy_data).info, tmp_path)
  assert synthesize._stage(here, "") == "alone"
  with pytest.raises(UserError, match="--stage=second: this run makes images in first, alone"):
    synthesize._stage(here, "second")


# --- PET in colour on MR -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pet_on_mr(tmp_path_factory):
  """(RUN that makes SUV, RUN that makes colours, MR file) of one simulated data set."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(methods.METHODS, "drawn", drawn_build)
    folder, config = tmp_path_factory.mktemp("fusion"), get_config("unet")
    config.data.update(source="t2", targets="pet")
    config.data.simulated.n_subjects = 3
    data = builtin.make(config, folder)
    suv = drawn_config(data, source="t2", targets="pet", fusion="pet")
    colours = drawn_config(data, source="t2", targets="fusion", fusion="pet")
    subject = Store(data).info.split("test")[0].subject
    yield (train_run(suv, folder / "suv"), train_run(colours, folder / "colours"),
           folder / "scans" / "images" / f"{subject}_t2.nii.gz")


def colours_of(path):
  """[x, y, z, 3] of a colour image."""
  if path.suffix == ".gz":
    image = nib.load(path)
    assert image.get_data_dtype() == np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])
    return np.asarray(image.dataobj).view((np.uint8, 3)).reshape(*image.shape, 3)
  return sitk.GetArrayFromImage(sitk.ReadImage(str(path))).transpose(2, 1, 0, 3)


@pytest.mark.parametrize("kind", [".nii.gz", ".mha", ".nrrd"])
def test_fusion_is_rendered_from_the_suv_beside_it(kind, pet_on_mr, tmp_path):
  run_folder, _, mr = pet_on_mr
  written = synthesize.scan(synthesize.load(run_folder), {"t2": mr},
                            {"pet": tmp_path / f"pet{kind}"}, "source")
  assert [p.name for p in written] == [f"pet{kind}", f"pet_fusion{kind}"]
  suv, scan = volumes.read(written[0]), volumes.read(mr)
  info = synthesize.load(run_folder).run.info
  scaling = prepare_source({"t2": scan}, info).scans["t2"].source[0]
  grey = ((scan.array - scaling.low) / (scaling.high - scaling.low)).clip(0, 1)
  wanted = np.round(255 * fusion.render(grey, suv.array))
  colours = colours_of(written[1])
  assert colours.shape == (*scan.array.shape, 3) and suv.array.max() > 1
  np.testing.assert_allclose(colours, wanted, atol=1)
  assert (colours[..., 0] != colours[..., 2]).mean() > 0.1
  sidecar = json.loads((tmp_path / "pet_fusion.json").read_text())
  assert sidecar["modality"] == "fusion" and sidecar["units"] == "RGB"
  assert "measured on the SUV volume" in sidecar["notice"]
  assert json.loads((tmp_path / "pet.json").read_text())["units"] == "SUV"
  with pytest.raises(UserError, match="colour"):
    volumes.read(written[1])


def test_learned_fusion_is_written_in_colour(pet_on_mr, tmp_path):
  _, run_folder, mr = pet_on_mr
  maker = synthesize.load(run_folder, samples=3)
  written = synthesize.scan(maker, {"t2": mr}, {"fusion": tmp_path / "rgb.nii.gz"})
  assert [p.name for p in written] == ["rgb.nii.gz", "rgb_std.nii.gz"]
  source = prepare_source({"t2": volumes.read(mr)}, maker.run.info)
  each = np.stack([maker.image(source, "fusion", k) for k in range(3)])
  assert each.shape[-1] == 3 and each.min() >= 0 and each.max() <= 1
  colours, std = colours_of(written[0]), volumes.read(written[1]).array
  inside = source.valid & source.mask
  np.testing.assert_allclose(colours[inside], 255 * each.mean(0)[inside], atol=0.6)
  assert (colours[~inside] == 0).all() and (std[~inside] == 0).all()
  spread = 255 * np.sqrt(each.var(0, ddof=1).mean(-1))
  np.testing.assert_allclose(std[inside], spread[inside], rtol=1e-3, atol=1e-3)
  assert json.loads((tmp_path / "rgb.json").read_text())["units"] == "RGB"
