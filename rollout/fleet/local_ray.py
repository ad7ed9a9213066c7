"""Ray for the engines: the cluster of RAY_ADDRESS, or one on this machine that other machines cannot reach."""

import logging
import os
import secrets
import socket
from typing import Any

import ray
from ray._private import ray_constants

from megatron_rl.config import ConfigError

# For requests and rollouts (the policy's weights travel otherwise); Ray's own default is 30 % of the memory.
_OBJECT_STORE_BYTES = 128 * 2**20
# Old and new weights of the EAGLE head come on top. Without room for them Ray would write them to disk.
_HEADS_IN_STORE = 2
_CONNECT_SECONDS = 30.0


def start_ray(head_bytes: int = 0) -> None:
    """Connect to the cluster of RAY_ADDRESS, or start Ray on this node.

    Ray on this node listens on the loopback address alone, and has a token that only this process's children know.

    Args:
        head_bytes: size of an EAGLE head, for which the object store gets room.

    Raises:
        ConfigError: it cannot be reached, or does not start.
    """
    # Ray starts its workers with a lower priority than the trainer that shares the cores with them.
    os.environ.setdefault("RAY_worker_niceness", "0")
    if address := os.environ.get("RAY_ADDRESS"):
        sentence = f"Ray at RAY_ADDRESS={address} cannot be reached; start it there, or unset RAY_ADDRESS"
        host, _, port = address.rpartition(":")
        if host and port.isdigit() and "/" not in host:
            try:  # where nobody listens, Ray would try for many minutes
                socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_SECONDS).close()
            except OSError as error:
                raise ConfigError(f"{sentence} ({error}).") from None
        _init(sentence)
        return
    if not os.environ.get("RAY_AUTH_TOKEN_PATH"):
        # Ray asks for a token by itself, but left alone keeps it in the home folder, for the whole machine to read.
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    # Engines get processes of their own; those that Ray starts ahead would wait for work until the end of the run.
    os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
    # Ray's own switch for machines without a cluster; it takes no loopback address as an argument.
    clusters, ray_constants.ENABLE_RAY_CLUSTER = ray_constants.ENABLE_RAY_CLUSTER, False
    try:
        _init(
            "Ray does not start on this machine; look into its logs (/tmp/ray/session_latest/logs), and try again when "
            "it is less busy",
            address="local",
            include_dashboard=False,
            object_store_memory=_OBJECT_STORE_BYTES + _HEADS_IN_STORE * head_bytes,
        )
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = clusters


def _init(sentence: str, **options: Any) -> None:
    """`ray.init`, of whose errors one sentence is left."""
    try:
        ray.init(log_to_driver=False, logging_level=logging.ERROR, **options)
    except Exception as error:  # Ray raises plain exceptions, after a time-out too
        ray.shutdown()
        raise ConfigError(f"{sentence} ({' '.join(str(error).split()) or type(error).__name__}).") from None
