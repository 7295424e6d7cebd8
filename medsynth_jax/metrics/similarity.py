"""Structural similarity (SSIM) with the settings of the field, by name.

The same two images score up to 1.29 apart under the settings that papers use, so a value is
meaningless without its protocol. Wang et al., IEEE TIP 13(4), 2004, eq. 13, K = (0.01, 0.03).
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from medsynth_jax.metrics.image import mean, pair

K1, K2 = 0.01, 0.03


@dataclass(frozen=True)
class Protocol:
  """How SSIM is computed: the window, its covariance, the border and what the mask hides."""

  window: str  # "gaussian" | "uniform"
  size: int  # voxels along each axis
  sigma: float = 0.0  # of the Gaussian window, in voxels
  sample: bool = False  # covariance divided by N - 1 instead of N
  reflect: bool = False  # images padded by reflection, border scored; else whole windows only
  blank: bool = False  # both images set to `background` outside the mask first
  data_range: float | None = None  # the only range for which the protocol is defined


PROTOCOLS = {
  "wang": Protocol("gaussian", 11, 1.5),
  "skimage": Protocol("uniform", 7, sample=True),  # scikit-image's default
  "synthrad": Protocol("uniform", 7, sample=True, blank=True),  # SynthRAD2023, on the volume
  "torchmetrics": Protocol("gaussian", 11, 1.5, reflect=True),  # its default; BraTS, BraSyn
  "sewar": Protocol("uniform", 11),  # its default
  # Reg-GAN and CTA-GAN: on images in [-1, 1], where the luminance term means nothing.
  "reggan": Protocol("uniform", 7, sample=True, data_range=2.0),
}


def protocol_of(name: str) -> Protocol:
  """The entry of PROTOCOLS; ValueError that lists them for an unknown name."""
  if name not in PROTOCOLS:
    raise ValueError(f"ssim: unknown protocol {name!r}; known: {', '.join(PROTOCOLS)}")
  return PROTOCOLS[name]


def margin(name: str) -> int:
  """Voxels that the protocol's map is smaller than the image, on each side of each axis."""
  protocol = protocol_of(name)
  return 0 if protocol.reflect else protocol.size // 2


def fits(name: str, shape: tuple[int, ...]) -> bool:
  """Whether the protocol's window lies inside an image of this shape at least once."""
  protocol = protocol_of(name)
  return min(shape) >= (protocol.size // 2 + 1 if protocol.reflect else protocol.size)


def check_range(name: str, data_range: float) -> None:
  """ValueError where the protocol is tied to another range than this."""
  only = protocol_of(name).data_range
  if only is not None and data_range != only:
    raise ValueError(f"ssim: {name!r} is defined on [-1, 1], data_range {only}, not {data_range}")


def gaussian(size: int, sigma: float) -> np.ndarray:
  """`size` (odd) weights of a Gaussian of `sigma` voxels, their sum 1, float64."""
  offset = np.arange(size) - size // 2
  taps = np.exp(-0.5 * (offset / sigma) ** 2)
  return taps / taps.sum()


def _taps(protocol: Protocol) -> np.ndarray:
  if protocol.window == "uniform":
    return np.full(protocol.size, 1 / protocol.size)
  return gaussian(protocol.size, protocol.sigma)


def filtered(x: jax.Array, taps: np.ndarray) -> jax.Array:
  """Correlates the axes of x but the first with the taps, whole windows only.

  A sum of shifted slices instead of a convolution: exact float32 on every device (no TF32, no
  bfloat16 passes).
  """
  for axis in range(1, x.ndim):
    length = x.shape[axis] - len(taps) + 1
    parts = (
      np.float32(tap) * jax.lax.slice_in_dim(x, i, i + length, axis=axis)
      for i, tap in enumerate(taps)
    )
    # The barrier stops XLA from fusing the axes, which would do the work of a full n-D window.
    x = jax.lax.optimization_barrier(sum(parts))
  return x


def ssim_map(reference, image, data_range, protocol: str = "wang") -> jax.Array:
  """The SSIM of every window, [*space] less `margin(protocol)` on each side; 2-D or 3-D.

  Masks and `blank` are the caller's affair here. ValueError where an axis is shorter than the
  window, or where the protocol is tied to another `data_range`.
  """
  reference, image, _ = pair(reference, image)
  p = protocol_of(protocol)
  if not fits(protocol, reference.shape):
    raise ValueError(f"ssim: {protocol!r} needs {p.size} voxels an axis, got {reference.shape}")
  if isinstance(data_range, (int, float)):  # a traced range has no value to check
    check_range(protocol, data_range)
  x, y = reference / data_range, image / data_range
  if p.reflect:
    x, y = (jnp.pad(a, p.size // 2, mode="reflect") for a in (x, y))
  # E[x^2] - E[x]^2 cancels in float32 unless the images are first moved near zero.
  shift = mean(x)
  x, y = x - shift, y - shift
  mx, my, xx, yy, xy = filtered(jnp.stack([x, y, x * x, y * y, x * y]), _taps(p))
  count = p.size**x.ndim
  scale = np.float32(count / (count - 1) if p.sample else 1.0)
  c1, c2 = K1**2, K2**2
  contrast = (2 * scale * (xy - mx * my) + c2) / (scale * (xx - mx * mx + yy - my * my) + c2)
  mx, my = mx + shift, my + shift
  return contrast * (2 * mx * my + c1) / (mx * mx + my * my + c1)


def ssim(
  reference, image, data_range, mask=None, protocol: str = "wang", background: float | None = None
) -> jax.Array:
  """Mean SSIM, over the windows whose centre lies in the mask where one is given.

  `background`: the value, in the images' unit, that a protocol with `blank` ("synthrad") puts
  outside the mask (-1024 for HU); ValueError where it is missing. NaN where no window counts.
  """
  reference, image, mask = pair(reference, image, mask)
  if mask is not None and protocol_of(protocol).blank:
    if background is None:
      raise ValueError(f"ssim: {protocol!r} with a mask needs background (-1024 for HU)")
    reference, image = (jnp.where(mask, a, background) for a in (reference, image))
  values = ssim_map(reference, image, data_range, protocol)
  m = margin(protocol)
  if mask is not None:
    mask = mask[tuple(slice(m, n - m) for n in mask.shape)]
  return mean(values, mask)
