"""Names of the held-out sets and of what is measured on them."""

PUBLIC_SETS = ("gsm8k", "math500", "amc23", "aime24", "aime25", "minerva", "olympiadbench", "mmlu_stem")
"""Sets that go by these names, as `NAME` or `NAME=FILE`; `megatron_rl.data.public` knows where they are."""

KINDS = ("greedy_accuracy", "avg_at_k", "pass_at_k", "majority_at_k")
"""What an evaluation measures of each set: metrics are called `eval/SET/KIND`."""


def set_name(spec: str) -> str:
    """The name of a set of `data.eval` in metrics and files: without the file of `NAME=FILE`."""
    name = spec.partition("=")[0]
    return name if name in PUBLIC_SETS else spec


def split_best(best: str) -> tuple[str | None, str]:
    """(set or None for the mean over all, kind) of `eval.best`."""
    name, _, kind = best.rpartition("/")
    return name or None, kind
