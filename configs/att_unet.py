"""Attention U-Net regression with L1 (Oktay et al. 2018), a baseline of S1's comparison.

  python -m medsynth_jax.main --config=configs/att_unet.py --workdir=runs/att_unet

T1 -> T2 on the built-in simulated data (16 training, 2 test subjects), PSNR / SSIM in the body:
attention U-Net 23.19 dB / 0.858; floor (lut2) 14.62 / 0.317; ceiling 34.90 / 0.967. `:paper` is the
31.4M network, AdamW 2e-4, cosine; it has not been run.
"""

from medsynth_jax import config as common


def get_config(variant: str = ""):
  config = common.single("regression", common.base())
  config.loss = "l1"
  config.generator = {"name": "att_unet", "channels": (64, 128, 256, 512, 1024), "dropout": 0.0}
  return common.choose(config, variant, {"": laptop, "paper": paper, "test": test})


def laptop(config):
  config.steps, config.batch_size = 3000, 2
  config.generator.channels = (16, 32, 64, 128)
  config.optim.update(lr=4e-3, schedule="cosine", ema=0.99)


def paper(config):
  config.steps, config.batch_size = 100_000, 16
  config.optim.update(lr=2e-4, weight_decay=1e-2, schedule="cosine")
  config.validate_every = 2000
  config.dtype = "bfloat16"


def test(config):
  common.tiny(config)
  config.generator.channels = (4, 8)
