"""Scores of an MR target by S3's metrics, with a NIQE model fitted on its training images."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from medsynth_jax.data.dataset import Case, Store
from medsynth_jax.metrics import niqe, s3
from medsynth_jax.metrics.summary import per_subject
from medsynth_jax.scoring import Scale

NIQE = ("niqe_live_s3", "niqe_fitted_s3")


class S3Scorer:
  """S3's metrics of one target; `real` {source: {volume: (subject, NIQE of its real image)}}.

  NIQE sees normalised intensities, 0..1 as grey levels 0..255: a scale that needs no reference.
  """

  def __init__(self, store: Store, target: str, scale: Scale):
    self.scale, self.real = scale, {}
    self.volumes = [c for c in store.info.split("train") if target in c.images]
    plane = store.info.plane
    side = min((min(np.delete(c.shape, plane)) for c in self.volumes), default=0)
    self.model, self.absent = None, ""
    try:
      self.model = niqe.fit((self._training(store, case, target) for case in self.volumes),
                            s3.block_size(side), s3.SHARPNESS, scale.data_range)
    except niqe.TooFewBlocks as error:
      self.absent = str(error)

  def _training(self, store: Store, case, target: str) -> np.ndarray:
    arrays = store.volume(case)
    reference = self.scale.reference(arrays["images"][target], case.images[target].target)
    return s3.shown(reference, arrays["mask"] & arrays["valid"][target], self.scale.background)

  def score(self, source: str, case: Case, reference: np.ndarray, image: np.ndarray,
            mask: np.ndarray) -> dict[str, float]:
    """`s3.METRICS` of an image of a case, both in the unit of scores; see `s3.scores`."""
    real = self.real.setdefault(source, {})
    if case.volume not in real:  # once, not for every row
      real[case.volume] = case.subject, self._naturalness(reference, mask)
    return {**s3.scores(reference, image, mask), **self._naturalness(image, mask)}

  def _naturalness(self, image, mask) -> dict[str, float]:
    return s3.naturalness(s3.shown(image, mask, self.scale.background), self.scale.data_range,
                          self.model)

  def described(self, source: str) -> dict[str, Any]:
    """What summary.json says of it."""
    model = self.model
    fitted = {"absent": self.absent} if model is None else {
      "block": model.block, "sharpness": model.sharpness, "volumes": len(self.volumes),
      "slices": model.images, "blocks": model.blocks}
    return {"range": "the reference's maximum - minimum in the mask",
            "outside_mask": "the reference's minimum in the mask; for NIQE the background",
            "slices": f"VIF and NIQE: {s3.ENOUGH} of the pixels in the mask, or more",
            "niqe_scale": f"0..{self.scale.data_range:g} as 0..255", "niqe": "pooled over slices",
            "niqe_live": {"block": niqe.live().block}, "niqe_fitted": fitted,
            "niqe_of_real_images": self.of_real(source)}

  def of_real(self, source: str) -> dict[str, float | None]:
    """{metric: NIQE of the real images, mean over the subjects scored; None where none has it}."""
    subjects = per_subject(self.real.get(source, {}).values()).values()
    values = {m: [x[m] for x in subjects if not np.isnan(x[m])] for m in NIQE}
    return {m: float(np.mean(x)) if x else None for m, x in values.items()}

  def lines(self, source: str, summary: Mapping[str, Mapping[str, Any]], subjects: int
            ) -> list[str]:
    """What the table says below the numbers: NIQE's models, real images, and what is absent."""
    live, model = niqe.live(), self.model
    fitted = f"no fitted model ({self.absent})" if model is None else (
      f"fitted on {len(self.volumes)} training volumes ({model.images} slices, {model.blocks}"
      f" blocks of {model.block}, flat ones left out)")
    lines = [f"NIQE, blocks of a volume pooled, 0..{self.scale.data_range:g} as grey levels 0..255"
             " (lower is better), slices cut to whole blocks from their first row and column:"
             f" LIVE's model of natural images, blocks of {live.block}; {fitted}."]
    real = [f"{m} {x:.2f}" for m, x in self.of_real(source).items() if x is not None]
    lines += [f"The real images score {', '.join(real)}."] if real else []
    for metric, need in s3.NEEDS.items():
      counts = {row[metric]["n"] for row in summary.values()}
      absent = subjects - min(counts)
      if absent:  # the blocks of a flat image, as of `constant`, may show nothing
        lines.append(f"{metric} is absent for {absent} of {subjects} subjects"
                     f"{' in some rows' if len(counts) > 1 else ''}: it needs {need}.")
    return lines
