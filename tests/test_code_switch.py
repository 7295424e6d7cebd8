"""Whether each code of a network makes its own modality, and who is compared."""

import dataclasses

import numpy as np
import pytest
from conftest import make_toy_data
from test_report import SPLITS, changed, known_run, summary

from medsynth_jax import maker
from medsynth_jax.code_switch import Switch
from medsynth_jax.data.dataset import Store
from medsynth_jax.data.intensities import Scaling


@pytest.fixture(scope="module")
def code_data(tmp_path_factory):
  """MR a, from which a CT and an MR are made; the last test subject has no CT."""
  folder = make_toy_data(tmp_path_factory.mktemp("codes") / "data", splits=SPLITS,
                         modalities=("a", "ct", "t2"))
  def without(case):
    lacking = {"ct"} if case.volume == len(SPLITS) - 1 else set()
    return dataclasses.replace(case, images={
      n: x for n, x in case.images.items() if n not in lacking})
  return changed(folder, {"ct": ("ct", "HU", -1024.0, Scaling("linear", 0.0, 100.0))}, without)


@pytest.fixture(scope="module")
def switched(code_data, tmp_path_factory):
  made, image = [], maker.Maker.image
  def watched(self, volume, target, truth):
    made.append((self.stage, volume.case.name, target, truth is not None))
    return image(self, volume, target, truth)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(maker.Maker, "image", watched)
    here, table = known_run(code_data, tmp_path_factory.mktemp("codes") / "run",
                            ("coded", "stuck", "bound"), targets="ct,t2")
  return here, table, made


def test_code_switch(switched, code_data):
  here, table, _ = switched
  found = summary(here)["code_switch"]
  assert set(found) == {"coded", "stuck"}  # a bound sees the answer
  coded = found["coded"]
  assert coded["n"] == {"ct": 4, "t2": 5}
  for target in ("ct", "t2"):
    assert coded["mae"][target][target] == pytest.approx(0.05, abs=1e-3)
  store, other = Store(code_data), []
  for case in store.info.split("test")[:4]:
    arrays = store.volume(case)
    ct, t2 = (arrays["images"][n] / 100 for n in ("ct", "t2"))
    other.append(np.abs(t2 + 0.05 - ct)[arrays["mask"]].mean())
  assert coded["mae"]["ct"]["t2"] == pytest.approx(np.mean(other), abs=2e-3)
  assert coded["closer_to_own_target_than"] == {"ct": {"t2": True, "constant": True},
                                                "t2": {"ct": True, "constant": True}}
  stuck = found["stuck"]["closer_to_own_target_than"]
  assert not stuck["t2"]["ct"] and not stuck["ct"]["t2"]  # both codes make the same image
  assert ("code ct: closer to its own target than the image of code t2 is: yes, beats constant:"
          " yes") in table
  assert "code t2: closer to its own target than the image of code ct is: no" in table
  assert "Code switch of coded: " in table and "Code switch of bound" not in table


def test_the_constant_of_the_code_switch(switched, code_data):
  here, _, _ = switched
  store = Store(code_data)
  arrays = [store.volume(c) for c in store.info.split("train")]
  mean = np.concatenate([a["images"]["t2"][a["mask"]] for a in arrays]).mean() / 100
  errors = []
  for case in store.info.split("test"):
    arrays = store.volume(case)
    errors.append(np.abs(arrays["images"]["t2"] / 100 - mean)[arrays["mask"]].mean())
  found = summary(here)["code_switch"]["coded"]["mae"]["t2"]["constant"]
  assert found == pytest.approx(np.mean(errors), rel=1e-3)


def test_each_code_is_made_once(switched):
  """Of every case by every code, whatever targets it has; a bound only makes what is there."""
  here, _, made = switched
  assert len(set(made)) == len(made)
  names = [c.name for c in here.info.split("test")]
  for stage in ("coded", "stuck"):
    assert {x[1:] for x in made if x[0] == stage} == {(n, t, False) for n in names
                                                      for t in ("ct", "t2")}
  assert {x[1:] for x in made if x[0] == "bound"} == {
    (n, t, True) for n in names for t in ("ct", "t2") if (n, t) != (names[-1], "ct")}


def test_a_bound_reconstructs_each_target(switched):
  here, table, _ = switched
  for direction in ("a->ct", "a->t2"):
    rows = summary(here)["scores"][direction]
    assert rows["bound"]["ssim"]["mean"] > 0.99999
    assert rows["bound"]["nmae"]["mean"] < 1e-4
  assert table.count("bound (bound: sees the target)") == 4  # two grids a direction


def test_codes_whose_target_nobody_has():
  switch = Switch(("ct", "t2"))
  ones, mask = np.ones((1, 2, 2)), np.ones((1, 2, 2), bool)
  for code, image in (("ct", 0.5), ("t2", 0.0), ("constant", -1.0)):
    for subject in ("s1", "s1", "s2"):
      switch.add("ct", code, subject, ones, image * ones, mask)
  assert switch.targets == ["ct"] and switch.count("ct") == 2
  assert [switch.mean("ct", c) for c in ("ct", "t2", "constant")] == [0.25, 0.5, 1]
  assert switch.verdicts() == ["code ct: closer to its own target than the image of code t2 is:"
                               " yes, beats constant: yes"]
