"""The printed table of an evaluation: one part a direction, then what holds for the whole run."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from medsynth_jax import code_switch, config
from medsynth_jax.layout import aligned, number
from medsynth_jax.metrics import s3, uptake
from medsynth_jax.metrics.lumen import REACH
from medsynth_jax.metrics.summary import FEWEST, unit_of
from medsynth_jax.metrics.volume import PAPERS
from medsynth_jax.results import Results, verdicts
from medsynth_jax.scoring import Scale, roi_label, ssim_name


def table(parts: Sequence[Results]) -> str:
  """The printed tables of an evaluation, whose parts have a source each, with what was measured and
  how; in the end the code switch and the times."""
  stages = dict.fromkeys(stage for p in parts for stage in p.switches)
  switches = [code_switch.lines(stage, {p.source: p.switches[stage] for p in parts
                                        if stage in p.switches}) for stage in stages]
  return "\n\n".join([*(_direction(p, t) for p in parts for t in p.scales),
                      *("\n".join(lines) for lines in (*switches, _times(parts[0])))])


def _direction(results: Results, target: str) -> str:
  scale, protocols = results.scales[target], results.protocols[target]
  summary = results.summary(target)
  main = ["psnr", *(ssim_name(p) for p in protocols), "mae", "mse"]
  main += [] if scale.colour else ["nmae"]
  blocks = [
    [_title(results, target)], _grid(results, summary, main, spread=True),
    _in_regions(results, summary, "In regions:", ("mae_{}", "psnr_{}")),
    _lumen(results, scale, summary),
    *(_uptake(results, target, summary) if scale.uptake else ()),
    _papers(results, summary, scale), _s3(results, target, summary),
    _caption(results, target, scale, protocols), _verdict_lines(results, target),
    *(r.lines(stage) for stage, r in results.registered(target).items()),
    _groups(results, target), _correlation(results, target)]
  return "\n\n".join("\n".join(lines) for lines in blocks if lines)


def _title(results: Results, target: str) -> str:
  n = results.count(target)
  split = {"test": "test subjects", "train": "TRAINING subjects (the networks have seen them)",
           "validation": "VALIDATION subjects (they chose the checkpoint)"}[results.split]
  simulated = "simulated data, " if results.info.simulated else ""
  rendered = results.rendered and results.scales[target].colour
  how = " (rendered from the synthetic SUV)" if rendered else ""
  return f"{results.direction(target)}{how}: {simulated}n = {n} {split}"


# --- grids -----------------------------------------------------------------------------------


def _grid(results: Results, summary, metrics: Sequence[str], spread: bool = False) -> list[str]:
  """Aligned lines: a heading with units, then a line a row; mean, with `spread` also the SD."""
  body = [[_label(results, row), *(_cell(s.get(m), spread) for m in metrics)]
          for row, s in summary.items()]
  return aligned([*_heads(["row"], metrics, next(iter(summary.values()))), *body])


def _heads(first: Sequence[str], metrics: Sequence[str], summary) -> list[list[str]]:
  """Two heading lines: the metrics, and under them their units."""
  units = [summary[m]["unit"] for m in metrics]
  return [[*("" for _ in first), *metrics], [*first, *("" if u == "1" else u for u in units)]]


def _in_regions(results: Results, summary, title: str, metrics: Sequence[str]) -> list[str]:
  """A grid of metrics "mae_{}" in every region that some subject has."""
  names = [m.format(roi_label(r)) for r in results.info.rois for m in metrics]
  names = [m for m in names if any(s.get(m, {}).get("n") for s in summary.values())]
  return [title, *_grid(results, summary, names)] if names else []


def _lumen(results: Results, scale: Scale, summary) -> list[str]:
  """How well a CT shows the lumen of the vessels that a region holds."""
  if not results.lumen or scale.unit != "HU":
    return []
  region, threshold = results.lumen
  metrics = [f"{m}_{roi_label(region)}" for m in ("dice", "mae")]
  first = next(iter(summary.values()))
  own = first.get(f"{metrics[0]}_reference", {"n": 0})
  if not own["n"]:
    return [f"Lumen: no subject has the region '{region}'."]
  title = (f"Lumen of {own['n']} subjects: voxels above {threshold:g} HU in '{region}' or within"
           f" {REACH} voxels of it, against '{region}' (the reference's own dice:"
           f" {number(own['mean'])}):")
  return [title, *_grid(results, summary, metrics, spread=True)]


def _uptake(results: Results, target: str, summary) -> list[list[str]]:
  """The blocks of a PET target: errors in SUV of hot voxels and of the maxima and means."""
  lines = [f"Uptake (hot: reference above SUV {uptake.HOT:g}; auc: how well the image tells hot"
           " voxels from others, 0.5 is chance):",
           *_grid(results, summary, ["mae_hot", "bias_hot", "auc_hot", "suvmax_bias",
                                     "suvmean_bias"])]
  cold, hot = results.not_told(target)
  lines += [f"No voxel is hot, so that nothing hot is scored: {', '.join(cold)}."] if cold else []
  lines += [f"Every voxel is hot, so that there is no AUC: {', '.join(hot)}."] if hot else []
  place = summary.get("mean_image", {}).get("auc_hot", {}).get("mean")
  for stage in results.stages:
    own = summary[stage]["auc_hot"]["mean"]
    beside = f"{number(place)} of mean_image" if place is not None else \
      "no mean_image (grids differ, or no hot voxel)"
    if own is not None:
      lines.append(f"{stage} tells hot voxels with AUC {number(own)}, beside {beside}.")
  return [lines, _in_regions(results, summary, "Bias in regions:",
                             ("suvmax_bias_{}", "suvmean_bias_{}"))]


def _papers(results: Results, summary, scale: Scale) -> list[str]:
  """The scores by the papers' own conventions."""
  metrics = [m for p in PAPERS for m in next(iter(summary.values())) if m.endswith(f"_{p}")]
  title = ("By S0's own convention, means of whole slices with background outside the body:"
           if scale.colour else
           "By the papers' own conventions, means of whole slices with background outside"
           " the body (for their tables only; s2 doubles the peak: +48.13 dB):")
  return [title, *_grid(results, summary, metrics)]


