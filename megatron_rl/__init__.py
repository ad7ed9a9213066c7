"""Megatron-RL: reinforcement learning of language models with Megatron-Core actors and a vLLM rollout fleet.

Importing this package is cheap on purpose: torch, megatron-core and vLLM are imported by the modules that use them.
"""

__version__ = "0.1.0"
