"""Units: rules, their inverses, the defaults by name, and what an image says of itself."""

import numpy as np
import pytest

from medsynth_jax.data import intensities
from medsynth_jax.data.intensities import (
  Scaling,
  clipped,
  fit,
  foreground,
  from_model,
  modality_type,
  parse_rule,
  parse_rules,
  rules_for,
  suspicions,
  to_model,
)
from medsynth_jax.errors import UserError

RNG = np.random.default_rng(0)
VALUES = RNG.gamma(3.0, 100.0, 10000).astype(np.float32)


@pytest.mark.parametrize("rule, expected", [
  ("window -160 240", Scaling("linear", -160, 240)),
  ("sqrt 25", Scaling("sqrt", 0, 25)),
  ("percentile 1 99", Scaling("linear", *np.percentile(VALUES, (1, 99)))),
  ("percentile", Scaling("linear", *np.percentile(VALUES, (0.5, 99.9)))),
  ("zscore 2", Scaling("linear", VALUES.mean() - 2 * VALUES.std(),
                       VALUES.mean() + 2 * VALUES.std()))])
def test_rules_fit_and_invert(rule, expected):
  scaling = fit(parse_rule(rule, "here"), VALUES)
  assert scaling.curve == expected.curve
  np.testing.assert_allclose([scaling.low, scaling.high], [expected.low, expected.high], rtol=1e-4)
  inside = np.linspace(scaling.low, scaling.high, 50)
  model = to_model(scaling, inside)
  np.testing.assert_allclose(model[[0, -1]], [-1, 1], atol=1e-6)
  np.testing.assert_allclose(from_model(scaling, model), inside, atol=1e-3)
  assert (np.abs(to_model(scaling, VALUES * 10 - 500)) <= 1).all()


def test_sqrt_gives_low_uptake_room():
  pet = fit(rules_for("pet").target, VALUES)
  np.testing.assert_allclose(to_model(pet, np.array([0, 1, 6.25, 25.0])), [-1, -0.6, 0, 1])


@pytest.mark.parametrize("name, kind", [
  ("ct", "ct"), ("CT_arterial", "ct"), ("cta", "ct"), ("cbct-2", "ct"), ("ncct", "ct"),
  ("pet", "pet"), ("fdg_pet", "pet"), ("suv", "pet"), ("t1", "mr"), ("ct1", "mr"),
  ("spectral", "mr"), ("T2w", "mr"), ("ceiling_ct", "ct")])
def test_type_by_the_words_of_the_name(name, kind):
  assert modality_type(name) == kind


def test_defaults_are_those_of_the_design():
  ct = rules_for("ct")
  assert [(r["low"], r["high"]) for r in ct.source] == [(-1024, 3071), (-160, 240), (0, 80)]
  assert (ct.target["low"], ct.target["high"], ct.unit, ct.background) == (-1024, 3071, "HU", -1024)
  pet, mr = rules_for("pet"), rules_for("flair")
  assert (pet.target["kind"], pet.target["high"], pet.unit) == ("sqrt", 25, "SUV")
  assert (mr.target["kind"], mr.target["low"], mr.target["high"]) == ("percentile", 0.5, 99.9)
  own = rules_for("phase2", "ct", "window 0 100; window 0 50", {"kind": "window", "low": 0,
                                                               "high": 9})
  assert own.type == "ct" and len(own.source) == 2 and own.target["high"] == 9


@pytest.mark.parametrize("text, says", [
  ("gamma 2", "unknown rule 'gamma'"), ("window 5", "lacks a number"),
  ("window 5 5", "no range"), ("window 1 2 3", "too many numbers"), ("percentile 0 101", "0..100"),
  ("window a b", "lacks a number"), ({"kind": "zscore", "sd": 2}, "no field sd"),
  ("zscore 0", "no range")])
def test_bad_rules_name_the_field(text, says):
  with pytest.raises(UserError, match=says) as error:
    parse_rules([text], "config.modalities.t1.target")
  assert "config.modalities.t1.target" in str(error.value)
  with pytest.raises(UserError, match="modalities.t1.type"):
    rules_for("t1", "xray")


@pytest.mark.parametrize("values", [np.zeros(0), np.full(9, 3.0)])
def test_values_without_spread_cannot_be_scaled_by(values):
  with pytest.raises(ValueError, match="foreground"):
    fit(parse_rule("percentile", ""), values)


def test_clipped_share():
  assert clipped(Scaling("linear", 0, 10), np.array([-1.0, 0, 5, 10, 11, 12])) == 0.5
  assert clipped(Scaling("linear", 0, 10), np.zeros(0)) == 0


def head(noise):
  """A ball of two tissues in air with Rician noise."""
  grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, 40)] * 3, indexing="ij"))
  radius = np.sqrt((grid ** 2).sum(0))
  tissue = np.where(radius < 0.7, np.where(radius < 0.4, 300.0, 900.0), 0.0)
  real, imaginary = RNG.normal(0, noise, (2, *tissue.shape))
  return np.hypot(tissue + real, imaginary).astype(np.float32), radius < 0.7


@pytest.mark.parametrize("noise", [5, 30, 60])
def test_mr_foreground_at_any_noise(noise):
  image, truth = head(noise)
  assert (foreground(image, "mr") == truth).mean() > 0.99


def test_mr_foreground_of_a_stripped_brain_keeps_dark_fluid():
  image, truth = head(10)
  image[~truth] = 0
  image[18:22, 18:22, 18:22] = 20  # darker than a tenth of the brightest
  assert (foreground(image, "mr", truth) == truth).all()


def test_ct_and_pet_foreground():
  assert foreground(np.array([-1000.0, -600, -400, 50]), "ct").tolist() == [0, 0, 1, 1]
  pet = np.array([0.0, 0.01, 0.3, 5.0, 5.0])
  assert foreground(pet, "pet").tolist() == [0, 0, 1, 1, 1]
  assert foreground(pet * 9000, "pet").tolist() == [0, 0, 1, 1, 1]  # whatever its unit


@pytest.mark.parametrize("array, kind, says", [
  (np.linspace(0, 2000, 100), "ct", "rescale slope"),
  (np.linspace(0, 20000, 100), "pet", "Bq/ml"),
  (np.linspace(-1000, 2000, 100), "mr", "config.modalities"),
  (np.linspace(-1000, 2000, 100), "ct", ""), (np.linspace(0, 30, 100), "pet", ""),
  (np.linspace(0, 4000, 100), "mr", "")])
def test_wrong_units_are_noticed_with_the_remedy(array, kind, says):
  found = suspicions(array, kind, foreground(array, kind))
  assert (not found) if not says else says in found[0]


def test_otsu_splits_two_humps():
  values = np.r_[RNG.normal(0, 1, 500), RNG.normal(10, 1, 100)]
  assert 2 < intensities.otsu(values) < 8
