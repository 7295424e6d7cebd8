"""Model inputs from physical slices: the same functions for training, evaluation and a new scan."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from medsynth_jax import config as configs
from medsynth_jax.data import fusion
from medsynth_jax.data.dataset import Case, Info
from medsynth_jax.data.intensities import Scaling, to_model
from medsynth_jax.errors import UserError

MISSING = ("skip", "zero")
CHANNELS = ("own", "one")
ANY = "any"  # as `data.source`: each of the targets, one at a time
BACKGROUND = -1.0


@dataclasses.dataclass(frozen=True)
class Task:
  """What is made from what: sources, targets, the network's input size, 2.5-D context.

  `fusion` is the PET modality that is shown in colour on the first source: learned so (targets is
  "fusion"), or rendered from a synthetic PET; empty where there is no fusion. With `one_channel` a
  source is scaled as a target is. With `any_source` the sources are the targets, one at a time.
  """
  sources: tuple[str, ...]
  targets: tuple[str, ...]
  size: tuple[int, ...]
  context: int = 0
  presence: bool = False
  fusion: str = ""
  one_channel: bool = False
  any_source: bool = False

  @property
  def direction(self) -> str:
    return ANY if self.any_source else "+".join(self.sources)

  @property
  def views(self) -> tuple["Task", ...]:
    """This task, or with `any_source` that of each source and all other targets."""
    if not self.any_source:
      return (self,)
    return tuple(dataclasses.replace(
      self, sources=(s,), targets=tuple(t for t in self.targets if t != s), any_source=False)
      for s in self.sources)

  def channels(self, info: Info) -> int:
    """Channels of `source`."""
    one = sum(self.channels_of(m, info) + self.presence for m in self.sources)
    return (1 if self.any_source else one) * (2 * self.context + 1)

  def channels_of(self, source: str, info: Info) -> int:
    """Channels of one source."""
    return 1 if self.one_channel else info.modality(source).channels

  def scalings(self, image) -> tuple[Scaling, ...]:
    """Those of a source's channels; `image` has `source` and `target`, as `dataset.Image`."""
    return (image.target,) if self.one_channel else image.source

  @property
  def target_channels(self) -> int:
    """Channels of `target`."""
    return 3 if fusion.NAME in self.targets else 1

  def measured(self, target: str) -> str:
    """The modality that a target is measured by: the PET of a fusion, else the target."""
    return self.fusion if target == fusion.NAME else target


