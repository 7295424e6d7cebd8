"""Any modality from any other: directions drawn alike, incomplete cases used, one predictor."""

import dataclasses
from collections import Counter

import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from test_pipeline import batches, fields
from test_train import trained
from test_unpaired import code, coded

from medsynth_jax import builtin, methods, optim, run, train
from medsynth_jax import config as configs
from medsynth_jax.contract import Method, category, update
from medsynth_jax.data.augment import Augment
from medsynth_jax.data.dataset import Store
from medsynth_jax.data.draws import cells, training_index
from medsynth_jax.data.examples import directions, make_task, single_images
from medsynth_jax.data.pipeline import Examples, example_batch, told, training
from medsynth_jax.errors import UserError

HAS = ("abc", "abc", "ab", "a", "bc")
ALL = (("a", "b"), ("a", "c"), ("b", "a"), ("b", "c"), ("c", "a"), ("c", "b"))


def any_fields(**data) -> ConfigDict:
  return fields(**{"source": "any", "targets": "", **data})


def task_of(store):
  return make_task(any_fields().data, store.info)


def drawn(store, n, config=None, **section):
  """(volume, source, target) of n batches of four."""
  got = batches(store, config or any_fields(), n, draw="any", **section)
  names = "abc"
  return [(int(b["volume"][i]), names[b["source_modality"][i]], names[b["target_modality"][i]])
          for b in got for i in range(4)]


@pytest.fixture(scope="module")
def store(three):
  """Whole cases 0 and 1, incomplete ones 2 to 4; of case 1 only two slices are large enough."""
  return coded(three, HAS, slices={1: (3, 6)})


def test_directions_are_drawn_alike_then_cases(store):
  """Each run of as many examples as there are directions holds each of them once."""
  rows = drawn(store, 30)
  assert directions(task_of(store)) == ALL
  for first in range(0, 120, 6):
    assert sorted(r[1:] for r in rows[first:first + 6]) == sorted(ALL)
  shares = Counter((s, v) for v, s, _ in rows)
  for source, cases in (("a", 4), ("b", 4), ("c", 3)):
    found = {v: n for (s, v), n in shares.items() if s == source}
    assert len(found) == cases and min(found.values()) > 0.5 * 40 / cases


def test_each_case_is_listed_as_often_however_few_its_slices(store):
  index = training_index(store.info, task_of(store), draw="any")
  for cell, (source, _) in zip(cells(store.info, index, "category"), ALL, strict=True):
    assert Counter(cell[:, 0].tolist()) == {v: 8 for v, own in enumerate(HAS) if source in own}
    few = Counter(cell[cell[:, 0] == 1][:, 1].tolist())
    assert few == {3: 4, 6: 4}
  assert len(index) == 2 * 8 * (4 + 4 + 3)


def test_a_target_that_the_case_lacks_is_drawn_too(store):
  """Its label, no image: background, not paired, measured where the source was."""
  seen = set()
  for batch in batches(store, any_fields(), 40, draw="any"):
    for i in range(4):
      example = {n: x[i] for n, x in batch.items()}
      v, t = int(example["volume"]), "abc"[example["target_modality"]]
      there = t in HAS[v]
      seen.add((v, t, there))
      assert example["paired"] == there and code(example["source"]) == (v, example["slice"])
      assert example["valid"].sum() == example["target_valid"].sum() == 480
      if there:
        np.testing.assert_array_equal(example["target"], example["source"])
      else:
        assert (example["target"] == -1).all()
  assert {(3, "b", False), (3, "c", False), (4, "a", False), (2, "c", False)} <= seen


def test_valid_where_both_were_measured(store):
  class Cropped(type(store)):
    def slices(self, case, numbers):
      arrays = super().slices(case, numbers)
      for name, edge in (("a", 5), ("b", 12)):
        if name in case.images:
          arrays["valid"][name] = np.indices(arrays["mask"].shape)[1] >= edge
      return arrays
  half = Cropped(store.folder, store.info)
  examples = Examples(half, task_of(half), Augment(), "any")
  for volume, number, rows in ((0, 0, 8), (0, 2, 8), (0, 1, 15), (3, 0, 15)):
    example = examples(np.array([volume, 3, number], np.int32), np.random.default_rng(0))
    assert {example[n].sum() for n in ("valid", "target_valid", "mask")} == {rows * 24}


