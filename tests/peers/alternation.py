"""Times functions in turn, so that whatever else disturbs the machine disturbs them alike."""

import time
from collections.abc import Callable, Sequence

import jax


def alternate(functions: Sequence[Callable], repeats: int = 3,
              seconds: float = 0.0) -> list[list[tuple[float, float]]]:
  """(seconds, processor seconds) of each function's calls: `repeats` or more, for `seconds` in all.

  The first call of each is not counted. A function's result is waited for if it is JAX's.
  """
  for function in functions:
    jax.block_until_ready(function())
  times = [[] for _ in functions]
  start = time.perf_counter()
  while len(times[0]) < repeats or time.perf_counter() - start < seconds:
    for function, record in zip(functions, times, strict=True):
      clock, processors = time.perf_counter(), time.process_time()
      jax.block_until_ready(function())
      record.append((time.perf_counter() - clock, time.process_time() - processors))
  return times
