"""Evaluation of the policy: sampled accuracy and stored completions."""
