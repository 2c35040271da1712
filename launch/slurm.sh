#!/usr/bin/env bash
# Runs an experiment on the nodes of a SLURM job. From the project's folder:
#
#   sbatch [SLURM'S OPTIONS] launch/slurm.sh [OPTIONS] CONFIG [FLAGS of main]
#   sbatch --nodes=4 --gpus-per-node=8 --partition=gpu --time=24:00:00 \
#     launch/slurm.sh configs/llamagen_b.py --mode=train --config.mesh.fsdp=8
#
#   --tasks=gpu    (default) one process per GPU, as JAX expects under SLURM
#   --tasks=node   one process per node, which has all its GPUs
#   --dry-run      prints the command and starts nothing; works without SLURM
#
# The project's folder, with its .venv (or PYTHON=...), and --workdir are on a
# disk that all nodes see. Process 0 logs to tensorar-JOB.log, as do all errors.
#
# Three minutes before the time limit, and when the job is preempted, training
# gets SIGTERM, saves and ends with 75 ("start me again"): the job goes back to
# the queue and continues. So it does after a node has failed. It ends for good
# when training is done, fails, or is cancelled. `scancel --signal=TERM JOB`
# saves and starts again, on other nodes for example. Preemption's GraceTime and
# SLURM's KillWait have to be long enough for saving.
#
# Below are the defaults; options of `sbatch` override them. Whole nodes, as
# each process has an equal part of the cores. Ask for GPUs per node, never per
# task: with --gpus-per-task a process sees one GPU, as number 0, but JAX takes
# the one with the task's number. No `B:` in --signal: it is for the processes.
#
#SBATCH --job-name=tensorar
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --requeue
#SBATCH --signal=TERM@180
#SBATCH --output=tensorar-%j.log
#SBATCH --open-mode=append
set -euo pipefail
# A copy of this file runs: its own folder says nothing of the project's.
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
[[ -f launch/env.sh ]] || {
  echo "error: submit from the project's folder, not from $PWD." >&2
  exit 2
}
. launch/env.sh

tasks=gpu dry=
while [[ ${1:-} == -* ]]; do
  case $1 in
    --tasks=gpu | --tasks=node) tasks=${1#*=} ;;
    --dry-run) dry=1 ;;
    *) die "$1: expected --tasks=gpu, --tasks=node or --dry-run before CONFIG." ;;
  esac
  shift
done
[[ $# -gt 0 ]] || die "usage: sbatch launch/slurm.sh [--tasks=gpu|node] [--dry-run] CONFIG [FLAGS...]"
if [[ -n $dry && -z ${SLURM_JOB_ID:-} ]]; then
  # What the defaults above would give.
  SLURM_JOB_NUM_NODES=1 SLURM_GPUS_ON_NODE=8 SLURM_CPUS_ON_NODE=$(nproc)
fi
[[ -n ${SLURM_JOB_NUM_NODES:-} ]] || die "this is for sbatch; on one host use launch/local.sh."
gpus=${SLURM_GPUS_ON_NODE:-0}
((gpus)) || [[ $tasks == node ]] ||
  die "the job has no GPUs: expected sbatch --gpus-per-node=N, or --tasks=node."

per_node=$gpus
if [[ $tasks == node ]]; then
  per_node=1
  # JAX would take the GPU with the task's number: the first one alone.
  ((gpus == 0)) || JAX_LOCAL_DEVICE_IDS=$(seq -s, 0 $((gpus - 1)))
  export JAX_LOCAL_DEVICE_IDS=${JAX_LOCAL_DEVICE_IDS:-}
fi
cores=$((${SLURM_CPUS_ON_NODE:-1} / per_node))
command=(
  srun "--nodes=$SLURM_JOB_NUM_NODES" "--ntasks-per-node=$per_node"
  "--ntasks=$((SLURM_JOB_NUM_NODES * per_node))"
  "--cpus-per-task=$((cores > 0 ? cores : 1))"
  # All tasks of a node see all its GPUs; JAX chooses.
  --gpu-bind=none
  # Processes that have saved end within moments of one another: killing the
  # rest at the first 75 would make that another code. Those that have lost a
  # peer end when JAX has noticed, after some 100 s, or else after 300.
  --kill-on-bad-exit=0 --wait=300
  "$PYTHON" -m tensorar_jax.main "--config=$1" "${@:2}"
)
[[ -z $dry ]] || { echo "$(environment) $(show "${command[@]}")" && exit; }

# This shell has to outlive srun to put the job back. It must not pass SIGTERM
# on: srun would answer with SIGKILL to all. SLURM tells the processes itself.
trap : TERM
code=0
"${command[@]}" || code=$?
# After `scancel` or a preemption that requeues, it is no longer RUNNING.
if ((code == 75)) &&
  [[ $(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T) == RUNNING ]]; then
  echo "saved; back to the queue"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
