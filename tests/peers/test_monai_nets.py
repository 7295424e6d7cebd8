"""With MONAI's weights, the U-Net and the autoencoder compute what MONAI's do (extra `peers`)."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medsynth_jax.nets.autoencoder_kl import AutoencoderKL
from medsynth_jax.nets.diffusion_unet import DiffusionUNet

torch = pytest.importorskip("torch")
peers = pytest.importorskip("monai.networks.nets")

# Patterns of MONAI's names, and ours; {0} counts levels from the top, as ours do.
BLOCK = {
  "norm1": "norm_0", "conv1.conv": "conv_0", "time_emb_proj": "embedding", "norm2": "norm_1",
  "conv2.conv": "conv_1", "skip_connection.conv": "shortcut", "nin_shortcut.conv": "shortcut",
}
UNET = (
  (r"conv_in.conv", "conv_in"), (r"time_embed.0", "embedding/dense_0"),
  (r"time_embed.2", "embedding/dense_1"), (r"class_embedding", "embedding/classes"),
  (r"down_blocks.(\d).resnets.(\d).(.+)", "down_{0}_{1}/{block}"),
  (r"down_blocks.(\d).attentions.(\d).(.+)", "down_{0}_{1}_attention/{part}"),
  (r"down_blocks.(\d).downsampler.op.conv", "down_{0}_resample/conv"),
  (r"middle_block.resnet_(\d).(.+)", "middle_{before}/{block}"),
  (r"middle_block.attention.(.+)", "middle_attention/{part}"),
  (r"up_blocks.(\d).resnets.(\d).(.+)", "up_{mirror}_{1}/{block}"),
  (r"up_blocks.(\d).attentions.(\d).(.+)", "up_{mirror}_{1}_attention/{part}"),
  (r"up_blocks.(\d).upsampler.postconv.conv", "up_{mirror}_resample/conv"),
  (r"out.0", "norm_out"), (r"out.2.conv", "head"),
)


def array(rng, *shape):
  return rng.normal(size=shape).astype(np.float32)


def randomised(model, rng):
  """MONAI's model with every parameter drawn, since some start at zero."""
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.copy_(torch.from_numpy(0.3 * array(rng, *parameter.shape)))
  return model.eval()


def leaf(value):
  """A weight in our order of axes: space, inputs, outputs."""
  value = np.asarray(value)
  value = np.moveaxis(value, (0, 1), (-1, -2)) if value.ndim > 1 else value
  return value[0, 0] if value.shape[:2] == (1, 1) and value.ndim == 4 else value


def put(tree, path, value):
  *folders, name = path.split("/")
  for folder in folders:
    tree = tree.setdefault(folder, {})
  tree[name] = value


def ported(model, translate):
  """Our parameters from MONAI's; queries, keys and values are one matrix here."""
  tree, rows = {}, {}
  for key, value in model.state_dict().items():
    key, kind = key.rsplit(".", 1)
    path = translate(key)
    if path.endswith("classes"):
      put(tree, path, np.asarray(value))
      continue
    value = leaf(value)
    if path.endswith("/qkv"):
      rows.setdefault((path, kind), {})[key[-1]] = value
      if len(rows[path, kind]) < 3:
        continue
      value = np.concatenate([rows[path, kind][which] for which in "qkv"], -1)
    name = "bias" if kind == "bias" else "kernel" if value.ndim > 1 else "scale"
    put(tree, f"{path}/{name}", value)
  return {"params": tree}


def attention_part(name):
  return {"norm": "norm", "attn.out_proj": "out"}.get(name, "qkv")


def unet_path(key, levels):
  for pattern, ours in UNET:
    found = re.fullmatch(pattern, key)
    if found:
      first, last = (*found.groups(), "0")[0], (*found.groups(), "0")[len(found.groups()) - 1]
      return ours.format(
        *found.groups(), block=BLOCK.get(last), part=attention_part(last),
        mirror=levels - 1 - int(first) if first.isdigit() else 0,
        before=int(first) - 1 if first.isdigit() else 0)
  raise KeyError(key)


