"""The built-in simulated data set of a run, made by the same `prepare` as anybody's scans."""

from pathlib import Path

from ml_collections import ConfigDict

from medsynth_jax import config as configs
from medsynth_jax import prepare
from medsynth_jax.data import phantom


def make(config: ConfigDict, workdir: Path) -> Path:
  """Writes RUN/scans (NIfTI files, cases.csv) and prepares RUN/data from it; returns RUN/data.

  What is there already, from the same fields, is kept.
  """
  simulated, data = config.data.simulated, config.data
  sources, targets = configs.names(data.source), configs.names(data.targets)
  table = phantom.write(
    workdir / "scans", n_subjects=simulated.n_subjects, seed=simulated.seed,
    modalities=(*sources, *targets), sources=sources, spacing=(simulated.spacing,) * 3,
    permute=simulated.permute)
  fields = prepare.default_config()
  fields.update(table=str(table), out=str(workdir / "data"), name="built-in simulated subjects",
                simulated=True, seed=simulated.seed, folds=simulated.folds)
  return prepare.prepare(fields)
