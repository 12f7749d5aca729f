#!/usr/bin/env bash
# Train on one machine, having set up what is missing.
#
#   bash run_train.sh [CONFIG] [key=value ...]
#
# CONFIG is a recipe such as configs/cifar10/skipvit.yaml; without one, the embedded data set is trained on
# (configs/clutter/skipvit.yaml). Any key of a recipe can be overridden, as in train.epochs=5. Paths are those of the
# folder that this is called from. PYTHON=... chooses another Python than python3 or .venv.
# The last line of standard output is JSON: top1, epochs, steps, images_per_second, checkpoint.
set -euo pipefail
# shellcheck source=run_setup.sh
. "$(dirname "${BASH_SOURCE[0]}")/run_setup.sh"

help_where_asked "$@"

config=$here/configs/clutter/skipvit.yaml
# The first argument is a recipe unless it is an override; the path of a recipe may hold a = too.
if [ $# -gt 0 ] && { [ -e "$1" ] || [[ $1 != *=* ]]; }; then
  config=$1
  shift
fi

choose_python
exec "$PYTHON" -m skipvit.train "$config" "$@"
