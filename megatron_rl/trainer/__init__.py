"""The policy's passes: batches, updates, the critic, weight sync and checkpoints."""
