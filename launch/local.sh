#!/usr/bin/env bash
# Runs an experiment on this machine, on whatever JAX finds here.
#
#   launch/local.sh configs/digits.py [--workdir=runs/a] [--config.seed=1] ...
#
# A run that was interrupted continues when the same command is given again.
set -euo pipefail
cd "$(dirname "$0")/.."
config=${1:?usage: launch/local.sh CONFIG [FLAGS...]}
shift
# Take GPU memory as it is needed, so that a second program fits beside this one.
export XLA_PYTHON_CLIENT_PREALLOCATE=${XLA_PYTHON_CLIENT_PREALLOCATE:-false}
python=.venv/bin/python
[ -x "$python" ] || python=python3
exec "$python" -m tensorar_jax.main --config="$config" "$@"
