"""What a sweep found: results.csv, table.md and curve.png, from the evaluations of its trials."""

import csv
import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from launch.trials import Trial, label
from medsynth_jax.results import FLOOR
from medsynth_jax.scoring import ssim_name

METRICS = ("psnr", "ssim", "mae")
BESIDE = (*FLOOR, "ceiling")  # rows that no training changes
DASHED = {"lut2": (0, (5, 2)), "constant": (0, (2, 2))}  # the floor in the figure


def write(trials: Sequence[Trial], asked: int, out: Path) -> str:
  """Writes the three files from finished trials (of `asked`); returns the table."""
  axes = list(trials[0].grid)
  lines = [line for trial in trials for line in read(trial)]
  with open(out / "results.csv", "w", newline="") as file:
    writer = csv.DictWriter(file, ["trial", "config", *axes, "seed", "direction", "row", *METRICS,
                                   "unit"])
    writer.writeheader()
    writer.writerows(lines)
  text = table(lines, axes, len(trials), asked)
  (out / "table.md").write_text(text)
  draw(lines, axes, out / "curve.png")
  return text


def read(trial: Trial) -> list[dict]:
  """A trial's lines: means over its test subjects, a line a direction and row."""
  summary = json.loads((trial.folder / "evaluation" / "summary.json").read_text())
  lines = []
  for (direction, rows), (_, target) in zip(summary["scores"].items(),
                                            summary["protocol"]["targets"].items(), strict=True):
    names = {"psnr": "psnr", "ssim": ssim_name(target["ssim"][0]), "mae": "mae"}
    for row, scores in rows.items():
      found = {m: scores[name]["mean"] for m, name in names.items()}
      lines.append({"trial": trial.run, "config": label(trial.name), **trial.grid,
                    "seed": trial.seed, "direction": direction, "row": row, "unit": target["unit"],
                    **{m: "" if v is None else v for m, v in found.items()}})
  return lines


# --- means over seeds ------------------------------------------------------------------------


def grouped(lines: Iterable[Mapping], keys: Sequence[str]) -> dict[tuple, dict]:
  """{values of the keys: {metric: (mean, SD, n)}}, in the lines' order."""
  found: dict[tuple, list] = {}
  for line in lines:
    found.setdefault(tuple(line[k] for k in keys), []).append(line)
  return {key: {m: _mean([float(line[m]) for line in own if line[m] != ""]) for m in METRICS}
          for key, own in found.items()}


def _mean(values: Sequence[float]) -> tuple[float, float, int]:
  """(mean, SD, n); NaN where there are too few."""
  n = len(values)
  return (statistics.fmean(values) if n else math.nan,
          statistics.stdev(values) if n > 1 and all(map(math.isfinite, values)) else math.nan, n)


def alike(scores: Iterable[Mapping]) -> bool:
  """Whether a row scores the same at all points, as the floor does on one data set."""
  first, *others = scores
  return all(math.isclose(first[m][0], x[m][0], rel_tol=1e-6) or first[m][2] == x[m][2] == 0
             for x in others for m in METRICS)


# --- the table -------------------------------------------------------------------------------


def table(lines: Sequence[Mapping], axes: Sequence[str], done: int, asked: int) -> str:
  """Markdown: of each direction the rows without training once, then the networks."""
  seeds = sorted({line["seed"] for line in lines})
  text = [f"{done} of {asked} trials finished; means over their test subjects, then mean ± SD over"
          f" seeds ({', '.join(map(str, seeds))})."]
  for direction in dict.fromkeys(line["direction"] for line in lines):
    own = [line for line in lines if line["direction"] == direction]
    heads = ["config", "row", *map(plain, axes), "seeds", "PSNR [dB]", "SSIM",
             f"MAE [{own[0]['unit']}]"]
    text += ["", f"### {direction}", "", *_markdown(heads, _body(own, axes)),
             *_changes(own, axes)]
  return "\n".join(text) + "\n"


def plain(field: str) -> str:
  return field.removeprefix("config.")


def _body(lines: Sequence[Mapping], axes: Sequence[str]) -> list[list[str]]:
  body, networks = [], [line for line in lines if line["row"] not in BESIDE]
  for row in dict.fromkeys(line["row"] for line in lines if line["row"] in BESIDE):
    own = [line for line in lines if line["row"] == row]
    points = grouped(own, ("config", *axes))
    once = {("-", *("" for _ in axes)): next(iter(grouped(own, ("row",)).values()))}
    for (config, *values), scores in (once if alike(points.values()) else points).items():
      body.append([config, row, *values, "", *_cells(scores, spread=False)])
  for (config, row, *values), scores in grouped(networks, ("config", "row", *axes)).items():
    body.append([config, row, *values, str(max(scores[m][2] for m in METRICS)), *_cells(scores)])
  return body


def _cells(scores: Mapping, spread: bool = True) -> list[str]:
  return [_number(m, scores[m][0])
          + (f" ± {_number(m, scores[m][1])}" if spread and scores[m][1] == scores[m][1] else "")
          for m in METRICS]


def _number(metric: str, value: float) -> str:
  if value != value:
    return "-"
  return f"{value:.2f}" if metric == "psnr" or value >= 10 else f"{value:.3f}"


