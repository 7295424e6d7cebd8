"""What a stage draws: pairs or single images, cells equally often, folds left out."""

import dataclasses
from collections import Counter

import numpy as np
import pytest
from conftest import make_toy_data
from ml_collections import ConfigDict
from test_pipeline import batches, fields

from medsynth_jax import builtin
from medsynth_jax import config as configs
from medsynth_jax.data.dataset import Store, load_info
from medsynth_jax.data.draws import cells, check_folds, training_index
from medsynth_jax.data.examples import make_task, single_images
from medsynth_jax.data.intensities import Scaling, to_model
from medsynth_jax.data.pipeline import Augment, Examples, example_batch, training
from medsynth_jax.errors import UserError

# training cases: what they have and which scanner's they are; no two cells are of a size
HAS = (("ab", "x"), ("ab", "y"), ("ab", "y"), ("ab", "y"), ("ac", "y"), ("c", "x"))


@pytest.fixture(scope="module")
def store(tmp_path_factory):
  """Modality a with b or c, for the training cases as in HAS; a as a source has two windows."""
  folder = make_toy_data(tmp_path_factory.mktemp("draws"), splits=("train",) * 6 + ("test",),
                         modalities=("a", "b", "c"))
  info = load_info(folder)
  wide, narrow = ({"kind": "window", "low": 0.0, "high": h} for h in (100.0, 40.0))
  a = dataclasses.replace(info.modalities["a"], source=(wide, narrow, wide))
  scalings = tuple(Scaling("linear", r["low"], r["high"]) for r in a.source)
  cases = list(info.cases)
  for i, (has, group) in enumerate(HAS):
    images = {m: cases[i].images[m] for m in has}
    if "a" in images:
      images["a"] = dataclasses.replace(images["a"], source=scalings)
    cases[i] = dataclasses.replace(cases[i], images=images, group=group)
  return Store(folder, dataclasses.replace(info, modalities={**info.modalities, "a": a},
                                           cases=tuple(cases)))


def both(**changes) -> ConfigDict:
  return fields(targets="b,c", **changes)


def drawn(store, n=12, **section):
  """(volume, slice, source and target modality) of n batches of four."""
  got = batches(store, both(), n, **section)
  names = ("volume", "slice", "source_modality", "target_modality")
  return [tuple(int(b[m][i]) for m in names) for b in got for i in range(4)]


def stream(store, config, section, process=0, processes=1, augment=None):
  task = make_task(config.data, store.info)
  return iter(training(store, task, augment or Augment(), section, config, 0, process, processes))


def stage(**changes) -> ConfigDict:
  return ConfigDict(configs.stage("pix2pix", **{"batch_size": 4, **changes}))


# --- balance -----------------------------------------------------------------------------------


def test_without_balance_a_category_is_drawn_as_often_as_there_is_of_it(store):
  shares = Counter(t for *_, t in drawn(store, 20))
  assert shares == {1: 64, 2: 16}  # two passes over four cases with b and one with c


def test_categories_are_drawn_equally_often(store):
  """Every pair of examples holds one of each; each cell is gone through before it repeats."""
  rows = drawn(store, 20, balance="category")
  assert all({a[-1], b[-1]} == {1, 2} for a, b in zip(rows[::2], rows[1::2], strict=True))
  assert len({r[:2] for r in rows if r[-1] == 1}) == 32
  assert Counter(r[:2] for r in rows if r[-1] == 2) == {(4, k): 5 for k in range(1, 9)}


def test_categories_and_groups_are_drawn_equally_often(store):
  group = {i: g for i, (_, g) in enumerate(HAS)}
  rows = drawn(store, 12, balance="category,group")
  shares = Counter((target, group[volume]) for volume, _, _, target in rows)
  assert shares == {(1, "x"): 16, (1, "y"): 16, (2, "y"): 16}  # there is no pair of c from x


def test_the_cells_of_an_index(store):
  index = training_index(store.info, make_task(both().data, store.info))
  assert [len(c) for c in cells(store.info, index, "")] == [40]
  assert [len(c) for c in cells(store.info, index, "category")] == [32, 8]
  parts = cells(store.info, index, "category,group")
  assert [(set(c[:, 0]), set(c[:, 2])) for c in parts] == [
    ({0}, {0}), ({1, 2, 3}, {0}), ({4}, {1})]
  assert sorted(map(tuple, np.concatenate(parts))) == sorted(map(tuple, index))


