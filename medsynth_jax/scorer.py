"""Cases of a data set as volumes to be scored, and their scores against each target."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from medsynth_jax import config as configs
from medsynth_jax import floors, scoring, sharding
from medsynth_jax.data import fusion
from medsynth_jax.data.dataset import Case, Store
from medsynth_jax.data.examples import case_source, case_target, case_valid, fused, usable
from medsynth_jax.errors import UserError
from medsynth_jax.run import Run
from medsynth_jax.s3_scorer import S3Scorer


def lumen_of(here: Run) -> tuple[str, float] | None:
  """(region, HU) by which the lumen of a CT is found: the fields `evaluation.lumen` and `lumen_hu`.

  None if the run asks for none.

  Raises:
    UserError: no such region in the data set, or no target is a CT.
  """
  settings, regions = here.config.evaluation, here.info.rois
  region = settings.get("lumen", "")
  if not region:
    return None
  if region not in regions:
    raise UserError(f"evaluation.lumen={region!r}: this data set has"
                    f" {'the regions ' + ', '.join(regions) if regions else 'no region'}; name a"
                    " column mask_<region> of its table, or leave the field empty")
  if not any(here.info.modality(t).type == "ct" for t in here.task.targets):
    raise UserError(f"evaluation.lumen={region!r}: a threshold in HU needs a CT, and this run makes"
                    f" {', '.join(here.task.targets)}; leave the field empty")
  return region, settings.lumen_hu


@dataclasses.dataclass
class Volume:
  """A case ready to be scored against one target; arrays [n, H, W], a fusion's [n, H, W, 3]."""
  case: Case
  target: str
  source: np.ndarray     # [n, H, W, C] model units
  shown: Mapping[str, np.ndarray]    # the sources, physical
  reference: np.ndarray  # the target in the unit of scores
  mask: np.ndarray
  rois: Mapping[str, np.ndarray]
  images: Mapping[str, np.ndarray]   # all of the case, physical
  suv: np.ndarray | None = None      # of a fusion: its measured PET
  fused: "Volume | None" = None      # of a PET: the fusion that it is shown in


