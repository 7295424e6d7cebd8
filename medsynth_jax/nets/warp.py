"""Images moved by a flow, and how smooth and how foldless a flow is.

A flow [B, *space, rank] is in pixels, channel 0 along the first spatial axis, and points from each
position of the result to where its value is read.
"""

import jax
import jax.numpy as jnp
from jax.scipy.ndimage import map_coordinates


def _grid(space):
  """[*space, rank]: the position of each voxel."""
  return jnp.stack(jnp.meshgrid(*map(jnp.arange, space), indexing="ij"), -1).astype(jnp.float32)


def warp(image: jax.Array, flow: jax.Array) -> jax.Array:
  """The image [B, *space, C] read at p + flow(p), 2-D or 3-D, linear; outside, the nearest edge.

  Equal to PyTorch's `grid_sample(align_corners=True, padding_mode="border")`. Differentiable in
  both arguments; the gradient in the flow is zero where the edge is read.
  """
  points = jnp.moveaxis(_grid(image.shape[1:-1]) + flow, -1, 1)

  def one(channel, where):
    return map_coordinates(channel, list(where), order=1, mode="nearest")

  return jax.vmap(jax.vmap(one, (-1, None), -1))(image, points)


def smoothness(flow: jax.Array) -> jax.Array:
  """Sum over spatial axes of the mean squared forward difference of the flow (RegGAN's penalty)."""
  return sum(jnp.mean(jnp.square(jnp.diff(flow, axis=axis))) for axis in range(1, flow.ndim - 1))


def folding(flow: jax.Array, mask: jax.Array | None = None) -> jax.Array:
  """Share of voxels (0..1) where p + flow(p) folds: its Jacobian determinant is 0 or less.

  Derivatives are forward differences, which see a fold between any two neighbours (central ones
  miss it); the last voxel along each axis has none and is left out. `mask` broadcasts to
  [B, *space, 1]: voxels counted, 0 for the share where there is none.
  """
  rank = flow.shape[-1]
  inner = (slice(None), *(slice(size - 1) for size in flow.shape[1:-1]))
  gradient = jnp.stack([jnp.diff(flow, axis=axis)[inner] for axis in range(1, rank + 1)], -1)
  determinant = jnp.linalg.det(gradient + jnp.eye(rank))[..., None]
  mask = jnp.broadcast_to(1.0 if mask is None else mask, (*flow.shape[:-1], 1))[inner]
  counted = mask > 0
  return jnp.sum((determinant <= 0) & counted) / jnp.maximum(1, jnp.sum(counted))
