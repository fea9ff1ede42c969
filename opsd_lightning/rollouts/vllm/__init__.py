"""Rollouts sampled by vLLM, in another process or in this one."""
