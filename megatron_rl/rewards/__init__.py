"""Rewards: built-in ones, a user's function, and the processes that run them."""

from megatron_rl.rewards.score import Score, ScoreItem, Scorer

__all__ = ["Score", "ScoreItem", "Scorer"]
