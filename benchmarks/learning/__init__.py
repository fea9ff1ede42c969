"""The learning test bed: tiny models, a procedural task, and every method of the package trained on both."""
