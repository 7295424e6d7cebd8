"""S3's metrics in an evaluation: columns, the fitted NIQE model, and what is told of both."""

import csv
import dataclasses
import json

import numpy as np
import pytest
from conftest import make_toy_data
from test_evaluate import known_build, known_run

from medsynth_jax import evaluate, methods, run, scoring
from medsynth_jax.data.dataset import Store
from medsynth_jax.errors import UserError
from medsynth_jax.metrics import niqe, s3
from medsynth_jax.s3_scorer import NIQE
from medsynth_jax.scorer import Scorer

SPLITS = ("train",) * 3 + ("validation", "test", "test")


def scored(folder, shape, *images, changes=None, **fields):
  """(run with S3's metrics, its table) on a toy data set with volumes of `shape`."""
  data = make_toy_data(folder / "data", shape=shape, splits=SPLITS, **fields)
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(methods.METHODS, "known", known_build)
    known_run(data, folder / "run", *images)
    here = run.open_run(folder / "run", {"evaluation.s3": True})
    return here, evaluate.evaluate(here, Store(data))


@pytest.fixture(scope="module")
def large(tmp_path_factory):
  """Slices of 100 x 104: every metric has a value."""
  return scored(tmp_path_factory.mktemp("large"), (100, 104, 4), "perfect", "off")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
  """Slices of 32 x 36: no VIF, no block of LIVE's size; the model is fitted on blocks of 32."""
  return scored(tmp_path_factory.mktemp("small"), (32, 36, 14), "off")


def summary(here):
  return json.loads((here.folder / "evaluation/summary.json").read_text())


def test_columns_of_every_row(large):
  here, table = large
  rows = summary(here)["scores"]["a->b"]
  assert all(set(s3.METRICS) <= set(row) for row in rows.values())
  perfect, off = ({m: row[m]["mean"] for m in s3.METRICS} for row in (rows["perfect"], rows["off"]))
  assert perfect["nmae_s3"] < 1e-4 and float(perfect["psnr_s3"]) > 80
  for metric in ("ssim_s3", "vifp_s3", "vif_wavelet_s3"):
    assert perfect[metric] == pytest.approx(1, abs=1e-3)
  assert 20 < off["psnr_s3"] < 40 and off["niqe_fitted_s3"] > 0
  assert rows["off"]["psnr_s3"]["unit"] == "dB" and rows["off"]["niqe_live_s3"]["unit"] == "1"
  with open(here.folder / "evaluation/per_subject.csv", newline="") as file:
    line = next(r for r in csv.DictReader(file) if r["row"] == "off")
  assert float(line["vif_wavelet_s3"]) == pytest.approx(off["vif_wavelet_s3"], abs=0.05)
  block = table[table.index("By S3's own convention"):]
  assert "nmae_s3" in block and "maximum - minimum in the mask" in block
  assert "fitted on 3 training volumes (12 slices, 48 blocks of 48" in block
  assert "blocks of 96" in block and "absent" not in block


def test_scores_are_those_of_the_volume(large):
  here, _ = large
  store = Store(here.config.data.dir)
  case = store.info.split("test")[0]
  arrays = store.volume(case)
  reference, mask = (arrays["images"]["b"] / 100).astype(np.float32), arrays["mask"]
  scorer = Scorer(here, store, {"b": [case]})
  image = (reference + 0.1).astype(np.float32)
  got = scorer.score(scorer.load(case, "b"), "off", image)
  want = s3.scores(reference, image, mask)
  assert {m: got[m] for m in want} == pytest.approx(want, rel=1e-4)
  model = niqe.load(here.folder / "evaluation/niqe_b.npz")
  shown = np.where(mask, image, 0)
  assert got["niqe_live_s3"] == pytest.approx(niqe.pooled(shown, niqe.live(), 1.0), abs=1e-6)
  assert got["niqe_fitted_s3"] == pytest.approx(niqe.pooled(shown, model, 1.0), abs=1e-6)


def test_the_model_is_fitted_on_real_training_images(large):
  here, table = large
  store = Store(here.config.data.dir)
  training = [store.volume(c) for c in store.info.split("train")]
  images = [np.where(v["mask"], v["images"]["b"] / 100, 0) for v in training]
  want, got = niqe.fit(images, 48, 0.0, 1.0), niqe.load(here.folder / "evaluation/niqe_b.npz")
  np.testing.assert_allclose(got.mean, want.mean, rtol=1e-6)
  np.testing.assert_allclose(got.covariance, want.covariance, rtol=1e-4, atol=1e-8)
  told = summary(here)["protocol"]["targets"]["b"]["s3"]
  assert told["niqe_fitted"] == {"block": 48, "sharpness": 0.0, "volumes": 3, "slices": 12,
                                 "blocks": 48}
  real = told["niqe_of_real_images"]
  perfect = summary(here)["scores"]["a->b"]["perfect"]
  assert real["niqe_fitted_s3"] == pytest.approx(perfect["niqe_fitted_s3"]["mean"], abs=0.05)
  assert f"The real images score niqe_live_s3 {real['niqe_live_s3']:.2f}" in table


