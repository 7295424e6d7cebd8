"""CycleGAN: scans of different patients, none of whom needs both (arXiv 1703.10593).

  python -m medsynth_jax.main --config=configs/cyclegan.py --workdir=runs/cyclegan

The best checkpoint is chosen on validation subjects that have both scans; without any it is the
latest.

Built-in simulated data of 4 mm (16 training, 2 test subjects), T1 -> T2, PSNR / SSIM in the body; 6
CPU minutes:

  cyclegan 11.42 / 0.017; constant 13.68 / 0.133; lut2 14.34 / 0.249; ceiling 34.83 / 0.982

After this short run it is below `constant`: nothing tells it which tissue is bright in a T2, and it
leaves the ventricles dark. `:paper` has not been run.
"""

from medsynth_jax import config as common


def get_config(variant: str = ""):
  config = common.single("cyclegan", common.base(), draw="unpaired", gan="lsgan", cycle=10.0,
                         identity=0.5, pool=50)
  config.data.channels = "one"
  config.generator = {"name": "resnet"}
  config.discriminator = {"name": "patchgan", "norm": "instance"}
  config.optim.update(b1=0.5)
  return common.choose(config, variant, {"": laptop, "paper": paper, "test": test})


def laptop(config):
  """Small images and nets: what two CPU cores train in minutes."""
  config.data.size = "48,64"
  config.data.simulated.spacing = "4,4,4"
  config.steps, config.batch_size = 2000, 2
  config.generator.update(base=16, blocks=4)
  config.discriminator.update(base=16, n_layers=2)
  config.optim.update(lr=1e-3, schedule="linear", hold=0.3, ema=0.99)
  config.update(validate_every=2000, validation_slices=32)


def paper(config):
  """The paper's: Adam 2e-4 (0.5, 0.999), batch 1, 100 epochs and 100 more linearly to 0.

  Epochs are of 2000 slices here.
  """
  config.data.size = "256,256"
  config.data.augment.update(zoom=1.117, shift=0.058, flip=True)
  config.steps, config.batch_size = 400_000, 1
  config.optim.update(lr=2e-4, schedule="linear", hold=0.5, ema=0.0)
  config.validate_every = 10_000


def test(config):
  common.tiny(config)
  config.pool = 2
  config.generator.update(base=4, blocks=1)
  config.discriminator.update(base=4, n_layers=1)
