"""Trains and scores every point of configs x grid x seeds, then writes one table and one figure.

python -m launch.sweep --config=configs/pix2pix.py,configs/unet.py:paper --out=SWEEP
    --grid config.optim.lr=1e-4,2e-4 --seeds=3 [--config.any.field=value ...]
    [--backend=local|slurm|tpu] [--jobs=1] [--dry-run]

The robustness curve (misalignment levels of the training pairs, scored on aligned subjects; the
same data, generator and steps for all three, checkpoints chosen on aligned validation subjects):

python -m launch.sweep
    --config=configs/reg_gan.py:pix2pix,configs/reg_gan.py,configs/cyclegan.py
    --grid config.misalign=0,1,2,3,4,5 --config.displace=0 --config.redraw=True
    --config.steps=2000 --out=SWEEP

Each trial is one `python -m medsynth_jax.main` with a run folder of its own, SWEEP/<trial>; its
output lies in SWEEP/logs/<trial>.txt. Trials without `data.dir` share one built-in data set,
SWEEP/simulated_<fields>. The same command continues a sweep: finished trials are never run again,
interrupted and failed ones go on. A failed trial stops no other; it is told in the end, and the
exit status is 1. Ctrl-C asks the running trials to save and ends the sweep with status 130.

A field of a config of several stages names its stage (`--grid config.cldm.optim.lr=...`); a value
that holds commas stands in brackets or quotes. `--backend=slurm` submits each trial by
launch/slurm.sbatch (options of sbatch by its variables, as SBATCH_PARTITION) and leaves those alone
that are in the queue; `--backend=tpu` runs them one by one on the pod that TPU_NAME and TPU_ZONE
name. Both need SWEEP on a disk that all machines share. The same command, later, collects.

SWEEP/results.csv has a line a trial, direction and row; table.md the means over the seeds; and
curve.png the scores against the first grid field.
"""

import argparse
import contextlib
import fcntl
import getpass
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from launch import sweep_results
from launch.trials import Trial, make_data, plan, read_grid
from medsynth_jax import cli
from medsynth_jax import config as configs
from medsynth_jax.errors import UserError

BACKENDS = ("local", "slurm", "tpu")
INTERRUPTED = 130
LAST_LINES = 4  # of a failed trial's output


# --- one after another, on this machine or a pod ---------------------------------------------


def show(line: Sequence[str]) -> None:
  print(f"$ {shlex.join(line)}", flush=True)


def run_here(trials: Sequence[Trial], backend: str, jobs: int) -> tuple[dict[str, int], bool]:
  """Runs trials, `jobs` at once: {trial: exit status} of those that have ended, and whether all
  were asked to stop.

  One that was interrupted, or a signal to the sweep, stops all: the others are asked to save.
  """
  waiting, running, codes, told = list(trials), {}, {}, False
  with _stop_signals() as stop, _alone(trials) as lock:
    while running or (waiting and not stop):
      while waiting and len(running) < jobs and not stop:
        trial = waiting.pop(0)
        running[trial] = _start(trial, trial.command(backend), lock), time.perf_counter()
      for trial, (process, then) in list(running.items()):
        if process.poll() is not None:
          del running[trial]
          codes[trial.run] = INTERRUPTED if stop and process.returncode else _code(trial, process)
          print(f"  {trial.run}: {_ending(codes[trial.run])} after"
                f" {(time.perf_counter() - then) / 60:.1f} min"
                f" ({len(codes)} of {len(trials)})", flush=True)
          if process.returncode == INTERRUPTED:
            stop.append(INTERRUPTED)
      if stop and not told:
        told = True
        for process, _ in running.values():
          process.terminate()
      time.sleep(0.1)
    return codes, bool(stop)


@contextlib.contextmanager
def _alone(trials: Sequence[Trial]) -> Iterator[IO | None]:
  """A lock on the sweep's folder, which its trials hold too: they may outlive the sweep.

  Raises:
    UserError: another sweep has it, or a trial that one has left behind.
  """
  if not trials:
    yield None
    return
  with open(trials[0].log.parent / "lock", "w") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise UserError(f"{trials[0].folder.parent}: another sweep, or a trial that one has left"
                      " behind, is at work there; wait for it or end it") from None
    except OSError:
      pass  # a disk that knows no locks
    yield file


def _code(trial: Trial, process: subprocess.Popen) -> int:
  """The exit status of a trial that has ended; 1 where it says done and has left no scores."""
  if process.returncode or trial.finished:
    return process.returncode
  with open(trial.log, "a") as file:
    file.write(f"\nerror: no scores in {trial.folder}; is it on a disk that the machine which"
               " trained shares with this one?\n")
  return 1


def _start(trial: Trial, line: Sequence[str], lock: IO) -> subprocess.Popen:
  """Starts a trial whose output goes to its log, out of the reach of the terminal's Ctrl-C."""
  show(line)
  started = [sys.executable, *line[1:]] if line[0] == "python" else line
  with open(trial.log, "a") as file:
    return subprocess.Popen(started, stdout=file, stderr=subprocess.STDOUT,
                            stdin=subprocess.DEVNULL, start_new_session=True,
                            pass_fds=[lock.fileno()])


