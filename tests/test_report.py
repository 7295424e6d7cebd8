"""What an evaluation says of fusion images, uptake, samples, codes, groups and time."""

import csv
import dataclasses
import json
import shutil

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import make_toy_data
from scipy import stats

from medsynth_jax import config as configs
from medsynth_jax import evaluate, methods, panels, run, train
from medsynth_jax.contract import Method
from medsynth_jax.data import fusion
from medsynth_jax.data.dataset import Store, load_info, save_info
from medsynth_jax.data.intensities import Scaling, to_model
from medsynth_jax.metrics import uptake, volume

SPLITS = ("train",) * 3 + ("validation",) + ("test",) * 5
SQRT = Scaling("sqrt", 0.0, 25.0)


def suv(source):
  """The PET of `pet_data` from model units of a: 0..10, above 2.5 in half of the voxels."""
  return 10 * jnp.sin((source + 1) * 50 / 60 + 0.2) ** 2


def as_pet(x):
  return 2 * jnp.sqrt(x / 25) - 1


def rgb(batch, x):
  return 2 * fusion.render((batch["source"][..., 0] + 1) / 2, x[..., 0]) - 1


def drawn(batch):
  """Samples 0, 1, 2 are SUV 0, 6.25, 25 everywhere."""
  level = batch["sample"].astype(jnp.float32) - 1
  return jnp.zeros_like(batch["source"]) + level.reshape(-1, *[1] * (batch["source"].ndim - 1))


def coded(batch):
  """CT (number 1 of `code_data`) or MR (number 2) by the code, each 0.1 from the truth."""
  a = (batch["source"] + 1) * 50 / 60
  code = batch["target_modality"].reshape(-1, *[1] * (batch["source"].ndim - 1))
  return 2 * jnp.sin(a + 0.2 * code) ** 2 - 0.9


IMAGES = {
  "perfect": lambda batch: as_pet(suv(batch["source"])),
  "half": lambda batch: as_pet(suv(batch["source"]) / 2),
  "drawn": drawn,
  "colours": lambda batch: rgb(batch, suv(batch["source"])),
  "pale": lambda batch: rgb(batch, suv(batch["source"]) / 2),
  "grey": lambda batch: jnp.repeat(batch["source"], 3, -1),
  "bound": lambda batch: batch["target"],
  "coded": coded,
  "stuck": lambda batch: coded({**batch, "target_modality": batch["target_modality"] * 0 + 1}),
}


def build(config, stage, info, built):
  """A method that learns nothing and gives the image of IMAGES."""
  del info, built
  name = configs.stages(config)[stage].image

  def step(state, batch, key):
    return state, {"zero": jnp.zeros(())}

  return Method(lambda key, batch: {"none": {"x": jnp.zeros(())}}, step,
                lambda state, batch, key: IMAGES[name](batch), {"none": optax.sgd(0.1)}, ("none",),
                sees_target=name == "bound", many_targets=True, stochastic=name == "drawn",
                note="a remark" if name == "half" else "")


def known_run(data, folder, images, source="a", samples=1, steps=1, **fields):
  """(trained run, its table) with a stage for each of the images (`name` or `name/fold`)."""
  config = configs.base(stages=tuple(images), log_every=1)
  for stage in images:
    config[stage] = configs.stage("told", steps=steps, batch_size=2, image=stage.split("-")[0])
    config[stage].exclude_fold = 0 if stage.endswith("-fold") else -1
  config.data.update(dir=str(data), source=source, threads=0, **fields)
  config.synthesis.samples = samples
  store = Store(data)
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(methods.METHODS, "told", build)
    here = run.start(config, store.info, folder)
    train.train(here, store)
    return here, evaluate.evaluate(here, store)


