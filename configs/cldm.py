"""Category-guided conditional latent diffusion: CT or MR from one PET by a code (S1).

  python -m medsynth_jax.main --config=configs/cldm.py --workdir=runs/cldm
  python -m medsynth_jax.evaluate --workdir=runs/cldm --samples=8

Stages: autoencoder, latent_moments (the latents' scale), cldm, and a U-Net that nobody needs.
Built-in simulated data of 4 mm (16 training, 2 test subjects), PSNR / SSIM in the body; training
takes 21 CPU minutes, the mean of 8 samples 3 more:

                                   PET -> CT        PET -> T2
  floor (lut2)                     23.54 / 0.552    15.73 / 0.366
  cldm, one sample                 23.85 / 0.505    16.51 / 0.519
  cldm, mean of 8 samples          25.09 / 0.577    18.00 / 0.599
  unet                             25.72 / 0.772    18.82 / 0.677
  autoencoder (sees the target)    33.10 / 0.964    25.83 / 0.925

Each code's image is closer to its own target than the other code's is. `:paper` has S1's networks
and has not been run.
"""

from medsynth_jax import config as common
from medsynth_jax.diffusion import process, samplers


def get_config(variant: str = ""):
  config = common.base(stages=("autoencoder", "latent_moments", "cldm", "unet"))
  config.data.update(source="pet", targets="ct,t2")
  config.autoencoder = common.stage(
    "autoencoder", draw="single", balance="category",
    network={"name": "autoencoder_kl", "channels": (64, 128, 256), "blocks": 2,
             "latent_channels": 3, "remat": False},
    discriminator={"name": "patchgan", "base": 64, "n_layers": 3, "norm": "instance"},
    discriminator_lr=5e-4, kl=1e-6, adversarial=0.01, adversarial_from=0,
    perceptual={"weight": 0.0, "weights": ""})
  config.latent_moments = common.stage(
    "latent_moments", needs=("autoencoder",), autoencoder="autoencoder", draw="single",
    balance="category")
  config.cldm = common.stage(
    "cldm", needs=("autoencoder", "latent_moments"), autoencoder="autoencoder",
    moments="latent_moments", balance="category,group", code_dropout=0.1, guidance=1.0,
    network={"name": "diffusion_unet", "base": 128, "multiples": (1, 2, 4), "blocks": 2,
             "attention": (2, 4), "heads": 1, "attention_kernel": "xla", "resampling": "conv",
             "scale_shift": False, "remat": False},
    diffusion={**process.DEFAULTS, "schedule": "scaled_linear"},
    sampler={**samplers.DEFAULTS, "name": "ddim", "steps": 50})
  config.unet = common.stage(
    "regression", balance="category,group", loss="l1",
    generator={"name": "unet", "channels": (64, 128, 256, 512, 1024), "dropout": 0.0})
  return common.choose(config, variant, {"": laptop, "paper": paper, "test": test})


def laptop(config):
  """Small images and an autoencoder of factor 2: what two CPU cores train in minutes.

  The weight of KL is a tenth of the paper's: so small an autoencoder gives up channels otherwise.
  """
  config.data.simulated.spacing = "4,4,4"
  config.data.size = "48,64"
  config.autoencoder.update(steps=3000, batch_size=2, kl=1e-7)
  config.autoencoder.network.update(channels=(16, 32), blocks=1, groups=8)
  config.autoencoder.discriminator.update(base=16, n_layers=2)
  config.autoencoder.optim.update(lr=2e-3, schedule="cosine", ema=0.99)
  config.latent_moments.update(steps=50, batch_size=16)
  config.cldm.update(steps=3000, batch_size=4)
  config.cldm.network.update(base=32, multiples=(1, 2, 2), blocks=1, attention=(4,), groups=8,
                             resampling="residual", scale_shift=True)
  config.cldm.diffusion.update(prediction="v")
  config.cldm.sampler.update(name="dpm++", steps=15)
  config.cldm.optim.update(lr=1e-3, schedule="cosine", ema=0.995, clip=1.0)
  config.unet.update(steps=4000, batch_size=2)
  config.unet.generator.channels = (16, 32, 64, 128)
  config.unet.optim.update(lr=4e-3, schedule="cosine", ema=0.99)
  config.update(validate_every=2000, validation_slices=16)
  config.synthesis.batch_size = 16


def paper(config):
  """S1's sizes where it gives them, else those of the tutorials that it follows (systems.md)."""
  config.data.size = "256,256"
  config.autoencoder.update(steps=28_000, batch_size=64)  # 100 epochs of 2 x 8875 images
  config.autoencoder.optim.update(lr=1e-4, ema=0.999)
  config.autoencoder.adversarial_from = 2800
  config.autoencoder.perceptual.weight = 0.0  # 1e-3 with a file of features
  config.latent_moments.update(steps=277, batch_size=64)
  config.cldm.update(steps=28_000, batch_size=64)  # 200 epochs of 8875 pairs
  config.cldm.optim.update(lr=1e-4, ema=0.9999)
  config.unet.update(steps=28_000, batch_size=16)
  config.unet.optim.update(lr=2e-4, weight_decay=1e-2, schedule="cosine")
  config.validate_every = 2000
  config.dtype = "bfloat16"


def test(config):
  common.tiny(config)
  config.autoencoder.network.update(channels=(4, 8), blocks=1, groups=2)
  config.autoencoder.discriminator.update(base=4, n_layers=1)
  config.cldm.network.update(base=8, multiples=(1, 2), blocks=1, attention=(2,), groups=2)
  config.cldm.sampler.steps = 3
  config.unet.generator.channels = (4, 8)
