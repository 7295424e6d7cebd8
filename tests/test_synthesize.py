"""A new scan gives the image that evaluation scored, on its own grid, in its format and units."""

import dataclasses
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

from medsynth_jax import builtin, methods, outputs, run, synthesize, train, windows
from medsynth_jax import config as configs
from medsynth_jax.contract import Method, category, example_keys
from medsynth_jax.data import fusion, volumes
from medsynth_jax.data.case import prepare_source
from medsynth_jax.data.dataset import Store
from medsynth_jax.data.examples import case_source
from medsynth_jax.data.intensities import from_model
from medsynth_jax.errors import UserError

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def maker(tiny_run):
  return synthesize.load(tiny_run)


@pytest.fixture(scope="module")
def case(maker):
  return maker.run.info.split("test")[0]


@pytest.fixture(scope="module")
def t1(tiny_run, case):
  return tiny_run / "scans" / "images" / f"{case.subject}_t1.nii.gz"


@pytest.fixture(scope="module")
def expected(maker, case, tiny_run):
  """What evaluation sees of the test case: physical values [x, y, z], before the body mask."""
  info, task = maker.run.info, maker.run.task
  arrays = Store(tiny_run / "data").volume(case)
  image = windows.synthesise(
    maker.predict, maker.state, case_source(arrays, case, task, info), task, source_modality=0,
    target_modality=1, key=maker.run.key(maker.stage),
    batch_size=maker.run.config.synthesis.batch_size, put=maker.run.put)
  physical = from_model(info.modality("t2").typical, image[..., 0])
  return np.moveaxis(physical, 0, info.plane)


def make(maker, source, output, grid=""):
  synthesize.scan(maker, {"t1": source}, {"t2": output}, grid)
  return volumes.read(output)


def test_same_grid_and_the_image_that_was_scored(maker, t1, expected, tmp_path):
  output = make(maker, t1, tmp_path / "t2.nii.gz")
  source = nib.load(t1)
  written = nib.load(tmp_path / "t2.nii.gz")
  np.testing.assert_array_equal(written.affine, source.affine)
  assert written.shape == source.shape
  assert written.header["sform_code"] == source.header["sform_code"]
  inside = output.array != 0
  assert inside.mean() > 0.1
  spread = expected.max() - expected.min()
  # the store rounds the source to 16 bits
  np.testing.assert_allclose(output.array[inside], expected[inside], atol=2e-3 * spread)


def test_sidecar_says_what_it_is(maker, t1, tmp_path):
  make(maker, t1, tmp_path / "t2.nii.gz")
  sidecar = json.loads((tmp_path / "t2.json").read_text())
  assert sidecar["synthetic"] is True and sidecar["units"] == "arbitrary"
  assert sidecar["run"]["step"] == maker.step and sidecar["trained_on"]["simulated"] is True


@pytest.mark.parametrize("axes, flips", [
  ((1, 2, 0), (0,)), ((2, 0, 1), (1, 2)), ((0, 1, 2), (0, 1))])
def test_orientation_comes_back(axes, flips, maker, t1, expected, tmp_path):
  """A scan stored in another axis order gives the same image at the same place in the world."""
  image = nib.load(t1)
  orientation = np.stack([axes, np.where(np.isin(range(3), flips), -1, 1)], 1)
  turned = image.as_reoriented(orientation)
  nib.save(turned, tmp_path / "t1.nii.gz")
  make(maker, tmp_path / "t1.nii.gz", tmp_path / "t2.nii.gz")
  plain = make(maker, t1, tmp_path / "plain.nii.gz")
  written = nib.load(tmp_path / "t2.nii.gz")
  np.testing.assert_allclose(written.affine, turned.affine, atol=1e-4)
  back = nib.as_closest_canonical(written).get_fdata()
  here = nib.as_closest_canonical(nib.load(tmp_path / "plain.nii.gz")).get_fdata()
  np.testing.assert_allclose(back, here, atol=1e-3 * np.ptp(plain.array))


@pytest.mark.parametrize("kind", [".nii", ".mha", ".mhd", ".nrrd"])
def test_formats(kind, maker, t1, tmp_path):
  volume = volumes.read(t1)
  source, output = tmp_path / f"t1{kind}", tmp_path / f"t2{kind}"
  volumes.write(source, volume.array, volume.affine)
  made = make(maker, source, output)
  np.testing.assert_allclose(made.affine, volume.affine, atol=1e-4)
  plain = make(maker, t1, tmp_path / "plain.nii.gz")
  np.testing.assert_allclose(made.array, plain.array, rtol=1e-5)
  if kind != ".nii":
    assert sitk.ReadImage(str(output)).GetSize() == volume.array.shape


