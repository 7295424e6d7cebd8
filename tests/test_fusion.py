"""Fusion images: the rendering in closed form, and fusion as what a run learns."""

import dataclasses

import jax
import numpy as np
import pytest
from test_pipeline import ROW, batches, fields

from medsynth_jax import builtin, prepare
from medsynth_jax.data import fusion
from medsynth_jax.data.dataset import Store, load_info
from medsynth_jax.data.examples import case_source, case_target, case_valid, make_task, usable
from medsynth_jax.data.intensities import from_model
from medsynth_jax.data.pipeline import Augment, Examples, example_batch
from medsynth_jax.data.table import read_table
from medsynth_jax.errors import UserError


@pytest.fixture(scope="module")
def store(toy_data):
  """The toy data with b as a PET of 0..100 SUV; its scaling is linear up to 100."""
  info = load_info(toy_data)
  pet = dataclasses.replace(info.modalities["b"], type="pet", unit="SUV")
  return Store(toy_data, dataclasses.replace(info, modalities={**info.modalities, "b": pet}))


def fused(**changes):
  return fields(**{"targets": "fusion", "fusion": "b", **changes})


# --- rendering ---------------------------------------------------------------------------------


def test_no_uptake_is_grey():
  grey = np.linspace(0, 1, 7, dtype=np.float32)
  image = fusion.render(grey, np.zeros(7, np.float32))
  assert image.dtype == np.float32
  np.testing.assert_array_equal(image, np.repeat(grey[:, None], 3, 1))
  np.testing.assert_array_equal(fusion.render(grey, np.full(7, -0.5, np.float32)), image)


@pytest.mark.parametrize("suv, opacity, colour", [
  (10.0, 0.6, (1, 1, 1)), (40.0, 0.6, (1, 1, 1)), (7.5, 0.45, (1, 1, 0)), (5.0, 0.3, (1, 0.5, 0)),
  (2.5, 0.15, (0.5, 0, 0)), (3.0, 0.18, (0.6, 0.1, 0))])
def test_closed_form(suv, opacity, colour):
  """F = (1 - a) grey + a colour(s) with s = SUV / 10 up to 1 and a = 0.6 s."""
  for grey in (0.0, 0.4, 1.0):
    image = fusion.render(np.float32([grey]), np.float32([suv]))[0]
    np.testing.assert_allclose(image, (1 - opacity) * grey + opacity * np.array(colour), atol=1e-6)


def test_colours_get_brighter_and_stay_in_range():
  table = fusion.colour(np.linspace(0, 1, 201))
  assert (np.diff(table @ (0.2126, 0.7152, 0.0722)) > 0).all()
  assert table.min() == 0 and table.max() == 1


def test_numpy_and_jax_agree():
  rng = np.random.default_rng(0)
  grey = rng.random((3, 4, 5), np.float32)
  suv = rng.uniform(-1, 14, (3, 4, 5)).astype(np.float32)
  image, compiled = fusion.render(grey, suv), jax.jit(fusion.render)(grey, suv)
  assert isinstance(image, np.ndarray) and image.shape == compiled.shape == (3, 4, 5, 3)
  np.testing.assert_allclose(image, compiled, atol=3e-7)
  assert image.min() >= 0 and image.max() <= 1


# --- as a target -------------------------------------------------------------------------------


def test_it_is_a_modality_behind_the_stored_ones(store):
  info = store.info
  modality = info.modality("fusion")
  assert (modality.type, modality.unit) == ("rgb", "1") and "fusion" not in info.names
  assert info.index("fusion") == 2 == len(info.modalities)
  assert from_model(modality.typical, np.float32(0.5)) == 0.75
  assert info.to_model("fusion", 1.0) == 1.0


def test_target_of_a_case(store):
  """The rendering of the scaled source and the PET's SUV, as -1..1."""
  task, case = make_task(fused().data, store.info), store.info.cases[1]
  arrays = store.slices(case, (3, 4))
  target = case_target(arrays, case, task, store.info, "fusion")
  assert target.shape == (2, 20, 24, 3) and target.dtype == np.float32
  share = np.clip(arrays["images"]["b"] / 10, 0, 1)[..., None]
  grey = arrays["images"]["a"][..., None] / 100
  expected = (1 - 0.6 * share) * grey + 0.6 * share * fusion.colour(share[..., 0])
  np.testing.assert_allclose((target + 1) / 2, expected, atol=1e-6)
  assert task.target_channels == 3 and task.measured("fusion") == "b"


def test_rendered_afterwards_the_target_stays_suv(store):
  task, case = make_task(fused(targets="b").data, store.info), store.info.cases[1]
  arrays = store.slices(case, (3, 4))
  target = case_target(arrays, case, task, store.info, "b")
  np.testing.assert_allclose(target[..., 0], arrays["images"]["b"] / 50 - 1, atol=1e-6)
  assert task.fusion == "b" and task.target_channels == 1 and task.measured("b") == "b"


