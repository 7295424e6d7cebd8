"""Fields that all configs share, and how a config is read: stages, names, sizes.

A field lives in one place: at the top if all stages share it (`config.data`, `config.seed`), else
in each stage's section (`config.cldm.steps`). A config with one stage has its fields at the top.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

from medsynth_jax.data import fusion
from medsynth_jax.errors import UserError


def optim(**fields) -> ConfigDict:
  """Optimiser section: Adam(W) with schedule, clipping, moving average and accumulation."""
  return ConfigDict({
    "lr": 2e-4, "b1": 0.9, "b2": 0.999, "weight_decay": 0.0,
    "clip": 0.0,               # global gradient norm; 0: none
    "ema": 0.999,              # decay of the moving average that synthesis uses; 0: none
    "schedule": "constant", "hold": 0.5, "warmup": 0,
    "accumulate": 1,           # micro-batches of batch_size per update
    **fields})


def stage(method: str, **fields) -> dict[str, Any]:
  """Fields of one training stage, whatever its method."""
  return {
    "method": method, "steps": 1000, "batch_size": 8, "optim": optim(),
    "pretrained": "",          # a run whose stage of this name gives the first weights
    # how source and target are drawn: "pair"; "unpaired": of two subjects; "single": one image
    # alone; "any": any modality of a case as the source of any other, which the case may lack
    "draw": "pair",
    "balance": "",             # draw each of these equally often: "category", "category,group"
    "exclude_fold": -1,        # train without the cases of this fold; -1: with all
    "misalign": 0.0,           # simulated misalignment level n: n degrees, 2n % shift and scale
    "displace": 0.0,           # simulated smooth displacement of the target: mean length in mm
    "redraw": False,           # both anew each time a slice is drawn; else fixed for each volume
    **fields}


def base(**fields) -> ConfigDict:
  """Fields at the top of every config."""
  return ConfigDict({
    "seed": 0,
    "dtype": "float32",        # compute type of the networks; parameters and losses stay float32
    "conv_cure": "auto",       # convolutions rewritten for a CPU: "auto" (on a CPU), "on", "off"
    "data": {
      "dir": "",               # a prepared data set; empty: the built-in simulated one
      "source": "t1",          # "[a,b]" stacks several; "any": each of the targets, one at a time
      "targets": "t2",         # with source "any" empty: all modalities of the data set
      "channels": "own",       # of a source: its "own" (CT: three windows), or "one": as a target
      "size": "",              # "96,112" (or three numbers: 3-D patches); empty: holds every slice
      "fusion": "",            # a PET modality, shown in colour on the source MR: `data/fusion.py`
      "context": 0,            # 2.5-D: neighbouring slices on each side
      "missing": "skip",       # a case that lacks a source: "skip", or "zero" (a presence channel)
      "threads": 4, "prefetch": 2,
      "augment": {             # drawn anew for every example: see `augment.Augment`
        "flip": False, "rotate": 0.0, "shift": 0.0, "scale": 0.0, "zoom": 1.0,
        "gamma": 0.0, "contrast": 0.0},
      "simulated": {           # the built-in data set: see `phantom.write`
        "n_subjects": 20, "seed": 0, "folds": 0,
        "spacing": "2,2,2",    # mm
        "modalities": "",      # more than source and targets need
        "misaligned": "", "misalignment": 0.0,      # a modality, and by how many mm
        "missing": "none", "missing_share": 0.0,    # absent images: random, group, confounded
        "groups": 1,           # scanners
        "permute": False},     # targets of another subject: nothing can be learned
    },
    "mesh": {"fsdp": 1},       # devices over which parameters are split
    "log_every": 25,
    "validate_every": 1000,    # validate on held-out subjects, then save
    "validation_slices": 64,   # at most this many, evenly spread over the validation subjects
    # mirror: average with the image of the left-right mirrored scan (for nets trained with flips);
    # samples: evaluation scores their mean; noise: drawn for each "slice", or once a "volume"
    "synthesis": {"batch_size": 8, "overlap": 0.25, "mirror": False, "samples": 1,
                  "noise": "slice"},
    # s3: also S3's metrics, of MR; displace: mean mm of the known displacement by which a stage's
    # flow is measured; lumen: a region (column mask_<region>) of CT in which vessels are found
    "evaluation": {"ssim": "wang", "panels": 2, "s3": False, "displace": 4.0, "lumen": "",
                   "lumen_hu": 150.0},  # brighter than this
    **fields})


def single(method: str, config: ConfigDict, **fields) -> ConfigDict:
  """A config of one stage: the stage's fields join those at the top."""
  config.update(ConfigDict(stage(method, **fields)))
  return config


FOLD = "fold_"  # names of the stages trained without one fold


def stages(config: ConfigDict) -> dict[str, ConfigDict]:
  """{stage name: the section that holds its fields}, in training order.

  Before a stage with `folds` k stand fold_0 .. fold_{k-1}: copies of its `coarse` stage, each
  trained without one fold of the training subjects.
  """
  if "stages" not in config:
    return {config.method: config}
  sections: dict[str, ConfigDict] = {}
  for name in config.stages:
    section = config[name]
    if folds(section) and section.coarse not in config.stages:
      raise UserError(f"{name}.coarse={section.coarse!r}: no stage of this config; choose one of"
                      f" {', '.join(sections)}, or {name}.folds=0")
    for fold, stage in enumerate(folds(section)):
      sections[stage] = ConfigDict({**config[section.coarse].to_dict(), "exclude_fold": fold})
    sections[name] = section
  return sections


def folds(section: ConfigDict) -> tuple[str, ...]:
  """The stages that make a stage's coarse training images out of fold."""
  if section.get("combine", "") == "start":  # coarse images in synthesis only
    return ()
  return tuple(f"{FOLD}{i}" for i in range(section.get("folds", 0)))