def _s3(results: Results, target: str, summary) -> list[str]:
  """The scores by S3's own convention, where they were asked for."""
  if target not in results.s3:
    return []
  return ["By S3's own convention, in the mask of a volume, outside which both are the reference's"
          " minimum in it; range: the reference's maximum - minimum in the mask (VIF's 0..255); VIF"
          f" means over slices with {s3.ENOUGH:.0%} mask or more, weighted by its voxels:",
          *_grid(results, summary, s3.METRICS, spread=True),
          *results.s3[target].lines(results.source, summary, results.count(target))]


def _groups(results: Results, target: str) -> list[str]:
  """The scores of each group of subjects apart, where there are several."""
  found = results.by_group(target)
  if not found:
    return []
  metrics = list(next(iter(next(iter(found.values())).values())))
  unit = results.scales[target].unit
  heads = _heads(["row", "group", "n"], metrics, {m: {"unit": unit_of(m, unit)} for m in metrics})
  body = [[_label(results, row), group or "-", str(scores[metrics[0]]["n"]),
           *(_cell(scores[m], True) for m in metrics)]
          for row, cells in found.items() for group, scores in cells.items()]
  return ["By group (scanner or site):", *aligned([*heads, *body])]


def _correlation(results: Results, target: str) -> list[str]:
  """How the scores of slices go with their uptake."""
  found = results.correlations(target)
  if not found:
    return []
  names = [u.replace("suv", "SUV") for u in uptake.UPTAKES]
  body = [[_label(results, row), metric, *(_rho(cells[u]) for u in uptake.UPTAKES)]
          for row, metrics in found.items() for metric, cells in metrics.items()]
  slices = next(iter(results.slices[target, row] for row in found))
  count = sum(len(x["psnr"]) for x in slices.values())
  lines = ["Correlation of a slice's scores with its measured uptake (Spearman's rho of a subject's"
           f" slices, mean over subjects; {count} slices, each with {uptake.LEAST} mask voxels or"
           " more):",
           *aligned([["row", "metric", *names], *body])]
  return [*lines, "At a fixed range PSNR falls exactly when MSE rises: rho(PSNR) = -rho(MSE). Each"
          " subject's own, and Pearson's: uptake_correlation in summary.json."]


