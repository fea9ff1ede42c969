"""On-Policy Self-Distillation (OPSD, arXiv 2601.18734) for PyTorch Lightning."""
__version__ = "0.1.0"
