"""What a sweep plans, runs and refuses; its trials are faked, but for one."""

import fcntl
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # `python -m launch.sweep` has the project's folder there

from launch import sweep, trials  # noqa: E402
from medsynth_jax.errors import UserError  # noqa: E402

# a trial: fails, is interrupted, waits for others, or writes what `evaluate` leaves
FAKE = """
import json, sys, time
from pathlib import Path
folder, summary, wish = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
print("10%|#\\r 20%|##\\nstarted", folder.name, flush=True)
for text, status in wish.get("status", {}).items():
  if text in folder.name:
    print("error: the reason", file=sys.stderr)
    sys.exit(status)
(folder / "evaluation").mkdir(parents=True, exist_ok=True)
late = time.time() + 20
while len(list(folder.parent.glob("*/evaluation"))) < wish.get("together", 1):
  assert time.time() < late
  time.sleep(0.02)
(folder / "evaluation" / "summary.json").write_text(summary)
"""


def summary(config, scores, unit="HU"):
  """What the sweep reads of summary.json; scores {direction: {row: (psnr, ssim, mae)}}."""
  return {"config": config, "scores": {
    d: {row: {m: {"mean": v} for m, v in zip(("psnr", "ssim", "mae"), values, strict=True)}
        for row, values in rows.items()} for d, rows in scores.items()},
    "protocol": {"targets": {d.split("->")[1]: {"unit": unit, "ssim": ["wang"]} for d in scores}}}


@pytest.fixture
def fake(monkeypatch, tmp_path):
  """Trials that only write scores; `fake` is their wish, `called` the runs started."""
  wish, called = {}, []
  def command(self, backend):
    called.append(self.run)
    level = float(self.grid.get("config.misalign", 0))
    text = json.dumps(summary(self.config.to_dict(), {"t1->t2": {
      "lut2": (14.0, 0.3, 0.1), "unet": (20.0 - level + self.seed, 0.8, 0.05)}}))
    return ["python", "-c", FAKE, str(self.folder), text, json.dumps(wish)]
  monkeypatch.setattr(trials.Trial, "command", command)
  monkeypatch.setattr(trials.builtin, "make", lambda config, folder: None)
  wish["called"] = called
  return wish


def run(out, *more, config="configs/unet.py:test"):
  return sweep.main([f"--config={config}", f"--out={out}", *more])


# --- the plan --------------------------------------------------------------------------------


def test_every_point_is_one_command(tmp_path, capsys):
  assert run(tmp_path / "s", "--grid", "config.misalign=0,2", "--grid=config.data.size=[32,32]",
             "--seeds=2", "--config.steps=5", "--dry-run",
             config="configs/unet.py:test,configs/pix2pix.py:test") == 0
  lines = [x for x in capsys.readouterr().out.splitlines() if x.startswith("$")]
  assert len(lines) == 8 and len(set(lines)) == 8
  first = lines[0].split()
  assert first[:6] == ["$", "python", "-m", "medsynth_jax.main", "--config=configs/unet.py:test",
                       f"--workdir={tmp_path}/s/unet_test_misalign=0_data.size=32-32_seed=0"]
  assert {"--config.steps=5", "--config.misalign=0", "--config.seed=0"} < {*first}
  assert "'--config.data.size=[32,32]'" in first
  assert len({x.split()[-1] for x in lines}) == 1  # one data set
  assert lines[0].split()[-1].startswith(f"--config.data.dir={tmp_path}/s/simulated_")
  assert not (tmp_path / "s").exists()


def test_data_are_shared_where_their_fields_are_the_same(tmp_path):
  found = trials.plan(["configs/unet.py"], {"config.data.simulated.seed": ("0", "1"),
                                            "config.optim.lr": ("1e-3", "1e-4")}, 2, [], tmp_path)
  assert len({t.simulated for t in found}) == 2
  own = trials.plan(["configs/unet.py"], {}, 1, ["--config.data.dir=DATA"], tmp_path)[0]
  assert own.simulated is None
  assert [a for a in own.command("local") if "data.dir" in a] == ["--config.data.dir=DATA"]


