#!/usr/bin/env bash
# Installs this project for a notebook, and leaves the JAX, the plugins for its
# accelerator, the PyTorch, the TensorFlow and the NumPy that are there as they
# are: those of Colab fit its machines.
#
#   notebooks/install.sh .            # the clone
#   notebooks/install.sh '.[torch]'   # with an extra; a wheel or
#                                     # 'tensorar_jax @ git+URL' will do, too
#
# It ends with an error if the JAX that is there is too old for this project.
set -euo pipefail
[[ $# -eq 1 ]] || { echo "error: expected what to install, such as ." >&2; exit 1; }

keep=$(mktemp)
trap 'rm -f "$keep"' EXIT
names='jax|jaxlib|jax[-_]cuda.*|libtpu|nvidia[-_].*|torch|tensorflow|tensorflow[-_]cpu|numpy'
python -m pip list --format=freeze | { grep -E "^($names)==" || true; } > "$keep"
python -m pip install -q -c "$keep" "$1" || {
  echo "error: $1 does not go with what is here and was to stay as it is:" >&2
  cat "$keep" >&2
  exit 1
}
