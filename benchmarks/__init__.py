"""Benchmarks of the package: scripts in this folder, and the learning test bed in `learning`."""
