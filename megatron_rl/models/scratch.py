"""A small Qwen3-style model made from nothing: configuration and character tokenizer, no weights."""

import json
import string
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_rl.config import ConfigError
from megatron_rl.config.families import scratch_config
from megatron_rl.config.sections import ScratchModelConfig

PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"
PRINTABLE = "\n " + string.digits + string.ascii_letters + string.punctuation

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def make_scratch_model(path: str | Path, scratch: ScratchModelConfig) -> None:
    """Write `config.json`, `generation_config.json` and the tokenizer of a new model to the folder `path`.

    The trainer draws the weights. The files follow the layout of published Qwen3 models, so that `transformers`, vLLM
    and this trainer read them alike.

    Raises:
        ConfigError: when the folder already holds weights, or the heads do not fit together.
    """
    folder = Path(path)
    if any(folder.glob("*.safetensors")):
        raise ConfigError(f"model.path={str(path)!r} already holds weights; remove the folder or choose another path.")
    if scratch.heads % scratch.kv_heads:
        raise ConfigError(
            f"model.scratch.kv_heads={scratch.kv_heads} does not divide model.scratch.heads={scratch.heads}; "
            f"choose a divisor of {scratch.heads}."
        )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = character_tokenizer(scratch.max_positions)
    tokenizer.save_pretrained(folder)
    special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    _write_json(folder / "generation_config.json", special)
    _write_json(folder / "config.json", scratch_config(scratch) | {"vocab_size": len(tokenizer)} | special)


def character_tokenizer(max_positions: int) -> PreTrainedTokenizerFast:
    """One token per printable ASCII character and newline; everything else is `<unk>`."""
    vocabulary = {token: i for i, token in enumerate([PAD, EOS, UNKNOWN, *PRINTABLE])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
        model_max_length=max_positions,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _write_json(file: Path, content: dict[str, object]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n")
