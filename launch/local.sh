#!/usr/bin/env bash
# Runs an experiment on this host: in one process, or in several that compute
# as one.
#
#   launch/local.sh [OPTIONS] CONFIG [FLAGS of tensorar_jax.main]
#   launch/local.sh configs/digits.py --workdir=runs/a --config.seed=1
#   launch/local.sh --processes=4 configs/llamagen_b.py --mode=train
#
#   --processes=N  (1) The GPUs that nvidia-smi lists, or CUDA_VISIBLE_DEVICES,
#                  are shared out evenly. One process takes all devices, and is
#                  faster to start; several are for the test of what a cluster
#                  will do. Needs bash 5.1.
#   --dry-run      prints the commands and starts nothing.
#
# Process 0 writes to the console as it is, the others with [1], [2], ... before
# each line. SIGTERM and Ctrl-C reach all as SIGTERM, a second one kills. When
# one fails, the others are stopped, and the exit code is that of the first.
# 75 says: saved after SIGTERM; the same command continues. So it does after a
# crash. PYTHON=... picks an interpreter, else .venv's; GRACE=60 is how many
# seconds the others have to stop.
set -euo pipefail
cd "$(dirname "$0")/.."
# Memory as it is needed, so that a second program fits beside this one.
export XLA_PYTHON_CLIENT_PREALLOCATE=${XLA_PYTHON_CLIENT_PREALLOCATE:-false}
. launch/env.sh

processes=1 dry=
while [[ ${1:-} == -* ]]; do
  case $1 in
    --processes=*) processes=${1#*=} ;;
    --dry-run) dry=1 ;;
    *) die "$1: expected --processes=N or --dry-run before CONFIG." ;;
  esac
  shift
done
[[ $processes =~ ^[1-9][0-9]*$ ]] || die "--processes=$processes: expected 1 or more."
[[ $# -gt 0 ]] || die "usage: launch/local.sh [--processes=N] [--dry-run] CONFIG [FLAGS...]"
command=("$PYTHON" -m tensorar_jax.main "--config=$1" "${@:2}")

if ((processes == 1)); then
  [[ -z $dry ]] || { echo "$(environment) $(show "${command[@]}")" && exit; }
  exec "${command[@]}"
fi

# The GPUs to share out, by number or UUID.
gpus=()
if [[ ${JAX_PLATFORMS:-} != cpu ]]; then
  if [[ -n ${CUDA_VISIBLE_DEVICES:-} ]]; then
    IFS=, read -ra gpus <<< "$CUDA_VISIBLE_DEVICES"
  elif command -v nvidia-smi > /dev/null; then
    mapfile -t gpus < <(nvidia-smi --query-gpu=index --format=csv,noheader)
  fi
fi
((${#gpus[@]} % processes == 0)) ||
  die "--processes=$processes: expected a divisor of ${#gpus[@]}, the GPUs here."
share=$((${#gpus[@]} / processes))

# Below the ports that the system gives to outgoing connections.
port=$((20000 + RANDOM % 10000))
while (: < "/dev/tcp/127.0.0.1/$port") 2> /dev/null; do port=$((port + 1)); done
command+=("--coordinator=127.0.0.1:$port" "--num_processes=$processes")

running=()
for ((i = 0; i < processes; i++)); do
  own=(env)
  if ((share)); then
    own+=("CUDA_VISIBLE_DEVICES=$(IFS=, && echo "${gpus[*]:i * share:share}")")
  fi
  own+=("${command[@]}" "--process_id=$i")
  if [[ -n $dry ]]; then
    echo "$(environment) $(show "${own[@]:1}")"
  elif ((i == 0)); then
    "${own[@]}" &
    running+=($!)
  else
    # Ctrl-C reaches sed as well, which has to print the last words.
    "${own[@]}" > >(trap '' INT TERM && exec sed -u "s/^/[$i] /") 2>&1 &
    running+=($!)
  fi
done
[[ -z $dry ]] || exit 0

signal=TERM
# shellcheck disable=SC2329 # the trap calls it
pass_on() {
  kill "-$signal" "${running[@]}" 2> /dev/null || true
  signal=KILL
}
trap pass_on TERM INT
first=0 timer=
while ((${#running[@]})); do
  ended='' code=0
  # shellcheck disable=SC2086  # no word if there is no timer
  wait -n -p ended "${running[@]}" $timer || code=$?
  [[ -n ${ended:-} ]] || continue # a signal came
  if [[ $ended == "$timer" ]]; then
    timer=
    kill -KILL "${running[@]}" 2> /dev/null || true
    continue
  fi
  for i in "${!running[@]}"; do
    [[ ${running[i]} != "$ended" ]] || unset "running[$i]"
  done
  if ((code && !first)); then
    first=$code
    # All save and end with 75 at the same step; nobody is to be disturbed.
    ((code == 75)) || kill -TERM "${running[@]}" 2> /dev/null || true
    # Without that peer they may wait for ever, deaf to SIGTERM.
    sleep "${GRACE:-60}" &
    timer=$!
  fi
done
[[ -z $timer ]] || kill "$timer" 2> /dev/null || true
exit "$first"
