"""Exit policies: when to exit, what it costs, how a policy is chosen and what it guarantees."""
