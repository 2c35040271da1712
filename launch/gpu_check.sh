#!/usr/bin/env bash
# Asks a GPU, in a few minutes, how fast it is, whether its numbers are right,
# and where its time goes; see launch/gpu_check.py for what each part does.
#
#   launch/gpu_check.sh [--output=runs/gpu] [--parts=speed,correctness,more]
#                       [--seconds=240] [--tiny] [--nopeer] [--cache=FOLDER]
#
#   --seconds=240     of each part, or one number for each: 300,150,90. A part
#                     is stopped then; what it has measured is on the disk.
#   --tiny            a model of a few thousand weights, for any machine
#   --nopeer          without PyTorch
#   --cache=FOLDER    of compiled programs, which the next run takes from there
#
# results.jsonl, summary.json, summary.md and logs are in --output. The same
# command goes on with what was not done. PYTHON=... picks an interpreter, else
# .venv's; COMMIT=... is noted down.
set -euo pipefail
cd "$(dirname "$0")/.."
# The rest of the memory is the peer's.
export XLA_CLIENT_MEM_FRACTION=${XLA_CLIENT_MEM_FRACTION:-0.7}
. launch/env.sh

output=runs/gpu parts=speed,correctness,more seconds=240 cache='' options=()
while [[ $# -gt 0 ]]; do
  case $1 in
    --output=*) output=${1#*=} ;;
    --parts=*) parts=${1#*=} ;;
    --seconds=*) seconds=${1#*=} ;;
    --cache=*) cache=${1#*=} ;;
    --tiny | --nopeer) options+=("$1") ;;
    *) die "$1: expected --output, --parts, --seconds, --tiny, --nopeer or --cache." ;;
  esac
  shift
done
[[ $seconds =~ ^[1-9][0-9]*(,[1-9][0-9]*)*$ ]] || die "--seconds=$seconds: expected numbers, as 300,150,90."
# The shell leaves ~ after = as it is.
output=${output/#'~/'/"$HOME/"} cache=${cache/#'~/'/"$HOME/"}
[[ $output$cache != *://* ]] || die "--output=$output --cache=$cache: expected folders of this machine, no URL."
mkdir -p "$output"
cache=${cache:-${TMPDIR:-/tmp}/tensorar_jax_gpu_check}
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$cache/jax}
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=${JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS:-0}
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$cache/inductor}
COMMIT=${COMMIT:-$(git rev-parse --short HEAD 2>/dev/null || true)}
export COMMIT

IFS=, read -ra names <<<"$parts"
IFS=, read -ra times <<<"$seconds"
for i in "${!names[@]}"; do
  part=${names[i]} limit=${times[i]:-${times[-1]}}
  check=("$PYTHON" -m launch.gpu_check "--part=$part" "--seconds=$limit" "--output=$output")
  memory=(env)
  # Several processes share the GPU.
  [[ $part == correctness ]] && memory=(env XLA_PYTHON_CLIENT_PREALLOCATE=false)
  echo "$(date +%T) $part: at most $limit s"
  "${memory[@]}" timeout --kill-after=5 "$limit" "${check[@]}" "${options[@]}" 2>&1 |
    tee -a "$output/$part.log" || echo "$part: stopped, code $?"
done
"$PYTHON" -m launch.gpu_check --part=summary "--output=$output"