def make_task(data: ConfigDict, info: Info, factor: int = 1) -> Task:
  """The task of a config on a data set.

  Args:
    data: the section `config.data`.
    factor: every size must be a multiple of it; with an empty `data.size` the largest slice of the
      data set is rounded up to it.

  Raises:
    UserError: unknown modality, source among the targets, bad context, size, missing policy or
      fusion.
  """
  sources, targets = configs.names(data.source), configs.names(data.targets)
  any_source = sources == (ANY,)
  if any_source:
    sources = targets = _all_of(targets, data, info)
  for field, chosen in (("data.source", sources), ("data.targets", targets)):
    if not chosen:
      raise UserError(f"{field} is empty; the data set has {', '.join(info.names)}")
    for name in chosen:
      if name not in info.names and (name, field) != (fusion.NAME, "data.targets"):
        raise UserError(f"{field}: unknown modality '{name}'; the data set has"
                        f" {', '.join(info.names)}")
  if data.get("channels", "own") not in CHANNELS:
    raise UserError(f"data.channels={data.channels!r}: choose one of {', '.join(CHANNELS)}")
  if set(sources) & set(targets) and not any_source:
    raise UserError(f"data.source and data.targets share {sorted(set(sources) & set(targets))}")
  _check_fusion(data.get("fusion", ""), sources, targets, info)
  if data.missing not in MISSING:
    raise UserError(f"data.missing={data.missing!r}: choose one of {', '.join(MISSING)}")
  size = configs.sizes(data.size)
  if not size:
    step = np.lcm(factor, 16)
    planes = np.array([in_plane(c, info) for c in info.cases]).max(0)
    size = tuple(int(-(-n // step) * step) for n in planes)
  if any(n % factor for n in size):
    good = ",".join(str(-(-n // factor) * factor) for n in size)
    raise UserError(f"data.size={','.join(map(str, size))} is not divisible by {factor}, which the"
                    f" network needs; use {good}")
  if data.context < 0 or (data.context and len(size) == 3):
    raise UserError(f"data.context={data.context}: neighbouring slices are 0 or more, in 2-D only")
  return Task(sources, targets, size, data.context, data.missing == "zero", data.get("fusion", ""),
              any_source or data.get("channels", "own") == "one", any_source)


def _all_of(targets: tuple[str, ...], data: ConfigDict, info: Info) -> tuple[str, ...]:
  """The modalities of a task in which each is source and target; empty `targets`: all there are."""
  found = targets or info.names
  if len(found) < 2:
    raise UserError(f"data.source=any makes each of several modalities from each other; this run"
                    f" has {', '.join(found)} alone: name two or more in data.targets")
  if data.context or data.missing == "zero" or data.get("fusion", "") or fusion.NAME in found:
    raise UserError("data.source=any takes one image at a time: set data.context=0,"
                    " data.missing=skip and data.fusion=''")
  return found


def _check_fusion(pet: str, sources: tuple[str, ...], targets: tuple[str, ...],
                  info: Info) -> None:
  learned = fusion.NAME in targets
  if learned and len(targets) > 1:
    raise UserError(f"data.targets={','.join(targets)}: a fusion image has three channels, so it"
                    " is the only target of its run")
  pets = [n for n in info.names if info.modality(n).type == "pet"]
  if not pet:
    if learned:
      raise UserError("data.targets=fusion shows a PET on the source: say which by data.fusion;"
                      f" this data set has {', '.join(pets) or 'none'}")
    return
  if pet not in pets:
    raise UserError(f"data.fusion='{pet}' is no PET modality; this data set has"
                    f" {', '.join(pets) or 'none'} (the type is set when it is prepared); without"
                    " a fusion image set data.fusion=''")
  if info.modality(sources[0]).type != "mr":
    raise UserError(f"data.fusion={pet}: PET is shown on the first source, which must be an MR;"
                    f" '{sources[0]}' is of type {info.modality(sources[0]).type}")
  if pet in sources or not (learned or pet in targets):
    raise UserError(f"data.fusion={pet}: it is to be synthesised; set data.targets=fusion to learn"
                    f" the colour image, data.targets={pet} to render it afterwards, or without a"
                    " fusion image data.fusion=''")


def in_plane(case: Case, info: Info) -> tuple[int, ...]:
  """The shape of a case's slices."""
  return tuple(n for axis, n in enumerate(case.shape) if axis != info.plane)


def has_sources(case: Case, task: Task) -> bool:
  """Whether a case has the sources (any of them, with a presence channel)."""
  return (any if task.presence else all)(m in case.images for m in task.sources)


def usable(case: Case, task: Task, target: str) -> bool:
  """Whether a case has the target and the sources.

  A fusion needs the first source, on which it is shown.
  """
  if target == fusion.NAME and task.sources[0] not in case.images:
    return False
  return task.measured(target) in case.images and has_sources(case, task)


def directions(task: Task) -> tuple[tuple[str, str], ...]:
  """(source, target) of every direction of a task of any source, in order."""
  return tuple((view.sources[0], t) for view in task.views for t in view.targets)


def source_channels(images: Mapping[str, np.ndarray], scalings: Mapping[str, Sequence[Scaling]],
                    task: Task, info: Info) -> np.ndarray:
  """Physical source slices [n, H, W] as model channels float32 [n, H, W, C] (context not yet in).

  A missing source is background, and with `task.presence` each source carries a channel that is 1
  where it is there and -1 where not.
  """
  shape = next(iter(images.values())).shape
  channels = []
  for name in task.sources:
    if name in images:
      channels += [to_model(s, images[name]) for s in scalings[name]]
    else:
      channels += [np.full(shape, BACKGROUND)] * task.channels_of(name, info)
    if task.presence:
      channels.append(np.full(shape, 1.0 if name in images else -1.0))
  return np.stack(channels, -1).astype(np.float32)


def case_source(arrays: Mapping[str, Any], case: Case, task: Task, info: Info) -> np.ndarray:
  """`source_channels` of a case of the data set."""
  images = {m: arrays["images"][m] for m in task.sources if m in case.images}
  return source_channels(images, {m: task.scalings(case.images[m]) for m in images}, task, info)


def case_target(arrays: Mapping[str, Any], case: Case, task: Task, info: Info,
                target: str) -> np.ndarray:
  """The target of a case in model units, float32 [n, H, W, C]; C is 3 for a fusion, else 1.

  The scaling is the case's own as a target.
  """
  if target == fusion.NAME:
    suv = arrays["images"][task.fusion]
    return 2 * fused(case_source(arrays, case, task, info), suv) - 1
  image = to_model(case.images[target].target, arrays["images"][target])
  return image[..., None].astype(np.float32)


def fused(source: np.ndarray, suv: np.ndarray) -> np.ndarray:
  """The fusion image [n, H, W, 3] in 0..1 of `source` [n, H, W, C] (its first channel) and SUV."""
  return fusion.render((source[..., 0] + 1) / 2, suv).astype(np.float32)


def single_images(task: Task, info: Info) -> tuple[tuple[str, int], ...]:
  """The one-channel images that a task is made of: (modality, channel) each.

  Of a source every channel once (two by the same rule are one image); of a target, and of a source
  that is scaled like one, its target scaling, as channel -1.
  """
  if task.one_channel:
    return tuple((name, -1) for name in dict.fromkeys((*task.sources, *task.targets)))
  images = []
  for name in task.sources:
    rules = info.modality(name).source
    images += [(name, i) for i, rule in enumerate(rules) if rule not in rules[:i]]
  return (*images, *((name, -1) for name in task.targets))


def case_image(arrays: Mapping[str, Any], case: Case, modality: str, channel: int) -> np.ndarray:
  """One of `single_images` in model units, float32 [n, H, W, 1]."""
  image = case.images[modality]
  scaling = image.target if channel < 0 else image.source[channel]
  return to_model(scaling, arrays["images"][modality])[..., None].astype(np.float32)


def case_valid(arrays: Mapping[str, Any], case: Case, task: Task, target: str) -> np.ndarray:
  """Where the target and every present source were measured, bool [n, H, W]."""
  sides = (task.measured(target), *task.sources)
  there = [arrays["valid"][m] for m in sides if m in case.images]
  return np.logical_and.reduce(there)


def neighbours(k: int, count: int, context: int) -> np.ndarray:
  """Numbers of the slices around slice k, the volume's ends repeated."""
  return np.clip(np.arange(k - context, k + context + 1), 0, count - 1)


def stack_context(slices: np.ndarray) -> np.ndarray:
  """[2c + 1, H, W, C] -> [H, W, (2c + 1) C], offset by offset."""
  return np.concatenate(list(slices), -1)
