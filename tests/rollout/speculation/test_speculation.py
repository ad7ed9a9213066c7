"""Drafts in real engines: they never change a token, whoever makes them and whatever happens meanwhile."""

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from safetensors.torch import save_file

from rollout.speculation.draft_backoff import LONGEST_BACKOFF, PATIENCE, DraftBackoff
from rollout.speculation.speculation_settings import LearnedSpeculation
from rollout.types import Rollout, RolloutRequest, TokenSource
from tests.rollout.helpers import VOCAB_LIMIT, generate, make_requests, open_arguments, open_engines

REQUESTS = 200
TOKENS = 40


def group_requests(count: int = REQUESTS, temperature: float = 0.6, max_tokens: int = TOKENS) -> list[RolloutRequest]:
    """Eight samples of a prompt at a low temperature: their texts overlap, so drafts get accepted."""
    return make_requests(count // 8, samples=8, max_tokens=max_tokens, temperature=temperature)


@pytest.fixture(scope="module")
def engines(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """A plain engine, one that drafts, and one that drafts while memory and step size are short."""
    folder = tmp_path_factory.mktemp("engines")
    off, on = {"adaptive": "off"}, {"adaptive": "static", "max_draft_tokens": 8}
    # 32 tokens a block: room for about six requests of the thirty-two; prompts are computed in parts.
    short = {"num_gpu_blocks_override": 14, "max_num_batched_tokens": 40, "enable_prefix_caching": True}
    arguments = [
        open_arguments(folder, model, speculation=off),
        open_arguments(folder, model, speculation=on),
        open_arguments(folder, model, {"block_size": 32, **short}, speculation=on),
    ]
    with open_engines(arguments) as actors:
        yield dict(zip(("plain", "drafting", "short"), actors, strict=True))


@pytest.fixture(scope="module")
def expected(engines: dict[str, Any]) -> list[Rollout]:
    return generate(engines["plain"], group_requests())


def assert_same(rollouts: list[Rollout], expected: list[Rollout]) -> None:
    """Same tokens, same ends, log-probs up to rounding (which depends on how many rows a matrix product has)."""
    assert [r.token_ids for r in rollouts] == [r.token_ids for r in expected]
    assert [r.finish_reason for r in rollouts] == [r.finish_reason for r in expected]
    for mine, other in zip(rollouts, expected, strict=True):
        torch.testing.assert_close(torch.tensor(mine.logprobs), torch.tensor(other.logprobs), atol=1e-4, rtol=0)


@pytest.mark.parametrize("rule", ["static:1", "static:3", "static:8", "epsilon_greedy:8", "thompson:8"])
def test_speculation_on_and_off_emit_the_same_tokens(
    engines: dict[str, Any], expected: list[Rollout], rule: str
) -> None:
    adaptive, _, k = rule.partition(":")
    ray.get(engines["drafting"].set_speculation.remote(adaptive, int(k)))
    ray.get(engines["drafting"].take_speculation_counts.remote())
    rollouts = generate(engines["drafting"], group_requests())
    assert_same(rollouts, expected)
    drafts = sum(source == TokenSource.DRAFT for rollout in rollouts for source in rollout.sources)
    assert adaptive != "static" or drafts > 100
    # How much the others draft depends on the machine, but all try.
    assert ray.get(engines["drafting"].take_speculation_counts.remote()).drafted > 0


def test_switching_in_mid_run_does_not_change_the_tokens(engines: dict[str, Any], expected: list[Rollout]) -> None:
    def generate_switching(engine: Any, requests: list[RolloutRequest]) -> list[Rollout]:
        engine.submit(requests)
        rollouts: list[Rollout] = []
        step = 0
        while engine._running:
            if step % 5 == 0:
                engine.set_speculation("static", (1, 8, 2, 5)[step // 5 % 4])
                for request in engine._scheduler.requests.values():  # the new drafter starts from the middle
                    engine._scheduler._ngram.start(request, "again", list(request.all_token_ids))
            if step % 7 == 3:
                engine._scheduler.controller._arm = replace(engine._scheduler.controller._arm, k=0)
            step += 1
            rollouts += [engine._rollout(output) for output in engine._step() if output.finished]
        return rollouts

    requests = group_requests()
    rollouts = ray.get(engines["drafting"].apply.remote(generate_switching, requests))
    by_key = {(r.prompt_id, r.sample_index): r for r in rollouts}
    assert_same([by_key[r.prompt_id, r.sample_index] for r in requests], expected)


def test_preemption_chunked_prompts_and_cached_prefixes_do_not_change_the_tokens(
    engines: dict[str, Any], expected: list[Rollout]
) -> None:
    def count_preemptions(engine: Any) -> None:
        stock = engine._scheduler._preempt_request
        engine.preemptions = 0

        def preempt(*args: Any, **kwargs: Any) -> None:
            engine.preemptions += 1
            stock(*args, **kwargs)

        engine._scheduler._preempt_request = preempt

    ray.get(engines["short"].apply.remote(count_preemptions))
    rollouts = generate(engines["short"], group_requests())
    assert_same(rollouts, expected)
    assert ray.get(engines["short"].apply.remote(lambda engine: engine.preemptions)) > 0
    assert sum(source == TokenSource.DRAFT for rollout in rollouts for source in rollout.sources) > 100


def test_an_abort_in_the_middle_leaves_the_next_requests_alone(
    engines: dict[str, Any], expected: list[Rollout]
) -> None:
    def abort_half_way(engine: Any, requests: list[RolloutRequest]) -> int:
        engine.submit(requests)
        for _ in range(6):
            engine._step()
        engine.take_unfinished()
        return len(engine._scheduler._ngram) + len(engine._scheduler._accepted)

    assert ray.get(engines["drafting"].apply.remote(abort_half_way, group_requests())) == 0
    assert_same(generate(engines["drafting"], group_requests()), expected)


def test_an_engine_takes_over_what_another_one_of_the_same_rule_has_learned(engines: dict[str, Any]) -> None:
    engine = engines["drafting"]
    ray.get(engine.set_speculation.remote("thompson", 4))
    generate(engine, group_requests(32))
    learned = LearnedSpeculation.from_dict(json.loads(json.dumps(ray.get(engine.speculation_state.remote()).to_dict())))
    ray.get(engine.set_speculation.remote("thompson", 5))
    fresh = ray.get(engine.speculation_state.remote())
    assert fresh != learned
    ray.get(engine.restore_speculation.remote(learned))
    assert ray.get(engine.speculation_state.remote()) == learned
    ray.get(engine.set_speculation.remote("epsilon_greedy", 4))
    ray.get(engine.restore_speculation.remote(learned))  # of no use to another rule
    assert ray.get(engine.speculation_state.remote()).adaptive == "epsilon_greedy"
    assert ray.get(engines["plain"].speculation_state.remote()) is None


def test_drafts_that_do_not_pay_are_considered_ever_less_often() -> None:
    backoff, considered = DraftBackoff(), []
    for step in range(300):
        if not backoff.skips(bucket=64):
            considered.append(step)
            backoff.record(used=False)
    gaps = [after - before for before, after in pairwise(considered)]
    assert gaps[:PATIENCE] == [1] * PATIENCE and gaps[PATIENCE] == 2
    assert gaps == sorted(gaps) and max(gaps) == LONGEST_BACKOFF
    assert not backoff.skips(bucket=32), "fewer requests: drafts may pay now"
    backoff.record(used=True)
    assert not backoff.skips(bucket=32), "drafts in use are considered in every step"


def test_sources_tell_which_tokens_were_drafts(engines: dict[str, Any]) -> None:
    ray.get(engines["drafting"].set_speculation.remote("static", 4))
    ray.get(engines["drafting"].take_speculation_counts.remote())
    rollouts = generate(engines["drafting"], group_requests(64, max_tokens=60))
    counts = ray.get(engines["drafting"].take_speculation_counts.remote())
    drafts = sum(source == TokenSource.DRAFT for rollout in rollouts for source in rollout.sources)
    assert all(len(rollout.sources) == len(rollout.token_ids) for rollout in rollouts)
    # Drafts past a stop token were accepted but are not in the response.
    assert 0 < drafts <= counts.accepted < counts.drafted
    assert counts.emitted >= sum(len(rollout.token_ids) for rollout in rollouts)
    assert sum(counts.chosen.values()) > 0


@pytest.mark.parametrize(
    "sampling",
    [
        {"top_k": 5},
        {"top_p": 0.8},
        {"min_p": 0.1},
        {"min_tokens": 12},
        {"presence_penalty": 0.5, "frequency_penalty": 0.3},
        {"repetition_penalty": 1.2},
        {"allowed_token_ids": list(range(1, 30))},
        {"logit_bias": {7: 3.0, 9: -100.0}},
        {"top_k": 20, "top_p": 0.9, "repetition_penalty": 1.1, "min_tokens": 5},
    ],
    ids=lambda sampling: "+".join(sampling),
)
def test_constraints_are_kept_and_drafts_do_not_change_the_tokens(
    engines: dict[str, Any], sampling: dict[str, Any]
) -> None:
    def use(engine: Any, options: dict[str, Any]) -> None:
        engine._sampling = options

    requests = group_requests(48, temperature=0.8)
    free = generate(engines["plain"], requests)
    for name in ("plain", "drafting"):
        ray.get(engines[name].apply.remote(use, sampling))
    ray.get(engines["drafting"].set_speculation.remote("static", 4))
    plain, drafting = generate(engines["plain"], requests), generate(engines["drafting"], requests)
    for name in ("plain", "drafting"):
        ray.get(engines[name].apply.remote(use, {}))
    assert_same(drafting, plain)
    assert [r.token_ids for r in plain] != [r.token_ids for r in free]
    assert any(TokenSource.DRAFT in rollout.sources for rollout in drafting)
    tokens = [token for rollout in plain for token in rollout.token_ids]
    if "min_tokens" in sampling:
        assert min(len(rollout.token_ids) for rollout in plain) >= sampling["min_tokens"]
    if "allowed_token_ids" in sampling:
        assert set(tokens) <= set(sampling["allowed_token_ids"])
    if "logit_bias" in sampling:
        assert 9 not in tokens


def planted_defect(engine: Any, defect: str, requests: list[RolloutRequest]) -> list[Rollout]:
    """Generate with a verifier that has something wrong with it."""
    from rollout.sampling import coupled_sampler

    sound = coupled_sampler.verify_tokens

    def broken(logits: Any, cu_rows: Any, drafts: Any, temperature: Any, seeds: Any, positions: Any, most: int) -> Any:
        if defect == "shifted position" and len(drafts):
            positions = positions + 1
        elif defect == "stale noise":
            positions = positions // 4 * 4
        result = sound(logits, cu_rows, drafts, temperature, seeds, positions, most)
        if defect == "accept threshold 0.9" and len(drafts):
            # A draft is also accepted with a tenth of a chance when the sample differs from it.
            for request in range(len(seeds)):
                begin, end = int(cu_rows[request]), int(cu_rows[request + 1])
                last = int(result.num_emitted[request]) - 1
                if last < end - begin - 1 and (int(seeds[request]) + int(positions[request])) % 10 == 0:
                    result.tokens[request, last] = drafts[begin - request + last]
        return result

    coupled_sampler.verify_tokens = broken
    try:
        return engine.generate_timed(requests).rollouts  # type: ignore[no-any-return]
    finally:
        coupled_sampler.verify_tokens = sound


@pytest.mark.parametrize("defect", ["none", "accept threshold 0.9", "shifted position", "stale noise"])
def test_a_planted_defect_shows(engines: dict[str, Any], expected: list[Rollout], defect: str) -> None:
    ray.get(engines["drafting"].set_speculation.remote("static", 4))
    rollouts = ray.get(engines["drafting"].apply.remote(planted_defect, defect, group_requests()))
    tokens = {(r.prompt_id, r.sample_index): r.token_ids for r in rollouts}
    differ = sum(tokens[r.prompt_id, r.sample_index] != r.token_ids for r in expected)
    assert (differ > 0) == (defect != "none")


def count_tokens_per_verification(engine: Any, requests: list[RolloutRequest]) -> tuple[list[Rollout], float]:
    from rollout.sampling import coupled_sampler

    sound, emitted, verified = coupled_sampler.verify_tokens, 0, 0

    def counting(logits: Any, cu_rows: Any, drafts: Any, *rest: Any) -> Any:
        nonlocal emitted, verified
        result = sound(logits, cu_rows, drafts, *rest)
        if len(drafts):
            emitted += int(result.num_emitted.sum())
            verified += len(result.num_emitted)
        return result

    coupled_sampler.verify_tokens = counting
    try:
        return engine.generate_timed(requests).rollouts, emitted / max(verified, 1)
    finally:
        coupled_sampler.verify_tokens = sound


def random_eagle3(folder: Path, hidden: int = 64, heads: int = 4, kv_heads: int = 2, head_dim: int = 32) -> Path:
    """An EAGLE-3 head with random weights, in the format of public checkpoints, for the test model."""
    generator = torch.Generator().manual_seed(0)
    vocab = 128

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.1

    attention = {
        "q_proj": normal(heads * head_dim, 2 * hidden),
        "k_proj": normal(kv_heads * head_dim, 2 * hidden),
        "v_proj": normal(kv_heads * head_dim, 2 * hidden),
        "o_proj": normal(hidden, heads * head_dim),
    }
    mlp = {"gate_proj": normal(96, hidden), "up_proj": normal(96, hidden), "down_proj": normal(hidden, 96)}
    norms = ("midlayer.input_layernorm", "midlayer.hidden_norm", "midlayer.post_attention_layernorm", "norm")
    weights = {f"midlayer.self_attn.{name}.weight": value for name, value in attention.items()}
    weights |= {f"midlayer.mlp.{name}.weight": value for name, value in mlp.items()}
    weights |= {f"{name}.weight": torch.ones(hidden) for name in norms}
    weights |= {"fc.weight": normal(hidden, 3 * hidden), "lm_head.weight": normal(vocab, hidden)}
    folder.mkdir()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": 96,
        "num_hidden_layers": 1,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": vocab,
        "draft_vocab_size": vocab,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 1, 2], "use_aux_hidden_state": True},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("method", [pytest.param("draft_model", marks=pytest.mark.slow), "eagle3"])
def test_model_drafters_draw_with_the_same_noise(
    expected: list[Rollout], model: Path, tmp_path: Path, method: str
) -> None:
    drafter = model if method == "draft_model" else random_eagle3(tmp_path / "eagle3")
    speculative = {"method": method, "model": str(drafter), "num_speculative_tokens": 3}
    vllm = {"speculative_config": speculative, "async_scheduling": False}
    arguments = open_arguments(tmp_path, model, vllm, speculation={"adaptive": "off"})
    requests = group_requests()
    with open_engines([arguments]) as (engine,):
        rollouts, per_verification = ray.get(engine.apply.remote(count_tokens_per_verification, requests))
    by_key = {(r.prompt_id, r.sample_index): r for r in rollouts}
    assert_same([by_key[r.prompt_id, r.sample_index] for r in requests], expected)
    if method == "draft_model":
        # The drafter is the policy itself: at any temperature it draws the very tokens. (Some drafts pass an end.)
        assert per_verification > 3.5


def test_rejection_draws_from_the_same_distribution(model: Path, tmp_path: Path, engines: dict[str, Any]) -> None:
    """`rollout.sampler: rejection` is vLLM's rule; its tokens differ, their frequencies do not."""
    arguments = open_arguments(tmp_path, model, sampler="rejection", speculation={"adaptive": "static"})
    requests = [
        RolloutRequest(f"p{number % 16}", number, 0, number, [7, 9, 11, 7, 9], 4, 0.7) for number in range(6000)
    ]
    with open_engines([arguments]) as (engine,):
        rejection = generate(engine, requests)
    coupled = generate(engines["drafting"], requests)
    assert any(TokenSource.DRAFT in rollout.sources for rollout in rejection)
    for position in range(3):
        counts = torch.zeros(2, VOCAB_LIMIT)
        for row, rollouts in enumerate((rejection, coupled)):
            for rollout in rollouts:
                if len(rollout.token_ids) > position:
                    counts[row, rollout.token_ids[position]] += 1
        often = counts.sum(0) >= 16
        pooled = torch.cat([counts[:, often], counts[:, ~often].sum(1, keepdim=True)], dim=1)
        mean = pooled.sum(0) / pooled.sum() * pooled.sum(1, keepdim=True)
        chi_square = float(((pooled - mean) ** 2 / mean.clamp(min=1e-9)).sum())
        freedom = int(often.sum())
        assert chi_square < freedom + 4 * (2 * freedom) ** 0.5 + 4


@pytest.mark.slow
def test_two_tensor_parallel_parts_emit_the_same_tokens(expected: list[Rollout], model: Path, tmp_path: Path) -> None:
    arguments = [
        open_arguments(tmp_path, model, tp_size=2, speculation={"adaptive": adaptive})
        for adaptive in ("off", "thompson")
    ]
    with open_engines(arguments[:1]) as (plain,):
        alone = generate(plain, group_requests())
    with open_engines(arguments[1:]) as (drafting,):
        assert_same(generate(drafting, group_requests()), alone)
    assert_same(alone, expected)
