"""Scores of a run: conventions, floor, aggregation, files, and what bad input gets."""

import csv
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import make_toy_data, modality

from medsynth_jax import config as configs
from medsynth_jax import evaluate, floors, methods, panels, results, run, train
from medsynth_jax.contract import Method
from medsynth_jax.data.dataset import Store
from medsynth_jax.data.examples import Task, case_source
from medsynth_jax.data.intensities import Scaling
from medsynth_jax.errors import UserError

ROOT = Path(__file__).parents[1]
SPLITS = ("train",) * 3 + ("validation",) + ("test",) * 4
SUBJECTS = (0, 1, 2, 3, 4, 5, 6, 6)  # the last has two sessions


def known(source):
  """b of make_toy_data from a, both in model units."""
  return 2 * jnp.sin((source + 1) * 50 / 60 + 0.2) ** 2 - 1


IMAGES = {
  "perfect": lambda batch: known(batch["source"]),
  "off": lambda batch: known(batch["source"]) + 0.1,
  "shift": lambda batch: batch["source"] + 0.1,
  "bound": lambda batch: batch["target"],
}


def known_build(config, stage, info, methods):
  """A method that learns nothing and gives the image of IMAGES."""
  del info, methods
  bound = configs.stages(config)[stage].image == "bound"

  def init(key, batch):
    return {"none": {"x": jnp.zeros(())}}

  def step(state, batch, key):
    return state, {"zero": jnp.zeros(())}

  def synthesize(state, batch, key):
    assert bound or "target" not in batch
    return IMAGES[configs.stages(config)[stage].image](batch)

  return Method(init, step, synthesize, {"none": optax.sgd(0.1)}, ("none",), sees_target=bound)


def known_run(data, folder, *images):
  """A trained run with a stage for each of the named images."""
  config = configs.base(stages=tuple(images))
  for name in images:
    config[name] = configs.stage("known", steps=1, batch_size=2, image=name)
  config.data.update(dir=str(data), source="a", targets="b", threads=0)
  store = Store(data)
  here = run.start(config, store.info, folder)
  train.train(here, store)
  return here


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  return make_toy_data(tmp_path_factory.mktemp("mr") / "data", splits=SPLITS, subjects=SUBJECTS,
                       modalities=("a", "b", "ceiling_b"))


@pytest.fixture(scope="module")
def scored(data, tmp_path_factory):
  """(run, table) of an evaluated run with stages that are right, 0.1 off, and a bound."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(methods.METHODS, "known", known_build)
    here = known_run(data, tmp_path_factory.mktemp("mr") / "run", "perfect", "off", "bound")
    return here, evaluate.evaluate(here, Store(data))


def summary(here):
  text = (here.folder / "evaluation/summary.json").read_text()
  return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def normalised(store, case, name):
  """A volume of the MR toy data, in normalised units, and its mask."""
  arrays = store.volume(case)
  return arrays["images"][name].astype(np.float64) / 100, arrays["mask"]


# --- scores ----------------------------------------------------------------------------------


def test_a_perfect_image_scores_perfectly(scored):
  """But for the 16 bits in which the store holds the volumes, and the network's float32."""
  for row in ("perfect", "bound"):
    rows = summary(scored[0])["scores"]["a->b"][row]
    assert rows["mae"]["mean"] < 2e-5 and float(rows["psnr"]["mean"]) > 90
    assert rows["ssim"]["mean"] > 0.99999


def test_an_error_of_a_tenth_of_the_range(scored):
  """0.1 in [-1, 1] is 0.05 normalised, 26.02 dB; S2 doubles the peak."""
  off = summary(scored[0])["scores"]["a->b"]["off"]
  assert off["mae"]["mean"] == pytest.approx(0.05, rel=1e-3)
  assert off["nmae"]["mean"] == pytest.approx(0.05, rel=1e-3)
  assert off["psnr"]["mean"] == pytest.approx(26.02, abs=0.01)
  assert off["psnr_s2"]["mean"] - off["psnr_s0"]["mean"] == pytest.approx(48.13, abs=0.01)
  assert off["mae"]["unit"] == "normalised" and off["psnr"]["unit"] == "dB"


