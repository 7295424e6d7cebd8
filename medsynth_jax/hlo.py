"""What compiled code moves between devices: the collectives in its HLO text, loops counted."""

import math
import re
from collections import Counter
from collections.abc import Mapping

# {name of an instruction: (type of its result, operation, operands and the rest)}
Body = Mapping[str, tuple[str, str, str]]

KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
BYTES = {"pred": 1, "bf16": 2, **{f"{k}{n}": n // 8 for k in "suf" for n in (8, 16, 32, 64)}}
_SHAPE = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
_INSTRUCTION = re.compile(r" *(?:ROOT )?%(\S+) = (.*?) ([a-z][\w-]*)\((.*)")


def read(text: str) -> tuple[dict[str, dict[str, float]], float]:
  """({kind: {count, bytes, sent}} of one run, how much more convolution loops make than one pass).

  Args:
    text: optimised HLO of a compiled program, as `compiled.as_text()`. `bytes` are those of the
      results on a device; a collective that XLA has spread over several fusions counts once.
  """
  bodies = _computations(text)
  times, found, work = _times(bodies), {}, Counter()
  for name, body in bodies.items():
    for own, (result, operation, rest) in body.items():
      if operation == "convolution":
        one = _convolution(result, rest, body)
        work.update(once=one, all=one * times[name])
      match = re.fullmatch(f"({KINDS})(-done)?", operation)
      if match and times[name]:
        begun = body[rest.split(")")[0].lstrip("%")][2] if match[2] else rest
        channel = re.search(r"channel_id=(\d+)", begun)
        key = channel[1] if channel else own
        if key not in found or times[name] < found[key][0]:
          found[key] = times[name], match[1], _bytes(result), begun
  moved: dict[str, dict[str, float]] = {}
  for count, kind, size, begun in found.values():
    sums = moved.setdefault(kind, {"count": 0, "bytes": 0, "sent": 0.0})
    sums["count"] += count
    sums["bytes"] += count * size
    sums["sent"] += count * size * _sent(kind, _group(begun))
  return moved, work["all"] / work["once"] if work["once"] else 1.0


def _computations(text: str) -> dict[str, Body]:
  """{computation: {name: (type of the result, operation, the rest)}}, callees first."""
  found: dict[str, Body] = {}
  for line in text.splitlines():
    header = re.match(r"(?:ENTRY )?%?(\S+) \(.*\{$", line)
    if header:
      body = found[header[1]] = {}
    elif found and (match := _INSTRUCTION.match(line)):
      body[match[1]] = match.groups()[1:]
  return found


def _times(bodies: Mapping[str, Body]) -> Counter:
  """{computation: how often a run of the last one, the program, runs it}."""
  times = Counter({list(bodies)[-1]: 1})
  for name in reversed(bodies):
    for _, operation, rest in bodies[name].values():
      called = dict(re.findall(r"(\w+)=%([\w.-]+)", rest))
      rounds = _rounds(bodies, called["condition"], called["body"]) if operation == "while" else 1
      for listed in re.findall(r"branch_computations=\{([^}]*)\}", rest):
        called |= {branch: branch for branch in re.findall(r"%([\w.-]+)", listed)}
      for callee in {c for c in called.values() if c in bodies}:
        times[callee] += times[name] * rounds
  return times


def _rounds(bodies: Mapping[str, Body], condition: str, body: str) -> int:
  """Rounds of a loop that counts from 0 up to a constant; 1 if it is of another kind."""
  def constant(place, name):
    _, operation, rest = bodies[place].get(name, ("", "", ""))
    return int(rest.split(")")[0]) if operation == "constant" and rest[0].isdigit() else None
  def operands(rest):
    return re.findall(r"%([\w.-]+)", rest.split("), ")[0])
  *_, (_, operation, rest) = bodies[condition].values()
  counter, limit = operands(rest)[:2] if operation == "compare" else ("", "")
  place = re.search(r"index=(\d+)", bodies[condition].get(counter, ("", "", ""))[2])
  end = constant(condition, limit)
  if not end or not place or "direction=LT" not in rest:
    return 1
  *_, (_, _, results) = bodies[body].values()
  step = bodies[body].get(operands(results)[int(place[1])], ("", "", ""))
  steps = [n for n in map(lambda name: constant(body, name), operands(step[2])) if n]
  return -(-end // steps[0]) if step[1] == "add" and steps else end


def _convolution(result: str, rest: str, body: Body) -> int:
  """FLOPs of a convolution, its borders counted in full."""
  kernel = _dimensions(body[re.findall(r"%([\w.-]+)", rest)[1]][0])
  outputs = kernel[re.search(r"dim_labels=\w+_(\w+)->", rest)[1].index("o")]
  return 2 * math.prod(_dimensions(result)) * math.prod(kernel) // max(outputs, 1)


def _dimensions(kind: str) -> list[int]:
  return [int(n) for n in _SHAPE.search(kind)[2].split(",") if n]


def _bytes(kind: str) -> int:
  """Bytes of a result, of all parts if it is a tuple."""
  return sum(BYTES[name] * math.prod(int(n) for n in shape.split(",") if n)
             for name, shape in _SHAPE.findall(kind))


def _sent(kind: str, n: int) -> float:
  """What each of n devices in a ring sends, in sizes of the result."""
  return {"all-reduce": 2 * (n - 1) / n, "reduce-scatter": n - 1.0, "collective-permute": 1.0
          }.get(kind, (n - 1) / n)


def _group(rest: str) -> int:
  """Devices that a collective joins, from `replica_groups` in any of its spellings; 1 if none."""
  if axes := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", rest):
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", axes[1]))
    return math.prod(int(sizes[name]) for name in re.findall(r"'(\w+)'", axes[2]))
  if iota := re.search(r"replica_groups=\[\d+,(\d+)\]", rest):
    return int(iota[1])
  listed = re.search(r"replica_groups=\{\{([\d,]+)\}", rest)
  return len(listed[1].split(",")) if listed else 1
