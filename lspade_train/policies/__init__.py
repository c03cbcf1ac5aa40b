"""When to exit: the exit rule, what it costs, how it is chosen and what it guarantees."""
