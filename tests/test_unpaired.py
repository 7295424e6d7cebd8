"""Unpaired training: source and target of two subjects, from cases that may have one of both."""

import dataclasses
from collections import Counter

import numpy as np
import pytest
from ml_collections import ConfigDict
from test_pipeline import batches, fields
from test_train import last_state, scale_build, trained

from medsynth_jax import builtin, methods
from medsynth_jax import config as configs
from medsynth_jax.data.augment import Augment
from medsynth_jax.data.dataset import Store, load_info
from medsynth_jax.data.draws import lenders, training_index
from medsynth_jax.data.examples import in_plane, make_task
from medsynth_jax.data.pipeline import Examples, told
from medsynth_jax.errors import UserError


class Coded(Store):
  """A data set without files: every pixel of slice k of volume v is 10 v + k."""

  def slices(self, case, numbers):
    shape = (len(numbers), *in_plane(case, self.info))
    image = np.broadcast_to(10.0 * case.volume + np.asarray(numbers)[:, None, None], shape)
    there = np.ones(shape, bool)
    return {"images": {m: image.astype(np.float32) for m in case.images},
            "valid": {m: there for m in case.images}, "mask": there, "rois": {}}


def coded(folder, has, subjects=None, slices=None) -> Coded:
  """Training cases that have the modalities `has` ("ab", "b"), one a subject unless told.

  `slices`: {volume: its slices with foreground}; all of 1..8 unless told.
  """
  info = load_info(folder)
  case, cases = info.split("train")[0], []
  for v, own in enumerate(has):
    shown = (slices or {}).get(v, tuple(range(1, 9)))
    cases.append(dataclasses.replace(
      case, volume=v, subject=f"s{v if subjects is None else subjects[v]}", session=f"v{v}",
      images={m: case.images["a"] for m in own}, foreground=dict.fromkeys(own, shown)))
  return Coded(folder, dataclasses.replace(info, cases=tuple(cases)))


