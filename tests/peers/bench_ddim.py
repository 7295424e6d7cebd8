"""Times DDIM of 50 steps beside diffusers' DDIM loop around the same network; prints medians.

  JAX_PLATFORMS=cpu python tests/peers/bench_ddim.py [size] [width]

Ours is one compiled scan with the network inside. Theirs is diffusers' DDIMScheduler in Python,
which calls the same network, compiled too, 50 times. Batch 4, size x size pixels (64) and a
diffusion U-Net of that width (16) with random weights; both start from the same noise, alternate,
and must give the same images. The ratio is diffusers / ours, of time on the clock and of processor
time, which is the one to read on a machine that others use too. Not a test: timings are no pass or
fail.
"""

import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import torch
from diffusers import DDIMScheduler

from medsynth_jax.diffusion import process, samplers
from medsynth_jax.nets.diffusion_unet import DiffusionUNet

BATCH, STEPS, ROUNDS = 4, 50, 7


def network(size, width):
  """(parameters, x, level) -> v, with random weights in every layer."""
  net = DiffusionUNet(base=width, multiples=(1, 2, 4), blocks=1, groups=8)
  x, level = jnp.zeros((BATCH, size, size, 1)), jnp.zeros(BATCH)
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda s: jnp.asarray(0.05 * rng.standard_normal(s.shape), s.dtype),
                        jax.eval_shape(net.init, jax.random.key(0), x, level))
  return params, net.apply


def ours(sampler, params, apply, size):
  def draw(params, keys):
    return samplers.sample(sampler, lambda x, level: apply(params, x, level), keys, (size, size, 1))

  keys = jax.random.split(jax.random.key(0), BATCH)
  compiled = jax.jit(draw).lower(params, keys).compile()
  return lambda: np.asarray(compiled(params, keys))


def theirs(sampler, params, apply, size):
  levels = jnp.asarray(sampler.process.schedule.log_snr, jnp.float32)
  keys = jax.random.split(jax.random.key(0), BATCH)
  noise = np.stack([jax.random.normal(jax.random.fold_in(key, len(levels)), (size, size, 1))
                    for key in keys])
  scheduler = DDIMScheduler(1000, 1e-4, 0.02, "linear", clip_sample=False,
                            timestep_spacing="trailing", prediction_type="v_prediction")
  scheduler.set_timesteps(STEPS)
  predict = jax.jit(lambda params, x, t: apply(params, x, jnp.full(BATCH, levels[t])))

  def draw():
    x = torch.from_numpy(noise)
    for t in scheduler.timesteps.tolist():
      output = torch.from_dlpack(predict(params, x.numpy(), t))
      x = scheduler.step(output, t, x).prev_sample
    return x.numpy()

  return draw


def main(size=64, width=16):
  here = process.make({**process.DEFAULTS, "prediction": "v"})
  sampler = samplers.make({**samplers.DEFAULTS, "name": "ddim", "steps": STEPS}, here)
  params, apply = network(size, width)
  functions = [make(sampler, params, apply, size) for make in (theirs, ours)]
  first, second = (function() for function in functions)
  print(f"largest difference of the images: {abs(first - second).max():.1e}")
  times = [[], []]
  for _ in range(ROUNDS):
    for function, record in zip(functions, times, strict=True):
      begin = time.perf_counter(), time.process_time()
      function()
      record.append((time.perf_counter() - begin[0], time.process_time() - begin[1]))
  print(f"DDIM-{STEPS}, batch {BATCH}, {size} x {size}, width {width}")
  for i, kind in enumerate(("clock", "processors")):
    slow, fast = (1e3 * statistics.median(seconds[i] for seconds in record) for record in times)
    print(f"  {kind:10}  diffusers {slow:6.0f} ms  ours {fast:6.0f} ms  ratio {slow / fast:.2f}")


if __name__ == "__main__":
  main(*(int(argument) for argument in sys.argv[1:]))
