"""Times our networks beside PyTorch's of the same shape; prints a table of ratios, writes JSON.

  python tests/peers/bench_nets.py [--only=resnet,ddim] [--repeats=5] [--tiny] [--out=FOLDER]

Both run in one process, alternating, and must have equally many parameters. Theirs are MONAI's
diffusion U-Net and autoencoder, the published pix2pix and ResNet-9 in plain torch.nn, and
diffusers' DDIM loop. `pix2pix` is the whole training step (discriminator, then generator, Adam),
`ddim` 50 steps of sampling, the others are forward and backward. On a CPU both compute in float32,
torch eagerly; on a GPU both in bfloat16, torch in channels_last with torch.compile. The ratio is
torch / ours, of medians: above 1 we are faster; the second is that of processor time, which other
work on the machine disturbs less. The JSON is <device>.json in FOLDER
(tests/peers/results; with --only or --tiny none unless FOLDER is given). Not a test: timings are no
pass or fail.
"""

import argparse
import json
import os
import platform
import re
import statistics
import sys
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch wants its share
sys.path.insert(0, str(Path(__file__).parents[2]))

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch_nets
from alternation import alternate
from diffusers import DDIMScheduler
from monai.networks import nets as monai_nets

from configs import cldm as cldm_config
from configs import pix2pix as pix2pix_config
from medsynth_jax.contract import create
from medsynth_jax.diffusion import process, samplers
from medsynth_jax.methods import METHODS
from medsynth_jax.nets import registry
from medsynth_jax.nets.resnet_generator import ResNetGenerator

RESULTS = Path(__file__).parent / "results"
# base, multiples, blocks, attention, groups: of configs/cldm.py:paper, and for a quick run
PAPER_DIFFUSION, TINY_DIFFUSION = (128, (1, 2, 4), 2, (2, 4), 32), (8, (1, 2), 1, (2,), 4)
VERSIONS = ("jax", "flax", "torch", "monai", "diffusers", "numpy")
GPU = jax.default_backend() == "gpu"
DEVICE = torch.device("cuda" if GPU else "cpu")
DTYPE = "bfloat16" if GPU else "float32"


class Pair(NamedTuple):
  """What is compared: size of the input [B, H, W, C], functions to time, numbers of parameters.

  `compiled` is what `ours` calls.
  """
  size: tuple[int, ...]
  ours: object
  theirs: object
  our_parameters: int
  their_parameters: int
  compiled: jax.stages.Compiled | None = None


def array(*shape):
  return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def our_parameters(net, *inputs):
  """Random weights in every layer, since some start at zero."""
  shapes = jax.eval_shape(net.init, jax.random.key(0), *inputs)
  return jax.tree.map(lambda s: jnp.asarray(0.02 * array(*s.shape)), shapes)


def count(params):
  return sum(x.size for x in jax.tree.leaves(params))


def tensor(x):
  """Ours [B, H, W, C] as theirs, [B, C, H, W]."""
  return placed(torch.from_numpy(np.moveaxis(x, -1, 1).copy()) if x.ndim == 4
                else torch.from_numpy(x))


def placed(x):
  channels_last = GPU and not (isinstance(x, torch.Tensor) and x.ndim != 4)
  return x.to(DEVICE, memory_format=torch.channels_last) if channels_last else x.to(DEVICE)


def prepared(module):
  """Their network on the device, compiled if that is a GPU, random weights in every layer."""
  with torch.no_grad():
    for parameter in module.parameters():
      parameter.normal_(std=0.02)
  module = placed(module)
  return torch.compile(module) if GPU else module


def autocast():
  return torch.autocast(DEVICE.type, torch.bfloat16, enabled=GPU)


def finished(x):
  """Waits for the device."""
  if GPU:
    torch.cuda.synchronize()
  return x


def their_count(*modules):
  return sum(p.numel() for module in modules for p in module.parameters())


def gradients(net, module, *inputs, their_inputs=None):
  """Forward and backward of a squared output, with respect to all parameters."""
  params, placed_inputs = our_parameters(net, *inputs), jax.device_put(inputs)

  def loss(params, inputs):
    return jnp.square(net.apply(params, *inputs)).mean()
  compiled = jax.jit(jax.value_and_grad(loss)).lower(params, placed_inputs).compile()

  module = prepared(module)
  tensors = [tensor(x) for x in their_inputs or inputs]

  def theirs():
    module.zero_grad()
    with autocast():
      value = module(*tensors)
    value.float().square().mean().backward()
    return finished(value)
  return Pair(inputs[0].shape, lambda: compiled(params, placed_inputs), theirs, count(params),
              their_count(module), compiled)


