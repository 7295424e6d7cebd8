"""What is told of a pod: collectives in compiled code, the estimate, refusals, one real compile."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from test_train import get_config

from medsynth_jax import builtin, hlo, pods, run, sharding
from medsynth_jax.data.examples import make_task
from medsynth_jax.errors import UserError
from medsynth_jax.nets.conv import cured

ROOT = Path(__file__).parents[1]
needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None,
                                  reason="libtpu is not installed (pip install libtpu)")

# a loop of 6 by steps of 2; a gradient of two arrays over 16; a gather over 4 that is spread over
# the loop and the program; a scatter in a branch; an asynchronous permutation
PROGRAM = """HloModule jit_step, is_scheduled=true, entry_computation_layout={()->f32[]}

%spread.1 (p.1: bf16[8]) -> bf16[32] {
  %p.1 = bf16[8]{0:T(128)(2,1)} parameter(0)
  ROOT %all-gather.1 = bf16[32]{0:T(128)(2,1)} all-gather(%p.1), channel_id=7, replica_groups=mesh['a'=4,'b'=4] {'b'}, dimensions={0}
}

%spread.2 (p.2: bf16[8]) -> bf16[32] {
  %p.2 = bf16[8]{0:T(128)(2,1)} parameter(0)
  ROOT %all-gather.2 = bf16[32]{0:T(128)(2,1)} all-gather(%p.2), channel_id=7, replica_groups=mesh['a'=4,'b'=4] {'b'}, dimensions={0}
}

%spread.3 (p.3: bf16[8]) -> bf16[32] {
  %p.3 = bf16[8]{0:T(128)(2,1)} parameter(0)
  ROOT %all-gather.3 = bf16[32]{0:T(128)(2,1)} all-gather(%p.3), channel_id=7, replica_groups=mesh['a'=4,'b'=4] {'b'}, dimensions={0}
}

%cond (arg.1: (s32[], f32[10,10])) -> pred[] {
  %six = s32[]{:T(128)} constant(6)
  %arg.1 = (s32[]{:T(128)}, f32[10,10]{1,0:T(8,128)}) parameter(0)
  %n.1 = s32[]{:T(128)} get-tuple-element(%arg.1), index=0
  ROOT %less = pred[]{:T(512)} compare(%n.1, %six), direction=LT
}

%body (arg.2: (s32[], f32[10,10])) -> (s32[], f32[10,10]) {
  %two = s32[]{:T(128)} constant(2)
  %arg.2 = (s32[]{:T(128)}, f32[10,10]{1,0:T(8,128)}) parameter(0)
  %n.2 = s32[]{:T(128)} get-tuple-element(%arg.2), index=0
  %x = f32[10,10]{1,0:T(8,128)} get-tuple-element(%arg.2), index=1
  %move = (f32[10,10]{1,0:T(8,128)}, f32[10,10]{1,0:T(8,128)}, u32[]{:S(2)}) collective-permute-start(%x), channel_id=3, source_target_pairs={{0,1},{1,0}}
  %kernel = f32[3,3,4,5]{3,2,1,0} constant({...})
  %conv.1 = f32[1,8,8,5]{3,2,1,0} convolution(%image, %kernel), window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f
  %again = bf16[32]{0:T(128)(2,1)} fusion(%y), kind=kOutput, calls=%spread.1
  %more = bf16[32]{0:T(128)(2,1)} fusion(%y), kind=kOutput, calls=%spread.3
  %moved = f32[10,10]{1,0:T(8,128)} collective-permute-done(%move)
  %next = s32[]{:T(128)} add(%n.2, %two)
  ROOT %both = (s32[]{:T(128)}, f32[10,10]{1,0:T(8,128)}) tuple(%next, %moved)
}

%yes (arg.3: f32[64]) -> f32[4] {
  %arg.3 = f32[64]{0:T(128)} parameter(0)
  ROOT %scatter = f32[4]{0:T(128)} reduce-scatter(%arg.3), channel_id=9, replica_groups=[1,16]<=[16], dimensions={0}, to_apply=%add
}

