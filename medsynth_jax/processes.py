"""The processes of one run: how they meet, and how the end of one is told to the others."""

import atexit
import contextlib
import faulthandler
import os
import subprocess
import sys
import time

import jax

from medsynth_jax.errors import UserError

# what a collective raises, and the coordination service, when the process at the other end is gone
SIGNS = ("gloo", "nccl", "coordination", "heartbeat", "unavailable", "deadline_exceeded",
         "connection", "socket closed")
AGAIN = "the same command continues from the last checkpoint"
# JAX aborts a process when another has been silent for too long, with many lines of its own and
# past any `except`: a shell that then finds its input closed has the last word.
LAST_WORD = ('trap "" TERM INT; read -r _ || { echo "error: $0" >&2; exit; };'
             ' read -r _ || echo "error: $1" >&2')


_shell: subprocess.Popen | None = None


def join(coordinator: str, processes: int | None, process: int | None, lost_after: int) -> None:
  """Joins the other processes of a run, if there are any; before any use of a device.

  Args:
    coordinator: host:port of process 0, or "auto": by the variables of SLURM, Cloud TPU and what
      else JAX knows; "": this is the only process.
    processes, process: how many there are and which one this is, with host:port only.
    lost_after: seconds without a sign of life after which a process counts as dead; then the others
      end too.

  Raises:
    UserError: no such variables, numbers that do not fit.
  """
  global _shell
  if coordinator in ("", "auto") and (processes, process) != (None, None):
    raise UserError("--processes and --process need the address of process 0, the same for all:"
                    " --coordinator=HOST:PORT ('auto' finds the numbers by itself)")
  if not coordinator:
    return
  given, where = (), f"--coordinator={coordinator}"
  if coordinator != "auto":
    given = _given(where, coordinator, processes, process)
  _shell = subprocess.Popen(
    ["sh", "-c", LAST_WORD, f"{where}: the processes of the run did not meet in five minutes; start"
     " all of them, with one address and each with its own number",
     f"another process of the run has died, or gave no sign of life for {lost_after} s, or this one"
     f" was killed; {AGAIN}"],
    stdin=subprocess.PIPE, start_new_session=True)  # Ctrl-C is not for the shell
  faulthandler.disable()  # absl's flags enable it: pages of stacks where JAX aborts
  try:
    jax.distributed.initialize(*given, heartbeat_timeout_seconds=lost_after)
  except (ValueError, RuntimeError) as error:
    _tell(2)
    if coordinator == "auto" and "coordinator_address" in str(error):
      raise UserError(f"{where}: found no variables of SLURM or Cloud TPU; start the processes by"
                      " srun or on the TPU's workers, or give --coordinator=HOST:PORT --processes=N"
                      " --process=I") from None
    raise UserError(f"{where}: {' '.join(str(error).split())[:300]}") from None
  _tell(1)
  atexit.register(_end)


def _given(where: str, coordinator: str, processes: int | None, process: int | None
           ) -> tuple[str, int, int]:
  host, _, port = coordinator.rpartition(":")
  if not host or not port.isdigit():
    raise UserError(f"{where}: give host:port of process 0, as in localhost:12355, or 'auto'")
  if processes is None or process is None or not 0 <= process < processes:
    raise UserError(f"{where}: give the number of processes by --processes=N and this one's by"
                    " --process, from 0 to N-1")
  return coordinator, processes, process


def _tell(lines: int) -> None:
  """One line tells the shell that joining is over, one more that this process ends by itself."""
  with contextlib.suppress(BrokenPipeError):  # something has killed the shell
    _shell.stdin.write(b"\n" * lines)
    _shell.stdin.flush()


def _end() -> None:
  jax.distributed.shutdown()  # waits for the others
  _tell(1)


def lost(error: BaseException | None) -> str:
  """One line if the error, or what led to it, is that another process has ended, else ""."""
  while error and jax.distributed.is_initialized():
    text = str(error)
    if isinstance(error, jax.errors.JaxRuntimeError) and any(s in text.lower() for s in SIGNS):
      return (f"another process of the run has ended, its own messages say why; {AGAIN}"
              f" ({text.splitlines()[0][:120]})")
    error = error.__cause__ or error.__context__
  return ""


def leave(status: int) -> None:
  """Ends this process at once if it is one of several, who would wait for it, and it for them."""
  if not jax.distributed.is_initialized():
    return
  if jax.process_index() == 0:
    time.sleep(1)  # its end is that of the others, who may have something to say too
  sys.stdout.flush()
  sys.stderr.flush()
  _tell(1)
  os._exit(status)
