"""Data sources, the data module and its loaders."""
