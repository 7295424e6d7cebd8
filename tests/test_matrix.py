"""Scores of a run that makes each modality from each other: who is compared, where, in which files.
"""

import csv
import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_toy_data
from PIL import Image
from test_report import changed, summary

from medsynth_jax import code_switch, evaluate, methods, run
from medsynth_jax import config as configs
from medsynth_jax.code_switch import Switch
from medsynth_jax.contract import Method, create, served
from medsynth_jax.data.dataset import Store
from medsynth_jax.data.pipeline import example_batch
from medsynth_jax.errors import UserError
from medsynth_jax.scorer import Scorer, fit_floors

SPLITS = ("train",) * 3 + ("validation",) + ("test",) * 5
# what the test subjects s4 .. s8 lack
LACKS = {6: {"c"}, 7: {"a"}, 8: {"a", "b"}}


def any_build(config, stage, info, built):
  """From a the truth, from all others the source itself: b or c, as the code says."""
  del config, stage, info, built

  def synthesize(state, batch, key):
    def wide(name):
      return batch[name].reshape(-1, *[1] * (batch["source"].ndim - 1))
    truth = 2 * jnp.sin((batch["source"] + 1) * 50 / 60 + 0.2 * wide("target_modality")) ** 2 - 1
    return jnp.where(wide("source_modality") == 0, truth, batch["source"])

  return Method(lambda key, batch: {}, lambda state, batch, key: (state, {}), synthesize, {},
                many_targets=True, many_sources=True)


def untrained(patch, config, folder):
  """A run of methods without nets, whose stages need no checkpoint."""
  def restore(here, stage, which):
    method = here.methods[stage]
    state = create(method, here.key(stage), example_batch(here.task, here.info), {})
    return served(state, method.keeps), 1
  patch.setattr(run.Run, "restore", restore)
  folder.mkdir(exist_ok=True)
  return run.build(config, Store(config.data.dir).info, folder)


def any_run(patch, data, folder, lacks=None, panels=0):
  """(run, store) with data.source=any, on data whose cases lack `lacks` {volume: modalities}."""
  patch.setitem(methods.METHODS, "any", any_build)
  config = configs.single("any", configs.base())
  config.data.update(dir=str(data), source="any", targets="a,b,c")
  config.evaluation.panels = panels
  here = untrained(patch, config, folder)
  info = dataclasses.replace(here.info, cases=tuple(map(without(lacks or {}), here.info.cases)))
  return dataclasses.replace(here, info=info), Store(data, info)


def without(lacks):
  return lambda case: dataclasses.replace(case, images={
    m: x for m, x in case.images.items() if m not in lacks.get(case.volume, ())})


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  folder = make_toy_data(tmp_path_factory.mktemp("any") / "data", splits=SPLITS,
                         modalities=("a", "b", "c"))
  return changed(folder, {}, without(LACKS))


@pytest.fixture(scope="module")
def scored(data, tmp_path_factory):
  with pytest.MonkeyPatch.context() as patch:
    here, store = any_run(patch, data, tmp_path_factory.mktemp("any") / "run", panels=2)
    return here, evaluate.evaluate(here, store)


@pytest.fixture(scope="module")
def whole(three, tmp_path_factory):
  """(run, table) where all cases have all modalities."""
  with pytest.MonkeyPatch.context() as patch:
    here, store = any_run(patch, three, tmp_path_factory.mktemp("whole") / "run")
    return here, evaluate.evaluate(here, store)


PAIRS = [f"{s}->{t}" for s in "abc" for t in "abc" if s != t]
N = {"a->b": 3, "b->a": 3, "a->c": 2, "c->a": 2, "b->c": 3, "c->b": 3}


def errors(data, source, target):
  """Masked MAE of the source taken for the target, of each test case that has both."""
  store = Store(data)
  found = {}
  for case in store.info.split("test"):
    if {source, target} <= set(case.images):
      arrays = store.volume(case)
      x, y = (arrays["images"][m].astype(np.float64) / 100 for m in (source, target))
      found[case.subject] = np.abs(x - y)[arrays["mask"]].mean()
  return found


