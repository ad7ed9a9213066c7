"""Speculative decoding in the engine: where drafts come from, and how many are verified."""