def changed(folder, kinds, case=lambda c: c, scale=1.0):
  """A toy data set with other types {modality: (type, unit, background, Scaling)} and cases."""
  info = load_info(folder)
  modalities, cases = dict(info.modalities), []
  for name, (kind, unit, background, scaling) in kinds.items():
    rule = {"kind": "sqrt" if scaling.curve == "sqrt" else "window", "low": scaling.low,
            "high": scaling.high}
    modalities[name] = dataclasses.replace(modalities[name], type=kind, unit=unit, target=rule,
                                           background=background, source=(rule,), typical=scaling)
  for old in info.cases:
    images = {n: dataclasses.replace(
      x, source=(kinds[n][3],), target=kinds[n][3], slope=x.slope * scale,
      intercept=x.intercept * scale) if n in kinds else x for n, x in old.images.items()}
    cases.append(case(dataclasses.replace(old, images=images)))
  save_info(dataclasses.replace(info, modalities=modalities, cases=tuple(cases)),
            folder / "dataset.json")
  return folder


@pytest.fixture(scope="module")
def pet_data(tmp_path_factory):
  """MR a and a PET of 0..10 SUV that is a function of it, from two scanners."""
  folder = make_toy_data(tmp_path_factory.mktemp("pet") / "data", splits=SPLITS,
                         modalities=("a", "pet", "ceiling_pet"))
  pet = ("pet", "SUV", 0.0, SQRT)
  return changed(folder, {"pet": pet, "ceiling_pet": pet}, scale=0.1, case=lambda c:
                 dataclasses.replace(c, group=f"site{c.volume % 2}"))


@pytest.fixture(scope="module")
def rendered(pet_data, tmp_path_factory):
  """A run that makes SUV, which is shown in colour on the MR afterwards."""
  return known_run(pet_data, tmp_path_factory.mktemp("pet") / "run",
                   ("perfect", "half", "half-fold", "drawn"), samples=3, steps=2, targets="pet",
                   fusion="pet")


@pytest.fixture(scope="module")
def learned(pet_data, tmp_path_factory):
  """A run that makes the colours themselves."""
  return known_run(pet_data, tmp_path_factory.mktemp("rgb") / "run",
                   ("colours", "pale", "grey", "bound"), targets="fusion", fusion="pet")


def summary(here):
  text = (here.folder / "evaluation/summary.json").read_text()
  return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))



def volumes(data):
  """(grey, SUV, mask) of the test subjects."""
  store = Store(data)
  for case in store.info.split("test"):
    arrays = store.volume(case)
    yield (to_model(Scaling("linear", 0, 100), arrays["images"]["a"]) + 1) / 2, \
      arrays["images"]["pet"], arrays["mask"]


# --- PET as a target -------------------------------------------------------------------------


def test_uptake_of_every_row(rendered, pet_data):
  here, table = rendered
  rows = summary(here)["scores"]["a->pet"]
  hot = [(x[m & (x > 2.5)], x[m]) for _, x, m in volumes(pet_data)]
  assert rows["half"]["mae_hot"]["mean"] == pytest.approx(
    np.mean([(h / 2).mean() for h, _ in hot]), rel=1e-3)
  assert rows["half"]["bias_hot"]["mean"] == pytest.approx(-rows["half"]["mae_hot"]["mean"])
  assert rows["half"]["suvmax_bias"]["mean"] == pytest.approx(
    np.mean([-x.max() / 2 for _, x in hot]), rel=1e-3)
  assert rows["half"]["suvmean_bias"]["mean"] == pytest.approx(
    np.mean([-x.mean() / 2 for _, x in hot]), rel=1e-3)
  assert rows["half"]["auc_hot"]["mean"] == pytest.approx(1)  # half the SUV, the same order
  assert rows["constant"]["auc_hot"]["mean"] == 0.5
  assert 0.2 < rows["mean_image"]["auc_hot"]["mean"] < 0.8
  assert rows["half"]["suvmax_bias"]["unit"] == "SUV" and rows["half"]["auc_hot"]["unit"] == "1"
  assert "half tells hot voxels with AUC 1.000, beside 0." in table and "of mean_image" in table
  assert "auc_hot" not in summary(here)["scores"]["a->fusion"]["half"]


