"""Synthesis from any modality: each source apart, their mean; a registration network's field."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import nibabel as nib
import numpy as np
import pytest
from conftest import make_toy_data
from test_any_source import gains_build
from test_samples import train_run

from medsynth_jax import config as configs
from medsynth_jax import flows, methods, outputs, synthesize
from medsynth_jax.data import volumes
from medsynth_jax.data.case import prepare_source
from medsynth_jax.data.dataset import Store
from medsynth_jax.errors import UserError

ROOT = Path(__file__).parents[1]


def flow_build(config, stage, info, stages):
  """The toy generator with a registration network: 2 pixels along x, the target's value along y."""
  def flow(state, batch):
    value = batch["target"][..., 0]
    return jnp.stack([jnp.full_like(value, 2.0), value], -1)
  return gains_build(config, stage, info, stages)._replace(flow=flow)


def toy_run(folder, method, data, **fields):
  config = configs.single(method, configs.base(), steps=1, batch_size=2, **fields)
  config.data.update(dir=str(folder / "data"), size="16,16", threads=0, **data)
  return train_run(config, folder / method)


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
  """Folder of a toy data set, two runs on it, and the test subject's scans a, b, c."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(methods.METHODS, "gains", gains_build)
    patch.setitem(methods.METHODS, "flowing", flow_build)
    folder = tmp_path_factory.mktemp("any")
    make_toy_data(folder / "data", modalities=("a", "b", "c"))
    toy_run(folder, "gains", {"source": "any", "targets": ""}, draw="any")
    toy_run(folder, "flowing", {"source": "a", "targets": "b"})
    store = Store(folder / "data")
    case = store.info.split("test")[0]
    for name, image in store.volume(case)["images"].items():
      volumes.write(folder / f"{name}.nii.gz", np.moveaxis(image, 0, 2), np.array(case.affine))
    yield folder


@pytest.fixture(scope="module")
def any_maker(scans):
  return synthesize.load(scans / "gains")


def jobs(maker, source, output="out/x.nii.gz", target="", combine=""):
  """[(sources, {target: file name})] of a call."""
  found = outputs.jobs(source, output, maker.run.task, target, combine)
  return [("".join(inputs), {t: p.name for t, p in images.items()}) for inputs, images in found]


# --- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("source, target, combine, expected", [
  ("a=A", "all", "", [("a", {"b": "x_b.nii.gz", "c": "x_c.nii.gz"})]),
  ("a=A", "c", "", [("a", {"c": "x.nii.gz"})]),
  ("a=A,b=B", "", "", [("a", {"c": "x_c_from_a.nii.gz"}), ("b", {"c": "x_c_from_b.nii.gz"})]),
  ("a=A,b=B", "", "mean", [("a", {"c": "x_c_from_a.nii.gz"}), ("b", {"c": "x_c_from_b.nii.gz"}),
                           ("ab", {"c": "x_c.nii.gz"})]),
  ("a=A,b=B", "a", "", [("b", {"a": "x.nii.gz"})]),
  ("a=A,b=B,c=C", "a", "", [("b", {"a": "x_a_from_b.nii.gz"}), ("c", {"a": "x_a_from_c.nii.gz"})]),
])
def test_what_is_made_of_what(any_maker, source, target, combine, expected):
  assert jobs(any_maker, source, target=target, combine=combine) == expected


@pytest.mark.parametrize("source, target, combine, message", [
  ("A.nii.gz", "", "", "made from any one of a, b, c: say which it is, as --input=a=FILE"),
  ("d=A", "", "", "'d' is none of a, b, c"),
  ("a=A", "a", "", "a is to be made and is all that is given"),
  ("a=A,b=B,c=C", "all", "", "all of a, b, c are given, so that none is missing"),
  ("a=A", "", "mean", "takes the images from two sources or more"),
  ("a=A,b=B", "b", "mean", "takes the images from two sources or more"),
  ("a=A", "d", "", "--target=d: this run makes a, b, c"),
])
def test_bad_calls(any_maker, source, target, combine, message):
  with pytest.raises(UserError, match=message):
    jobs(any_maker, source, target=target, combine=combine)


def test_no_mean_in_a_run_of_one_source(maker):
  with pytest.raises(UserError, match="--combine=mean: this run makes one image from t1"):
    outputs.jobs("t1=A", "x.nii.gz", maker.run.task, "", "mean")
  assert outputs.jobs("t1=A", "x.nii.gz", maker.run.task, "all") == \
    outputs.jobs("t1=A", "x.nii.gz", maker.run.task, "")


def test_a_folder_of_incomplete_cases(any_maker, tmp_path, capsys):
  """Files belong together by what stands before _<modality>; the missing ones are made."""
  for name in ("p1_a.nii.gz", "p1_b.nii.gz", "q_a_c.mha", "r_a.nii", "r_b.nii", "r_c.nii",
               "p1_mask.nii.gz", "note.txt"):
    (tmp_path / name).write_bytes(b"")
  found = jobs(any_maker, str(tmp_path), str(tmp_path / "out"), "", "mean")
  assert found == [
    ("a", {"c": "p1_c_from_a.nii.gz"}), ("b", {"c": "p1_c_from_b.nii.gz"}),
    ("ab", {"c": "p1_c.nii.gz"}), ("c", {"a": "q_a_a.mha", "b": "q_a_b.mha"})]
  said = capsys.readouterr().out
  assert "1 files whose names end in no modality" in said
  assert "r: has a, b, c, nothing to make" in said
  with pytest.raises(UserError, match="the output is a folder too"):
    jobs(any_maker, str(tmp_path), "x.nii.gz")
  (tmp_path / "other").mkdir()
  (tmp_path / "other" / "scan.nii.gz").write_bytes(b"")
  with pytest.raises(UserError, match="named <case>_<modality>, as 01_a.nii.gz"):
    jobs(any_maker, str(tmp_path / "other"), str(tmp_path / "out"))


def test_a_modality_whose_name_ends_like_another(any_maker, tmp_path):
  names = ("t1", "post_t1")
  task = dataclasses.replace(any_maker.run.task, sources=names, targets=names)
  for name in ("p_post_t1.nii.gz", "q_t1.nii.gz"):
    (tmp_path / name).write_bytes(b"")
  found = outputs.jobs(str(tmp_path), str(tmp_path / "out"), task, "")
  assert [(*inputs, *(p.name for p in images.values())) for inputs, images in found] == [
    ("post_t1", "p_t1.nii.gz"), ("t1", "q_post_t1.nii.gz")]


# --- images --------------------------------------------------------------------------------------


def made(maker, scans, names, target, output):
  inputs = {n: scans / f"{n}.nii.gz" for n in names}
  synthesize.scan(maker, inputs, {target: output})
  return volumes.read(output).array, json.loads((output.parent / "out.json").read_text())


@pytest.mark.parametrize("source, target, gain", [("a", "b", 10), ("b", "a", -2.5),
                                                  ("b", "c", 17.5)])
def test_each_direction_has_its_label_and_its_source(any_maker, scans, tmp_path, source, target,
                                                     gain):
  """The toy adds 10 to the values for each place of the target in the list, less 2.5 of the source.
  """
  image, sidecar = made(any_maker, scans, source, target, tmp_path / "out.nii.gz")
  values = volumes.read(scans / f"{source}.nii.gz").array
  inside = image != 0
  assert inside.mean() > 0.1
  np.testing.assert_allclose(image[inside], (values + gain).clip(0, 100)[inside], atol=0.02)
  assert list(sidecar["made_from"]) == [source] and "image" not in sidecar
  assert sidecar["made_from"][source]["file"] == f"{source}.nii.gz"
  assert sidecar["modality"] == target


def test_the_mean_of_the_images_from_each_source(any_maker, scans, tmp_path):
  each = [made(any_maker, scans, n, "c", tmp_path / n / "out.nii.gz")[0] for n in "ab"]
  mean, sidecar = made(any_maker, scans, "ab", "c", tmp_path / "out.nii.gz")
  inside = (mean != 0) & (each[0] != 0) & (each[1] != 0)
  assert inside.mean() > 0.1 and np.abs(each[0] - each[1])[inside].max() > 1
  np.testing.assert_allclose(mean[inside], np.mean(each, 0)[inside], atol=1e-3)
  assert sidecar["image"] == "mean of images from a, b" and list(sidecar["made_from"]) == ["a", "b"]
  drawn = dataclasses.replace(any_maker, samples=2)
  with pytest.raises(UserError, match="--samples=2: the mean over a, b is of one image each"):
    made(drawn, scans, "ab", "c", tmp_path / "other" / "out.nii.gz")


# --- the field of a registration network ---------------------------------------------------------


@pytest.fixture(scope="module")
def flowing(scans):
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(methods.METHODS, "flowing", flow_build)
    yield synthesize.load(scans / "flowing")


def saved(maker, scans, folder, target="b.nii.gz"):
  return flows.save(maker, {"a": scans / "a.nii.gz"}, {"b": folder / "x.nii.gz"},
                    str(scans / target))


def test_field_against_a_given_target(flowing, scans, tmp_path, capsys):
  """In mm along RAS+ axes on the model grid; the target scaled as a target, windows joined."""
  path = saved(flowing, scans, tmp_path)
  assert path == tmp_path / "x_flow.nii.gz"
  image = nib.load(path)
  assert image.header.get_intent()[0] == "vector" and image.shape == (20, 24, 10, 1, 3)
  np.testing.assert_allclose(image.affine, nib.load(scans / "a.nii.gz").affine)
  field, b = image.get_fdata()[:, :, :, 0], volumes.read(scans / "b.nii.gz").array
  np.testing.assert_allclose(field[..., 0], 4.0, atol=1e-5)  # 2 pixels of 2 mm
  np.testing.assert_allclose(field[..., 1], 2 * (b / 50 - 1), atol=0.01)
  assert (field[..., 2] == 0).all()
  sidecar = json.loads((tmp_path / "x_flow.json").read_text())
  assert "shows at p what the synthetic image shows at p + field(p)" in sidecar["field"]
  assert sidecar["target"]["b"]["file"] == "b.nii.gz" and sidecar["folded"] == 0
  source = prepare_source({"a": volumes.read(scans / "a.nii.gz")}, flowing.run.info)
  length = np.linalg.norm(field, axis=-1)[source.mask & source.valid].mean()
  assert sidecar["mean_length_mm"] == pytest.approx(length, rel=1e-4)
  assert f"{length:.2f} mm on average written, folded in 0.00%" in capsys.readouterr().out
  assert saved(flowing, scans, tmp_path) is None  # is there
  with pytest.raises(UserError, match="x_flow.nii.gz: exists with other content"):
    saved(flowing, scans, tmp_path, "c.nii.gz")


def test_target_of_another_grid_or_patient(flowing, scans, tmp_path):
  """It is resampled; without a common voxel it is refused."""
  scan = volumes.read(scans / "b.nii.gz")
  turned = scan.affine @ np.diag([-1, 1, 1, 1])
  turned[:3, 3] += scan.affine[:3, 0] * 19
  volumes.write(tmp_path / "turned.nii.gz", scan.array[::-1], turned)
  one, two = (nib.load(saved(flowing, scans, tmp_path / n, file)).get_fdata()
              for n, file in (("1", "b.nii.gz"), ("2", tmp_path / "turned.nii.gz")))
  np.testing.assert_allclose(one, two, atol=1e-4)
  far = scan.affine.copy()
  far[:3, 3] += 500
  volumes.write(tmp_path / "far.nii.gz", scan.array, far)
  with pytest.raises(UserError, match="far.nii.gz shows nothing of the body in the input"):
    saved(flowing, scans, tmp_path / "3", tmp_path / "far.nii.gz")


@pytest.mark.parametrize("plane", [0, 1, 2])
def test_pixels_in_mm_along_the_worlds_axes(plane):
  """A step along an axis of the array is that column of the affine, oblique or not."""
  affine = np.eye(4)
  affine[:3, :3] = np.array([[2, 0.3, 0], [-0.2, 3, 0], [0, 0, 4]])
  others = [a for a in range(3) if a != plane]
  flat = np.zeros((5, 6, 7, 2), np.float32)
  flat[2, 3, 4] = 1, 10
  deep = np.concatenate([np.full((5, 6, 7, 1), 100.0), flat], -1)
  place = tuple(np.insert([3, 4], plane, 2))
  wanted = affine[:3, others[0]] + 10 * affine[:3, others[1]]
  np.testing.assert_allclose(flows.in_mm(flat, affine, plane)[place], wanted, rtol=1e-6)
  np.testing.assert_allclose(flows.in_mm(deep, affine, plane)[place],
                             wanted + 100 * affine[:3, plane], rtol=1e-6)


@pytest.mark.parametrize("rank", [2, 3])
def test_share_of_folded_voxels(rank):
  """A half that runs backwards twice as fast folds; what lies outside the body does not count."""
  u = np.zeros((4, 8, 8, rank), np.float32)
  u[..., -1] = np.where(np.arange(8) < 4, 0, -2.0 * (np.arange(8) - 4))
  field, inside = flows.in_mm(u, np.eye(4), 0), np.ones((4, 8, 8), bool)
  inside[:, :4] = False
  found = flows.measured(u, field, inside, 0)
  assert found["folded"] == pytest.approx(0.5, abs=0.13)
  assert found["mean_length_mm"] == pytest.approx(np.abs(u[0, 0, :, -1]).mean())
  u[..., -1] = -1.5 * (np.arange(8) % 2)  # every other voxel passes its neighbour
  inside[:, :, :4] = False
  assert flows.measured(u, field, inside, 0)["folded"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("jobs, message", [
  ([({"a": 1}, {"b": 1, "c": 2})], "give one scan by --input and one modality by --target"),
  ([({"a": 1}, {"b": 1})] * 2, "give one scan by --input"),
])
def test_one_field_at_a_time(flowing, jobs, message):
  with pytest.raises(UserError, match=message):
    flows.check(flowing, jobs)


def test_a_stage_without_a_registration_network(tiny_run, t1, tmp_path):
  """One line, before anything is made; a stage that has one is named."""
  done = subprocess.run(
    [sys.executable, "-m", "medsynth_jax.synthesize", f"--workdir={tiny_run}", f"--input={t1}",
     f"--output={tmp_path / 'x.nii.gz'}", f"--save-flow={t1}"], cwd=ROOT, capture_output=True,
    text=True)
  assert done.returncode == 2 and not list(tmp_path.iterdir())
  assert "--save-flow: stage 'regression' (regression) has no registration network" in done.stderr


def test_the_stage_that_has_one_is_named(flowing):
  plain = flowing.run.methods["flowing"]._replace(flow=None)
  other = dataclasses.replace(flowing.run, methods={"plain": plain, **flowing.run.methods})
  vars(other)["sections"] = {"plain": other.sections["flowing"], **other.sections}
  with pytest.raises(UserError, match="stage 'plain' .* give --stage=flowing"):
    flows.check(dataclasses.replace(flowing, run=other, stage="plain"), [])
