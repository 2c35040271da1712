#!/usr/bin/env bash
# Runs an experiment on all hosts of a Cloud TPU slice, from your own machine.
#
#   launch/tpu_pod.sh --name=TPU --zone=ZONE [OPTIONS] CONFIG [FLAGS of main]
#   launch/tpu_pod.sh --name=pod --zone=us-east5-b configs/llamagen_b.py \
#     --mode=train --workdir=/mnt/shared/runs/b --config.mesh.fsdp=16
#
#   --project=ID         as of gcloud; default: gcloud's own
#   --action=start       (default) copies the project's files as they are here,
#                        installs what is missing, starts the run
#   --action=log         the last lines of each host's log; no CONFIG
#   --action=stop        SIGTERM: training saves and ends; no CONFIG
#   --dry-run            prints the commands and runs none
#
# The slice exists already (gcloud compute tpus tpu-vm create, or a queued
# resource), its hosts have Python 3.11 with venv, and --workdir and the data
# are on a disk that all of them have mounted (Filestore, for example).
#
# The run belongs to no terminal: a lost connection does not end it. Each host
# has ~/tensorar_jax/run.log; the first one's has the losses. A slice that was
# preempted is gone: create it again and give the same command, which continues
# from the last checkpoint. The same after --action=stop.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/env.sh

name='' zone='' project='' action=start dry=
while [[ ${1:-} == -* ]]; do
  case $1 in
    --name=*) name=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --project=*) project=${1#*=} ;;
    --action=start | --action=log | --action=stop) action=${1#*=} ;;
    --dry-run) dry=1 ;;
    *) die "$1: expected --name=, --zone=, --project=, --action=start|log|stop or --dry-run before CONFIG." ;;
  esac
  shift
done
[[ -n $name && -n $zone ]] || die "--name=$name --zone=$zone: expected both."
# gcloud would take other words for flags, or for other machines.
check name "$name" '([A-Za-z_][A-Za-z0-9_.-]*@)?[a-z]([a-z0-9-]{0,61}[a-z0-9])?' "small letters, digits and -, perhaps after USER@"
check zone "$zone" '[a-z][a-z0-9-]*' "a zone, as us-east5-b"
check project "$project" '([a-z0-9][a-z0-9.:-]*)?' "the ID of a project, as my-project-1"
case $action in
  start) [[ $# -gt 0 ]] || die "--action=start: expected a CONFIG." ;;
  *) [[ $# -eq 0 ]] || die "--action=$action: expected no CONFIG and no flags, got $*." ;;
esac

where=("--zone=$zone" --worker=all)
[[ -z $project ]] || where+=("--project=$project")

# Prints a command or runs it.
run() {
  if [[ -n $dry ]]; then show "$@"; else "$@"; fi
}
# Runs a script on all hosts at once; gcloud prints what each of them says.
everywhere() {
  run gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --command="$1"
}

# shellcheck disable=SC2016 # the hosts expand it
case $action in
  log) everywhere 'tail -n 20 tensorar_jax/run.log' ;;
  stop) everywhere 'kill -TERM "$(cat tensorar_jax/run.pid)"' ;;
  start)
    archive=tensorar_jax.tar.gz
    folder=/tmp
    if [[ -z $dry ]]; then
      folder=$(mktemp -d)
      trap 'rm -rf "$folder"' EXIT
    fi
    # What git does not ignore: new configs too, but no runs and no .venv.
    run bash -c 'git ls-files -z --cached --others --exclude-standard |
      tar --null --files-from=- -czf "$0"' "$folder/$archive"
    run gcloud compute tpus tpu-vm scp "$folder/$archive" "$name:" "${where[@]}"
    # The metadata server knows the hosts, but JAX asks it only if it is told
    # to: --coordinator=auto.
    everywhere "set -e
mkdir -p tensorar_jax && cd tensorar_jax
if [ -f run.pid ] && kill -0 \"\$(cat run.pid)\" 2> /dev/null; then
  echo 'error: a run is under way; --action=stop ends it.' >&2
  exit 1
fi
tar -xzf ../$archive
[ -x .venv/bin/python ] || python3.11 -m venv .venv
.venv/bin/pip install -q -c requirements.txt -e '.[tpu]'
setsid nohup launch/local.sh $(show "$1" --coordinator=auto "${@:2}") \\
  >> run.log 2>&1 < /dev/null &
echo \$! > run.pid"
    ;;
esac
