"""How long drafts of earlier responses are, and how they continue after a difference."""

import numpy as np
from vllm import SamplingParams
from vllm.v1.request import Request

from rollout.speculation.history_drafts import HistoryDrafts
from rollout.types import HISTORY, SUFFIX, Past, RequestExtras, TokenSource

PROMPT = [90, 91, 92, 93]
THRESHOLD = 0.3


def request(name: str, text: list[int], seed: int = 7, past_seed: int = 7) -> Request:
    past = Past(np.array(text, np.int32), np.full(len(text), -1, np.float32), past_seed)
    extra = RequestExtras(seed=seed, group="g", past=past).to_dict()
    return Request(name, PROMPT, SamplingParams(max_tokens=200, extra_args=extra), None)


def plenty(request: Request) -> int:
    return 100


def step(drafts: HistoryDrafts, request: Request, draft: list[int], emitted: list[int]) -> None:
    """The engine has verified the draft and emitted these tokens."""
    drafts.record_verified(request, len(draft), emitted, last_kept=False)
    request.append_output_token_ids(emitted)


def test_a_draft_is_what_the_earlier_response_has_next_and_long_while_it_is_accepted() -> None:
    drafts, text = HistoryDrafts(64, 2**20), [i % 50 for i in range(150)]
    mine = request("a", text)
    drafts.start(mine)
    step(drafts, mine, [], text[:1])
    rounds = 0
    while mine.num_output_tokens < len(text) - 1:
        name, draft = drafts.propose([mine], plenty, THRESHOLD)["a"]
        assert name == HISTORY and draft == text[mine.num_output_tokens :][: len(draft)]
        step(drafts, mine, draft, text[mine.num_output_tokens :][: len(draft) + 1])
        rounds += 1
    assert rounds <= 3, "tens of tokens at a time"
    drafts.finish(mine)
    assert drafts.take_kept("a") == (len(text), TokenSource.HISTORY)
    assert drafts.take_kept("a") == (0, TokenSource.HISTORY)


def test_drafts_get_short_where_responses_differ_soon_and_where_rows_are_dear() -> None:
    drafts, text = HistoryDrafts(64, 2**20), list(range(100))

    def length(threshold: float) -> int:
        probe = request("probe", text)
        drafts.start(probe)
        _, draft = drafts.propose([probe], plenty, threshold)["probe"]
        drafts.finish(probe)
        return len(draft)

    at_first = length(THRESHOLD)
    assert length(0.8) < at_first / 2
    for number in range(60):
        mine = request(str(number), text)
        drafts.start(mine)
        _, draft = drafts.propose([mine], plenty, THRESHOLD)[str(number)]
        step(drafts, mine, draft, [*text[:4], 99])
        drafts.finish(mine)
    assert 4 <= length(THRESHOLD) <= 12 < at_first


def test_after_a_difference_drafts_come_from_the_texts_of_the_group() -> None:
    drafts = HistoryDrafts(16, 2**20)
    mine = request("a", [1, 2, 3, 4, 5, 6, 7, 8])
    sibling = request("b", [11, 12, 13, 14, 15, 16, 17, 18])
    for each in (mine, sibling):
        drafts.start(each)
    step(drafts, mine, [1, 2, 3], [1, 2, 40])  # a difference ...
    drafts.propose([mine], plenty, 0.05)
    step(drafts, mine, [], [4, 5])  # ... that leads back to its own text
    name, draft = drafts.propose([mine], plenty, 0.05)["a"]
    assert (name, draft) == (SUFFIX, [6, 7, 8])
    step(drafts, mine, draft, [6, 12, 13])  # ... and now to its sibling's
    assert drafts.propose([mine], plenty, 0.05)["a"] == (SUFFIX, [14, 15, 16, 17, 18])
    drafts.finish(mine)
    assert drafts.take_kept("a") == (2, TokenSource.HISTORY)


def test_another_seed_and_an_output_that_is_there_already_are_no_reason_to_expect_the_text() -> None:
    drafts = HistoryDrafts(16, 2**20)
    other, resumed = request("a", [1, 2, 3, 4, 5], past_seed=8), request("b", [1, 2, 3, 4, 5])
    resumed.append_output_token_ids([1, 2, 3])
    for each in (other, resumed):
        drafts.start(each)
    assert HISTORY not in {name for name, _ in drafts.propose([other, resumed], plenty, 0.05).values()}
    step(drafts, other, [], [1, 2, 3])
    assert drafts.propose([other], plenty, 0.05)["a"] == (SUFFIX, [4, 5])
    drafts.finish(other)
    assert drafts.take_kept("a") == (0, TokenSource.HISTORY)


def test_requests_without_a_past_are_not_its_business() -> None:
    drafts = HistoryDrafts(16, 2**20)
    plain = Request("a", PROMPT, SamplingParams(max_tokens=5), None)
    drafts.start(plain)
    assert "a" not in drafts and drafts.propose([plain], plenty, 0.05) == {}
    drafts.finish(plain)
    assert drafts.take_kept("a") == (0, TokenSource.HISTORY)
