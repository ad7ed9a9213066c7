"""The `megatron-rl` command. Heavy packages are imported inside the commands, so that `--help` answers at once."""

import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from megatron_rl.config.errors import ConfigError
from megatron_rl.data_commands import ConfigFile, Overrides, data_app, listed

app = typer.Typer(
    help="Reinforcement learning of language models with Megatron-Core actors and a vLLM rollout fleet.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

bench_app = typer.Typer(help="Measure parts of the system.", no_args_is_help=True)
app.add_typer(bench_app, name="bench")
drafter_app = typer.Typer(help="The trained drafter of speculative decoding.", no_args_is_help=True)
app.add_typer(drafter_app, name="drafter")
quantize_app = typer.Typer(help="Calibration of int8 engines.", no_args_is_help=True)
app.add_typer(quantize_app, name="quantize")
app.add_typer(data_app, name="data")
launch_app = typer.Typer(help="Files that start an experiment on a cluster.", no_args_is_help=True)
app.add_typer(launch_app, name="launch")


class Format(StrEnum):
    """Target of `megatron-rl convert`."""

    hf = "hf"
    megatron = "megatron"


@app.command()
def train(config: ConfigFile, overrides: Overrides = None) -> None:
    """Train with reinforcement learning; starts its own trainer processes unless torchrun or srun has."""
    from megatron_rl.cluster.launcher import launch
    from megatron_rl.config import Config, load_config

    def run(settings: Config) -> None:
        from megatron_rl import train

        train.run(settings)

    overrides = overrides or []
    raise typer.Exit(launch(load_config(config, overrides), "train", ["-c", str(config), *overrides], run))


@app.command()
def sft(config: ConfigFile, overrides: Overrides = None) -> None:
    """Fine-tune on demonstrations, to make the model that `train` starts from."""
    from megatron_rl.cluster.launcher import launch
    from megatron_rl.config import Config, load_config

    def run(settings: Config) -> None:
        from megatron_rl import sft

        sft.run(settings)

    overrides = overrides or []
    raise typer.Exit(launch(load_config(config, overrides), "sft", ["-c", str(config), *overrides], run))


@app.command("eval")
def evaluate(
    config: ConfigFile,
    overrides: Overrides = None,
    checkpoint: Annotated[
        str | None,
        typer.Option("--checkpoint", help="Checkpoint or Hugging Face folder, or Org/Name; default: model.path."),
    ] = None,
    sets: Annotated[
        str, typer.Option("--sets", help="Names, files or NAME=FILE, separated by commas; default: data.eval.")
    ] = "",
    seed: Annotated[int | None, typer.Option("--seed", help="Of the sampled responses; default: train.seed.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", help="Folder of the results; default: RUN_DIR/eval/CHECKPOINT.")
    ] = None,
) -> None:
    """Measure accuracy, avg@k, pass@k and majority@k of a policy on held-out sets. A stopped evaluation continues."""
    from megatron_rl.cluster.launcher import launch
    from megatron_rl.config import Config, load_config
    from megatron_rl.evaluation.evaluation_settings import for_evaluation

    def run(settings: Config) -> None:
        from megatron_rl import evaluate as run

        run.run(settings)

    overrides = overrides or []
    settings = for_evaluation(load_config(config, overrides), checkpoint, listed(sets), seed, output)
    options = ["--checkpoint", settings.model.path] if checkpoint is not None else []
    options += ["--sets", sets] if sets else []
    options += ["--seed", str(seed)] if seed is not None else []
    options += ["--output", str(output)] if output is not None else []
    raise typer.Exit(launch(settings, "eval", ["-c", str(config), *options, *overrides], run))


@app.command()
def rewards(
    file: Annotated[Path, typer.Argument(help="JSON lines with prompt (may be missing), response and answer.")],
    reward: Annotated[
        str, typer.Option("--reward", help="exact, numeric, math or choice, or a function as package.module:function.")
    ] = "math",
    timeout: Annotated[float, typer.Option("--timeout", min=0.001, help="Seconds per response.")] = 10.0,
    environment: Annotated[
        list[str] | None, typer.Option("--environment", help="As a name in reward.environment; repeatable.")
    ] = None,
    json: Annotated[Path | None, typer.Option("--json", metavar="OUT", help="Write the result to OUT.")] = None,
) -> None:
    """Try a reward on the responses of a file: the score of each, how it was read, and why."""
    from megatron_rl.rewards.try_reward import reward_config, try_reward

    try_reward(file, reward_config(reward, timeout, environment or []), json)


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="Hugging Face folder, Megatron checkpoint folder, or Org/Name.")],
    output: Annotated[Path, typer.Argument(help="Folder to write; must not exist or be empty.")],
    to: Annotated[Format, typer.Option("--to", help="Format of OUTPUT.")],
    family: Annotated[
        str | None, typer.Option("--family", help="The model's family, as in model.family: module:NAME.")
    ] = None,
) -> None:
    """Convert a model between the Hugging Face layout and a Megatron checkpoint."""
    from megatron_rl.config.hub import local_folder, pin

    source = pin(source, "SOURCE ")
    if not local_folder(source).is_dir():
        raise ConfigError(f"{source} is not a folder; give a folder with a model or a checkpoint.")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"{output} already exists and is not an empty folder; choose another output.")
    from megatron_rl.cluster.launcher import silence_known_warnings

    silence_known_warnings()
    from megatron_rl.convert import hf_to_megatron, megatron_to_hf

    (megatron_to_hf if to is Format.hf else hf_to_megatron)(source, str(output), family)


