"""Updates, averages, accumulation and schedules against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from medsynth_jax import config as configs
from medsynth_jax import optim
from medsynth_jax.contract import (
  Method,
  State,
  averaged,
  category,
  create,
  example_keys,
  served,
  update,
)


def state_of(txs, nets):
  return State(jnp.zeros((), jnp.int32), jax.random.key(0), nets,
               {n: t.init(nets[n]) for n, t in txs.items()}, {}, {})


def test_update_steps_the_named_nets_only():
  txs = {"a": optax.sgd(0.5), "b": optax.sgd(0.5)}
  state = state_of(txs, {"a": jnp.ones(2), "b": jnp.ones(2)})
  new = update(state, txs, a=jnp.ones(2))
  np.testing.assert_array_equal(new.nets["a"], 0.5)
  assert new.nets["b"] is state.nets["b"] and new.opts["b"] is state.opts["b"]


def test_average_follows_its_formula_and_is_served():
  tx = optax.chain(optax.sgd(1.0), optim.average(0.5))
  state = state_of({"g": tx}, {"g": jnp.zeros(())})
  expected = param = 0.0
  for n in range(12):
    state = update(state, {"g": tx}, g=jnp.array(-1.0))
    param += 1.0
    d = min(0.5, (1 + n) / (10 + n))
    expected = d * expected + (1 - d) * param
  np.testing.assert_allclose(averaged(state.opts["g"]), expected, rtol=1e-6)
  np.testing.assert_allclose(served(state, ("g",)).nets["g"], expected, rtol=1e-6)
  assert served(state, ("g",)).opts == {}


def test_average_moves_only_with_its_net_under_accumulation():
  tx = optim.make(configs.optim(lr=0.1, accumulate=3, ema=0.9), 30)
  state = state_of({"g": tx}, {"g": jnp.ones(2)})
  for k in range(1, 7):
    before = averaged(state.opts["g"])
    state = update(state, {"g": tx}, g=jnp.ones(2))
    assert bool((averaged(state.opts["g"]) != before).all()) == (k % 3 == 0)
    assert bool((state.nets["g"] == 1).all()) == (k < 3)


def test_accumulation_equals_the_large_batch():
  """Three micro-batches give the update of their mean gradient."""
  grads = [jnp.array([1.0, -2.0]), jnp.array([3.0, 0.5]), jnp.array([-1.0, 1.0])]
  small = optim.make(configs.optim(lr=0.1, accumulate=3, ema=0.0), 3)
  large = optim.make(configs.optim(lr=0.1, ema=0.0), 1)
  a = state_of({"g": small}, {"g": jnp.ones(2)})
  for g in grads:
    a = update(a, {"g": small}, g=g)
  b = update(state_of({"g": large}, {"g": jnp.ones(2)}), {"g": large}, g=sum(grads) / 3)
  np.testing.assert_allclose(a.nets["g"], b.nets["g"], rtol=1e-6)


def test_schedules():
  linear = optim.schedule(configs.optim(lr=2.0, schedule="linear", hold=0.5), 100)
  assert [float(linear(n)) for n in (0, 50, 75, 100)] == [2.0, 2.0, 1.0, 0.0]
  cosine = optim.schedule(configs.optim(lr=2.0, schedule="cosine"), 100)
  np.testing.assert_allclose([cosine(0), cosine(50), cosine(100)], [2, 1, 0], atol=1e-6)
  warm = optim.schedule(configs.optim(lr=2.0, warmup=10), 100)
  assert [float(warm(n)) for n in (0, 5, 10, 90)] == [0.0, 1.0, 2.0, 2.0]


def test_horizon_counts_updates_of_the_net():
  """With accumulation 4 the decay ends at the last update, not at a quarter of the run."""
  tx = optim.make(configs.optim(lr=1.0, schedule="linear", hold=0.0, accumulate=4, ema=0.0), 40)
  state = state_of({"g": tx}, {"g": jnp.zeros(())})
  moves = []
  for _ in range(40):
    before = state.nets["g"]
    state = update(state, {"g": tx}, g=jnp.ones(()))
    moves.append(float(jnp.abs(state.nets["g"] - before)))
  np.testing.assert_allclose(moves[3::4], np.linspace(1, 0.1, 10), rtol=1e-3)


def test_create_needs_an_optimiser_for_every_net():
  method = Method(lambda k, b: {"a": jnp.ones(1)}, None, None, {})
  with pytest.raises(ValueError, match="txs names"):
    create(method, jax.random.key(0), {}, {})


def test_keys_depend_on_sample_and_slice_only():
  key = jax.random.key(3)
  a = jax.random.key_data(example_keys(key, {"slice": jnp.array([5, 7])}))
  b = jax.random.key_data(example_keys(key, {"slice": jnp.array([9, 9, 7])}))
  second = {"slice": jnp.array([5, 7]), "sample": jnp.array([1, 1])}
  c = jax.random.key_data(example_keys(key, second))
  assert (a[1] == b[2]).all() and (a[0] != a[1]).any() and (a != c).any()
  d = jax.random.key_data(example_keys(key, {"slice": jnp.array([5, 7])}, noise="volume"))
  assert (d[0] == d[1]).all()


def test_category_is_the_place_among_the_targets():
  batch = {"target_modality": jnp.array([4, 2, 4])}
  assert category(batch["target_modality"], (2, 4)).tolist() == [1, 0, 1]