def test_small_slices_have_what_they_allow(small):
  here, table = small
  rows = summary(here)["scores"]["a->b"]
  for metric in ("vifp_s3", "vif_wavelet_s3", "niqe_live_s3"):
    assert rows["off"][metric]["n"] == 0
  assert rows["off"]["niqe_fitted_s3"]["n"] == 2 and rows["off"]["ssim_s3"]["n"] == 2
  assert "blocks of 32" in table
  for line in ("vifp_s3 is absent for 2 of 2 subjects: it needs slices of 41 x 41 pixels.",
               "vif_wavelet_s3 is absent for 2 of 2 subjects: it needs slices of 65 x 65 pixels.",
               "niqe_live_s3 is absent for 2 of 2 subjects: it needs two blocks of 96 x 96"):
    assert line in table
  assert "niqe_fitted_s3 is absent" not in table


def test_without_enough_blocks_there_is_no_fitted_model(tmp_path):
  here, table = scored(tmp_path, (20, 24, 10), "off")
  assert "no fitted model (a NIQE model needs more than 36 blocks of 32 x 32 pixels" in table
  assert not (here.folder / "evaluation/niqe_b.npz").exists()
  told = summary(here)["protocol"]["targets"]["b"]["s3"]
  assert "30 images have 0" in told["niqe_fitted"]["absent"]
  assert told["niqe_of_real_images"] == {"niqe_live_s3": None, "niqe_fitted_s3": None}


def test_real_images_are_those_of_the_direction_by_subject(large, monkeypatch):
  here, _ = large
  here.config.evaluation.s3 = True
  store = Store(here.config.data.dir)
  case = store.info.split("test")[0]
  found = Scorer(here, store, {"b": [case]}).s3["b"]
  monkeypatch.setattr(s3, "scores", lambda *_: {})
  monkeypatch.setattr(found, "_naturalness", lambda image, mask: dict.fromkeys(NIQE, image))
  for source, subject, volume, niqe_of in (
      ("a", "s1", 1, 1.0), ("a", "s1", 2, 3.0), ("a", "s2", 3, 8.0), ("c", "s3", 4, 100.0)):
    found.score(source, dataclasses.replace(case, subject=subject, volume=volume), niqe_of, 0.0, 0)
  assert found.of_real("a") == dict.fromkeys(NIQE, 5.0)
  assert found.described("c")["niqe_of_real_images"] == dict.fromkeys(NIQE, 100.0)
  summary = {"row": {m: {"n": 2} for m in s3.NEEDS}}
  assert "niqe_live_s3 5.00, niqe_fitted_s3 5.00." in found.lines("a", summary, 2)[1]


def test_only_where_it_is_asked_for_and_only_mr(large, tmp_path):
  here, _ = large
  store = Store(here.config.data.dir)
  cases = {"b": list(store.info.split("test"))}
  with here.config.unlocked():
    del here.config.evaluation.s3  # a run older than the field
  assert not Scorer(here, store, cases).s3
  here.config.evaluation.s3 = False
  assert not Scorer(here, store, cases).s3
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(methods.METHODS, "known", known_build)
    data = make_toy_data(tmp_path / "ct", splits=SPLITS, ct=True)
    known_run(data, tmp_path / "run", "off")
    ct = run.open_run(tmp_path / "run", {"evaluation.s3": True})
  assert not Scorer(ct, Store(data), {"b": list(ct.info.split("test"))}).s3
  assert scoring.roi_label("s3") == "roi_s3"  # a vertebra, not the paper


def test_a_constant_reference_names_the_case(large):
  here, _ = large
  here.config.evaluation.s3 = True
  store = Store(here.config.data.dir)
  scorer = Scorer(here, store, {"b": list(store.info.split("test"))})
  volume = scorer.load(store.info.split("test")[0], "b")
  volume.reference = np.full_like(volume.reference, 0.5)
  with pytest.raises(UserError, match="case s4.*VIF.* not defined for a reference"):
    scorer.score(volume, "off", volume.reference + 0.1)
