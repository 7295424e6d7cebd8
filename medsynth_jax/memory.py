"""What compiled code takes of a device's memory, compared with what is free before it is run."""

from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from medsynth_jax import config as configs
from medsynth_jax import sharding
from medsynth_jax.contract import Method
from medsynth_jax.errors import UserError


def check(what: str, compiled, arguments: Any, remedy: str) -> None:
  """Compares what a compiled function takes with what is free; all processes ask together.

  Args:
    what: it, in words: "stage 'unet': a training step".
    arguments: the shapes with shardings of what it needs beside its own memory.
    remedy: what to do where it does not fit.

  Raises:
    UserError: it does not fit; says by how much.
  """
  working, free = sharding.working_memory(compiled), sharding.free_memory()
  if working is None or free is None:
    if sharding.is_first():
      print(f"{what}: this device does not tell its memory, so that whether it fits is unknown",
            flush=True)
    return
  needed = working + sharding.bytes_of(arguments)
  if needed > free:
    raise UserError(f"{what} needs {size(needed)}, {size(needed - free)} more than the"
                    f" {size(free)} that are free; {remedy}")


def size(count: int) -> str:
  """A number of bytes for a reader."""
  return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"


def synthesis_remedy(count: int) -> str:
  """What to do where synthesis of `count` windows at once does not fit."""
  return ("use a device with more memory, or a smaller network or data.size" if count == 1 else
          "set --config.synthesis.batch_size lower (--batch_size in synthesize)")


def training_remedy(config: ConfigDict, stage: str, method: Method, mesh: Mesh) -> str:
  """What to do where a stage's training step does not fit: the fields that would help there.

  On a CPU remat and bfloat16 are not named: a step of configs/cldm.py took 1.00 and 0.98 times the
  memory with them (jax 0.10.2).
  """
  section, prefix = configs.stages(config)[stage], _prefix(config, stage)
  ways, cpu = [], jax.default_backend() == "cpu"
  if section.batch_size > mesh.size:
    updates = f" ({prefix}optim.accumulate raised by as much keeps the images of an update)" \
      if method.txs else ""
    ways.append(f"{prefix}batch_size lower than {section.batch_size}{updates}")
  for name, net in section.items():
    if not cpu and method.txs and isinstance(net, ConfigDict) and not net.get("remat", True):
      ways.append(f"{prefix}{name}.remat=True")
  if not cpu and config.dtype == "float32":
    ways.append("config.dtype=bfloat16")
  if mesh.shape["fsdp"] < mesh.size:
    ways.append(f"config.mesh.fsdp={mesh.size} (splits the parameters over the devices)")
  return f"set {', or '.join([*ways, 'a smaller config.data.size'])}"


def _prefix(config: ConfigDict, stage: str) -> str:
  """How a command line names the fields of a stage; those of one fold are the coarse stage's."""
  if "stages" not in config:
    return "config."
  if stage not in config.stages:
    stage = next(config[s].coarse for s in config.stages if stage in configs.folds(config[s]))
  return f"config.{stage}."
