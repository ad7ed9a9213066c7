"""The drafter beside the trainer: features of the policy, idle time, warm-up and alarms."""
