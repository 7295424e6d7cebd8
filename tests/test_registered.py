"""A flow measured by a known displacement, its folds, and the shift of an image."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage
from test_evaluate import known, summary
from test_matrix import untrained

from medsynth_jax import config as configs
from medsynth_jax import evaluate, methods, registered
from medsynth_jax.contract import Method
from medsynth_jax.data.dataset import Store
from medsynth_jax.data.displacements import displaced
from medsynth_jax.errors import UserError
from medsynth_jax.registered import Registration, measure, shift_of, structured

MM = 1.5
TEST = 5  # the test volume of make_toy_data


@functools.cache
def true(size=(20, 24)):
  """The displacement of the test volume, in the middle of an input of that size."""
  u = registered.known((20, 24), (2.0, 2.0), MM, 0, TEST)
  return np.pad(u, [((n - m) // 2,) * 2 for n, m in zip(size, (20, 24), strict=True)] + [(0, 0)])


def flow_build(config, stage, info, built):
  """A method that gives the truth of `known`, and the flow that its field `finds` names."""
  del info, built
  section, size = configs.stages(config)[stage], configs.sizes(config.data.size)

  def flow(state, batch):
    moved = jnp.abs(batch["target"] - known(batch["source"])).max() > 1e-3
    zero = jnp.zeros((*batch["source"].shape[:-1], 2))
    found = {"zero": zero, "true": zero + true(size) * moved,
             "folded": zero.at[..., 0].set(-2 * jnp.arange(size[0])[:, None])}
    return found[section.finds]

  return Method(lambda key, batch: {}, lambda state, batch, key: (state, {}),
                lambda state, batch, key: known(batch["source"]), {},
                flow=None if section.finds == "none" else flow)


def measured(toy_data, folder, finds, size="20,24"):
  """(run, table) of an evaluated run with stages that find these flows."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(methods.METHODS, "flow", flow_build)
    config = configs.base(stages=tuple(finds))
    for name in finds:
      config[name] = configs.stage("flow", finds=name)
    config.data.update(dir=str(toy_data), source="a", targets="b", size=size)
    config.evaluation.update(panels=0, displace=MM)
    here = untrained(patch, config, folder)
    return here, evaluate.evaluate(here, Store(toy_data))


@pytest.fixture(scope="module")
def three_flows(toy_data, tmp_path_factory):
  finds = ("true", "zero", "folded", "none")
  return measured(toy_data, tmp_path_factory.mktemp("flows") / "run", finds)


def test_the_true_flow_has_no_error(three_flows):
  found = summary(three_flows[0])["registration"]["a->b"]["true"]
  scores = {name: entry["mean"] for name, entry in found["scores"].items()}
  assert scores["error"] < 1e-5 and found["ratio"] < 1e-5 and scores["still"] == 0
  assert 0.5 * MM < scores["zero_error"] < 2 * MM and 0.1 < scores["used"] < 1
  assert scores["folded"] == 0 and scores["shift"] < 0.01
  assert found["displacement_mm"] == MM and list(found["subjects"]) == ["s5"]


def test_the_zero_flow_has_ratio_one(three_flows):
  found = summary(three_flows[0])["registration"]["a->b"]["zero"]
  assert found["ratio"] == pytest.approx(1) and found["scores"]["still"]["mean"] == 0


def test_folds_are_told(three_flows):
  here, table = three_flows
  found = summary(here)["registration"]["a->b"]["folded"]
  assert found["scores"]["folded"]["mean"] == pytest.approx(1)
  assert "folded (Jacobian determinant 0 or less): 100.000% of body voxels" in table
  assert table.count("WARNING: the flow folds in more than 0.1%") == 1


def test_the_table_tells_what_is_demanded(three_flows):
  _, table = three_flows
  parts = [x.split("\n\n")[0] for x in table.split("Registration by ")[1:]]
  assert [p.split()[0] for p in parts] == ["true", "zero", "folded"]
  assert "(mean 1.5 mm; n = 1)" in parts[0] and "above 5% of the range a voxel" in parts[0]
  assert "ratio " in parts[0] and "(below 0.5: ok)" in parts[0]
  assert "ratio 1.000 (below 0.5: not ok)" in parts[1]
  assert "length of the flow without displacement: 0.000 mm" in parts[1]


def test_windows_larger_than_the_slice(toy_data, tmp_path):
  here, _ = measured(toy_data, tmp_path / "run", ("true",), "32,32")
  assert summary(here)["registration"]["a->b"]["true"]["scores"]["error"]["mean"] < 1e-5


def test_no_registration_without_a_flow(three_flows):
  here, table = three_flows
  assert list(summary(here)["registration"]["a->b"]) == ["true", "zero", "folded"]
  assert "Registration by none" not in table