def test_shapes_are_those_of_the_example_batch(store):
  """One channel, also of a modality that has several windows as a source."""
  a = store.info.modalities["a"]
  info = dataclasses.replace(store.info, modalities={
    **store.info.modalities, "a": dataclasses.replace(a, source=a.source * 3)})
  task = make_task(any_fields().data, info)
  example = Examples(type(store)(store.folder, info), task, Augment(), "any")(
    np.array([0, 3, 0], np.int32), np.random.default_rng(0))
  assert {k: (v.shape, v.dtype) for k, v in example.items()} == {
    k: (v.shape[1:], v.dtype) for k, v in example_batch(task, info, "any").items()}
  assert single_images(task, info) == (("a", -1), ("b", -1), ("c", -1))


def test_single_images_of_such_a_task(store):
  got = batches(store, any_fields(), 20, draw="single")
  assert {int(t) for b in got for t in b["target_modality"]} == {0, 1, 2}
  assert all((b["source_modality"] == b["target_modality"]).all() for b in got)


def test_any_number_of_processes_and_an_exact_resume(store):
  config, section = any_fields(), ConfigDict(configs.stage("x", batch_size=4, draw="any"))
  def stream(process=0, processes=1):
    return iter(training(store, task_of(store), Augment(flip=True), section, config, 0, process,
                         processes))
  def rows(parts):
    both = {n: np.concatenate([p[n] for p in parts]) for n in parts[0]}
    return sorted(zip(both["volume"], both["slice"], both["source_modality"],
                      both["target_modality"], strict=True))
  one, two = stream(), [stream(0, 2), stream(1, 2)]
  for _ in range(4):
    assert rows([next(one)]) == rows([next(p) for p in two])
  state, expected = one.get_state(), next(one)
  again = stream()
  again.set_state(state)
  other = next(again)
  assert all(np.array_equal(expected[n], other[n]) for n in expected)


def test_an_excluded_fold(store):
  cases = tuple(dataclasses.replace(c, fold=int(c.volume == 0)) for c in store.info.cases)
  left = type(store)(store.folder, dataclasses.replace(store.info, cases=cases))
  assert {v for v, *_ in drawn(left, 20, exclude_fold=1)} == {1, 2, 3, 4}


# --- bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize("has, message", [
  (("ab", "ab"), "'c' is absent from the training data: no training case has it"),
  (("a", "b", "c"), "no training case has two of a, b, c: nothing is paired"),
])
def test_cases_that_cannot_do(three, has, message):
  with pytest.raises(UserError, match=message):
    batches(coded(three, has), any_fields(), 1, draw="any")


@pytest.mark.parametrize("data, section, message", [
  ({}, {"draw": "pair"}, "draw='pair': with data.source=any .* set draw='any'"),
  ({}, {"draw": "unpaired"}, "draw='unpaired': with data.source=any"),
  ({"source": "a", "targets": "b"}, {"draw": "any"}, "draw='any' .* set data.source=any"),
  ({}, {"draw": "any", "displace": 1.0}, "none is the misaligned one; set displace=0"),
  ({}, {"draw": "any", "misalign": 1.0}, "set misalign=0"),
])
def test_draws_that_do_not_fit(store, data, section, message):
  with pytest.raises(UserError, match=message):
    batches(store, any_fields(**data), 1, **section)


def test_what_the_user_is_told(store):
  assert told(store.info, task_of(store), ["any"]) == [
    "1 training cases have one of a, b, c only: they train the unpaired losses"]
  some = make_task(any_fields(targets="b,c").data, store.info)
  assert told(store.info, some, ["any"]) == [
    "1 training cases have one of b, c only: they train the unpaired losses",
    "1 training cases are skipped: they have none of b, c"]


