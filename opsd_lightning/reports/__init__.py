"""HTML reports of runs and of single tokens."""
