"""How fast a stage of a config trains and synthesises on this machine; its weights are random.

FLOPs are those that the compiler counts in the compiled step on one device: the body of a loop
once, and nothing for calls of a vendor's library that XLA does not look into.
"""

import platform
import re
import resource
import statistics
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from medsynth_jax import __version__, sharding, train, windows
from medsynth_jax.contract import State, served
from medsynth_jax.data.dataset import Store
from medsynth_jax.data.examples import case_source, case_target, usable
from medsynth_jax.errors import UserError
from medsynth_jax.run import Run

# what jax calls a device, the chip's dense bfloat16 FLOP/s, and where that stands
PEAKS = (
  (r"\bH200", 989.4e12, "NVIDIA H200 datasheet, half of the figure with sparsity"),
  (r"H100.*PCIe", 756e12, "NVIDIA H100 datasheet (PCIe), half of the figure with sparsity"),
  (r"H100 NVL", 835.5e12, "NVIDIA H100 NVL datasheet, half of the figure with sparsity"),
  (r"H100", 989.4e12, "NVIDIA H100 datasheet (SXM), half of the figure with sparsity"),
  (r"A100", 312e12, "NVIDIA A100 datasheet"),
  (r"\bL4\b", 121e12, "NVIDIA L4 datasheet, half of the figure with sparsity"),
  (r"\bT4\b", 65e12, "NVIDIA T4 datasheet; float16, it has no bfloat16"),
  (r"RTX 4090$", 165.2e12, "NVIDIA Ada whitepaper, sums in float32"),
  (r"TPU v4$", 275e12, "cloud.google.com/tpu/docs/v4"),
  (r"TPU v5 lite|TPU v5e", 197e12, "cloud.google.com/tpu/docs/v5e"),
  (r"TPU v5$|TPU v5p", 459e12, "cloud.google.com/tpu/docs/v5p"),
  (r"TPU v6 lite|TPU v6e", 918e12, "cloud.google.com/tpu/docs/v6e"),
)
APPETITE = 5       # the data pipeline alone has to be so many times as fast as the training step
DATA_SECONDS = 2.0  # for which the data pipeline is measured, once a batch is there
WINDOWS = 5        # in which the timed steps are taken, of which the median counts
VOLUME_SECONDS = 60.0  # a volume that takes longer is worked out from one batch of its slices


def peak(kind: str) -> tuple[float, str] | None:
  """(dense bfloat16 FLOP/s, source) of a chip by jax's name for it; None if it is not known."""
  return next(((flops, source) for name, flops, source in PEAKS if re.search(name, kind)), None)


def machine() -> dict[str, Any]:
  """Device, its peak, and versions."""
  device = jax.devices()[0]
  kind = _processor() if device.platform == "cpu" else device.device_kind
  known = peak(kind) if device.platform != "cpu" else None
  return {
    "device": kind, "platform": device.platform, "devices": jax.device_count(),
    "peak_flops": known and known[0], "peak_source": known and known[1],
    "versions": {"python": platform.python_version(),
                 **{name: metadata.version(name) for name in ("jax", "jaxlib", "flax", "numpy")},
                 "medsynth_jax": __version__}}


def _processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
  text = cpuinfo.read_text() if cpuinfo.exists() else ""
  found = re.search(r"model name\s*:\s*(.+)", text)
  return found[1] if found else platform.processor() or platform.machine()


def stage(run: Run, store: Store, name: str, frozen: dict[str, State], steps: int,
          trace: Path | None = None) -> dict[str, Any]:
  """What is measured of a stage.

  Args:
    frozen: the served states of the stages that it needs.
    steps: training steps that are timed, beside those that warm up.
    trace: a folder for a profiler trace of some more steps.

  Raises:
    UserError: nothing to train on, more memory than is free.
  """
  section, method = run.sections[name], run.methods[name]
  compiled, compiling = train.compile_step(run, name)
  shape, batch_shape = run.shape(name), train.batch_shapes(run, name)
  with run.tracing():
    batches = train.training_batches(run, store, name, list(run.methods).index(name))
    some = [next(batches) for _ in range(2)]
    fed = _pipeline_rate(batches, section.batch_size)
    batches.close()
    state = train.new_state(run, name, frozen, {})
    state, seconds = _steps(compiled, state, some, steps, trace)
  rate = section.batch_size / seconds
  flops = (compiled.cost_analysis() or {}).get("flops")
  known = machine()["peak_flops"]
  working = sharding.working_memory(compiled)
  found = {
    "method": section.method, "batch_size": section.batch_size, "size": list(run.task.size),
    "dtype": run.config.dtype, "parameters": sum(x.size for x in jax.tree.leaves(shape.nets)),
    "compile_seconds": compiling, "step_seconds": seconds, "images_per_second": rate,
    "data_images_per_second": fed, "data_over_step": fed / rate,
    "step_flops": flops, "share_of_peak": flops / seconds / known if flops and known else None,
    "state_bytes": sharding.bytes_of(shape),
    "step_bytes": None if working is None else
                  working + sharding.bytes_of((shape, [batch_shape] * len(some)))}
  if method.synthesize:
    found |= _synthesis(run, store, name, served(state, method.keeps))
  return found | {"peak_bytes": _peak_bytes()}


