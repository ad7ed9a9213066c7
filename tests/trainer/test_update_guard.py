"""Updates that are not finite: skipped on all ranks alike, counted, and the end of the run when there are too many."""

import logging
from pathlib import Path

import pytest
import torch

from megatron_rl.distributed.runtime import Runtime
from megatron_rl.trainer.update_guard import UpdateGuard
from tests.hf_models import make_models
from tests.launching import run_workers


@pytest.fixture
def runtime(tmp_path: Path) -> Runtime:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield Runtime(0, 1, torch.device("cpu"), torch.distributed.group.WORLD)
    torch.distributed.destroy_process_group()


def test_what_is_not_finite_is_named_in_the_log_until_the_limit(runtime: Runtime, caplog) -> None:
    guard = UpdateGuard(runtime, 3)
    with caplog.at_level(logging.WARNING):
        assert guard.allows(1, [0.5], 2.0)
        assert not guard.allows(2, [0.5, float("nan")], 2.0)
        assert not guard.allows(3, [0.5], float("inf"))
        assert guard.allows(4, [], 1.0)  # an earlier pipeline stage has no losses
        assert not guard.allows(5, [float("inf")], 1.0)
        assert not guard.allows(6, [], float("nan"))
        with pytest.raises(
            RuntimeError, match=r"^3 updates in a row .*train\.max_skipped_updates=3.*newest checkpoint"
        ):
            guard.allows(7, [], float("nan"))
    assert [record.message.split(":")[0] for record in caplog.records] == [f"update {n} skipped" for n in (2, 3, 5, 6)]


@pytest.mark.slow
@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (1, 2), (2, 1)], ids=["dp2", "pp2", "tp2"])
def test_all_ranks_leave_out_an_update_that_one_token_spoils(tmp_path: Path, tp: int, pp: int) -> None:
    model = make_models(tmp_path)["qwen3"]
    printed = run_workers("tests.trainer.update_guard_worker", 2, model, tp, pp, tmp_path)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    for rank in ranks:
        assert [step["same"] for step in rank["steps"]] == [False, True, True, False, True, True]
        assert all(step["finite"] for step in rank["steps"])
        assert rank["sentence"].startswith("3 updates in a row had a loss or gradient that is not finite")
    assert [step["metrics"]["not_finite"] for step in ranks[0]["steps"]] == [0, 1, 1, 0, 1, 1]
    assert [step["metrics"]["lr"] > 0 for step in ranks[0]["steps"]] == [True, False, False, True, False, False]
    assert printed.count("skipped: its loss or gradient is not finite") == 4, "the driver alone says so"