def test_the_floor_by_hand(scored, data):
  here, _ = scored
  store = Store(data)
  training = [(normalised(store, c, "a")[0], *normalised(store, c, "b"))
              for c in store.info.split("train")]
  inside = np.concatenate([b[mask] for _, b, mask in training])
  source = np.concatenate([a[mask] for a, _, mask in training])
  number = np.minimum((source * 128).astype(int), 127)
  expected = {"constant": [], "lut": [], "mean_image": [], "identity_normalised": []}
  subjects = {}
  for case in store.info.split("test"):
    (a, _), (b, mask) = normalised(store, case, "a"), normalised(store, case, "b")
    table = np.interp(np.arange(128), np.unique(number),
                      [inside[number == k].mean() for k in np.unique(number)])
    images = {"constant": np.full_like(b, inside.mean()),
              "lut": table[np.minimum((a * 128).astype(int), 127)],
              "mean_image": np.mean([t for _, t, _ in training], 0), "identity_normalised": a}
    for row, image in images.items():
      subjects.setdefault((row, case.subject), []).append(np.abs(image - b)[mask].mean())
  for (row, _), values in subjects.items():
    expected[row].append(np.mean(values))
  rows = summary(here)["scores"]["a->b"]
  for row, values in expected.items():
    assert len(values) == 3
    assert rows[row]["mae"]["mean"] == pytest.approx(np.mean(values), rel=2e-3), row
  assert rows["lut2"]["psnr"]["mean"] > rows["constant"]["psnr"]["mean"]


def test_the_ceiling_is_the_noise_free_image(scored, data):
  store, values = Store(data), {}
  for case in store.info.split("test"):
    (b, mask), (c, _) = normalised(store, case, "b"), normalised(store, case, "ceiling_b")
    values.setdefault(case.subject, []).append(-10 * np.log10(((b - c)[mask] ** 2).mean()))
  expected = np.mean([np.mean(v) for v in values.values()])
  found = summary(scored[0])["scores"]["a->b"]["ceiling"]["psnr"]["mean"]
  assert found == pytest.approx(expected, abs=1e-3)


def test_the_ceiling_belongs_to_its_sources(data):
  info, task = Store(data).info, Task(("a",), ("b",), (32, 32))
  cases = info.split("test")
  made_for = lambda *names: dataclasses.replace(  # noqa: E731
    info, notes={"ceiling_sources": list(names)})
  assert floors.has_ceiling(info, task, "b", cases)
  assert floors.has_ceiling(made_for("a"), task, "b", cases)
  assert not floors.has_ceiling(made_for("a", "c"), task, "b", cases)
  assert not floors.has_ceiling(info, task, "a", cases)


@pytest.fixture(scope="module")
def ct_scored(tmp_path_factory):
  """(run, table) of CT to CT, the image 0.1 in [-1, 1] above the source."""
  folder = tmp_path_factory.mktemp("ct")
  data = make_toy_data(folder / "data", splits=("train", "train", "test"), ct=True)
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(methods.METHODS, "known", known_build)
    here = known_run(data, folder / "run", "shift")
    here.config.evaluation.ssim = "wang,torchmetrics"
    return here, evaluate.evaluate(here, Store(data))


def test_ct_is_scored_in_hounsfield_units(ct_scored):
  here, table = ct_scored
  store = Store(here.config.data.dir)
  arrays = store.volume(store.info.split("test")[0])
  a, b, mask = arrays["images"]["a"], arrays["images"]["b"], arrays["mask"]
  rows = summary(here)["scores"]["a->b"]
  for row, image in (("identity", a), ("shift", a + 0.1 / 2 * 4095)):
    error = (image - b)[mask].astype(np.float64)
    assert rows[row]["mae"]["mean"] == pytest.approx(np.abs(error).mean(), rel=1e-4)
    psnr = 20 * np.log10(4024) - 10 * np.log10((error ** 2).mean())
    assert rows[row]["psnr"]["mean"] == pytest.approx(psnr, abs=1e-3)
  assert rows["shift"]["mae"]["unit"] == "HU" and "identity_normalised" not in rows
  assert {"ssim", "ssim_torchmetrics", "ssim_synthrad"} <= set(rows["shift"])
  assert "clipped to -1024..3000" in table and "range 4024" in table


# --- above the floor, aggregation ------------------------------------------------------------


def means(**rows):
  return {row: {"psnr": {"mean": psnr}, "ssim": {"mean": ssim}}
          for row, (psnr, ssim) in rows.items()}


@pytest.mark.parametrize("own, above", [
  ((21.0, 0.8), True), ((21.0, 0.6), False), ((19.0, 0.8), False), ((20.0, 0.7), False),
  ((21.0, None), None), ((19.0, None), False), ((float("inf"), 1.0), True)])
def test_above_the_floor_means_the_best_row_of_each_metric(own, above):
  found = results.verdict(
    means(constant=(15, 0.2), lut=(20, 0.6), identity=(12, 0.7), unet=own, ceiling=(30, 1)),
    "unet", "ssim")
  assert found.above is above
  assert found.best["psnr"][1:] == ("lut", 20)
  if own[1] is not None:
    assert found.best["ssim"][1:] == ("identity", 0.7)


