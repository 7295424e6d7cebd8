#!/usr/bin/env bash
# Trains and evaluates on all workers of a Cloud TPU: python -m medsynth_jax.main with the arguments
# given here, by gcloud over ssh.
#
#   export TPU_NAME=my-pod TPU_ZONE=us-central2-b [TPU_PROJECT=my-project]
#   launch/tpu_pod.sh --setup                                          copies and installs the code
#   launch/tpu_pod.sh --config=configs/cldm.py:paper --workdir=/mnt/runs/cldm
#   launch/tpu_pod.sh --dry-run ...                                    prints the commands only
#
# Run it from the project's folder; on the workers the code lies in ~/medsynth_jax (TPU_FOLDER), and
# TPU_PYTHON (python3) is their Python, 3.11 or newer.
# --workdir and --config.data.dir lie on a disk that all workers have mounted. JAX finds the other
# workers by itself. Ctrl-C and SIGTERM ask the workers to save (status 130); the same command goes
# on, also after the pod was preempted and made again.
set -uo pipefail

dry="" setup="" flags=()
for argument in "$@"; do
  case $argument in
    --dry-run) dry=yes ;;
    --setup) setup=yes ;;
    *) flags+=("$argument") ;;
  esac
done
for name in TPU_NAME TPU_ZONE; do
  if [[ -z ${!name:-} ]]; then
    echo "error: set $name to the TPU's, as in export TPU_NAME=my-pod TPU_ZONE=us-central2-b" >&2
    exit 2
  fi
done
if [[ -z $setup && ${#flags[@]} == 0 ]]; then
  echo "error: give the arguments of medsynth_jax.main, --setup, or both" >&2
  exit 2
fi

tpu=(gcloud compute tpus tpu-vm)
where=(--zone="$TPU_ZONE" --worker=all)
if [[ -n ${TPU_PROJECT:-} ]]; then
  where+=(--project="$TPU_PROJECT")
fi
folder=${TPU_FOLDER:-medsynth_jax}
python=${TPU_PYTHON:-python3}
note=.process_of_the_run

run() {  # prints a command, then runs it
  printf '$'
  for word in "$@"; do
    [[ $word =~ ^[A-Za-z0-9_./:=,+-]+$ ]] || word=${word@Q}
    printf ' %s' "$word"
  done
  echo
  [[ -n $dry ]] || "$@"
}

on_workers() {
  run "${tpu[@]}" ssh "$TPU_NAME" "${where[@]}" --command="$1"
}

if [[ -n $setup ]]; then
  on_workers "mkdir -p $folder" || exit
  run "${tpu[@]}" scp --recurse pyproject.toml README.md LICENSE medsynth_jax configs launch \
    "$TPU_NAME:$folder/" "${where[@]}" || exit
  on_workers "cd $folder && $python -m pip install --quiet -e '.[tpu]'" || exit
fi
if [[ ${#flags[@]} == 0 ]]; then
  exit 0
fi

# Ctrl-C does not reach gcloud in the background; the workers are asked by their process's number
stopped=""
trap 'stopped=yes; on_workers "cd $folder && kill -TERM \$(cat $note)"' TERM INT
on_workers "cd $folder && echo \$\$ > $note && exec $python -m medsynth_jax.main\
$(printf ' %q' "${flags[@]}") --coordinator=auto" &
child=$!
while kill -0 "$child" 2> /dev/null; do
  wait "$child"  # the signal ends this, while the workers are saving
done
wait "$child"
status=$?
if [[ -n $stopped && $status != 0 ]]; then
  status=130
fi
exit "$status"
