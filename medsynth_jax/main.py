"""Trains a config's stages on a data set, then evaluates on its test subjects.

python -m medsynth_jax.main --config=configs/pix2pix.py --config.data.dir=DATA --workdir=RUN

The same command continues an interrupted run. Without `data.dir` the built-in simulated data set
is made in RUN/data first.
"""

import sys
from pathlib import Path

import jax
from absl import flags

from medsynth_jax import builtin, cli, evaluate, processes, run, sharding, train
from medsynth_jax.data import pipeline
from medsynth_jax.data.dataset import Store
from medsynth_jax.errors import UserError

CONFIG = cli.define_config()
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run (made if absent).")
COORDINATOR = flags.DEFINE_string(
  "coordinator", None, "host:port of process 0, for runs of several processes without a cluster"
  " manager (on SLURM and TPU pods: 'auto').")
PROCESSES = flags.DEFINE_integer("processes", None, "Number of processes, with --coordinator.")
PROCESS = flags.DEFINE_integer("process", None, "This process's number, with --coordinator.")
LOST_AFTER = flags.DEFINE_integer(
  "lost_after", 100, "Seconds without a sign of life after which a process of several counts as"
  " dead and the others end.", lower_bound=1)
EVALUATE = flags.DEFINE_bool("evaluate", True, "Evaluate on the test subjects after training.")


def main(argv: list[str]) -> int | None:
  del argv
  if CONFIG.value is None or WORKDIR.value is None:
    raise UserError("give --config=configs/NAME.py and --workdir=RUN")
  processes.join(COORDINATOR.value or "", PROCESSES.value, PROCESS.value, LOST_AFTER.value)
  cli.quiet(sharding.is_first())
  workdir, config = Path(WORKDIR.value), CONFIG.value
  run.check(config, workdir)
  first = sharding.first_process_first
  data = Path(config.data.dir or first(lambda: builtin.make(config, workdir)))
  store = Store(data)
  here = first(lambda: run.start(config, store.info, workdir))
  if EVALUATE.value:
    evaluate.scored_cases(here, "test")  # told now, not after the training
  tell = print if sharding.is_first() else lambda *_, **__: None
  tell(f"{here.task.direction} -> {', '.join(here.task.targets)} on {data}: "
       + ", ".join(f"{len(store.info.split(s))} {s}" for s in ("train", "validation", "test"))
       + f" cases; {jax.device_count()} {jax.default_backend()} device(s)", flush=True)
  for line in pipeline.told(store.info, here.task, [s.draw for s in here.sections.values()]):
    tell(line)
  try:
    train.train(here, store)
  except train.Interrupted as message:
    tell(message, file=sys.stderr)
    return 130
  if EVALUATE.value:
    tell(evaluate.evaluate(here, store))
  return None


if __name__ == "__main__":
  cli.run(main)
