"""Any MR contrast from any other by one GAN (S3; Dai et al., Med Phys 2020;47(12):6343).

  python -m medsynth_jax.main --config=configs/unified_gan.py --workdir=runs/unified_gan

Built-in simulated data of 4 mm (16 training, 2 test subjects), T1, T1c, T2 and FLAIR in all 12
directions, PSNR of the row's source -> the column's target in the body; 18 CPU minutes:

          T1     T1c    T2     FLAIR          constant, whatever the source
  T1             18.66  14.30  16.15          14.87  15.69  13.68  11.80
  T1c     18.16         14.33  15.79
  T2      14.86  15.47         14.16
  FLAIR   17.38  17.70  14.73

SSIM is 0.25 to 0.69, `constant` 0.13 to 0.25. After this short run ten directions are above
`constant` in both scores, T2 -> T1 and T2 -> T1c in SSIM alone, and T1 -> FLAIR is the only one
above `lut2`. `:paper` has StarGAN's recipe and has not been run.
"""

from medsynth_jax import config as common


def get_config(variant: str = ""):
  config = common.single("unified_gan", common.base(), draw="any", n_critic=5)
  config.data.update(source="any", targets="t1,t1c,t2,flair")
  config.generator = {"name": "stargan_generator", "base": 64, "blocks": 6}
  config.discriminator = {"name": "stargan_discriminator", "base": 64, "layers": 6}
  config.update(classification=1.0, penalty=10.0, cycle=10.0, l1=10.0)
  config.optim.update(b1=0.5)
  config.evaluation.s3 = True
  return common.choose(config, variant, {"": laptop, "paper": paper, "test": test})


def laptop(config):
  """Small images and nets: what two CPU cores train in minutes."""
  config.data.size = "48,64"
  config.data.simulated.spacing = "4,4,4"
  config.steps, config.batch_size, config.n_critic = 4000, 4, 1
  config.generator.update(base=24, blocks=4)
  config.discriminator.update(base=16, layers=4)
  config.optim.update(lr=1e-3, schedule="linear", hold=0.3, ema=0.99)
  config.update(validate_every=2000, validation_slices=48)


def paper(config):
  """StarGAN's recipe: 200,000 batches of 16, the rate linearly to 0 over the second half."""
  config.data.size = "240,240"
  config.data.augment.flip = True
  config.steps, config.batch_size = 200_000, 16
  config.optim.update(lr=1e-4, schedule="linear", hold=0.5, ema=0.0)
  config.validate_every = 10_000


def test(config):
  common.tiny(config)
  config.n_critic = 2
  config.generator.update(base=4, blocks=1)
  config.discriminator.update(base=4, layers=3)
