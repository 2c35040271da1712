#!/usr/bin/env bash
# Runs an experiment on Kubernetes, as a JobSet with one pod per host.
#
#   launch/k8s.sh [OPTIONS] CONFIG [FLAGS of tensorar_jax.main]
#   launch/k8s.sh --accelerator=gpu --name=b --image=IMAGE --claim=shared \
#     --hosts=4 --per-host=8 configs/llamagen_b.py --mode=train \
#     --workdir=/mnt/shared/runs/b --config.mesh.fsdp=8
#   launch/k8s.sh --accelerator=tpu --name=b --image=IMAGE --claim=shared \
#     --hosts=4 --tpu=tpu-v5-lite-podslice --topology=4x4 configs/llamagen_b.py ...
#
#   --accelerator=gpu|tpu  which file of launch/k8s/ is filled in
#   --name=NAME            of the JobSet: small letters, digits and -, up to 40
#   --image=IMAGE          of launch/Dockerfile: its target gpu or tpu
#   --claim=CLAIM          a PersistentVolumeClaim that many pods may write to;
#                          it is /mnt/shared: --workdir and the data go there
#   --hosts=N              (1) of a TPU slice: all of its hosts
#   --per-host=N           GPUs (8) or TPU chips (4) of one host
#   --memory=SIZE          of one host, as 200Gi, which its node must have to
#                          spare; by default 16Gi for each GPU or TPU chip
#   --tpu=, --topology=    GKE's names of the slice, for TPUs only
#   --dry-run              prints the manifest and creates nothing
#
# The cluster has JobSet (jobset.x-k8s.io/v1alpha2 with failure rules, 0.6 or
# later); kubectl points to it and to the namespace.
# The images run as a user without rights, uid 1000, to whom CLAIM must be
# writable; their working directory is this project. No process can get more
# rights.
#
# An evicted or preempted pod saves and ends with 75: all start again, as often
# as that happens. Other failures are tried three times. After that, or to give
# the same command again: kubectl delete jobset NAME; the run continues from its
# last checkpoint. Logs: kubectl logs -f jobs/NAME-workers-0 shows host 0 first.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/env.sh

accelerator='' name='' image='' claim='' hosts=1 per_host='' memory='' tpu='' topology='' dry=
while [[ ${1:-} == -* ]]; do
  case $1 in
    --accelerator=gpu | --accelerator=tpu) accelerator=${1#*=} ;;
    --name=*) name=${1#*=} ;;
    --image=*) image=${1#*=} ;;
    --claim=*) claim=${1#*=} ;;
    --hosts=*) hosts=${1#*=} ;;
    --per-host=*) per_host=${1#*=} ;;
    --memory=*) memory=${1#*=} ;;
    --tpu=*) tpu=${1#*=} ;;
    --topology=*) topology=${1#*=} ;;
    --dry-run) dry=1 ;;
    *) die "$1: not an option of this file; flags of main come after CONFIG." ;;
  esac
  shift
done
[[ -n $accelerator ]] || die "expected --accelerator=gpu or --accelerator=tpu."
[[ $# -gt 0 ]] || die "expected a CONFIG after the options."
check name "$name" '[a-z]([a-z0-9-]{0,38}[a-z0-9])?' "up to 40 small letters, digits and -"
[[ -n $image && -n $claim ]] || die "--image=$image --claim=$claim: expected both."
check image "$image" '[A-Za-z0-9][A-Za-z0-9._/:@-]*' "the name of an image, as registry/place/image:1"
check claim "$claim" '[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?' "the name of a claim: small letters, digits, - and dots"
if [[ $accelerator == tpu ]]; then
  : "${per_host:=4}"
  [[ -n $tpu && -n $topology ]] || die "--tpu=$tpu --topology=$topology: expected both."
  check tpu "$tpu" '[a-z]([a-z0-9-]{0,61}[a-z0-9])?' "GKE's name of a kind of TPU, as tpu-v5-lite-podslice"
  check topology "$topology" '[1-9][0-9]{0,3}(x[1-9][0-9]{0,3}){1,2}' "a shape, as 4x4 or 2x2x2"
  # GKE tells every pod its place in TPU_WORKER_HOSTNAMES and TPU_WORKER_ID.
  join=(--coordinator=auto)
else
  [[ -z $tpu && -z $topology ]] || die "--tpu=$tpu --topology=$topology: these are for --accelerator=tpu."
  : "${per_host:=8}"
  # Kubernetes fills in the index; JAX's own detection needs another package and
  # the right to read pods.
  # shellcheck disable=SC2016
  join=(
    "--coordinator=$name-workers-0-0.$name:1234" "--num_processes=$hosts"
    '--process_id=$(JOB_COMPLETION_INDEX)'
  )
fi
check hosts "$hosts" '[1-9][0-9]{0,5}' "a whole number from 1"
check per-host "$per_host" '[1-9][0-9]{0,2}' "a whole number from 1"
: "${memory:=$((16 * per_host))Gi}"
check memory "$memory" '[1-9][0-9]{0,5}[MG]i' "a size, as 200Gi"

one_line "$@"
# Words as JSON strings, which YAML reads.
json() {
  local word text=''
  for word; do
    word=${word//\\/\\\\}
    text+=", \"${word//\"/\\\"}\""
  done
  echo "[${text#, }]"
}
# Kubernetes would expand $(X) in what the user wrote.
dollar='$'
words=("${@//"$dollar("/"$dollar$dollar("}")
command=$(json launch/local.sh "${words[0]}" "${join[@]}" "${words[@]:1}")

manifest=$(< "launch/k8s/jobset_$accelerator.yaml")
fill() {
  manifest=${manifest//"{$1}"/"$2"}
}
# In quotes: yes, 4e2 and null would be no texts to YAML.
fill NAME "\"$name\""
fill IMAGE "\"$image\""
fill CLAIM "\"$claim\""
fill HOSTS "$hosts"
fill PER_HOST "$per_host"
fill MEMORY "$memory"
fill TPU "\"$tpu\""
fill TOPOLOGY "\"$topology\""
fill COMMAND "$command" # last: a flag may have braces

if [[ -n $dry ]]; then
  printf '%s\n' "$manifest"
else
  kubectl create -f - <<< "$manifest"
fi
