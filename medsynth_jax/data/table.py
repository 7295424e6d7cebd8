"""The user's table of cases: one row a patient visit, one column a modality."""

import csv
import dataclasses
import io
import os
import re
from collections.abc import Mapping
from pathlib import Path

from medsynth_jax.data import fusion
from medsynth_jax.data.dataset import CEILING, SPLITS
from medsynth_jax.data.volumes import EXTENSIONS, extension
from medsynth_jax.errors import UserError

# formats that people give and that are not read
FOREIGN = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".dcm", ".npy", ".npz", ".mat", ".hdr", ".img",
           ".mgz", ".h5", ".zip")
RESERVED = ("subject", "session", "split", "fold", "group", "mask")
REGION = "mask_"
# names that a record uses itself, and that of the image which is derived
TAKEN = ("volume", "slice", "valid", "regions", fusion.NAME)
SPLIT_NAMES = {**{s: s for s in SPLITS}, "training": "train", "val": "validation",
               "valid": "validation", "testing": "test"}


@dataclasses.dataclass(frozen=True)
class Row:
  """One patient visit: `line` of the table, files as absolute paths, absent ones left out.

  `split` "" and `fold` -1 where the table does not say.
  """
  line: int
  subject: str
  session: str
  split: str
  fold: int
  group: str
  images: Mapping[str, str]
  mask: str
  rois: Mapping[str, str]
  metadata: Mapping[str, str]

  @property
  def name(self) -> str:
    return f"{self.subject}_{self.session}" if self.session else self.subject


@dataclasses.dataclass(frozen=True)
class Table:
  """The rows, and what the columns are: modalities (with ceilings), regions, metadata."""
  path: str
  rows: tuple[Row, ...]
  modalities: tuple[str, ...]
  rois: tuple[str, ...]
  metadata: tuple[str, ...]


def read_table(path: str | os.PathLike) -> Table:
  """Reads and checks a table; UserError names the row or column that is wrong.

  A column is a modality if its filled cells are image files or folders; relative paths count from
  the table's folder; an empty cell is a missing modality.
  """
  path = Path(path).expanduser()
  header, lines = _cells(path)
  columns = {name: [cells[i] for _, cells in lines] for i, name in enumerate(header)}
  others = [c for c in header if c not in RESERVED and not c.startswith(REGION)]
  modalities = tuple(c for c in others if _is_image_column(path, c, columns[c], lines))
  metadata = tuple(c for c in others if c not in modalities)
  rois = tuple(c for c in header if c.startswith(REGION) and any(columns[c]))
  _check_modalities(path, modalities, rois)
  rows = tuple(_row(path, line, dict(zip(header, cells, strict=True)), modalities, rois, metadata)
               for line, cells in lines)
  _check_rows(path, rows)
  return Table(str(path.resolve()), rows, modalities, tuple(r.removeprefix(REGION) for r in rois),
               metadata)