def test_one_cell_changes_nothing(store):
  config = fields()
  plain, balanced = (batches(store, config, 4, Augment(rotate=5), balance=b)
                     for b in ("", "category"))
  for one, other in zip(plain, balanced, strict=True):
    assert all(np.array_equal(one[n], other[n]) for n in one)


def test_the_order_within_the_mix_is_random(store):
  """Cells in turn would give each of two processes a cell of its own."""
  targets = [r[-1] for r in drawn(store, 20, balance="category")]
  assert 10 < sum(t == 1 for t in targets[::2]) < 30


@pytest.mark.parametrize("section", [
  {"balance": "category,group"}, {"draw": "single"}, {"draw": "single", "balance": "category"},
  {"draw": "unpaired"}, {"draw": "any"}])
def test_any_number_of_processes_shares_the_same_batches(store, section):
  config, augment = both(), Augment(rotate=10, flip=True)
  if section.get("draw") == "any":
    config.data.update(source="any", targets="")
  def the_batches(processes):
    parts = [stream(store, config, stage(**section), p, processes, augment)
             for p in range(processes)]
    for _ in range(5):
      got = [next(p) for p in parts]
      yield {n: np.concatenate([g[n] for g in got]).tolist() for n in got[0]}
  assert list(the_batches(1)) == list(the_batches(2)) == list(the_batches(4))


@pytest.mark.parametrize("section", [{"balance": "category"}, {"draw": "single"}])
def test_iterator_state_continues_exactly(store, section):
  config, augment = both(threads=2), Augment(rotate=10)
  first = stream(store, config, stage(**section), augment=augment)
  for _ in range(3):
    next(first)
  state = first.get_state()
  expected = [next(first) for _ in range(3)]
  again = stream(store, config, stage(**section), augment=augment)
  again.set_state(state)
  for batch in expected:
    other = next(again)
    assert all(np.array_equal(batch[n], other[n]) for n in batch)


def test_stages_and_seeds_draw_differently(store):
  """The order of a cell, and of the cells: shuffled, by the seed and the stage."""
  def order(seed, number):
    config = both()
    config.seed = seed
    batch = next(iter(training(store, make_task(config.data, store.info), Augment(),
                               stage(balance="category", batch_size=32), config, number)))
    rows = zip(batch["volume"], batch["slice"], batch["target_modality"], strict=True)
    rows = [tuple(map(int, r)) for r in rows]
    return [r for r in rows if r[2] == 1], [r[2] for r in rows]
  first = order(0, 0)
  assert first == order(0, 0) and first[0] != sorted(first[0])
  for other in (order(1, 0), order(0, 1)):
    assert all(a != b for a, b in zip(first, other, strict=True))


def test_cells_are_shuffled_apart(store):
  """Cells of one size do not go through their slices in step."""
  one, other = store.info.cases[0], store.info.cases[4]  # b and c, eight slices each
  info = dataclasses.replace(store.info, cases=tuple(
    c if c in (one, other) else dataclasses.replace(c, split="test") for c in store.info.cases))
  rows = drawn(Store(store.folder, info), 8, balance="category")
  slices = [[r[1] for r in rows if r[-1] == target] for target in (1, 2)]
  assert len(slices[0]) == len(slices[1]) == 16 and slices[0] != slices[1]


# --- single images -----------------------------------------------------------------------------


def test_single_images_of_a_task(store):
  """Every channel of the source once, and each target by its target scaling."""
  task = make_task(both().data, store.info)
  assert single_images(task, store.info) == (("a", 0), ("a", 1), ("b", -1), ("c", -1))


@pytest.mark.parametrize("number, name, high", [(0, "a", 100), (1, "a", 40), (2, "b", 100)])
def test_a_single_image_is_source_and_target(store, number, name, high):
  task = make_task(both().data, store.info)
  example = Examples(store, task, Augment(), "single")(
    np.array([1, 4, number], np.int32), np.random.default_rng(0))
  image = store.slices(store.info.cases[1], (4,))["images"][name][0]
  inner = example["source"][6:26, 4:28]
  np.testing.assert_allclose(inner[..., 0], to_model(Scaling("linear", 0, high), image), atol=1e-6)
  np.testing.assert_array_equal(example["source"], example["target"])
  index = store.info.index(name)
  assert example["source_modality"] == example["target_modality"] == index
  assert example["paired"] == 1 and example["valid"].sum() == 20 * 24
  assert {k: (v.shape, v.dtype) for k, v in example.items()} == {
    k: (v.shape[1:], v.dtype) for k, v in example_batch(task, store.info, "single").items()}


