"""The tables of launch/real_images.py: scores of its runs, collected and written as Markdown."""

import csv
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

FLOOR = ("constant", "mean_image", "lut", "lut2", "identity", "identity_normalised")
REGIONS = {"tumour": "the tumour", "lumen": "the lumen", "enhanced": "other enhanced tissue",
           "bone": "bone"}
METRICS = ("psnr", "ssim", "mae", *(f"mae_{region}" for region in REGIONS), "dice_lumen")
APART = "STS_019"  # its MR is rotated and not registered


def collect(folds: Iterable, out: Path) -> dict:
  """The scores of all finished runs, from the files of their evaluations.

  {direction, with its group: {"folds": {fold: {"seconds", "steps", "subjects": {subject: {row:
  {metric: score}}}, "switch": {stage: its images by all codes against the target}}}, "stages": rows
  of networks, "bounds": those of them that see the target, "overall": {row: {metric: mean over the
  subjects of all folds}}, "apart": the same of APART, "verdicts": {stage: ...}, "unit": unit of the
  MAE}}. Runs of one fold, group and direction are rows of one table.
  """
  results: dict = {}
  for fold in folds:
    folder = out / fold.run
    with open(folder / "evaluation" / "per_subject.csv", newline="") as file:
      lines = list(csv.DictReader(file))
    summary = json.loads((folder / "evaluation" / "summary.json").read_text())
    protocol, seconds = summary["protocol"], folder / "seconds.txt"
    took = float(seconds.read_text()) if seconds.exists() else 0.0
    steps = {fold.row or stage: n for stage, n in protocol["steps"].items()}
    rows = {stage: fold.row or stage for stage in protocol["steps"]}
    for direction, target in fold.directions.items():
      told = protocol["targets"].get(direction) or protocol["targets"][target]
      found = results.setdefault(", ".join(filter(None, (direction, fold.group))), {
        "folds": {}, "unit": told["unit"], "stages": [], "bounds": []})
      for name, stages in (("stages", steps), ("bounds", protocol["bounds"])):
        found[name] += [stage for stage in stages if stage not in found[name]]
      one = found["folds"].setdefault(
        fold.name, {"subjects": {}, "steps": {}, "seconds": 0.0, "switch": {}})
      for line in lines:
        if line["direction"] == direction:
          row = rows.get(line["row"], line["row"])
          one["subjects"].setdefault(line["subject"], {})[row] = {
            m: float(line[m]) for m in METRICS if line.get(m)}
      one["steps"] |= steps
      one["seconds"] += took
      one["switch"] |= {stage: {"mae": switch["mae"][target],
                                "closer": switch["closer_to_own_target_than"][target]}
                        for stage, switch in _switches_of(summary, fold.source, direction).items()}
  for found in results.values():
    _summarise(found)
  return results


def _switches_of(summary: Mapping, source: str, direction: str) -> Mapping:
  """{stage: its code switch} of a direction, where one model makes several targets by codes."""
  switches = summary.get("code_switch", {})
  return switches.get(direction.split("->")[0], {}) if source == "any" else switches


def _summarise(found: dict) -> None:
  """Adds means and verdicts to the scores of a direction."""
  rows = (*FLOOR, *found["stages"])
  judged = [s for s in found["stages"] if s not in found["bounds"]]
  scored = [(name, scores) for fold in found["folds"].values()
            for name, scores in fold["subjects"].items()]
  found["overall"] = _means([scores for name, scores in scored if name != APART], rows)
  found["apart"] = _means([scores for name, scores in scored if name == APART], rows)
  found["n"] = sum(name != APART for name, _ in scored)
  found["verdicts"] = {s: verdict(found["overall"], s) for s in judged}
  for fold in found["folds"].values():
    fold["mean"] = _means([s for name, s in fold["subjects"].items() if name != APART], rows)
    fold["verdicts"] = {s: verdict(fold["mean"], s) for s in judged}


def _means(scored: Sequence[Mapping], rows: Iterable[str]) -> dict:
  """{row: {metric: mean over the subjects}}."""
  means: dict = {}
  for row in rows:
    for metric in METRICS:
      values = [scores[row][metric] for scores in scored if metric in scores.get(row, {})]
      if values:
        means.setdefault(row, {})[metric] = math.fsum(values) / len(values)
  return means


