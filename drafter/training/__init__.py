"""Training of the head: features of the policy, the optimizer, and when engines get a new head."""