def test_patches_are_not_measured():
  found = Registration(4.0)
  assert found.described() == {"measured": False, "why": "3-D patches"}
  assert found.lines("gan") == [
    "Registration by gan: not measured, for this run works on 3-D patches."]


def test_a_displacement_that_folds():
  with pytest.raises(UserError, match="evaluation.displace=90: .*use a smaller one"):
    registered.known((40, 40), (10.0, 10.0), 90.0, 0, TEST)


# --- by hand -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def slices():
  """(truth [4, 44, 48, 1] in model units, mask)."""
  rng = np.random.default_rng(0)
  x = ndimage.gaussian_filter(rng.standard_normal((4, 44, 48)), (0, 3, 3))
  mask = np.zeros(x.shape, bool)
  mask[:, 9:-9, 9:-9] = True
  return (x / np.abs(x).max())[..., None].astype(np.float32), mask


def test_lengths_are_in_mm(slices):
  """A constant displacement of (1, 2) pixels of 3 and 2 mm is 5 mm long."""
  truth, mask = slices
  u = np.broadcast_to(np.float32([1, 2]), (44, 48, 2))
  scores = measure(truth, truth[..., 0], mask, (3.0, 2.0), u,
                   lambda shown: np.broadcast_to(np.float32([1, 1]), (4, 44, 48, 2)))
  assert scores["zero_error"] == pytest.approx(5) and scores["error"] == pytest.approx(2)
  assert scores["still"] == pytest.approx(np.hypot(3, 2)) and scores["folded"] == 0
  assert scores["still_voxel"] == pytest.approx(np.hypot(1, 1))


def test_what_is_shown_is_the_displaced_target(slices):
  truth, mask = slices
  shown, u = [], registered.known((44, 48), (1.0, 1.0), 1.0, 0, 1)
  def flow(x):
    shown.append(x)
    return np.zeros((*x.shape[:3], 2), np.float32)
  measure(truth, truth[..., 0], mask, (1.0, 1.0), u, flow)
  np.testing.assert_array_equal(shown[0][2, ..., 0], displaced(truth[2, ..., 0], u))
  np.testing.assert_array_equal(shown[1], truth)
  np.testing.assert_array_equal(u, registered.known((44, 48), (1.0, 1.0), 1.0, 0, 1))
  assert np.abs(u - registered.known((44, 48), (1.0, 1.0), 1.0, 0, 2)).max() > 0.1


def test_only_voxels_with_gradient_count():
  image = np.zeros((2, 20, 20))
  image[:, :, 10:] = 1  # half the range of -1..1
  found = structured(image, np.ones(image.shape, bool))
  assert set(np.flatnonzero(found.all((0, 1)))) == {8, 9, 10, 11} and not found[:, :, :7].any()


@pytest.mark.parametrize("shift", [(0.0, 0.0), (0.3, -0.45), (-2.6, 1.7), (4.0, -3.0)])
def test_a_known_shift_is_found(shift, slices):
  """To 0.05 voxel, whatever the contrast, and with some noise in both."""
  truth, mask = slices
  rng = np.random.default_rng(1)
  image = truth[..., 0]
  # shows at p + s what the truth shows at p
  moved = ndimage.shift(image, (0, *shift), order=5, mode="nearest")
  for noise, gain in ((0.0, 1.0), (0.02, 0.6), (0.02, -0.5)):
    noisy = gain * moved + 0.2 + noise * rng.standard_normal(moved.shape)
    reference = image + noise * rng.standard_normal(image.shape)
    np.testing.assert_allclose(shift_of(noisy, reference, mask), shift, atol=0.05)


def test_a_wrong_contrast_is_no_shift(slices):
  """Dark and bright may even be exchanged."""
  truth, mask = slices
  for image in (truth ** 2, np.abs(truth + 0.3), np.exp(2 * truth), np.sin(4 * truth)):
    assert np.linalg.norm(shift_of(image[..., 0], truth[..., 0], mask)) < 0.1


def test_no_shift_of_an_image_without_contrast(slices):
  truth, mask = slices
  flat = np.zeros(truth.shape[:3])
  assert np.isnan(shift_of(flat, truth[..., 0], mask)).all()
  assert np.isnan(shift_of(truth[..., 0], truth[..., 0], np.zeros_like(mask))).all()


def test_more_slices_than_are_needed(slices):
  truth, mask = slices
  many = np.tile(truth[..., 0], (30, 1, 1))
  moved = ndimage.shift(many, (0, 0.5, 0.25), order=3, mode="nearest")
  np.testing.assert_allclose(shift_of(moved, many, np.tile(mask, (30, 1, 1))), (0.5, 0.25),
                             atol=0.05)
