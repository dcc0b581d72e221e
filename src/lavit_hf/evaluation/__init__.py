"""How good is a checkpoint? Metrics and their intervals."""