def _ending(code: int) -> str:
  return {0: "done", INTERRUPTED: "interrupted"}.get(code, f"FAILED (status {code})")


@contextlib.contextmanager
def _stop_signals() -> Iterator[list[int]]:
  """A list that is not empty once SIGTERM or Ctrl-C has come."""
  asked: list[int] = []
  old = {s: signal.signal(s, lambda number, frame: asked.append(number))
         for s in (signal.SIGTERM, signal.SIGINT)}
  try:
    yield asked
  finally:
    for number, handler in old.items():
      signal.signal(number, handler)


def last_lines(trial: Trial) -> list[str]:
  """The last lines of a trial's output, without progress bars."""
  text = trial.log.read_bytes().decode(errors="replace") if trial.log.exists() else ""
  lines = [line.rsplit("\r", 1)[-1].strip() for line in text.split("\n")]
  return [line for line in lines if line][-LAST_LINES:]


# --- SLURM -----------------------------------------------------------------------------------


def submit(trials: Sequence[Trial]) -> None:
  """Submits trials that are not in the queue; a job's number lies beside its log."""
  queue = _slurm(["squeue", "--noheader", f"--user={getpass.getuser()}", "--format=%i"]).split()
  for trial in trials:
    number = trial.log.with_suffix(".job")
    if number.exists():
      job = number.read_text().strip()
      if job in queue:
        print(f"  {trial.run}: job {job} is in the queue")
        continue
      print("\n    ".join([f"  {trial.run}: job {job} ended without scores; its last lines:",
                           *last_lines(trial)]))
    line = trial.command("slurm")
    show(line)
    number.write_text(_slurm(line).split(";")[0].strip() + "\n")


def _slurm(line: Sequence[str]) -> str:
  """The output of a command of SLURM."""
  try:
    done = subprocess.run(line, capture_output=True, text=True)
  except FileNotFoundError:
    raise UserError(f"--backend=slurm: no {line[0]} on this machine; run where SLURM's commands"
                    " are") from None
  if done.returncode:
    raise UserError(f"{line[0]}: {' '.join(done.stderr.split())}")
  return done.stdout


# --- the command -----------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
  def error(self, message):
    raise UserError(f"{message}; see --help")


def arguments(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
  """The arguments, and the flags `--config.field=value` among them."""
  parser = _Parser(prog="python -m launch.sweep", description=__doc__, allow_abbrev=False,
                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--config", required=True, help="config files, with commas between them")
  parser.add_argument("--out", type=Path, required=True, help="folder of runs and results")
  parser.add_argument("--grid", action="append", default=[], help="config.field=value,value")
  parser.add_argument("--seeds", type=int, default=1, help="how many: 0, 1, ...")
  parser.add_argument("--backend", choices=BACKENDS, default="local")
  parser.add_argument("--jobs", type=int, default=1, help="trials at once on this machine")
  parser.add_argument("--dry-run", action="store_true", help="only print the commands")
  found, fields = parser.parse_known_args(argv)
  for field in fields:
    if not field.startswith("--config.") or "=" not in field:
      parser.error(f"unknown argument '{field}'; fields are set as --config.field=value")
  for name in ("seeds", "jobs"):
    if getattr(found, name) < 1:
      parser.error(f"--{name}={getattr(found, name)}: give 1 or more")
  if found.jobs > 1 and found.backend != "local":
    parser.error(f"--jobs={found.jobs} is of --backend=local only")
  if found.backend == "tpu" and not found.dry_run and not {"TPU_NAME", "TPU_ZONE"} <= {*os.environ}:
    parser.error("--backend=tpu: set TPU_NAME and TPU_ZONE to the pod's")
  return found, fields


def main(argv: Sequence[str]) -> int:
  """The command; its exit status."""
  asked, fields = arguments(argv)
  names, grid = configs.names(asked.config), read_grid(asked.grid)
  if not names:
    raise UserError("--config is empty; give configs/NAME.py, several with commas between them")
  # a pod's workers have another current folder
  out = asked.out.absolute() if asked.backend == "tpu" else asked.out
  trials = plan(names, grid, asked.seeds, fields, out)
  left = [t for t in trials if not t.finished]
  print(f"{len(trials)} trials, {len(trials) - len(left)} finished", flush=True)
  if asked.dry_run:
    for trial in left:
      show(trial.command(asked.backend))
    return 0
  (asked.out / "logs").mkdir(parents=True, exist_ok=True)
  make_data(left)
  codes, stopped = {}, False
  if asked.backend == "slurm":
    submit(left)
  else:
    codes, stopped = run_here(left, asked.backend, asked.jobs)
  done = [t for t in trials if t.finished]
  if done:
    print("\n" + sweep_results.write(done, len(trials), asked.out))
  failed = [t for t in trials if codes.get(t.run, 0) not in (0, INTERRUPTED)]
  for trial in failed:
    print("\n  ".join([f"\n{trial.run} failed ({trial.log}):", *last_lines(trial)]),
          file=sys.stderr)
  if failed:
    print(f"\n{len(failed)} of {len(trials)} trials failed; the same command tries them again",
          file=sys.stderr)
  if stopped:
    raise KeyboardInterrupt
  return 1 if failed else 0


if __name__ == "__main__":
  cli.guard(lambda: sys.exit(main(sys.argv[1:])))