@pytest.fixture(scope="module")
def odd(rendered, pet_data, tmp_path_factory):
  """The same run on data with a region, one subject without uptake, and slices all too small."""
  here, _ = rendered
  folder = tmp_path_factory.mktemp("odd") / "run"
  shutil.copytree(here.folder, folder)
  cold = here.info.split("test")[0].subject
  class Odd(Store):
    def volume(self, case):
      arrays = super().volume(case)
      pet = arrays["images"]["pet"] / (10 if case.subject == cold else 1)
      return arrays | {"images": arrays["images"] | {"pet": pet}, "rois": {"hot": pet > 5}}
  moved = dataclasses.replace(here, folder=folder, info=dataclasses.replace(
    here.info, rois=("hot",)))
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(uptake, "LEAST", 10**6)
    return moved, evaluate.evaluate(moved, Odd(pet_data)), cold


def test_subjects_without_hot_voxels_are_told(odd, pet_data):
  here, table, cold = odd
  assert f"No voxel is hot, so that nothing hot is scored: {cold}." in table
  hot = [c.subject for c, (_, x, m) in zip(here.info.split("test"), volumes(pet_data), strict=True)
         if (x[m] > 2.5).all() and c.subject != cold]
  assert hot and f"Every voxel is hot, so that there is no AUC: {', '.join(hot)}." in table
  found = summary(here)
  assert found["protocol"]["targets"]["pet"]["subjects_hot_throughout"] == hot
  assert found["protocol"]["targets"]["pet"]["subjects_without_hot_voxels"] == [cold]
  assert found["scores"]["a->pet"]["half"]["auc_hot"]["n"] == 4 - len(hot)
  assert found["scores"]["a->pet"]["half"]["mae_hot"]["n"] == 4


def test_uptake_in_regions(odd, pet_data):
  """A region that is named `hot` is not taken for the hot voxels."""
  here, table, cold = odd
  means = [x[m & (x > 5)].mean() / 2
           for c, (_, x, m) in zip(here.info.split("test"), volumes(pet_data), strict=True)
           if c.subject != cold]
  rows = summary(here)["scores"]["a->pet"]
  assert rows["half"]["suvmean_bias_roi_hot"]["mean"] == pytest.approx(-np.mean(means), rel=1e-3)
  assert rows["half"]["suvmax_bias_roi_hot"]["n"] == 4
  assert rows["half"]["mae_roi_hot"]["mean"] == pytest.approx(np.mean(means), rel=1e-3)
  assert rows["half"]["mae_hot"]["mean"] < rows["half"]["mae_roi_hot"]["mean"]
  regions = table[table.index("Bias in regions:"):]
  assert regions.splitlines()[1].split() == ["suvmax_bias_roi_hot", "suvmean_bias_roi_hot"]
  assert "mae_roi_hot" not in summary(here)["scores"]["a->fusion"]["half"]


def test_no_slice_is_large_enough(odd):
  here, table, _ = odd
  cell = summary(here)["uptake_correlation"]["a->fusion"]["half"]["psnr"]["suvmax"]
  assert cell["mean"] is None and cell["n"] == 0
  assert "mean over subjects; 0 slices" in table


def test_mean_of_samples_in_the_unit_of_scores(rendered, pet_data):
  """SUV 0, 6.25 and 25 have the mean 10.42; in model units it would be 6.25."""
  here, table = rendered
  errors = [np.abs(31.25 / 3 - x[m]).mean() for _, x, m in volumes(pet_data)]
  assert summary(here)["scores"]["a->pet"]["drawn"]["mae"]["mean"] == pytest.approx(
    np.mean(errors), rel=1e-4)
  assert "drawn (mean of 3 samples)" in table and "half (a remark)" in table
  assert "perfect (" not in table
  assert summary(here)["speed"]["drawn"]["samples"] == 3
  assert summary(here)["speed"]["half"]["samples"] == 1
  assert summary(here)["protocol"]["notes"] == {"half": "a remark"}


def test_stages_without_one_fold_are_no_rows(rendered):
  here, table = rendered
  assert "half-fold" not in summary(here)["scores"]["a->pet"]
  assert "half-fold" not in table.split("Trained:")[0]
  assert "half-fold" in summary(here)["training"]  # but what they cost counts


# --- fusion ----------------------------------------------------------------------------------