def test_each_data_set_is_made_once(tmp_path, monkeypatch):
  made = []
  def make(config, folder):
    made.append((config.data.simulated.seed, folder))
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "dataset.json").touch()
  monkeypatch.setattr(trials.builtin, "make", make)
  found = trials.plan(["configs/unet.py"], {"config.data.simulated.seed": ("0", "1")}, 2, [],
                      tmp_path)
  trials.make_data(found)
  trials.make_data(found)
  assert sorted(seed for seed, _ in made) == [0, 1] and len({f for _, f in made}) == 2


@pytest.mark.parametrize("text, values", [
  ("1e-4,2e-4", ("1e-4", "2e-4")), ("[t1,t2],[t1]", ("[t1,t2]", "[t1]")),
  ("(4,8),(8,16)", ("(4,8)", "(8,16)")), ("'48,64',\"96,128\"", ("48,64", "96,128")),
  ("cosine", ("cosine",)), ("-1, 2", ("-1", "2"))])
def test_values_hold_commas_in_brackets_and_quotes(text, values):
  assert trials.split_values(text) == values


@pytest.mark.parametrize("arguments, message", [
  (["--grid=config.nothing=1"], "configs/unet.py:test: unknown config field"),
  (["--grid=config.misalign="], "a value is empty"), (["--grid=config.misalign=1,"], "is empty"),
  (["--grid=misalign=1"], "give a field"), (["--grid=config.misalign"], "give a field"),
  (["--grid=config.data.size=[32,32"], "not closed"),
  (["--grid=config.steps=1,x"], "--config.steps=x"),
  (["--grid=config.batch_size=2,0"], "must be 1 or more"),
  (["--grid=config.misalign=1", "--config.misalign=2"], "given twice"),
  (["--grid=config.misalign=1", "--grid=config.misalign=2"], "given twice"),
  (["--grid=config.misalign=1,1"], "given twice"),
  (["--config.seed=1"], "--seeds=N"), (["--grid=config.seed=1"], "--seeds=N"),
  (["--seeds=0"], "give 1 or more"), (["--jobs=0"], "give 1 or more"),
  (["--backend=slurm", "--jobs=2"], "--backend=local only"),
  (["--backend=cloud"], "invalid choice"), (["--backend=tpu"], "TPU_NAME"),
  (["--wrong=1"], "unknown argument"), (["--config.misalign"], "unknown argument")])
def test_a_wrong_call_is_told_before_anything_runs(tmp_path, monkeypatch, arguments, message):
  monkeypatch.delenv("TPU_NAME", raising=False)
  with pytest.raises(UserError, match=message):
    run(tmp_path / "s", *arguments)
  assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("config, message", [
  ("configs/nothing.py", "No such file"), ("configs/unet.py:huge", "config variant"),
  ("configs/unet.py,configs/unet.py", "given twice"), (",", "is empty")])
def test_an_unknown_config_is_told(tmp_path, config, message):
  with pytest.raises(UserError, match=message):
    run(tmp_path, config=config)


def test_a_folder_of_another_config_is_refused(tmp_path):
  (trial,) = trials.plan(["configs/unet.py:test"], {}, 1, [], tmp_path)
  trial.folder.mkdir()
  (trial.folder / "config.json").write_text(json.dumps(trial.config.to_dict()))
  trials.plan(["configs/unet.py:test"], {}, 1, ["--config.data.dir=ELSEWHERE"], tmp_path)
  with pytest.raises(UserError, match="batch_size: 2 -> 3"):
    trials.plan(["configs/unet.py:test"], {}, 1, ["--config.batch_size=3"], tmp_path)


# --- running ---------------------------------------------------------------------------------


