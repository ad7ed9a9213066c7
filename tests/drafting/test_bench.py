"""`megatron-rl bench`: arguments, and the sampling options that engines refuse at start-up."""

import pytest

from megatron_rl.config import ConfigError
from megatron_rl.drafting.bench import parse_batches, uneven_lengths
from rollout.engine.vllm_options import check_sampling_options


def test_batches_are_a_list_of_numbers() -> None:
    assert parse_batches("1,8, 64") == [1, 8, 64]


def test_lengths_are_between_half_and_all() -> None:
    lengths = uneven_lengths(100, 80)
    assert min(lengths) == 40 and 78 <= max(lengths) <= 80 and len(set(lengths[:20])) == 20


@pytest.mark.parametrize("text", ["", "1,x", "0,4", "-1"])
def test_wrong_batches_are_named(text: str) -> None:
    with pytest.raises(ConfigError, match="--batches"):
        parse_batches(text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_q": 0.5}, r"rollout\.sampling\.top_q is not supported; did you mean top_p\?"),
        ({"logprobs": 3}, r"rollout\.sampling\.logprobs is not supported"),
        ({"bad_words": ["x"]}, "needs a tokenizer"),
        ({"top_p": 1.5}, "vLLM refuses rollout.sampling"),
    ],
)
def test_sampling_options_are_checked_at_start_up(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_sampling_options(options)


def test_supported_sampling_options_pass() -> None:
    check_sampling_options({"top_p": 0.9, "top_k": 40, "min_p": 0.01, "min_tokens": 2, "repetition_penalty": 1.1})
