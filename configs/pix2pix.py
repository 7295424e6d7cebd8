"""pix2pix: U-Net generator, 70x70 PatchGAN, least-squares objective + 100 L1 (S0's first stage).

  python -m medsynth_jax.main --config=configs/pix2pix.py --workdir=runs/pix2pix

T1 -> T2 on the built-in simulated data (16 training, 2 test subjects), PSNR / SSIM in the body:
pix2pix 20.35 dB / 0.777; floor (lut2) 14.62 / 0.317; ceiling 34.90 / 0.967. The U-Net of
configs/unet.py scores higher (23.95 / 0.873) in about the same time. `:paper` is S0's recipe for
one target channel, without the three-channel fusion image; it has not been run.
"""

from medsynth_jax import config as common


def get_config(variant: str = ""):
  config = common.single("pix2pix", common.base())
  config.gan, config.l1 = "lsgan", 100.0
  config.generator = {"name": "unet_generator", "base": 64, "dropout": 0.5, "max_depth": 8}
  config.discriminator = {"name": "patchgan", "base": 64, "n_layers": 3,
                          "norm": "affine_instance"}
  config.optim.update(b1=0.5)
  return common.choose(config, variant, {"": laptop, "paper": paper, "test": test})


def laptop(config):
  config.data.size = "96,128"
  config.steps, config.batch_size = 4000, 2
  config.generator.update(base=24, dropout=0.0)
  config.discriminator.update(base=16, n_layers=2)
  config.optim.update(lr=4e-3, schedule="linear", hold=0.3, ema=0.99)


def paper(config):
  """S0's first stage: Adam 2e-4 (0.5, 0.999), batch 1, 100 epochs and 100 more linearly to 0."""
  config.data.size = "256,256"
  config.data.augment.update(zoom=1.117, shift=0.058)
  config.steps, config.batch_size = 330_000, 1  # 200 epochs of S0's 1664 pairs
  config.optim.update(lr=2e-4, schedule="linear", hold=0.5, ema=0.0)
  config.validate_every = 5000


def test(config):
  common.tiny(config)
  config.generator.update(base=4, max_depth=4)
  config.discriminator.update(base=4, n_layers=1)
