"""Devices: the mesh, where parameters and batches lie, memory. The only file that knows devices."""

import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from medsynth_jax.errors import UserError

BATCH = PartitionSpec(("data", "fsdp"))
SMALL = 2**14  # arrays below this size are not worth splitting


def make_mesh(fsdp: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
  """All devices, or those given, as a mesh ("data", "fsdp"); `fsdp` of them share parameters."""
  n = jax.device_count() if devices is None else len(devices)
  if fsdp < 1 or n % fsdp:
    raise UserError(f"mesh.fsdp={fsdp} does not divide the {n} devices")
  # Auto axes: under Explicit ones Flax convolutions and dropout raise ShardingTypeError.
  return jax.make_mesh((n // fsdp, fsdp), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2,
                       devices=devices)


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
  """A batch that every process holds whole, split over all devices if it divides."""
  sharding = _same(mesh, len(next(iter(batch.values()))))
  return {k: jax.make_array_from_callback(v.shape, sharding, v.__getitem__)
          for k, v in batch.items()}


def same_shapes(mesh: Mesh, example: dict[str, np.ndarray], size: int) -> dict[str, Any]:
  """Shapes and shardings of a batch that `put_same` makes, from a batch of one example."""
  return {k: jax.ShapeDtypeStruct((size, *v.shape[1:]), v.dtype, sharding=_same(mesh, size))
          for k, v in example.items()}


def idle(mesh: Mesh, size: int) -> str:
  """What process 0 says where `put_same` cannot split a batch of synthesis, else nothing."""
  if not size % mesh.size or not is_first():
    return ""
  return (f"each of the {mesh.size} devices makes all images, since a batch of {size} does not"
          f" divide over them; set config.synthesis.batch_size to a multiple of {mesh.size}")


def _same(mesh: Mesh, size: int) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec() if size % mesh.size else BATCH)


# --- memory ----------------------------------------------------------------------------------


def bytes_of(tree: Any) -> int:
  """Bytes that arrays (or their shapes with shardings) take on one device."""
  return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
             for x in jax.tree.leaves(tree))


# XLA:CPU does not tell what its convolutions copy: U-Nets (2-D, 3-D), image and latent
# diffusion took 1.4 to 1.8 times what it tells (peak resident memory, jax 0.10.2).
UNTOLD = {"cpu": 1.8}


def working_memory(compiled) -> int | None:
  """Bytes that a compiled function takes on a device beside its arguments; None if not told."""
  told = compiled.memory_analysis()
  if told is None:
    return None
  sizes = told.temp_size_in_bytes + told.output_size_in_bytes - told.alias_size_in_bytes
  return int(UNTOLD.get(jax.default_backend(), 1.0) * sizes)


def free_memory() -> int | None:
  """Bytes that are free on each device, the least over all of them; None if a backend tells not.

  Devices of the CPU share what is free in the machine and in this process's control group. All
  processes have to ask together.
  """
  here = min(_free(device) for device in jax.local_devices())
  if jax.process_count() > 1:  # float32 holds a number of bytes well enough
    here = float(multihost_utils.process_allgather(np.float32(here)).min())
  return int(here) if here >= 0 else None


def _free(device) -> int:
  """Free bytes of a device of this process, -1 if not told."""
  if device.platform == "cpu":
    return min(_free_host(), _left_to_group()) // jax.local_device_count()
  stats = device.memory_stats() or {}
  return stats["bytes_limit"] - stats["bytes_in_use"] if "bytes_limit" in stats else -1


def _free_host(proc: Path = Path("/proc")) -> int:
  """Free bytes of the machine (Linux), or all that it has."""
  if (proc / "meminfo").exists():
    found = re.search(r"MemAvailable:\s*(\d+) kB", (proc / "meminfo").read_text())
    if found:
      return 1024 * int(found[1])
  return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


# limit, use, and the page cache that is given back on demand, in the words of versions 2 and 1
GROUP_FILES = (("memory.max", "memory.current", "inactive_file"),
               ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"))


def _left_to_group(proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> int:
  """Bytes that the control groups of this process (a container's, a job's) still allow."""
  left, own = 2**62, proc / "self" / "cgroup"
  for line in own.read_text().splitlines() if own.exists() else ():
    _, kinds, path = line.split(":", 2)
    if kinds and "memory" not in kinds.split(","):
      continue
    top = groups / "memory" if kinds else groups
    limit, use, cache = GROUP_FILES[bool(kinds)]
    folder = top / path.strip("/")
    for group in (folder, *folder.parents):
      if not (group.is_relative_to(top) and (group / limit).exists()):
        continue
      most = (group / limit).read_text().strip()
      idle = re.search(rf"^{cache} (\d+)", (group / "memory.stat").read_text(), re.MULTILINE)
      if most != "max":
        used = int((group / use).read_text()) - (int(idle[1]) if idle else 0)
        left = min(left, max(0, int(most) - used))
  return left