def test_a_failed_trial_stops_no_other_and_finished_ones_rest(tmp_path, fake, capsys):
  fake["status"] = {"misalign=1": 2}
  grid = ("--grid", "config.misalign=0,1,2")
  assert run(tmp_path, *grid) == 1
  assert len(fake["called"]) == 3
  told = capsys.readouterr()
  assert "unet_test_misalign=1_seed=0 failed" in told.err and "error: the reason" in told.err
  assert "20%|##" in (tmp_path / "logs/unet_test_misalign=1_seed=0.txt").read_text()
  assert "10%|#" not in told.err and "1 of 3 trials failed" in told.err  # a bar's last state
  assert "2 of 3 trials finished" in told.out
  fake["called"].clear()
  fake["status"] = {}
  assert run(tmp_path, *grid) == 0
  assert fake["called"] == ["unet_test_misalign=1_seed=0"]
  assert "3 of 3 trials finished" in capsys.readouterr().out
  assert run(tmp_path, *grid) == 0 and len(fake["called"]) == 1


def test_more_steps_are_no_finished_trial(tmp_path, fake):
  assert run(tmp_path) == 0
  assert run(tmp_path, "--config.steps=9") == 0
  assert len(fake["called"]) == 2


def test_an_interrupted_trial_ends_the_sweep(tmp_path, fake, capsys):
  fake["status"] = {"misalign=1": 130}
  with pytest.raises(KeyboardInterrupt):
    run(tmp_path, "--grid", "config.misalign=0,1,2")
  assert len(fake["called"]) == 2
  assert "failed" not in capsys.readouterr().err
  assert (tmp_path / "table.md").exists()


def test_a_signal_reaches_the_running_trial(tmp_path):
  """The sweep ends with status 130, and its trial was asked to save, not left behind."""
  code = ("import signal, sys, time\n"
          "from pathlib import Path\n"
          "def save(number, frame):\n"
          "  Path(sys.argv[1]).write_text('saved')\n"
          "  sys.exit(130)\n"
          "signal.signal(signal.SIGTERM, save)\n"
          "print('ready', flush=True)\n"
          "time.sleep(60)\n")
  script = (f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n"
            "from launch import sweep, trials\n"
            "from medsynth_jax import cli\n"
            f"trials.Trial.command = lambda self, b: ['python', '-c', {code!r}, sys.argv[1]]\n"
            "trials.builtin.make = lambda *a: None\n"
            "cli.guard(lambda: sys.exit(sweep.main(['--config=configs/unet.py:test',"
            " '--out=' + sys.argv[2], '--seeds=2'])))\n")
  process = subprocess.Popen([sys.executable, "-c", script, tmp_path / "note", tmp_path / "s"],
                             cwd=ROOT, stderr=subprocess.PIPE, text=True)
  log, late = tmp_path / "s/logs/unet_test_seed=0.txt", time.time() + 60
  while not (log.exists() and "ready" in log.read_text()) and time.time() < late:
    time.sleep(0.05)
  process.terminate()
  _, told = process.communicate(timeout=30)
  assert process.returncode == 130 and "interrupted; the same command continues" in told
  assert (tmp_path / "note").read_text() == "saved"
  assert not (tmp_path / "s/logs/unet_test_seed=1.txt").exists()


def test_jobs_run_at_once(tmp_path, fake):
  fake["together"] = 2  # each waits for the other
  assert run(tmp_path, "--seeds=2", "--jobs=2") == 0


def test_two_sweeps_of_one_folder_are_not_at_work_at_once(tmp_path, fake):
  """Nor a sweep and a trial that the last one has left behind."""
  (tmp_path / "logs").mkdir()
  with open(tmp_path / "logs" / "lock", "w") as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    left = subprocess.Popen(["sleep", "60"], pass_fds=[file.fileno()])
  with pytest.raises(UserError, match="another sweep, or a trial"):
    run(tmp_path)
  left.kill()
  left.wait()
  assert run(tmp_path) == 0


def test_a_trial_without_scores_has_failed(tmp_path, fake, monkeypatch, capsys):
  """As on a pod whose workers do not see the folder."""
  monkeypatch.setattr(trials.Trial, "command", lambda self, backend: ["python", "-c", "pass"])
  assert run(tmp_path) == 1
  assert "no scores in" in capsys.readouterr().err


