"""Makes the semi-synthetic non-contrast partner of a real CT angiogram, and a table for `prepare`.

python launch/semi_synthetic_cta.py --data=../shared/data --out=OUT

One patient (arterial phase, aortic dissection with a stent graft; totalseg_cta, see the README of
the data) with masks of the aorta, its lumens and branches. Contrast agent is taken out of the
masked blood and of what is unmasked: the heart and the great vessels, the vessels of the lungs, and
the tissue they perfuse (myocardium, spleen, kidneys), but no bone. A voxel loses b - 40 HU, where b
is the regional median of the denoised scan within 4.5 mm. Within 1.5 mm of an edge, and where agent
flows in unmixed, b is the voxel's own denoised value: partial volumes, and the superior vena cava
with its 3100 HU, end at 40 HU, too. The noise stays as it was; what exceeds it there is scaled down
to it. Voxels below 100 HU, bone and the struts of the stent (above 1500 HU; their blooming in
proportion) are untouched.

The result is SEMI-SYNTHETIC, and one patient is a test of FEASIBILITY, not of accuracy: the two
rows of cases.csv are blocks of one patient, slices 0..99 for training and 110.. for scores, with a
gap of 10 between them. Its columns: subject, split, ncct, cta, mask_lumen (masked vessels where
they are enhanced), mask_enhanced (what else is from 140 to 700 HU and was changed), mask_bone.
"""

import argparse
import csv
import dataclasses
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from scipy import ndimage

from medsynth_jax.data.volumes import read, write
from medsynth_jax.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
IMAGE, PREFIX = "aorta_ct_cropped.nii.gz", "aorta_"
BLOCKS = {"train": (0, 100), "test": (110, None)}  # axial slices
PLAIN = 40.0             # HU of blood without contrast agent
UNTOUCHED, LOW = 100.0, 140.0  # HU: below the first nothing changes, from the second on is blood
TISSUE = 112.0           # HU of what blood perfuses (myocardium)
CORE = 300.0             # HU: blood of the heart and the great vessels
BONE = 550.0             # HU that a bone's densest hundredth exceeds, and no blood but the dense
DILUTED = 700.0          # HU: what is denser says nothing about how vessels are made
METAL = 1500.0           # HU of a strut
STILL = 25.0             # HU by which blood differs from its region by noise alone
WALL = 8                 # voxels (12 mm) to which it is followed
REACH, REGION = 2, 3     # voxels of 1.5 mm: from a core to its edge; radius of the regional median
LARGE = 1500             # voxels (5 ml): smaller perfused tissue counts only far from bone
AIR = -500.0


@dataclasses.dataclass(frozen=True)
class Parts:
  """What is what in the scan, bool [x, y, z]: masked vessels, other enhanced blood, bone."""
  lumen: np.ndarray
  enhanced: np.ndarray
  bone: np.ndarray

  @property
  def blood(self) -> np.ndarray:
    return self.lumen | self.enhanced


def denoised(ct: np.ndarray) -> np.ndarray:
  """The scan without noise, float32: a bilateral filter, since it leaves as much noise as anywhere
  in the difference at an edge, and none of the edge."""
  import SimpleITK as sitk
  image = sitk.GetImageFromArray(np.clip(ct, -1024, 3100).astype(np.float32))
  return sitk.GetArrayFromImage(sitk.Bilateral(image, domainSigma=1.0, rangeSigma=100.0))


def ball(radius: int) -> np.ndarray:
  steps = np.arange(-radius, radius + 1) ** 2
  return steps[:, None, None] + steps[:, None] + steps <= radius ** 2


# --- blood and bone --------------------------------------------------------------------------


