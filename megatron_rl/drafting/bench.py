"""`megatron-rl bench speculative`: plain and speculative decoding side by side, at the same tokens.

Two engines hold the same model: one decodes plainly, the other one drafts by each rule in turn. All get the same
requests with the same seeds, so they emit the same tokens, and their turns alternate. Before every turn the drafter
forgets what it has seen, because the same text would otherwise come a second time.
"""

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import ray

from megatron_rl.config import Config, ConfigError
from megatron_rl.config.model_fit import read_hf_config
from megatron_rl.data.prompts import Prompt, load_prompts
from megatron_rl.distributed.engine_environment import engine_environment
from megatron_rl.observability.benchmark_results import publish
from megatron_rl.preflight import load_tokenizer
from rollout.engine.engine import TimedGeneration
from rollout.fleet.fleet import RolloutFleet
from rollout.speculation.arms import make_arms
from rollout.types import Rollout, RolloutRequest, SpeculationCounts

PLAIN = "plain"
WAVES = 3  # requests per live one: as one ends, the next begins


@dataclasses.dataclass
class Turn:
    """One variant's measurement at one batch size."""

    tokens: int
    seconds: float
    rollouts: list[Rollout]
    counts: SpeculationCounts | None
    verify_fraction: float


def start_engine(config: Config, wait: bool = True) -> RolloutFleet:
    """A fleet for `take_turn`, which reads the weights of `model.path` itself.

    Raises:
        ConfigError: when the model cannot be used.
    """
    vocab_size = int(read_hf_config(config.model.path, config.model.family)["vocab_size"])  # type: ignore[call-overload]
    vocab_limit = min(len(load_tokenizer(config.model.path)), vocab_size)
    environment = engine_environment(config, vocab_limit)
    environment = dataclasses.replace(
        environment,
        env=environment.env | {"MEGATRON_RL_PROFILE": "1"},
        vllm=environment.vllm | {"load_format": "auto"},
    )
    return RolloutFleet(config, environment, config.model.path, lambda engine: None, wait=wait)


def take_turn(
    fleet: RolloutFleet, variant: str, most: int, requests: list[RolloutRequest], concurrency: int | None = None
) -> Turn:
    """Let the fleet's first engine generate, `plain` or by the rule `static`, `epsilon_greedy` or `thompson`.

    A rule uses at most `most` drafts of all the engine's drafters; `RULE:DRAFTER:K` those of one, and its own number.

    With `concurrency` so many requests are live at a time, and only that time counts: what drafts do at the end, when
    some requests have run ahead of others, belongs to smaller batch sizes.
    """
    if variant != PLAIN:
        rule, *arm = variant.split(":")
        ray.get(fleet.call(0, "set_speculation", rule, int(arm[1]) if arm else most, arm[:1] or None))
    ray.get(fleet.call(0, "take_verify_seconds"))
    timed: TimedGeneration = ray.get(fleet.call(0, "generate_timed", requests, concurrency))
    counts = fleet.take_speculation_counts()
    verify_seconds = ray.get(fleet.call(0, "take_verify_seconds"))
    tokens, seconds = sum(len(rollout.token_ids) for rollout in timed.rollouts), timed.seconds
    if concurrency is not None:
        tokens, seconds = timed.full_tokens, timed.full_seconds
    return Turn(tokens, seconds, timed.rollouts, counts[0] if counts else None, verify_seconds / timed.seconds)


def make_requests(
    prompts: Sequence[Prompt],
    round_number: int,
    lengths: Sequence[int],
    config: Config,
    samples: int,
    ignore_eos: bool,
) -> list[RolloutRequest]:
    """A request of each length, `samples` of each prompt; other prompts and seeds in every round."""
    return [
        RolloutRequest(
            prompt_id=f"{round_number}/{number // samples}",
            sample_index=number % samples,
            epoch=0,
            seed=(round_number << 20) + number,
            prompt_ids=prompts[(round_number * 8191 + number // samples) % len(prompts)].token_ids,
            max_tokens=length,
            temperature=config.rollout.temperature,
            ignore_eos=ignore_eos,
        )
        for number, length in enumerate(lengths)
    ]


class SpeculationBench:
    """The two engines, and turns on them."""

    def __init__(self, config: Config) -> None:
        """Start the engines; they read the weights of `model.path` themselves.

        Raises:
            ConfigError: when the model or the prompts cannot be used, or speculation is off.
        """
        if config.rollout.speculation.adaptive == "off":
            raise ConfigError(
                "rollout.speculation.adaptive=off leaves nothing to compare; choose static, epsilon_greedy or thompson."
            )
        self.config = config
        self._prompts = load_prompts(
            config.data.train, config.data, load_tokenizer(config.model.path), config.data.split, heldout=False
        )
        off = {"speculation": config.rollout.speculation.model_copy(update={"adaptive": "off"})}
        self._plain = start_engine(config.model_copy(update={"rollout": config.rollout.model_copy(update=off)}))
        self.drafting = start_engine(config)

    def requests(self, round_number: int, lengths: Sequence[int], samples: int) -> list[RolloutRequest]:
        """Requests for responses of exactly these lengths; see `make_requests`."""
        return make_requests(self._prompts, round_number, lengths, self.config, samples, ignore_eos=True)

    def turn(self, variant: str, requests: list[RolloutRequest], concurrency: int | None = None) -> Turn:
        """Let one variant generate; see `take_turn`."""
        most = self.config.rollout.speculation.max_draft_tokens
        return take_turn(self._plain if variant == PLAIN else self.drafting, variant, most, requests, concurrency)

    def close(self) -> None:
        """Stop the engines."""
        self.drafting.shutdown()
        self._plain.shutdown()


class Contestants(Protocol):
    """Whoever generates for `compare`."""

    def turn(self, variant: str, requests: list[RolloutRequest], concurrency: int | None) -> Turn:
        """One variant's measurement on these requests."""
        ...


def compare(
    bench: Contestants,
    variants: Sequence[str],
    requests_of: Callable[[int], list[RolloutRequest]],
    repetitions: int,
    first_round: int,
    warmups: int = 1,
    concurrency: int | None = None,
) -> dict[str, list[Turn]]:
    """Interleaved turns of all variants on the same requests; the first `warmups` rounds are not kept."""
    turns: dict[str, list[Turn]] = {variant: [] for variant in variants}
    for repetition in range(-warmups, repetitions):
        requests = requests_of(first_round + repetition + warmups)
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
            return bench.requests(number, uneven_lengths(count, tokens), samples)

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
    verify = statistics.fmean(turn.verify_fraction for turn in turns)
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
