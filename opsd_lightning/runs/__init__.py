"""Run management: record, lock, signals, requeue and resumption."""
