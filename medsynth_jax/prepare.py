"""Scans on disk -> a data set: `python -m medsynth_jax.prepare --config=configs/prepare.py`.

Each case is read, put on its model grid and stored as one file by a worker process, one case at a
time; the records are then written from those files, and the folder takes its name when all of it
is there. The fields are described in `default_config`.
"""

import dataclasses
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent import futures
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from medsynth_jax import __version__
from medsynth_jax.data import case_files, dataset, qc, splits
from medsynth_jax.data.case import numbers
from medsynth_jax.data.dataset import CEILING, Info
from medsynth_jax.data.describe import PLANES, describe, recorded, reference_name
from medsynth_jax.data.intensities import Rules, rules_for
from medsynth_jax.data.table import Row, Table, read_table
from medsynth_jax.errors import UserError

# what a folder in the making holds
OWN = ("cases", "records", "qc.png", "cases.csv", "dataset.json")


def default_config(modalities: Sequence[str] = ()) -> ConfigDict:
  """The fields of `prepare`; `modalities` get a section each, in which rules may be set."""
  return ConfigDict({
    "table": "",            # CSV, one row a patient visit (README: the table)
    "out": "",              # folder of the data set; must not hold anything else
    "name": "",             # name of the data set; empty: that of the folder
    "simulated": False,     # said wherever the data set shows
    "reference": "",        # modality that gives the grid; empty: the last column that is no PET
    "plane": "auto",        # slices: axial, coronal, sagittal; auto: best in-plane resolution
    "spacing": "",          # "1,1,3" mm along x (left-right), y, z of the model grid; 0 or empty
                            # keeps the reference's
    "size": "",             # "192,192,0" voxels to crop or pad to, about the centre; 0 keeps
    "split": "8:1:1",       # train : validation : test, in subjects
    "folds": 0,             # divide the training subjects for out-of-fold training; 0: no folds
    "stratify": "",         # "group", "modalities" or "group,modalities": alike in all splits
    "seed": 0,              # of the splits
    "min_foreground": 0.05,  # share of a source slice that must show the patient to train on it
    "anatomical": "auto",   # is one voxel the same place in all cases? auto, yes, no
    "workers": 0,           # parallel processes, one case in memory each; 0: one a CPU core
    # A modality's type (ct, pet, mr) and rules, where the defaults by its name do not fit. Rules:
    # "window <low> <high>", "sqrt <low> <high>", "percentile <low> <high>", "zscore <width>";
    # of the source several, one a channel: "window -1024 3071; window -160 240".
    "modalities": {m: {"type": "", "source": "", "target": ""} for m in modalities},
  })


def prepare(config: ConfigDict) -> Path:
  """Makes the data set that a config describes and returns its folder.

  The same call again does nothing; an interrupted one continues. Raises UserError for a user's
  mistake, an existing folder with other content, or a full disk, leaving no half data set.
  """
  if not config.table or not config.out:
    raise UserError(f"config.{'out' if config.table else 'table'} is empty; call with"
                    " --config.table=cases.csv --config.out=DATA")
  table = read_table(config.table)
  rules = _rules(config, table)
  plan = splits.assign(table, _ratios(config.split), config.folds, _words(config.stratify),
                       config.seed)
  out = Path(os.path.abspath(Path(config.out).expanduser()))
  key = _key(config, table, rules)
  if _finished(out, key):
    print(f"{out}: already prepared from these files with this config, nothing to do")
    return out
  partial = out.with_name(out.name + ".partial")
  try:
    done = _run(_jobs(config, table, rules, partial / "cases"), _workers(config, table))
    info = describe(config, table, rules, plan, [case_files.load_meta(d) for d in done], key)
    _store(info, table, done, partial)
    os.replace(partial, out)
  except (OSError, RuntimeError) as error:  # array_record reports a full disk as RuntimeError
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
    if full or "no space left" in str(error).lower():
      raise UserError(f"{partial}: the disk is full; free space and run the same command again,"
                      " it continues") from None
    if isinstance(error, (PermissionError, NotADirectoryError, FileExistsError)):
      raise UserError(f"{partial}: cannot be written ({error.strerror}); choose another"
                      " --config.out") from None
    raise
  print(summary(dataset.load_info(out), out))
  return out


# --- the config ------------------------------------------------------------------------------