def _rho(cell: Mapping[str, Any]) -> str:
  if cell["mean"] is None:
    return "-"
  low, high = cell["ci95"] or (None, None)
  return f"{cell['mean']:+.2f}" + ("" if low is None else f" [{low:+.2f}, {high:+.2f}]")


def _label(results: Results, row: str) -> str:
  """The row's name, and in brackets what its readers have to know."""
  if row == "ceiling":
    return "ceiling (bound: noise-free)"
  stage, remarks = results.stages.get(row), []
  if stage:
    remarks = [*(["bound: sees the target"] if stage.bound else []),
               *([f"mean of {stage.samples} samples"] if stage.samples > 1 else []),
               *([stage.note] if stage.note else [])]
  return f"{row} ({'; '.join(remarks)})" if remarks else row


def _cell(entry: Mapping[str, Any] | None, spread: bool) -> str:
  if not entry or entry["mean"] is None:
    return "-"
  sd = f" ± {number(entry['sd'])}" if spread and entry["sd"] is not None else ""
  return number(entry["mean"]) + sd


# --- words -----------------------------------------------------------------------------------


def _caption(results: Results, target: str, scale: Scale, protocols: Iterable[str]) -> list[str]:
  steps = ", ".join(f"{name} at step {s.step}" for name, s in results.stages.items())
  reference = (" of each volume's own scaling (not clipped, never fitted to the image)"
               if scale.own else f", clipped to {scale.clip[0]:g}..{scale.clip[1]:g}"
               if scale.clip else "")
  unit = ("Colours 0..1, channels pooled, SSIM the mean of theirs; identity is the MR without"
          " uptake" if scale.colour else f"Unit: {scale.unit}{reference}")
  lines = [
    "Mean ± SD over subjects; voxels of a volume pooled over its body mask.",
    f"{unit}; PSNR and SSIM range {scale.data_range:g}.",
    f"SSIM: {', '.join(protocols)}; outside the mask both images are set to background first,"
    " in every row.",
    f"Checkpoints ({results.which}): {steps or 'none'}."]
  if results.count(target) < FEWEST:
    lines.append(f"Fewer than {FEWEST} subjects: no confidence interval.")
  if "lut" not in results.summary(target):
    lines.append("No training subject has both: the floor has no look-up tables and no mean image.")
  return lines


def _verdict_lines(results: Results, target: str) -> list[str]:
  lines = []
  for stage, found in verdicts(results, target).items():
    word = {True: "yes", False: "no", None: "cannot be said (no PSNR or no SSIM)"}[found.above]
    parts = [f"{m.upper()} {number(own)} vs {number(top)} of {row}"
             for m, (own, row, top) in found.best.items()]
    lines.append(f"{stage} above the floor: {word}" + (f" ({', '.join(parts)})" if parts else ""))
  return lines


def _times(results: Results) -> list[str]:
  """How long images (of all directions alike) and training took."""
  unit = "patch" if len(config.sizes(results.config.data.size)) == 3 else "slice"
  lines = []
  for name, stage in results.stages.items():
    speed, several = stage.speed, stage.samples > 1
    parts = [f"{number(speed.window)} s a {unit}{' and sample' if several else ''}",
             f"{number(speed.volume)} s a volume"
             + (f" of {stage.samples} samples" if several else "")]
    parts.append(f"compiled in {number(speed.compiling)} s")
    lines.append(f"Synthesis by {name}: {', '.join(parts)}.")
  times = ", ".join(f"{name} {number(seconds / 60)} min ({steps} steps)"
                    for name, (steps, seconds) in results.training.items())
  return [*lines, *([f"Trained: {times}; without compiling, validating and saving."]
                    if times else [])]