def test_single_images_need_no_pair(store):
  """The case that has c alone is drawn for c; every image as often as there is of it."""
  rows = drawn(store, 26, draw="single")
  assert all(r[2] == r[3] for r in rows)
  of_c = {r[0] for r in rows if r[2] == 2}
  assert of_c == {4, 5} and {r[0] for r in rows if r[2] == 1} == {0, 1, 2, 3}
  index = training_index(store.info, make_task(both().data, store.info), draw="single")
  assert Counter(index[:, 2]) == {0: 40, 1: 40, 2: 32, 3: 16}


def test_single_images_are_balanced_by_image(store):
  rows = drawn(store, 12, draw="single", balance="category")
  assert Counter(r[2] for r in rows) == {0: 24, 1: 12, 2: 12}  # a has two channels
  groups = cells(store.info, training_index(store.info, make_task(both().data, store.info),
                                            draw="single"), "category,group")
  assert [len(g) for g in groups] == [8, 32, 8, 32, 8, 24, 8, 8]


def test_single_images_are_listed_by_their_own_foreground(store):
  cases = tuple(dataclasses.replace(c, foreground={"a": (2, 3), "b": (4,), "c": (5,)})
                for c in store.info.cases)
  info = dataclasses.replace(store.info, cases=cases)
  task = make_task(both().data, info)
  index = training_index(info, task, draw="single")
  assert {tuple(r) for r in index[index[:, 0] == 0]} == {
    (0, 2, 0), (0, 3, 0), (0, 2, 1), (0, 3, 1), (0, 4, 2)}


def test_a_single_image_is_valid_where_it_was_measured(store):
  class Cropped(Store):
    def slices(self, case, numbers):
      arrays = super().slices(case, numbers)
      arrays["valid"]["a"][:, :5] = False
      return arrays
  task, half = make_task(both().data, store.info), Cropped(store.folder, store.info)
  for number, rows in ((0, 15), (2, 20)):
    example = Examples(half, task, Augment(), "single")(
      np.array([1, 4, number], np.int32), np.random.default_rng(0))
    assert example["valid"].sum() == rows * 24
    assert (example["mask"] <= example["valid"]).all()


def test_augmented_alike_and_recoloured_as_a_source_only(store):
  task, augment = make_task(both().data, store.info), Augment(flip=True, rotate=10, gamma=0.5)
  moved = dataclasses.replace(augment, gamma=0.0)
  for number, recoloured in ((0, True), (2, False)):
    row = np.array([1, 4, number], np.int32)
    example, plain = (Examples(store, task, a, "single")(row, np.random.default_rng(1))
                      for a in (augment, moved))
    np.testing.assert_array_equal(example["source"], example["target"])
    assert np.array_equal(example["source"], plain["source"]) != recoloured
    np.testing.assert_array_equal(example["valid"], plain["valid"])


def test_single_patches_3d(store):
  task = make_task(both(size="8,16,16").data, store.info)
  example = Examples(store, task, Augment(), "single")(
    np.array([1, 4, 2], np.int32), np.random.default_rng(0))
  assert example["source"].shape == (8, 16, 16, 1)
  np.testing.assert_array_equal(example["source"], example["target"])


# --- folds -------------------------------------------------------------------------------------


def test_excluding_a_fold_that_nobody_is_in_is_refused(store):
  """Else an out-of-fold stage would train on all."""
  with pytest.raises(UserError, match="exclude_fold=2: no training subject is in that fold"):
    batches(store, both(), 1, exclude_fold=2)


def test_excluding_everybody_is_refused(store):
  info = dataclasses.replace(store.info, cases=tuple(
    dataclasses.replace(c, fold=0) for c in store.info.cases))
  with pytest.raises(UserError, match="exclude_fold=0 leaves no training subject"):
    training_index(info, make_task(both().data, info), 0)


def test_a_category_that_only_the_excluded_fold_has(store):
  task = make_task(both().data, store.info)
  assert set(training_index(store.info, task, 1)[:, 0]) == {0, 2, 4}
  with pytest.raises(UserError, match="category 'c' is absent .* outside fold 0 has a and c"):
    training_index(store.info, task, 0)  # case 4 alone has a and c


