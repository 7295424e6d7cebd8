"""Pictures of an evaluation: which slices of whom, and which way round."""

import dataclasses

import numpy as np

from medsynth_jax import panels
from medsynth_jax.data.dataset import load_info


def test_panels_show_the_patient_as_radiologists_see_it():
  """RAS+ [x, y]: the patient's right (high x) on the left, anterior (high y) on top."""
  image = np.zeros((3, 4))
  image[2, 3] = 1  # right, anterior
  image[0, 3] = 2  # left, anterior
  shown = panels.radiological(image)
  assert shown.shape == (4, 3) and shown[0, 0] == 1 and shown[0, 2] == 2


def test_panels_of_median_and_worst_subject(toy_data):
  info = load_info(toy_data)
  case, zeros = info.cases[0], np.zeros((10, 20, 24))
  mask = zeros > -1
  mask[:4] = False
  def picture(subject, psnr):
    own = dataclasses.replace(case, subject=subject)
    return panels.take(info, own, {"a": zeros}, zeros, zeros, mask, psnr, 0.5)
  pictures = [picture(*x) for x in (("p", 30), ("q", 20), ("r", 10), ("q", 15))]
  subjects = {"p": {"psnr": 30.0}, "q": {"psnr": 17.5}, "r": {"psnr": 10.0}}
  found = panels.chosen(pictures, subjects, 3)
  assert {k: (p.subject, p.psnr) for k, p in found.items()} == {
    "median": ("q", 15), "worst": ("r", 10), "best": ("p", 30)}
  assert list(panels.chosen(pictures, subjects, 1)) == ["median"]
  assert list(panels.chosen(pictures[:1], {"p": {"psnr": 30.0}}, 2)) == ["median"]
  assert pictures[0].number == 7 and pictures[0].aspect == 1