class Scorer:
  """Loads volumes and scores images of them, by the target's conventions.

  `rendered` says that a synthetic PET is also scored as a fusion image; `lumen` see `lumen_of`.
  `s3` holds the targets whose S3 metrics another source has fitted already, and takes these too.
  """

  def __init__(self, here: Run, store: Store, targets: Mapping[str, Iterable[Case]],
               lumen: tuple[str, float] | None = None, s3: dict[str, S3Scorer] | None = None):
    self.run, self.store, self.info, self.task = here, store, here.info, here.task
    self.lumen = lumen
    pet = self.task.fusion
    self.rendered = any(usable(c, self.task, fusion.NAME) for c in targets.get(pet, ()))
    names = [n for t in targets for n in ((t, fusion.NAME) if t == pet and self.rendered else (t,))]
    asked = configs.names(here.config.evaluation.ssim)
    self.scales = {n: scoring.scale_of(self.info.modality(n)) for n in names}
    self.protocols = {n: scoring.ssim_protocols(asked, self.info.modality(n)) for n in names}
    wanted = here.config.evaluation.get("s3", False)  # absent in runs older than the field
    mr = [n for n in names if wanted and self.info.modality(n).type == "mr"]
    s3 = {} if s3 is None else s3
    s3.update({n: S3Scorer(store, n, self.scales[n]) for n in mr if n not in s3})
    self.s3 = {n: s3[n] for n in mr}

  def load(self, case: Case, target: str, arrays: Mapping[str, Any] | None = None) -> Volume:
    """A case with the target in the unit of scores; `arrays` are its `Store.volume`, if known."""
    arrays = self.store.volume(case) if arrays is None else arrays
    task, scale, images = self.task, self.scales[target], arrays["images"]
    volume = Volume(
      case, target, case_source(arrays, case, task, self.info),
      {m: images[m] for m in task.sources if m in images}, np.empty(0),
      arrays["mask"] & case_valid(arrays, case, task, target), arrays["rois"], images)
    if scale.colour:
      volume.reference, volume.suv = self.fused(volume, images[task.fusion]), images[task.fusion]
    else:
      volume.reference = scale.reference(images[target], case.images[target].target)
    if target == task.fusion and usable(case, task, fusion.NAME):
      volume.fused = dataclasses.replace(
        volume, target=fusion.NAME, reference=self.fused(volume, images[target]), rois={},
        suv=images[target])
    return volume

  def held_out(self, case: Case, target: str) -> Volume:
    """`load` of a case to be scored; UserError where no voxel of it counts."""
    volume = self.load(case, target)
    if not volume.mask.any():
      raise UserError(f"case {case.name}: no voxel lies in the body mask and in the field of view"
                      f" of {self.task.direction} and {target}; repair its mask, or take the row"
                      " out of the table, and prepare the data set again")
    return volume

  def truth(self, volume: Volume) -> np.ndarray:
    """The target in model units by its own scaling, [n, H, W, C]."""
    return case_target({"images": volume.images}, volume.case, self.task, self.info, volume.target)

  def fused(self, volume: Volume, suv: np.ndarray) -> np.ndarray:
    """The fusion image [n, H, W, 3] of the volume's MR and a PET, as it is scored."""
    return self.scales[fusion.NAME].reference(fused(volume.source, suv), None)

  def score(self, volume: Volume, row: str, image: np.ndarray) -> dict[str, float]:
    """Scores of an image in the unit of scores; UserError names the case and the row."""
    try:
      scores = scoring.score(self.scales[volume.target], volume.reference, image, volume.mask,
                             volume.rois, self.protocols[volume.target], self.lumen)
      if volume.target in self.s3:
        scores |= self.s3[volume.target].score(self.task.direction, volume.case, volume.reference,
                                               image, volume.mask)
      return scores
    except ValueError as error:
      raise UserError(f"case {volume.case.name}, {row}: {error}") from None

  def blanked(self, volume: Volume, image: np.ndarray) -> np.ndarray:
    """The image with background outside the mask, as synthesis writes it."""
    return scoring.blanked(self.scales[volume.target], image, volume.mask)

  def floor(self, target: str) -> tuple[floors.Fit | floors.Mean, list[Case]]:
    """A target's floor, to be fitted, and the training cases for it: those that have both sides.

    Where none has, the constant of those that have the target.
    """
    info, task, training = self.info, self.task, self.info.split("train")
    direction = f"{task.direction}->{target}"
    both = [c for c in training if usable(c, task, target)]
    if not both and target != fusion.NAME:
      return floors.Mean(direction), [c for c in training if target in c.images]
    return floors.Fit(channels=task.channels(info) // (2 * task.context + 1),
                      common_grid=info.anatomical, direction=direction), both

  def add(self, fit: floors.Fit | floors.Mean, case: Case, target: str,
          arrays: Mapping[str, Any]) -> None:
    """Adds a training case, as `Store.volume` gives it, to the floor of a target."""
    if isinstance(fit, floors.Mean):
      image = self.scales[target].reference(arrays["images"][target], case.images[target].target)
      fit.add(image[arrays["mask"] & arrays["valid"][target]].astype(np.float64))
    else:
      volume = self.load(case, target, arrays)
      fit.add(volume.source, volume.reference, volume.mask, self.info.spacing_of(case))


def fit_floors(scorers: Sequence[tuple[Scorer, Iterable[str]]]
               ) -> list[dict[str, floors.Fitted | floors.Constant]]:
  """[{target: floor}] of every scorer and its targets, fitted on the training cases.

  Each case is read once for all directions.

  Raises:
    UserError: no training voxel of a direction.
  """
  fits, wanted = [], {}  # {case: what it is added to}
  for scorer, targets in scorers:
    fits.append({})
    for target in targets:
      fits[-1][target], cases = scorer.floor(target)
      for case in cases:
        wanted.setdefault(case.volume, []).append((scorer, fits[-1][target], target))
  first = scorers[0][0]
  cases = [c for c in first.info.split("train") if c.volume in wanted]
  for case in tqdm(cases, desc="floor", unit="case", disable=not sharding.is_first()):
    arrays = first.store.volume(case)
    for scorer, fit, target in wanted[case.volume]:
      scorer.add(fit, case, target, arrays)
  return [{target: fit.done() for target, fit in own.items()} for own in fits]
