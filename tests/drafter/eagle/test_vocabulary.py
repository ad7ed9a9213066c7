import pytest
import torch

from drafter.eagle.vocabulary import choose_vocabulary

COUNTS = torch.tensor([0, 5, 3, 3, 9, 3, 0, 1])


def test_the_most_frequent_tokens_are_taken_and_ties_go_to_the_lowest_ids() -> None:
    assert choose_vocabulary(COUNTS, 4).token_ids.tolist() == [1, 2, 3, 4]
    assert choose_vocabulary(COUNTS, 7).token_ids.tolist() == [0, 1, 2, 3, 4, 5, 7]


def test_special_tokens_are_always_in() -> None:
    assert choose_vocabulary(COUNTS, 4, always=[6, 6, 4]).token_ids.tolist() == [1, 2, 4, 6]


def test_d2t_holds_offsets_and_t2d_marks_what_is_kept() -> None:
    vocabulary = choose_vocabulary(COUNTS, 4, always=[7])
    assert vocabulary.token_ids.tolist() == [1, 2, 4, 7]
    assert vocabulary.d2t.tolist() == [1, 1, 2, 4]
    assert vocabulary.t2d.tolist() == [False, True, True, False, True, False, False, True]


@pytest.mark.parametrize(
    ("size", "always", "message"),
    [(0, [], "choose 1 to 8"), (9, [], "choose 1 to 8"), (1, [2, 3], "2 special tokens"), (4, [8], "Token 8")],
)
def test_impossible_choices_are_refused(size: int, always: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose_vocabulary(COUNTS, size, always)
