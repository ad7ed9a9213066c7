"""What trainer processes check together before they begin."""

import pytest

from tests.launching import run_workers


@pytest.mark.slow
def test_processes_with_different_commits_of_the_model_do_not_start() -> None:
    shown = run_workers("tests.same_model_worker", 2)
    for rank in range(2):
        assert f"rank {rank}: the trainer processes have different models, Org/Name@0 and Org/Name@1; name the" in shown
