"""The trials of a sweep: which runs there are, where each lies, and the command that makes it."""

import dataclasses
import hashlib
import itertools
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from ml_collections import ConfigDict

from medsynth_jax import builtin, cli
from medsynth_jax import config as configs
from medsynth_jax.checkpoint import read_config
from medsynth_jax.errors import UserError

LAUNCH = Path(os.path.relpath(Path(__file__).parent))


@dataclasses.dataclass(frozen=True, eq=False)
class Trial:
  """One run: `name` of its config, `grid` {field: value as written}, and what follows from them.

  `fields` are the flags `--config.field=value` that make `config` from the config's own.
  """
  name: str
  grid: Mapping[str, str]
  seed: int
  folder: Path
  config: ConfigDict
  fields: tuple[str, ...]

  @property
  def run(self) -> str:
    """Name of the run folder."""
    return self.folder.name

  @property
  def log(self) -> Path:
    """The output of the run; not in its folder, which `main` wants empty."""
    return self.folder.parent / "logs" / f"{self.run}.txt"

  @property
  def simulated(self) -> Path | None:
    """Folder of the built-in data set, one for all trials with the same fields of it.

    None where the config names a data set.
    """
    data = self.config.data
    if data.dir:
      return None
    fields = [configs.names(data.source), configs.names(data.targets), data.fusion,
              data.simulated.to_dict()]
    key = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:8]
    return self.folder.parent / f"simulated_{key}"

  @property
  def finished(self) -> bool:
    """Whether it is trained to its last step and scored."""
    path = self.folder / "evaluation" / "summary.json"
    if not path.exists():
      return False
    then = configs.flat(json.loads(path.read_text())["config"])
    now = configs.flat(self.config.to_dict())
    return all(then.get(f) == v for f, v in now.items() if f.split(".")[-1] == "steps")

  def command(self, backend: str) -> list[str]:
    """What starts the run: `python -m medsynth_jax.main`, or a launcher with the same flags."""
    shared = [f"--config.data.dir={self.simulated / 'data'}"] if self.simulated else []
    flags = [f"--config={self.name}", f"--workdir={self.folder}", *self.fields, *shared]
    if backend == "slurm":
      return ["sbatch", "--parsable", f"--job-name={self.run}", f"--output={self.log}",
              str(LAUNCH / "slurm.sbatch"), *flags]
    if backend == "tpu":
      return [str(LAUNCH / "tpu_pod.sh"), *flags]
    return ["python", "-m", "medsynth_jax.main", *flags]


def plan(names: Sequence[str], grid: Mapping[str, Sequence[str]], seeds: int,
         fields: Sequence[str], out: Path) -> list[Trial]:
  """All trials, in the order of configs, grid, seeds.

  Raises:
    UserError: an unknown config or field, a value outside its range, two trials of one folder, a
      folder that is the run of another config.
  """
  given = [f.removeprefix("--").split("=", 1)[0] for f in fields] + list(grid)
  for field in given:
    if field == "config.seed":
      raise UserError("config.seed is set by --seeds=N: 0, 1, .. N - 1")
    if given.count(field) > 1:
      raise UserError(f"{field} is given twice; give it once, by --grid or as --{field}=value")
  trials: dict[str, Trial] = {}
  for name, values, seed in itertools.product(names, itertools.product(*grid.values()),
                                              range(seeds)):
    point = dict(zip(grid, values, strict=True))
    flags = (*fields, *(f"--{f}={v}" for f, v in point.items()), f"--config.seed={seed}")
    run = "_".join([label(name), *(f"{f.removeprefix('config.')}={_plain(v)}"
                                   for f, v in point.items()), f"seed={seed}"])
    if run in trials:
      raise UserError(f"two trials would have the folder {out / run}: a config or a value is given"
                      " twice")
    trials[run] = Trial(name, point, seed, out / run, _config(name, flags), flags)
    _check_folder(trials[run])
  return list(trials.values())


def label(name: str) -> str:
  """ "pix2pix_paper" for "configs/pix2pix.py:paper"."""
  path, _, variant = name.partition(":")
  return "_".join(filter(None, (Path(path).stem, variant)))


def _plain(value: str) -> str:
  return re.sub(r"[^\w.+-]+", "-", value.strip("[]() "))


def _config(name: str, flags: Sequence[str]) -> ConfigDict:
  try:
    config = cli.read_config(name, flags)
    configs.check_ranges(config)
  except UserError as error:
    raise UserError(f"{name}: {error}") from None
  return config


def _check_folder(trial: Trial) -> None:
  if (trial.folder / "config.json").exists():
    changed = configs.differences(read_config(trial.folder), trial.config)
    if changed:
      raise UserError(f"{trial.folder} is the run of another config ({'; '.join(changed)}); choose"
                      " another --out or delete it")


def read_grid(texts: Sequence[str]) -> dict[str, tuple[str, ...]]:
  """{field: values} of "config.optim.lr=1e-4,2e-4" each."""
  grid: dict[str, tuple[str, ...]] = {}
  for text in texts:
    field, equals, values = text.removeprefix("--").partition("=")
    if not field.startswith("config.") or not equals:
      raise UserError(f"--grid {text}: give a field and its values, as in"
                      " config.optim.lr=1e-4,2e-4")
    if field in grid:
      raise UserError(f"--grid {field} is given twice; give all its values at once")
    grid[field] = split_values(values)
    if not all(grid[field]):
      raise UserError(f"--grid {text}: a value is empty; give values as in"
                      " config.optim.lr=1e-4,2e-4")
  return grid


def split_values(text: str) -> tuple[str, ...]:
  """The values between commas; commas in brackets or quotes are part of a value, quotes are not."""
  values, depth, quote = [""], 0, ""
  for c in text:
    if c in "\"'" and quote in ("", c):
      quote = "" if quote else c
    elif c == "," and not depth and not quote:
      values.append("")
    else:
      depth += (c in "[(") - (c in ")]")
      values[-1] += c
  if depth or quote:
    raise UserError(f"--grid ...={text}: a bracket or a quote is not closed")
  return tuple(value.strip() for value in values)


def make_data(trials: Sequence[Trial]) -> None:
  """Makes the built-in data sets of the trials, each once."""
  for folder, trial in {t.simulated: t for t in trials}.items():
    if folder and not (folder / "data" / "dataset.json").exists():
      print(f"built-in data set in {folder}", flush=True)
      builtin.make(trial.config, folder)
