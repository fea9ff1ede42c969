"""The causal language model with LoRA adapters: loading, checks, scoring and export."""
