"""In which unit and range a modality is scored, and the scores of one synthetic volume.

CT   HU, reference and image clipped to -1024..3000, range 4024 (SynthRAD2023's)
PET  SUV as measured, range: the top of the modality's target scaling (25)
MR   normalised: the reference by its own volume's scaling, not clipped, the image as the network
     gives it, range 1; the image is never rescaled to the reference
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from medsynth_jax.data.dataset import Modality
from medsynth_jax.data.intensities import Scaling, from_model, to_model
from medsynth_jax.errors import UserError
from medsynth_jax.metrics import similarity
from medsynth_jax.metrics.lumen import lumen_dice
from medsynth_jax.metrics.uptake import uptake_scores
from medsynth_jax.metrics.volume import COLOUR_PAPERS, PAPERS, paper_scores, volume_scores

CT_RANGE = (-1024.0, 3000.0)


@dataclasses.dataclass(frozen=True)
class Scale:
  """The unit of a target's scores.

  `output` maps the network's [-1, 1] to it; `own` says that a reference comes into it by its own
  volume's scaling; `background` stands outside the mask before SSIM; `uptake` that images hold SUV,
  `colour` that they are [..., 3].
  """
  unit: str
  data_range: float
  background: float
  output: Scaling
  own: bool = False
  clip: tuple[float, float] | None = None
  uptake: bool = False
  colour: bool = False

  def reference(self, physical: np.ndarray, own: Scaling) -> np.ndarray:
    """Physical values of a volume with the target scaling `own`, in the unit of scores."""
    return self._clipped((physical - own.low) / (own.high - own.low) if self.own else physical)

  def prediction(self, model: np.ndarray) -> np.ndarray:
    """A synthetic image in [-1, 1], in the unit of scores."""
    return self._clipped(from_model(self.output, model))

  def model(self, scored: np.ndarray) -> np.ndarray:
    """Values in the unit of scores as model units, clipped to [-1, 1]."""
    return np.asarray(to_model(self.output, scored), np.float32)

  def _clipped(self, x) -> np.ndarray:
    return np.asarray(x if self.clip is None else np.clip(x, *self.clip), np.float32)


def scale_of(modality: Modality) -> Scale:
  """The scale in which a modality is scored as a target."""
  typical = modality.typical
  if modality.type == "ct":
    low, high = CT_RANGE
    return Scale("HU", high - low, low, typical, clip=CT_RANGE)
  if modality.type == "pet":
    return Scale("SUV", typical.high, 0.0, typical, uptake=True)
  if modality.type == "rgb":
    return Scale("1", 1.0, 0.0, typical, clip=(0.0, 1.0), colour=True)
  return Scale("normalised", 1.0, 0.0, Scaling(typical.curve, 0.0, 1.0), own=True)


def ssim_protocols(asked: Sequence[str], modality: Modality) -> tuple[str, ...]:
  """The SSIM settings for a target: those asked, the first decides; CT has SynthRAD2023's too.

  Raises:
    UserError: an unknown name, none, or one that is not defined on the target's range.
  """
  known = [n for n, p in similarity.PROTOCOLS.items() if p.data_range is None]
  wrong = [n for n in asked if n not in known]
  if wrong or not asked:
    raise UserError(f"evaluation.ssim={','.join(asked)!r}: choose of {', '.join(known)}")
  return tuple(dict.fromkeys((*asked, *(("synthrad",) if modality.type == "ct" else ()))))


def ssim_name(protocol: str) -> str:
  """The metric's name under an SSIM setting, as `volume_scores` names it."""
  return "ssim" if protocol == "wang" else f"ssim_{protocol}"


def roi_label(roi: str) -> str:
  """A region's part in a metric's name; a vertebra `s2` must not look like the paper S2."""
  return f"roi_{roi}" if roi in (*PAPERS, "s3", "hot") else roi


def blanked(scale: Scale, image: np.ndarray, mask: np.ndarray) -> np.ndarray:
  """The image with the target's background outside the mask [n, H, W]."""
  return np.where(mask[..., None] if scale.colour else mask, image, np.float32(scale.background))


def score(scale: Scale, reference: np.ndarray, image: np.ndarray, mask: np.ndarray,
          rois: Mapping[str, np.ndarray], protocols: Sequence[str],
          lumen: tuple[str, float] | None = None) -> dict[str, float]:
  """All scores of one volume [n, H, W] (a fusion [n, H, W, 3]), both in the unit of scores.

  mae, mse, nmae, psnr and SSIM in the mask, both images set to background outside it (which SSIM
  alone sees); `mae_<roi>` and `psnr_<roi>` in each region inside the mask, NaN where it is empty;
  for a PET `uptake_scores`; for a CT and a `lumen` (region, HU) `dice_<roi>`, and the reference's
  own, `dice_<roi>_reference`; the papers' conventions (`psnr_s2`) on whole slices in model units,
  the image with background outside the mask, as synthesis writes it.
  """
  scores = volume_scores(*(blanked(scale, x, mask) for x in (reference, image)), mask,
                         data_range=scale.data_range, protocols=protocols,
                         background=scale.background)
  for roi, region in rois.items():
    inside = region & mask
    part = volume_scores(reference, image, inside, data_range=scale.data_range, protocols=()) \
      if inside.any() else {}
    for metric in ("mae", "psnr"):
      scores[f"{metric}_{roi_label(roi)}"] = part.get(metric, float("nan"))
  if lumen and scale.unit == "HU" and lumen[0] in rois:
    name, threshold = f"dice_{roi_label(lumen[0])}", lumen[1]
    scores[name] = lumen_dice(image, rois[lumen[0]], mask, threshold)
    scores[f"{name}_reference"] = lumen_dice(reference, rois[lumen[0]], mask, threshold)
  if scale.uptake:
    scores |= uptake_scores(reference, image, mask, {roi_label(r): x for r, x in rois.items()})
  truth, made = scale.model(reference), scale.model(blanked(scale, image, mask))
  for paper in COLOUR_PAPERS if scale.colour else PAPERS:
    scores |= paper_scores(truth, made, mask, paper=paper)
  return scores
