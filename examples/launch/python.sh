#!/usr/bin/env bash
# One process on one device: no launcher, no environment variables.
#   examples/launch/python.sh cc3m_vitb32 --run-dir runs/cc3m --data.shards 'shards/cc3m/*.tar'
# The same command again goes on from the newest checkpoint.
exec python -m dreamlip_train train "$@"
