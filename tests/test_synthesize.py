"""A new scan gives the image that evaluation scored, on its own grid, in its format and units."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from test_train import get_config

from medsynth_jax import builtin, outputs, run, synthesize, train, windows
from medsynth_jax.data import volumes
from medsynth_jax.data.dataset import Store
from medsynth_jax.data.examples import case_source
from medsynth_jax.data.intensities import from_model
from medsynth_jax.errors import UserError

ROOT = Path(__file__).parents[1]


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