@pytest.mark.parametrize("folds, message", [(3, "have folds 0, 1"), (1, "have folds 0, 1")])
def test_other_folds_than_the_data_sets_are_refused(store, folds, message):
  with pytest.raises(UserError, match=f"folds={folds}: .*{message}.*data.simulated.folds"):
    batches(store, both(), 1, folds=folds)
  batches(store, both(), 1, folds=2)


def test_a_data_set_without_folds(store):
  info = dataclasses.replace(store.info, cases=tuple(
    dataclasses.replace(c, fold=-1) for c in store.info.cases))
  check_folds(info, 0)
  with pytest.raises(UserError, match="have no folds"):
    check_folds(info, 2)


# --- bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize("changes, section, message", [
  ({}, {"draw": "all"}, "draw='all': choose one of pair, unpaired, single"),
  ({}, {"balance": "group"}, "balance='group': choose one of '', 'category', 'category,group'"),
  ({"context": 1}, {"draw": "single"}, "set data.context=0"),
  ({}, {"draw": "single", "misalign": 1.0}, "set misalign=0"),
])
def test_refusals(store, changes, section, message):
  with pytest.raises(UserError, match=message):
    batches(store, both(**changes), 1, **section)


def test_single_images_of_a_fusion_are_refused(store):
  a, b = store.info.modalities["a"], store.info.modalities["b"]
  pet = dataclasses.replace(b, type="pet")
  info = dataclasses.replace(store.info, modalities={"a": a, "b": pet})
  with pytest.raises(UserError, match="learn data.targets=b, which is shown"):
    batches(Store(store.folder, info), fields(targets="fusion", fusion="b"), 1, draw="single")


@pytest.mark.parametrize("section, needs", [
  ({}, "a and c"), ({"balance": "category"}, "a and c"), ({"draw": "single"}, "has c;")])
def test_a_category_absent_from_the_training_data(store, section, needs):
  cases = tuple(dataclasses.replace(c, images={m: i for m, i in c.images.items() if m != "c"})
                for c in store.info.cases[:5])
  info = dataclasses.replace(store.info, cases=cases)
  with pytest.raises(UserError, match=f"category 'c' is absent from the training data.*{needs}"):
    batches(Store(store.folder, info), both(), 1, **section)


# --- the simulated confounded set, end to end --------------------------------------------------


@pytest.fixture(scope="module")
def confounded(tmp_path_factory):
  config = configs.single("pix2pix", configs.base())
  config.data.update(source="pet", targets="ct,t2", size="32,32", threads=0)
  config.data.simulated.update(n_subjects=10, missing="confounded", missing_share=1.0, groups=2,
                               spacing="12,12,12", folds=2, seed=1)
  return config, Store(builtin.make(config, tmp_path_factory.mktemp("confounded")))


def test_the_scanner_tells_the_target_in_training_only(confounded):
  info = confounded[1].info
  has = Counter((c.split, c.group, tuple(m for m in info.names if m in c.images))
                for c in info.cases)
  assert has == {
    ("train", "site0", ("pet", "ct")): 2, ("validation", "site0", ("pet", "ct")): 1,
    ("train", "site1", ("pet", "t2")): 2, ("validation", "site1", ("pet", "t2")): 1,
    ("test", "site0", ("pet", "ct", "t2")): 2, ("test", "site1", ("pet", "ct", "t2")): 2}


def test_training_subjects_lie_in_even_folds_and_one_can_be_left_out(confounded):
  config, store = confounded
  train = store.info.split("train")
  assert Counter((c.fold, c.group) for c in train) == {
    (f, g): 1 for f in (0, 1) for g in ("site0", "site1")}
  assert all(c.fold == -1 for c in store.info.cases if c.split != "train")
  check_folds(store.info, 2)
  held = {c.volume for c in train if c.fold == 1}
  seen = {int(v) for b in batches(store, config, 12, exclude_fold=1, balance="category")
          for v in b["volume"]}
  assert seen == {c.volume for c in train} - held


def test_confounded_training_is_balanced(confounded):
  config, store = confounded
  group = {c.volume: c.group for c in store.info.cases}
  got = batches(store, config, 4, balance="category,group")
  shares = Counter((int(t), group[int(v)]) for b in got
                   for t, v in zip(b["target_modality"], b["volume"], strict=True))
  assert shares == {(store.info.index("ct"), "site0"): 8, (store.info.index("t2"), "site1"): 8}
