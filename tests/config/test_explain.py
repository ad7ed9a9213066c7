import pytest
from pydantic import BaseModel

from megatron_rl.config import ConfigError
from megatron_rl.config.explain import explain
from megatron_rl.config.load import all_keys, section_type
from megatron_rl.config.schema import Config


def _fields(model: type[BaseModel], prefix: str = ""):
    for name, field in model.model_fields.items():
        yield prefix + name, field
        section = section_type(field.annotation)
        if section is not None:
            yield from _fields(section, f"{prefix}{name}.")


def test_every_key_is_documented_in_a_sentence():
    for key, field in _fields(Config):
        assert field.description, key
        assert field.description.endswith("."), key
        assert len(field.description.split()) >= 2, key


def test_there_are_fewer_than_160_keys():
    assert len(all_keys()) == len(set(all_keys())) < 160


def test_a_key_is_explained_with_type_default_and_choices():
    assert explain("train.lr").startswith("train.lr: float (> 0), default 1e-06\n    Peak learning rate")
    assert explain("algorithm.kl.estimator").startswith("algorithm.kl.estimator: k1 | k2 | k3, default k3\n")
    assert explain("model.path").startswith("model.path: text, required\n")
    assert explain("parallel.dp_size").startswith("parallel.dp_size: int (> 0) | null, default null\n")
    assert explain("algorithm.dual_clip").startswith("algorithm.dual_clip: float | null (> 1), default null\n")
    assert explain("data.eval").startswith("data.eval: list of text, default ['arithmetic-heldout']\n")
    assert explain("track.report").startswith("track.report: true | false, default true\n")


def test_a_section_lists_its_keys():
    text = explain("algorithm")
    for key in all_keys():
        assert (f"\n{key}: " in text) == key.startswith("algorithm.")


def test_without_a_key_everything_is_listed_once():
    text = "\n" + explain()
    for key in all_keys():
        assert text.count(f"\n{key}: ") == 1, key


@pytest.mark.parametrize(
    ("key", "suggestion"),
    [
        ("rollout.temprature", "did you mean rollout.temperature?"),
        ("temperature", "did you mean rollout.temperature?"),
        ("train.lr.deeper", "train has steps"),
        ("model.megatron.num_layers", "did you mean model.megatron?"),
        ("train.zzz", "train has steps"),
        ("zzz.a", "the top level has"),
    ],
)
def test_an_unknown_key_is_an_error_with_a_suggestion(key, suggestion):
    with pytest.raises(ConfigError) as caught:
        explain(key)
    assert key in str(caught.value)
    assert suggestion in str(caught.value)