def verdict(means: Mapping[str, Mapping[str, float]], stage: str) -> dict:
  """How far a network is above the best row of the floor, and above lut2, in PSNR and SSIM."""
  gains = {}
  for metric in ("psnr", "ssim"):
    own = means[stage][metric]
    best = max((r for r in FLOOR if r in means), key=lambda r: means[r][metric])
    gains[metric] = {"best": best, "gain": own - means[best][metric],
                     "gain_lut2": own - means["lut2"][metric]}
  return {**gains, "above_floor": all(g["gain"] > 0 for g in gains.values())}


def report(results: Mapping) -> str:
  """The results as Markdown: of each direction all subjects, fold by fold, the code switch."""
  return "\n".join(line for direction, found in results.items() for line in (
    *_overall(direction, found), *_by_fold(found), *_switches(found), *_runs(found)))


def _overall(direction: str, found: Mapping) -> list[str]:
  unit, overall = found["unit"], found["overall"]
  metrics = [m for m in METRICS if any(m in scores for scores in overall.values())]
  heads = {"psnr": "PSNR [dB]", "ssim": "SSIM", "mae": f"MAE [{unit}]",
           "dice_lumen": "Dice of the lumen",
           **{f"mae_{region}": f"MAE in {words} [{unit}]" for region, words in REGIONS.items()}}
  return [f"### {direction}, mean of {found['n']} subject{'s' * (found['n'] != 1)}, each scored by"
          " a network that did not see it", "", *_markdown(
            ["row", *(heads[m] for m in metrics)],
            [[_label(found, row), *(_number(m, scores.get(m)) for m in metrics)]
             for row, scores in overall.items()]), "",
          *(f"{stage}: {_sentence(v)}" for stage, v in found["verdicts"].items()), ""]


def _by_fold(found: Mapping) -> list[str]:
  columns = {f"{name}: {', '.join(s for s in fold['subjects'] if s != APART)}": fold["mean"]
             for name, fold in found["folds"].items()}
  if found["apart"]:
    columns[f"apart: {APART}"] = found["apart"]
  return [f"PSNR [dB] / SSIM / MAE [{found['unit']}], by fold and the subjects scored in it:", "",
          *_markdown(["row", *columns],
                     [[_label(found, row), *(_triple(s.get(row)) for s in columns.values())]
                      for row in found["overall"]]), ""]


def _switches(found: Mapping) -> list[str]:
  """Each code's image against this direction's target; nothing for networks without codes."""
  switches = [(name, stage, switch) for name, fold in found["folds"].items()
              for stage, switch in fold["switch"].items()]
  if not switches:
    return []
  codes = list(switches[0][2]["mae"])
  heads = [f"code {c}" if c != "constant" else c for c in codes]
  return ["MAE in model units (range 1) of the image of each code against this target, mean of the"
          " fold's subjects, the one apart included:", "",
          *_markdown(["fold", "row", *heads, "own code is closest"], [
            [name, stage, *(f"{switch['mae'][c]:.4f}" for c in codes),
             "yes" if all(switch["closer"].values()) else
             "no: " + ", ".join(c for c, closer in switch["closer"].items() if not closer)]
            for name, stage, switch in switches]), ""]


def _runs(found: Mapping) -> list[str]:
  lines = []
  for name, fold in found["folds"].items():
    took = f"{fold['seconds'] / 60:.1f} min" if fold["seconds"] else "time not known"
    lines.append(" ".join([f"- {name}: {took}.", *(
      f"{stage}, {fold['steps'][stage]} steps: {_sentence(v)}"
      for stage, v in fold["verdicts"].items())]))
  return [*lines, ""]


def _label(found: Mapping, row: str) -> str:
  return f"{row} (bound)" if row in found["bounds"] else row


def _markdown(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
  cells = [head, ["---", *["---:"] * (len(head) - 1)], *body]
  return [f"| {' | '.join(line)} |" for line in cells]


def _number(metric: str, value: float | None) -> str:
  if value is None:
    return "-"
  return f"{value:.2f}" if metric == "psnr" or value >= 10 else f"{value:.3f}"


def _triple(scores: Mapping[str, float] | None) -> str:
  return " / ".join(_number(m, (scores or {}).get(m)) for m in ("psnr", "ssim", "mae"))


def _sentence(found: Mapping) -> str:
  word = "above" if found["above_floor"] else "NOT above"
  parts = ", ".join(
    f"{m.upper()} {found[m]['gain']:+.{d}f} against {found[m]['best']}"
    f" ({found[m]['gain_lut2']:+.{d}f} against lut2)" for m, d in (("psnr", 2), ("ssim", 3)))
  return f"{word} the floor: {parts}."