def test_every_direction_has_its_rows_and_subjects(scored, data):
  here, _ = scored
  found = summary(here)
  assert set(found["scores"]) == set(found["above_floor"]) == set(PAIRS)
  for pair, rows in found["scores"].items():
    assert list(rows) == ["constant", "mean_image", "lut", "lut2", "identity_normalised", "any"]
    assert {row["mae"]["n"] for row in rows.values()} == {N[pair]}
  for source, target in ("bc", "cb", "ba"):
    mean = np.mean(list(errors(data, source, target).values()))
    rows = found["scores"][f"{source}->{target}"]
    assert rows["any"]["mae"]["mean"] == pytest.approx(mean, rel=1e-4)
    assert rows["identity_normalised"]["mae"]["mean"] == pytest.approx(mean, rel=1e-4)
  for pair in ("a->b", "a->c"):
    assert found["scores"][pair]["any"]["mae"]["mean"] < 1e-4


def test_the_matrix_of_means(scored, data):
  here, table = scored
  found = summary(here)["matrix"]
  assert found["modalities"] == ["a", "b", "c"] and set(found["scores"]) == {"psnr", "ssim", "mae"}
  for metric, rows in found["scores"].items():
    assert list(rows) == ["any", "lut2", "constant"]
    for row, cells in rows.items():
      for pair in PAIRS:
        wanted = summary(here)["scores"][pair][row][metric]
        assert cells[pair]["n"] == N[pair]
        assert float(cells[pair]["mean"]) == pytest.approx(float(wanted["mean"]))
  assert table.startswith("The matrix of all directions: simulated data, 4 test subjects.")
  lines = table[table.index("MAE [normalised]"):].splitlines()
  assert lines[1].split() == ["row", "source", "a", "b", "c"]
  b = [float(x) for x in lines[3].replace("(3)", "").split() if x[0].isdigit()]
  assert lines[2].split()[:3] == ["any", "a", "-"] and lines[3].count("(3)") == 2
  assert b == pytest.approx([np.mean(list(errors(data, "b", t).values())) for t in "ac"], abs=6e-4)


def test_how_many_directions_are_above_lut2(scored):
  here, table = scored
  above = summary(here)["matrix"]["above_lut2"]["any"]
  assert above["a->b"] and above["a->c"] and set(above) == set(PAIRS)
  count, lost = sum(above.values()), [p for p in PAIRS if not above[p]]
  assert f"any above lut2 in PSNR and SSIM: in {count} of 6 directions; not in" in table
  assert f"not in {', '.join(lost)}\n" in table and "b->a" in lost


def test_common_subjects(scored, data):
  """Two test subjects have all three; the others count in some directions only."""
  here, table = scored
  found = summary(here)["matrix"]
  assert found["common_cases"] == ["s4", "s5"]
  assert {c["n"] for rows in found["common"].values() for x in rows.values() for c in x.values()
          } == {2}
  own = errors(data, "b", "c")
  assert found["common"]["mae"]["any"]["b->c"]["mean"] == pytest.approx(
    np.mean([own["s4"], own["s5"]]), rel=1e-4)
  assert "common subjects: the 2 cases that have all modalities" in table
  assert table.count("MAE [normalised]") == 2


def test_one_matrix_where_all_cases_are_complete(whole):
  here, table = whole
  assert "common subjects" not in table and "Not scored" not in table
  found = summary(here)["matrix"]
  assert found["common"] == found["scores"] and found["common_cases"] == ["s5"]


def test_cases_and_directions_that_nobody_scores(data, tmp_path, monkeypatch):
  """A case alone is named; so is a direction without a subject, and that nobody is common."""
  lonely = {4: {"c"}, 5: {"a", "c"}, 6: {"c"}, 7: {"a"}, 8: {"b", "c"}}
  here, store = any_run(monkeypatch, data, tmp_path / "run", lonely)
  table = evaluate.evaluate(here, store)
  assert "Not scored, for no subject has both: a->c, c->a." in table
  assert "Not scored, for they have no second modality: s5, s8." in table
  assert "No case has all modalities" in table and "common subjects" not in table
  found = summary(here)["matrix"]
  assert found["directions_not_scored"] == ["a->c", "c->a"] and found["common"] is None
  assert found["cases_not_scored"] == ["s5", "s8"] and found["common_cases"] == []
  assert list(summary(here)["scores"]) == ["a->b", "b->a", "b->c", "c->b"]
  assert "a->c:" not in table  # said once