def test_fusion_rendered_from_synthetic_suv(rendered, pet_data):
  here, table = rendered
  rows = summary(here)["scores"]["a->fusion"]
  assert list(rows) == ["constant", "mean_image", "lut", "lut2", "identity", "perfect", "half",
                        "drawn", "ceiling"]
  wanted = {"half": [], "identity": []}
  for grey, x, mask in volumes(pet_data):
    true = fusion.render(grey, x)
    for row, image in (("half", fusion.render(grey, x / 2)), ("identity", grey[..., None])):
      wanted[row].append(((image - true)[mask] ** 2).mean())
  for row, mse in wanted.items():
    assert rows[row]["mse"]["mean"] == pytest.approx(np.mean(mse), rel=1e-3)
    assert rows[row]["psnr"]["mean"] == pytest.approx(np.mean(-10 * np.log10(mse)), abs=0.01)
  assert rows["perfect"]["mae"]["mean"] < 1e-4 and rows["perfect"]["ssim"]["mean"] > 0.9999
  assert rows["half"]["mae"]["unit"] == rows["half"]["mse"]["unit"] == "1"
  assert not [m for m in rows["half"] if m.endswith(("_s2", "_reggan"))]
  assert "a->fusion (rendered from the synthetic SUV): simulated data, n = 5" in table
  part = table[table.index("a->fusion (rendered"):]
  assert part.splitlines()[2].split() == ["psnr", "ssim", "mae", "mse"]
  assert summary(here)["protocol"]["targets"]["fusion"]["made"] == "rendered from the synthetic SUV"


def test_fusion_as_a_learned_target(learned, pet_data):
  here, table = learned
  rows = summary(here)["scores"]["a->fusion"]
  assert list(rows) == ["constant", "mean_image", "lut", "lut2", "identity", "colours", "pale",
                        "grey", "bound", "ceiling"]
  true = [fusion.render(grey, x) for grey, x, _ in volumes(pet_data)]
  masks = [m for *_, m in volumes(pet_data)]
  mse = [((g[..., None] - t)[m] ** 2).mean()
         for (g, _, m), t in zip(volumes(pet_data), true, strict=True)]
  for row in ("grey", "identity"):  # the MR in grey is a copy that scores high already
    assert rows[row]["psnr"]["mean"] == pytest.approx(np.mean(-10 * np.log10(mse)), abs=0.01)
    assert rows[row]["ssim"]["mean"] == pytest.approx(rows["identity"]["ssim"]["mean"], abs=1e-5)
  for row in ("colours", "bound"):
    assert rows[row]["mae"]["mean"] < 1e-4
  assert "bound (bound: sees the target)" in table
  # the floor by channel
  store = Store(pet_data)
  train = [store.volume(c) for c in store.info.split("train")]
  inside = np.concatenate([fusion.render(a["images"]["a"] / 100, a["images"]["pet"])[a["mask"]]
                           for a in train])
  errors = [np.abs(inside.mean(0) - t)[m].mean() for t, m in zip(true, masks, strict=True)]
  assert rows["constant"]["mae"]["mean"] == pytest.approx(np.mean(errors), rel=1e-3)
  assert rows["lut2"]["psnr"]["mean"] > 30  # colours are a function of the MR here
  assert summary(here)["protocol"]["targets"]["fusion"]["made"] == "learned"
  assert summary(here)["protocol"]["targets"]["fusion"]["lut_channel"] == [0, 0, 0]
  assert "rendered" not in table and table.startswith("a->fusion: simulated data")


def test_ceiling_of_a_fusion_shows_the_noise_free_pet(learned, rendered, pet_data):
  store = Store(pet_data)
  wanted = []
  for case in store.info.split("test"):
    images, mask = (store.volume(case)[k] for k in ("images", "mask"))
    a, b = (fusion.render(images["a"] / 100, images[n]) for n in ("pet", "ceiling_pet"))
    wanted.append(np.abs(a - b)[mask].mean())
  for here, _ in (learned, rendered):
    found = summary(here)["scores"]["a->fusion"]["ceiling"]["mae"]["mean"]
    assert found == pytest.approx(np.mean(wanted), rel=1e-3)


