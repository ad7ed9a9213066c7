"""`megatron-rl drafter warmup`: trains a head on rollouts of a policy that stands still, before a run begins."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from drafter.eagle.draft_loss import LossOptions
from drafter.eagle.head import EagleHead
from drafter.eagle.head_files import save_head
from drafter.eagle.packed_rows import FrozenPolicy
from drafter.eagle.vocabulary import DraftVocabulary, choose_vocabulary
from drafter.training.feature_store import FeatureStore
from drafter.training.head_trainer import DraftTrainer, OptimizerOptions
from drafter.training.publication import LiveHead, score
from megatron_rl.config import Config, ConfigError
from megatron_rl.config.cross_checks import check_drafter
from megatron_rl.distributed.coordinator import Coordinator
from megatron_rl.distributed.runtime import Runtime, initialize, shutdown
from megatron_rl.drafting.initial_head import initial_head
from megatron_rl.drafting.online_drafter import FeatureSupply, frozen_policy
from megatron_rl.generation.generator import Generator
from megatron_rl.generation.prompt_sets import read_sets
from megatron_rl.models.weights import PolicyWeights
from megatron_rl.observability.console import Console
from megatron_rl.preflight import Start, begin, keep_config
from megatron_rl.trainer.batch import Batch
from megatron_rl.trainer.fleet_start import start_fleet
from megatron_rl.trainer.policy import Policy
from megatron_rl.trainer.rollouts_file import ROLLOUTS_FILE, read_rollouts, write_rollouts
from megatron_rl.trainer.schedule import is_due
from rollout.types import Rollout

WEIGHT_DECAY = 0.01


@dataclass(frozen=True)
class WarmupOptions:
    """What the command line adds to the experiment."""

    batches: int = 8
    """Generated batches: each `train.prompts_per_step` prompts, `algorithm.group_size` samples of each."""
    updates: int = 300
    """Optimizer steps."""
    slices: int = 4
    """Packed rows of `drafter.tokens_per_slice` tokens per optimizer step and trainer process."""
    score_every: int = 25
    """Optimizer steps between scores."""
    rollouts: Path | None = None
    """Saved rollouts instead of generated ones: JSON lines with `prompt_ids` and `token_ids`."""
    output: Path | None = None
    """Folder for the head; None: `drafter` in the run's folder."""


def run(config: Config, options: WarmupOptions) -> None:
    """Train a head for the policy `model.path` and write the best one, by held-out score, in vLLM's format.

    Args:
        config: the experiment.
        options: how long, on what, and where to.

    Raises:
        ConfigError: when the config does not fit the machine, the model or the data, or the rollouts are of no use.
    """
    check_drafter(config.parallel)
    runtime = initialize(config)
    console = Console(runtime.is_driver)
    start = begin(config, runtime)
    keep_config(config, runtime)
    policy = Policy(config, runtime, start.arch, start.tokens.limit, config.rollout.temperature)
    weights = PolicyWeights(policy.model, start.arch)
    if options.rollouts is not None:
        batch = read_rollouts(options.rollouts, start.tokens.limit)
    else:
        batch = _generate(config, runtime, start, weights, console, options.batches)
    frozen = frozen_policy(weights, start.tokens.limit)
    head = initial_head(config, frozen, _vocabulary(config, batch, start))
    best = _train(policy, head, frozen, batch, console, options)
    output = options.output or Path(config.run_dir) / "drafter"
    if runtime.is_driver:
        save_head(best, output)
    console.info(f"the drafter is in {output}; use it with drafter.path={output}")
    shutdown()


