"""Find the final answer of a completion and compare it with a reference."""