def test_direction_that_no_training_case_has(data, tmp_path, monkeypatch):
  """Its floor is the constant and the identity; what is above lut2 there cannot be said."""
  here, store = any_run(monkeypatch, data, tmp_path / "run", {0: {"c"}, 1: {"a"}, 2: {"c"}})
  table, found = evaluate.evaluate(here, store), summary(here)
  assert list(found["scores"]["a->c"]) == ["constant", "identity_normalised", "any"]
  assert found["protocol"]["targets"]["a->c"]["lut_channel"] is None
  arrays = store.volume(here.info.cases[1])
  mean = arrays["images"]["c"][arrays["mask"]].mean() / 100
  wanted = []
  for case in here.info.split("test"):
    if {"a", "c"} <= set(case.images):
      arrays = store.volume(case)
      wanted.append(np.abs(arrays["images"]["c"] / 100 - mean)[arrays["mask"]].mean())
  assert found["scores"]["a->c"]["constant"]["mae"]["mean"] == pytest.approx(np.mean(wanted),
                                                                             rel=1e-4)
  assert found["matrix"]["above_lut2"]["any"]["a->c"] is None
  assert "cannot be said of a->c, c->a" in table
  assert table.count("No training subject has both") == 2


def test_one_pass_over_the_training_cases_fits_all_floors(data, tmp_path, monkeypatch):
  """Each is read once, and every direction has the floor that it has alone."""
  here, store = any_run(monkeypatch, data, tmp_path / "run", {0: {"c"}, 1: {"a"}})
  scorers = [(Scorer(view, store, targets), targets)
             for view, targets in evaluate.scored_cases(here, "test")]
  volume, read = store.volume, []
  monkeypatch.setattr(store, "volume", lambda case: read.append(case.volume) or volume(case))
  together = fit_floors(scorers)
  assert read == [0, 1, 2]
  rng, means = np.random.default_rng(0), []
  source = rng.uniform(-1, 1, (10, 20, 24, 1)).astype(np.float32)
  for (scorer, targets), floors in zip(scorers, together, strict=True):
    for target in targets:
      (alone,) = fit_floors([(scorer, [target])])
      rows, own = (f[target].predict(source, (3, 2, 2)) for f in (floors, alone))
      assert list(rows) == list(own) == ["constant", "lut", "lut2", "mean_image"]
      assert all(np.array_equal(rows[name], own[name]) for name in rows)
      means.append(floors[target].constant)
  assert len({*means}) == 6  # of other subjects each


def test_code_switch_in_short(scored):
  here, table = scored
  found = summary(here)["code_switch"]
  assert set(found) == {"a", "b", "c"}
  assert found["a"]["any"]["closer_to_own_target_than"]["b"] == {"c": True, "constant": True}
  assert found["b"]["any"]["closer_to_own_target_than"]["c"]["a"] is False  # the same image
  part = table[table.index("Code switch of any"):].splitlines()
  assert part[1].split() == ["direction", *(x for c in "abc" for x in ("code", c)), "constant", "n"]
  assert [line.split()[0] for line in part[2:8]] == PAIRS
  assert part[8].startswith("The image of its own code is the closest to the target in 2 of 6"
                            " directions (not in b->a, b->c, c->a, c->b); it beats constant in ")


def test_a_code_has_to_be_closer_than_all_others():
  switch = Switch(("b", "c", "d"))
  ones, mask = np.ones((1, 2, 2)), np.ones((1, 2, 2), bool)
  for code, image in (("b", 0.5), ("c", 0.0), ("d", 0.8), ("constant", -1.0)):
    switch.add("b", code, "s1", ones, image * ones, mask)
  other = Switch(("a", "c", "d"))
  for code, image in (("a", 0.5), ("c", 0.0), ("d", 0.2), ("constant", 0.9)):
    other.add("a", code, "s1", ones, image * ones, mask)
  last = code_switch.lines("gan", {"a": switch, "b": other})[-1]
  assert "closest to the target in 1 of 2 directions (not in a->b);" in last
  assert last.endswith("beats constant in 1 of 2 directions (not in b->a).")


