"""Devices: the mesh, where parameters and batches lie. The only file that knows devices."""

from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from medsynth_jax.errors import UserError

BATCH = PartitionSpec(("data", "fsdp"))
SMALL = 2**14  # arrays below this size are not worth splitting


def make_mesh(fsdp: int = 1) -> Mesh:
  """All devices as a mesh ("data", "fsdp"); parameters are split over `fsdp` devices."""
  n = jax.device_count()
  if fsdp < 1 or n % fsdp:
    raise UserError(f"mesh.fsdp={fsdp} does not divide the {n} devices")
  # Auto axes: under Explicit ones Flax convolutions and dropout raise ShardingTypeError.
  return jax.make_mesh((n // fsdp, fsdp), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


def check_batch(batch_size: int, mesh: Mesh) -> None:
  """A UserError if a batch cannot be shared out evenly over the devices."""
  if batch_size % mesh.size:
    raise UserError(f"batch_size={batch_size} does not divide over {mesh.size} devices;"
                    f" use a multiple of {mesh.size}")


def parameter_shardings(mesh: Mesh, tree: Any) -> Any:
  """Shardings of a state: each large array by its largest dimension that `fsdp` divides."""
  fsdp = mesh.shape["fsdp"]
  def rule(x):
    spec = [None] * x.ndim
    if fsdp > 1 and x.size >= SMALL and not jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
      divisible = [i for i in range(x.ndim) if x.shape[i] % fsdp == 0]
      if divisible:
        spec[max(divisible, key=lambda i: x.shape[i])] = "fsdp"
    return NamedSharding(mesh, PartitionSpec(*spec))
  return jax.tree.map(rule, tree)


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec())


def first_process_first(work):
  """`work()` on process 0, then on all others, which find its files done."""
  if jax.process_count() == 1:
    return work()
  done = work() if jax.process_index() == 0 else None
  multihost_utils.sync_global_devices("first_process_first")
  return done if jax.process_index() == 0 else work()


def put_batch(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
  """This process's share of a batch as global arrays, split over all devices."""
  sharding = NamedSharding(mesh, BATCH)
  return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}


def put_same(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
  """A batch that every process holds whole: split over the devices of one process if it divides."""
  size = len(next(iter(batch.values())))
  spec = BATCH if jax.process_count() == 1 and size % mesh.size == 0 else PartitionSpec()
  return jax.device_put(batch, NamedSharding(mesh, spec))
