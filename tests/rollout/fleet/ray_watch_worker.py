"""Kills a part of its own Ray and prints what the watch says: ray_watch_worker NAME. A process has one Ray."""

import sys
import threading
import time

import psutil
import ray

from rollout.fleet.local_ray import start_ray
from rollout.fleet.ray_watch import RayWatch, lost_part


def main() -> None:
    start_ray()
    reported = threading.Event()
    watch = RayWatch(lambda sentence: reported.set())
    time.sleep(5)
    assert lost_part() is None and not reported.is_set()
    (victim,) = [child for child in psutil.Process().children() if child.name() == sys.argv[1]]
    victim.kill()
    assert reported.wait(20)
    watch.close()
    ray.shutdown()


if __name__ == "__main__":
    main()