def test_grey_is_the_first_of_several_sources(store):
  modalities = {**store.info.modalities,
                "c": dataclasses.replace(store.info.modalities["a"], name="c")}
  info = dataclasses.replace(store.info, modalities=modalities)
  task, case = make_task(fused(source="a,c").data, info), store.info.cases[1]
  case = dataclasses.replace(case, images={**case.images, "c": case.images["a"]})
  arrays = store.slices(store.info.cases[1], (4,))
  arrays["images"]["c"] = 100 - arrays["images"]["a"]
  arrays["images"]["b"] = np.zeros_like(arrays["images"]["a"])
  target = case_target(arrays, case, task, info, "fusion")
  np.testing.assert_allclose(target[..., 2], case_source(arrays, case, task, info)[..., 0],
                             atol=1e-6)


def test_a_case_needs_pet_and_source(store):
  task, case = make_task(fused().data, store.info), store.info.cases[1]
  assert usable(case, task, "fusion")
  for name in "ab":
    assert not usable(dataclasses.replace(case, images={name: case.images[name]}), task, "fusion")
  either = dataclasses.replace(task, sources=("a", "c"), presence=True)
  assert usable(case, either, "fusion")
  assert not usable(case, dataclasses.replace(either, sources=("c", "a")), "fusion")


def test_valid_where_pet_and_source_are(store):
  task, case = make_task(fused().data, store.info), store.info.cases[1]
  arrays = store.slices(case, (4,))
  arrays["valid"]["a"][0, :, 0] = False
  arrays["valid"]["b"][0, 0] = False
  valid = case_valid(arrays, case, task, "fusion")
  assert valid.sum() == 19 * 23 and not valid[0, 0].any() and not valid[0, :, 0].any()


@pytest.mark.parametrize("changes", [{}, {"context": 1}, {"size": "8,16,16"}])
def test_examples_hold_the_colour_image(store, changes):
  task = make_task(fused(**changes).data, store.info)
  example = Examples(store, task, Augment(flip=True, rotate=5))(ROW, np.random.default_rng(0))
  assert example["target"].shape == (*task.size, 3) and example["target_modality"] == 2
  assert {k: (v.shape, v.dtype) for k, v in example.items()} == {
    k: (v.shape[1:], v.dtype) for k, v in example_batch(task, store.info).items()}


@pytest.mark.parametrize("context", [0, 1])
def test_example_is_the_target_of_its_slice(store, context):
  task = make_task(fused(context=context).data, store.info)
  example = Examples(store, task, Augment())(ROW, np.random.default_rng(0))
  case = store.info.cases[1]
  whole = case_target(store.slices(case, (4,)), case, task, store.info, "fusion")
  np.testing.assert_array_equal(example["target"][6:26, 4:28], whole[0])
  assert (example["target"][:6] == -1).all()


# --- bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize("changes, message", [
  ({"fusion": ""}, "say which by data.fusion; this data set has b"),
  ({"fusion": "a"}, "data.fusion='a' is no PET modality; this data set has b"),
  ({"fusion": "us"}, "data.fusion='us' is no PET"),
  ({"targets": "fusion,b"}, "the only target"),
  ({"targets": "b", "fusion": "a"}, "no PET modality"),
  ({"source": "fusion"}, "data.source: unknown modality 'fusion'"),
])
def test_refusals(store, changes, message):
  with pytest.raises(UserError, match=message):
    make_task(fused(**changes).data, store.info)


def _typed(info, **types):
  modalities = {m: dataclasses.replace(info.modalities["a"], name=m, type=t)
                for m, t in types.items()}
  return dataclasses.replace(info, modalities=modalities)


def test_the_first_source_must_be_mr(store):
  info = _typed(store.info, a="ct", b="pet", c="mr")
  with pytest.raises(UserError, match="must be an MR; 'a' is of type ct"):
    make_task(fused(source="a,c").data, info)
  assert make_task(fused(source="c,a").data, info).fusion == "b"


def test_a_pet_that_is_not_synthesised(store):
  info = _typed(store.info, a="mr", b="pet", c="mr")
  for changes in ({"source": "a,b", "targets": "fusion"}, {"targets": "c"}):
    with pytest.raises(UserError, match="data.fusion=b: it is to be synthesised"):
      make_task(fused(**changes).data, info)
  assert make_task(fused(targets="b,c").data, info).fusion == "b"


def test_a_recoloured_source_is_refused(store):
  """The grey of the target would be another than the source's."""
  with pytest.raises(UserError, match="gamma and contrast"):
    batches(store, fused(), 1, Augment(gamma=0.1))


def test_a_column_of_that_name_is_refused(tmp_path):
  (tmp_path / "x.nii.gz").touch()
  (tmp_path / "cases.csv").write_text("subject,t1,fusion\np1,x.nii.gz,x.nii.gz\n")
  with pytest.raises(UserError, match="'fusion' cannot name an image column"):
    read_table(tmp_path / "cases.csv")


def test_simulated_data_hold_the_pet_of_a_fusion(tmp_path, monkeypatch):
  config = fused(source="t1", fusion="pet")
  config.data.simulated.update(n_subjects=1, spacing="12,12,12")
  monkeypatch.setattr(prepare, "prepare", lambda given: given.table)
  assert read_table(builtin.make(config, tmp_path)).modalities == ("t1", "pet", "ceiling_pet")
  config.data.fusion = ""
  with pytest.raises(UserError, match="set data.fusion=pet"):
    builtin.make(config, tmp_path / "other")
