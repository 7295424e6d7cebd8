"""A config on a TPU pod, as its compiler tells of it on a machine without one (`bench --topology`).

The training step and the synthesis of every stage are compiled for the pod from shapes alone. What
is told is exact but for the efficiency, which is an estimate:

  memory         arguments, results that take no argument's place, working memory and code on a
                 device, and the batches that wait
  collectives    those that a step runs, loops counted (of a condition all branches), and the bytes
                 that a device sends if each is done in a ring of its n devices: all-reduce
                 2 (n - 1) / n of its size, all-gather, reduce-scatter and all-to-all (n - 1) / n of
                 the whole, a permutation all
  compute        the longer of FLOPs / (UTILISATION x peak) and bytes of HBM read and written / its
                 speed; loops counted by their share of the convolutions
  communication  bytes sent / speed of a ring, which uses two ports of a chip both ways
  efficiency     compute / (compute + communication): a device's speed beside that of one alone

Nothing is overlapped and one ring is used where XLA uses one along each axis of the pod: too low.
Latency, waiting for data and the input pipeline are left out: too high. Peaks and speeds are those
of docs.cloud.google.com/tpu/docs/{v5e,v5p,v6e}: a port's two-way speed is that of the chip ("ICI")
over its ports. float32 networks multiply in bfloat16 passes on a TPU by default.
"""

import importlib.metadata
import importlib.util
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies
from ml_collections import ConfigDict

from medsynth_jax import builtin, hlo, sharding, train
from medsynth_jax import config as configs
from medsynth_jax import run as runs
from medsynth_jax.data.dataset import load_info
from medsynth_jax.errors import UserError

UTILISATION = 0.5  # of the peak: what well-tuned convolutional networks reach


class Chip(NamedTuple):
  """bfloat16 FLOP/s, bytes that XLA lets a program use, bytes/s of HBM, bytes/s of a ring."""
  peak: float
  memory: float
  hbm: float
  ring: float


CHIPS = {"TPU v5 lite": Chip(197e12, 15.75 * 2**30, 819e9, 400e9 / 4),
         "TPU v5": Chip(459e12, 95.73 * 2**30, 2765e9, 1200e9 / 6),
         "TPU v6 lite": Chip(918e12, 31.24 * 2**30, 1638e9, 800e9 / 4)}

# libtpu would ask the network which TPU this machine is, warn that it is none, write logs, and
# serve one process at a time
QUIET = {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-16",
         "TPU_WORKER_HOSTNAMES": "localhost", "TPU_LOG_DIR": "disabled",
         "ALLOW_MULTIPLE_LIBTPU_LOAD": "true"}


def devices(topology: str) -> list[jax.Device]:
  """The devices of a topology such as "v5e:4x4": described, not there.

  Raises:
    UserError: libtpu is not installed; an unknown topology or chip.
  """
  if importlib.util.find_spec("libtpu") is None:
    raise UserError("--topology: the compiler for TPUs is not installed; pip install"
                    " 'medsynth-jax[tpu]'")
  for name, value in QUIET.items():
    os.environ.setdefault(name, value)
  advice = "give a v5e, v5p or v6e and its grid, as v5e:4x4, v5e:16x16, v6e:16x16 or v5p:4x4x4"
  try:
    found = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
  except jax.errors.JaxRuntimeError as error:
    raise UserError(f"--topology={topology}: {_line(error)}; {advice}") from None
  if found[0].device_kind not in CHIPS:
    raise UserError(f"--topology={topology}: no figures of a {found[0].device_kind} are known;"
                    f" {advice}")
  return found


def describe(config: ConfigDict, topology: str, tell: Callable[[str], None] = print,
             only: Sequence[str] = ()) -> dict[str, Any]:
  """What the compiler says of a config's stages on a pod, all or those in `only`; see the module.

  Without `data.dir` the shapes are those of the built-in simulated data, which are not made.

  Args:
    tell: is given a line of the table as each program is done.

  Raises:
    UserError: as `devices`; a batch that does not divide; what `run.check_fields`, `build` and
      `chosen` do.
  """
  jax.config.update("jax_platforms", "cpu")  # else libtpu looks for a TPU here
  jax.config.update("jax_enable_compilation_cache", False)  # it cannot read a pod's code back
  found = devices(topology)
  mesh, chip = sharding.make_mesh(config.mesh.fsdp, found), CHIPS[found[0].device_kind]
  _check_batches(config, mesh.size)
  runs.check_fields(config, mesh)
  stages = runs.chosen(config, only)
  info = load_info(config.data.dir) if config.data.dir else builtin.outline(config)
  run, programs = runs.build(config, info, Path(), mesh), []
  tell(HEADER)
  for stage in stages:
    batch = train.batch_shapes(run, stage)
    waiting = config.data.prefetch * sharding.bytes_of(batch)
    jobs = [("step", run.sections[stage].batch_size, waiting,
             lambda stage=stage: train.lower_step(run, stage))]
    if run.methods[stage].synthesize:
      jobs.append(("synthesis", config.synthesis.batch_size, 0,
                   lambda stage=stage: run.lower_synthesis(stage)))
    for what, size, more, lower in jobs:
      told = {"stage": stage, "program": what, "batch_size": size, **_compiled(lower, more, chip)}
      programs.append(told)
      tell(row(told))
  return {"topology": topology, "chip": found[0].device_kind, "devices": mesh.size,
          "hosts": len({d.process_index for d in found}), "fsdp": config.mesh.fsdp,
          "idle": sharding.idle(mesh, config.synthesis.batch_size),
          "utilisation": UTILISATION, **{f"chip_{k}": v for k, v in chip._asdict().items()},
          "jax": jax.__version__, "libtpu": importlib.metadata.version("libtpu"),
          "programs": programs}


