"""`opsd doctor`: check a configuration before training."""
