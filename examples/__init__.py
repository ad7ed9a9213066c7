"""Extensions in small: each folder has a module, an experiment that uses it, and a README. Not installed."""
