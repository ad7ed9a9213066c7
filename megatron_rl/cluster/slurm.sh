set -euo pipefail

# What follows is the same for every experiment: Ray beside the trainers, one log per rank, and a new start in the queue
# when Slurm wants the nodes back. docs/slurm.md tells it in words.
export PYTHONUNBUFFERED=1
cd "$WORKDIR"
logs=$RUN_DIR/slurm/$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}
mkdir -p "$logs"
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")

# Ports of this job and a token that only its processes know, so that two jobs on a node do not meet.
export MASTER_ADDR=${hosts[0]} MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
ray_port=$((5000 + SLURM_JOB_ID % 3000))
export RAY_ADDRESS=${hosts[0]}:$ray_port RAY_AUTH_MODE=token
RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
export RAY_AUTH_TOKEN

# start NAME FIRST COUNT TASKS_PER_NODE LOG COMMAND...: a step on COUNT nodes from number FIRST on, in the background.
start() {
  local name=$1 first=$2 count=$3 per_node=$4 log=$5 list cores
  shift 5
  list=$(IFS=,; echo "${hosts[*]:first:count}")
  cores=$((SLURM_CPUS_ON_NODE / per_node))
  # Its steps share the nodes; unbound, because engines and trainers share out the cores by thread counts.
  srun --overlap --job-name "$name" --nodelist "$list" --nodes "$count" --ntasks $((count * per_node)) \
    --ntasks-per-node "$per_node" --cpus-per-task $((cores > 0 ? cores : 1)) --cpu-bind none \
    --mem 0 ${GPUS:+--gpus-per-node "$GPUS"} --kill-on-bad-exit=1 --output "$logs/$log" "$@" &
}

# `--signal=B:TERM@...` of the header sends SIGTERM here. The trainers finish their step, save and leave.
stopping=0
stop() {
  stopping=1 interrupted=1
  echo "SIGTERM: asking the trainers to save and stop"
  squeue --noheader --steps --jobs "$SLURM_JOB_ID" --format "%i %j" |
    while read -r step name; do [ "$name" != trainer ] || scancel --signal TERM "$step"; done
}
trap stop TERM

# A step's end by `kill` of its srun takes its processes along.
steps=()
trap 'kill "${steps[@]}" 2> /dev/null || true; wait' EXIT

# SIGTERM that Slurm sends to all tasks is for the trainers: Ray has to last until they have finished their step.
ray_node='trap "" TERM; env --unset RAY_ADDRESS "$PYTHON" -m ray.scripts.scripts start --block --disable-usage-stats "$@"'
export PYTHON
start ray-head 0 1 1 ray-head.log bash -c "$ray_node" ray --head --port "$ray_port" --include-dashboard=false \
  ${HEAD_GPUS:+--num-gpus "$HEAD_GPUS"}
steps+=($!)
first=$RAY_WORKERS_FROM count=$((${#hosts[@]} - RAY_WORKERS_FROM))
if [ "$count" -gt 0 ]; then
  start ray-workers "$first" "$count" 1 ray-worker-%n.log bash -c "$ray_node" ray --address "$RAY_ADDRESS" \
    ${GPUS:+--num-gpus "$GPUS"}
  steps+=($!)
fi
"$PYTHON" -m megatron_rl.cluster.ray_nodes $((count + 1)) "$RAY_TIMEOUT_S"

status=0
if [ "$stopping" -eq 0 ]; then
  start trainer 0 "$TRAINER_NODES" "$PROCESSES" rank-%t.log "$PYTHON" -m megatron_rl.cli train "${ARGUMENTS[@]}"
  trainer=$!
  steps+=("$trainer")
  interrupted=1
  while [ "$interrupted" -eq 1 ]; do  # a signal ends `wait` before the trainers have ended
    interrupted=0 status=0
    wait "$trainer" || status=$?
  done
  echo "the trainers ended with status $status; logs in $logs"
fi

# A job that was cancelled, or that Slurm is already putting back, is no longer RUNNING and stays as it is.
if [ "$stopping" -eq 1 ] && [ "$(squeue --noheader --jobs "$SLURM_JOB_ID" --format %T)" = RUNNING ]; then
  echo "back into the queue"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