def _train(
    policy: Policy, head: EagleHead, frozen: FrozenPolicy, batch: Batch, console: Console, options: WarmupOptions
) -> EagleHead:
    settings, temperature = policy.config.drafter, policy.config.rollout.temperature
    store = FeatureStore(settings.memory_mb * 2**20, settings.tokens_per_slice, policy.config.train.seed)
    supply = FeatureSupply(policy, head, store)
    with (
        console.progress("hidden states") as progress,
        supply.recording(batch, 1, tokens=_affordable_tokens(policy, head)),
    ):
        policy.logprobs(batch, progress)
    options_of_adam = OptimizerOptions(
        lr=settings.lr, weight_decay=WEIGHT_DECAY, decay_all=policy.config.train.decay_all
    )
    trainer = DraftTrainer(head, store, LossOptions(steps=settings.unroll), options_of_adam)
    trainer.policy = frozen
    best, best_length, loss = LiveHead(head), 0.0, math.nan
    with console.phase("training", options.updates) as phase:
        for update in range(options.updates + 1):
            if update:
                loss = _update(trainer, options.slices)
                phase.advance(note=f"loss {loss:.3f}")
                if not is_due(update, options.score_every, options.updates):
                    continue
            scored = score(head, store.held_out_rows(), frozen, settings.unroll, temperature)
            if not scored.reached.any():
                raise ConfigError(
                    "the rollouts hold no response of two tokens that could be held out to score the drafter; give "
                    "more."
                )
            if scored.expected_length > best_length:
                best.publish(head, update)
                best_length = scored.expected_length
            chances = " ".join(f"{chance:.2f}" for chance in scored.per_position.tolist())
            console.info(
                f"update {update}/{options.updates}  loss {f'{loss:.3f}' if update else '-'}  "
                f"held-out length {scored.expected_length:.3f} of {settings.unroll + 1} (accepted {chances})"
            )
    return best.head


def _update(trainer: DraftTrainer, slices: int) -> float:
    for _ in range(slices):
        if (piece := trainer.next(lambda size: True)) is not None:
            piece.run()
    return trainer.flush().loss


def _affordable_tokens(policy: Policy, head: EagleHead) -> int:
    """Tokens whose hidden states fill the stores of all ranks."""
    depths = len(head.config.aux_layers) + 1
    token_bytes = depths * head.config.hidden_size * policy.model.config.params_dtype.itemsize
    return policy.config.drafter.memory_mb * 2**20 * policy.runtime.world_size // token_bytes


def _vocabulary(config: Config, batch: Batch, start: Start) -> DraftVocabulary | None:
    size = config.drafter.draft_vocab
    if size is None or config.drafter.path is not None:
        return None
    tokens = torch.tensor([token for response in batch.responses for token in response])
    counts = torch.bincount(tokens, minlength=start.arch.vocab_size)
    try:
        return choose_vocabulary(counts, size, always=start.tokens.ends)
    except ValueError as error:
        raise ConfigError(f"drafter.draft_vocab={size}: {error}") from None


def _generate(
    config: Config,
    runtime: Runtime,
    start: Start,
    weights: PolicyWeights,
    console: Console,
    batches: int,
) -> Batch:
    """Rollouts of the policy for the prompts of the first `batches` steps, also written to the run's folder."""
    config = _plain(config)
    coordinator = Coordinator(runtime)
    sets = read_sets(config, start.tokenizer) if runtime.is_driver else None
    console.info(f"starting {config.rollout.engines} rollout engine(s)")
    fleet, generator = start_fleet(config, runtime, coordinator, start.tokens), None
    rollouts: list[Rollout] = []
    try:
        if fleet.engines is not None and sets is not None:
            generator = Generator(config, start.tokenizer, sets, fleet.engines, console)
        fleet.connect(weights).sync(0)
        for step in range(1, batches + 1):

            def generate(step: int = step) -> list[Rollout]:
                assert generator is not None
                return generator.training_rollouts(step).rollouts

            rollouts += coordinator.drive(generate)
    finally:
        if generator is not None:
            generator.close()
        fleet.shutdown()
    if runtime.is_driver:
        file = Path(config.run_dir) / ROLLOUTS_FILE
        write_rollouts(rollouts, file)
        console.info(f"{len(rollouts)} rollouts are in {file}")
    return Batch([rollout.prompt_ids for rollout in rollouts], [rollout.token_ids for rollout in rollouts])


def _plain(config: Config) -> Config:
    """Without drafts, and with no other prompts than those of the steps."""
    speculation = config.rollout.speculation.model_copy(update={"drafters": ["ngram"], "adaptive": "off"})
    rollout = config.rollout.model_copy(update={"speculation": speculation})
    algorithm = config.algorithm.model_copy(update={"dynamic_sampling": 0})
    return config.model_copy(update={"rollout": rollout, "algorithm": algorithm})