def pix2pix(tiny):
  """The training step of configs/pix2pix.py:paper against the same step in torch."""
  config = pix2pix_config.get_config("paper")
  config.dtype = DTYPE
  size = 32 if tiny else 256
  if tiny:
    config.generator.update(base=4, max_depth=4)
    config.discriminator.update(base=4, n_layers=1)
  method = METHODS["pix2pix"](config, "pix2pix", None, {})
  shape = (1, size, size, 1)
  source, target = np.tanh(array(2, *shape))
  batch = jax.device_put({"source": source, "target": target, "paired": np.ones(1, np.float32),
                          "valid": np.ones(shape, np.float32)})
  state = jax.jit(lambda key: create(method, key, batch, {}))(jax.random.key(0))
  parameters = count(state.nets)

  def step(state, batch):
    new, metrics = method.step(state, batch, jax.random.fold_in(state.key, state.step))
    return new.replace(step=state.step + 1), metrics
  compiled = jax.jit(step, donate_argnums=0).lower(state, batch).compile()

  def ours():
    nonlocal state
    state, _ = compiled(state, batch)
    return state

  generator = prepared(torch_nets.UNetGenerator(config.generator.base, config.generator.max_depth))
  discriminator = prepared(torch_nets.PatchGAN(config.discriminator.base,
                                               config.discriminator.n_layers))
  adams = [torch.optim.Adam(net.parameters(), 2e-4, (0.5, 0.999), fused=True)
           for net in (generator, discriminator)]
  source, target = tensor(source), tensor(target)

  def judged(image, real):
    with autocast():
      logits = discriminator(torch.cat([source, image], 1))
    return (logits.float() - float(real)).square().mean()

  def theirs():
    with autocast():
      fake = generator(source)
    discriminator.requires_grad_(True)
    adams[1].zero_grad()
    (0.5 * (judged(target, True) + judged(fake.detach(), False))).backward()
    adams[1].step()
    discriminator.requires_grad_(False)
    adams[0].zero_grad()
    (judged(fake, True) + config.l1 * (fake - target).abs().mean()).backward()
    adams[0].step()
    return finished(fake)
  return Pair(shape, ours, theirs, parameters, their_count(generator, discriminator), compiled)


def resnet(tiny):
  size, base, blocks = (32, 4, 2) if tiny else (256, 64, 9)
  net = ResNetGenerator(base=base, blocks=blocks, dtype=jnp.dtype(DTYPE))
  return gradients(net, torch_nets.ResNetGenerator(base, blocks), array(1, size, size, 1))


def diffusion_nets(base, multiples, blocks, attention, groups, channels):
  """Ours of latent diffusion (configs/cldm.py) and MONAI's of the same shape."""
  fields = {**cldm_config.get_config("paper").cldm.network, "base": base, "multiples": multiples,
            "blocks": blocks, "attention": attention, "groups": groups}
  net = registry.make({**fields, "out_channels": channels[1]}, DTYPE)
  levels = [2**level in attention for level in range(len(multiples))]
  widths = [base * multiple for multiple in multiples]
  module = monai_nets.DiffusionModelUNet(
    2, *channels, num_res_blocks=blocks, channels=widths, attention_levels=levels,
    num_head_channels=[width * on for width, on in zip(widths, levels, strict=True)],
    norm_num_groups=groups)
  return net, module


def diffusion(tiny):
  net, module = diffusion_nets(*(TINY_DIFFUSION if tiny else PAPER_DIFFUSION), channels=(6, 3))
  size = 16 if tiny else 64
  x, level = array(4, size, size, 6), np.linspace(-5, 5, 4, dtype=np.float32)
  return gradients(net, module, x, level, their_inputs=(x, 25 * (level + 20)))


def autoencoder(tiny):
  size, channels, blocks = (32, (8, 16), 1) if tiny else (256, (64, 128, 256), 2)
  groups = 4 if tiny else 32
  net = registry.make({"name": "autoencoder_kl", "channels": channels, "blocks": blocks,
                       "groups": groups}, DTYPE)
  module = monai_nets.AutoencoderKL(
    2, channels=channels, num_res_blocks=blocks, latent_channels=3, norm_num_groups=groups,
    attention_levels=(False,) * len(channels), with_encoder_nonlocal_attn=False,
    with_decoder_nonlocal_attn=False)
  module.forward = module.reconstruct  # of the posterior's mean, as ours
  return gradients(net, module, array(1, size, size, 1))


