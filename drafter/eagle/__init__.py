"""The EAGLE head: the model, its files, its loss, and how well it drafts."""
