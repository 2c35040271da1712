#!/usr/bin/env bash
# Runs an experiment as a managed job of SkyPilot, one process per node.
#
#   launch/sky.sh [OPTIONS] CONFIG [FLAGS of tensorar_jax.main]
#   launch/sky.sh --name=b --volume=shared --gpus=H100:8 --nodes=2 \
#     configs/llamagen_b.py --mode=train --workdir=/mnt/shared/runs/b
#
#   --name=NAME      of the job
#   --volume=VOLUME  of `sky volumes apply`, which all nodes may write to; it is
#                    /mnt/shared: --workdir and the data go there
#   --gpus=GPUS      (H100:8) SkyPilot's name of them and how many a node has
#   --nodes=N        (1)
#   --infra=INFRA    (kubernetes) a place that has volumes, kubernetes/CONTEXT
#   --extra=EXTRA    (cuda13) or cuda12: which JAX to install
#   --dry-run        prints the task and starts nothing
#
# The project's files go along as they are here. A preempted node is replaced,
# and so are nodes whose run saved and ended with 75; the run continues from its
# last checkpoint. `sky jobs logs --name NAME` shows it, `sky jobs cancel` ends
# it.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/env.sh

name='' volume='' gpus=H100:8 nodes=1 infra=kubernetes extra=cuda13 dry=
while [[ ${1:-} == -* ]]; do
  case $1 in
    --name=*) name=${1#*=} ;;
    --volume=*) volume=${1#*=} ;;
    --gpus=*) gpus=${1#*=} ;;
    --nodes=*) nodes=${1#*=} ;;
    --infra=*) infra=${1#*=} ;;
    --extra=cuda12 | --extra=cuda13) extra=${1#*=} ;;
    --dry-run) dry=1 ;;
    *) die "$1: not an option of this file; flags of main come after CONFIG." ;;
  esac
  shift
done
[[ $# -gt 0 ]] || die "expected a CONFIG after the options."
check name "$name" '[a-z]([a-z0-9-]{0,38}[a-z0-9])?' "up to 40 small letters, digits and -"
check volume "$volume" '[A-Za-z0-9][A-Za-z0-9._-]*' "the name of a volume"
check nodes "$nodes" '[1-9][0-9]{0,5}' "1 or more"
check infra "$infra" '[A-Za-z0-9][A-Za-z0-9._/:@*-]*' "a place, as kubernetes/CONTEXT"
check gpus "$gpus" '[A-Za-z0-9][A-Za-z0-9._-]*(:[1-9][0-9]{0,2})?' "GPUs and their number, as H100:8"
one_line "$@"
[[ $1 != *[{}]* ]] || die "$1: expected a CONFIG without braces."

task=$(< launch/sky.yaml)
fill() {
  task=${task//"{$1}"/"$2"}
}
# In quotes: yes, 4e2 and null would be no texts to YAML.
fill NAME "\"$name\""
fill NODES "$nodes"
fill INFRA "\"$infra\""
fill GPUS "\"$gpus\""
fill VOLUME "\"$volume\""
fill EXTRA "$extra"
fill CONFIG "$(show "$1")"
fill FLAGS "$(show "${@:2}")" # last: a flag may have braces

if [[ -n $dry ]]; then
  printf '%s\n' "$task"
else
  file=$(mktemp --suffix=.yaml)
  trap 'rm -f "$file"' EXIT
  printf '%s\n' "$task" > "$file"
  sky jobs launch --yes --name "$name" "$file"
fi
