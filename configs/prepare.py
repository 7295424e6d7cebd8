"""Scans on disk to a data set.

  python -m medsynth_jax.prepare --config=configs/prepare.py \
    --config.table=cases.csv --config.out=DATA

The table has one row a patient visit: `subject`, a column a modality with image files or folders,
and if wanted `session`, `split`, `fold`, `group`, `mask`, `mask_<region>`. Every field below can be
set as `--config.field=value`. To set the type or the rules of modalities, name them after a colon:

  --config=configs/prepare.py:phase2,t1 --config.modalities.phase2.type=ct \
    --config.modalities.t1.target="percentile 0.5 99.5"
"""

from medsynth_jax import prepare


def get_config(variant: str = ""):
  """All fields with their defaults, described in `medsynth_jax.prepare.default_config`."""
  return prepare.default_config([m for m in variant.split(",") if m])
