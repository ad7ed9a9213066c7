"""The policy as a Megatron-Core model, and its correspondence to Hugging Face checkpoints."""
