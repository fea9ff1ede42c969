"""Training methods as Lightning modules."""
