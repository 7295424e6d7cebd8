"""The runs of launch/real_images.py: who trains, who is scored, by which config, task by task."""

import csv
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import alignment
import numpy as np
import semi_synthetic_cta
from real_tables import APART

SLAB, GAP = (74, 88), 3  # axial slices held out in tuning; those left out of the scores at its ends
CONTRASTS = ("t1", "t1post", "t2", "flair")


@dataclasses.dataclass(frozen=True)
class Fold:
  """One run: which rows its table has, and what `prepare` and `main` are told.

  `data` names the data set; folds that share a table share it. `config` is the one of configs/ that
  is trained (with its variant) and `kind` sets its run folder apart. `group` says what sets its
  scores apart from others of the same direction; folds of one name and group are rows of one table,
  where `row` renames the only stage. `taken` is the run whose weights are scored as they are,
  without training.
  """
  source: str
  targets: Sequence[str]
  name: str
  data: str
  rows: Sequence[Mapping[str, str]]
  prepare: Mapping[str, str]
  config: str = "unet"
  kind: str = ""
  group: str = ""
  row: str = ""
  taken: str = ""

  @property
  def directions(self) -> dict[str, str]:
    """{direction: target}."""
    sources = self.targets if self.source == "any" else [self.source]
    return {f"{s}->{t}": t for s in sources for t in self.targets if t != s}

  @property
  def run(self) -> str:
    """Name of the run folder."""
    name = f"{self.source}_to_{'_'.join(self.targets)}_{self.name}"
    return f"{name}_{self.kind}" if self.kind else name


# --- the folds -------------------------------------------------------------------------------


def open_ms(images: Path, out: Path) -> list[Fold]:
  """Two patients, each in turn trained on and scored.

  The box of both brains is cropped out; 151 voxels of patient 26's frontal pole lie outside it.
  """
  del out
  return [Fold("t1", [target], f"train_{train}", f"open_ms_train_{train}",
               _two_patients(images, train, test, ("t1", "t2", "flair")), {"size": "128,168,0"})
          for target in ("t2", "flair") for train, test in (("07", "26"), ("26", "07"))]


def open_ms_any(images: Path, out: Path) -> list[Fold]:
  """The same patients, every contrast from every other by one GAN, on voxels of 2 mm."""
  del out
  return [Fold("any", CONTRASTS, f"train_{train}", f"open_ms_any_train_{train}",
               _two_patients(images, train, test, CONTRASTS),
               {"spacing": "2,2,0", "size": "64,84,0"}, "unified_gan")
          for train, test in (("07", "26"), ("26", "07"))]


def _two_patients(images: Path, train: str, test: str, names: Sequence[str]) -> list[dict]:
  return [{"subject": f"patient{n}", "split": split,
           **{m: str(images / "open_ms" / f"patient{n}_{m.upper()}_MNI.nii.gz") for m in names}}
          for n, split in ((train, "train"), (test, "test"))]


def ibsi(images: Path, out: Path) -> list[Fold]:
  """CT -> MR and PET -> CT of eight patients, four folds each."""
  del out
  return [*_leave_two_out(images, "ct", ["mr_t1"]), *_leave_two_out(images, "pet", ["ct"])]


def ibsi_cldm(images: Path, out: Path) -> list[Fold]:
  """PET -> CT and MR of the same folds, by one model; voxels large enough for 72 x 72 a slice."""
  del out
  return [dataclasses.replace(f, config="cldm", prepare={**f.prepare, "spacing": "2.25,2.25,0"})
          for f in _leave_two_out(images, "pet", ["ct", "mr_t1"])]


def ibsi_reg(images: Path, out: Path) -> list[Fold]:
  """CT -> MR of the same folds by pix2pix and by RegGAN, of the same generator, scored twice.

  The residual offset of each MR from its CT is measured first, and written to a table. The second
  score takes references that were moved rigidly onto the CT; the networks are the same. Voxels of
  2.25 mm, for the time it takes.
  """
  moved = _aligned(images, out)
  folds = []
  for fold in _leave_two_out(images, "ct", ["mr_t1"]):
    for name, config in (("pix2pix", "reg_gan:pix2pix"), ("reg_gan", "reg_gan")):
      first = dataclasses.replace(fold, config=config, kind=name, row=name, group="as they are",
                                  prepare={**fold.prepare, "spacing": "2.25,2.25,0"})
      rows = [row if row["split"] == "train" else {**row, **moved[row["subject"]]}
              for row in fold.rows]
      folds += [first, dataclasses.replace(
        first, rows=rows, data=f"{fold.data}_aligned", kind=f"{name}_aligned",
        group="reference moved rigidly onto the CT", taken=first.run)]
  return sorted(folds, key=lambda f: bool(f.taken))  # the networks first