def test_a_pod_gets_absolute_folders(tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  assert run("s", "--backend=tpu", "--dry-run", config=f"{ROOT}/configs/unet.py:test") == 0
  assert f"--workdir={tmp_path}/s/unet_test_seed=0" in capsys.readouterr().out


# --- SLURM -----------------------------------------------------------------------------------


@pytest.fixture
def queue(tmp_path, monkeypatch):
  """A folder first on PATH with a fake sbatch and squeue; `calls` and `queue` are its files."""
  folder = tmp_path / "bin"
  folder.mkdir()
  for name, body in {
      "sbatch": 'n=$(wc -l < "$d/calls")\necho "$((100 + n));cluster"',
      "squeue": 'cat "$d/queue" 2> /dev/null || true'}.items():
    (folder / name).write_text(f'#!/bin/bash\nd={folder}\n'
                               f'printf "%s " {name} "$@" >> "$d/calls"; echo >> "$d/calls"\n'
                               f'{body}\n')
    (folder / name).chmod(0o755)
  monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
  monkeypatch.setattr(trials.builtin, "make", lambda config, folder: None)
  return folder


def submitted(queue):
  calls = (queue / "calls").read_text().splitlines()
  (queue / "calls").write_text("")
  return [c for c in calls if c.startswith("sbatch")]


def test_slurm_gets_each_trial_once(tmp_path, queue, capsys):
  out = tmp_path / "s"
  assert run(out, "--seeds=2", "--backend=slurm") == 0
  first, second = submitted(queue)
  assert first.startswith(f"sbatch --parsable --job-name=unet_test_seed=0"
                          f" --output={out}/logs/unet_test_seed=0.txt launch/slurm.sbatch"
                          f" --config=configs/unet.py:test --workdir={out}/unet_test_seed=0 ")
  numbers = [(out / f"logs/unet_test_seed={i}.job").read_text().strip() for i in (0, 1)]
  assert len(set(numbers)) == 2 and all(n.isdigit() for n in numbers)
  (queue / "queue").write_text(numbers[0] + "\n")
  (out / "logs/unet_test_seed=1.txt").write_text("started\nerror: out of memory\n")
  capsys.readouterr()
  assert run(out, "--seeds=2", "--backend=slurm") == 0
  (again,) = submitted(queue)
  assert "unet_test_seed=1" in again
  told = capsys.readouterr().out
  assert f"job {numbers[0]} is in the queue" in told and "error: out of memory" in told


def test_slurm_prints_what_it_would_submit(tmp_path, queue, capsys):
  assert run(tmp_path / "s", "--backend=slurm", "--dry-run") == 0
  assert "$ sbatch --parsable --job-name=unet_test_seed=0" in capsys.readouterr().out
  assert not (queue / "calls").exists()


def test_slurm_absent_or_refusing_is_told(tmp_path, queue, monkeypatch):
  (queue / "sbatch").write_text("#!/bin/bash\necho 'sbatch: error: no such partition' >&2\nexit 1")
  with pytest.raises(UserError, match="no such partition"):
    run(tmp_path / "s", "--backend=slurm")
  monkeypatch.setenv("PATH", str(tmp_path))
  with pytest.raises(UserError, match="no squeue on this machine"):
    run(tmp_path / "s", "--backend=slurm")


def test_one_command_trains_a_trial_and_writes_the_results(tmp_path, capsys):
  line = [sys.executable, "-m", "launch.sweep", "--config=configs/unet.py:test",
          f"--out={tmp_path}", "--grid", "config.misalign=2"]
  done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr + done.stdout
  (folder,) = tmp_path.glob("simulated_*")
  assert f"--config.data.dir={folder}/data" in done.stdout
  assert not (tmp_path / "unet_test_misalign=2_seed=0" / "data").exists()
  assert "| - | lut2 |  |  |" in (tmp_path / "table.md").read_text()
  assert sweep.main(line[3:]) == 0
  again = capsys.readouterr().out
  assert "1 trials, 1 finished" in again and "medsynth_jax.main" not in again
