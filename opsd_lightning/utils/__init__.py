"""Helpers that do not depend on models or training: files, text, redaction, loggers, statistics."""