def _aligned(images: Path, out: Path) -> dict[str, dict[str, str]]:
  """{patient: its files of MR and tumour in the position of the CT}; made once, with a table."""
  to, told = out / "scans" / "aligned", out / "ibsi_reg_offsets.md"
  names = {"mr_t1": "MR_T1_image.nii.gz", "mask_tumour": "MR_T1_mask.nii.gz"}
  folders = sorted(p for p in (images / "ibsi_sts_petctmr").iterdir() if p.is_dir())
  if not told.exists():
    found = {p.name: alignment.align(p / "CT_image.nii.gz", *(p / f for f in names.values()),
                                     to / p.name) for p in folders}
    told.write_text(alignment.table(found) + "\n")
  print(f"Residual offset of the MR from the CT ({told}):\n{told.read_text()}", flush=True)
  return {p.name: {m: str(to / p.name / f) for m, f in names.items()} for p in folders}


def _leave_two_out(images: Path, source: str, targets: Sequence[str]) -> list[Fold]:
  """Four folds; of each two patients are scored, and the apart one never trains.

  The first target gives the grid and the tumour.
  """
  folder = images / "ibsi_sts_petctmr"
  patients = sorted(p.name for p in folder.iterdir() if p.is_dir() and p.name != APART) + [APART]
  columns = {"ct": "CT", "mr_t1": "MR_T1", "pet": "PET"}
  folds = []
  for number in range(len(patients) // 2):
    held_out = patients[2 * number:2 * number + 2]
    rows = [{"subject": p, "split": "test" if p in held_out else "train",
             **{m: str(folder / p / f"{columns[m]}_image.nii.gz") for m in (source, *targets)},
             "mask_tumour": str(folder / p / f"{columns[targets[0]]}_mask.nii.gz")}
            for p in patients if p in held_out or p != APART]
    folds.append(Fold(source, targets, f"fold_{number}",
                      f"ibsi_{source}_{'_'.join(targets)}_{number}", rows,
                      {"reference": targets[0], "anatomical": "yes"}))
  return folds


def tuning(images: Path, out: Path) -> list[Fold]:
  """A third patient, trained on without a slab of its brain and scored in the middle of that slab.

  In the training images the slab is zero, which is no field of view in MR; in the scored ones it is
  the mask. Both keep the whole brain's scaling, as two patients' would nearly be.
  """
  names = ("t1", "t2", "flair")
  files = {m: images / "stroke_cstar" / f"{m.upper()}.nii.gz" for m in names}
  rows = [{"subject": "outside", "split": "train", "mask": "",
           **{m: str(_slab(files[m], out / "scans" / f"{m}_outside.nii.gz", *SLAB, keep=False))
              for m in names}},
          {"subject": "inside", "split": "test",
           "mask": str(_slab(files["t1"], out / "scans" / "slab.nii.gz", SLAB[0] + GAP,
                             SLAB[1] - GAP, keep=True)),
           **{m: str(files[m]) for m in names}}]
  return [Fold("t1", [target], "slab", "tuning", rows, {}) for target in ("t2", "flair")]


def _slab(file: Path, to: Path, first: int, last: int, keep: bool) -> Path:
  """Writes a NIfTI file with the axial slices first..last - 1 only, or without them; once."""
  if not to.exists():
    import nibabel
    to.parent.mkdir(parents=True, exist_ok=True)
    image = nibabel.load(file)
    array = image.get_fdata()
    inside = np.zeros(array.shape, bool)
    inside[:, :, first:last] = True
    nibabel.save(nibabel.Nifti1Image(np.where(inside == keep, array, 0), image.affine), to)
  return to


def cta(images: Path, out: Path) -> list[Fold]:
  """A CT angiogram from its semi-synthetic non-contrast partner: two blocks of one patient."""
  table = out / "scans" / "cta" / "cases.csv"
  if not table.exists():
    semi_synthetic_cta.make(images, table.parent)
  with open(table, newline="") as file:
    rows = [{k: v if k in ("subject", "split") else str(table.parent / v) for k, v in row.items()}
            for row in csv.DictReader(file)]
  return [Fold("ncct", ["cta"], "one_patient", "cta", rows,
               {"reference": "cta", "anatomical": "no"}, "cta_gan",
               group="semi-synthetic, blocks of one patient (feasibility)")]


TASKS = {"open_ms": open_ms, "open_ms_any": open_ms_any, "ibsi": ibsi, "ibsi_cldm": ibsi_cldm,
         "ibsi_reg": ibsi_reg, "cta": cta, "tuning": tuning}