def test_sessions_of_a_subject_count_as_one(scored):
  """Seven subjects in eight volumes, three of them for testing; each session weighs the same."""
  here, _ = scored
  assert summary(here)["n_subjects"] == 3
  with open(here.folder / "evaluation/per_subject.csv") as file:
    lines = [x for x in csv.DictReader(file) if x["row"] == "constant"]
  assert [x["subject"] for x in lines] == ["s4", "s5", "s6"]
  store, last = Store(here.config.data.dir), []
  constant = np.mean(np.concatenate([b[m] for b, m in (
    normalised(store, c, "b") for c in store.info.split("train"))]))
  for case in store.info.split("test")[2:]:
    b, mask = normalised(store, case, "b")
    last.append(np.abs(b - constant)[mask].mean())
  assert float(lines[-1]["mae"]) == pytest.approx(np.mean(last), rel=1e-5)


# --- files -----------------------------------------------------------------------------------


def test_summary_json(scored, data):
  found = summary(scored[0])
  assert {"config", "dataset", "n_subjects", "scores"} <= set(found)
  assert found["dataset"] == {"name": "toy", "hash": Store(data).info.hash, "simulated": True}
  assert found["config"]["data"]["source"] == "a"
  assert found["protocol"]["steps"] == {"perfect": 1, "off": 1, "bound": 1}
  assert found["protocol"]["bounds"] == ["bound"]
  rows = found["scores"]["a->b"]
  assert list(rows) == ["constant", "mean_image", "lut", "lut2", "identity_normalised", "perfect",
                        "off", "bound", "ceiling"]
  for row in rows.values():
    for entry in row.values():
      assert {"mean", "sd", "median", "worst", "ci95", "unit"} <= set(entry)
      assert entry["ci95"] is None  # three subjects
  assert found["above_floor"]["a->b"] == {"perfect": True, "off": False}


def test_infinite_scores_are_strings():
  """Equal images have an infinite PSNR, which JSON cannot hold."""
  plain = results._plain({"a": [float("inf"), float("nan")], "b": (1.0, -float("inf"))})
  assert json.dumps(plain, allow_nan=False) == '{"a": ["inf", null], "b": [1.0, "-inf"]}'


def test_per_subject_csv(scored):
  with open(scored[0].folder / "evaluation/per_subject.csv") as file:
    lines = list(csv.DictReader(file))
  assert list(lines[0])[:3] == ["direction", "row", "subject"]
  assert len(lines) == 9 * 3 and {x["direction"] for x in lines} == {"a->b"}
  means = summary(scored[0])["scores"]["a->b"]
  for row in ("lut", "off"):
    values = [float(x["ssim"]) for x in lines if x["row"] == row]
    assert means[row]["ssim"]["mean"] == pytest.approx(np.mean(values))


def test_the_table(scored):
  here, table = scored
  assert (here.folder / "evaluation/table.txt").read_text() == table + "\n"
  assert table.startswith("a->b: simulated data, n = 3 test subjects\n")
  assert "perfect above the floor: yes" in table and "off above the floor: no" in table
  assert "bound (bound: sees the target)" in table and "bound above the floor" not in table
  assert "background first" in table and "no confidence interval" in table


def test_panels(scored):
  names = sorted(p.name for p in (scored[0].folder / "evaluation/panels").iterdir())
  assert names == [f"a_to_b_{row}_{place}.png" for row in ("bound", "off", "perfect")
                   for place in ("median", "worst")]


def test_panels_show_the_background_outside_the_mask(scored, data, monkeypatch):
  """As synthesize writes it: what a network makes there was never trained."""
  shown, take = [], panels.take
  def watched(info, case, sources, target, synthetic, mask, *scores):
    shown.append((synthetic, mask))
    return take(info, case, sources, target, synthetic, mask, *scores)
  monkeypatch.setattr(panels, "take", watched)
  evaluate.evaluate(scored[0], Store(data))
  assert all((image[~mask] == 0).all() and image[mask].std() > 0.1 for image, mask in shown)
  assert any((~mask).any() for _, mask in shown)


def test_a_failed_evaluation_leaves_the_last_one(scored, data, monkeypatch):
  here, _ = scored
  table = (here.folder / "evaluation/table.txt").read_text()
  def full(*args, **options):
    raise OSError("no space left")
  with monkeypatch.context() as patch:
    patch.setattr(panels, "write", full)
    with pytest.raises(OSError):
      evaluate.evaluate(here, Store(data))
  assert (here.folder / "evaluation/table.txt").read_text() == table
  (here.folder / "evaluation/stale.txt").write_text("of an earlier evaluation")
  evaluate.evaluate(here, Store(data))
  assert sorted(p.name for p in (here.folder / "evaluation").iterdir()) == [
    "panels", "per_subject.csv", "summary.json", "table.txt"]
  assert not [p for p in here.folder.iterdir() if p.name.startswith(".")]


