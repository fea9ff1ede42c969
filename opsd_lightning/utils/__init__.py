"""Helpers without knowledge of models or training: files, text, loggers, statistics."""
