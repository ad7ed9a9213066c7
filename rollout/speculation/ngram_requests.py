"""The engine's requests in an n-gram drafter: by request id, and brought up to date when they draft."""

from collections.abc import Sequence

from vllm.v1.request import Request

from rollout.speculation.ngram import NgramDrafter, NgramDrafts
from rollout.types import RequestExtras


def extras_of(request: Request) -> RequestExtras:
    """What a request carries beside vLLM's own options."""
    return RequestExtras.from_dict(request.sampling_params.extra_args if request.sampling_params else None)


class NgramRequests:
    """Numbers the requests for the drafter, and tracks which of their tokens it has."""

    def __init__(self, max_draft_tokens: int, max_bytes: int) -> None:
        """
        Args:
            max_draft_tokens: per request and step.
            max_bytes: memory of the n-gram counts.
        """
        self._drafter = NgramDrafter(max_draft_tokens, max_bytes)
        self._started = 0
        self._numbers: dict[str, int] = {}
        self._indexed: dict[str, int] = {}  # request id -> output tokens that the drafter has

    def __contains__(self, request: Request) -> bool:
        return request.request_id in self._numbers

    def __len__(self) -> int:
        """Requests that have started and not finished."""
        return len(self._numbers)

    def add_text(self, group: str, context: Sequence[int], tokens: Sequence[int]) -> None:
        """Index a text of no live request, for drafts of the group."""
        self._started += 1
        self._drafter.start(self._started, group, context)
        self._drafter.extend([self._started], [tokens])
        self._drafter.finish(self._started)

    def start(self, request: Request, group: str, context: Sequence[int]) -> None:
        """Begin a request: `context` stands for its prompt and the output that it has so far."""
        self._started += 1
        self._numbers[request.request_id] = self._started
        self._indexed[request.request_id] = request.num_output_tokens
        self._drafter.start(self._started, group, context)

    def update(self, requests: Sequence[Request]) -> None:
        """Index what these requests have generated since they were last updated."""
        numbers, tokens = [], []
        for request in requests:
            indexed = self._indexed[request.request_id]
            if request.num_output_tokens > indexed:
                numbers.append(self._numbers[request.request_id])
                tokens.append(request.output_token_ids[indexed:])
                self._indexed[request.request_id] = request.num_output_tokens
        if numbers:
            self._drafter.extend(numbers, tokens)

    def propose(self, requests: Sequence[Request], limits: Sequence[int], threshold: float) -> NgramDrafts:
        """Draft for requests, see `NgramDrafter.propose`; they are updated first."""
        self.update(requests)
        return self._drafter.propose([self._numbers[request.request_id] for request in requests], limits, threshold)

    def finish(self, request: Request) -> None:
        """End a request; what is indexed stays a source of drafts."""
        del self._indexed[request.request_id]
        self._drafter.finish(self._numbers.pop(request.request_id))
