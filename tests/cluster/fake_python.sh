#!/bin/bash
# Stands for Python in a rendered job, so that the job's own doings can be watched in seconds. It says what it is told.
case "$*" in
  *ray.scripts*) echo "ray ${*:5} token=${#RAY_AUTH_TOKEN}"; exec sleep 300 ;;
  *ray_nodes*) exit 0 ;;
esac
echo "rank $SLURM_PROCID of $SLURM_STEP_NUM_TASKS on $SLURMD_NODENAME master=$MASTER_ADDR:$MASTER_PORT"
[ "${FAKE_STATUS:-0}" -eq 0 ] || exit "$FAKE_STATUS"
[ "${SLURM_RESTART_COUNT:-0}" -eq 0 ] || { echo "resumed"; exit 0; }
trap 'echo saved; exit 0' TERM
echo "training"
for _ in {1..600}; do sleep 0.5; done
