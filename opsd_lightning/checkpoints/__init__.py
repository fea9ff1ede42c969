"""Checkpoint files: atomic writes, safe loading, shards."""
