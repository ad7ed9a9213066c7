"""`megatron-rl eval`: a policy's accuracy on held-out sets, problem by problem, from where an earlier call stopped."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from megatron_rl.config import Config
from megatron_rl.config.heldout_sets import set_name
from megatron_rl.distributed.coordinator import Coordinator
from megatron_rl.distributed.runtime import initialize, shutdown
from megatron_rl.evaluation.evaluation_settings import settings
from megatron_rl.evaluation.evaluator import Evaluator, HeldoutSet, load_set, with_readable_answers
from megatron_rl.evaluation.results import ProblemResult, ResultsFile, claim
from megatron_rl.evaluation.statistics import Estimate, summarize
from megatron_rl.models.weights import PolicyWeights
from megatron_rl.observability.benchmark_results import environment
from megatron_rl.observability.console import Console
from megatron_rl.observability.terminal import standard_output
from megatron_rl.preflight import begin, keep_config
from megatron_rl.rewards.score import Scorer
from megatron_rl.trainer.fleet_start import start_fleet
from megatron_rl.trainer.policy import Policy
from rollout.fleet.fleet import RolloutFleet

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SUMMARY = "summary.json"
STEP = 0
"""Seeds are those of an evaluation before training."""
Summaries = dict[str, dict[str, Estimate]]
"""Set -> measure -> estimate."""


def run(config: Config) -> None:
    """Evaluate the policy `model.path` on the sets of `data.eval`; results go to `run_dir`.

    Raises:
        ConfigError: when the config does not fit the machine, the model, the data or earlier results in `run_dir`.
    """
    runtime = initialize(config)
    console = Console(runtime.is_driver)
    if runtime.is_driver:
        specs = {set_name(spec): spec for spec in config.data.eval}
        claim(Path(config.run_dir), settings(config), specs)
    start = begin(config, runtime)
    keep_config(config, runtime)
    policy = Policy(config, runtime, start.arch, start.tokens.limit, config.rollout.temperature)
    coordinator = Coordinator(runtime)
    sets: list[HeldoutSet] = []
    if runtime.is_driver:
        with Scorer(config.reward, config.rollout.max_tokens, workers=1) as scorer:
            sets = [
                with_readable_answers(load_set(spec, config, start.tokenizer), spec, config, scorer)
                for spec in config.data.eval
            ]
        console.info(f"starting {config.rollout.engines} rollout engine(s) for {config.model.path}")
    fleet = start_fleet(config, runtime, coordinator, start.tokens)
    try:
        fleet.connect(PolicyWeights(policy.model, start.arch)).sync(STEP)

        def evaluate() -> None:
            assert fleet.engines is not None
            publish(evaluate_sets(config, start.tokenizer, sets, fleet.engines, console), Path(config.run_dir))

        coordinator.drive(evaluate)
    finally:
        fleet.shutdown()
    shutdown()


def evaluate_sets(
    config: Config, tokenizer: "PreTrainedTokenizerBase", sets: list[HeldoutSet], fleet: RolloutFleet, console: Console
) -> Summaries:
    """Finish the results of all sets, and sum them up. On the driver.

    Raises:
        ConfigError: when a reward or an earlier result cannot be used.
    """
    with Scorer(config.reward, config.rollout.max_tokens) as scorer:
        evaluator = Evaluator(config, tokenizer, fleet, console, sets, scorer)
        try:
            return {each.name: summarize(finish_set(each, evaluator, Path(config.run_dir), console)) for each in sets}
        finally:
            evaluator.close()


def finish_set(heldout: HeldoutSet, evaluator: Evaluator, folder: Path, console: Console) -> list[ProblemResult]:
    """The results of all problems of a set, in its order: those in its file, and the others, which are added to it.

    Raises:
        ConfigError: when the file cannot be used.
    """
    file = ResultsFile(folder, heldout.name)
    found = file.read()
    done = {
        prompt.prompt_id: found[prompt.prompt_id]
        for prompt in heldout.prompts
        if prompt.prompt_id in found
        and (found[prompt.prompt_id].prompt, found[prompt.prompt_id].answer) == (prompt.text, prompt.answer)
    }
    if done:
        console.info(f"{heldout.name}: {len(done)} of {len(heldout.prompts)} problems are done already")
    file.write(list(done.values()))  # without what does not belong to the set, and a line that a crash cut off
    missing = [prompt for prompt in heldout.prompts if prompt.prompt_id not in done]
    for result in evaluator.results(heldout, STEP, missing) if missing else ():
        file.append(result)
        done[result.problem_id] = result
    results = [done[prompt.prompt_id] for prompt in heldout.prompts]
    file.write(results)
    return results


def publish(summaries: Summaries, folder: Path) -> None:
    """Print a table, and write the summary beside the results."""
    content = {
        "sets": {
            name: {measure: asdict(value) for measure, value in summary.items()} for name, summary in summaries.items()
        },
        "environment": environment(),
    }
    draft = (folder / SUMMARY).with_suffix(".tmp")
    draft.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    draft.replace(folder / SUMMARY)
    table = Table("set", "measure", title="Accuracy")
    table.add_column("value", justify="right")
    table.add_column("95 % interval", justify="right")
    for name, summary in summaries.items():
        for measure, value in summary.items():
            table.add_row(Text(name), measure, f"{value.value:.1%}", f"{value.low:.1%} to {value.high:.1%}")
    terminal = standard_output()
    terminal.print(table)
    terminal.print(f"results of every problem: {folder}", highlight=False, markup=False, soft_wrap=True)
