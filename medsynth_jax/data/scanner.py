"""Simulated scanners: noise-free MR, CT and PET images of an anatomy, then their noise.

MR signals follow the spin-echo and inversion-recovery equations with relaxation times near 1.5 T;
CT is a table of HU; PET is uptake in SUV, blurred and counted.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from .anatomy import FIELD, Anatomy, smooth_field, stream

# tissue: T1 ms, T2 ms, proton density, HU, SUV (18F-FDG)
PROPERTIES = {
  "air": (1000, 50, 0.0, -1000, 0.0),
  "skin": (600, 40, 0.45, 45, 0.7),
  "fat": (260, 75, 0.80, -95, 0.3),
  "muscle": (1150, 45, 0.70, 55, 0.9),
  "bone": (300, 5, 0.08, 1250, 0.4),
  "marrow": (270, 65, 0.55, 520, 0.9),
  "mucosa": (1400, 150, 0.90, 30, 1.6),
  "eye": (3800, 900, 0.98, 12, 0.4),
  "csf": (3800, 1800, 1.00, 8, 0.6),
  "gm": (1000, 100, 0.84, 38, 8.0),
  "wm": (580, 78, 0.71, 29, 3.2),
  "blood": (1500, 20, 0.15, 45, 1.9),  # flowing: nearly void in MR without contrast agent
  "blood_contrast": (130, 110, 0.90, 330, 1.9),
  "lesion": (1100, 190, 0.86, 29, 3.2),
  "enhancing": (260, 120, 0.84, 75, 3.2),
  "hot_focus": (1350, 135, 0.88, 34, 18.0),
  "cold_focus": (2000, 330, 0.92, 22, 1.0),
}
MR_NOISE = 0.016  # of the image's 99th percentile
SPREAD = (0.04, 0.04, 0.02)  # relative spread over subjects of T1, T2, proton density

# repetition, echo and inversion time in ms
SEQUENCES = {"t1": (520, 12, 0), "t1c": (520, 12, 0), "t2": (5000, 110, 0), "pd": (2800, 18, 0),
             "flair": (9000, 110, 2500)}
MODALITIES = (*SEQUENCES, "ct", "cta", "pet")
MR = tuple(SEQUENCES)
# abnormality: the modalities that show it; in all others it looks like the tissue it grew in
SHOWS = {
  "lesion": ("t2", "flair"),
  "enhancing": ("t1c", "cta"),
  "hot_focus": ("pet",),
  "hot_focus_sign": (*MR, "pet"),
  "cold_focus": ("pet",),
  "cold_focus_sign": (*MR, "pet"),
}


@dataclass(frozen=True)
class Scanner:
  """What differs between sites: noise and echo time as factors, PET resolution in mm FWHM."""

  noise: float = 1.0
  echo: float = 1.0
  shading: float = 0.10  # spread of the logarithm of the MR bias field
  pet_fwhm: float = 5.5


SCANNERS = (Scanner(), Scanner(1.4, 0.85, 0.15, 9.0), Scanner(0.8, 1.15, 0.07, 4.5))


def mr_signal(modality: str, t1, t2, density, echo: float = 1.0):
  """Spin-echo or inversion-recovery magnitude, times in ms, `echo` a factor of the echo time."""
  repetition, te, inversion = SEQUENCES[modality]
  recovered = 1 - np.exp(-repetition / t1)
  if inversion:
    recovered = np.abs(1 - 2 * np.exp(-inversion / t1) + np.exp(-repetition / t1))
  return density * recovered * np.exp(-te * echo / t2)


def tissue_values(seed: int, modality: str, scanner: Scanner) -> dict[str, tuple[float, float]]:
  """Per tissue: this subject's signal, and its change per unit of relative T1 (MR only, else 0)."""
  rng = stream(seed, "tissue")
  factors = {name: np.exp(rng.normal(0, SPREAD)) for name in PROPERTIES}
  attenuation = {name: rng.normal(0, 0.04) for name in PROPERTIES}
  uptake = {name: np.exp(rng.normal(0, 0.08)) for name in PROPERTIES}
  body, contrast = np.exp(rng.normal(0, 0.2)), np.exp(rng.normal(0, 0.15))
  values = {}
  for name, (t1, t2, density, hu, suv) in PROPERTIES.items():
    if modality in SEQUENCES:
      t1, t2, density = np.array((t1, t2, density)) * factors[name]
      signal = mr_signal(modality, t1, t2, density, scanner.echo)
      # water-rich tissue lengthens both times: T2 follows T1 at half the rate
      slope = (mr_signal(modality, t1 * 1.05, t2 * 1.025, density, scanner.echo) - signal) / 0.05
      values[name] = (float(signal), float(slope))
    elif modality == "pet":
      values[name] = (suv * uptake[name] * body, 0.0)
    else:
      change = contrast if name == "blood_contrast" else 1 + attenuation[name]
      values[name] = (hu if name == "air" else hu * change, 0.0)
  return values


