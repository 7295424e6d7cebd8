"""Where the time of our networks and of PyTorch's goes, by kind of operation, on a CPU.

  python tests/peers/profile_nets.py NAME [--repeats=3] [--tiny]

NAME is a row of `bench_nets.py`. A profiler runs over some calls of each; told are the seconds of a
call by operation, largest first. Ours are named by HLO's opcode and the JAX primitive that it came
from, and added up over all threads, of which several operations may be at work at once; PyTorch's
are named by its own profiler, on the one thread that calls them. So compare shares, not seconds,
and for the ratio of times see `bench_nets.py`.
"""

import argparse
import collections
import re
import tempfile
from pathlib import Path

import bench_nets
import jax
import torch

SHOWN = 12  # rows of each table
# "  %fusion.3 = f32[1,64]{1,0} fusion(...), kind=kLoop, metadata={op_name="jit(f)/add" ...}"
INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (?:\(.*?\)|\S+) ([\w\-]+)\(")


def kinds(text):
  """{instruction: "opcode primitive"} of compiled HLO."""
  found = {}
  for line in text.splitlines():
    if match := INSTRUCTION.match(line):
      name, opcode = match.groups()
      source = re.search(r'op_name="[^"]*?([^/"]+)"', line)
      found[name] = f"{opcode} {source[1]}" if source else opcode
  return found


def ours(call, text, repeats):
  """{kind: seconds of a call} from JAX's profiler."""
  known, seconds = kinds(text), collections.Counter()
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      for _ in range(repeats):
        jax.block_until_ready(call())
    (path,) = Path(folder).rglob("*.xplane.pb")
    for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
      for line in plane.lines:
        for event in line.events:
          operation = dict(event.stats).get("hlo_op")
          if operation:
            seconds[known.get(operation, operation)] += event.duration_ns / 1e9 / repeats
  return seconds


def theirs(call, repeats):
  """{operation: seconds of a call} from PyTorch's profiler."""
  with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
    for _ in range(repeats):
      call()
  return {row.key: row.self_cpu_time_total / 1e6 / repeats for row in profiler.key_averages()}


def table(title, seconds):
  total, shown = sum(seconds.values()), collections.Counter(seconds).most_common(SHOWN)
  print(f"{title}: {total:.3f} s in operations")
  for kind, time in [*shown, ("all others", total - sum(time for _, time in shown))]:
    print(f"  {kind:60}{time:9.3f}{time / total:7.1%}")


def main(arguments=None):
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("name", choices=bench_nets.PAIRS)
  parser.add_argument("--repeats", type=int, default=3)
  parser.add_argument("--tiny", action="store_true", help="a small network, to see that it runs")
  options = parser.parse_args(arguments)
  if bench_nets.GPU:
    parser.error("on a GPU take a trace: python -m medsynth_jax.bench --trace=FOLDER")
  pair = bench_nets.PAIRS[options.name](options.tiny)
  for call in (pair.ours, pair.theirs):
    jax.block_until_ready(call())
  table("ours", ours(pair.ours, pair.compiled.as_text(), options.repeats))
  table("torch", theirs(pair.theirs, options.repeats))


if __name__ == "__main__":
  main()
