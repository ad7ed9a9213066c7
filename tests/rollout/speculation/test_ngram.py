"""The n-gram drafter: what it proposes, how sure it is, and that its memory is bounded."""

import random

import pytest

from rollout.speculation.ngram import NgramDrafter

PHRASE = [11, 12, 13, 14, 15, 16, 17, 18]


def draft(drafter: NgramDrafter, request: int, limit: int = 8, threshold: float = 0.05) -> list[int]:
    drafts = drafter.propose([request], [limit], threshold)
    return drafts.tokens[0, : drafts.lengths[0]].tolist()


def test_a_repetition_in_the_prompt_is_continued() -> None:
    drafter = NgramDrafter(8, 1 << 20)
    drafter.start(1, "p", [*PHRASE, 90, *PHRASE[:4]])
    assert draft(drafter, 1, limit=3) == PHRASE[4:7]


def test_a_repetition_in_the_output_is_continued() -> None:
    drafter = NgramDrafter(8, 1 << 20)
    drafter.start(1, "p", [1, 2, 3])
    drafter.extend([1], [PHRASE])
    drafter.extend([1], [[70, *PHRASE[:3]]])
    assert draft(drafter, 1, limit=2) == PHRASE[3:5]


def test_siblings_are_a_source_and_other_groups_only_for_longer_contexts() -> None:
    drafter = NgramDrafter(8, 1 << 20)
    for request, group in ((1, "p"), (2, "p"), (3, "q")):
        drafter.start(request, group, [1, 2, 3])
    drafter.extend([1], [PHRASE])
    drafter.extend([2, 3], [[50, *PHRASE[:2]], [50, *PHRASE[:2]]])
    assert draft(drafter, 2, limit=2) == PHRASE[2:4]
    assert draft(drafter, 3) == []  # two tokens of context say too little about another prompt
    drafter.extend([3], [PHRASE[2:3]])
    assert draft(drafter, 3, limit=2) == PHRASE[3:5]


def test_nothing_known_means_no_draft() -> None:
    drafter = NgramDrafter(8, 1 << 20)
    drafter.start(1, "p", list(range(20, 40)))
    assert draft(drafter, 1) == []
    assert draft(drafter, 99) == []  # a request that was never started


def test_the_majority_wins() -> None:
    drafter = NgramDrafter(8, 1 << 20)
    for request, token in enumerate([30, 31, 31, 31, 30]):
        drafter.start(request, "p", [1, 2, 3])
        drafter.extend([request], [[5, 6, 7, token]])
    drafter.start(9, "p", [1, 2, 3])
    drafter.extend([9], [[5, 6, 7]])
    assert draft(drafter, 9, limit=1) == [31]


def test_the_chances_are_learned() -> None:
    """A continuation that comes with probability 0.7 is said to be right with that chance, and a certain one with 1."""
    drafter, dice = NgramDrafter(4, 1 << 22), random.Random(0)
    said = []
    for request in range(3000):
        drafter.start(request, f"p{request // 8}", [1, 2, 3])
        drafter.extend([request], [[5, 6, 7]])
        drafts = drafter.propose([request], [1], 0.0)
        if request > 2000 and drafts.lengths[0]:
            said.append(float(drafts.chances[0, 0]))
        drafter.extend([request], [[31 if dice.random() < 0.7 else 40 + dice.randrange(20)]])
        drafter.finish(request)
    assert sum(said) / len(said) == pytest.approx(0.7, abs=0.08)


def test_confidence_limits_the_length() -> None:
    drafter = NgramDrafter(8, 1 << 20)
    drafter.start(1, "p", [*PHRASE, 90, *PHRASE[:3]])
    long, short = draft(drafter, 1, threshold=0.001), draft(drafter, 1, threshold=0.3)
    assert len(short) < len(long) and long[: len(short)] == short
    drafts = drafter.propose([1], [8], 0.001)
    chances = drafts.chances[0, : drafts.lengths[0]].tolist()
    assert chances == sorted(chances, reverse=True)


def test_the_sums_are_those_of_the_drafts() -> None:
    drafter = NgramDrafter(4, 1 << 20)
    for request in (1, 2):
        drafter.start(request, "p", [*PHRASE, 90, *PHRASE[: request + 1]])
    drafts = drafter.propose([1, 2], [4, 2], 0.001)
    lengths = drafts.lengths[:2].tolist()
    assert lengths == [4, 2]
    assert drafts.drafted.tolist() == [0, 2, 4, 5, 6]
    total = sum(float(drafts.chances[row, position]) for row, n in enumerate(lengths) for position in range(n))
    assert drafts.accepted[4] == pytest.approx(total, rel=1e-5)


def test_memory_is_bounded_and_what_is_new_is_kept() -> None:
    drafter, dice = NgramDrafter(4, 1 << 20), random.Random(1)
    for request in range(400):
        drafter.start(request, str(request), [1, 2, 3])
        drafter.extend([request], [[dice.randrange(1000, 30000) for _ in range(200)]])
        drafter.finish(request)
    assert drafter.bytes <= 1 << 20
    drafter.start(1000, "new", [*PHRASE, 90, *PHRASE[:3]])
    assert draft(drafter, 1000, limit=1) == PHRASE[3:4]


def test_the_same_calls_give_the_same_drafts() -> None:
    def run() -> list[list[int]]:
        drafter, dice = NgramDrafter(6, 1 << 18), random.Random(2)
        out = []
        for request in range(40):
            drafter.start(request, str(request // 4), [1, 2, 3])
        for _ in range(200):
            request = dice.randrange(40)
            drafter.extend([request], [[dice.randrange(8) for _ in range(3)]])
            out.append(draft(drafter, request, limit=6))
        return out

    assert run() == run()