def test_unet_equals_monai():
  rng = np.random.default_rng(0)
  model = randomised(peers.DiffusionModelUNet(
    spatial_dims=2, in_channels=2, out_channels=3, channels=(4, 8, 8), num_res_blocks=2,
    attention_levels=(False, True, True), num_head_channels=(0, 4, 4), num_class_embeds=3,
    norm_num_groups=4), rng)
  net = DiffusionUNet(3, base=4, multiples=(1, 2, 2), attention=(2, 4), heads=2, groups=4,
                      scale_shift=False, resampling="conv", classes=3)
  variables = ported(model, lambda key: unet_path(key, 3))
  x, time, category = array(rng, 2, 8, 12, 2), np.array([40.0, 700.0]), np.array([2, 0])
  level = jnp.asarray(time / 25 - 20, jnp.float32)
  wanted = jax.eval_shape(net.init, jax.random.key(0), x, level, category)
  assert jax.tree.map(np.shape, variables) == jax.tree.map(np.shape, wanted)
  got = jax.jit(net.apply)(variables, x, level, category)
  with torch.no_grad():
    reference = model(torch.from_numpy(x).movedim(-1, 1), torch.from_numpy(time),
                      class_labels=torch.from_numpy(category)).movedim(1, -1).numpy()
  np.testing.assert_allclose(got, reference, rtol=0, atol=1e-4 * np.abs(reference).max())


def autoencoder_path(key, channels, blocks):
  """MONAI numbers the layers of each side; here they are listed in that order."""
  single = {"quant_conv_mu.conv": "encoder/mean", "quant_conv_log_sigma.conv":
            "encoder/log_variance", "post_quant_conv.conv": "decoder/latent"}
  if key in single:
    return single[key]
  middle = ["middle_0", "middle_attention", "middle_1"]
  top = len(channels) - 1
  down = [n for i in range(top + 1) for n in
          [f"down_{i}_{j}" for j in range(blocks)] + [f"down_{i}_resample"] * (i < top)]
  up = [n for i in range(top, -1, -1) for n in
        [f"up_{i}_{j}" for j in range(blocks)] + [f"up_{i}_resample"] * (i > 0)]
  sides = {"encoder": ["conv_in", *down, *middle, "norm_out", "head"],
           "decoder": ["conv_in", *middle, *up, "norm_out", "head"]}
  side, _, number, *rest = key.split(".", 3)
  name, rest = sides[side][int(number)], rest[0] if rest else ""
  if name == "middle_attention":
    rest = attention_part(rest)
  elif name.endswith("resample"):
    rest = "conv"
  else:
    rest = BLOCK.get(rest)
  return "/".join(filter(None, [side, name, rest]))


def test_autoencoder_equals_monai():
  rng = np.random.default_rng(0)
  channels, blocks = (4, 8, 8), 2
  model = randomised(peers.AutoencoderKL(
    spatial_dims=2, channels=channels, num_res_blocks=blocks, latent_channels=3, norm_num_groups=4,
    attention_levels=(False,) * 3), rng)
  net = AutoencoderKL(channels, blocks, attention=True, groups=4)
  variables = ported(model, lambda key: autoencoder_path(key, channels, blocks))
  x = array(rng, 2, 8, 12, 1)
  wanted = jax.eval_shape(net.init, jax.random.key(0), x)
  assert jax.tree.map(np.shape, variables) == jax.tree.map(np.shape, wanted)
  mean, std = jax.jit(lambda v, x: net.apply(v, x, method="encode"))(variables, x)
  image = jax.jit(net.apply)(variables, x)
  with torch.no_grad():
    moments = model.encode(torch.from_numpy(x).movedim(-1, 1))
    decoded = model.decode(moments[0])
  for got, reference in zip((mean, std, image), (*moments, decoded), strict=True):
    reference = reference.movedim(1, -1).numpy()
    np.testing.assert_allclose(got, reference, rtol=0, atol=1e-4 * np.abs(reference).max())
