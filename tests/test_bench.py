"""The benchmark: what it measures, what it says of it, and that it leaves nothing behind."""

import json

import jax
import pytest
from test_train import get_config, scale_build, toy_config, two_stages

from medsynth_jax import bench, builtin, measuring, methods
from medsynth_jax.errors import UserError

CHANGES = ("config.first.batch_size=4", "config.dtype=bfloat16")


@pytest.fixture(scope="module")
def measured(toy_data, tmp_path_factory):
  """(table, JSON) of a config whose last two stages need the first, and the folder of both."""
  folder, before = tmp_path_factory.mktemp("bench"), sorted(toy_data.rglob("*"))
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(methods.METHODS, "scale", scale_build)
    patch.setattr(measuring, "DATA_SECONDS", 0.05)
    config = two_stages(toy_data)
    config.stages = ("first", "second", "third")
    config.third = config.second.copy_and_resolve_references()
    text = bench.report(config, 3, None, folder / "out.json", folder / "trace", CHANGES)
  assert sorted(toy_data.rglob("*")) == before, "files were left in the data set"
  return text, json.loads((folder / "out.json").read_text()), folder


def test_every_stage_is_measured(measured):
  text, found, folder = measured
  assert list(found["stages"]) == ["first", "second", "third"]
  for name, told in found["stages"].items():
    assert told["batch_size"] == 2 and told["parameters"] == 1
    for field in ("compile_seconds", "step_seconds", "step_flops", "state_bytes", "peak_bytes",
                  "synthesis_compile_seconds", "synthesis_window_seconds"):
      assert told[field] > 0, f"{name}: {field}"
    assert told["images_per_second"] == pytest.approx(2 / told["step_seconds"])
    assert told["data_over_step"] == pytest.approx(
      told["data_images_per_second"] / told["images_per_second"])
    assert told["step_bytes"] > told["state_bytes"]
    assert told["volume_shape"] == [10, 20, 24] and told["volume_windows"] == 40
    assert told["synthesis_volume_seconds"] == pytest.approx(
      40 * told["synthesis_window_seconds"])
    assert list((folder / "trace" / name).rglob("*.xplane.pb"))
  assert found["machine"]["platform"] == "cpu" and found["machine"]["versions"]["jax"]
  assert sorted(p.name for p in folder.iterdir()) == ["out.json", "trace"]


def test_a_change_is_measured_in_turn_with_the_config_as_it_is(measured):
  text, found, _ = measured
  lines = text.splitlines()
  at = lines.index(f"with {', '.join(CHANGES)}, beside the config as it is:")
  for title, field, line in (("time an image", "image_seconds", lines[at + 1]),
                             ("working memory", "working_bytes", lines[at + 2])):
    before, after = (each[field] for each in found["stages"]["first"]["change"])
    assert line.startswith(title) and line.split()[-3] == f"{after / before:.2f}"
  assert found["changes"] == list(CHANGES)


def test_runs_that_are_compared_take_turns(toy_data, monkeypatch):
  config, taken = two_stages(toy_data), []
  monkeypatch.setitem(methods.METHODS, "scale", scale_build)
  config.stages, store = ("first",), measuring.Store(toy_data)
  runs = [bench.runs.build(config, store.info, toy_data / "no run") for _ in range(2)]
  window = measuring._window
  monkeypatch.setattr(measuring, "_window", lambda compiled, state, some, count: (
    taken.append((id(compiled), count)), window(compiled, state, some, count))[1])
  measuring.alternated([(run, {}) for run in runs], store, "first", 10)
  a, b = (each for each, _ in taken[:2])
  assert a != b and taken == [(a, 2), (b, 2), *[(a, 2), (b, 2)] * 5]


@pytest.mark.parametrize("change, message", [
  ("config.first.width=3", "unknown config field"), ("config.first.steps=much", "steps=much"),
  ("config.data.dir=OTHER", "by a call of its own"),
  ("config.synthesis.batch_size=9", "only the training steps"),
  ("config.conv_cure=fast", "choose 'auto', 'on' or 'off'"),
  ("config.stages=('first',)", "would become first; compare configs of the same stages")])
def test_a_wrong_change_is_refused(change, message, toy_data, monkeypatch):
  monkeypatch.setitem(methods.METHODS, "scale", scale_build)
  with pytest.raises(UserError, match=message):
    bench.measure(two_stages(toy_data), toy_data, 1, None, [change])


def test_the_table_says_what_its_numbers_are_worth(measured):
  text, found, _ = measured
  assert "first          second" in text and "16x16, float32" in text
  assert "is not known, so that no share of it is told" in text
  assert "second, third: earlier stages have random weights; only speed is measured" in text
  assert all(line in text for line in found["notes"])


@pytest.mark.parametrize("over, noted", [(4.9, True), (5.1, False)])
def test_a_slow_data_pipeline_is_told(over, noted):
  found = {"machine": {"device": "x", "peak_flops": 1.0},
           "stages": {"unet": {"data_over_step": over, "needs": [], "volume_measured": True}}}
  told = bench.notes(found)
  assert bool(told) == noted and (not noted or "4.9 times" in told[0])


