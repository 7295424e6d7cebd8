"""The sheet to look at before training: every case's middle slices with contours across."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from medsynth_jax.data.intensities import Scaling, otsu, to_model

TILE = 168      # pixels of a slice's frame
TITLE = 20  # pixels above the cases
TEXT = 16       # pixels of the line above a case
GREEN, RED = (80, 255, 80), (255, 70, 70)


def display(volume: np.ndarray, plane: int, number: int, spacing) -> tuple[np.ndarray, float]:
  """A slice of a RAS+ volume as it is looked at, and the height/width of its pixels.

  Radiological: the patient's right on the image's left, front or head on top; a sagittal slice
  looks to the left.
  """
  image = np.take(volume, number, plane).T[::-1, ::-1]
  across, down = (s for axis, s in enumerate(spacing) if axis != plane)
  return image, down / across


def strip(name: str, images: Mapping[str, np.ndarray], scalings: Mapping[str, Scaling],
          reference: str, mask: np.ndarray, affine: np.ndarray) -> np.ndarray:
  """One case: axial, coronal and sagittal middle slices of every modality, uint8 [h, w, 3].

  `images` physical [x, y, z], shown by `scalings`; contours of the reference (its body
  `mask` red, its bright parts green) are drawn over every modality.
  """
  spacing = np.sqrt((affine[:3, :3] ** 2).sum(0))
  middle = [int(round(float(np.median(np.flatnonzero(mask.any(tuple(b for b in range(3)
            if b != a))))))) if mask.any() else mask.shape[a] // 2 for a in range(3)]
  smooth = to_model(scalings[reference], ndimage.gaussian_filter(
    images[reference], np.minimum(2.0 / spacing, 2.0) / 2))
  level = otsu(smooth[mask]) if mask.any() else np.inf
  tiles = []
  for plane in (2, 1, 0):
    lines = {}
    for modality in images:
      pixels, aspect = display(images[modality], plane, middle[plane], spacing)
      tile, place = _tile((to_model(scalings[modality], pixels) + 1) / 2, aspect)
      if not lines:
        edge, _ = display(smooth, plane, middle[plane], spacing)
        whole, _ = display(mask, plane, middle[plane], spacing)
        lines = {GREEN: _outline((edge > level) & whole, place), RED: _outline(whole, place)}
      for colour, line in lines.items():
        tile[line] = colour
      tiles.append(_labelled(tile, modality, "AP" if plane == 0 else "RL"))
  row = Image.new("RGB", (TILE * len(tiles), TILE + TEXT))
  ImageDraw.Draw(row).text((4, 1), f"{name}   contours: {reference}", (255, 255, 255), _font(11))
  for i, tile in enumerate(tiles):
    row.paste(Image.fromarray(tile), (i * TILE, TEXT))
  return np.asarray(row)


def sheet(strips: Sequence[np.ndarray], path, title: str) -> None:
  """All cases' strips in columns under a title, about as wide as high, as one PNG."""
  height, width = strips[0].shape[0], max(s.shape[1] for s in strips)
  columns = max(1, min(len(strips), round(math.sqrt(len(strips) * height / width))))
  rows = math.ceil(len(strips) / columns)
  page = Image.new("RGB", (columns * (width + 6), TITLE + rows * (height + 6)), (40, 40, 40))
  ImageDraw.Draw(page).text((6, 3), title, (255, 255, 255), _font(12))
  for i, one in enumerate(strips):
    column, row = divmod(i, rows)
    page.paste(Image.fromarray(one), (column * (width + 6) + 3, TITLE + row * (height + 6) + 3))
  page.save(path, format="PNG")


def _tile(unit: np.ndarray, aspect: float) -> tuple[np.ndarray, tuple[int, int, int, int]]:
  """Values 0..1 as RGB in a square frame, undistorted; and where they lie (top, left, h, w)."""
  h, w = unit.shape[0] * aspect, float(unit.shape[1])
  scale = TILE / max(h, w)
  h, w = max(1, round(h * scale)), max(1, round(w * scale))
  grey = Image.fromarray((unit.clip(0, 1) * 255).astype(np.uint8))
  top, left = (TILE - h) // 2, (TILE - w) // 2
  tile = np.zeros((TILE, TILE), np.uint8)
  tile[top:top + h, left:left + w] = np.asarray(grey.resize((w, h), Image.Resampling.BILINEAR))
  return np.repeat(tile[..., None], 3, -1), (top, left, h, w)


def _outline(mask: np.ndarray, place) -> np.ndarray:
  """The border of a mask in the frame, one pixel wide."""
  top, left, h, w = place
  grey = Image.fromarray(mask.astype(np.uint8) * 255).resize((w, h), Image.Resampling.BILINEAR)
  full = np.zeros((TILE, TILE), bool)
  full[top:top + h, left:left + w] = np.asarray(grey) > 127
  return full & ~ndimage.binary_erosion(full)


def _labelled(tile: np.ndarray, name: str, sides: str) -> np.ndarray:
  image = Image.fromarray(tile)
  draw = ImageDraw.Draw(image)
  draw.text((3, 1), name, (255, 255, 0), _font(11))
  draw.text((3, TILE // 2 - 6), sides[0], (120, 200, 255), _font(11))
  draw.text((TILE - 10, TILE // 2 - 6), sides[1], (120, 200, 255), _font(11))
  draw.line([(0, 0), (0, TILE)], (40, 40, 40))
  return np.asarray(image)


def _font(size: int):
  return ImageFont.load_default(size)
