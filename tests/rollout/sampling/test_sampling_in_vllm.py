"""Coupled sampling inside a real engine, and what the plugin does to vLLM."""

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from rollout.fleet.fleet import RolloutFleet
from rollout.sampling.gumbel_noise import coupled_sample
from rollout.types import RolloutRequest
from tests.rollout.helpers import VOCAB_LIMIT, make_requests, tokens_by_key

Logits = Callable[[list[int]], torch.Tensor]


def test_tokens_do_not_depend_on_the_batch(fleet: RolloutFleet) -> None:
    requests = make_requests(12)
    together = tokens_by_key(fleet, requests)
    alone = {key: tokens for request in requests[:4] for key, tokens in tokens_by_key(fleet, [request]).items()}
    backwards = tokens_by_key(fleet, requests[::-1] + make_requests(20, seed=5)[12:])
    assert alone == {key: together[key] for key in alone}
    assert {key: backwards[key] for key in together} == together


def test_different_seeds_give_different_tokens(fleet: RolloutFleet) -> None:
    requests = [replace(request, prompt_ids=[5, 6, 7, 8]) for request in make_requests(1, samples=16)]
    responses = {tuple(tokens) for tokens in tokens_by_key(fleet, requests).values()}
    assert len(responses) == 16


@pytest.mark.parametrize("temperature", [0.0, 0.6, 1.0, 1.3])
def test_tokens_and_logprobs_are_those_of_the_reference_model(
    fleet: RolloutFleet, reference_logits: Logits, temperature: float
) -> None:
    requests = make_requests(6, temperature=temperature)
    for rollout in fleet.generate(requests):
        prompt, tokens = rollout.prompt_ids, rollout.token_ids
        logits = reference_logits(prompt + tokens)[len(prompt) - 1 : -1]
        positions = torch.arange(len(tokens)) + len(prompt) - 1
        rows = torch.full((len(tokens),), temperature)
        expected, logprobs = coupled_sample(logits, torch.full((len(tokens),), rollout.seed), positions, rows)
        assert tokens == expected.tolist()
        scaled = logits if temperature == 0 else logits / temperature
        reference = scaled.log_softmax(-1)[torch.arange(len(tokens)), torch.tensor(tokens)]
        torch.testing.assert_close(torch.tensor(rollout.logprobs), reference, atol=1e-4, rtol=0)
        torch.testing.assert_close(logprobs, reference, atol=1e-4, rtol=0)


def test_the_first_token_is_distributed_as_the_softmax(fleet: RolloutFleet, reference_logits: Logits) -> None:
    draws, prompt = 4000, [7, 9, 11]
    requests = [RolloutRequest("p", i, 0, 31 * i, prompt, 1, 1.0) for i in range(draws)]
    counts = Counter(rollout.token_ids[0] for rollout in fleet.generate(requests))
    expected = reference_logits(prompt)[-1].softmax(-1) * draws
    often = [token for token in range(VOCAB_LIMIT) if expected[token] >= 8]
    rest = draws - sum(counts[token] for token in often)
    rest_expected = draws - sum(expected[token].item() for token in often)
    chi_square = sum((counts[token] - expected[token].item()) ** 2 / expected[token].item() for token in often)
    chi_square += (rest - rest_expected) ** 2 / rest_expected
    freedom = len(often)
    assert chi_square < freedom + 3.5 * (2 * freedom) ** 0.5 + 3  # about p = 0.001


def test_ids_past_the_tokenizer_are_never_sampled(fleet: RolloutFleet) -> None:
    rollouts = list(fleet.generate(make_requests(16, temperature=1.0) + make_requests(32, temperature=0.0)[16:]))
    tokens = [token for rollout in rollouts for token in rollout.token_ids]
    assert len(tokens) > 200 and max(tokens) < VOCAB_LIMIT


def test_a_response_ends_with_the_stop_token_or_at_its_length(fleet: RolloutFleet) -> None:
    rollouts = list(fleet.generate(make_requests(64, samples=2, max_tokens=40)))
    assert {rollout.finish_reason for rollout in rollouts} == {"stop", "length"}
    for rollout in rollouts:
        assert len(rollout.logprobs) == len(rollout.token_ids)
        assert 1 not in rollout.token_ids[:-1]
        if rollout.finish_reason == "stop":
            assert rollout.token_ids[-1] == 1
        else:
            assert len(rollout.token_ids) == 40 and rollout.token_ids[-1] != 1


@pytest.mark.slow
def test_without_its_variable_the_plugin_changes_nothing() -> None:
    code = (
        "from vllm.plugins import load_general_plugins; load_general_plugins();"
        "from vllm.v1.worker.gpu_model_runner import GPUModelRunner as R;"
        "from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory as F;"
        "import sys; ours = [f'rollout.{m}' in sys.modules for m in ('engine.vllm_patches', 'weight_transfer.shm')];"
        "print(R._sample.__module__, 'shm' in F._registry, *ours)"
    )
    outputs = {}
    for enabled in ("", "1"):
        env = {**os.environ, "MEGATRON_RL_PLUGIN": enabled, "VLLM_LOGGING_LEVEL": "ERROR"}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
        outputs[enabled] = done.stdout.split()
    assert outputs == {
        "": ["vllm.v1.worker.gpu_model_runner", "False", "False", "False"],
        "1": ["rollout.engine.vllm_patches", "True", "True", "True"],
    }


def test_each_patch_in_the_table_is_installed() -> None:
    code = (
        "import rollout.engine.vllm_patches as p; nothing = lambda given: None;"
        "p.install_coupled_sampling(None); p.install_hooks(nothing, nothing, nothing);"
        "from vllm.platforms import current_platform;"
        "print(current_platform.is_cpu(), *(p.PATCHES.keys() - p._installed))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    on_cpu, *missing = done.stdout.split()
    cpu_only = {"rejection_sampler.expand_batch_to_tokens", "UnquantizedFusedMoEMethod._setup_kernel"}
    assert set(missing) == (set() if on_cpu == "True" else cpu_only)


def test_an_untested_vllm_is_refused() -> None:
    code = (
        "import vllm; vllm.__version__ = '0.99.1';"
        "import rollout.engine.vllm_patches as p; p.install_coupled_sampling(None)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert "tested with vLLM 0.32.0, but 0.99.1 is installed" in done.stderr


@pytest.mark.slow
def test_a_seeded_request_without_other_options_is_served(raw_engine: object) -> None:
    assert raw_engine.refusal({}) == ""  # type: ignore[attr-defined]


@pytest.mark.slow
@pytest.mark.parametrize(("options", "name"), [({"logprobs": 2}, "log-probability")])
def test_options_that_coupled_sampling_lacks_are_refused(raw_engine: object, options: dict, name: str) -> None:
    error = raw_engine.refusal(options)  # type: ignore[attr-defined]
    assert "does not support" in error and name in error


@pytest.mark.slow
def test_requests_with_and_without_seed_do_not_mix(raw_engine: object) -> None:
    assert "with and without" in raw_engine.refusal({"top_k": 0}, other={"extra_args": None})  # type: ignore[attr-defined]
