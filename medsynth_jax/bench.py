"""How fast a config trains and synthesises on this machine, stage by stage.

python -m medsynth_jax.bench --config=configs/pix2pix.py --steps=20 --out=FILE.json

Takes `config.data.dir`, or makes the built-in data in --workdir (which may be a run that holds them
already), else in a temporary folder. No run and no checkpoint is left behind. Weights are random,
those of earlier stages too: only speed is measured. The persistent compile cache is off, so that
compile times are whole. --stage=NAME takes that stage alone. --trace writes a profiler trace of
some steps of each stage, to be opened with TensorBoard or Perfetto.

python -m medsynth_jax.bench --config=configs/cldm.py --change=config.dtype=bfloat16

also tells what a change of fields (--change again for more) makes of the training steps' time and
memory; the two take turns, since other work on the machine then disturbs them alike.

python -m medsynth_jax.bench --config=configs/unet.py --topology=v5e:4x4 --config.batch_size=16

runs nothing, but compiles all of it for a TPU pod and tells what `pods` says; `batch_size` is that
of all devices together.
"""

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags
from ml_collections import ConfigDict

from medsynth_jax import builtin, checkpoint, cli, measuring, pods, sharding, train
from medsynth_jax import config as configs
from medsynth_jax import run as runs
from medsynth_jax.contract import State, served
from medsynth_jax.data.dataset import Store
from medsynth_jax.errors import UserError
from medsynth_jax.memory import size

# (row of the table, how its number is told)
ROWS = (
  ("batch_size", "batch size", str),
  ("parameters", "parameters", "{:,}".format),
  ("compile_seconds", "compile the step, s", "{:.1f}".format),
  ("step_seconds", "training step, ms", lambda s: f"{1e3 * s:.1f}"),
  ("images_per_second", "images/s", "{:.1f}".format),
  ("data_images_per_second", "images/s of the data pipeline", "{:.0f}".format),
  ("step_flops", "GFLOP a step", lambda n: f"{n / 1e9:.2f}"),
  ("share_of_peak", "of the bfloat16 peak", "{:.1%}".format),
  ("state_bytes", "state", size),
  ("step_bytes", "state, batches and step", size),
  ("peak_bytes", "peak so far", size),
  ("synthesis_compile_seconds", "compile synthesis, s", "{:.1f}".format),
  ("synthesis_window_seconds", "synthesis, ms a slice", lambda s: f"{1e3 * s:.1f}"),
  ("synthesis_volume_seconds", "synthesis, s a volume", "{:.2f}".format),
)


# of what --change does not measure
UNSEEN = ("config.data.dir", "config.data.simulated.", "config.synthesis.", "config.evaluation.")


def measure(config: ConfigDict, data: Path, steps: int, trace: Path | None = None,
            changes: Sequence[str] = (), only: Sequence[str] = ()) -> dict[str, Any]:
  """{machine, stages: {name: what `measuring.stage` tells}, notes} of a config on a data set.

  Of all stages or of those in `only`; a stage without one fold is as its coarse stage. With
  `changes` ("config.field=value") a stage also has "change": what `measuring.alternated` tells.
  """
  store = Store(data)
  run = runs.build(config, store.info, data / "no run")
  other = runs.build(_changed(config, changes), store.info, run.folder) if changes else None
  found = {"machine": measuring.machine(), "stages": {}}
  for name in runs.chosen(config, only):
    frozen = _untrained(run, name)
    told = measuring.stage(run, store, name, frozen, steps, trace and trace / name)
    found["stages"][name] = {"needs": list(run.needs(name)), "method": run.sections[name].method,
                             **told}
    if other:
      both = [(run, frozen), (other, _untrained(other, name))]
      found["stages"][name]["change"] = measuring.alternated(both, store, name, steps)
  return found | {"changes": list(changes), "notes": notes(found)}


def _changed(config: ConfigDict, changes: Sequence[str]) -> ConfigDict:
  """The config with its changes; a UserError where its stages or its data are others."""
  for change in changes:
    if change.removeprefix("--").startswith(UNSEEN):
      raise UserError(f"--change={change}: only the training steps are compared, on the data of the"
                      " config as it is; measure the other config by a call of its own")
  other = cli.changed(config, changes)
  runs.check_fields(other, sharding.make_mesh(other.mesh.fsdp))
  before, after = (list(configs.stages(each)) for each in (config, other))
  if before != after:
    raise UserError(f"--change: the stages {', '.join(before)} would become {', '.join(after)};"
                    " compare configs of the same stages")
  return other


def _untrained(run: runs.Run, name: str) -> dict[str, State]:
  """Served states of random weights of the stages that one needs."""
  made: dict[str, State] = {}
  for need in run.needs(name):
    frozen = {earlier: made[earlier] for earlier in run.needs(need)}
    with run.tracing():
      state = train.new_state(run, need, frozen, {})
    made[need] = served(state, run.methods[need].keeps).replace(frozen={})
  return made


