# shellcheck shell=bash
# The environment of every run, and a few functions; the launchers source it.
# What you have set yourself stays, or comes last and wins.

# GPUs: the scheduler that starts a layer's gathers and sums before they are
# needed, so that they run during computation. jaxlib 0.10.2 takes it for
# H100s by itself, for A100s only when told to: six layers under fsdp=8, compiled
# for eight of these, have 20 kernels beside collectives with it and 10 without.
# Other platforms have no use for the flag. TPUs need nothing in
# LIBTPU_INIT_ARGS: libtpu 0.0.42 makes its collectives asynchronous as it is.
export XLA_FLAGS="--xla_gpu_enable_latency_hiding_scheduler=true${XLA_FLAGS:+ $XLA_FLAGS}"

# JAX takes 0.75 of a GPU at most. A run has it to itself; what is left is for
# CUDA and for NCCL's buffers, which are not in JAX's share. JAX refuses the
# two names of this variable together.
if [[ -z ${XLA_PYTHON_CLIENT_MEM_FRACTION:-} ]]; then
  export XLA_CLIENT_MEM_FRACTION=${XLA_CLIENT_MEM_FRACTION:-0.9}
fi

# NCCL is silent by default: WARN names the call and the peer that failed. If
# hosts do not find one another, it is most often the network card: name yours
# with NCCL_SOCKET_IFNAME=eth0.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}

# The interpreter of `make`, or PYTHON=..., or the one of the image.
if [[ -z ${PYTHON:-} ]]; then
  PYTHON=python3
  [[ -x .venv/bin/python ]] && PYTHON=.venv/bin/python
fi

# Prints a command as a shell would have it typed.
show() {
  local word line='' quote="'\\''"
  for word; do
    [[ $word =~ ^[A-Za-z0-9_=:,./@%+-]+$ ]] || word="'${word//\'/"$quote"}'"
    line+=" $word"
  done
  printf '%s\n' "${line:1}"
}

# Prints the variables above as an `env` that may stand before a command.
environment() {
  local name words=(env)
  for name in XLA_FLAGS XLA_CLIENT_MEM_FRACTION XLA_PYTHON_CLIENT_MEM_FRACTION \
    XLA_PYTHON_CLIENT_PREALLOCATE NCCL_DEBUG JAX_LOCAL_DEVICE_IDS; do
    [[ -n ${!name:-} ]] && words+=("$name=${!name}")
  done
  show "${words[@]}"
}

# Ends with a message, as for a bad option.
die() {
  echo "error: $*" >&2
  exit 2
}

# Ends unless the whole value of an option fits a pattern: check NAME VALUE
# PATTERN EXPECTED. What goes into YAML or another command is checked here.
check() {
  [[ $2 =~ ^($3)$ ]] || die "--$1=$2: expected $4."
}

# Ends if one of the words would break a line of YAML.
one_line() {
  local word
  for word; do
    [[ $word != *[[:cntrl:]]* ]] ||
      die "a line break or the like in $(printf %q "$word"): expected none."
  done
}
