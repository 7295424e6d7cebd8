"""S2 (Lee et al. 2020): CT to T2 MR, ResNet-9 and patch discriminator, cross-entropy + 10 L1.

  python -m medsynth_jax.main --config=configs/spine_ct2mr.py --workdir=runs/spine_ct2mr

CT -> T2 of the head on the built-in simulated data (16 training, 2 test subjects), PSNR / SSIM in
the body: 19.20 dB / 0.604; floor (lut2) 17.67 / 0.529; ceiling 33.36 / 0.964. The short run leaves
a faint grid from the transposed convolutions. `:paper` has the paper's networks (11.38M and 7.03M)
and steps; it has not been run.
"""

from medsynth_jax import config as common


def get_config(variant: str = ""):
  config = common.single("pix2pix", common.base())
  config.data.update(source="ct", targets="t2")
  config.gan, config.l1 = "cross_entropy", 10.0
  config.generator = {"name": "resnet", "base": 64, "blocks": 9, "norm": "affine_instance",
                      "initializer": "truncated_0.02"}
  config.discriminator = {"name": "spine_discriminator", "base": 64}
  config.optim.update(b1=0.5)
  return common.choose(config, variant, {"": laptop, "paper": paper, "test": test})


def laptop(config):
  config.steps, config.batch_size = 2500, 2
  config.generator.update(base=16, blocks=3)
  config.discriminator.update(base=8)
  config.optim.update(lr=4e-3, schedule="linear", hold=0.3, ema=0.99)


def paper(config):
  """Adam 2e-4 (0.5, 0.999), batch 1, 2e5 iterations: 1e5 constant, then linearly.

  The paper's decay is sized for 2e5 more iterations than were run, so that it ended at 1e-4; here
  it reaches 0 at the last step. 286 -> random crop 256 and left-right flip, one draw for both.
  """
  config.data.size = "256,256"
  config.data.augment.update(flip=True, zoom=1.117, shift=0.058)
  config.steps, config.batch_size = 200_000, 1
  config.optim.update(lr=2e-4, schedule="linear", hold=0.5, ema=0.0)
  config.validate_every = 5000


def test(config):
  common.tiny(config)
  config.generator.update(base=4, blocks=1)
  config.discriminator.update(base=4, multiples=(1, 2))
