"""`megatron-rl bench speculative`: plain and speculative decoding side by side, at the same tokens.

Two engines hold the same model: one decodes plainly, the other one drafts by each rule in turn. All get the same
requests with the same seeds, so they emit the same tokens, and their turns alternate. Before every turn the drafter
forgets what it has seen, because the same text would otherwise come a second time.
"""

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ray

from megatron_rl import device
from megatron_rl.config import Config, ConfigError
from megatron_rl.config.layout import read_hf_config
from megatron_rl.data.prompts import load_prompts
from megatron_rl.results import publish
from megatron_rl.start import load_tokenizer
from rollout.adaptive import make_arms
from rollout.engine import TimedGeneration
from rollout.fleet import RolloutFleet
from rollout.records import Rollout, RolloutRequest, SpeculationCounts

PLAIN = "plain"
WAVES = 3  # requests per live one: as one ends, the next begins


@dataclasses.dataclass
class Turn:
    """One variant's measurement at one batch size."""

    tokens: int
    seconds: float
    rollouts: list[Rollout]
    counts: SpeculationCounts | None
    verify_share: float


class SpeculationBench:
    """The two engines, and turns on them."""

    def __init__(self, config: Config) -> None:
        """Start the engines; they read the weights of `model.path` themselves.

        Raises:
            ConfigError: when the model or the prompts cannot be used, or speculation is off.
        """
        if config.rollout.speculation.adaptive == "off":
            raise ConfigError(
                "rollout.speculation.adaptive=off leaves nothing to compare; choose static, beg or model."
            )
        self.config = config
        hf_config = read_hf_config(config.model.path)
        tokenizer = load_tokenizer(config.model.path)
        self._prompts = load_prompts(config.data.train, config.data, tokenizer, config.data.split, heldout=False)
        vocab_limit = min(len(tokenizer), int(hf_config["vocab_size"]))  # type: ignore[call-overload]
        environment = device.engine_environment(config, vocab_limit)
        environment = dataclasses.replace(
            environment,
            env=environment.env | {"MEGATRON_RL_PROFILE": "1"},
            vllm=environment.vllm | {"load_format": "auto"},
        )
        off = {"speculation": config.rollout.speculation.model_copy(update={"adaptive": "off"})}
        plain = config.model_copy(update={"rollout": config.rollout.model_copy(update=off)})
        self._plain = RolloutFleet(plain, environment, config.model.path, lambda engine: None)
        self.drafting = RolloutFleet(config, environment, config.model.path, lambda engine: None)

    def requests(
        self, batch: int, round_number: int, lengths: Sequence[int], samples: int, ignore_eos: bool
    ) -> list[RolloutRequest]:
        """`batch` requests, `samples` of each prompt; other prompts and seeds in every round."""
        chosen = []
        for number in range(batch):
            prompt = self._prompts[(round_number * 8191 + number // samples) % len(self._prompts)]
            chosen.append(
                RolloutRequest(
                    prompt_id=f"{round_number}/{number // samples}",
                    sample_index=number % samples,
                    epoch=0,
                    seed=(round_number << 20) + number,
                    prompt_ids=prompt.token_ids,
                    max_tokens=lengths[number],
                    temperature=self.config.rollout.temperature,
                    ignore_eos=ignore_eos,
                )
            )
        return chosen

    def turn(self, variant: str, requests: list[RolloutRequest], concurrency: int | None = None) -> Turn:
        """Let one variant generate: `plain`, the adaptive rule of the config by its name, or `static:DRAFTER:K`.

        With `concurrency` so many requests are live at a time, and only that time counts: what drafts do at the end,
        when some requests have run ahead of others, belongs to smaller batch sizes.
        """
        fleet = self._plain if variant == PLAIN else self.drafting
        if variant != PLAIN:
            rule, *arm = variant.split(":")
            most = int(arm[1]) if arm else self.config.rollout.speculation.max_draft_tokens
            ray.get(fleet.call(0, "set_speculation", rule, most, arm[:1] or None))
        ray.get(fleet.call(0, "take_verify_seconds"))
        timed: TimedGeneration = ray.get(fleet.call(0, "generate_timed", requests, concurrency))
        counts = fleet.take_speculation_counts()
        verify_seconds = ray.get(fleet.call(0, "take_verify_seconds"))
        tokens, seconds = sum(len(rollout.token_ids) for rollout in timed.rollouts), timed.seconds
        if concurrency is not None:
            tokens, seconds = timed.full_tokens, timed.full_seconds
        verify_share = verify_seconds / timed.seconds
        return Turn(tokens, seconds, timed.rollouts, counts[0] if counts else None, verify_share)

    def close(self) -> None:
        """Stop the engines."""
        self.drafting.shutdown()
        self._plain.shutdown()


def compare(
    bench: SpeculationBench,
    variants: Sequence[str],
    make_requests: Callable[[int], list[RolloutRequest]],
    repetitions: int,
    first_round: int,
    warmups: int = 1,
    concurrency: int | None = None,
) -> dict[str, list[Turn]]:
    """Interleaved turns of all variants on the same requests; the first `warmups` rounds are not kept."""
    turns: dict[str, list[Turn]] = {variant: [] for variant in variants}
    for repetition in range(-warmups, repetitions):
        requests = make_requests(first_round + repetition + warmups)
        for variant in variants:
            turn = bench.turn(variant, requests, concurrency)
            if repetition >= 0:
                turns[variant].append(turn)
    return turns


def speeds(turns: dict[str, list[Turn]]) -> dict[str, float]:
    """Tokens per second of each variant relative to the first, as the median over rounds of the ratio in a round."""
    first = next(iter(turns.values()))
    return {
        variant: statistics.median(
            (turn.tokens / turn.seconds) / (base.tokens / base.seconds) for turn, base in zip(mine, first, strict=True)
        )
        for variant, mine in turns.items()
    }


def bench_speculative(
    config: Config, batches: Sequence[int], tokens: int, repetitions: int
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Rows of a table (one per batch size and variant) and the ratios of adaptive speculation.

    Columns: tokens per second; the same relative to plain decoding (median over rounds); tokens per verification;
    accepted share of the drafts; shares of time in drafting, verification and all else; responses equal to plain ones.

    Args:
        config: the experiment; `rollout.speculation.adaptive` is the rule that is compared with every fixed number of
            drafts from every one of `rollout.speculation.drafters`. For eagle `drafter.path` is the head.
        batches: live requests.
        tokens: the longest response; the shortest has half of it.
        repetitions: measured rounds.

    Raises:
        ConfigError: see `SpeculationBench`.
    """
    speculation = config.rollout.speculation
    longer = config.rollout.model_copy(update={"max_tokens": tokens})
    bench = SpeculationBench(config.model_copy(update={"rollout": longer}))
    fixed = [f"static:{arm}" for arm in make_arms(speculation.drafters, speculation.max_draft_tokens) if arm.k]
    variants = [PLAIN, *fixed, speculation.adaptive]
    rows, against_plain, against_best = [], [], []
    samples = min(config.algorithm.group_size, max(batches))
    for place, batch in enumerate(batches):

        def make(number: int, count: int = batch * WAVES) -> list[RolloutRequest]:
            return bench.requests(count, number, uneven_lengths(count, tokens), samples, ignore_eos=True)

        # A rule that learns needs to have seen the batch size; so does the plain engine's allocator.
        turns = compare(bench, variants, make, repetitions, first_round=place * 1000, concurrency=batch)
        relative = speeds(turns)
        rows += [_row(batch, variant, turns[variant], relative[variant], turns[PLAIN]) for variant in variants]
        against_plain.append(relative[speculation.adaptive])
        best = max(relative[variant] for variant in variants if variant != speculation.adaptive)
        against_best.append(relative[speculation.adaptive] / best)
    bench.close()
    return rows, {
        "adaptive_vs_plain_min": min(against_plain),
        "adaptive_vs_best_static_min": min(against_best),
    }


def uneven_lengths(count: int, longest: int) -> list[int]:
    """Lengths spread evenly between half of `longest` and `longest` (a golden-ratio sequence).

    With equal lengths plain decoding, and it alone, would begin and end all requests in the same steps.
    """
    return [round(longest * (0.5 + 0.5 * (number * 0.6180339887 % 1))) for number in range(count)]


def _row(batch: int, variant: str, turns: list[Turn], relative: float, plain: list[Turn]) -> dict[str, Any]:
    tokens, seconds = sum(turn.tokens for turn in turns), sum(turn.seconds for turn in turns)
    counts = [turn.counts for turn in turns if turn.counts is not None]
    verifications = sum(count.verifications for count in counts)
    verify = statistics.fmean(turn.verify_share for turn in turns)
    draft = sum(count.draft_seconds for count in counts) / max(sum(count.seconds for count in counts), 1e-9)
    same = sum(
        mine.token_ids == other.token_ids
        for turn, base in zip(turns, plain, strict=True)
        for mine, other in zip(_in_order(turn.rollouts), _in_order(base.rollouts), strict=True)
    )
    return {
        "batch": batch,
        "variant": variant,
        "tok/s": round(tokens / seconds),
        "vs plain": relative,
        "tok/verify": sum(c.emitted for c in counts) / verifications if verifications else 1.0,
        "accepted": sum(c.accepted for c in counts) / max(sum(c.drafted for c in counts), 1),
        "draft": f"{draft:.1%}",
        "verify": f"{verify:.1%}",
        "target": f"{1 - draft - verify:.1%}",
        "same": f"{same}/{sum(len(turn.rollouts) for turn in turns)}",
    }


def _in_order(rollouts: list[Rollout]) -> list[Rollout]:
    return sorted(rollouts, key=lambda rollout: (rollout.prompt_id, rollout.sample_index))


def parse_batches(text: str) -> list[int]:
    """`1,8,64` as numbers.

    Raises:
        ConfigError: for anything else.
    """
    try:
        batches = [int(part) for part in text.split(",")]
    except ValueError:
        batches = []
    if not batches or min(batches) < 1:
        raise ConfigError(f"--batches {text!r} is not a list of batch sizes; write it like 1,8,64.")
    return batches


def run_speculative(
    config: Config, batches: str, tokens: int | None, repetitions: int, file: Path | None, quick: bool
) -> None:
    """The command: measure, print the table, write the JSON.

    Raises:
        ConfigError: see `SpeculationBench`, `parse_batches`.
    """
    length = tokens or config.rollout.max_tokens
    rows, ratios = bench_speculative(config, parse_batches(batches), length, repetitions)
    publish("speculative decoding", ratios, rows, file, quick)
