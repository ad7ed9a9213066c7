"""`python -m megatron_rl.cluster.ray_nodes COUNT SECONDS` waits until the cluster at RAY_ADDRESS has COUNT nodes."""

import logging
import sys
import time

import ray

POLL_SECONDS = 1.0


def wait_for_nodes(count: int, seconds: float) -> None:
    """Returns when `count` nodes are up.

    Raises:
        TimeoutError: naming the nodes that have come, when `seconds` do not suffice.
    """
    deadline = time.monotonic() + seconds
    alive: list[str] = []
    reason = "nobody answers"
    while time.monotonic() < deadline:
        try:
            if not ray.is_initialized():
                ray.init(logging_level=logging.ERROR, log_to_driver=False)
            alive = [node["NodeManagerHostname"] for node in ray.nodes() if node["Alive"]]
            reason = f"those on {', '.join(sorted(alive))}"
            if len(alive) >= count:
                return
        except (ConnectionError, RuntimeError) as error:  # the head is still starting
            reason = str(error).splitlines()[0]
        time.sleep(POLL_SECONDS)
    raise TimeoutError(
        f"Ray has {len(alive)} of {count} nodes after {seconds:.0f} s ({reason}); see the ray-worker-*.log."
    )


if __name__ == "__main__":
    try:
        wait_for_nodes(int(sys.argv[1]), float(sys.argv[2]))
    except TimeoutError as error:
        sys.exit(str(error))
