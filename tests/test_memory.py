"""What does not fit the memory is refused before the run, and by how much is told."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_train import get_config, scale_build, toy_config, two_stages

from medsynth_jax import memory, methods, run, sharding, train
from medsynth_jax.contract import Method
from medsynth_jax.data.dataset import Store
from medsynth_jax.errors import UserError


def built(data, folder, **synthesis):
  config = toy_config("unet", data)
  config.synthesis.update(synthesis)
  return run.build(config, Store(data).info, folder)


def refusal(monkeypatch, here, free=1000, **how):
  """(needed, too much, free) in bytes that the message tells, and the message."""
  monkeypatch.setattr(sharding, "free_memory", lambda: free)
  with pytest.raises(UserError) as error:
    here.predictor("regression", **how)
  told = re.findall(r"([\d.]+) (MB|GB)", str(error.value))
  return [float(n) * (1e6 if unit == "MB" else 1e9) for n, unit in told], str(error.value)


def test_refusal_says_by_how_much(toy_data, tmp_path, monkeypatch):
  here = built(toy_data, tmp_path, batch_size=4)
  (needed, over, free), message = refusal(monkeypatch, here, free=10**5)
  assert "stage 'regression': synthesis of 4 slices at once needs" in message
  assert "--config.synthesis.batch_size" in message and "\n" not in message
  assert free == 10**5 and needed - over == pytest.approx(free, abs=3e4)
  monkeypatch.setattr(sharding, "free_memory", lambda: int(needed) + 10**5)
  here.predictor("regression")


def test_a_larger_batch_needs_more_and_one_slice_gets_another_remedy(toy_data, tmp_path,
                                                                     monkeypatch):
  needs = {n: refusal(monkeypatch, built(toy_data, tmp_path, batch_size=n)) for n in (1, 8, 64)}
  assert needs[1][0][0] < needs[8][0][0] < needs[64][0][0]
  assert "a device with more memory" in needs[1][1] and "batch_size" not in needs[1][1]


def test_weights_that_are_there_already_do_not_count_twice(toy_data, tmp_path, monkeypatch):
  config = toy_config("unet", toy_data)
  config.generator.channels = (16, 32, 64)
  here = run.build(config, Store(toy_data).info, tmp_path)
  weights = sharding.bytes_of(here.shape("regression").nets)
  (apart, *_), _ = refusal(monkeypatch, here)
  (loaded, *_), _ = refusal(monkeypatch, here, loaded=True)
  assert apart - loaded == pytest.approx(weights, abs=2e4) and weights > 2e5


# --- training --------------------------------------------------------------------------------


def test_a_step_that_does_not_fit_says_what_to_change(toy_data, tmp_path, monkeypatch):
  here = built(toy_data, tmp_path)
  with pytest.raises(UserError) as error:
    monkeypatch.setattr(sharding, "free_memory", lambda: 10**5)
    train.compile_step(here, "regression")
  message = str(error.value)
  needed, over, free = (1e6 * float(n) for n in re.findall(r"([\d.]+) MB", message))
  assert "stage 'regression': a training step of batch_size=2 needs" in message
  assert free == 10**5 and needed - over == pytest.approx(free, abs=3e4)
  kept = sharding.bytes_of((here.shape("regression"), train.batch_shapes(here, "regression")))
  assert needed > kept
  for field in ("config.batch_size lower than 2", "config.optim.accumulate raised",
                "config.data.size"):
    assert field in message
  assert "fsdp" not in message and "dtype" not in message and "\n" not in message
  monkeypatch.setattr(sharding, "free_memory", lambda: int(needed) + 10**5)
  train.compile_step(here, "regression")


@pytest.mark.parametrize("stage, backend, there, absent", [
  ("ddpm", "gpu", ("config.ddpm.network.remat=True", "config.ddpm.batch_size",
                   "config.dtype=bfloat16"), ("fsdp",)),
  ("ddpm", "cpu", ("config.ddpm.batch_size",), ("remat", "dtype")),
  ("fold_1", "gpu", ("config.pix2pix.batch_size",), ("fold_1", "remat")),
  ("unet", "cpu", ("config.data.size",), ("batch_size", "accumulate"))])
def test_remedies_are_fields_of_the_stage(stage, backend, there, absent, toy_data, monkeypatch):
  config = toy_config("pix2pix_ddpm", toy_data)
  mesh = sharding.make_mesh()
  monkeypatch.setattr(jax, "default_backend", lambda: backend)
  config.unet.batch_size = 1
  method = Method(None, None, None, txs={"net": None})
  told = memory.training_remedy(config, stage, method, mesh)
  assert all(field in told for field in there) and not any(field in told for field in absent), told
  for field in re.findall(r"config[.\w]+", told):
    part = config
    for name in field.split(".")[1:]:
      part = part[name]  # a KeyError if no command line could set it


def test_several_devices_can_share_parameters(toy_data):
  class Mesh:
    size, shape = 8, {"fsdp": 2}
  method = Method(None, None, None, txs={})
  told = memory.training_remedy(toy_config("unet", toy_data, batch_size=8), "regression", method,
                                Mesh)
  assert "config.mesh.fsdp=8" in told and "batch_size" not in told and "accumulate" not in told


@pytest.mark.parametrize("working, stage", [((10**15,), "first"), ((1, 10**15), "second")])
def test_refused_before_any_stage_trains(working, stage, toy_data, tmp_path, monkeypatch):
  takes = iter(working)
  monkeypatch.setattr(sharding, "working_memory", lambda compiled: next(takes))
  monkeypatch.setitem(methods.METHODS, "scale", scale_build)
  config, store = two_stages(toy_data), Store(toy_data)
  here = run.start(config, store.info, tmp_path / "run")
  with pytest.raises(UserError, match=f"stage '{stage}': a training step .* needs 1000000.0 GB"):
    train.train(here, store)
  assert sorted(p.name for p in here.folder.iterdir()) == ["config.json", "dataset.json"]


def test_stages_that_are_trained_are_not_compiled_again(toy_data, tmp_path, monkeypatch, capsys):
  monkeypatch.setitem(methods.METHODS, "scale", scale_build)
  store, config = Store(toy_data), two_stages(toy_data)
  here = run.start(config, store.info, tmp_path / "run")
  train.train(here, store)
  assert capsys.readouterr().out.count("training step compiled in") == 2
  train.train(here, store)
  assert "training step" not in capsys.readouterr().out


# --- silence ---------------------------------------------------------------------------------


@pytest.mark.parametrize("silent", ["working_memory", "free_memory"])
def test_a_device_that_does_not_tell_is_named(silent, toy_data, tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(sharding, silent, lambda *compiled: None)
  built(toy_data, tmp_path).predictor("regression")
  assert "does not tell its memory" in capsys.readouterr().out


def test_a_stage_is_compiled_once(toy_data, tmp_path, capsys):
  here = built(toy_data, tmp_path)
  assert here.predictor("regression") is here.predictor("regression", loaded=True)
  assert capsys.readouterr().out.count("synthesis compiled in") == 1


# --- what is compiled is what synthesis calls ----------------------------------------------------


def echo_build(config, stage, info, stages):
  """A toy bound: gives back the target and the sources, whatever their channels."""
  def synthesize(state, batch, key):
    return jnp.clip(batch["target"] + 0 * batch["source"].sum(-1, keepdims=True), -1, 1)
  return Method(lambda key, batch: {}, None, synthesize, {}, sees_target=True)


@pytest.mark.parametrize("size, unit", [("16,16", "slices"), ("4,16,16", "patches")])
def test_every_kind_of_batch_is_foreseen(size, unit, toy_data, tmp_path, monkeypatch):
  """Slices, patches, and the target that a bound sees."""
  from medsynth_jax import windows
  monkeypatch.setitem(methods.METHODS, "echo", echo_build)
  config = get_config("unet")
  config.update(method="echo")
  config.data.update(dir=str(toy_data), source="a", targets="b", size=size)
  here = run.build(config, Store(toy_data).info, tmp_path)
  state = jax.tree.map(lambda x: jax.device_put(jnp.zeros(x.shape, x.dtype), x.sharding),
                       here.shape("echo").replace(key=None)).replace(key=here.key("echo"))
  rng = np.random.default_rng(0)
  source, target = (rng.uniform(-1, 1, (10, 20, 24, 1)).astype(np.float32) for _ in range(2))
  image = windows.synthesise(
    here.predictor("echo"), state, source, here.task, source_modality=0, target_modality=1,
    key=here.key("echo"), batch_size=config.synthesis.batch_size, target=target, put=here.put)
  np.testing.assert_allclose(image, target, atol=1e-6)
  monkeypatch.setattr(sharding, "free_memory", lambda: 1000)
  with pytest.raises(UserError, match=f"4 {unit} at once"):
    here.predictor("echo")


# --- what is free ----------------------------------------------------------------------------


def test_working_memory_holds_the_output():
  compiled = jax.jit(lambda x: x[:, None] * x).lower(jax.ShapeDtypeStruct((500,), "float32")
                                                     ).compile()
  assert 1.8e6 <= sharding.working_memory(compiled) < 1e7  # on a CPU 1.8 times what it tells


def test_free_memory_of_this_machine():
  free = sharding.free_memory()
  assert 10**7 < free < 10**14


PROC = {"v2": "0::/job/step\n", "v1": "4:memory:/job/step\n3:cpuset:/\n0::/\n", "none": "0::/\n"}


@pytest.mark.parametrize("version, files, left", [
  ("v2", {"job/memory.max": "9000", "job/memory.current": "5000",
          "job/memory.stat": "anon 1\ninactive_file 1000\n", "job/step/memory.max": "max",
          "job/step/memory.current": "1", "job/step/memory.stat": ""}, 5000),
  ("v1", {"memory/job/step/memory.limit_in_bytes": "7000",
          "memory/job/step/memory.usage_in_bytes": "6500",
          "memory/job/step/memory.stat": "inactive_file 9\ntotal_inactive_file 500\n"}, 1000),
  ("v2", {"memory.max": "100", "memory.current": "300", "memory.stat": ""}, 0),
  ("none", {}, 2**62)])
def test_limits_of_containers_and_jobs(version, files, left, tmp_path):
  """The tightest group above the process counts; idle page cache is free."""
  (tmp_path / "proc" / "self").mkdir(parents=True)
  (tmp_path / "proc" / "self" / "cgroup").write_text(PROC[version])
  for name, text in files.items():
    path = tmp_path / "groups" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
  assert sharding._left_to_group(tmp_path / "proc", tmp_path / "groups") == left


def test_a_machine_without_proc_tells_all_its_memory(tmp_path):
  (tmp_path / "meminfo").write_text("MemTotal: 100 kB\nMemAvailable:   64 kB\n")
  assert sharding._free_host(tmp_path) == 65536
  assert sharding._free_host(tmp_path / "none") > 10**8
