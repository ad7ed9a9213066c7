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
from megatron_rl.models.token_ids import load_tokenizer, read_token_ids
from megatron_rl.observability.benchmark_results import publish
from megatron_rl.observability.console import Console
from rollout.engine.engine import TimedGeneration
from rollout.fleet.fleet import RolloutFleet
from rollout.speculation.arms import make_arms
from rollout.types import Rollout, RolloutRequest, SpeculationCounts

PLAIN = "plain"
WAVES = 3
"""Requests per live one: as one ends, the next begins."""
WARMUPS = 1
"""Rounds that are not measured: a rule that learns needs to have seen the batch size, and so does the allocator of the
plain engine."""


@dataclasses.dataclass
class Turn:
    """One variant's measurement at one batch size."""

    tokens: int
    """Generated in the time measured."""
    seconds: float
    """The time measured."""
    rollouts: list[Rollout]
    """All of the turn."""
    counts: SpeculationCounts | None
    """Of the drafts; None for an engine without."""
    verify_fraction: float
    """Share of the turn's seconds that verification took, in [0, 1]."""


def start_engine(config: Config, wait: bool = True) -> RolloutFleet:
    """A fleet for `take_turn`, which reads the weights of `model.path` itself.

    Args:
        config: the experiment.
        wait: return when the engines are up.

    Raises:
        ConfigError: when the model cannot be used.
    """
    vocab_size = int(read_hf_config(config.model.path, config.model.family)["vocab_size"])  # type: ignore[call-overload]
    tokens = read_token_ids(config.model.path, load_tokenizer(config.model.path), vocab_size)
    environment = engine_environment(config, tokens.limit, tokens.ends)
    environment = dataclasses.replace(
        environment,
        env=environment.env | {"MEGATRON_RL_PROFILE": "1"},
        vllm=environment.vllm | {"load_format": "auto"},
    )
    return RolloutFleet(config, environment, config.model.path, lambda engine: None, wait=wait)


def take_turn(
    fleet: RolloutFleet, variant: str, most: int, requests: list[RolloutRequest], concurrency: int | None = None
) -> Turn:
    """Let the fleet's first engine generate.

    Args:
        fleet: of one engine.
        variant: `plain`, a rule (`static`, `epsilon_greedy` or `thompson`) with all the engine's drafters, or
            `RULE:DRAFTER:K` with one of them and at most K drafts.
        most: drafts that a rule without K uses at most.
        requests: what to generate.
        concurrency: so many requests are live at a time, and only that time counts: what drafts do at the end, when
            some requests have run ahead of others, belongs to smaller batch sizes. None: all at once, to the end.
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

        Args:
            config: the experiment.

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
    on_turn: Callable[[str], None] = lambda variant: None,
) -> dict[str, list[Turn]]:
    """Interleaved turns of all variants on the same requests.

    Args:
        bench: who generates.
        variants: see `take_turn`.
        requests_of: the requests of a round, by its number.
        repetitions: measured rounds.
        first_round: number of the first one; rounds of different numbers have different requests.
        warmups: rounds before them that are not kept.
        concurrency: see `take_turn`.
        on_turn: called after every turn with its variant.

    Returns:
        The turns of each variant, in the order of the rounds.
    """
    turns: dict[str, list[Turn]] = {variant: [] for variant in variants}
    for repetition in range(-warmups, repetitions):
        requests = requests_of(first_round + repetition + warmups)
        for variant in variants:
            turn = bench.turn(variant, requests, concurrency)
            on_turn(variant)
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
    config: Config, batches: Sequence[int], tokens: int, repetitions: int, console: Console
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
        console: where progress is shown.

    Raises:
        ConfigError: see `SpeculationBench`.
    """
    speculation = config.rollout.speculation
    longer = config.rollout.model_copy(update={"max_tokens": tokens})
    console.info(f"starting an engine without drafts and one with them for {config.model.path}")
    bench = SpeculationBench(config.model_copy(update={"rollout": longer}))
    fixed = [f"static:{arm}" for arm in make_arms(speculation.drafters, speculation.max_draft_tokens) if arm.k]
    variants = [PLAIN, *fixed, speculation.adaptive]
    rows, against_plain, against_best = [], [], []
    samples = min(config.algorithm.group_size, max(batches))
    turns_in_all = len(batches) * (repetitions + WARMUPS) * len(variants)
    with console.phase("measuring", turns_in_all) as phase:
        for index, batch in enumerate(batches):

            def make(number: int, count: int = batch * WAVES) -> list[RolloutRequest]:
                return bench.requests(number, uneven_lengths(count, tokens), samples)

            def show(variant: str, batch: int = batch) -> None:
                phase.advance(note=f"batch {batch}, {variant}")

            turns = compare(bench, variants, make, repetitions, index * 1000, WARMUPS, batch, show)
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

    With equal lengths plain decoding alone would begin and end all requests in the same steps.
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

    Args:
        config: the experiment.
        batches: live requests, separated by commas.
        tokens: the longest response; None: `rollout.max_tokens`.
        repetitions: measured rounds per batch size.
        file: where the JSON goes, or None.
        quick: noted in the JSON.

    Raises:
        ConfigError: see `SpeculationBench`, `parse_batches`.
    """
    length = tokens or config.rollout.max_tokens
    rows, ratios = bench_speculative(config, parse_batches(batches), length, repetitions, Console(enabled=True))
    publish("speculative decoding", ratios, rows, file, quick)
