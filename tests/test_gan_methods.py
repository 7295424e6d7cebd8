"""GANs of any source, of pairs that do not line up, and of no pairs: which term moves what."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_train import toy_config

from medsynth_jax import config as configs
from medsynth_jax import losses, pool, run
from medsynth_jax.contract import create
from medsynth_jax.data.dataset import load_info
from medsynth_jax.data.pipeline import example_batch
from medsynth_jax.errors import UserError

pytestmark = pytest.mark.usefixtures("unoptimised")

SIZE = 32


@functools.cache
def start(name, data, fields=()):
  """(method whose gradients are its steps, its first state, an example of zeros)."""
  config = toy_config(name, data)
  config.update_from_flattened_dict(dict(fields))
  here = run.build(config, load_info(data), "nowhere")
  stage = list(here.methods)[0]
  method = here.methods[stage]
  method.txs.update({net: optax.sgd(1e-3) for net in method.txs})
  example = example_batch(here.task, here.info, config.get("draw", "pair"))
  key = here.key(stage)
  return method, drawn(jax.eval_shape(lambda k: create(method, k, example, {}), key), key), example


def drawn(shape, key):
  """A state with weights from NumPy: compiling the true ones takes longer than a step."""
  rng = np.random.default_rng(0)
  nets = jax.tree.map(lambda x: rng.normal(0, 0.1, x.shape).astype(np.float32), shape.nets)
  return shape.replace(step=jnp.zeros((), jnp.int32), key=key, nets=nets, aux=jax.tree.map(
    lambda x: jnp.zeros(x.shape, x.dtype), shape.aux))


def batch_of(example, seed=0, **more):
  rng = np.random.default_rng(seed)
  batch = {k: rng.uniform(-1, 1, (2, *v.shape[1:])).astype(np.float32)
           for k, v in example.items() if k in ("source", "target")}
  ones = np.ones((2, SIZE, SIZE, 1), np.float32)
  return {**batch, "valid": ones, "target_valid": ones, "paired": np.ones(2, np.float32),
          "source_modality": np.array([0, 1], np.int32),
          "target_modality": np.array([1, 0], np.int32), **more}


# the weights of a method's terms, and those of which 0 leaves a net and its other terms out
TERMS = {"reg_gan": ("adversarial", "correction", "smoothness", "mean_flow", "l1", "change",
                     "cycle", "bright.weight"),
         "cyclegan": ("cycle", "identity"), "unified_gan": ("cycle", "l1", "classification")}
LEAVES_OUT = {"reg_gan": {"correction": ("correction", "smoothness", "mean_flow"),
                          "cycle": ("cycle",)}}


class Weight(float):
  """A weight that is an argument of the compiled step, so that all values share one compilation."""

  def __new__(cls, value):
    weight = super().__new__(cls, 1.0)  # the term is there
    weight.value = value
    return weight

  def __mul__(self, other):
    return self.value * getattr(other, "value", other)


@functools.cache
def weighed(name, data, fields):
  """A compiled step of ({term: weight}, state, batch, key)."""
  def step(weights, *arguments):
    terms = tuple((term, Weight(value)) for term, value in weights.items())
    return start.__wrapped__(name, data, fields + terms)[0].step(*arguments)
  return jax.jit(step)


def stepper(name, data, **fields):
  """(compiled step of (state, batch, key), the first state, an example of zeros)."""
  known = configs.flat(toy_config(name, data).to_dict()) | fields
  leaves_out = LEAVES_OUT.get(name, {})
  absent = {term for weight, terms in leaves_out.items() if not known[weight] for term in terms}
  weights = {term: jnp.float32(known[term]) for term in TERMS[name] if term not in absent}
  there = {weight: 1.0 for weight in leaves_out if weight not in absent}
  rest = tuple(({f: x for f, x in fields.items() if f not in weights} | there).items())
  _, state, example = start(name, data, rest)
  return functools.partial(weighed(name, data, rest), weights), state, example


def moved(name, data, silent=(), **fields):
  """The nets that one step moves; the nets in `silent` have zero weights."""
  batch = fields.pop("batch", {})
  step, state, example = stepper(name, data, **fields)
  nets = {n: jax.tree.map(jnp.zeros_like, p) if n in silent else p for n, p in state.nets.items()}
  state = state.replace(nets=nets)
  after, _ = step(state, batch_of(example, **batch), jax.random.key(1))
  changes = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), nets, after.nets)
  return {net for net in nets if max(jax.tree.leaves(changes[net])) > 1e-20}


NO_TERM = {"adversarial": 0.0, "correction": 1e-30, "smoothness": 0.0}  # 0 would take R out


@pytest.mark.parametrize("term, reached", [
  ("adversarial", {"generator"}), ("l1", {"generator"}), ("change", {"generator"}),
  ("correction", {"generator", "registration"}), ("smoothness", {"generator", "registration"}),
  ("mean_flow", {"generator", "registration"}), ("bright.weight", {"generator", "registration"})])
def test_terms_of_reg_gan(term, reached, toy_data):
  fields = {**NO_TERM, term: 1e3}
  assert moved("reg_gan", toy_data, **fields) == {*reached, "discriminator"}


def test_terms_of_the_way_back(toy_data):
  both, judges = {"generator", "generator_back"}, {"discriminator", "discriminator_back"}
  fields = {**NO_TERM, "correction": 0.0}
  assert moved("reg_gan", toy_data, **{**fields, "cycle": 10.0}) == both | judges
  fields = {**fields, "cycle": 1e-30, "adversarial": 1.0}
  assert moved("reg_gan", toy_data, **fields) == both | judges
  assert moved("reg_gan", toy_data, ("discriminator_back",), **fields) >= {"generator"}
  assert "generator_back" not in moved("reg_gan", toy_data, ("discriminator_back",), **fields)


def test_modes_have_their_nets(toy_data):
  def nets(**fields):
    return set(start("reg_gan", toy_data, tuple(fields.items()))[1].nets)
  one, two = {"generator", "discriminator"}, {"generator_back", "discriminator_back"}
  assert nets(correction=0.0) == one and nets() == one | {"registration"}
  assert nets(correction=0.0, cycle=10.0) == one | two
  assert nets(cycle=10.0) == one | two | {"registration"}


def test_no_term_of_the_generator_moves_a_discriminator(toy_data):
  """D's step is the same whatever weights the generator's terms have."""
  def judge(**fields):
    step, state, example = stepper("reg_gan", toy_data, **fields)
    after, _ = step(state, batch_of(example), jax.random.key(1))
    return after.nets["discriminator"]
  a, b = judge(), judge(correction=500.0, adversarial=7.0, l1=3.0)
  assert jax.tree.all(jax.tree.map(np.array_equal, a, b))


@pytest.mark.parametrize("silent, fields, reached", [
  ((), {"cycle": 0.0}, {"generator", "generator_back"}),
  (("discriminator_back",), {"cycle": 0.0}, {"generator"}),
  (("discriminator",), {"cycle": 0.0}, {"generator_back"}),
  (("discriminator", "discriminator_back"), {"cycle": 0.0}, set()),
  (("discriminator", "discriminator_back"), {"identity": 0.0}, {"generator", "generator_back"})])
def test_terms_of_cyclegan(silent, fields, reached, toy_data):
  got = moved("cyclegan", toy_data, silent, **fields)
  assert {net for net in got if net.startswith("generator")} == reached
  assert {"discriminator", "discriminator_back"} <= got


def test_cyclegan_sees_each_side_where_that_side_was_measured(toy_data):
  """The discriminator of targets does not see them outside `target_valid`; pairing is not used."""
  step, state, example = stepper("cyclegan", toy_data)
  batch = batch_of(example)
  batch["target_valid"] = batch["target_valid"].copy()
  batch["target_valid"][:, :8] = 0
  def told(**changes):
    metrics = step(state, {**batch, **changes}, jax.random.key(1))[1]
    return {name: float(value) for name, value in metrics.items()}
  before, target = told(), batch["target"].copy()
  assert told(paired=np.zeros(2, np.float32)) == before
  target[:, :8] = 0.3
  assert told(target=target)["discriminator"] == before["discriminator"]
  target[:, 20] = 0.3
  assert told(target=target)["discriminator"] != before["discriminator"]


def test_bright_voxels_far_above_the_threshold_count(toy_data):
  """A vessel of 330 HU drawn at 260 HU still has a gradient: no window cuts it off."""
  fields = {**NO_TERM, "bright.above": 50.0, "bright.weight": 1.0}
  target = np.full((2, SIZE, SIZE, 1), 0.99, np.float32)  # all above
  assert "generator" in moved("reg_gan", toy_data, **fields, batch={"target": target})
  dark = np.full((2, SIZE, SIZE, 1), -0.5, np.float32)  # none above
  assert "generator" not in moved("reg_gan", toy_data, **fields, batch={"target": dark})


@pytest.mark.parametrize("fields, silent, batch, reached", [
  ({}, (), {}, {"generator", "discriminator"}),
  ({"cycle": 0.0, "l1": 0.0}, ("discriminator",), {}, set()),
  ({"cycle": 0.0, "l1": 0.0, "classification": 0.0}, (), {}, {"generator", "discriminator"}),
  ({"cycle": 0.0}, ("discriminator",), {}, {"generator"}),
  ({"l1": 0.0}, ("discriminator",), {}, {"generator"}),
  ({"cycle": 0.0}, ("discriminator",), {"paired": np.zeros(2, np.float32)}, set())])
def test_terms_of_unified_gan(fields, silent, batch, reached, toy_data):
  got = moved("unified_gan", toy_data, silent, **{"n_critic": 1, **fields}, batch=batch)
  assert got & {"generator"} == reached & {"generator"}
  assert ("discriminator" in got) == (not silent)  # one of zeros has no gradient at all


def test_the_generator_moves_every_n_critic_batches(toy_data):
  method, state, example = start("unified_gan", toy_data, (("n_critic", 3),))
  step, told, generators = jax.jit(method.step), [], [state.nets["generator"]]
  for number in range(6):
    state, metrics = step(state, batch_of(example, number), jax.random.key(number))
    state = state.replace(step=state.step + 1)
    told.append(float(metrics["cycle"]))
    generators.append(state.nets["generator"])
  same = [jax.tree.all(jax.tree.map(np.array_equal, a, b))
          for a, b in zip(generators, generators[1:], strict=False)]
  assert same == [True, True, False, True, True, False]
  assert told[0] == told[1] == 0 and told[2] == told[3] == told[4] != told[5]


def test_gradient_penalty_closed_form():
  """Of a linear judge it is (|w| - 1)^2 whatever the images; of several examples the mean."""
  w = jnp.linspace(-1, 1, 12).reshape(1, 2, 6, 1)
  images = jax.random.normal(jax.random.key(0), (2, 3, 2, 6, 1))
  judge = lambda z: (z * w).sum((1, 2, 3))[:, None]  # noqa: E731
  got = losses.gradient_penalty(judge, *images, jax.random.key(1))
  assert float(got) == pytest.approx((float(jnp.sqrt((w ** 2).sum())) - 1) ** 2, rel=1e-5)
  patches = lambda z: jnp.stack([(z * w).sum((1, 2, 3))] * 2, 1)  # noqa: E731
  got = losses.gradient_penalty(patches, *images, jax.random.key(1))  # of the sum of patch values
  assert float(got) == pytest.approx((2 * float(jnp.sqrt((w ** 2).sum())) - 1) ** 2, rel=1e-5)
  square = lambda z: jnp.square(z).sum((1, 2, 3))[:, None]  # noqa: E731
  real = jnp.array([0.5, 2.0])[:, None, None, None] * jnp.ones((2, 1, 1, 1))
  got = losses.gradient_penalty(square, real, real, jax.random.key(1))
  assert float(got) == pytest.approx(((1 - 1) ** 2 + (4 - 1) ** 2) / 2, rel=1e-5)


def test_images_of_a_pool_stay_out_of_its_loop():
  """Of images split over devices, each one that moves in a loop is a message of its own."""
  images = jnp.zeros((4, 2, 2, 1))
  traced = jax.make_jaxpr(pool.exchange)(pool.empty(3, images[:1]), images, jax.random.key(0))
  (loop,) = [e for e in traced.eqns if e.primitive.name == "scan"]
  assert not any(jnp.issubdtype(v.aval.dtype, jnp.floating) for v in loop.invars)


def test_pool_fills_then_exchanges():
  state = pool.empty(3, jnp.zeros((1, 2, 2, 1)))
  images = lambda k: jnp.full((2, 2, 2, 1), k) + jnp.array([0.0, 0.5])[:, None, None, None]  # noqa: E731
  seen = []
  for k in range(1, 40):
    state, shown = jax.jit(pool.exchange)(state, images(float(k)), jax.random.key(k))
    seen.append(np.asarray(shown)[:, 0, 0, 0])
  np.testing.assert_array_equal(seen[0], [1, 1.5])
  assert seen[1][0] == 2 and int(state["count"]) == 3
  new = np.array([s == np.array([k, k + 0.5]) for k, s in enumerate(seen, 1)])[3:]
  assert 0.3 < new.mean() < 0.7  # half of the time the newest is shown
  shown = np.concatenate(seen)
  # those that filled the pool were shown too; later ones leave it when they are shown
  assert len(set(shown.tolist())) == len(shown) - 3


def test_what_the_methods_refuse(toy_data):
  with pytest.raises(UserError, match="data.source=any"):
    start("unified_gan", toy_data, (("data.source", "a"), ("data.targets", "b")))
  with pytest.raises(UserError, match="data.channels=one"):
    start("cyclegan", toy_data, (("data.channels", "own"),))
  with pytest.raises(UserError, match="data.context=0"):
    start("reg_gan", toy_data, (("cycle", 10.0), ("data.context", 1)))
  with pytest.raises(UserError, match=r"with the source \(change=1.0\): set data.channels=one"):
    start("reg_gan", toy_data, (("change", 1.0), ("data.context", 1)))
  with pytest.raises(UserError, match="mean_flow=1.0 is of the registration network"):
    start("reg_gan", toy_data, (("mean_flow", 1.0), ("correction", 0.0)))
  with pytest.raises(UserError, match="data.source=any: pix2pix is made from one source"):
    start("pix2pix", toy_data, (("data.source", "any"), ("data.targets", "")))
  with pytest.raises(UserError, match="data.targets is empty"):
    start("reg_gan", toy_data, (("data.targets", ""),))


@pytest.mark.parametrize("name, draw", [("pix2pix", "unpaired"), ("reg_gan", "unpaired"),
                                        ("cyclegan", "single"), ("unified_gan", "single")])
def test_a_method_is_trained_with_its_own_draws(name, draw, toy_data, tmp_path):
  config = toy_config(name, toy_data, draw=draw)
  with pytest.raises(UserError, match=f"draw='{draw}' is not for {name}"):
    run.start(config, load_info(toy_data), tmp_path / "run")
