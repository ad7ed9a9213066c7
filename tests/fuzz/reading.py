"""What must hold of every set, whatever it holds."""

from typing import Any

from megatron_rl.config import ConfigError
from megatron_rl.config.sections import DataConfig
from megatron_rl.data.prompts import PromptSet, load_prompts, read_prompts
from megatron_rl.models.scratch import character_tokenizer

TOKENIZER = character_tokenizer(1024)
TOKENIZER.chat_template = (
    "{% for m in messages %}{% if m.role == 'refused' %}{{ raise_exception('no') }}{% endif %}"
    "<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
DATA = DataConfig(max_prompt_tokens=60, max_left_out=1)


def read(name: str, needs: Any = "answer") -> PromptSet | None:
    """The set; None where it is refused in one sentence."""
    try:
        found = read_prompts(name, DATA, TOKENIZER, "train", False, needs, 100 if needs == "response" else None)
    except ConfigError as error:
        assert_sentence(str(error))
        return None
    problem = found.problem()
    assert_sentence(problem or "")
    if problem is None:
        loaded = load_prompts(name, DATA, TOKENIZER, "train", False, needs, 100 if needs == "response" else None)
        assert loaded == found.prompts, "the same at every call"
    else:
        assert not found.prompts
    return found


def assert_sentence(text: str) -> None:
    text.encode()
    assert len(text.splitlines()) <= 1


def assert_accounted(found: PromptSet, places: list[str]) -> None:
    """Each record is used, too long, or left out with a reason; and what is used is text."""
    assert found.intake.total == len(places)
    left_out = [record.where for record in found.intake.left_out]
    assert len(set(left_out)) == len(left_out) and not set(left_out) & set(found.too_long)
    assert len(left_out) + len(found.too_long) + len(found.prompts) == len(places)
    assert set(left_out) | set(found.too_long) <= set(places)
    for record in found.intake.left_out:
        assert record.reason.strip()
        assert_sentence(record.reason)
    assert len({prompt.prompt_id for prompt in found.prompts}) == len(found.prompts)
    for prompt in found.prompts:
        for text in (prompt.prompt_id, prompt.text, prompt.answer, prompt.source, prompt.response_text or ""):
            assert type(text) is str
            text.encode()
        assert prompt.text.strip() and 0 < len(prompt.token_ids) <= 60


def used_places(found: PromptSet, places: list[str]) -> list[str]:
    left_out = {record.where for record in found.intake.left_out} | set(found.too_long)
    return [place for place in places if place not in left_out]
