#!/usr/bin/env bash
# Every GPU of this machine (or NPROC ranks) through the deepspeed launcher; with HOSTFILE ("node slots=8" a line) every machine in it.
#   examples/launch/deepspeed.sh cc3m_vitb16 --run-dir runs/cc3m --data.shards 'shards/cc3m/*.tar'
# To stop a run, signal a rank or press Ctrl-C: a SIGTERM to this launcher ends the launcher alone and leaves the ranks running.
set -euo pipefail
exec deepspeed ${HOSTFILE:+--hostfile "$HOSTFILE"} ${NPROC:+--num_accelerators "$NPROC"} --module dreamlip_train train "$@"
