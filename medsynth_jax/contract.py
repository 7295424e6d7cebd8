"""What a system is: the state of a training stage, the functions of a method, the batch's keys.

Batch (arrays only; names stay in dataset.json), `*space` 2-D or 3-D:
  source           [B, *space, C]  float32 in [-1, 1]; several sources and 2.5-D slices stacked
  target           [B, *space, C]  float32 in [-1, 1], C 1 (3 for a fusion image); removed before
                                   `synthesize`
  valid            [B, *space, 1]  1 where source and target were both measured: weights every
                                   reconstruction loss; without a paired target: where the source
                                   was
  target_valid     [B, *space, 1]  the same; unpaired: where the other subject's target was
  mask             [B, *space, 1]  body and valid, for scores
  source_modality, target_modality, subject, volume, slice, fold   [B] int32
  paired           [B] float32, 0 where `target` is not this case's
  weight           [B] float32, 0 for the repetitions that fill the last batch of an evaluation
  sample           [B] int32, in synthesis only: which of several samples is drawn
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import struct

Batch = Mapping[str, jax.Array]

NOISES = ("slice", "volume")  # what shares the noise of a synthesis

_INIT = 2**32 - 1  # a step number that no run reaches: the key of initialisation


@struct.dataclass
class State:
  """One training stage. The loop writes `step`, a method everything else but `key` and `frozen`."""
  step: jax.Array              # batches taken
  key: jax.Array               # this stage's root key, constant
  nets: dict[str, Any]         # {net: parameters}
  opts: dict[str, Any]         # {net: optimiser state, its EMA inside}
  aux: dict[str, Any]          # other arrays of the method; replicated
  frozen: dict[str, "State"]   # {earlier stage: its served state}; flat, never written


class Method(NamedTuple):
  """A system as functions of arrays: no file, no device, no checkpoint.

  init: (key, batch of one zero example) -> {net: parameters}
  step: (state, batch, key) -> (state, {name: scalar}), the same names every step
  synthesize: (served state, batch without target, key) -> images [B, *space, C] in [-1, 1], or None
  txs: {net: optimiser, its EMA the last link}; keeps: nets that synthesis and later stages use
  aux: batch -> {name: array}; sees_target: reconstructs the target, a bound never offered to users
  factor: every spatial size must be a multiple of it
  many_targets: makes the modality that the batch's `target_modality` names
  draws: the ways of drawing source and target (`config.draw`) that it can be trained with
  many_sources: takes any one of several modalities, which the batch's `source_modality` names
  stochastic: synthesis draws a sample; the batch's `sample` says which
  flow: (served state, batch) -> [B, *space, rank] pixels, or None: the target shows at p what the
    synthetic image shows at p + flow(p)
  note: what a reader of its scores has to know
  """
  init: Callable
  step: Callable
  synthesize: Callable | None
  txs: dict[str, optax.GradientTransformation]
  keeps: tuple[str, ...] = ()
  aux: Callable = lambda batch: {}
  sees_target: bool = False
  factor: int = 1
  many_targets: bool = False
  many_sources: bool = False
  draws: tuple[str, ...] = ("pair",)
  stochastic: bool = False
  note: str = ""
  flow: Callable | None = None


class Average(NamedTuple):
  """State of the moving average of a net's parameters, the last link of its optax chain."""
  count: jax.Array
  params: Any


def create(method: Method, key: jax.Array, example: Batch, frozen: dict[str, State],
           start: Mapping[str, Any] | None = None) -> State:
  """A stage's first state; to be jitted whole, so that no two leaves share a buffer.

  Args:
    key: the stage's root key.
    example: a batch of one example of zeros.
    frozen: served states of the stages that this one needs.
    start: {net: parameters} taken over from an earlier stage.
  """
  nets = {**method.init(_init_key(key), example), **(start or {})}
  if set(nets) != set(method.txs):
    raise ValueError(f"init made nets {sorted(nets)}, txs names {sorted(method.txs)}")
  opts = {name: tx.init(nets[name]) for name, tx in method.txs.items()}
  return State(step=jnp.zeros((), jnp.int32), key=key, nets=nets, opts=opts,
               aux=method.aux(example), frozen=frozen)


def _init_key(key: jax.Array) -> jax.Array:
  """A key of the "rbg" kind: random weights by threefry take five times as long to compile."""
  data = jax.random.key_data(jax.random.fold_in(key, _INIT))
  return jax.random.wrap_key_data(jnp.concatenate([data, data]), impl="rbg")


def update(state: State, txs: Mapping[str, optax.GradientTransformation], **grads: Any) -> State:
  """Steps the named nets by their gradients and leaves all others as they are."""
  nets, opts = dict(state.nets), dict(state.opts)
  for name, grad in grads.items():
    change, opts[name] = txs[name].update(grad, opts[name], nets[name])
    nets[name] = optax.apply_updates(nets[name], change)
  return state.replace(nets=nets, opts=opts)


def averaged(opt_state: Any) -> Any | None:
  """The moving average inside an optimiser state, or None."""
  leaves = jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, Average))
  found = [leaf.params for leaf in leaves if isinstance(leaf, Average)]
  return found[0] if found else None


def served(state: State, keeps: tuple[str, ...]) -> State:
  """What synthesis sees: the kept nets, averaged where an average exists, and no optimiser."""
  def best(name):
    average = averaged(state.opts[name])
    return state.nets[name] if average is None else average
  return state.replace(nets={name: best(name) for name in keeps}, opts={})


def earlier(state: State, stage: str) -> State:
  """The served state of an earlier stage, with the frozen states that it needs itself."""
  return state.frozen[stage].replace(frozen=state.frozen)


def example_keys(key: jax.Array, batch: Batch, noise: str = "slice") -> jax.Array:
  """One key an example [B]: of the sample and the slice, not of the place in the batch.

  With `noise` "volume" all slices share the noise of their sample.
  """
  slices = batch["slice"] if noise == "slice" else jnp.zeros_like(batch["slice"])
  samples = batch.get("sample", jnp.zeros_like(slices))
  fold = jax.random.fold_in
  return jax.vmap(lambda sample, k: fold(fold(key, sample), k))(samples, slices)


def category(modality: jax.Array, codes: Sequence[int]) -> jax.Array:
  """The place [B] of each example's modality [B] in `codes`, the numbers of the targets."""
  return jnp.argmax(modality[:, None] == jnp.asarray(codes), -1)
