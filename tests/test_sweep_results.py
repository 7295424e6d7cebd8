"""What a sweep reports of trials whose scores are given: table, CSV and curves."""

import csv
import json

from PIL import Image
from test_sweep import summary

from launch import sweep_results, trials


def scored(out, names, grid, seeds, scores):
  """Trials whose evaluations hold `scores(trial)`: {direction: {row: (psnr, ssim, mae)}}."""
  found = trials.plan(names, grid, seeds, [], out)
  for trial in found:
    (trial.folder / "evaluation").mkdir(parents=True)
    (trial.folder / "evaluation" / "summary.json").write_text(json.dumps(
      summary(trial.config.to_dict(), scores(trial))))
  return found


def test_means_over_seeds_and_the_floor_once(tmp_path):
  def scores(trial):
    level = float(trial.grid["config.misalign"])
    loss = 2 * level if "pix2pix" in trial.name else level
    return {"mr->ct": {"constant": (10.0, 0.1, 100.0), "lut2": (12.0, 0.2, 90.0),
                       "net": (20.0 - loss + trial.seed, 0.8, None)}}
  found = scored(tmp_path, ["configs/unet.py:test", "configs/pix2pix.py:test"],
                 {"config.misalign": ("0", "2", "10")}, 2, scores)
  text = sweep_results.write(found, 14, tmp_path)
  assert text == (tmp_path / "table.md").read_text()
  assert "12 of 14 trials finished" in text and "### mr->ct" in text
  assert text.count("| lut2 |") == 1 and "| - | lut2 |  |  | 12.00 | 0.200 | 90.00 |" in text
  assert "| unet_test | net | 0 | 2 | 20.50 ± 0.71 | 0.800 ± 0.000 | - |" in text
  assert "| pix2pix_test | net | 10 | 2 | 0.50 ± 0.71 | 0.800 ± 0.000 | - |" in text
  assert "Change from misalign=0 to 10:" in text  # by number: "10" sorts before "2" as text
  assert "- unet_test: PSNR -10.00, SSIM +0.000" in text
  assert "- pix2pix_test: PSNR -20.00" in text
  with open(tmp_path / "results.csv", newline="") as file:
    lines = list(csv.DictReader(file))
  assert len(lines) == 12 * 3
  assert lines[2] == {
    "trial": "unet_test_misalign=0_seed=0", "config": "unet_test", "config.misalign": "0",
    "seed": "0", "direction": "mr->ct", "row": "net", "psnr": "20.0", "ssim": "0.8", "mae": "",
    "unit": "HU"}
  assert min(Image.open(tmp_path / "curve.png").size) > 500


def test_a_floor_that_changes_with_the_grid_is_told_at_each_point(tmp_path):
  def scores(trial):
    more = float(trial.grid["config.data.simulated.n_subjects"])
    return {"a->b": {"lut2": (more, 0.2, 1.0), "net": (20.0, 0.8, 1.0)}}
  found = scored(tmp_path, ["configs/unet.py:test"],
                 {"config.data.simulated.n_subjects": ("6", "12")}, 1, scores)
  text = sweep_results.write(found, 2, tmp_path)
  assert "| unet_test | lut2 | 6 |  | 6.00 |" in text
  assert "| unet_test | lut2 | 12 |  | 12.00 |" in text


def test_words_as_values_and_several_stages_have_a_figure(tmp_path):
  def scores(trial):
    return {d: {"lut2": (12.0, 0.2, 1.0), "first": (20.0, 0.8, 1.0), "second": (21.0, 0.8, 1.0)}
            for d in ("a->b", "a->c")}
  found = scored(tmp_path, ["configs/unet.py:test"],
                 {"config.optim.schedule": ("cosine", "linear"), "config.optim.lr": ("1", "2")}, 1,
                 scores)
  text = sweep_results.write(found, 4, tmp_path)
  assert "Change from" not in text and text.count("### ") == 2
  lines = [line for trial in found for line in sweep_results.read(trial)
           if line["direction"] == "a->b"]
  assert [*sweep_results.curves(lines, ["config.optim.lr"])] == [
    f"unet_test {stage} optim.lr={lr}" for lr in (1, 2) for stage in ("first", "second")]
  assert Image.open(tmp_path / "curve.png").size[1] > 900


def test_curves_and_floor_lie_where_the_numbers_are(tmp_path, monkeypatch):
  from matplotlib import pyplot
  monkeypatch.setattr(pyplot, "close", lambda figure: None)
  def scores(trial):
    return {"a->b": {"constant": (9.0, 0.1, 2.0), "lut2": (12.0, 0.2, 1.0),
                     "net": (20.0 - float(trial.grid["config.misalign"]), 0.8, 1.0)}}
  found = scored(tmp_path, ["configs/unet.py:test"], {"config.misalign": ("5", "0", "1")}, 1,
                 scores)
  sweep_results.write(found, 3, tmp_path)
  panel = pyplot.gcf().axes[0]
  drawn = {line.get_label(): line for line in panel.get_lines()}
  assert {*drawn["lut2 (floor)"].get_ydata()} == {12.0}
  assert {*drawn["constant (floor)"].get_ydata()} == {9.0}
  assert [x for x in panel.containers[0][0].get_xdata()] == [0, 1, 5]
  assert [y for y in panel.containers[0][0].get_ydata()] == [20, 19, 15]
  assert panel.get_xlabel() == "misalign" and panel.get_ylabel() == "PSNR (dB)"
  monkeypatch.undo()
  pyplot.close("all")
