"""Evaluation of the policy: accuracy over sampled completions."""
