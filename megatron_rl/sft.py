"""Supervised fine-tuning on demonstrations, by the same trainer; it prepares base models for RL."""

import time
from dataclasses import asdict
from pathlib import Path

import torch

from megatron_rl.config import Config
from megatron_rl.data.order import PromptOrder
from megatron_rl.data.prompts import Prompt, load_prompts
from megatron_rl.distributed.runtime import initialize, shutdown
from megatron_rl.models.scratch import make_scratch_model
from megatron_rl.models.token_ids import state_ends
from megatron_rl.observability.console import Console
from megatron_rl.observability.metrics_logger import MetricsLogger
from megatron_rl.preflight import begin, keep_config
from megatron_rl.trainer.batch import Batch
from megatron_rl.trainer.checkpoint import load_checkpoint, load_state, save_checkpoint
from megatron_rl.trainer.resume import RECORD, RunRecord, check_resumed
from megatron_rl.trainer.schedule import is_due
from megatron_rl.trainer.trainer import Trainer

PROGRESS_EVERY = 25


def run(config: Config) -> None:
    """Fine-tune `model.path` (or a new `model.scratch`) on `data.train` and export it to `run_dir/hf`.

    Raises:
        ConfigError: when the config does not fit the machine, the model or the data.
    """
    runtime = initialize(config)
    folder = Path(config.model.path)
    if runtime.is_driver and config.model.scratch is not None and not (folder / "config.json").exists():
        make_scratch_model(folder, config.model.scratch)
    torch.distributed.barrier()
    start = begin(config, runtime)
    data, longest = config.data, min(start.arch.max_positions, config.train.tokens_per_microbatch)
    prompts = load_prompts(data.train, data, start.tokenizer, data.split, False, needs="response", max_tokens=longest)
    responses = [start.tokens.ended(prompt.response_ids or [], prompt.chat) for prompt in prompts]
    record = RunRecord.of(config, prompts, start.tokenizer, start.arch)
    if start.resumed:
        saved = load_state(config.run_dir, start.resumed, RECORD)
        check_resumed(saved, record, start.resumed, config.checkpoint.resume == "force", Console(runtime.is_driver))
    keep_config(config, runtime)
    trainer = Trainer(config, runtime, start.arch, start.tokens.limit, temperature=1.0)
    if start.resumed:
        load_checkpoint(trainer, config.run_dir, start.resumed)
    _loop(trainer, prompts, responses, start.resumed, record)
    exported = Path(config.run_dir) / "hf"
    trainer.export_hf(exported)
    if runtime.is_driver:
        state_ends(exported, start.tokens)
    shutdown()


def _loop(trainer: Trainer, prompts: list[Prompt], responses: list[list[int]], resumed: int, record: RunRecord) -> None:
    config, driver = trainer.config, trainer.runtime.is_driver
    console = Console(driver)
    if resumed:
        console.info(f"resuming after step {resumed} from {config.run_dir}")
    logger = MetricsLogger(config, resumed + 1) if driver else None
    order = PromptOrder(len(prompts), config.train.prompts_per_step, config.data.seed)
    steps, window = config.train.steps, (time.perf_counter(), 0)
    with console.phase("imitating", steps - resumed) as phase:
        for step in range(resumed + 1, steps + 1):
            start = time.perf_counter()
            chosen = [index for index, _ in order.indices(step - 1)]
            batch = Batch([prompts[i].token_ids for i in chosen], [responses[i] for i in chosen])
            metrics = trainer.imitate(batch)
            seconds = time.perf_counter() - start
            tokens = sum(batch.sequence_length(index) for index in range(len(chosen)))
            if logger is not None:
                logger.log(
                    step,
                    {
                        "loss/imitation": metrics["loss"],
                        "optim/grad_norm": metrics["grad_norm"],
                        "optim/lr": metrics["lr"],
                        "optim/skipped_updates": metrics["not_finite"],
                        "time/step": seconds,
                        "throughput/trained_tokens_per_s": tokens / seconds,
                    },
                )
                phase.advance(note=f"loss {metrics['loss']:.4f}, {tokens / seconds:,.0f} tokens/s")
                if is_due(step, PROGRESS_EVERY, steps):
                    rate = (step - window[1]) / (time.perf_counter() - window[0])
                    window = (time.perf_counter(), step)
                    console.info(f"step {step}/{steps}  loss {metrics['loss']:.4f}  {rate:.1f} steps/s")
            if is_due(step, config.checkpoint.every, steps):
                save_checkpoint(trainer, config.run_dir, step, config.checkpoint.keep, {RECORD: asdict(record)})
    if logger is not None:
        logger.close()
