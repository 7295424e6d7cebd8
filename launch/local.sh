#!/usr/bin/env bash
# Trains and evaluates on this machine: python -m medsynth_jax.main with the arguments given here.
#
#   launch/local.sh --config=configs/unet.py --workdir=RUN
#   DEVICES=8 launch/local.sh ...    eight virtual CPU devices instead of the machine's own
#   PROCESSES=2 launch/local.sh ...  two processes that share one run, as on two machines
#                                    (PORT: where they meet, default 12355)
#
# Several machines without a cluster manager: on each, with its own number for --process,
#   launch/local.sh ... --coordinator=FIRST_MACHINE:12355 --processes=2 --process=0
#
# Ctrl-C and SIGTERM ask all processes to save; the status is then 130 and the same command goes on.
# Where one process fails, the others are ended.
set -uo pipefail

if [[ -n ${DEVICES:-} ]]; then
  export JAX_PLATFORMS=cpu
  export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=$DEVICES"
fi
if [[ ${PROCESSES:-1} == 1 ]]; then
  exec python -m medsynth_jax.main "$@"
fi

children=()
trap 'kill -TERM "${children[@]}" 2> /dev/null' TERM INT
for ((process = 0; process < PROCESSES; process++)); do
  python -m medsynth_jax.main "$@" --coordinator="localhost:${PORT:-12355}" \
    --processes="$PROCESSES" --process="$process" &
  children+=($!)
done

status=0
while ((${#children[@]})); do
  sleep 0.2
  for i in "${!children[@]}"; do
    if ! kill -0 "${children[i]}" 2> /dev/null; then
      wait "${children[i]}"
      code=$?
      unset "children[i]"
      if ((code && !status)); then
        status=$code
        kill -TERM "${children[@]}" 2> /dev/null
      fi
    fi
  done
done
exit "$status"