def _check_batches(config: ConfigDict, count: int) -> None:
  """A UserError that names all batches that cannot be shared out over the devices."""
  bad = {name: section.batch_size for name, section in configs.stages(config).items()
         if section.batch_size % count and not name.startswith(configs.FOLD)}
  if bad:
    one = "stages" not in config
    fields = ", ".join(f"--config.{'' if one else name + '.'}batch_size={-(-size // count) * count}"
                       f" (is {size})" for name, size in bad.items())
    raise UserError(f"batches are of all {count} devices together: use multiples of {count}, as"
                    f" {fields}")


def _compiled(lower: Callable, waiting: int, chip: Chip) -> dict[str, Any]:
  """Compiles a program and says what it takes; `waiting` bytes lie on a device beside it."""
  then = time.perf_counter()
  lowered = lower()
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    needed = re.search(r"\(([\d.]+)G\) exceeds available", str(error))
    if "RESOURCE_EXHAUSTED" not in str(error) or not needed:
      raise
    return {"fits": False, "memory": int(float(needed[1]) * 2**30) + waiting,
            "compile_seconds": time.perf_counter() - then}
  seconds, told = time.perf_counter() - then, compiled.memory_analysis()
  taken = waiting + (told.argument_size_in_bytes + told.output_size_in_bytes
                     - told.alias_size_in_bytes + told.temp_size_in_bytes
                     + told.generated_code_size_in_bytes)
  text, cost = compiled.as_text(), compiled.cost_analysis()
  moved, repeated = hlo.read(text)
  flops, touched = repeated * cost["flops"], repeated * cost["bytes accessed"]
  return {"fits": taken <= chip.memory, "memory": taken, "flops": flops, "hbm_bytes": touched,
          "collectives": moved, "compile_seconds": seconds, **estimate(flops, touched, moved, chip)}


def estimate(flops: float, touched: float, moved: Mapping[str, Any], chip: Chip
             ) -> dict[str, float]:
  """Seconds of compute and communication of one step, and the efficiency: see the module."""
  compute = max(flops / (UTILISATION * chip.peak), touched / chip.hbm)
  communication = sum(kind["sent"] for kind in moved.values()) / chip.ring
  return {"compute_seconds": compute, "communication_seconds": communication,
          "efficiency": compute / (compute + communication)}


# --- what is printed ----------------------------------------------------------------------------

HEADER = ("stage            program    batch   memory        TFLOPs   sent MB  efficiency  "
          "collectives")


def row(told: Mapping[str, Any]) -> str:
  """A line of the table: memory, FLOPs and bytes sent are those of one device."""
  size = f"{told['memory'] / 2**30:.2f} GiB{'' if told['fits'] else ' !'}"
  line = f"{told['stage']:<16} {told['program']:<9} {told['batch_size']:>6}   {size:<12}"
  if "flops" not in told:
    return f"{line} does not fit: not compiled"
  kinds = ", ".join(f"{kind['count']} {name}" for name, kind in told["collectives"].items())
  sent = sum(kind["sent"] for kind in told["collectives"].values()) / 1e6
  return (f"{line} {told['flops'] / 1e12:>7.3f} {sent:>9.1f}  {told['efficiency']:>9.0%}   "
          f"{kinds or 'none'}")


def note(found: Mapping[str, Any]) -> str:
  """What the rows of `describe` are of."""
  idle = f"\nsynthesis: {found['idle']}" if found["idle"] else ""
  return (f"{found['devices']} x {found['chip']} on {found['hosts']} hosts,"
          f" {found['chip_memory'] / 2**30:.2f} GiB each (!: does not fit); memory, TFLOPs and sent"
          f" MB are a device's; efficiency is estimated, see medsynth_jax/pods.py{idle}")


def _line(error: Exception) -> str:
  return " ".join(str(error).splitlines()[0].split()).rstrip(".;")