def parts(ct: np.ndarray, smooth: np.ndarray, vessels: np.ndarray) -> Parts:
  """Finds blood and bone, given the masked `vessels`."""
  heart = _largest(ndimage.binary_opening(ndimage.gaussian_filter(ct, 1.0) > CORE, ball(REACH)))
  seed = heart | (vessels & (smooth > LOW))
  bone, found = _sorted(ct, smooth, seed)
  seed |= found
  wall = ndimage.binary_dilation(seed, ball(1), WALL, mask=smooth > TISSUE)
  region = (ndimage.binary_dilation(seed | wall, ball(REACH)) & (ct >= UNTOUCHED)) | wall
  region &= _distance(seed) <= _distance(bone)  # where they touch
  lumen = vessels & (smooth > LOW)
  return Parts(lumen, region & ~lumen, _closed(bone, REACH) & ~region)


def _sorted(ct: np.ndarray, smooth: np.ndarray,
            seed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """(bone, vessels of the lungs and perfused tissue) among the components outside `seed`."""
  labels, count = ndimage.label((smooth > LOW) & ~ndimage.binary_dilation(seed, ball(REACH)))
  index = np.arange(1, count + 1)
  if not count:
    return np.zeros(ct.shape, bool), np.zeros(ct.shape, bool)
  lung = _closed(ct < AIR, 5)
  in_lung = ndimage.mean(lung, labels, index) >= 0.5
  dense = ndimage.labeled_comprehension(smooth, labels, index, lambda v: np.percentile(v, 99),
                                        float, 0)
  bone = np.isin(labels, index[~in_lung & (dense > BONE)])
  lead = np.isin(labels, index[in_lung & (dense > METAL / 2)])  # on the skin
  size = np.bincount(labels.ravel(), minlength=count + 1)[1:]
  near = ndimage.mean(_distance(seed), labels, index) <= 2 * REGION
  far = ndimage.mean(_distance(bone | lung), labels, index) > 2 * REGION  # a rib is at the lung
  tissue = ~in_lung & (dense <= BONE) & (near | far | (size > LARGE))
  vessel = lung & (ct > UNTOUCHED) & (_distance(bone) > REACH) & (_distance(lead) > 2 * REACH)
  return bone, vessel | np.isin(labels, index[tissue])


def _closed(mask: np.ndarray, radius: int) -> np.ndarray:
  """Closed by a ball, up to the faces of the volume."""
  padded = ndimage.binary_closing(np.pad(mask, radius + 1, mode="edge"), ball(radius))
  inside = slice(radius + 1, -radius - 1)
  return padded[inside, inside, inside]


def _largest(mask: np.ndarray) -> np.ndarray:
  labels, count = ndimage.label(mask)
  if not count:
    raise UserError(f"no blood above {CORE:g} HU; is it a CT angiogram in HU?")
  return labels == 1 + np.bincount(labels.ravel())[1:].argmax()


def _distance(mask: np.ndarray) -> np.ndarray:
  """Voxels to the mask; infinite where there is none."""
  return ndimage.distance_transform_edt(~mask) if mask.any() else np.full(mask.shape, np.inf)


# --- the enhancement map ---------------------------------------------------------------------


def non_contrast(ct: np.ndarray, smooth: np.ndarray, found: Parts) -> np.ndarray:
  """The scan without contrast agent, float32 in HU."""
  blood, certain = found.blood, found.blood & (smooth > UNTOUCHED)
  inner = ndimage.binary_erosion(certain, ball(1))
  region = regional_median(smooth, inner)
  smooth = np.where(np.isfinite(region), smooth, np.maximum(smooth, ct))  # thin vessels
  region = np.where(np.isfinite(region), region, smooth)
  noise, own = ct - smooth, smooth - region
  usual = np.median(np.abs(noise[inner])) / 0.6745
  still = STILL * np.minimum(1, (STILL / _local(own, blood)) ** 2)  # less at edges and inflow
  above = np.where(found.enhanced, np.maximum(own - still, 0), 0)  # in a lumen it is a strut
  level = region + np.minimum(own + still, 0) + above
  bright = level + 3 * usual
  strut = np.where(found.enhanced, 0, np.clip((ct - bright) / (METAL - bright), 0, 1))
  share = np.clip((np.where(inner, smooth, ct) - UNTOUCHED) / 10, 0, 1) * (1 - strut)
  kept = np.minimum(1, 1.3 * usual / _local(noise, blood))  # what is more is no noise
  kept = np.where(~found.enhanced & (ct > bright), 1, kept)
  result = smooth + kept * noise - share * np.maximum(level - PLAIN, 0)
  return np.where(blood & (ct >= UNTOUCHED), np.minimum(result, ct), ct).astype(np.float32)


def _local(values: np.ndarray, inside: np.ndarray) -> np.ndarray:
  """Root of the mean square within 5 voxels, of the values inside; above 0."""
  squares = ndimage.uniform_filter(np.where(inside, values ** 2, 0).astype(np.float64), 5)
  share = ndimage.uniform_filter(inside.astype(np.float64), 5)
  return np.sqrt(squares.clip(1e-6) / share.clip(1e-3))


def regional_median(values: np.ndarray, inside: np.ndarray) -> np.ndarray:
  """Median of the values `inside` within REGION voxels of each voxel near it; NaN elsewhere."""
  padded = np.pad(np.where(inside, values, np.inf), REGION, constant_values=np.inf)
  places = np.argwhere(ndimage.binary_dilation(inside, ball(REACH)))
  offsets = np.argwhere(ball(REGION))
  result = np.full(values.shape, np.nan, np.float32)
  for part in np.array_split(places, 1 + len(places) // 20_000):
    index = part[:, None] + offsets
    near = np.sort(padded[tuple(np.moveaxis(index, -1, 0))], axis=1)
    middle = (np.isfinite(near).sum(1) - 1) // 2
    result[tuple(part.T)] = near[np.arange(len(part)), middle]
  return result


# --- does the texture give the lumen away? ---------------------------------------------------


def texture_dice(image: np.ndarray, truth: np.ndarray, body: np.ndarray) -> float:
  """The best Dice by which the local variance of an image finds `truth` among soft tissue.

  Of windows of 3 and 5 voxels and of all thresholds from below or above, the best for this very
  image: no detector without the answer does as well. Flat blood is found with 0.8 to 0.9.
  """
  best = 0.0
  for width in (3, 5):
    mean = ndimage.uniform_filter(image.astype(np.float64), width)
    spread = ndimage.uniform_filter(image.astype(np.float64) ** 2, width) - mean ** 2
    soft = body & (mean > -20) & (mean < 120)
    for threshold in np.quantile(spread[soft], np.linspace(0.02, 1, 20)):
      for found in (spread < threshold, spread >= threshold):
        best = max(best, dice(found & soft, truth),
                   dice(ndimage.binary_dilation(found & soft, ball(1)) & body, truth))
  return best


def dice(a: np.ndarray, b: np.ndarray) -> float:
  return 2 * float((a & b).sum()) / max(1, int(a.sum() + b.sum()))


# --- what was made ---------------------------------------------------------------------------


def statistics(ct: np.ndarray, made: np.ndarray, smooth: np.ndarray, found: Parts) -> str:
  """HU before and after, by tissue, as a Markdown table."""
  great = found.enhanced & (smooth > CORE)
  away = ndimage.distance_transform_edt(ct < METAL * 2 / 3) > REACH if (ct > METAL).any() else True
  regions = {
    "lumen (masked vessels)": found.lumen, "lumen, 3 mm from metal or more": found.lumen & away,
    "heart and great vessels": great, "perfused tissue, edges": found.enhanced & ~great,
    "bone": found.bone, "other, above -200 HU": ~(found.blood | found.bone) & (ct > -200)}
  lines = ["| region | ml | median before | SD | median after | SD | changed |",
           "| --- | --- | --- | --- | --- | --- | --- |"]
  for name, region in regions.items():
    if region.any():
      a, b = ct[region], made[region]
      lines.append(f"| {name} | {region.sum() * 3.375e-3:.0f} | {np.median(a):.0f} | {a.std():.0f}"
                   f" | {np.median(b):.0f} | {b.std():.0f} | {(a != b).mean():.0%} |")
  return "\n".join(lines)


def _detected(ct: np.ndarray, made: np.ndarray, found: Parts) -> list[str]:
  """`texture_dice` of the partner, of flat blood and of no detector at all, as a table."""
  body = ndimage.binary_fill_holes(ct > -300)
  soft = body & (made > -20) & (made < 120)
  flat = np.where(found.blood, np.float32(PLAIN), ct)
  return ["| image | masked vessels | all that was changed |", "| --- | --- | --- |", *(
    f"| {name} | {' | '.join(f'{of(t):.2f}' for t in (found.lumen, found.blood))} |"
    for name, of in {
      "this one": lambda truth: texture_dice(made, truth, body),
      f"all blood set to {PLAIN:g} HU": lambda truth: texture_dice(flat, truth, body),
      "(every soft voxel taken)": lambda truth: dice(soft, truth)}.items())]


def pictures(ct: np.ndarray, made: np.ndarray, path: Path) -> None:
  """Axial slices of the scan above those of its partner, -160..240 HU."""
  from PIL import Image
  numbers = np.linspace(0.03, 0.97, 8) * (ct.shape[2] - 1)
  rows = [np.concatenate([x[:, :, int(k)].T for k in numbers], 1) for x in (ct, made)]
  grey = np.clip((np.concatenate(rows) + 160) / 400, 0, 1)
  Image.fromarray((255 * grey).astype(np.uint8)).resize(
    (2 * grey.shape[1], 2 * grey.shape[0])).save(path)


def save(out: Path, affine: np.ndarray, images: Mapping[str, np.ndarray]) -> Path:
  """Writes the blocks' NIfTI files and cases.csv; returns the table's path."""
  rows = []
  for split, (first, last) in BLOCKS.items():
    moved = affine.copy()
    moved[:3, 3] = (affine @ [0, 0, first, 1])[:3]
    row = {"subject": f"one_patient_{split}_block", "split": split}
    for name, image in images.items():
      row[name] = f"{split}_{name}.nii.gz"
      write(out / row[name], image[:, :, first:last], moved)
    rows.append(row)
  with open(out / "cases.csv", "w", newline="") as file:
    writer = csv.DictWriter(file, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
  return out / "cases.csv"


def make(images: Path, out: Path) -> Path:
  """Makes the partner of the scan in `images`/totalseg_cta, its pictures and its table."""
  folder = images / "totalseg_cta"
  if not (folder / IMAGE).exists():
    raise UserError(f"{folder / IMAGE}: no such file; give the folder of the real images by --data")
  scan = read(folder / IMAGE)
  vessels = np.logical_or.reduce([read(p, mask=True).array for p in sorted(
    folder.glob(f"{PREFIX}*.nii.gz")) if p.name != IMAGE])
  ct, smooth = scan.array, denoised(scan.array)
  found = parts(ct, smooth, vessels)
  made = non_contrast(ct, smooth, found).round()
  out.mkdir(parents=True, exist_ok=True)
  table = save(out, scan.affine, {
    "ncct": made.astype(np.int16), "cta": ct.astype(np.int16), "mask_lumen": found.lumen,
    "mask_enhanced": found.enhanced & (made != ct) & (smooth >= LOW) & (smooth <= DILUTED),
    "mask_bone": found.bone})
  pictures(ct, made, out / "before_after.png")
  text = "\n".join([
    "SEMI-SYNTHETIC non-contrast CT of one patient (a test of feasibility), HU:", "",
    statistics(ct, made, smooth, found), "",
    "Dice by which local variance finds blood, at the best threshold for each image:", "",
    *_detected(ct, made, found)])
  (out / "statistics.md").write_text(text + "\n")
  print(text + f"\n\n{table}")
  return table


def main(argv: Sequence[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--data", type=Path, help="folder of the real images",
                      default=os.environ.get("MEDSYNTH_REAL_DATA") or ROOT.parent / "shared/data")
  parser.add_argument("--out", type=Path, required=True, help="folder of images and cases.csv")
  arguments = parser.parse_args(argv)
  try:
    make(arguments.data, arguments.out)
  except UserError as error:
    sys.exit(f"error: {error}")


if __name__ == "__main__":
  main()
