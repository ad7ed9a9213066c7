"""Results on disk: what a crash leaves is used, what does not belong is refused."""

from pathlib import Path

import pytest

from megatron_rl.config import ConfigError
from megatron_rl.evaluation.results import Outcome, ProblemResult, ResultsFile, claim, file_name

RIGHT = Outcome("so \\boxed{2}\n\u2028", "2", True, 9, "stop")
WRONG = Outcome("...", None, False, 16, "length", "TimeoutError")
RESULTS = [ProblemResult(name, "1+1?", "2", RIGHT, [RIGHT, WRONG]) for name in ("set/0", "set/1")]


def test_results_come_back_as_they_were(tmp_path: Path) -> None:
    file = ResultsFile(tmp_path, "set")
    assert file.read() == {}
    for result in RESULTS:
        file.append(result)
    assert file.read() == {result.problem_id: result for result in RESULTS}
    file.write(RESULTS[1:])
    assert list(file.read()) == ["set/1"]


def test_a_line_that_a_crash_cut_off_does_not_count(tmp_path: Path) -> None:
    file = ResultsFile(tmp_path, "set")
    file.write(RESULTS)
    whole = file.file.read_bytes()
    for cut in (len(whole) - 2, len(whole) - 40):
        file.file.write_bytes(whole[:cut])
        assert list(file.read()) == ["set/0"]


def test_another_line_that_is_no_result_is_named(tmp_path: Path) -> None:
    file = ResultsFile(tmp_path, "set")
    file.file.write_text('{"a": 1}\n')
    with pytest.raises(ConfigError, match=r"set\.jsonl:1 is not a result"):
        file.read()


def test_a_folder_keeps_the_settings_of_its_results(tmp_path: Path) -> None:
    folder = tmp_path / "eval"
    settings = {"train.seed": 0, "rollout.sampling": {}, "checkpoint": "a"}
    claim(folder, settings, {"gsm8k": "gsm8k=x.jsonl"})
    claim(folder, settings, {"math500": "math500"})  # one more set
    with pytest.raises(ConfigError, match=r"results with train\.seed = 0, not 1; choose another --output"):
        claim(folder, settings | {"train.seed": 1}, {"math500": "math500"})
    with pytest.raises(ConfigError, match=r"set gsm8k = 'gsm8k=x\.jsonl', not 'gsm8k'"):
        claim(folder, settings, {"gsm8k": "gsm8k"})
    (folder / "settings.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be read"):
        claim(folder, settings, {})


@pytest.mark.parametrize(
    ("name", "expected"), [("gsm8k", "gsm8k"), ("openai/gsm8k:main", "openai_gsm8k_main"), ("../x.jsonl", "_x.jsonl")]
)
def test_file_names_are_plain(name: str, expected: str) -> None:
    assert file_name(name) == expected