def needs(section: ConfigDict) -> tuple[str, ...]:
  """Earlier stages whose served states a stage sees."""
  coarse = section.get("coarse", "")
  return tuple(dict.fromkeys((*folds(section), *([coarse] if coarse else []),
                              *section.get("needs", ()))))


def target_channels(config: ConfigDict) -> int:
  """Channels of the images to be made: 3 for a fusion of PET and MR, else 1."""
  return 3 if names(config.data.targets) == (fusion.NAME,) else 1


def check_symmetric(config: ConfigDict, stage: str,
                    why: str = "also makes the source from the target") -> None:
  """A UserError unless a source looks like a target, as a method needs that compares them."""
  data = config.data
  if (data.channels != "one" or data.context or len(names(data.source)) != 1
      or target_channels(config) != 1):
    raise UserError(f"stage '{stage}' {why}: set data.channels=one, data.context=0, one data.source"
                    " and a target of one channel")


def names(text: str) -> tuple[str, ...]:
  """The names in "a", "a,b" or "[a, b]"."""
  return tuple(n.strip().strip("'\"") for n in text.strip("[]() ").split(",") if n.strip())


def sizes(text: str) -> tuple[int, ...]:
  """The whole numbers in "96,112"; a UserError for anything else."""
  try:
    numbers = tuple(int(n) for n in names(text))
  except ValueError:
    raise UserError(f"data.size={text!r}: give whole numbers, as in 96,112") from None
  if len(numbers) not in (0, 2, 3) or any(n < 1 for n in numbers):
    raise UserError(f"data.size={text!r}: give two numbers (slices) or three (3-D patches)")
  return numbers


# smallest and largest sensible value of the fields that have them
RANGES = {
  "seed": (0, 2**32 - 1), "steps": (0, None), "batch_size": (1, None), "log_every": (1, None),
  "validate_every": (1, None), "validation_slices": (1, None), "mesh.fsdp": (1, None),
  "data.context": (0, None), "data.threads": (0, None), "data.prefetch": (1, None),
  "data.augment.zoom": (1e-3, None), "synthesis.batch_size": (1, None),
  "synthesis.overlap": (0, 0.95), "evaluation.panels": (0, None),
  "evaluation.displace": (0.1, None), "optim.accumulate": (1, None),
  "synthesis.samples": (1, None), "n_critic": (1, None), "pool": (1, None),
  "displace": (0, None), "misalign": (0, None), "folds": (0, None), "code_dropout": (0, 0.99),
  "guidance": (0, None), "start_at": (0.01, 1), "sampler.steps": (1, None),
  "sampler.eta": (0, 1), "diffusion.steps": (1, None), "min_snr_gamma": (1e-3, None),
  "optim.hold": (0, 1), "optim.ema": (0, 1), "optim.warmup": (0, None), "optim.clip": (0, None),
}


def check_ranges(config: ConfigDict) -> None:
  """A UserError for a field outside its range."""
  for field, value in flat(config.to_dict()).items():
    names = [name for name in RANGES if field == name or field.endswith("." + name)]
    for name in names:
      low, high = RANGES[name]
      if not low <= value <= (float("inf") if high is None else high):
        limits = f"{low} or more" if high is None else f"from {low} to {high}"
        raise UserError(f"config.{field}={value}: must be {limits}")


def to_json(config: ConfigDict) -> str:
  return json.dumps(config.to_dict(), indent=1, sort_keys=True)


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """{"data.dir": value}: nested fields by their dotted names; tuples as lists, as JSON has them."""
  fields = {}
  for name, value in config.items():
    if isinstance(value, Mapping):
      fields.update(flat(value, f"{prefix}{name}."))
    else:
      fields[prefix + name] = list(value) if isinstance(value, tuple) else value
  return fields


def differences(old: Mapping[str, Any], new: ConfigDict) -> list[str]:
  """Fields in which a run's config.json and this config differ, as "field: old -> new".

  Where the data lies, how many devices share the parameters, what is computed again to save memory,
  in which way convolutions and attention are, and how many slices are made at once may change; so
  may a larger `steps` of the last stage, if its learning rate is constant.
  """
  a, b = flat(old), flat(new.to_dict())
  last = list(stages(new))[-1]
  prefix = f"{last}." if "stages" in new else ""
  grown = prefix + "steps"
  free = {"conv_cure", "data.dir", "mesh.fsdp", "synthesis.batch_size",
          *(f for f in b if f.endswith((".remat", ".attention_kernel")))}
  if b[prefix + "optim.schedule"] == "constant" and b[grown] >= a.get(grown, b[grown]):
    free.add(grown)
  absent = object()
  return [f"{f}: {a.get(f, 'absent')} -> {b.get(f, 'absent')}" for f in sorted({*a, *b} - free)
          if a.get(f, absent) != b.get(f, absent)]


def choose(config: ConfigDict, variant: str, variants: Mapping[str, Callable]) -> ConfigDict:
  """Applies a config's variant: `laptop` is the default, `paper` the published recipe."""
  if variant not in variants:
    raise UserError(f"config variant {variant!r}: choose one of"
                    f" {', '.join(v or '(none)' for v in variants)}")
  variants[variant](config)
  return config


def tiny(config: ConfigDict) -> None:
  """What every `test` variant shares: seconds on one core, a few tiny simulated subjects."""
  config.data.size = "32,32"
  config.data.threads = 0
  config.data.simulated.update(n_subjects=6, spacing="8,8,8")
  config.update(log_every=1, validate_every=2, validation_slices=4)
  config.synthesis.batch_size = 4
  for section in stages(config).values():
    section.update(steps=4, batch_size=2)
