"""The systems: one file each; `METHODS` names them for the configs."""

from medsynth_jax.methods import (
  autoencoder,
  cldm,
  cyclegan,
  ddpm,
  latent_moments,
  pix2pix,
  reg_gan,
  regression,
  unified_gan,
)

METHODS = {
  "regression": regression.build,
  "pix2pix": pix2pix.build,
  "ddpm": ddpm.build,
  "autoencoder": autoencoder.build,
  "latent_moments": latent_moments.build,
  "cldm": cldm.build,
  "unified_gan": unified_gan.build,
  "reg_gan": reg_gan.build,
  "cyclegan": cyclegan.build,
}
