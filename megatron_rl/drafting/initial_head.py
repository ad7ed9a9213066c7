"""The head that a run starts with: read from a folder, or new."""

from pathlib import Path

import torch

from drafter.eagle.head import EagleHead, HeadConfig
from drafter.eagle.head_files import load_head, save_head
from drafter.eagle.packed_rows import FrozenPolicy
from drafter.eagle.vocabulary import DraftVocabulary
from megatron_rl.config import Config, ConfigError
from megatron_rl.config.model_fit import read_hf_config


def initial_head(config: Config, policy: FrozenPolicy, vocabulary: DraftVocabulary | None = None) -> EagleHead:
    """The head of `drafter.path`, else a new one with random weights drawn from `train.seed`; the same on all ranks.

    Args:
        config: the experiment; `model.path` says how wide the policy is.
        policy: a new eagle3 head starts from its output layer, and any head computes on its device.
        vocabulary: what a new head can propose; None: all tokens.

    Returns:
        a float32 head.

    Raises:
        ConfigError: when the folder cannot be used, or does not fit the policy or the experiment.
    """
    if config.drafter.path is not None:
        head = _given_head(config)
    else:
        head = _new_head(config, vocabulary)
        if config.drafter.kind == "eagle3":
            head.copy_policy_head(policy.lm_head.cpu())
    return head.float().to(policy.embedding.device)


def folder_for_engines(config: Config) -> str:
    """The folder of the head that the engines start with: `drafter.path`, or one written to `run_dir/drafter`.

    A new head lacks the policy's output layer there; `initial_head` has it, and is pushed before the first rollout.

    Raises:
        ConfigError: see `initial_head`.
    """
    if config.drafter.path is not None:
        _given_head(config)
        return config.drafter.path
    folder = Path(config.run_dir) / "drafter"
    save_head(_new_head(config, None), folder)
    return str(folder)


def _given_head(config: Config) -> EagleHead:
    assert config.drafter.path is not None
    hf = read_hf_config(config.model.path, config.model.family)
    try:
        head = load_head(config.drafter.path, hf["num_hidden_layers"])
    except ValueError as error:
        raise ConfigError(str(error)) from error
    _check(config, head.config, hf)
    return head


def _new_head(config: Config, vocabulary: DraftVocabulary | None) -> EagleHead:
    settings = config.drafter
    if settings.draft_vocab is not None and vocabulary is None:
        raise ConfigError(
            "drafter.draft_vocab needs to know which tokens rollouts use: make the head with `megatron-rl drafter "
            "warmup` and give its folder as drafter.path, or leave draft_vocab out."
        )
    size = len(vocabulary.token_ids) if vocabulary is not None else None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.train.seed)
        return EagleHead(
            HeadConfig.for_policy(read_hf_config(config.model.path, config.model.family), settings.kind, size),
            vocabulary,
        )


def _check(config: Config, head: HeadConfig, hf: dict[str, int]) -> None:
    path, settings = config.drafter.path, config.drafter
    found = {"kind": head.kind, "hidden_size": head.hidden_size, "vocab_size": head.vocab_size}
    wanted = {"kind": settings.kind, "hidden_size": hf["hidden_size"], "vocab_size": hf["vocab_size"]}
    for name, value in wanted.items():
        if found[name] != value:
            raise ConfigError(
                f"drafter.path={path!r} holds a head with {name} {found[name]}, but the experiment needs {value}."
            )
    layers = hf["num_hidden_layers"]
    if any(layer > layers for layer in head.aux_layers):
        raise ConfigError(f"drafter.path={path!r} reads depth {head.aux_layers[-1]} of a policy with {layers} layers.")