def test_anisotropic_oblique_source(maker, t1, tmp_path):
  """An oblique scan of other spacing comes back on exactly its own grid."""
  from medsynth_jax.data import grids
  volume = volumes.read(t1)
  angle = np.deg2rad(12)
  turn = np.eye(4)
  turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
  affine = turn @ volume.affine @ np.diag([1.0, 1.0, 2.0, 1.0])
  shape = (*volume.array.shape[:2], volume.array.shape[2] // 2)
  array = grids.resample(volume, shape, affine)
  volumes.write(tmp_path / "t1.nii.gz", array, affine)
  copier = dataclasses.replace(maker, predict=lambda state, batch, key: batch["source"])
  made = make(copier, tmp_path / "t1.nii.gz", tmp_path / "t2.nii.gz")
  assert made.array.shape == shape
  np.testing.assert_allclose(made.affine, affine, atol=1e-4)
  body = made.array > 0
  assert 0.1 < body.mean() < 0.9
  assert np.corrcoef(array[body], made.array[body])[0, 1] > 0.97


def test_grids(maker, t1, tmp_path):
  volume = volumes.read(t1)
  other = np.diag([6.0, 6.0, 6.0, 1.0])
  volumes.write(tmp_path / "grid.nii.gz", np.random.default_rng(0).random((9, 8, 7)), other)
  made = make(maker, t1, tmp_path / "a.nii.gz", str(tmp_path / "grid.nii.gz"))
  assert made.array.shape == (9, 8, 7)
  model = make(maker, t1, tmp_path / "b.nii.gz", "model")
  assert model.array.shape == volume.array.shape


def test_output_is_not_overwritten(maker, t1, tmp_path, capsys):
  output = tmp_path / "t2.nii.gz"
  make(maker, t1, output)
  before = output.read_bytes()
  make(maker, t1, output)
  assert "nothing to do" in capsys.readouterr().out
  with pytest.raises(UserError, match="exists with other content"):
    make(maker, t1, output, "model")
  assert output.read_bytes() == before


def test_another_model_or_a_file_of_the_user_is_not_mistaken(maker, t1, tmp_path):
  """The sidecar knows the weights; a JSON file of somebody else is left as it is."""
  output = tmp_path / "t2.nii.gz"
  make(maker, t1, output)
  other = dataclasses.replace(maker, digest="0" * 64)
  with pytest.raises(UserError, match="exists with other content"):
    make(other, t1, output)
  mine = tmp_path / "ct.json"
  mine.write_text('{"EchoTime": 3}')
  with pytest.raises(UserError, match="ct.json: exists"):
    make(maker, t1, tmp_path / "ct.nii.gz")
  assert mine.read_text() == '{"EchoTime": 3}' and not (tmp_path / "ct.nii.gz").exists()


def test_scan_without_a_body_or_overlap(maker, t1, tmp_path):
  volume = volumes.read(t1)
  volumes.write(tmp_path / "flat.nii.gz", np.full(volume.array.shape, 3.0), volume.affine)
  with pytest.raises(UserError, match="flat.nii.gz"):
    make(maker, tmp_path / "flat.nii.gz", tmp_path / "t2.nii.gz")
  assert not (tmp_path / "t2.nii.gz").exists()


def test_folder_of_scans(maker, t1, tmp_path):
  scans = tmp_path / "in"
  scans.mkdir()
  for name in ("x", "y"):
    (scans / f"{name}.nii.gz").write_bytes(t1.read_bytes())
  found = outputs.jobs(str(scans), str(tmp_path / "out"), maker.run.task, "")
  assert [sorted(p.name for p in outputs.values()) for _, outputs in found] == [
    ["x_t2.nii.gz"], ["y_t2.nii.gz"]]
  with pytest.raises(UserError, match="is the input folder"):
    outputs.jobs(str(scans), str(scans), maker.run.task, "")


@pytest.mark.parametrize("source, output, target, message", [
  ("nowhere.nii.gz", "o.nii.gz", "", "no such file or folder"),
  ("T1", "o.nii.gz", "ct", "--target=ct: this run makes t2"),
  ("T1", "o.png", "", "name a file that ends in"),
  ("flair=T1", "o.nii.gz", "", "this run is made from t1"),
])
def test_bad_calls_get_one_line(source, output, target, message, maker, t1, tmp_path):
  with pytest.raises(UserError, match=message):
    outputs.jobs(source.replace("T1", str(t1)), str(tmp_path / output), maker.run.task, target)


def test_command(tiny_run, t1, tmp_path):
  """The command writes the image; a bad image is one line, status 2, nothing written."""
  def call(source, output):
    return subprocess.run(
      [sys.executable, "-m", "medsynth_jax.synthesize", f"--workdir={tiny_run}",
       f"--input={source}", f"--output={output}"], cwd=ROOT, capture_output=True, text=True)
  done = call(t1, tmp_path / "t2.mha")
  assert done.returncode == 0, done.stderr
  assert volumes.read(tmp_path / "t2.mha").array.std() > 0
  bad = tmp_path / "bad.nii.gz"
  bad.write_bytes(t1.read_bytes()[:2000])
  failed = call(bad, tmp_path / "out" / "t2.nii.gz")
  assert failed.returncode == 2 and "bad.nii.gz" in failed.stderr
  assert "Traceback" not in failed.stderr
  assert not (tmp_path / "out").exists()


def test_nothing_outside_the_run_is_read(tiny_run, t1, tmp_path):
  """The run folder without data and scans is enough."""
  copy = tmp_path / "run"
  shutil.copytree(tiny_run, copy, ignore=shutil.ignore_patterns("data", "scans"))
  alone = synthesize.load(copy)
  a = make(alone, t1, tmp_path / "a.nii.gz")
  b = make(synthesize.load(tiny_run), t1, tmp_path / "b.nii.gz")
  np.testing.assert_array_equal(a.array, b.array)


# --- PET to CT: units, background, the model's grid by default -----------------------------------


@pytest.fixture(scope="module")
def pet_to_ct(tmp_path_factory):
  """(Synthesizer, PET file) of a run that makes CT from PET."""
  config, folder = get_config("unet"), tmp_path_factory.mktemp("pet") / "run"
  config.data.update(source="pet", targets="ct")
  config.data.simulated.n_subjects = 3
  config.steps = 1
  store = Store(builtin.make(config, folder))
  train.train(run.start(config, store.info, folder), store)
  maker = synthesize.load(folder)
  subject = store.info.split("test")[0].subject
  return maker, folder / "scans" / "images" / f"{subject}_pet.nii.gz"


def test_synthetic_ct_is_in_hu_with_air_around(pet_to_ct, tmp_path):
  maker, pet = pet_to_ct
  synthesize.scan(maker, {"pet": pet}, {"ct": tmp_path / "ct.nii.gz"})
  image = nib.load(tmp_path / "ct.nii.gz")
  assert image.get_data_dtype() == np.int16
  values = np.asarray(image.dataobj)
  assert values.min() == -1024 and values.max() <= 3071
  assert (values == -1024).mean() > 0.3  # air
  sidecar = json.loads((tmp_path / "ct.json").read_text())
  assert sidecar["units"] == "HU" and sidecar["grid"] == "model"


def test_coarse_pet_is_written_on_the_model_grid_unless_asked(pet_to_ct, tmp_path):
  maker, pet = pet_to_ct
  from medsynth_jax.data import grids
  volume = volumes.read(pet)
  shape, affine = grids.model_grid(volume, (16.0, 16.0, 16.0))
  volumes.write(tmp_path / "pet.nii.gz", grids.resample(volume, shape, affine), affine)
  source = {"pet": tmp_path / "pet.nii.gz"}
  synthesize.scan(maker, source, {"ct": tmp_path / "model.nii.gz"})
  synthesize.scan(maker, source, {"ct": tmp_path / "source.nii.gz"}, "source")
  model, own = volumes.read(tmp_path / "model.nii.gz"), volumes.read(tmp_path / "source.nii.gz")
  np.testing.assert_allclose(model.spacing, maker.run.info.spacing)
  assert own.array.shape == shape
  np.testing.assert_allclose(own.affine, affine, atol=1e-4)


def test_mirrored_synthesis_is_the_mean_of_both(tiny_run):
  """synthesis.mirror averages with the mirrored scan, along left and right."""
  here = synthesize.load(tiny_run).run
  state, _ = here.restore("regression")
  source = np.random.default_rng(0).uniform(-1, 1, (2, 32, 32, 1)).astype(np.float32)
  def made(source):
    return windows.synthesise(
      here.predictor("regression"), state, source, here.task, source_modality=0, target_modality=1,
      key=here.key("regression"), batch_size=4, put=here.put)
  plain, turned = made(source), made(source[:, ::-1])[:, ::-1]
  here.config.synthesis.mirror = True
  both = made(source)
  np.testing.assert_allclose(both, (plain + turned) / 2, atol=1e-5)
  assert np.abs(both - plain).max() > 1e-3
  sagittal = dataclasses.replace(here, info=dataclasses.replace(here.info, plane=0))
  with pytest.raises(UserError, match="sagittal"):
    sagittal.predictor("regression")


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
    code = category(batch, codes)[:, None, None, None]
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
  moments = synthesize._Moments()
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
  scaling = prepare_source({"t2": scan}, info).scalings["t2"][0]
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
