"""Drafts in the engine, and the choice of how many."""