def _rules(config: ConfigDict, table: Table) -> dict[str, Rules]:
  """Rules of every image column; a ceiling's are those of its modality."""
  for name in config.modalities:
    if name not in table.modalities:
      raise UserError(f"config.modalities.{name}: no such image column in {table.path}; it has"
                      f" {', '.join(table.modalities)}")
  images = [m for m in table.modalities if not m.startswith(CEILING)]
  rules = {m: _section(config, m) for m in images}
  if config.reference and config.reference not in images:
    raise UserError(f"config.reference: unknown modality '{config.reference}'; the table has"
                    f" {', '.join(images)}")
  if config.plane not in ("auto", *PLANES):
    raise UserError(f"config.plane: '{config.plane}'; use auto, {', '.join(PLANES)}")
  if config.anatomical not in ("auto", "yes", "no"):
    raise UserError(f"config.anatomical: '{config.anatomical}'; use auto, yes or no")
  if not 0 <= config.min_foreground < 1:
    raise UserError(f"config.min_foreground: {config.min_foreground}; give a share of 0 to 1")
  return {m: rules[m.removeprefix(CEILING)] for m in table.modalities}


def _section(config: ConfigDict, name: str) -> Rules:
  section = dict(config.modalities.get(name, {}))
  return rules_for(name, section.pop("type", ""), **section)


def _ratios(text) -> tuple[float, ...]:
  try:
    return tuple(float(p) for p in (text.split(":") if isinstance(text, str) else text))
  except ValueError:
    raise UserError(f"config.split: '{text}'; give train:validation:test as 8:1:1") from None


def _words(text) -> tuple[str, ...]:
  parts = text.split(",") if isinstance(text, str) else text
  return tuple(p.strip() for p in parts if p.strip())


def _workers(config: ConfigDict, table: Table) -> int:
  if config.workers < 0:
    raise UserError(f"config.workers: {config.workers}; give 0 or more")
  cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
  return min(config.workers or cores or 1, len(table.rows))


# --- what was done already -------------------------------------------------------------------


def _stamp(path: str, base: str) -> list:
  """Path from `base`, size and time of change of a file, or of all files of a folder."""
  if os.path.isdir(path):
    return [_stamp(os.path.join(path, f), base) for f in sorted(os.listdir(path))
            if not os.path.isdir(os.path.join(path, f))]
  status = os.stat(path)
  files = [os.path.relpath(path, base), status.st_size, status.st_mtime_ns]
  if path.lower().endswith(".mhd"):  # its voxels lie in a second file of the same stem
    stem = path[:-4]
    files += [_stamp(stem + e, base) for e in (".raw", ".zraw") if os.path.isfile(stem + e)]
  return files


def _hash(value) -> str:
  text = json.dumps(value, sort_keys=True, default=dataclasses.asdict)
  return hashlib.sha256(text.encode()).hexdigest()


def _row_stamp(row: Row, base: str) -> list:
  files = {**row.images, **{f"mask_{r}": f for r, f in row.rois.items()}}
  if row.mask:
    files["mask"] = row.mask
  rest = dataclasses.replace(row, images={}, rois={}, mask="")
  return [dataclasses.asdict(rest), {c: _stamp(f, base) for c, f in files.items()}]


def _folder(table: Table) -> str:
  return os.path.dirname(table.path)


def _key(config: ConfigDict, table: Table, rules: Mapping[str, Rules]) -> str:
  """What a data set is recognised by; the same however the table's path is spelled."""
  fields = {k: v for k, v in recorded(config).items() if k != "table"}
  base = _folder(table)
  return _hash([dataset.FORMAT, case_files.FORMAT, fields, rules, list(rules),
                [_row_stamp(r, base) for r in table.rows]])


def _finished(out: Path, key: str) -> bool:
  if not out.exists():
    return False
  if not out.is_dir():
    raise UserError(f"{out}: is a file; choose another --config.out")
  if not any(out.iterdir()):
    out.rmdir()
    return False
  if not (out / "dataset.json").is_file():
    raise UserError(f"{out}: exists and is no data set; choose another --config.out")
  if dataset.load_info(out).notes.get("inputs") != key:
    raise UserError(f"{out}: holds a data set of other files or another config; choose another"
                    " --config.out or delete that folder")
  return True


# --- cases in parallel -----------------------------------------------------------------------


