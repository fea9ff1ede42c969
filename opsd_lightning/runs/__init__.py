"""The life of a run: record, lock, signals, requeue, resumption."""
