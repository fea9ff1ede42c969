"""The LoRA-adapted causal LM: loading, scoring, export."""
