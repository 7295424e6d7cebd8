"""Networks by the name that a config gives them."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from medsynth_jax.errors import UserError
from medsynth_jax.nets.autoencoder_kl import AutoencoderKL
from medsynth_jax.nets.diffusion_unet import DiffusionUNet
from medsynth_jax.nets.patchgan import MultiScalePatchGAN, PatchGAN, SpineDiscriminator
from medsynth_jax.nets.registration import RegistrationResUNet
from medsynth_jax.nets.resnet_generator import ResNetGenerator
from medsynth_jax.nets.stargan import StarGANDiscriminator, StarGANGenerator
from medsynth_jax.nets.unet import AttentionUNet, UNet
from medsynth_jax.nets.unet_generator import UNetGenerator

NETS = {
  "unet": UNet,
  "att_unet": AttentionUNet,
  "unet_generator": UNetGenerator,
  "resnet": ResNetGenerator,
  "diffusion_unet": DiffusionUNet,
  "autoencoder_kl": AutoencoderKL,
  "patchgan": PatchGAN,
  "multiscale_patchgan": MultiScalePatchGAN,
  "spine_discriminator": SpineDiscriminator,
  "stargan_generator": StarGANGenerator,
  "stargan_discriminator": StarGANDiscriminator,
  "registration_resunet": RegistrationResUNet,
}


def make(fields: Mapping[str, Any], dtype: str) -> nn.Module:
  """The network `fields["name"]` with its other fields, computing in `dtype`.

  Raises:
    UserError: unknown network, field or dtype.
  """
  fields = dict(fields)
  name = fields.pop("name")
  if name not in NETS:
    raise UserError(f"network {name!r} is unknown: choose one of {', '.join(NETS)}")
  if dtype not in ("float32", "bfloat16"):
    raise UserError(f"dtype={dtype!r}: choose float32 or bfloat16")
  try:
    return NETS[name](**fields, dtype=jnp.dtype(dtype))
  except TypeError as error:
    raise UserError(f"network {name}: {error}") from None