@app.command("config")
def show_config(
    arguments: Annotated[list[str] | None, typer.Argument(metavar="[KEY] | [KEY.PATH=VALUE]...")] = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Print type, default and meaning of KEY, or of all.")
    ] = False,
    config: Annotated[Path | None, typer.Option("--config", "-c", help="Print this experiment, resolved.")] = None,
) -> None:
    """Explain the keys of an experiment file (`--explain [KEY]`), or print one in full (`-c FILE`)."""
    arguments = arguments or []
    if explain == (config is not None) or (explain and len(arguments) > 1):
        raise ConfigError(
            "use `megatron-rl config --explain [KEY]` or `megatron-rl config -c FILE [KEY.PATH=VALUE]...`."
        )
    if config is not None:
        import yaml

        from megatron_rl.config import load_config

        typer.echo(yaml.safe_dump(load_config(config, arguments).model_dump(mode="json"), sort_keys=False), nl=False)
        return
    from megatron_rl.config.explain import explain as explain_key

    typer.echo(explain_key(arguments[0] if arguments else None))


@bench_app.command("speculative")
def bench_speculative(
    config: ConfigFile,
    overrides: Overrides = None,
    batches: Annotated[str, typer.Option("--batches", help="Live requests, separated by commas.")] = "1,2,4,8,16,32,64",
    tokens: Annotated[
        int | None, typer.Option("--tokens", help="Longest response; default: rollout.max_tokens.")
    ] = None,
    repetitions: Annotated[int, typer.Option("--repetitions", help="Measured rounds per batch size.")] = 5,
    quick: Annotated[bool, typer.Option("--quick", help="Two batch sizes, short responses: under a minute.")] = False,
    json: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the result to FILE.")] = None,
) -> None:
    """Compare plain decoding with every number of draft tokens and with the adaptive choice, at the same tokens."""
    from megatron_rl.cluster.launcher import silence_known_warnings
    from megatron_rl.config import load_config
    from megatron_rl.config.hub import pin_model

    silence_known_warnings()
    from megatron_rl.drafting.bench import run_speculative

    settings = pin_model(load_config(config, overrides or []))
    if quick:
        batches, tokens, repetitions = "1,32", min(tokens or settings.rollout.max_tokens, 48), 2
    run_speculative(settings, batches, tokens, repetitions, json, quick)


