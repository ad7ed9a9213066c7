"""What ends a response is what the fleet is told, whatever the model's files name."""

import json
from pathlib import Path

from rollout.fleet.fleet import RolloutFleet
from tests.rollout.helpers import make_config, make_environment, make_requests
from tests.rollout.tiny_models import make_model

NAMED, OURS = 2, (1, 7)


def test_a_response_ends_with_the_ids_given_and_with_no_other(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", spread=0.05, eos_token_id=NAMED)
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [NAMED, 9]}))
    environment = make_environment(end_ids=OURS)
    fleet = RolloutFleet(make_config(tmp_path, model), environment, str(model), lambda engine: None)
    try:
        rollouts = list(fleet.generate(make_requests(prompts=32, samples=4, max_tokens=48)))
    finally:
        fleet.shutdown()
    stopped = [rollout for rollout in rollouts if rollout.finish_reason == "stop"]
    assert {rollout.token_ids[-1] for rollout in stopped} == set(OURS)
    assert all(not set(OURS) & set(rollout.token_ids[:-1]) for rollout in rollouts)
    passed = {token for rollout in rollouts for token in rollout.token_ids[:-1]}
    assert {NAMED, 9} <= passed, "what the files name alone does not end a response"
