"""The systems: one file each; `METHODS` names them for the configs."""

from medsynth_jax.methods import autoencoder, cldm, ddpm, latent_moments, pix2pix, regression

METHODS = {
  "regression": regression.build,
  "pix2pix": pix2pix.build,
  "ddpm": ddpm.build,
  "autoencoder": autoencoder.build,
  "latent_moments": latent_moments.build,
  "cldm": cldm.build,
}
