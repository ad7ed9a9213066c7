"""The driver's side of generation: prompts, groups, reuse of earlier responses, and metrics."""
