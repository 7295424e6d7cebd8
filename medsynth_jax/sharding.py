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
  done = error = None
  if is_first():
    try:
      done = work()
    except UserError as caught:
      error = caught
  if any_process(error is not None):
    raise error or UserError("process 0 stopped; its message says why")
  return done if is_first() else work()


def is_first() -> bool:
  """Whether this process writes files and prints."""
  return jax.process_index() == 0


def any_process(flag: bool) -> bool:
  """Whether the flag is set on any process; all processes have to ask together."""
  if jax.process_count() == 1:
    return flag
  return bool(multihost_utils.process_allgather(np.array(flag)).any())


def batch_shapes(mesh: Mesh, example: dict[str, np.ndarray], size: int) -> dict[str, Any]:
  """Shapes and shardings of a training batch, from a batch of one example."""
  sharding = NamedSharding(mesh, BATCH)
  return {k: jax.ShapeDtypeStruct((size, *v.shape[1:]), v.dtype, sharding=sharding)
          for k, v in example.items()}


def put_batch(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
  """This process's share of a batch as global arrays, split over all devices."""
  sharding = NamedSharding(mesh, BATCH)
  return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}


def put_same(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
  """A batch that every process holds whole: split over the devices of one process if it divides."""
  size = len(next(iter(batch.values())))
  spec = BATCH if jax.process_count() == 1 and size % mesh.size == 0 else PartitionSpec()
  return jax.device_put(batch, NamedSharding(mesh, spec))
