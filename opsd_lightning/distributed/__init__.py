"""The FSDP2 strategy, checks of the strategy, and communication between ranks."""
