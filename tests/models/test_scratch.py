import json

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from megatron_rl.config import ConfigError
from megatron_rl.config.sections import ScratchModelConfig
from megatron_rl.models.scratch import PRINTABLE, make_scratch_model


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "base"
    make_scratch_model(path, ScratchModelConfig())
    return path


@pytest.mark.parametrize(
    "text", ["347+285?", "a  b \n\n c", PRINTABLE, " leading", "trailing ", "don't , stop .", "<eos>x", ""]
)
def test_decoding_gives_the_text_back(model, text):
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_one_token_per_character_and_no_special_ones_added(model):
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert len(PRINTABLE) == len(set(PRINTABLE)) == 96
    assert len(tokenizer.encode("347+85?\n")) == 8
    assert tokenizer.decode(tokenizer.encode("7+") + [tokenizer.eos_token_id], skip_special_tokens=True) == "7+"
    assert tokenizer.encode("é") == [tokenizer.unk_token_id]


def test_chat_messages_go_through_the_template(model):
    tokenizer = AutoTokenizer.from_pretrained(model)
    messages = [{"role": "user", "content": "1+1?"}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text == "user: 1+1?\nassistant: "


def test_transformers_builds_the_model(model):
    config = AutoConfig.from_pretrained(model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    policy = AutoModelForCausalLM.from_config(config)
    assert type(policy).__name__ == "Qwen3ForCausalLM"
    assert 2e6 < policy.num_parameters() < 5e6
    assert config.vocab_size == len(tokenizer) == 99
    assert config.rope_parameters["rope_theta"] == 10000.0
    assert (config.eos_token_id, config.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert json.loads((model / "generation_config.json").read_text())["eos_token_id"] == tokenizer.eos_token_id
    assert policy.get_output_embeddings().weight is policy.get_input_embeddings().weight


def test_existing_weights_are_not_overwritten(model):
    (model / "model.safetensors").touch()
    with pytest.raises(ConfigError, match="already holds weights"):
        make_scratch_model(model, ScratchModelConfig())


def test_heads_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="kv_heads"):
        make_scratch_model(tmp_path / "m", ScratchModelConfig(heads=6, kv_heads=4))
    assert not (tmp_path / "m").exists()
