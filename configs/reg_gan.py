"""RegGAN: pairs that do not line up, by a registration network (arXiv 2110.06465).

  python -m medsynth_jax.main --config=configs/reg_gan.py --workdir=runs/reg_gan

Modes by fields: NC+R as it is; NC with `--config.correction=0 --config.smoothness=0`; C+R with
`--config.cycle=10`; C with all three. `:pix2pix` is RegGAN's baseline without registration.

Built-in simulated data of 4 mm (16 training, 2 test subjects), T1 -> T2, training targets displaced
by 8 mm, scored against aligned ones, PSNR / SSIM in the body; 7 CPU minutes:

  reg_gan 17.58 / 0.614; floor (best row) 14.96 / 0.249; ceiling 34.83 / 0.982

On test subjects displaced by a known 8 mm the flow is wrong by 4.1 mm where the zero flow is by 8.4
(ratio 0.49), without displacement it is 2.3 mm (0.57 voxel) long, nothing folds, and the image is
shifted by 0.10 voxel against the aligned reference. With more subjects and a smoother flow
(`--config.data.simulated.n_subjects=40 --config.smoothness=40 --config.steps=6000`, 9 CPU minutes):

  reg_gan 18.75 / 0.671; floor 15.50 / 0.294; ratio 0.41; 1.7 mm (0.43 voxel) without displacement

`:paper` has not been run.
"""

from medsynth_jax import config as common


def get_config(variant: str = ""):
  config = common.single("reg_gan", common.base(), gan="lsgan", conditional=False, adversarial=1.0,
                         correction=20.0, smoothness=10.0, mean_flow=0.0, l1=0.0, change=0.0,
                         cycle=0.0)
  config.bright = {"weight": 0.0, "above": 0.0}
  config.data.channels = "one"
  config.generator = {"name": "resnet", "initializer": "torch"}
  config.discriminator = {"name": "patchgan", "norm": "instance", "initializer": "torch",
                          "pooled": True}
  config.registration = {"name": "registration_resunet"}
  config.optim.update(lr=1e-4, b1=0.5)
  return common.choose(config, variant, {"": laptop, "paper": paper, "test": test,
                                         "pix2pix": pix2pix})


def laptop(config):
  """Small nets; targets displaced by 8 mm, anew each time: there is something to register."""
  config.data.size = "48,64"
  config.data.simulated.spacing = "4,4,4"
  config.displace, config.redraw, config.evaluation.displace = 8.0, True, 8.0
  config.steps, config.batch_size = 4000, 2
  config.generator.update(base=16, blocks=4)
  config.discriminator.update(base=16, n_layers=2)
  config.registration.channels = (16, 32, 32, 32)
  config.optim.update(lr=1e-3, schedule="linear", hold=0.3, ema=0.99)
  config.update(validate_every=2000, validation_slices=32)


def paper(config):
  """RegGAN's: Adam 1e-4 (0.5, 0.999) without decay, batch 1, 80 epochs (here of 5000 slices)."""
  config.data.size = "256,256"
  config.steps, config.batch_size = 400_000, 1
  config.optim.ema = 0.0
  config.validate_every = 10_000


def pix2pix(config):
  """RegGAN's pix2pix: the laptop variant's nets, no registration, L1 against the target itself."""
  laptop(config)
  config.update(correction=0.0, smoothness=0.0, l1=100.0)


def test(config):
  common.tiny(config)
  config.displace = 4.0
  config.generator.update(base=4, blocks=1)
  config.discriminator.update(base=4, n_layers=1)
  config.registration.channels = (4, 8)
