"""Any MR contrast from any other by one GAN (S3; Dai et al., Med Phys 2020;47(12):6343).

  python -m medsynth_jax.main --config=configs/unified_gan.py --workdir=runs/unified_gan

Built-in simulated data of 4 mm (16 training, 2 test subjects), T1, T1c, T2 and FLAIR in all 12
directions, PSNR of the row's source -> the column's target in the body; 13 CPU minutes:

          T1     T1c    T2     FLAIR          constant, whatever the source
  T1             19.18  16.24  17.39          14.87  15.69  13.68  11.80
  T1c     18.67         16.21  17.12
  T2      16.68  17.32         16.18
  FLAIR   18.15  18.63  16.29

Mean 17.34 / 0.563; `constant` 14.01 / 0.191, `lut2` 18.15 / 0.651. All directions are above
`constant`, four above `lut2` in PSNR (T1 and T1c to T2 and FLAIR). Three times as long, with
`--config.steps=9000 --config.validate_every=3000` (40 CPU minutes, 70 beside
another job):

          T1     T1c    T2     FLAIR          lut2
  T1             20.55  19.01  19.09                 23.59  14.34  15.23
  T1c     20.51         19.20  18.76          23.90         14.45  15.60
  T2      18.52  19.01         18.49          18.17  18.71         17.77
  FLAIR   19.55  19.67  18.58                 19.38  19.44  17.18

Mean 19.25 / 0.742, above `lut2` in PSNR in all directions but T1 -> T1c and back, which differ in
vessels and lesions alone, and in SSIM too in seven. `:paper` has StarGAN's recipe and has not been
run.
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
  config.steps, config.batch_size, config.n_critic = 3000, 4, 1
  config.l1 = 100.0  # with 10 ten times the steps do not reach as far
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