def _changes(lines: Sequence[Mapping], axes: Sequence[str]) -> list[str]:
  """What each network gains or loses from the least to the greatest value of the first axis."""
  if not axes or numeric(lines, axes[0]) is None:
    return []
  values = sorted({line[axes[0]] for line in lines}, key=float)
  first, last, told = values[0], values[-1], []
  for title, own in curves(lines, axes[1:]).items():
    points = grouped(own, (axes[0],))
    if first != last and {(first,), (last,)} <= points.keys():
      parts = (f"{m.upper()} {points[last,][m][0] - points[first,][m][0]:+.{d}f}"
               for m, d in (("psnr", 2), ("ssim", 3)))
      told.append(f"- {title}: {', '.join(parts)}")
  return ["", f"Change from {plain(axes[0])}={first} to {last}:", "", *told] if told else []


def curves(lines: Iterable[Mapping], further: Sequence[str]) -> dict[str, list[Mapping]]:
  """{title: lines} of each network: its config, its stage if there are several, `further` values.
  """
  networks = [line for line in lines if line["row"] not in BESIDE]
  rows: dict[str, set] = {}
  for line in networks:
    rows.setdefault(line["config"], set()).add(line["row"])
  found: dict[str, list] = {}
  for line in networks:
    stage = [line["row"]] if len(rows[line["config"]]) > 1 else []
    title = " ".join([line["config"], *stage, *(f"{plain(f)}={line[f]}" for f in further)])
    found.setdefault(title, []).append(line)
  return found


def _markdown(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
  return [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *body)]


# --- the figure ------------------------------------------------------------------------------


def numeric(lines: Iterable[Mapping], axis: str) -> dict[str, float] | None:
  """{value of an axis as written: its number}; None if one is none."""
  try:
    return {line[axis]: float(line[axis]) for line in lines}
  except ValueError:
    return None


def draw(lines: Sequence[Mapping], axes: Sequence[str], path: Path) -> None:
  """Scores against the first axis (else the configs): a row a direction, a column a metric.

  One curve a config, stage and further grid values, with the SD over seeds; lut2 and the constant
  dashed.
  """
  import matplotlib
  matplotlib.use("Agg")
  from matplotlib import pyplot as plt
  axis = axes[0] if axes else "config"
  values = list(dict.fromkeys(line[axis] for line in lines))
  places = numeric(lines, axis) or {value: i for i, value in enumerate(values)}
  directions = list(dict.fromkeys(line["direction"] for line in lines))
  figure, panels = plt.subplots(len(directions), 3, squeeze=False, layout="constrained",
                                figsize=(12, 0.6 + 3.6 * len(directions)))
  for direction, row in zip(directions, panels, strict=True):
    own = [line for line in lines if line["direction"] == direction]
    heads = ("PSNR (dB)", "SSIM", f"MAE ({own[0]['unit']})")
    for metric, head, panel in zip(METRICS, heads, row, strict=True):
      _floor(panel, own, axis, places, metric)
      _curves(panel, own, axis, places, metric, axes[1:])
      panel.set(xlabel=plain(axis), ylabel=head, title=direction.replace("->", " to "))
      panel.grid(alpha=0.25)
      _ticks(panel, places, numeric(lines, axis) is not None)
  handles, labels = panels[0, 0].get_legend_handles_labels()
  figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)),
                frameon=False)
  figure.savefig(path, dpi=150)
  plt.close(figure)


def _floor(panel, lines: Sequence[Mapping], axis: str, places: Mapping, metric: str) -> None:
  for grey, (row, dashes) in zip(("0.25", "0.6"), DASHED.items(), strict=True):
    own = [line for line in lines if line["row"] == row]
    points = grouped(own, (axis,))
    # a mean over configs of different data would be nobody's floor
    if not points or not all(alike(grouped(part, ("config",)).values()) for part in
                             _apart(own, axis)):
      continue
    style = {"color": grey, "linestyle": dashes, "linewidth": 1.5, "label": f"{row} (floor)"}
    if alike(points.values()):
      panel.axhline(next(iter(points.values()))[metric][0], **style)
    else:
      panel.plot(*_xy(points, places, metric)[:2], **style)


def _apart(lines: Sequence[Mapping], axis: str) -> list[list[Mapping]]:
  """The lines of each value of the axis."""
  values = dict.fromkeys(line[axis] for line in lines)
  return [[line for line in lines if line[axis] == value] for value in values]


def _curves(panel, lines: Sequence[Mapping], axis: str, places: Mapping, metric: str,
            further: Sequence[str]) -> None:
  for number, (title, own) in enumerate(curves(lines, further).items()):
    x, y, sd = _xy(grouped(own, (axis,)), places, metric)
    panel.errorbar(x, y, yerr=sd if any(sd) else None, color=f"C{number % 10}", capsize=3,
                   marker="os^Dv"[number % 5], markersize=5, label=title)


def _xy(points: Mapping, places: Mapping, metric: str) -> tuple[list, list, list]:
  """Places, means and SD (0 for one seed) along the axis."""
  found = sorted((places[value], *scores[metric][:2]) for (value,), scores in points.items())
  return [f[0] for f in found], [f[1] for f in found], [0 if f[2] != f[2] else f[2] for f in found]


def _ticks(panel, places: Mapping[str, float], numbers: bool) -> None:
  if numbers and min(places.values()) > 0 and max(places.values()) >= 10 * min(places.values()):
    panel.set_xscale("log")
  if not numbers or len(places) <= 8:
    panel.set_xticks(list(places.values()), list(places), rotation=0 if numbers else 20)
    panel.minorticks_off()
