"""Training steps and synthesis compiled ahead of their first use, from shapes alone."""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from medsynth_jax import sharding


def lower(synthesize: Callable, mesh: Mesh, state: Any, batch: Any) -> jax.stages.Lowered:
  """`synthesize(state, batch, key)` lowered from shapes alone; its images lie on every device.

  Args:
    mesh: the devices, which the caller has set.
    state, batch: shapes with shardings; the key is `state.key`.
  """
  return jax.jit(synthesize, out_shardings=sharding.replicated(mesh)).lower(
    state, batch, state.key)


def compile_ahead(what: str, lowered: Callable[[], jax.stages.Lowered]):
  """(what `lowered()` gives compiled, the seconds that both took, which are told)."""
  then = time.perf_counter()
  compiled = lowered().compile()
  seconds = time.perf_counter() - then
  if sharding.is_first():
    print(f"{what} compiled in {seconds:.1f} s", flush=True)
  return compiled, seconds


def mirrored(synthesize: Callable, axis: int) -> Callable:
  """Synthesis averaged with that of the mirrored batch."""
  def both(state, batch, key):
    spatial = batch["source"].ndim
    turned = {k: jnp.flip(v, axis) if v.ndim == spatial else v for k, v in batch.items()}
    image = synthesize(state, batch, key)
    return (image + jnp.flip(synthesize(state, turned, key), axis)) / 2
  return both
