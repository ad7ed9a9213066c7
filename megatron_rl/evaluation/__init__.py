"""Evaluation of a policy on held-out sets: during training, and by `megatron-rl eval`."""