def code(image) -> tuple[int, int]:
  """(volume, slice) of what an example of `Coded` shows in the middle."""
  value = round((float(image[tuple(n // 2 for n in image.shape[:-1])][0]) + 1) * 50)
  return value // 10, value % 10


def drawn(store, n=20, **data):
  """[(source's, target's (volume, slice), example)] of n batches of four."""
  found = []
  for batch in batches(store, fields(**data), n, draw="unpaired"):
    for i in range(4):
      example = {name: x[i] for name, x in batch.items()}
      found.append((code(example["source"]), code(example["target"]), example))
  return found


def test_source_and_target_are_of_two_subjects(three):
  """Volumes 0 and 1 are of one subject; 2 has the source alone, 3 the target alone."""
  store = coded(three, ("ab", "ab", "a", "b"), subjects=(0, 0, 2, 3))
  rows = drawn(store)
  pairs = {(a[0], b[0]) for a, b, _ in rows}
  assert pairs == {(0, 3), (1, 3), (2, 0), (2, 1), (2, 3)}
  for (volume, k), _, example in rows:
    assert (example["volume"], example["slice"]) == (volume, k) and example["paired"] == 0
    assert example["subject"] == (0 if volume < 2 else 1)
    assert (example["source_modality"], example["target_modality"]) == (0, 1)


def test_every_slice_of_another_subject_is_lent_alike(three):
  """The lender's slices with foreground of the target, no others; a pass takes each source once."""
  store = coded(three, ("a", "b", "b"), slices={1: (2, 5), 2: (7,)})
  rows = drawn(store, 20)
  assert Counter(a for a, _, _ in rows) == {(0, k): 10 for k in range(1, 9)}
  lent = Counter(b for _, b, _ in rows)
  assert set(lent) == {(1, 2), (1, 5), (2, 7)} and min(lent.values()) > 15  # of 80
  listed, = lenders(store.info, make_task(fields().data, store.info))
  assert sorted(map(tuple, listed.tolist())) == [(1, 2), (1, 5), (2, 7)]


def test_each_target_has_its_own_lenders(three):
  store = coded(three, ("a", "b", "c", "ac"))
  for (v, _), (w, _), example in drawn(store, 20, targets="b,c"):
    assert v != w and w in ((1,) if example["target_modality"] == 1 else (2, 3))


def test_a_subject_who_could_only_be_paired_with_itself_gives_no_source(three):
  assert {(a[0], b[0]) for a, b, _ in drawn(coded(three, ("ab", "a")), 5)} == {(1, 0)}


def test_measured_where_each_was(three):
  """`valid` and `mask` are the source's, `target_valid` the other subject's target's."""
  class Cropped(Coded):
    def slices(self, case, numbers):
      arrays = super().slices(case, numbers)
      for name, edge in (("a", 5), ("b", 12)):
        if name in case.images:
          arrays["valid"][name] = np.indices(arrays["mask"].shape)[1] >= edge
      arrays["mask"] = np.indices(arrays["mask"].shape)[2] >= (20 if case.volume else 7)
      return arrays
  store = coded(three, ("ab", "b"))
  store = Cropped(store.folder, store.info)
  example = Examples(store, make_task(fields().data, store.info), Augment(), "unpaired")(
    np.array([0, 4, 0], np.int32), np.random.default_rng(0))
  sums = {n: example[n].sum() for n in ("valid", "target_valid", "mask")}
  assert sums == {"valid": 15 * 24, "target_valid": 8 * 24, "mask": 15 * 17}


def test_each_side_has_its_own_pose_and_misalignment(three):
  """Mirrored apart, cropped apart; a fixed misalignment is that of the volume it belongs to."""
  class Ramp(Coded):
    def slices(self, case, numbers):
      arrays = super().slices(case, numbers)
      ramp = np.broadcast_to(4.0 * np.arange(20)[:, None], (len(numbers), 20, 24))
      return arrays | {"images": {m: ramp.astype(np.float32) for m in case.images}}
  store = coded(three, ("a", "b", "b"))
  store = Ramp(store.folder, store.info)
  def made(augment, seeds, size="16,16"):
    task = make_task(fields(size=size).data, store.info)
    return [Examples(store, task, augment, "unpaired")(
      np.array([0, 4, 0], np.int32), np.random.default_rng(s)) for s in seeds]
  turned = {tuple(bool(x[n][-1, 8, 0] < x[n][0, 8, 0]) for n in ("source", "target"))
            for x in made(Augment(flip=True), range(20))}
  assert len(turned) == 4
  corners = {tuple(x[n][0, 8, 0].item() for n in ("source", "target"))
             for x in made(Augment(), range(20))}
  assert len(corners) > 8
  sources, targets = (np.stack([x[n] for x in made(Augment(misalign=3, displace=2), range(12),
                                                   "32,32")]) for n in ("source", "target"))
  assert len(np.unique(sources, axis=0)) == 1 and len(np.unique(targets, axis=0)) == 2


def test_subjects_of_other_sizes_and_patches(three):
  store = coded(three, ("a", "b"))
  one, other = store.info.cases
  store = Coded(store.folder, dataclasses.replace(
    store.info, cases=(one, dataclasses.replace(other, shape=(30, 10, 6), foreground={"b": (3,)}))))
  for size, shape in (("16,16", (16, 16)), ("8,16,16", (8, 16, 16))):
    example = Examples(store, make_task(fields(size=size).data, store.info), Augment(displace=1),
                       "unpaired")(np.array([0, 4, 0], np.int32), np.random.default_rng(0))
    assert all(example[n].shape == (*shape, 1) for n in ("source", "target", "target_valid"))
  assert example["valid"].all()
  assert example["target_valid"][6:].sum() == 0 < example["target_valid"][:6].sum() <= 6 * 160


def test_an_excluded_fold_lends_nothing(three):
  store = coded(three, ("ab", "ab", "ab"))
  cases = tuple(dataclasses.replace(c, fold=int(c.volume == 2)) for c in store.info.cases)
  store = Coded(store.folder, dataclasses.replace(store.info, cases=cases))
  got = batches(store, fields(), 10, draw="unpaired", exclude_fold=1)
  shown = {code(image)[0] for b in got for n in ("source", "target") for image in b[n]}
  assert shown == {0, 1}


@pytest.mark.parametrize("has, subjects, message", [
  (("ab", "ab"), (0, 0), "1 subjects have a, 1 have b; there must be two who differ"),
  (("ab",), None, "there must be two who differ"),
  (("a", "a"), None, "2 subjects have a, 0 have b"),
  (("b", "b"), None, "0 subjects have a, 2 have b"),
])
def test_two_subjects_must_be_there(three, has, subjects, message):
  with pytest.raises(UserError, match=message):
    batches(coded(three, has, subjects), fields(), 1, draw="unpaired")


def test_no_foreground_to_draw(three):
  with pytest.raises(UserError, match="no slice left: no training slice with a"):
    batches(coded(three, ("a", "b"), slices={0: ()}), fields(), 1, draw="unpaired")


def test_a_fusion_needs_its_own_source(three):
  info = coded(three, ("ab", "ab")).info
  pet = dataclasses.replace(info.modalities["b"], type="pet")
  info = dataclasses.replace(info, modalities={**info.modalities, "b": pet})
  with pytest.raises(UserError, match="shown on its own source; learn data.targets=b"):
    batches(Coded(three, info), fields(targets="fusion", fusion="b"), 1, draw="unpaired")


def test_what_the_user_is_told(three):
  info = coded(three, ("ab", "a", "a", "b")).info
  task = make_task(fields().data, info)
  assert told(info, task, ["unpaired"]) == ["unpaired: 3 of 4 training cases have a",
                                            "unpaired: 2 of 4 training cases have b"]
  assert told(info, task, ["unpaired", "pair"]) == [
    "3 training cases are skipped: they lack a or b"]


def test_simulated_sites_that_share_no_patient(tmp_path, monkeypatch):
  """Training subjects have one side each, test subjects both; nobody to validate on."""
  monkeypatch.setitem(methods.METHODS, "scale", scale_build)
  config = configs.single("scale", configs.base(), steps=2, batch_size=2, draw="unpaired")
  config.data.update(source="t1", targets="t2", size="16,16", threads=0)
  config.data.simulated.update(n_subjects=8, spacing="16,16,16", groups=2, missing="group",
                               missing_share=1.0)
  config.draw = "pair"  # fields of data that are equal give one data set, whatever is drawn of it
  config.data.dir = str(builtin.make(config, tmp_path))
  config.draw = "unpaired"
  assert str(builtin.make(config, tmp_path)) == config.data.dir
  info = Store(config.data.dir).info
  has = Counter((c.split, *(m for m in info.names if m in c.images)) for c in info.cases)
  assert has == {(side, m): 1 for side in ("train", "validation") for m in ("t1", "t2")} | {
    ("test", "t1", "t2"): 4}
  here = trained(config, tmp_path / "run")
  assert int(last_state(here, "scale").step) == 2
  index = training_index(info, here.task, draw="unpaired")
  assert set(index[:, 0]) == {c.volume for c in info.split("train") if "t1" in c.images}


def test_a_stage_of_pairs_beside_it_is_still_refused(three):
  """The same data set serves no draw of pairs."""
  store = coded(three, ("a", "b"))
  with pytest.raises(UserError, match="no training case has a and b"):
    batches(store, fields(), 1)
  section = ConfigDict(configs.stage("x", draw="unpaired"))
  assert len(training_index(store.info, make_task(fields().data, store.info), -1,
                            section.draw)) == 8