def test_another_split_is_marked_and_kept_apart(scored, data):
  here, _ = scored
  table = (here.folder / "evaluation/table.txt").read_text()
  other = evaluate.evaluate(here, Store(data), split="validation", which="latest")
  assert "n = 1 VALIDATION subjects" in other and "Checkpoints (latest)" in other
  assert (here.folder / "evaluation_validation/summary.json").is_file()
  assert (here.folder / "evaluation/table.txt").read_text() == table


# --- what bad input gets ---------------------------------------------------------------------


def test_another_data_set_is_refused(scored, toy_data):
  with pytest.raises(UserError, match="hashes differ.*--data"):
    evaluate.open_data(scored[0], str(toy_data))
  with pytest.raises(UserError, match="hashes differ.*--data"):
    evaluate.evaluate(scored[0], Store(toy_data))


def test_a_data_set_of_other_modalities_is_told(scored, three):
  with pytest.raises(UserError, match=r"differ; it knows 3 modalities \(a, b, c\), this run 2"
                                      r" modalities \(a, b\)\); give that one"):
    evaluate.open_data(scored[0], str(three))


def test_where_the_data_set_lies(scored, data, tmp_path):
  here, _ = scored
  assert evaluate.open_data(here).folder == str(data)
  config = here.config.copy_and_resolve_references()
  config.data.dir = ""
  moved = dataclasses.replace(here, config=config, folder=tmp_path)
  with pytest.raises(UserError, match="data: no data set here.*--data"):
    evaluate.open_data(moved)
  (tmp_path / "data").symlink_to(data)
  assert evaluate.open_data(moved).folder == str(tmp_path / "data")


def test_no_test_subject(scored, data):
  here, _ = scored
  cases = tuple(c for c in here.info.cases if c.split != "test")
  without = dataclasses.replace(here, info=dataclasses.replace(here.info, cases=cases))
  with pytest.raises(UserError, match="no test subject has a and b"):
    evaluate.evaluate(without, Store(data))


def test_target_that_no_test_subject_has_is_told(scored, data):
  here, _ = scored
  config = here.config.copy_and_resolve_references()
  config.data.targets = "b,ceiling_b"
  def without(case):
    images = {m: x for m, x in case.images.items() if m != "ceiling_b" or case.split != "test"}
    return dataclasses.replace(case, images=images)
  info = dataclasses.replace(here.info, cases=tuple(map(without, here.info.cases)))
  task = dataclasses.replace(here.task, targets=("b", "ceiling_b"))
  one = dataclasses.replace(here, config=config, info=info, task=task)
  text = evaluate.evaluate(one, Store(data, info), split="test")
  assert text.endswith("a->ceiling_b: not scored, no test subject has both")
  evaluate.evaluate(here, Store(data))  # what the other tests read


def test_empty_mask_names_the_case(scored, data):
  class Emptied(Store):
    def volume(self, case):
      arrays = super().volume(case)
      return arrays | {"mask": arrays["mask"] & (case.name != "s5_v5")}
  with pytest.raises(UserError, match="case s5_v5: no voxel"):
    evaluate.evaluate(scored[0], Emptied(data))


@pytest.mark.parametrize("setting", ["wong", "wang,reggan", ""])
def test_unknown_ssim_setting(setting, scored, data):
  config = scored[0].config.copy_and_resolve_references()
  config.evaluation.ssim = setting
  with pytest.raises(UserError, match="evaluation.ssim.*wang"):
    evaluate.evaluate(dataclasses.replace(scored[0], config=config), Store(data))


def test_identity_where_the_source_is_missing(data):
  """data.missing=zero: the row stands, with background."""
  store = Store(data)
  case = store.info.split("test")[0]
  source = case_source(store.volume(case), case, Task(("a",), ("b",), (32, 32)), store.info)
  kinds = {m: modality("ct", Scaling("linear", -1024, 3071), m) for m in ("a", "b")}
  info = dataclasses.replace(store.info, modalities=kinds)
  name, image = floors.identity(source, {}, Task(("a",), ("b",), (32, 32)), info, "b")
  assert name == "identity" and (image == -1024).all()


def command(*more):
  return subprocess.run([sys.executable, "-m", "medsynth_jax.evaluate", *more], cwd=ROOT,
                        capture_output=True, text=True, env=os.environ)


def test_command(toy_data, tmp_path):
  """The table on the screen; a mistake is one line and exit status 2."""
  from test_train import toy_config, trained
  trained(toy_config("unet", toy_data, steps=1), tmp_path / "run")
  done = command(f"--workdir={tmp_path / 'run'}", "--checkpoint=latest")
  assert done.returncode == 0, done.stderr
  assert "regression above the floor: " in done.stdout
  assert done.stdout.endswith((tmp_path / "run/evaluation/table.txt").read_text())
  wrong = command(f"--workdir={tmp_path / 'nowhere'}")
  assert wrong.returncode == 2 and len(wrong.stderr.splitlines()) == 1
  assert "no config.json" in wrong.stderr
