"""Learning test bed: tiny models and a procedural task, on which all methods of the package are trained."""
