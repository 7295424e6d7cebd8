"""PET/MR fusion from MR: pix2pix, then a conditional DDPM that refines its coarse image (S0).

  python -m medsynth_jax.main --config=configs/pix2pix_ddpm.py --workdir=runs/pix2pix_ddpm
  python -m medsynth_jax.evaluate --workdir=runs/pix2pix_ddpm --samples=8

Stages: pix2pix, fold_0 and fold_1 (the same without one fold: they make the coarse images that the
DDPM is trained on), ddpm, and a U-Net that nobody needs. SUV is synthesised and shown in colour on
the MR; `--config.data.targets=fusion` learns the colours themselves. Built-in simulated data of
4 mm (16 training, 2 test subjects), PSNR / SSIM in the body; 17 CPU minutes, the mean of 8 samples
3 more:

                              T2 -> PET        T2 -> fusion (rendered)
  floor (best row)            25.35 / 0.679    24.63 / 0.946
  pix2pix                     26.24 / 0.807    23.87 / 0.940
  ddpm, one sample            24.40 / 0.746    21.85 / 0.914
  ddpm, mean of 8 samples     26.25 / 0.802    23.94 / 0.942
  unet                        26.29 / 0.818    23.93 / 0.938

Copying the MR already gives 23.65 / 0.946 on the fusion image. No MR tells a subject's overall
uptake, which differs by 20 % here. `:paper` has S0's and Palette's recipes and has not been run.
"""

from medsynth_jax import config as common
from medsynth_jax.diffusion import process, samplers

FOLDS = 2


def get_config(variant: str = ""):
  config = common.base(stages=("pix2pix", "ddpm", "unet"))
  # SUV is made, and shown in colour on the MR; data.targets=fusion learns the colours themselves
  config.data.update(source="t2", targets="pet", fusion="pet")
  config.data.simulated.folds = FOLDS
  config.pix2pix = common.stage(
    "pix2pix", gan="lsgan", l1=100.0,
    generator={"name": "unet_generator", "base": 64, "dropout": 0.5, "max_depth": 8},
    discriminator={"name": "patchgan", "base": 64, "n_layers": 3, "norm": "affine_instance"})
  config.pix2pix.optim.b1 = 0.5
  config.ddpm = common.stage(
    "ddpm", coarse="pix2pix", combine="concat", folds=FOLDS, start_at=0.4,
    network={"name": "diffusion_unet", "base": 64, "multiples": (1, 2, 4, 8), "blocks": 2,
             "attention": (), "heads": 1, "attention_kernel": "xla", "dropout": 0.2,
             "remat": False},
    diffusion={**process.DEFAULTS, "schedule": "palette", "steps": 2000, "continuous": True},
    sampler={**samplers.DEFAULTS, "name": "ddim", "steps": 50})
  config.unet = common.stage(
    "regression", loss="l1",
    generator={"name": "unet", "channels": (64, 128, 256, 512, 1024), "dropout": 0.0})
  return common.choose(config, variant, {"": laptop, "paper": paper, "test": test})


def laptop(config):
  """Small images: what two CPU cores train in minutes."""
  config.data.simulated.spacing = "4,4,4"
  config.data.size = "48,64"
  config.pix2pix.update(steps=2000, batch_size=2)
  config.pix2pix.generator.update(base=24, dropout=0.0, max_depth=4)
  config.pix2pix.discriminator.update(base=16, n_layers=2)
  config.pix2pix.optim.update(lr=4e-3, schedule="linear", hold=0.3, ema=0.99)
  config.ddpm.update(steps=2000, batch_size=4)
  config.ddpm.network.update(base=16, multiples=(1, 2, 4), blocks=1, groups=4, dropout=0.0)
  config.ddpm.diffusion.update(prediction="v")
  config.ddpm.sampler.update(name="dpm++", steps=15)
  config.ddpm.optim.update(lr=1e-3, schedule="cosine", ema=0.995, clip=1.0)
  config.unet.update(steps=3000, batch_size=2)
  config.unet.generator.channels = (16, 32, 64, 128)
  config.unet.optim.update(lr=4e-3, schedule="cosine", ema=0.99)
  config.update(validate_every=2000, validation_slices=16)
  config.synthesis.batch_size = 16


def paper(config):
  """S0's stages with Palette's diffusion recipe, the three-channel fusion image as the target."""
  config.data.update(size="256,256", targets="fusion")
  config.data.augment.update(zoom=1.117, shift=0.058)
  config.data.simulated.folds = config.ddpm.folds = 5
  config.pix2pix.update(steps=330_000, batch_size=1)  # 200 epochs of S0's 1664 pairs
  config.pix2pix.optim.update(lr=2e-4, schedule="linear", hold=0.5, ema=0.0)
  config.ddpm.update(steps=400_000, batch_size=4)
  config.ddpm.optim.update(lr=5e-5, ema=0.9999)
  config.unet.update(steps=100_000, batch_size=16)
  config.unet.optim.update(lr=2e-4, weight_decay=1e-2, schedule="cosine")
  config.validate_every = 20_000


def test(config):
  common.tiny(config)
  config.pix2pix.generator.update(base=4, max_depth=3)
  config.pix2pix.discriminator.update(base=4, n_layers=1)
  config.ddpm.network.update(base=8, multiples=(1, 2), blocks=1, groups=2)
  config.ddpm.sampler.steps = 3
  config.unet.generator.channels = (4, 8)
