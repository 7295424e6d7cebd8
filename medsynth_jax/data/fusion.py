"""PET shown in colour on MR: the fusion image of S0, made here and nowhere else.

With grey the MR in 0..1, scaled by its own volume, and s = clip(SUV / 10, 0, 1):

  F = (1 - a) grey + a colour(s),   a = 0.6 s,

so that tissue without uptake stays grey and the hottest is covered by 60 %. `colour` runs from
black over dark red, orange and yellow to white, evenly spaced, linear in between, its luminance
rising throughout (an iron scale, as PET workstations have it).

S0 (Spine J 2024, doi 10.1016/j.spinee.2024.04.007) synthesises such overlays of PET on
fat-saturated T2 without giving their formula: this rendering is chosen here. SUV is measured on the
PET volume, never read back from colours.
"""

import numpy as np

NAME = "fusion"  # as a target: `data.targets=fusion`
HOTTEST = 10.0   # SUV that gets the last colour
OPACITY = 0.6    # of that colour
COLOURS = np.array([(0, 0, 0), (0.5, 0, 0), (1, 0.5, 0), (1, 1, 0), (1, 1, 1)], np.float32)


def colour(share):
  """The colours [..., 3] in 0..1 of shares [...] in 0..1; NumPy or JAX arrays."""
  steps = len(COLOURS) - 1
  return COLOURS[0] + sum((share * steps - i).clip(0, 1)[..., None] * (COLOURS[i + 1] - COLOURS[i])
                          for i in range(steps))


def render(grey, suv):
  """The fusion image [..., 3] in 0..1 of an MR and a PET on one grid; NumPy or JAX arrays.

  Args:
    grey: [...] in 0..1, the MR scaled by its own volume.
    suv: [...] standardised uptake values; clipped to 0..10.
  """
  share = (suv / HOTTEST).clip(0, 1)
  opacity = (OPACITY * share)[..., None]
  return (1 - opacity) * grey[..., None] + opacity * colour(share)
