"""The systems: one file each; `METHODS` names them for the configs."""

from medsynth_jax.methods import pix2pix, regression

METHODS = {
  "regression": regression.build,
  "pix2pix": pix2pix.build,
}