def noise_free(anatomy: Anatomy, modality: str, covers: dict, seed: int,
               scanner: Scanner) -> np.ndarray:
  """What an ideal receiver measures: float32 [x, y, z] in HU, SUV or relative MR signal.

  `covers` are the abnormalities' shares [n] to draw; those that `modality` cannot show are left
  out. MR bias and PET blur are not in it.
  """
  values = tissue_values(seed, modality, scanner)
  contrast = modality in ("t1c", "cta")
  signal = np.zeros(len(anatomy.inside), np.float32)
  for tissue, share in anatomy.tissues.items():
    level, slope = values["blood_contrast" if contrast and tissue == "blood" else tissue]
    if modality == "pet" and tissue in ("gm", "wm"):
      signal += share * (level * (1 + 0.1 * anatomy.region))
    elif slope and tissue in ("gm", "wm"):
      signal += share * (level + slope * anatomy.detail)
    else:
      signal += share * np.float32(level)
  for name, share in covers.items():
    if modality in SHOWS[name]:
      signal += share * (np.float32(values[name.removesuffix("_sign")][0]) - signal)
  image = np.full(anatomy.shape, values["air"][0], np.float32)
  image.reshape(-1)[anatomy.inside] = signal
  return image


def shading(seed: int, modality: str, shape, scanner: Scanner) -> np.ndarray:
  """MR bias field [x, y, z]: most of it the coil's, shared by all sequences of one visit."""
  coil = smooth_field(stream(seed, "coil"), shape, 80.0)
  own = smooth_field(stream(seed, f"shading {modality}"), shape, 80.0)
  return np.exp(scanner.shading * (0.9 * coil + 0.35 * own)).astype(np.float32)


def receive(image: np.ndarray, seed: int, modality: str, scanner: Scanner) -> np.ndarray:
  """The scanner's noise-free image: bias and gain for MR, resolution for PET, as it is for CT."""
  if modality in SEQUENCES:
    gain = 1500 * np.exp(stream(seed, f"gain {modality}").normal(0, 0.3))
    return (image * shading(seed, modality, image.shape, scanner) * gain).astype(np.float32)
  if modality == "pet":
    sigma = scanner.pet_fwhm / 2.355 / (FIELD / image.shape)
    return ndimage.gaussian_filter(image, sigma).astype(np.float32)
  return image


def add_noise(image: np.ndarray, spacing, seed: int, modality: str,
              scanner: Scanner) -> np.ndarray:
  """A measurement of `receive`'s image: Rician noise for MR, Gaussian for CT, counts for PET."""
  rng = stream(seed, f"noise {modality}")
  if modality in SEQUENCES:
    deviation = np.float32(MR_NOISE * scanner.noise * np.percentile(image, 99))
    real = image + deviation * rng.standard_normal(image.shape, np.float32)
    return np.hypot(real, deviation * rng.standard_normal(image.shape, np.float32))
  if modality == "pet":
    counts = 3.0 / scanner.noise**2 * float(np.prod(spacing)) / 8.0  # per SUV and voxel
    seen = rng.poisson(image * counts).astype(np.float32) / counts
    return ndimage.gaussian_filter(seen, 3.0 / 2.355 / np.asarray(spacing))
  noisy = image + np.float32(6 * scanner.noise) * rng.standard_normal(image.shape, np.float32)
  return np.clip(noisy, -1024, 3071)
