#!/usr/bin/env bash
# Data-parallel training over the ranks of an HCCL rank table.
#
#   bash run_distribute_train.sh RANK_TABLE [CONFIG] [key=value ...]
#
# The same command with the same table is given on every server; each starts its own ranks and looks after them. With
# DEVICE_TARGET=CPU all ranks of the table run on this machine. CONFIG is a recipe; without one it is
# configs/imagenet/skipvit_small.yaml, on CPU configs/clutter/skipvit.yaml. Any key of it can be overridden, as in
# train.epochs=5. Paths are those of the folder that this is called from. Each rank has a log in the run's folder, below
# logs/; rank 0's is shown. The last line of standard output is JSON: top1, epochs, steps, images_per_second, checkpoint.
# The exit code is 0, 2 for bad input, otherwise the ranks' worst (130 after Ctrl-C, 137 for a rank that was killed).
#
# Settings in the environment, and what holds without them:
#   DEVICE_TARGET    Ascend or CPU (Ascend)
#   LAUNCHER         classic, dynamic or msrun (classic on Ascend, dynamic on CPU)
#   SERVER_ID        which server of the table this is (found by its addresses and host name)
#   MS_SCHED_PORT    port where the ranks of a dynamic or msrun start meet (8118 on Ascend, a free one on CPU)
#   STOP_GRACE       seconds that ranks have to write a checkpoint after Ctrl-C or SIGTERM (120 on Ascend, 30 on CPU)
#   OMP_NUM_THREADS  threads of a rank (its share of the cores)
#   PYTHON           which Python runs all this (python3 if it has MindSpore, else .venv)
set -euo pipefail
# shellcheck source=run_setup.sh
. "$(dirname "${BASH_SOURCE[0]}")/run_setup.sh"

help_where_asked "$@"

choose_python
exec "$PYTHON" "${here:?}/src/skipvit/launch.py" "$@"
