"""The lumen of vessels in a synthetic CT: by hand, in every row, and what bad fields get."""

import csv
import dataclasses

import numpy as np
import pytest
from conftest import make_toy_data
from scipy import ndimage
from test_evaluate import known_build, known_run, summary

from medsynth_jax import evaluate, methods
from medsynth_jax.data.dataset import Store
from medsynth_jax.errors import UserError
from medsynth_jax.metrics import summary as metrics
from medsynth_jax.metrics.lumen import lumen_dice

SPLITS = ("train",) * 2 + ("validation",) + ("test",) * 3


def tube():
  """(image, region, mask) of a vessel of 4 x 2 x 2 voxels of 300 HU in tissue of 40 HU."""
  image = np.full((6, 12, 12), 40.0)
  region = np.zeros(image.shape, bool)
  region[1:5, 5:7, 5:7] = True
  image[region] = 300
  return image, region, np.ones(image.shape, bool)


def test_dice_in_closed_form():
  image, region, mask = tube()
  assert lumen_dice(image, region, mask, 150) == 1
  assert lumen_dice(image, region, mask, 300) == 0  # brighter, not as bright
  half = np.where(np.arange(12) < 6, 40.0, image)
  assert lumen_dice(half, region, mask, 150) == pytest.approx(2 * 8 / (8 + 16))
  wide = image.copy()
  wide[2, 5, 7:] = 300  # five voxels beside the vessel, of which two are near
  assert lumen_dice(wide, region, mask, 150) == pytest.approx(2 * 16 / (18 + 16))
  wide[2, 8, 8] = 300  # two to the side and two down: too far
  assert lumen_dice(wide, region, mask, 150) == pytest.approx(2 * 16 / (18 + 16))


def test_only_the_mask_counts():
  image, region, mask = tube()
  mask[:, :6] = False
  image[:, 4] = 300
  assert lumen_dice(image, region, mask, 150) == 1
  assert np.isnan(lumen_dice(image, region & ~mask, mask, 150))


def test_a_larger_dice_is_better():
  assert metrics.higher_is_better("dice_vessel") and metrics.unit_of("dice_vessel", "HU") == "1"


class Vessels(Store):
  """The region holds what is above 400 HU in b; the first test case has none."""

  def volume(self, case):
    arrays = super().volume(case)
    region = arrays["images"]["b"] > 400
    first = case.volume == self.info.split("test")[0].volume
    return arrays | {"rois": {} if first else {"vessel": region}}


@pytest.fixture(scope="module")
def vessels(tmp_path_factory):
  """(run, store, table) of a run of CT to CT whose data have a region."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(methods.METHODS, "known", known_build)
    folder = tmp_path_factory.mktemp("vessels")
    data = make_toy_data(folder / "data", ct=True, splits=SPLITS)
    here = known_run(data, folder / "run", "shift", "bound")
    here.config.evaluation.lumen = "vessel"
    here = dataclasses.replace(here, info=dataclasses.replace(here.info, rois=("vessel",)))
    store = Vessels(data, here.info)
    yield here, store, evaluate.evaluate(here, store)


def test_every_row_has_a_dice(vessels):
  here, store, table = vessels
  rows = summary(here)["scores"]["a->b"]
  wanted, own = {"identity": [], "shift": []}, []
  for case in here.info.split("test")[1:]:
    arrays = store.volume(case)
    mask, region = arrays["mask"], arrays["rois"]["vessel"] & arrays["mask"]
    near = ndimage.binary_dilation(region, iterations=2) & mask
    def dice(image, near=near, region=region):
      found = near & (image > 150)
      return 2 * (found & region).sum() / (found.sum() + region.sum())
    wanted["identity"].append(dice(arrays["images"]["a"]))
    wanted["shift"].append(dice(arrays["images"]["a"] + 0.1 / 2 * 4095))
    own.append(dice(arrays["images"]["b"]))
  for row, values in wanted.items():
    assert rows[row]["dice_vessel"]["mean"] == pytest.approx(np.mean(values), abs=1e-3)
    assert rows[row]["dice_vessel"]["n"] == 2 and rows[row]["mae_vessel"]["n"] == 2
  assert rows["bound"]["dice_vessel"]["mean"] == pytest.approx(np.mean(own), abs=1e-3)
  for row in rows.values():
    assert row["dice_vessel_reference"]["mean"] == pytest.approx(np.mean(own), abs=1e-6)
  part = table[table.index("Lumen of 2 subjects: voxels above 150 HU in 'vessel' or within 2"):]
  assert f"dice: {np.mean(own):.3f}):" in part.splitlines()[0]
  assert part.splitlines()[1].split() == ["dice_vessel", "mae_vessel"]
  assert [x.split()[0] for x in part.splitlines()[3:3 + len(rows)]] == list(rows)


def test_files_tell_the_lumen(vessels):
  here, _, _ = vessels
  assert summary(here)["protocol"]["targets"]["b"]["lumen"] == {
    "region": "vessel", "above_hu": 150, "within_voxels": 2}
  with open(here.folder / "evaluation/per_subject.csv") as file:
    lines = list(csv.DictReader(file))
  told = {x["subject"]: x["dice_vessel"] for x in lines if x["row"] == "constant"}
  assert list(map(bool, told.values())) == [False, True, True]


def test_no_lumen_unless_asked(vessels):
  here, store, _ = vessels
  config = here.config.copy_and_resolve_references()
  config.evaluation.update(lumen="", panels=0)
  table = evaluate.evaluate(dataclasses.replace(here, config=config), store)
  assert "Lumen" not in table and "dice" not in table and "mae_vessel" in table


def test_what_bad_fields_get(vessels):
  here, store, _ = vessels
  config = here.config.copy_and_resolve_references()
  config.evaluation.lumen = "artery"
  with pytest.raises(UserError, match="evaluation.lumen='artery'.*the regions vessel"):
    evaluate.evaluate(dataclasses.replace(here, config=config), store)
  without = dataclasses.replace(here, info=dataclasses.replace(here.info, rois=()))
  with pytest.raises(UserError, match="no region; name a column mask_<region>"):
    evaluate.scored_cases(without, "test")
  kinds = {n: dataclasses.replace(m, type="mr") for n, m in here.info.modalities.items()}
  brain = dataclasses.replace(here, info=dataclasses.replace(here.info, modalities=kinds))
  with pytest.raises(UserError, match="needs a CT, and this run makes b"):
    evaluate.scored_cases(brain, "test")
