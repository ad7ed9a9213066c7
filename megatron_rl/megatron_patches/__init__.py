"""What is changed in megatron-core, guarded by version."""