# --- a run ---------------------------------------------------------------------------------------


def gains_build(config, stage, info, stages):
  """A toy generator of every direction: the source plus 0.2 for each place of the target in the
  list, less 0.05 for each of the source.
  """
  section = configs.stages(config)[stage]
  names = configs.names(config.data.targets) or info.names
  codes = [info.index(n) for n in names]

  def made(params, batch):
    source = category(batch["source_modality"], codes)
    shift = params["shift"][category(batch["target_modality"], codes)] - 0.05 * source
    return jnp.clip(batch["source"] + shift.reshape((-1, *[1] * (batch["source"].ndim - 1))), -1, 1)

  def step(state, batch, key):
    return update(state, txs, shift={"shift": jnp.zeros(len(codes))}), {"paired": batch["paired"
                                                                                       ].mean()}

  txs = {"shift": optim.make(section.optim, section.steps)}
  return Method(lambda key, batch: {"shift": {"shift": 0.2 * jnp.arange(len(codes))}}, step,
                lambda state, batch, key: made(state.nets["shift"], batch), txs, keeps=("shift",),
                many_targets=True, many_sources=True, draws=("any", "pair"))


def gains_config(**data) -> ConfigDict:
  config = configs.single("gains", configs.base(), steps=2, batch_size=2, draw="any")
  config.data.update(source="any", targets="t1,t2,flair", size="16,16", threads=0)
  config.data.update(data)
  config.data.simulated.update(n_subjects=8, spacing="16,16,16", missing="random",
                               missing_share=0.4, seed=8)
  return config


@pytest.fixture(scope="module")
def gains(tmp_path_factory):
  """A run of every direction on simulated subjects of whom images are missing."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(methods.METHODS, "gains", gains_build)
    config, folder = gains_config(), tmp_path_factory.mktemp("gains")
    config.data.dir = str(builtin.make(config, folder))
    yield trained(config, folder / "run")


def test_simulated_subjects_lack_images_but_none_to_be_scored(gains):
  info = gains.info
  assert info.names == ("t1", "t2", "flair") and not info.modalities.keys() - set(info.names)
  have = {side: [len(c.images) for c in info.split(side)] for side in ("train", "test")}
  assert have["test"] == [3, 3] and min(have["train"]) < 3 and len(have["train"]) == 5


def test_validation_scores_every_direction_that_a_subject_has(gains):
  store = Store(gains.config.data.dir)
  class Quiet:
    def image(self, *rest): pass
    def scalars(self, step, values): self.values = values
  log = Quiet()
  validation = train._Validation(gains, store, "gains", log)
  found = {(view.task.sources[0], target, case.volume) for view, case, target in validation.pairs}
  assert found == {(s, t, c.volume) for c in store.info.split("validation")
                   for s, t in directions(gains.task) if {s, t} <= set(c.images)}
  state = gains.restore("gains", "latest")[0]
  errors = {d: validation._case(state, view, case, d[1])[0] for view, case, d in (
    (v, c, (v.task.sources[0], t)) for v, c, t in validation.pairs)}
  assert len(set(errors.values())) == len(errors) > 0  # other sources and labels, other images


def test_one_predictor_serves_all_views(gains, monkeypatch):
  here = run.open_run(gains.folder)
  predict = here.predictor("gains")
  views = here.views()
  assert [v.task.sources for v in views] == [("t1",), ("t2",), ("flair",)]
  assert all(v.predictor("gains") is predict for v in views)


def test_a_modality_must_be_named_to_be_simulated(tmp_path):
  for changes, message in (({"targets": "t1"}, "name two modalities or more in data.targets"),
                           ({"targets": ""}, "name two modalities or more")):
    with pytest.raises(UserError, match=message):
      builtin.make(gains_config(**changes), tmp_path)
  config = gains_config()
  config.data.simulated.permute = True
  with pytest.raises(UserError, match="data.simulated.permute"):
    builtin.make(config, tmp_path)