def notes(found: dict[str, Any]) -> list[str]:
  """What a reader of the numbers has to know, a line each."""
  machine, stages = found["machine"], found["stages"]
  lines = []
  for name, told in stages.items():
    if told["data_over_step"] < measuring.APPETITE:
      lines.append(f"{name}: the data pipeline alone makes {told['data_over_step']:.1f} times the"
                   f" images that the step takes, less than {measuring.APPETITE}: it may hold"
                   " training up; set config.data.threads higher or turn augmentation off")
    if told.get("volume_measured") is False:
      lines.append(f"{name}: a volume is worked out from one batch of its slices")
  if not machine["peak_flops"]:
    lines.append(f"the peak of {machine['device']} is not known, so that no share of it is told")
  later = [name for name, told in stages.items() if told["needs"]]
  if later:
    lines.append(f"{', '.join(later)}: earlier stages have random weights; only speed is measured")
  return lines


def table(found: dict[str, Any]) -> str:
  """The measurements as text: a row a quantity, a column a stage."""
  machine, stages = found["machine"], found["stages"]
  first, versions = next(iter(stages.values())), machine["versions"]
  sizes = "x".join(map(str, first["size"]))
  unit = "ms a patch" if len(first["size"]) == 3 else "ms a slice"
  lines = [f"{machine['devices']} x {machine['device']} ({machine['platform']}), jax"
           f" {versions['jax']}, {sizes}, {first['dtype']}",
           " " * 30 + "".join(f"{name:>16}" for name in stages)]
  for field, title, say in ROWS:
    cells = ["-" if told.get(field) is None else say(told[field]) for told in stages.values()]
    lines.append(f"{title.replace('ms a slice', unit):30}" + "".join(f"{c:>16}" for c in cells))
  return "\n".join([*lines, *_change_table(found), *(f"note: {line}" for line in found["notes"])])


def _change_table(found: dict[str, Any]) -> list[str]:
  """What the changes make of time and memory, as ratios."""
  if not found["changes"]:
    return []
  lines = [f"with {', '.join(found['changes'])}, beside the config as it is:"]
  for title, field in (("time an image", "image_seconds"), ("working memory", "working_bytes")):
    cells = []
    for told in found["stages"].values():
      before, after = (each[field] for each in told["change"])
      cells.append(f"{after / before:.2f}" if before and after is not None else "-")
    lines.append(f"{title:30}" + "".join(f"{c:>16}" for c in cells))
  return lines


def report(config: ConfigDict, steps: int, workdir: Path | None = None, out: Path | None = None,
           trace: Path | None = None, changes: Sequence[str] = (), only: Sequence[str] = ()) -> str:
  """Measures a config, writes `out` (JSON), and returns the table.

  Args:
    workdir: a folder for the built-in data, if `config.data.dir` is empty; None: a temporary one.

  Raises:
    UserError: what the command was given is wrong, or does not fit the memory.
  """
  if steps < 1:
    raise UserError(f"--steps={steps}: give 1 or more")
  _check_out(out)
  with tempfile.TemporaryDirectory(prefix="medsynth_bench_") as folder:
    runs.check(config, Path(folder) / "run")
    runs.chosen(config, only)  # what is wrong is told before data are made
    _changed(config, changes)
    data = Path(config.data.dir or builtin.make(config, workdir or Path(folder)))
    found = measure(config, data, steps, trace, changes, only)
  if out:
    checkpoint.write_text(out, json.dumps({"command": sys.argv[1:], **found}, indent=1) + "\n")
  return table(found)


def report_pod(config: ConfigDict, topology: str, out: Path | None = None,
               only: Sequence[str] = ()) -> None:
  """Prints what `pods.describe` tells of a topology, as it comes, and writes it to `out` (JSON)."""
  _check_out(out)
  found = pods.describe(config, topology, lambda line: print(line, flush=True), only)
  print(pods.note(found))
  if out:
    checkpoint.write_text(out, json.dumps({"command": sys.argv[1:], **found}, indent=1) + "\n")


def _check_out(out: Path | None) -> None:
  if out and (out.is_dir() or not out.parent.is_dir()):
    raise UserError(f"--out={out}: give a file in a folder that exists")


def main(argv: list[str]) -> None:
  del argv
  config = CONFIG.value
  if config is None or "data" not in config:
    raise UserError("give --config=configs/NAME.py, a config that trains")
  jax.config.update("jax_enable_compilation_cache", False)
  if TOPOLOGY.value:
    if TRACE.value or WORKDIR.value or CHANGE.value:
      raise UserError("--topology runs nothing and needs no data: leave --trace, --change and"
                      " --workdir out")
    report_pod(config, TOPOLOGY.value, OUT.value and Path(OUT.value), STAGE.value)
    return
  paths = (flag.value and Path(flag.value) for flag in (WORKDIR, OUT, TRACE))
  print(report(config, STEPS.value, *paths, CHANGE.value, STAGE.value))


if __name__ == "__main__":
  CONFIG = cli.define_config()
  WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder for the built-in data, kept; default: a temporary one.")
  STEPS = flags.DEFINE_integer("steps", 20, "Training steps that are timed, of each stage.")
  STAGE = flags.DEFINE_multi_string(
    "stage", [], "A stage of the config; again for more. Default: all.")
  OUT = flags.DEFINE_string("out", None, "JSON file to write.")
  TRACE = flags.DEFINE_string("trace", None, "Folder for a profiler trace of each stage.")
  CHANGE = flags.DEFINE_multi_string(
    "change", [], "A field to change, as config.dtype=bfloat16, and to compare with.")
  TOPOLOGY = flags.DEFINE_string(
    "topology", None, "A TPU pod to compile for instead, as v5e:16x16.")
  cli.run(main)
