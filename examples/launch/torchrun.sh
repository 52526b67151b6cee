#!/usr/bin/env bash
# Every GPU of this machine (or NPROC ranks), through torchrun, which hands SIGTERM on to the ranks: they finish the step, save and end.
#   examples/launch/torchrun.sh cc3m_vitb16 --run-dir runs/cc3m --data.shards 'shards/cc3m/*.tar'
set -euo pipefail
exec torchrun --standalone --nproc-per-node "${NPROC:-gpu}" -m dreamlip_train train "$@"
