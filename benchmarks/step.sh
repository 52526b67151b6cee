#!/usr/bin/env bash
# One step of the gpu targets: OUT=folder step.sh NAME SECONDS COMMAND...
# What it prints goes to OUT/log.txt too, and all of OUT into OUT.tar when it ends, in whatever way.
set -u
name=$1 limit=$2
shift 2
mkdir -p "$OUT"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}  # what is here need not be installed, for scripts in folders either
echo "=== $name: $*" | tee -a "$OUT/log.txt"
timeout -s INT -k 15 "$limit" "$@" 2>&1 | tee -a "$OUT/log.txt"
status=${PIPESTATUS[0]}
if [ "$status" = 0 ]; then outcome=done; else outcome="failed with $status"; fi
echo "=== $name $outcome after $SECONDS s of $limit" | tee -a "$OUT/log.txt"
tar -cf "$OUT.tar.part" -C "$(dirname "$OUT")" "$(basename "$OUT")" && mv "$OUT.tar.part" "$OUT.tar"
exit "$status"