%no (arg.4: f32[64]) -> f32[4] {
  ROOT %zero = f32[4]{0:T(128)} constant({...})
}

ENTRY %main (w: f32[3,3,4,5]) -> f32[] {
  %w = f32[3,3,4,5]{3,2,1,0} parameter(0)
  %conv.2 = f32[1,8,8,5]{3,2,1,0} convolution(%image, %w), window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f
  %loop = (s32[]{:T(128)}, f32[10,10]{1,0:T(8,128)}) while(%start), condition=%cond, body=%body
  %all = bf16[32]{0:T(128)(2,1)} fusion(%y), kind=kOutput, calls=%spread.2
  %either = f32[4]{0} conditional(%p, %a, %b), branch_computations={%yes, %no}
  %exchange = f32[2,8]{1,0} all-to-all(%z), channel_id=11, replica_groups={{0,1},{2,3}}, dimensions={0}
  ROOT %sum = (f32[100]{0:T(128)}, /*index=1*/f32[]{:T(128)}) all-reduce(%g, %h), channel_id=1, replica_groups=mesh['a'=4,'b'=4] {'a','b'}, to_apply=%add
}
"""  # noqa: E501


def test_collectives_of_a_program():
  moved, repeated = hlo.read(PROGRAM)
  assert moved == {
    "all-reduce": {"count": 1, "bytes": 404, "sent": pytest.approx(404 * 2 * 15 / 16)},
    "all-gather": {"count": 1, "bytes": 64, "sent": 64 * 3 / 4},
    "reduce-scatter": {"count": 1, "bytes": 16, "sent": 16 * 15},
    "all-to-all": {"count": 1, "bytes": 64, "sent": 32},
    "collective-permute": {"count": 3, "bytes": 1200, "sent": 1200}}
  assert repeated == (1 + 3) / 2  # of two equal convolutions one runs three times


def test_a_loop_that_does_not_count_up_to_a_number_counts_once():
  moved, repeated = hlo.read(PROGRAM.replace("direction=LT", "direction=GT"))
  assert moved["collective-permute"]["count"] == 1 and repeated == 1


def test_a_program_of_one_device_moves_nothing():
  text = jax.jit(lambda x: x @ x).lower(np.zeros((4, 4), np.float32)).compile().as_text()
  assert hlo.read(text) == ({}, 1.0)


def test_convolutions_are_counted_like_the_compiler_does():
  """Of valid ones, where no border is counted that is not there."""
  def convolve(x, w):
    return jax.lax.conv_general_dilated(x, w, (2, 1), "VALID",
                                        dimension_numbers=("NHWC", "HWIO", "NHWC"))
  compiled = jax.jit(convolve).lower(np.zeros((2, 9, 8, 3), np.float32),
                                     np.zeros((3, 3, 3, 6), np.float32)).compile()
  text = compiled.as_text()
  body = list(hlo._computations(text).values())
  found = [hlo._convolution(result, rest, b) for b in body for result, op, rest in b.values()
           if op == "convolution"]
  assert found == [compiled.cost_analysis()["flops"]] == [2 * 2 * 4 * 6 * 6 * 27]


def test_the_estimate():
  chip = pods.Chip(peak=100.0, memory=1.0, hbm=10.0, ring=5.0)
  moved = {"all-reduce": {"sent": 7.0}, "all-gather": {"sent": 3.0}}
  bound = pods.estimate(200.0, 1.0, moved, chip)  # 4 s of FLOPs at half the peak, 2 s in the ring
  assert bound == {"compute_seconds": 4.0, "communication_seconds": 2.0,
                   "efficiency": pytest.approx(2 / 3)}
  assert pods.estimate(200.0, 80.0, moved, chip)["compute_seconds"] == 8.0  # HBM takes longer
  assert pods.estimate(200.0, 1.0, {}, chip)["efficiency"] == 1.0


# --- refusals ---------------------------------------------------------------------------------


def test_the_compiler_is_named_where_it_is_absent(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(UserError, match=r"pip install 'medsynth-jax\[tpu\]'") as error:
    pods.devices("v5e:4x4")
  assert "\n" not in str(error.value)


@needs_libtpu
@pytest.mark.parametrize("topology, told", [
  ("v5e", "regex"), ("v9z:4x4", "v9z"), ("v5e:5x3", "divisible"), ("v4:2x2x1", "TPU v4")])
def test_topologies_that_are_not_there(topology, told):
  with pytest.raises(UserError, match=f"--topology={topology}: .*{told}.*as v5e:4x4") as error:
    pods.devices(topology)
  assert "\n" not in str(error.value)


def test_batches_that_do_not_divide_are_told_together():
  config = get_config("pix2pix_ddpm")
  config.ddpm.batch_size = 32
  with pytest.raises(UserError) as error:
    pods._check_batches(config, 16)
  assert str(error.value) == (
    "batches are of all 16 devices together: use multiples of 16, as --config.pix2pix.batch_size=16"
    " (is 2), --config.unet.batch_size=16 (is 2)")
  config = get_config("unet")
  config.batch_size = 17
  with pytest.raises(UserError, match=r"as --config.batch_size=32 \(is 17\)"):
    pods._check_batches(config, 16)
  config.batch_size = 32
  pods._check_batches(config, 16)


# --- what is compiled -------------------------------------------------------------------------


def test_the_outline_has_the_shapes_of_the_data(tiny_run):
  """What networks depend on is known before the data are made."""
  from medsynth_jax.data.dataset import load_info
  config, made = get_config("unet"), load_info(tiny_run)
  config.data.size = ""  # from the slices
  outline = builtin.outline(config)
  assert make_task(config.data, outline) == make_task(config.data, made)
  assert outline.names == made.names and outline.plane == made.plane
  assert [outline.index(n) for n in made.names] == [made.index(n) for n in made.names]


def test_the_outline_of_ct_knows_units():
  config = get_config("cta_gan")
  outline = builtin.outline(config)
  assert outline.to_model("cta", 3071.0) == 1.0 and outline.modality("ct").channels == 3


def test_a_mesh_of_given_devices():
  mesh = sharding.make_mesh(1, jax.devices()[:1])
  assert mesh.size == 1
  with pytest.raises(UserError, match="mesh.fsdp=2 does not divide the 1 devices"):
    sharding.make_mesh(2, jax.devices()[:1])


@needs_libtpu
def test_the_cure_is_off_where_the_code_is_for_a_tpu():
  seen = []
  def look(x):
    seen.append(cured())
    return x
  for mesh in (sharding.make_mesh(1, pods.devices("v5e:2x2")), sharding.make_mesh()):
    with jax.set_mesh(mesh):
      jax.jit(lambda x: look(x)).trace(np.zeros(1))
  assert seen == [False, True]


@needs_libtpu
def test_a_pod_of_16(tmp_path):
  """The real step: each device's gradients are summed once, and nothing else is moved."""
  out = tmp_path / "pod.json"
  done = subprocess.run(
    [sys.executable, "-m", "medsynth_jax.bench", "--config=configs/unet.py:test",
     "--topology=v5e:4x4", "--config.batch_size=32", f"--out={out}"],
    cwd=ROOT, text=True, capture_output=True)
  assert done.returncode == 0, done.stderr
  told = json.loads(out.read_text())
  step, synthesis = told["programs"]
  assert told["devices"] == 16 and told["hosts"] == 4 and told["chip"] == "TPU v5 lite"
  assert step["fits"] and 1e6 < step["memory"] < 1e9 and step["flops"] > 1e6
  assert set(step["collectives"]) == {"all-reduce"} and synthesis["collectives"] == {}
  config = get_config("unet")
  here = run.build(config, builtin.outline(config), tmp_path)
  weights = sum(4 * x.size for x in jax.tree.leaves(here.shape("regression").nets))
  sums = step["collectives"]["all-reduce"]
  assert weights <= sums["bytes"] <= weights + 64  # and a few scalars: losses
  assert sums["sent"] == pytest.approx(sums["bytes"] * 2 * 15 / 16)
  assert "regression" in done.stdout and "all-reduce" in done.stdout