@drafter_app.command("warmup")
def warm_up_drafter(
    config: ConfigFile,
    overrides: Overrides = None,
    batches: Annotated[int, typer.Option("--batches", min=1, help="Batches of rollouts to generate.")] = 8,
    updates: Annotated[int, typer.Option("--updates", min=1, help="Optimizer steps.")] = 300,
    slices: Annotated[int, typer.Option("--slices", min=1, help="Packed rows per step and trainer process.")] = 4,
    rollouts: Annotated[
        Path | None,
        typer.Option("--rollouts", help="Saved rollouts to train on: JSON lines with prompt_ids and token_ids."),
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", help="Folder to write; default: RUN_DIR/drafter.")] = None,
) -> None:
    """Train a drafter for the policy `model.path` on its own rollouts, before a run that uses it."""
    from megatron_rl.cluster.launcher import launch
    from megatron_rl.config import Config, load_config

    def run(settings: Config) -> None:
        from megatron_rl.drafting import warmup

        warmup.run(settings, warmup.WarmupOptions(batches, updates, slices, rollouts=rollouts, output=output))

    overrides = overrides or []
    options = ["--batches", str(batches), "--updates", str(updates), "--slices", str(slices)]
    options += ["--rollouts", str(rollouts)] if rollouts is not None else []
    options += ["--output", str(output)] if output is not None else []
    arguments = ["-c", str(config), *options, *overrides]
    raise typer.Exit(launch(load_config(config, overrides), "drafter warmup", arguments, run))


@quantize_app.command("profile")
def profile_quantization(
    config: ConfigFile,
    overrides: Overrides = None,
    prompts: Annotated[int, typer.Option("--prompts", min=1, help="Texts to run through the model.")] = 128,
    rollouts: Annotated[
        Path | None,
        typer.Option("--rollouts", help="Saved rollouts to run instead of prompts: JSON lines as for drafter warmup."),
    ] = None,
    quantized: Annotated[
        Path | None,
        typer.Option("--quantized", help="Take smoothing and clipping from this W8A8 checkpoint (compressed-tensors)."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", help="File to write; default: RUN_DIR/profile.safetensors.")
    ] = None,
) -> None:
    """Measure what int8 does to each layer of `model.path`, and choose smoothing and clipping."""
    from megatron_rl.cluster.launcher import silence_known_warnings
    from megatron_rl.config import load_config
    from megatron_rl.config.hub import pin_model

    silence_known_warnings()
    from megatron_rl.calibration.profile import profile

    settings = pin_model(load_config(config, overrides or []))
    profile(settings, output or Path(settings.run_dir) / "profile.safetensors", prompts, rollouts, quantized)


@quantize_app.command("setup")
def set_up_quantization(
    profile: Annotated[Path, typer.Argument(help="File that `quantize profile` wrote.")],
    output: Annotated[Path, typer.Option("--output", help="YAML file to write; its vectors go beside it.")],
    max_error: Annotated[
        float | None,
        typer.Option(
            "--max-error", help="Leave out layers beyond it; default: that of rollout.quantization_max_error."
        ),
    ] = None,
    skip: Annotated[
        list[str] | None,
        typer.Option("--skip", help="Leave this out too, as in rollout.quantization_skip; repeatable."),
    ] = None,
) -> None:
    """Write the file that engines read (rollout.quantization_profile, FLASHRL_CONFIG)."""
    from megatron_rl.calibration.profile_file import setup
    from megatron_rl.config.rollout import RolloutConfig

    setup(profile, output, RolloutConfig().quantization_max_error if max_error is None else max_error, skip or [])


@launch_app.callback()
def launch_help() -> None:
    """With a single command, typer would leave out its name."""


@launch_app.command("slurm")
def launch_slurm(
    config: ConfigFile,
    nodes: Annotated[int, typer.Option("--nodes", help="Nodes of the job.")],
    overrides: Overrides = None,
    gpus: Annotated[int, typer.Option("--gpus-per-node", help="GPUs of a node; 0: a CPU machine.", min=0)] = 8,
    processes: Annotated[
        int | None,
        typer.Option("--processes-per-node", help="Trainer processes of a node without GPUs.", min=1),
    ] = None,
    time: Annotated[str, typer.Option("--time", help="Time limit in Slurm's notation.")] = "24:00:00",
    partition: Annotated[str | None, typer.Option("--partition", help="Slurm's partition.")] = None,
    account: Annotated[str | None, typer.Option("--account", help="Account to charge.")] = None,
    grace: Annotated[
        int, typer.Option("--grace", help="Seconds before the time limit at which the run saves and is requeued.")
    ] = 600,
    sbatch: Annotated[
        list[str] | None, typer.Option("--sbatch", help="One more option for sbatch, e.g. --qos=high; repeatable.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", help="File to write; default: RUN_DIR/slurm/job.sbatch.")
    ] = None,
) -> None:
    """Check the experiment against so many nodes, and write the sbatch file that trains it on them."""
    from megatron_rl.cluster.slurm import Job, describe, node_roles, write_job
    from megatron_rl.config import load_config

    overrides = overrides or []
    settings = load_config(config, overrides)
    job = Job(nodes, gpus, processes or gpus or 1, time, partition, account, grace, tuple(sbatch or []))
    file = write_job(settings, job, ["-c", str(config.resolve()), *overrides], output)
    typer.echo(f"{describe(settings, job, node_roles(settings, job))}\nsbatch {file}")


@app.command()
def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    nodes: Annotated[
        int | None, typer.Option("--nodes", help="Nodes; default: as few as the experiment needs.")
    ] = None,
    gpus: Annotated[
        int | None, typer.Option("--gpus-per-node", help="GPUs of a node; default: as few as it needs, 8 at most.")
    ] = None,
    gpu: Annotated[str, typer.Option("--gpu", help="Kind of GPU: a100-80, h100 or h200.")] = "h100",
    prompt_tokens: Annotated[
        int | None, typer.Option("--prompt-tokens", help="Mean length of prompts; default: half the limit.")
    ] = None,
    response_tokens: Annotated[
        int | None, typer.Option("--response-tokens", help="Mean length of responses; default: half the limit.")
    ] = None,
) -> None:
    """Show what the experiment needs on GPUs: memory by part, pipeline, weight sync, expected speed and its limit."""
    from megatron_rl.cluster.plan import plan as print_plan
    from megatron_rl.cluster.slurm import smallest_job
    from megatron_rl.config import load_config

    settings = load_config(config, overrides or [])
    print_plan(settings, smallest_job(settings, nodes, gpus), gpu, prompt_tokens, response_tokens)


@app.command()
def doctor() -> None:
    """Show what this machine has, and what that means for a run."""
    from megatron_rl.doctor import examine

    examine()


@app.command()
def report(run_dir: Annotated[Path, typer.Argument(help="Folder of a run.")]) -> None:
    """Write report.md with plots into RUN_DIR and print its summary."""
    from megatron_rl.observability.report import print_summary, write_report

    file = write_report(run_dir)
    print_summary(run_dir)
    typer.echo(f"report: {file}")


def main() -> None:
    """Console script: a user's mistake is one line on stderr and exit status 2.

    Modules in the current folder can be imported (a reward, an algorithm or a data source of one's own), as they can in
    the trainer processes, which `python -m` starts.
    """
    folder = os.getcwd()
    if folder not in sys.path and not sys.flags.safe_path:
        sys.path.insert(0, folder)
    try:
        app()
    except ConfigError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