def test_steps_are_waited_for_once_a_window(monkeypatch):
  """So that the host runs ahead of the device as in training."""
  events = []
  def compiled(state, batch):
    events.append(batch)
    return state + 1, {}
  monkeypatch.setattr(jax, "block_until_ready", lambda tree: events.append("wait"))
  state, seconds = measuring._steps(compiled, 0, ["a", "b"], 15, None)
  assert events == ["a", "b", "wait", *["a", "b", "a", "wait"] * 5]
  assert state == 17 and seconds > 0


@pytest.mark.parametrize("kind, flops", [
  ("NVIDIA H100 80GB HBM3", 989.4e12), ("NVIDIA H100 NVL", 835.5e12),
  ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H200", 989.4e12), ("NVIDIA GH200 480GB", None),
  ("NVIDIA A100-SXM4-40GB", 312e12), ("NVIDIA L4", 121e12), ("Tesla T4", 65e12),
  ("NVIDIA GeForce RTX 4090", 165.2e12), ("TPU v4", 275e12), ("TPU v5 lite", 197e12),
  ("TPU v5", 459e12), ("TPU v6 lite", 918e12), ("NVIDIA L40S", None), ("TPU v7", None)])
def test_peaks_of_chips(kind, flops):
  assert (measuring.peak(kind) or (None,))[0] == flops


@pytest.mark.parametrize("only, stages", [
  ([], ["pix2pix", "ddpm", "unet"]), (["unet", "ddpm"], ["ddpm", "unet"])])
def test_the_stages_that_are_measured(only, stages, toy_data, monkeypatch):
  """Not those without one fold, each of which is as its coarse stage."""
  seen = {}
  def stage(run, store, name, frozen, steps, trace):
    seen[name] = set(frozen)
    return {"data_over_step": 9.0}
  monkeypatch.setattr(measuring, "stage", stage)
  bench.measure(toy_config("pix2pix_ddpm", toy_data), toy_data, 1, only=only)
  assert list(seen) == stages and seen["ddpm"] == {"pix2pix", "fold_0", "fold_1"}


@pytest.mark.parametrize("name", ["fold_0", "absent"])
def test_a_stage_that_is_not_there_is_refused(name, toy_data):
  with pytest.raises(UserError, match=f"--stage={name}: .*choose from pix2pix, ddpm, unet"):
    bench.measure(toy_config("pix2pix_ddpm", toy_data), toy_data, 1, only=[name])


def test_a_long_volume_is_worked_out_from_a_batch(toy_data, monkeypatch, tmp_path):
  made = []
  monkeypatch.setattr(measuring, "VOLUME_SECONDS", 0.0)
  monkeypatch.setattr(measuring, "DATA_SECONDS", 0.0)
  monkeypatch.setitem(methods.METHODS, "scale", scale_build)
  synthesise = measuring.windows.synthesise
  monkeypatch.setattr(measuring.windows, "synthesise", lambda predict, state, source, *a, **how: (
    made.append(len(source)), synthesise(predict, state, source, *a, **how)))
  config = two_stages(toy_data)
  config.stages = ("first",)
  config.synthesis.batch_size = 4
  found = bench.measure(config, toy_data, 1)
  assert made == [4, 4] and found["stages"]["first"]["volume_measured"] is False
  assert "worked out from one batch" in "".join(found["notes"])


def test_built_in_data_are_made_and_removed(toy_data, monkeypatch):
  folders = []
  def make(config, folder):
    folders.append(folder)
    return toy_data
  monkeypatch.setattr(builtin, "make", make)
  monkeypatch.setattr(bench, "measure", lambda config, data, *_: {"data": data})
  monkeypatch.setattr(bench, "table", lambda found: found["data"])
  config = get_config("unet")
  assert bench.report(config, 1) == toy_data and not folders[0].exists()
  assert bench.report(config, 1, toy_data) == toy_data and folders[1] == toy_data


@pytest.mark.parametrize("how, message", [
  ({"only": ["absent"]}, "--stage=absent"),
  ({"changes": ["config.absent=1"]}, "unknown config field"),
  ({"changes": ["config.data.dir=OTHER"]}, "by a call of its own")])
def test_what_is_wrong_is_told_before_data_are_made(how, message, monkeypatch):
  monkeypatch.setattr(builtin, "make", lambda *_: pytest.fail("data were made"))
  with pytest.raises(UserError, match=message):
    bench.report(get_config("unet"), 1, **how)


@pytest.mark.parametrize("how, message", [
  ({"steps": 0}, "--steps=0"), ({"out": "absent/x.json"}, "a folder that exists"),
  ({"out": "."}, "give a file"), ({"batch_size": 0}, "config.batch_size=0")])
def test_bad_input_is_one_line(how, message, toy_data, tmp_path):
  config = toy_config("unet", toy_data, **{k: v for k, v in how.items() if k == "batch_size"})
  out = tmp_path / how["out"] if "out" in how else None
  with pytest.raises(UserError, match=message) as error:
    bench.report(config, how.get("steps", 1), out=out)
  assert "\n" not in str(error.value)
