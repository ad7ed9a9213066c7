"""vLLM's worker-side proposer for drafts that the scheduler makes: `method: custom_class`, vLLM's extension point."""

from typing import Any


class NoDrafts:
    """Proposes nothing."""

    def __init__(self, vllm_config: Any) -> None:
        """
        Args:
            vllm_config: what vLLM passes to every proposer.
        """

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to load."""

    def propose(self, sampled_token_ids: list[list[int]], *args: Any, **kwargs: Any) -> list[list[int]]:
        """One empty draft per request."""
        return [[]] * len(sampled_token_ids)
