"""The comparison with PyTorch runs, and its networks have equally many parameters."""

import json

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("monai")
pytest.importorskip("diffusers")

import bench_nets  # noqa: E402
import profile_nets  # noqa: E402


def test_every_pair_runs_and_is_written(tmp_path, capsys):
  bench_nets.main(["--tiny", "--repeats=2", f"--out={tmp_path}"])
  printed = capsys.readouterr().out
  (path,) = tmp_path.iterdir()
  result = json.loads(path.read_text())
  assert set(result["rows"]) == set(bench_nets.PAIRS)
  assert result["cores"] and result["vectors"] and result["versions"]["torch"] == torch.__version__
  for name, row in result["rows"].items():
    low, high = row["seconds"]["quartiles"]
    assert 0 < low <= row["seconds"]["median"] <= high
    assert f"\n{name} " in printed


@pytest.mark.parametrize("name, parameters", [
  ("pix2pix", 54_407_809 + 2_764_609), ("resnet", 11_365_633)])
def test_plain_networks_have_the_published_size(name, parameters):
  nets = {"pix2pix": (bench_nets.torch_nets.UNetGenerator, bench_nets.torch_nets.PatchGAN),
          "resnet": (bench_nets.torch_nets.ResNetGenerator,)}[name]
  with torch.device("meta"):
    assert bench_nets.their_count(*(net() for net in nets)) == parameters


def test_unequal_networks_are_refused(monkeypatch):
  pair = bench_nets.Pair((1,), lambda: 0, lambda: 0, 10, 11)
  monkeypatch.setitem(bench_nets.PAIRS, "resnet", lambda tiny: pair)
  with pytest.raises(AssertionError, match="resnet: 10 parameters, torch's has 11"):
    bench_nets.compared("resnet", True, 2)


def test_the_profile_names_operations_of_both(capsys):
  profile_nets.main(["resnet", "--tiny", "--repeats=1"])
  ours, theirs = capsys.readouterr().out.split("torch: ")
  assert ours.startswith("ours: ") and " conv_general_dilated " in ours
  assert "aten::convolution_backward" in theirs
  shares = [float(row.rsplit(maxsplit=1)[1].rstrip("%")) for row in ours.splitlines()[1:]]
  assert sum(shares) == pytest.approx(100, abs=1) and len(shares) == profile_nets.SHOWN + 1


def test_kinds_of_compiled_operations():
  text = """
  ROOT %fusion.3 = (f32[1,64]{1,0}, f32[2]{0}) fusion(%a), metadata={op_name="jit(f)/g/add" id=1}
  %copy.1 = f32[8]{0} copy(f32[8]{0} %b)
  """
  assert profile_nets.kinds(text) == {"fusion.3": "fusion add", "copy.1": "copy"}
