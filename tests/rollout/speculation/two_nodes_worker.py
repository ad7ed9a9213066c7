"""An engine on another node than the driver's, and a head pushed to it: two_nodes_worker MODEL HEAD RUN_DIR.

A process of its own, because a process has one Ray.
"""

import sys
from dataclasses import replace
from pathlib import Path

import ray
from ray.cluster_utils import Cluster
from ray.experimental import get_object_locations
from torch import Tensor

from drafter.eagle.head_files import head_tensors, load_head
from rollout.fleet.fleet import RolloutFleet
from tests.rollout.helpers import make_config, make_environment, make_requests, tokens_by_key

BYTES = 128 * 2**20


def norm_of_head(engine: object) -> Tensor:
    """A weight of the head that is its own alone and is not packed."""
    runner = engine._llm.model_executor.driver_worker.worker.model_runner  # type: ignore[attr-defined]
    weight: Tensor = runner.get_draft_model().model.layers[0].hidden_norm.weight
    return weight.detach().clone()


def main() -> None:
    model, folder, run_dir = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": BYTES})
    far = cluster.add_node(num_cpus=1, num_gpus=1, object_store_memory=BYTES)  # where the engine has to go
    ray.init(address=cluster.address)
    speculation = {"adaptive": "static", "drafters": ["eagle"], "max_draft_tokens": 3}
    config = make_config(run_dir, Path(model), speculation=speculation, vllm={"load_format": "auto"})
    environment = replace(make_environment(), gpus=1.0)
    fleet = RolloutFleet(config, environment, model, on_restart=lambda index: None, drafter_path=folder)

    head = load_head(folder).requires_grad_(False)
    expected = tokens_by_key(fleet, make_requests(2))
    for version in (1, 2):
        head.midlayer.hidden_norm.weight.uniform_(0.5, 1.5)
        fleet.update_drafter(head_tensors(head), version)
        held = ray.get(fleet._engines[0].actor.__ray_call__.remote(norm_of_head))
        assert held.equal(head.midlayer.hidden_norm.weight), version
        # Ray took the weights from the driver's store to the engine's.
        assert fleet._head is not None
        reference = fleet._head[0]
        here = ray.get_runtime_context().get_node_id()
        assert set(get_object_locations([reference])[reference]["node_ids"]) == {here, far.node_id}
    assert tokens_by_key(fleet, make_requests(2)) == expected
    (counts,) = fleet.take_speculation_counts()
    assert counts.drafter_version == 2 and counts.drafted_by["eagle"] > 0
    fleet.shutdown()
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main()