def ddim(tiny):
  """Ours is one compiled scan, theirs diffusers' DDIMScheduler in a Python loop; batch 4.

  The paper's network on a GPU, a narrow one on a CPU.
  """
  shape = TINY_DIFFUSION if tiny else PAPER_DIFFUSION if GPU else (32, (1, 2, 4), 1, (4,), 32)
  (net, module), size = diffusion_nets(*shape, channels=(3, 3)), 16 if tiny else 64
  shape, steps = (4, size, size, 3), 3 if tiny else 50
  here = process.make({**process.DEFAULTS, "prediction": "v"})
  sampler = samplers.make({**samplers.DEFAULTS, "name": "ddim", "steps": steps}, here)
  params = our_parameters(net, array(*shape), np.zeros(4, np.float32))

  def draw(params, keys):
    return samplers.sample(sampler, lambda x, level: net.apply(params, x, level), keys, shape[1:])
  keys = jax.random.split(jax.random.key(0), 4)
  compiled = jax.jit(draw).lower(params, keys).compile()

  module = prepared(module).eval()
  scheduler = DDIMScheduler(1000, 1e-4, 0.02, "linear", clip_sample=False,
                            timestep_spacing="trailing", prediction_type="v_prediction")
  scheduler.set_timesteps(steps, device=DEVICE)

  @torch.inference_mode()
  def theirs():
    x = placed(torch.randn(4, 3, size, size, device=DEVICE))
    for t in scheduler.timesteps:
      with autocast():
        output = module(x, t.expand(4))
      x = scheduler.step(output.float(), t, x).prev_sample
    return finished(x)
  return Pair(shape, lambda: compiled(params, keys), theirs, count(params), their_count(module),
              compiled)


PAIRS = {"pix2pix": pix2pix, "resnet": resnet, "diffusion": diffusion, "autoencoder": autoencoder,
         "ddim": ddim}


def device_name():
  if GPU:
    return jax.devices()[0].device_kind
  info = Path("/proc/cpuinfo")
  found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.is_file() else None
  return found[1] if found else platform.processor() or platform.machine()


def summary(record):
  clock, processors = zip(*record, strict=True)
  low, median, high = statistics.quantiles(clock, n=4, method="inclusive")
  return {"median": median, "quartiles": [low, high],
          "processors": statistics.median(processors)}


def compared(name, tiny, repeats):
  """The row of JSON of one pair."""
  pair = PAIRS[name](tiny)
  if pair.our_parameters != pair.their_parameters:
    raise AssertionError(f"{name}: {pair.our_parameters:,} parameters, torch's has "
                         f"{pair.their_parameters:,}")
  ours, theirs = (summary(x) for x in alternate((pair.ours, pair.theirs), repeats))
  return {"parameters": pair.our_parameters, "size": pair.size, "repeats": repeats,
          "seconds": ours, "torch_seconds": theirs, "ratio": theirs["median"] / ours["median"],
          "processor_ratio": theirs["processors"] / ours["processors"]}


def main(arguments):
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("--only", type=lambda x: x.split(","), metavar="NAME,NAME")
  parser.add_argument("--repeats", type=int, default=5)
  parser.add_argument("--tiny", action="store_true", help="small networks, to see that it runs")
  parser.add_argument("--out", type=Path)
  options = parser.parse_args(arguments)
  unknown = set(options.only or ()) - set(PAIRS)
  if unknown:
    parser.error(f"{', '.join(unknown)}: choose among {', '.join(PAIRS)}")
  if GPU != torch.cuda.is_available():
    parser.error("JAX and PyTorch have to run on the same kind of device")
  torch.backends.cudnn.benchmark = True
  if options.tiny:
    torch.set_num_threads(1)  # several threads wait for each other for long on a busy machine

  head = {"device": device_name(), "cores": len(os.sched_getaffinity(0)), "dtype": DTYPE,
          "vectors": torch.backends.cpu.get_cpu_capability(),  # the widest instructions, as AVX2
          "load": os.getloadavg()[1],  # tasks that want a core, over the last 5 minutes
          "versions": {"python": platform.python_version(),
                       **{name: metadata.version(name) for name in VERSIONS}}}
  print(f"{head['device']}, {head['cores']} cores ({head['vectors']}), {DTYPE}, load"
        f" {head['load']:.1f}", head["versions"])
  print(f"{'':12}{'parameters':>12}{'input':>16}{'torch s':>9}{'ours s':>9}{'ratio':>7}"
        f"{'processors':>12}")
  rows = {}
  for name in options.only or PAIRS:
    rows[name] = row = compared(name, options.tiny, options.repeats)
    print(f"{name:12}{row['parameters']:12,}{'x'.join(map(str, row['size'])):>16}"
          f"{row['torch_seconds']['median']:9.3f}{row['seconds']['median']:9.3f}"
          f"{row['ratio']:7.2f}{row['processor_ratio']:12.2f}", flush=True)
    if options.out or not (options.only or options.tiny):
      write(options.out or RESULTS, {**head, "rows": rows})  # each time: a stopped run leaves these


def write(folder, result):
  """<device>.json, whole or not at all."""
  folder.mkdir(parents=True, exist_ok=True)
  name = re.sub(r"[^a-z0-9]+", "_", f"{result['device']} {result['cores']} cores".lower())
  path = folder / f"{name.strip('_')}.json"
  part = path.with_suffix(".part")
  part.write_text(json.dumps(result, indent=1) + "\n")
  part.replace(path)


if __name__ == "__main__":
  main(sys.argv[1:])