def _jobs(config: ConfigDict, table: Table, rules: Mapping[str, Rules],
          folder: Path) -> list[case_files.Job]:
  folder.mkdir(parents=True, exist_ok=True)
  reference = reference_name(config, table, rules)
  spacing = numbers(config.spacing, "spacing")
  size = numbers(config.size, "size", int)
  base, jobs = _folder(table), []
  for row in table.rows:
    key = _hash([case_files.FORMAT, __version__, _row_stamp(row, base), rules, list(rules),
                 table.rois, reference, spacing, size])
    jobs.append(case_files.Job(table.path, row, dict(rules), table.rois, reference, spacing, size,
                               str(folder / f"{key[:32]}.npz")))
  return jobs


def _run(jobs: list[case_files.Job], workers: int) -> list[str]:
  """Runs the jobs that no earlier run has finished; the files of all cases, in order."""
  open_jobs = [j for j in jobs if not os.path.exists(j.path)]
  bar = tqdm(total=len(jobs), initial=len(jobs) - len(open_jobs), desc="cases", unit="case",
             disable=not open_jobs)
  with bar:
    for _ in _results(open_jobs, min(workers, len(open_jobs))):
      bar.update()
  return [j.path for j in jobs]


def _results(jobs: list[case_files.Job], workers: int) -> Iterator[None]:
  if workers <= 1:
    yield from map(case_files.make, jobs)
    return
  # spawn: the caller may hold JAX's threads, which a forked process would inherit half dead
  pool = futures.ProcessPoolExecutor(workers, mp_context=get_context("spawn"))
  try:
    for finished in futures.as_completed([pool.submit(case_files.make, j) for j in jobs]):
      yield finished.result()
  except BrokenProcessPool:
    raise UserError(f"a worker process died, perhaps out of memory with {workers} at once;"
                    " run again with a smaller --config.workers") from None
  finally:
    pool.shutdown(cancel_futures=True)


# --- the folder ------------------------------------------------------------------------------


def _store(info: Info, table: Table, done: list[str], partial: Path) -> None:
  """Writes records, description, table and sheet into the partial folder, and only those."""
  foreign = [p.name for p in partial.iterdir() if p.name.removesuffix(".partial") not in OWN]
  if foreign:
    raise UserError(f"{partial}: holds files that are not of this program ({foreign[0]}); move"
                    " them away or choose another --config.out")
  for old in partial.iterdir():
    if old.name != "cases":
      shutil.rmtree(old) if old.is_dir() else old.unlink()
  dataset.write_records(partial, info,
                        lambda volume: case_files.load_slices(done[volume], info.plane))
  title = info.name + (" (simulated data)" if info.simulated else "")
  qc.sheet([case_files.load_strip(path) for path in done], partial / "qc.png", title)
  shutil.copyfile(table.path, partial / "cases.csv")
  dataset.save_info(info, partial / "dataset.json")
  shutil.rmtree(partial / "cases")


def summary(info: Info, out: Path) -> str:
  """What was prepared, for the terminal."""
  lines = [f"{out}: {len(info.cases)} cases of {len({c.subject for c in info.cases})} subjects"
           + (", simulated" if info.simulated else "")
           + f"; {PLANES[info.plane]} slices on the grid of {info.reference},"
           + f" {' x '.join(f'{s:.3g}' for s in info.spacing)} mm"]
  counts = info.notes["counts"]
  lines.append("  subjects: " + ", ".join(f"{counts[s]['subjects']} {s}" for s in counts))
  for name in info.names:
    modality, images = info.modalities[name], [c.images[name] for c in info.cases
                                               if name in c.images]
    share = {k: np.mean([i.clipped[k] for i in images if k in i.clipped])
             for k in dict.fromkeys(k for i in images for k in i.clipped)}
    lines.append(
      f"  {name}: {modality.type}, {modality.unit}, {len(images)} images, as target"
      f" {modality.typical.low:.4g}..{modality.typical.high:.4g}; clipped "
      + ", ".join(f"{'in the body' if k == 'all' else k} {v:.2%}" for k, v in share.items()))
  lines += [f"  warning: {w}" for w in info.notes["warnings"]]
  lines.append(f"  look at {out / 'qc.png'}: contours must lie on the same anatomy everywhere")
  return "\n".join(lines)


def main(argv: list[str]) -> None:
  """The command."""
  del argv
  prepare(_CONFIG.value)


if __name__ == "__main__":
  from medsynth_jax import cli
  _CONFIG = cli.define_config()
  cli.run(main)
