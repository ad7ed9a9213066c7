#!/usr/bin/env bash
# Several GPU nodes. Run it once on every node, with the same arguments; rank 0 and the Ray head are on HEAD.
#
#   by hand:   HEAD=node0 NODES=4 NODE_RANK=<0..3> launch/multinode.sh FILE [KEY.PATH=VALUE]...
#   by Slurm:  srun --nodes 4 --ntasks-per-node 1 launch/multinode.sh FILE [KEY.PATH=VALUE]...
#
# The checkout, the model and run_dir must be at the same path on all nodes.
# Optional: PROCESSES (trainer processes per node, default: its GPUs), PORT (torchrun), RAY_PORT.
# Ray's nodes prove themselves by the token in ~/.ray/auth_token, which the first node makes when there is none. Where
# the nodes do not share a home, give all of them the same RAY_AUTH_TOKEN.
set -euo pipefail
if [ $# -lt 1 ]; then
  echo "usage: HEAD=HOST NODES=N NODE_RANK=I $0 FILE [KEY.PATH=VALUE]...   (under srun: $0 FILE ...)" >&2
  exit 2
fi
file=$1
shift

if [ -n "${SLURM_STEP_NODELIST:-}" ]; then
  HEAD=${HEAD:-$(scontrol show hostnames "$SLURM_STEP_NODELIST" | head -n 1)}
  NODES=${NODES:-$SLURM_STEP_NUM_NODES}
  NODE_RANK=${NODE_RANK:-$SLURM_NODEID}
fi
: "${HEAD:?name of the first node}" "${NODES:?number of nodes}" "${NODE_RANK:?number of this node, from 0}"
PROCESSES=${PROCESSES:-$(nvidia-smi --list-gpus | wc -l)}
PORT=${PORT:-29500}
RAY_PORT=${RAY_PORT:-6379}
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(($(nproc) > PROCESSES ? $(nproc) / PROCESSES : 1))}

# Said outright on every node: left to itself Ray asks for a token on a head that finds one, and sends none elsewhere.
export RAY_AUTH_MODE=${RAY_AUTH_MODE:-token}
token=$HOME/.ray/auth_token
if [ "$RAY_AUTH_MODE" = token ] && [ -z "${RAY_AUTH_TOKEN:-}${RAY_AUTH_TOKEN_PATH:-}" ] && [ ! -e "$token" ]; then
  if [ "$NODE_RANK" -eq 0 ]; then
    ray get-auth-token --generate > /dev/null
  else
    for _ in {1..60}; do [ -e "$token" ] && break || sleep 1; done
    [ -e "$token" ] || { echo "node $NODE_RANK has no $token; give all nodes the same RAY_AUTH_TOKEN" >&2; exit 1; }
  fi
fi

# Ray runs beside the trainer for as long as this script does; `--block` makes it end with us.
if [ "$NODE_RANK" -eq 0 ]; then
  ray start --head --port "$RAY_PORT" --disable-usage-stats --block &
else
  ray start --address "$HEAD:$RAY_PORT" --disable-usage-stats --block &
fi
ray_pid=$!
stop_ray() { kill "$ray_pid" 2>/dev/null && wait "$ray_pid" || true; }
trap stop_ray EXIT

# The engines need every node: wait until all of them have joined. `ray.init()` of the driver reads RAY_ADDRESS too.
export RAY_ADDRESS=$HEAD:$RAY_PORT
joined() {
  python - <<'PY' || echo 0
import logging, ray
ray.init(logging_level=logging.ERROR)
print(sum(node["Alive"] for node in ray.nodes()))
PY
}
deadline=$((SECONDS + 120))
until [ "$(joined 2> /dev/null)" -ge "$NODES" ]; do
  kill -0 "$ray_pid" 2>/dev/null || { echo "ray did not start on node $NODE_RANK" >&2; exit 1; }
  [ "$SECONDS" -lt "$deadline" ] || { echo "Ray on $RAY_ADDRESS has $(joined) of $NODES nodes" >&2; exit 1; }
  sleep 1
done

torchrun --nnodes "$NODES" --node-rank "$NODE_RANK" --nproc-per-node "$PROCESSES" \
  --master-addr "$HEAD" --master-port "$PORT" -m megatron_rl.cli train -c "$file" "$@"