def test_files(scored):
  here, table = scored
  folder = here.folder / "evaluation"
  assert sorted(p.name for p in folder.iterdir()) == [
    "matrix.png", "panels", "per_subject.csv", "summary.json", "table.txt"]
  assert (folder / "table.txt").read_text() == table + "\n"
  with open(folder / "per_subject.csv") as file:
    lines = list(csv.DictReader(file))
  assert len(lines) == 6 * sum(N.values()) and {x["direction"] for x in lines} == set(PAIRS)
  assert len({p.name for p in (folder / "panels").iterdir()}) == 2 * 6 - 2  # of two subjects one
  for pair in PAIRS:
    assert f"{pair}: simulated data, n = {N[pair]} test subjects" in table
  assert table.count("Synthesis by any") == 1


def test_s3_metrics_where_they_are_asked_for(tmp_path, monkeypatch):
  """Those that slices of 32 x 36 allow, of incomplete cases and of the common ones."""
  data = make_toy_data(tmp_path / "data", shape=(32, 36, 14), modalities=("a", "b", "c"),
                       splits=("train",) * 3 + ("validation", "test", "test"))
  here, store = any_run(monkeypatch, data, tmp_path / "run", {5: {"c"}})
  here.config.evaluation.s3 = True
  table, found = evaluate.evaluate(here, store), summary(here)
  names = ["psnr", "ssim", "mae", "nmae_s3", "psnr_s3", "ssim_s3", "niqe_fitted_s3"]
  assert list(found["matrix"]["scores"]) == list(found["matrix"]["common"]) == names
  for metric in names[3:]:
    for row, cells in found["matrix"]["scores"][metric].items():
      assert {p: c["n"] for p, c in cells.items()} == {p: 1 if "c" in p else 2 for p in PAIRS}
      for pair in PAIRS:
        wanted = found["scores"][pair][row][metric]["mean"]
        assert float(cells[pair]["mean"]) == pytest.approx(float(wanted), rel=1e-6)
    assert {c["n"] for c in found["matrix"]["common"][metric]["any"].values()} == {1}
  assert table.count("PSNR_S3 [dB]\n") == table.count("NMAE_S3\n") == 2
  # only PSNR and SSIM say what is above lut2
  assert found["matrix"]["above_lut2"]["any"]["a->b"] is True
  real = {pair: x["s3"]["niqe_of_real_images"]["niqe_fitted_s3"]
          for pair, x in found["protocol"]["targets"].items()}
  assert real["a->b"] == pytest.approx(real["c->b"], abs=1) and real["a->b"] != real["c->b"]
  with Image.open(here.folder / "evaluation" / "matrix.png") as picture:
    assert picture.size == (1958, 1650)  # two lines of four panels


def test_a_target_is_fitted_for_s3_once(three, tmp_path, monkeypatch):
  """Not by each source again: NIQE's model takes long."""
  here, store = any_run(monkeypatch, three, tmp_path / "run")
  here.config.evaluation.s3, known = True, {}
  scorers = [Scorer(view, store, targets, None, known)
             for view, targets in evaluate.scored_cases(here, "test")]
  assert [list(s.s3) for s in scorers] == [["b", "c"], ["a", "c"], ["a", "b"]]
  assert scorers[0].s3["c"] is scorers[1].s3["c"] and scorers[1].s3["a"] is scorers[2].s3["a"]


def test_no_subject_has_two(data, tmp_path, monkeypatch):
  lonely = {volume: {"a", "b"} for volume in range(4, 9)}
  here, _ = any_run(monkeypatch, data, tmp_path / "run", lonely)
  with pytest.raises(UserError, match="no test subject has two of a, b, c"):
    evaluate.scored_cases(here, "test")
