"""Rollouts by vLLM, on servers or in this process."""
