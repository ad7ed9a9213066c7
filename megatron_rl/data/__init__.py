"""Prompts, their order and the seeds of their rollouts."""

from megatron_rl.data.order import PromptOrder, evaluation_seed, rollout_seed
from megatron_rl.data.prompts import Prompt, load_prompts

__all__ = ["Prompt", "PromptOrder", "evaluation_seed", "load_prompts", "rollout_seed"]
