"""One engine and one fleet for all tests here: each start of vLLM costs seconds."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray
import torch
from safetensors.torch import load_file, save_file

from rollout.fleet.fleet import RolloutFleet
from tests.rollout.helpers import VOCAB_LIMIT, make_config, make_environment, open_engines
from tests.rollout.tiny_models import make_model


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose output prefers token ids that its tokenizer does not have."""
    folder = make_model(tmp_path_factory.mktemp("model"), seed=0)
    weights = load_file(folder / "model.safetensors")
    # Rows past the tokenizer, ten times the others: without the mask they would win nearly always.
    weights["model.embed_tokens.weight"][VOCAB_LIMIT:] *= 10
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("other"), seed=1)


@pytest.fixture(scope="session")
def fleet(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RolloutFleet]:
    """One engine holding `model`; a test that sends other weights sends these back."""
    config = make_config(tmp_path_factory.mktemp("fleet"), model)
    fleet = RolloutFleet(config, make_environment(), str(model), on_restart=lambda index: None)
    yield fleet
    fleet.shutdown()


@pytest.fixture(scope="session")
def reference_logits(model: Path) -> Callable[[list[int]], torch.Tensor]:
    """transformers' logits of all positions, ids past the tokenizer masked: token ids -> [seq, vocab] float32."""
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)

    @torch.no_grad()
    def logits(ids: list[int]) -> torch.Tensor:
        out = reference(torch.tensor([ids])).logits[0]
        out[:, VOCAB_LIMIT:] = -torch.inf
        return out

    return logits


class RawEngine:
    """Sends vLLM requests that `RolloutEngine` never would."""

    def __init__(self, actor: object) -> None:
        self._actor = actor

    def refusal(self, options: dict, other: dict | None = None) -> str:
        """The error that a seeded request with these options (beside `other`'s) meets; "" when it is served."""

        def attempt(engine: object) -> str:
            from vllm import SamplingParams

            llm = engine._llm  # type: ignore[attr-defined]
            requests = [options] if other is None else [options, other]
            for number, extra in enumerate(requests):
                parameters = SamplingParams(
                    **{"max_tokens": 3, "temperature": 1.0, "detokenize": False, "extra_args": {"seed": 7}, **extra}
                )
                llm.add_request(f"raw-{number}", {"prompt_token_ids": [5, 6, 7]}, parameters)
            try:
                while llm.has_unfinished_requests():
                    llm.step()
            except ValueError as error:
                llm.abort_request([f"raw-{number}" for number in range(len(requests))])
                return str(error)
            return ""

        return ray.get(self._actor.apply.remote(attempt))  # type: ignore[attr-defined]


@pytest.fixture(scope="session")
def raw_engine(fleet: RolloutFleet) -> Iterator[RawEngine]:
    """An engine of its own, beside the fleet's."""
    with open_engines([fleet._arguments[0]]) as (actor,):
        yield RawEngine(actor)