def _pipeline_rate(batches, size: int) -> float:
  """Images a second of the data pipeline, with nothing else at work."""
  count, then = 0, time.perf_counter()
  while count < 3 or time.perf_counter() - then < DATA_SECONDS:
    jax.block_until_ready(next(batches))
    count += 1
  return size * count / (time.perf_counter() - then)


def _steps(compiled, state: State, batches: Sequence[Any], steps: int, trace: Path | None
           ) -> tuple[State, float]:
  """(the state after the steps, median seconds of one over windows that are waited for whole)."""
  state, _ = _window(compiled, state, batches, 2)
  each = max(1, steps // WINDOWS)
  times = []
  for _ in range(-(-steps // each)):
    state, seconds = _window(compiled, state, batches, each)
    times.append(seconds)
  if trace:
    with jax.profiler.trace(str(trace)):
      state, _ = _window(compiled, state, batches, each)
  return state, statistics.median(times)


def _window(compiled, state: State, batches: Sequence[Any], count: int) -> tuple[State, float]:
  """(the state after so many steps, seconds of one)."""
  then = time.perf_counter()
  for i in range(count):
    state, metrics = compiled(state, batches[i % len(batches)])
  jax.block_until_ready((state, metrics))
  return state, (time.perf_counter() - then) / count


def alternated(both: Sequence[tuple[Run, dict[str, State]]], store: Store, name: str, steps: int
               ) -> list[dict[str, float]]:
  """{seconds an image, working bytes} of a stage's step of two runs, which take turns.

  Args:
    both: each run with the served states of the stages that this one needs.
    steps: training steps that are timed, of each.

  Raises:
    UserError: more memory than is free.
  """
  found, ready = [], []
  for run, frozen in both:
    compiled, _ = train.compile_step(run, name)
    with run.tracing():
      batches = train.training_batches(run, store, name, list(run.methods).index(name))
      some = [next(batches) for _ in range(2)]
      batches.close()
      state = train.new_state(run, name, frozen, {})
    ready.append([compiled, _window(compiled, state, some, 2)[0], some, []])
    found.append({"working_bytes": sharding.working_memory(compiled)})
  for _ in range(WINDOWS):
    for each in ready:
      compiled, state, some, times = each
      each[1], seconds = _window(compiled, state, some, max(1, steps // WINDOWS))
      times.append(seconds)
  for told, (run, _), (*_, times) in zip(found, both, ready, strict=True):
    told["image_seconds"] = statistics.median(times) / run.sections[name].batch_size
  return found


def _synthesis(run: Run, store: Store, name: str, state: State) -> dict[str, Any]:
  """Compile time of a stage's synthesis, seconds a slice (a 3-D patch) and a volume."""
  predict = run.predictor(name, loaded=True)
  view, case, target = _case(run)
  settings, task, arrays = run.config.synthesis, view.task, store.volume(case)
  source = case_source(arrays, case, task, run.info)
  truth = case_target(arrays, case, task, run.info, target) if run.methods[name].sees_target \
    else None

  def made(stop):
    then = time.perf_counter()
    windows.synthesise(
      predict, state, source[:stop], task, source_modality=run.info.index(task.sources[0]),
      target_modality=run.info.index(target), key=run.key(name), batch_size=settings.batch_size,
      overlap=settings.overlap, put=run.put, target=None if truth is None else truth[:stop])
    return time.perf_counter() - then

  few = task.size[0] if len(task.size) == 3 else settings.batch_size
  made(few)
  seconds, count = made(few), windows.count(source[:few].shape, task, settings.overlap)
  whole = windows.count(source.shape, task, settings.overlap)
  batches = [-(-n // settings.batch_size) for n in (count, whole)]
  volume = seconds * batches[1] / batches[0]
  measured = volume <= VOLUME_SECONDS
  if measured:
    volume = made(None)
  each = volume / whole
  return {"synthesis_compile_seconds": run.compile_seconds[name],
          "synthesis_batch_size": settings.batch_size, "synthesis_window_seconds": each,
          "synthesis_volume_seconds": volume, "volume_shape": list(source.shape[:3]),
          "volume_windows": whole, "volume_measured": measured}


def _case(run: Run):
  """(run, case, target) to be synthesised: of the held-out subjects, if there are any."""
  for split in ("test", "validation", "train"):
    for view in run.views():
      for case in run.info.split(split):
        for target in view.task.targets:
          if usable(case, view.task, target):
            return view, case, target
  raise UserError(f"{run.info.name}: no case has {run.task.direction} and a target")


def _peak_bytes() -> int:
  """The most memory in use so far: on the device, or of this process if a device tells not."""
  stats = jax.local_devices()[0].memory_stats() or {}
  if "peak_bytes_in_use" in stats:
    return stats["peak_bytes_in_use"]
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
    1 if sys.platform == "darwin" else 1024)

