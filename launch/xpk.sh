#!/usr/bin/env bash
# Runs an experiment on one TPU slice of a GKE cluster that XPK has made.
#
#   launch/xpk.sh [OPTIONS] CONFIG [FLAGS of tensorar_jax.main]
#   launch/xpk.sh --cluster=pods --name=b --tpu=v5litepod-16 \
#     --image=REGISTRY/tensorar:tpu configs/llamagen_b.py --mode=train \
#     --workdir=/mnt/shared/runs/b --config.mesh.fsdp=16
#
#   --cluster=NAME  of `xpk cluster create`
#   --name=NAME     of the workload: small letters, digits and -, up to 40
#   --image=IMAGE   the target tpu of launch/Dockerfile
#   --tpu=TYPE      XPK's name of the slice, of which it takes all hosts
#   --restarts=N    (50) how often a run that has saved or failed starts again
#   --project=, --zone=  as of xpk; default: gcloud's own
#   --dry-run       prints the command and runs nothing
#
# The disk at /mnt/shared, for --workdir and the data, is one that the cluster
# has by `xpk storage attach --auto-mount=true --mount-point=/mnt/shared`.
#
# A pod that is evicted saves and ends with 75, and the workload starts again.
# To give the same command again: xpk workload delete --workload=NAME; the run
# continues from its last checkpoint.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/env.sh

cluster='' name='' image='' tpu='' restarts=50 dry=
where=()
while [[ ${1:-} == -* ]]; do
  case $1 in
    --cluster=*) cluster=${1#*=} ;;
    --name=*) name=${1#*=} ;;
    --image=*) image=${1#*=} ;;
    --tpu=*) tpu=${1#*=} ;;
    --restarts=*) restarts=${1#*=} ;;
    --project=* | --zone=*) where+=("$1") ;;
    --dry-run) dry=1 ;;
    *) die "$1: not an option of this file; flags of main come after CONFIG." ;;
  esac
  shift
done
[[ $# -gt 0 ]] || die "expected a CONFIG after the options."
check name "$name" '[a-z]([a-z0-9-]{0,38}[a-z0-9])?' "up to 40 small letters, digits and -"
[[ -n $cluster && -n $image && -n $tpu ]] ||
  die "--cluster=$cluster --image=$image --tpu=$tpu: expected all three."
check restarts "$restarts" '[0-9]{1,6}' "a number"

# GKE tells every pod its place. XPK sends SIGTERM to the shell that it starts:
# `exec` makes that the run. Kubernetes must not expand $(X) of the user's.
dollar='$'
words=("${@//"$dollar("/"$dollar$dollar("}")
run="cd /app && exec $(show launch/local.sh "${words[0]}" --coordinator=auto "${words[@]:1}")"
command=(
  xpk workload create "--cluster=$cluster" "--workload=$name" "${where[@]}"
  "--docker-image=$image" "--tpu-type=$tpu" --num-slices=1
  "--max-restarts=$restarts" --restart-on-exit-codes=75
  --termination-grace-period-seconds=300 "--command=$run"
)
if [[ -n $dry ]]; then show "${command[@]}"; else "${command[@]}"; fi
