"""Times XLA's plain convolutions beside the cured ones, alternating, and prints medians.

  JAX_PLATFORMS=cpu python tests/peers/bench_conv.py [layers] [layers3d] [networks]

Forward and both gradients, float32; the ratio is plain / cured. Not a test: timings are no pass or
fail. The networks are pix2pix's U-Net and ResNet-9 at 256x256, batch 1.
"""

import statistics
import sys

import jax
import jax.numpy as jnp
import numpy as np
from alternation import alternate

from medsynth_jax.nets.conv import cure_setting
from medsynth_jax.nets.conv_ops import (
  cured_conv,
  cured_conv_transpose,
  plain_conv,
  plain_conv_transpose,
)
from medsynth_jax.nets.resnet_generator import ResNetGenerator
from medsynth_jax.nets.unet import UNet
from medsynth_jax.nets.unet_generator import UNetGenerator

# name, transposed, size, input channels, output channels, kernel, stride, padding low and high
LAYERS = (
  ("convT 16^2 1024->256 k4 s2", True, (16, 16), 1024, 256, 4, 2, (2, 2)),
  ("convT 64^2 256->64 k4 s2", True, (64, 64), 256, 64, 4, 2, (2, 2)),
  ("convT 128^2 128->1 k4 s2", True, (128, 128), 128, 1, 4, 2, (2, 2)),
  ("convT 128^2 128->64 k3 s2", True, (128, 128), 128, 64, 3, 2, (1, 2)),
  ("convT 64^2 256->128 k2 s2", True, (64, 64), 256, 128, 2, 2, (1, 1)),
  ("conv 262^2 64->1 k7", False, (262, 262), 64, 1, 7, 1, (0, 0)),
  ("conv 31^2 512->1 k4", False, (31, 31), 512, 1, 4, 1, (1, 1)),
  ("conv 256^2 64->16 k3", False, (256, 256), 64, 16, 3, 1, (1, 1)),
)
LAYERS_3D = (
  ("convT 16^3 64->32 k4 s2", True, (16, 16, 16), 64, 32, 4, 2, (2, 2)),
  ("convT 16^3 64->32 k2 s2", True, (16, 16, 16), 64, 32, 2, 2, (1, 1)),
  ("conv 32^3 32->64 k4 s2", False, (32, 32, 32), 32, 64, 4, 2, (1, 1)),
  ("conv 32^3 32->32 k3", False, (32, 32, 32), 32, 32, 3, 1, (1, 1)),
  ("conv 32^3 32->1 k3", False, (32, 32, 32), 32, 1, 3, 1, (1, 1)),
)
NETWORKS = (
  ("pix2pix U-Net 256^2", UNetGenerator()),
  ("ResNet-9 256^2", ResNetGenerator()),
  ("U-Net 256^2", UNet()),
)


def array(rng, *shape):
  return jnp.asarray(rng.normal(size=shape), jnp.float32)


def layer_functions(transposed, size, inputs, outputs, k, stride, pads):
  rng = np.random.default_rng(0)
  rank = len(size)
  x = array(rng, 1, *size, inputs)
  w = array(rng, *(k,) * rank, *((outputs, inputs) if transposed else (inputs, outputs)))
  pair = (plain_conv_transpose, cured_conv_transpose) if transposed else (plain_conv, cured_conv)
  functions = []
  for operation in pair:
    def pulled(x, w, g, operation=operation):
      y, pull = jax.vjp(lambda x, w: operation(x, w, (stride,) * rank, (pads,) * rank), x, w)
      return y, pull(g)

    out = jax.eval_shape(lambda x, w, o=operation: o(x, w, (stride,) * rank, (pads,) * rank), x, w)
    functions.append(jax.jit(pulled).lower(x, w, g := array(rng, *out.shape)).compile())
  return [lambda f=f: f(x, w, g) for f in functions]


def network_functions(network):
  rng = np.random.default_rng(0)
  x = array(rng, 1, 256, 256, 1)
  shapes = jax.eval_shape(network.init, jax.random.key(0), x)
  params = jax.tree.map(lambda s: 0.02 * array(rng, *s.shape), shapes)

  def loss(params):
    return jnp.abs(network.apply(params, x) - x).mean()

  functions = []
  for setting in ("off", "on"):
    with cure_setting(setting):
      functions.append(jax.jit(jax.value_and_grad(loss)).lower(params).compile())
  return [lambda f=f: f(params) for f in functions]


def main(what):
  rows = []
  if "layers" in what:
    rows += [(name, layer_functions(*rest)) for name, *rest in LAYERS]
  if "layers3d" in what:
    rows += [(name, layer_functions(*rest)) for name, *rest in LAYERS_3D]
  if "networks" in what:
    rows += [(name, network_functions(network)) for name, network in NETWORKS]
  print(f"{'':32}{'plain ms':>10}{'cured ms':>10}{'ratio':>8}")
  for name, functions in rows:
    plain, cured = (
      statistics.median(seconds for seconds, _ in x) for x in alternate(functions, seconds=4.0))
    print(f"{name:32}{1e3 * plain:10.1f}{1e3 * cured:10.1f}{plain / cured:8.1f}", flush=True)


if __name__ == "__main__":
  main(sys.argv[1:] or ("layers", "layers3d", "networks"))
