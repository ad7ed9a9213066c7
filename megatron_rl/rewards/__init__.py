"""Rewards: built-in ones, a user's function, and the processes that run them.

A reward of one's own is a function, named in `reward.function` as `package.module:function`:

    def score(prompt: str, response: str, answer: str) -> float

- `prompt` is what the model was given, the chat template applied.
- `response` is what it wrote, without special tokens such as the end of the text.
- `answer` is the record's reference answer as text; a list or dict as JSON.
- It returns a finite number, anything with `__float__` (bool, NumPy, torch), or a dict with one as `score`: the larger
  the better. Algorithms compare the responses to a prompt, so the scale rarely matters; evaluation counts a response as
  right when its score is positive.
- What it raises counts as 0; `reward/errors` counts it, and the log names the record.

It is called for one response at a time in one of several processes, one per core, each of which imports the module once
and does not import torch of itself. So it should depend on its arguments alone: processes share nothing, are killed
and replaced after `reward.timeout_s`, and a resumed run scores again what it generates again. It sees no descriptor,
pipe or environment of the run, and what a call starts ends with it (docs/rewards.md). What it prints goes to stderr.
`examples/reward` is a working one.
"""

from megatron_rl.rewards.score import Score, ScoreItem, Scorer

__all__ = ["Score", "ScoreItem", "Scorer"]
