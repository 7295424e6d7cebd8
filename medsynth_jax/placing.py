"""Synthetic images as they are written: on a grid, background outside the body, in their type."""

import numpy as np

from medsynth_jax.data import grids, volumes


def masked(image: np.ndarray, inside: np.ndarray, background: float) -> np.ndarray:
  """The background outside the body; `image` may have a channel axis behind."""
  inside = inside.reshape(inside.shape + (1,) * (image.ndim - inside.ndim))
  return np.where(inside, image, np.float32(background))


def as_written(image: np.ndarray, kind: str) -> np.ndarray:
  """CT as whole HU, colours as bytes, all else as it is."""
  if kind == "rgb":
    return np.round(255 * image.clip(0, 1)).astype(np.uint8)
  return np.round(image).astype(np.int16) if kind == "ct" else image


def one_channel(deviation: np.ndarray) -> np.ndarray:
  """Of a colour image the root mean square over its channels, in levels of 0..255."""
  return deviation if deviation.ndim == 3 else 255 * np.sqrt(np.square(deviation).mean(-1))


class Moments:
  """Mean and standard deviation of images one after the other (Welford, Technometrics 1962)."""

  def __init__(self):
    self.count, self.mean, self.squares = 0, np.float32(0), np.float32(0)

  def add(self, image: np.ndarray) -> None:
    self.count += 1
    off = image - self.mean
    self.mean = self.mean + off / self.count
    self.squares = self.squares + off * (image - self.mean)

  def deviation(self) -> np.ndarray:
    """Of the sample: divided by the count less one."""
    return np.sqrt(self.squares / (self.count - 1))


def placed(image: np.ndarray, affine, shape, out_affine, fill: float) -> np.ndarray:
  """An image [x, y, z] or [x, y, z, C] on the output grid, float32."""
  if image.ndim == 4:
    return np.stack([placed(c, affine, shape, out_affine, fill)
                     for c in np.moveaxis(image, -1, 0)], -1)
  return grids.resample(volumes.Volume(image, affine), shape, out_affine, order=1, fill=fill)
