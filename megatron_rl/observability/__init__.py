"""What a user sees of a run: console, metrics, report and plots."""
