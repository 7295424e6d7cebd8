"""Splits by subject."""

from collections import Counter

import pytest

from medsynth_jax.data.splits import assign
from medsynth_jax.data.table import Row, Table
from medsynth_jax.errors import UserError


def make(n, sessions=1, groups=None, images=None, **columns):
  rows = []
  for i in range(n):
    for s in range(sessions):
      rows.append(Row(
        len(rows) + 2, f"s{i}", str(s), columns.get("split", {}).get((i, s), ""),
        columns.get("fold", {}).get((i, s), -1), groups(i) if groups else "",
        dict.fromkeys(images(i) if images else ("t1",), "x"), "", {}, {}))
  return Table("cases.csv", tuple(rows), ("t1", "t2"), (), ())


def counts(plan):
  return Counter(split for split, _ in plan.values())


@pytest.mark.parametrize("n, expected", [
  (2, (1, 0, 1)), (3, (2, 0, 1)), (8, (6, 1, 1)), (10, (8, 1, 1)), (100, (80, 10, 10))])
def test_default_shares(n, expected):
  found = counts(assign(make(n)))
  assert tuple(found[s] for s in ("train", "validation", "test")) == expected


def test_sessions_stay_together_and_the_seed_decides():
  table = make(30, sessions=2)
  assert len(assign(table)) == 30
  assert assign(table, seed=1) == assign(table, seed=1) != assign(table, seed=2)
  assert counts(assign(table, (1, 0, 1))) == {"train": 15, "test": 15}


def test_strata_are_alike_on_all_sides():
  table = make(100, groups=lambda i: f"site{i % 5 == 0}",
               images=lambda i: ("t1",) if i % 2 else ("t1", "t2"))
  for seed in range(3):
    plan = assign(table, (6, 2, 2), 3, ("group", "modalities"), seed)
    for side, n in (("train", 60), ("validation", 20), ("test", 20)):
      inside = [int(s[1:]) for s, (split, _) in plan.items() if split == side]
      assert abs(sum(i % 5 == 0 for i in inside) - n / 5) <= 1
      assert abs(sum(i % 2 for i in inside) - n / 2) <= 2


def test_folds_divide_the_training_subjects():
  plan = assign(make(23), folds=4)
  folds = Counter(f for split, f in plan.values() if split == "train")
  assert set(folds) == {0, 1, 2, 3} and max(folds.values()) - min(folds.values()) <= 1
  assert {f for split, f in plan.values() if split != "train"} == {-1}


def test_strata_are_alike_in_all_folds():
  """Two strata of one size must not get a fold each."""
  table = make(40, groups=lambda i: f"site{i % 2}")
  for seed in range(5):
    plan = assign(table, folds=2, stratify=("group",), seed=seed)
    shares = Counter((fold, int(s[1:]) % 2) for s, (_, fold) in plan.items() if fold >= 0)
    assert set(shares.values()) == {8}


def test_the_table_decides_where_it_says():
  split = {(i, s): ("train", "train", "test")[i] for i in range(3) for s in range(2)}
  fold = {(i, s): i for i in range(2) for s in range(2)}
  plan = assign(make(3, 2, split=split, fold=fold), folds=2)
  assert plan == {"s0": ("train", 0), "s1": ("train", 1), "s2": ("test", -1)}


@pytest.mark.parametrize("table, options, says", [
  (make(1), {}, "at least 2 are needed"),
  (make(2, 2, split={(0, 0): "train", (0, 1): "test", (1, 0): "test", (1, 1): "test"}), {},
   "subject 's0' has two values of 'split' .'train' in row 2, 'test' in row 3."),
  (make(2, split={(0, 0): "train"}), {}, "row 3, column 'split': empty"),
  (make(2, split={(0, 0): "train", (1, 0): "train"}), {}, "no test subject"),
  (make(2, split={(0, 0): "test", (1, 0): "test"}), {}, "no train subject"),
  (make(9), {"folds": 9}, "can be divided into 2 to 7"),
  (make(9), {"ratios": (8, 1)}, "config.split"),
  (make(9), {"ratios": (8, 1, 0)}, "config.split"),
  (make(9), {"stratify": ("age",)}, "config.stratify: unknown 'age'")])
def test_refusals(table, options, says):
  with pytest.raises(UserError, match=says):
    assign(table, **options)
