"""Synthesis compiled ahead of its first use, and refused where it does not fit the memory."""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from medsynth_jax import sharding
from medsynth_jax.errors import UserError


def compile_ahead(name: str, synthesize: Callable, mesh: Mesh, state: Any, batch: Any):
  """(`synthesize(state, batch, key)` compiled from shapes alone, the seconds that took).

  Args:
    state, batch: shapes with shardings; the key is `state.key`.
  """
  everywhere, then = sharding.replicated(mesh), time.perf_counter()
  with jax.set_mesh(mesh):
    lowered = jax.jit(synthesize, out_shardings=everywhere).lower(state, batch, state.key)
    compiled = lowered.compile()
  seconds = time.perf_counter() - then
  if sharding.is_first():
    print(f"{name}: synthesis compiled in {seconds:.1f} s", flush=True)
  return compiled, seconds


def mirrored(synthesize: Callable, axis: int) -> Callable:
  """Synthesis averaged with that of the mirrored batch."""
  def both(state, batch, key):
    spatial = batch["source"].ndim
    turned = {k: jnp.flip(v, axis) if v.ndim == spatial else v for k, v in batch.items()}
    image = synthesize(state, batch, key)
    return (image + jnp.flip(synthesize(state, turned, key), axis)) / 2
  return both


def check_memory(name: str, compiled, arguments: Any, count: int, unit: str) -> None:
  """Compares what a compiled synthesis takes with what is free; all processes ask together.

  Args:
    arguments: the shapes with shardings of what it needs beside its own memory.
    count, unit: what it makes at once, for the message.

  Raises:
    UserError: it does not fit; says by how much.
  """
  working, free = sharding.working_memory(compiled), sharding.free_memory()
  if working is None or free is None:
    if sharding.is_first():
      print(f"{name}: this device does not tell its memory, so that whether synthesis fits is"
            " unknown", flush=True)
    return
  needed = working + sharding.bytes_of(arguments)
  if needed > free:
    remedy = ("use a device with more memory, or a smaller network or data.size" if count == 1 else
              "set --config.synthesis.batch_size lower (--batch_size in synthesize)")
    raise UserError(f"stage '{name}': synthesis of {count} {unit} at once needs {_size(needed)},"
                    f" {_size(needed - free)} more than the {_size(free)} that are free; {remedy}")


def _size(count: int) -> str:
  return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"
