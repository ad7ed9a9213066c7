#!/usr/bin/env bash
# One machine, torchrun spelled out. `megatron-rl train -c FILE` does the same and sets the environment below itself.
#   launch/local.sh PROCESSES FILE [KEY.PATH=VALUE]...
set -euo pipefail
if [ $# -lt 2 ]; then
  echo "usage: $0 PROCESSES FILE [KEY.PATH=VALUE]..." >&2
  exit 2
fi
processes=$1 file=$2
shift 2

# Trainer processes and engines share the cores of a CPU machine: share them out, and let waiting threads sleep.
# `megatron-rl doctor` shows the values that the launcher would choose.
cores=$(nproc)
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores > processes ? cores / processes : 1))}"
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}" KMP_BLOCKTIME="${KMP_BLOCKTIME:-0}"
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"

exec torchrun --standalone --nproc-per-node "$processes" -m megatron_rl.cli train -c "$file" "$@"