@pytest.mark.parametrize("which, row", [("rendered", "half"), ("learned", "pale")])
def test_scores_of_slices_go_with_their_uptake(which, row, request, pet_data):
  here, table = request.getfixturevalue(which)
  found = summary(here)["uptake_correlation"]["a->fusion"]
  assert row in found and "bound" not in found
  each = []
  for grey, x, mask in volumes(pet_data):
    a, b = (np.where(mask[..., None], fusion.render(grey, s), 0) for s in (x, x / 2))
    mse = volume.slice_scores(a, b, mask, data_range=1.0)["mse"]
    each.append(stats.spearmanr(mse, [x[k][mask[k]].mean() for k in range(len(x))]).statistic)
  cell = found[row]["mse"]["suvmean"]
  assert cell["mean"] == pytest.approx(np.mean(each), abs=0.02) and cell["n"] == 5
  assert cell["ci95"][0] <= cell["mean"] <= cell["ci95"][1]
  assert found[row]["psnr"]["suvmean"]["mean"] == pytest.approx(-cell["mean"])
  assert {c["n"] for c in cell["subjects"].values()} == {10}
  assert cell["means"]["n"] == 5 and cell["means"]["spearman_ci95"] is not None
  assert "50 slices, each with 100 mask voxels or more" in table
  assert "rho(PSNR) = -rho(MSE)" in table
  line = next(x for x in table.splitlines() if x.startswith(f"{row} ") and " mse " in x)
  assert f"{cell['mean']:+.2f} [" in line


def test_panels_of_colours(rendered, learned):
  for (here, _), stages in ((rendered, ("drawn", "half", "perfect")),
                            (learned, ("bound", "colours", "grey", "pale"))):
    names = sorted(p.name for p in (here.folder / "evaluation/panels").glob("*fusion*"))
    assert names == [f"a_to_fusion_{row}_{place}.png" for row in stages
                     for place in ("median", "worst")]


def test_colours_turn_with_the_patient():
  image = np.zeros((3, 4, 3))
  image[2, 3] = (1, 0.5, 0)
  shown = panels.radiological(image)
  assert shown.shape == (4, 3, 3) and shown[0, 0].tolist() == [1, 0.5, 0]


# --- groups ----------------------------------------------------------------------------------


def test_scores_by_group(rendered, pet_data):
  here, table = rendered
  found = summary(here)["by_group"]
  assert set(found) == {"a->pet", "a->fusion"}
  assert list(found["a->pet"]) == ["lut2", "perfect", "half", "drawn"]
  errors = {"site0": [], "site1": []}
  for case, (_, x, m) in zip(here.info.split("test"), volumes(pet_data), strict=True):
    errors[case.group].append((x[m] / 2).mean())
  for group, values in errors.items():
    cell = found["a->pet"]["half"][group]
    assert cell["mae"]["mean"] == pytest.approx(np.mean(values), rel=1e-3)
    assert cell["mae"]["n"] == len(values) and set(cell) == {"psnr", "ssim", "mae"}
  assert "By group (scanner or site):" in table
  with open(here.folder / "evaluation/per_subject.csv") as file:
    lines = list(csv.DictReader(file))
  assert list(lines[0])[:4] == ["direction", "row", "subject", "group"]
  assert {(x["subject"], x["group"]) for x in lines} == {
    (c.subject, c.group) for c in here.info.split("test")}


# --- one target -----------------------------------------------------------------------------------


def test_a_single_target_has_no_code_switch(rendered, learned):
  for here, table in (rendered, learned):
    assert "code_switch" not in summary(here) and "Code switch" not in table


# --- time ------------------------------------------------------------------------------------


def test_times_are_told(rendered):
  here, table = rendered
  found = summary(here)
  assert set(found["speed"]) == {"perfect", "half", "drawn"}
  assert all(0 < x["seconds_per_window"] < x["seconds_per_volume"] for x in found["speed"].values())
  assert found["training"]["half"]["steps"] == 2 and found["training"]["half"]["seconds"] > 0
  lines = table.splitlines()
  assert [x.split(":")[0] for x in lines[-4:]] == [
    "Synthesis by perfect", "Synthesis by half", "Synthesis by drawn", "Trained"]
  assert " s a slice and sample, " in lines[-2] and "s a volume of 3 samples" in lines[-2]
  assert "perfect " in lines[-1] and "min (2 steps)" in lines[-1]