def _cells(path: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
  """The header, and for each row its line number in the file and its stripped cells."""
  if not path.is_file():
    raise UserError(f"{path}: no such table; give a CSV file with --config.table=cases.csv")
  try:
    text = path.read_text(encoding="utf-8-sig")
  except (UnicodeDecodeError, OSError) as error:
    raise UserError(f"{path}: not readable as UTF-8 text ({type(error).__name__}); save the table"
                    " as CSV, UTF-8") from None
  first = text.split("\n", 1)[0]
  delimiter = max(",;\t", key=first.count)  # spreadsheets of some countries write semicolons
  reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
  lines = [(reader.line_num, [c.strip() for c in cells]) for cells in reader]
  lines = [(n, cells) for n, cells in lines if any(cells)]
  if not lines:
    raise UserError(f"{path}: the table is empty; it needs a header and one row a patient visit")
  header = lines[0][1]
  if "subject" not in header:
    raise UserError(f"{path}: no column 'subject' (columns: {', '.join(header)[:200]});"
                    " add one that says which patient each row is of")
  twice = {c for c in header if header.count(c) > 1}
  if twice or "" in header:
    raise UserError(f"{path}: column {sorted(twice)[0] if twice else header.index('') + 1!r}"
                    f" {'appears twice' if twice else 'has no name'}; rename it")
  if len(lines) == 1:
    raise UserError(f"{path}: the table has a header but no row; add one row a patient visit")
  for n, cells in lines[1:]:
    if len(cells) != len(header):
      raise UserError(f"{path}: row {n} has {len(cells)} cells, the header {len(header)};"
                      " quote cells that hold a comma")
  return header, lines[1:]


def _is_image_column(path: Path, name: str, cells: list[str], lines) -> bool:
  filled = [(n, c) for (n, _), c in zip(lines, cells, strict=True) if c]
  files = [bool(extension(c)) or _resolve(path, c).is_dir() for _, c in filled]
  if not any(files):
    foreign = [(n, c) for n, c in filled if c.lower().endswith(FOREIGN)]
    if foreign and len(foreign) == len(filled):
      raise UserError(f"{path}: row {foreign[0][0]}, column '{name}': '{foreign[0][1]}' is of a"
                      f" format that is not read; convert it to one of {', '.join(EXTENSIONS)}")
    return False
  if not all(files):
    line, cell = filled[files.index(False)]
    raise UserError(f"{path}: row {line}, column '{name}': '{cell}' is neither an image file"
                    f" ({', '.join(EXTENSIONS)}) nor a folder, as the column's other cells are;"
                    " correct the cell or leave it empty")
  return True


def _check_modalities(path: Path, modalities: tuple[str, ...], rois: tuple[str, ...]) -> None:
  images = [m for m in modalities if not m.startswith(CEILING)]
  if not images:
    raise UserError(f"{path}: no column of images; add one a modality, whose cells are files"
                    f" ending in {', '.join(EXTENSIONS)} or folders of a DICOM series")
  for name in (*modalities, *rois):
    if not re.fullmatch(r"[A-Za-z0-9_+-]+", name) or name in TAKEN:
      raise UserError(f"{path}: '{name}' cannot name an image column; use letters, digits, '_',"
                      f" '-' and '+', and none of {', '.join(TAKEN)}")
    if name.startswith(CEILING) and name.removeprefix(CEILING) not in images:
      raise UserError(f"{path}: column '{name}' is the noise-free image of a modality that is no"
                      f" column; add '{name.removeprefix(CEILING)}' or remove it")
  if len(modalities) > 32 or len(rois) > 31:
    raise UserError(f"{path}: {len(modalities)} image and {len(rois)} region columns; at most 32"
                    " and 31 fit, split the table")


def _row(path: Path, line: int, cells: Mapping[str, str], modalities, rois, metadata) -> Row:
  def file(column):
    target = _resolve(path, cells[column])
    if not target.exists():
      raise UserError(f"{path}: row {line}, column '{column}': no such file {target}; correct the"
                      " path (a relative one counts from the table) or leave the cell empty")
    return str(target)
  if not cells["subject"]:
    raise UserError(f"{path}: row {line} has no subject; fill the cell")
  images = {m: file(m) for m in modalities if cells[m]}
  if not any(not m.startswith(CEILING) for m in images):
    raise UserError(f"{path}: row {line} has no image; remove the row or fill a cell")
  return Row(line, cells["subject"], cells.get("session", ""), _split(path, line, cells),
             _fold(path, line, cells), cells.get("group", ""), images,
             file("mask") if cells.get("mask") else "",
             {r.removeprefix(REGION): file(r) for r in rois if cells[r]},
             {m: cells[m] for m in metadata})


def _resolve(table: Path, cell: str) -> Path:
  return Path(os.path.abspath(table.parent / Path(cell).expanduser()))


def _split(path: Path, line: int, cells: Mapping[str, str]) -> str:
  value = cells.get("split", "").lower()
  if value and value not in SPLIT_NAMES:
    raise UserError(f"{path}: row {line}, column 'split': '{value}'; use {', '.join(SPLITS)}")
  return SPLIT_NAMES.get(value, "")


def _fold(path: Path, line: int, cells: Mapping[str, str]) -> int:
  value = cells.get("fold", "")
  if value and not value.isdecimal():
    raise UserError(f"{path}: row {line}, column 'fold': '{value}'; use 0, 1, 2 ... or leave the"
                    " cell empty")
  return int(value) if value else -1


def _check_rows(path: Path, rows: tuple[Row, ...]) -> None:
  lines = {}
  for row in rows:
    if (row.subject, row.session) in lines:
      raise UserError(f"{path}: rows {lines[row.subject, row.session]} and {row.line} are both"
                      f" subject '{row.subject}', session '{row.session}'; give each visit (or"
                      " side) a session of its own")
    lines[row.subject, row.session] = row.line
