"""What checkpoints carry beside the models."""

from typing import Any, Protocol


class Stateful(Protocol):
    """A part of a run whose state goes into checkpoints, into a file of `driver/` by the part's name."""

    def state(self) -> Any:
        """All that the next steps depend on: values as JSON has them, or dicts and lists of them with tensors."""
        ...

    def restore(self, state: Any) -> bool:
        """Go on from what `state` returned; False when that is of no use now, and the part is as new."""
        ...
