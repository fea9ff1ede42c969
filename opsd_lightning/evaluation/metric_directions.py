"""The better direction of each logged metric, for callbacks that select or stop by a metric."""

from __future__ import annotations

import re
from typing import Literal

# By regular expression of the whole name. Metrics without an entry have no better direction: entropies, lengths, error bars.
_BETTER: dict[str, Literal["min", "max"]] = {
    r"(val|test)/(teacher_)?(avg|pass|maj)@\d+": "max",
    r"(val|test)/(nll|divergence)": "min",
    r"(val|test)/(teacher_)?(truncated_fraction|grading_timeouts|grading_failures)": "min",
    r"train/(loss|forward_kl|reverse_kl|first_token_forward_kl)": "min",
    r"train/(truncated_fraction|context_missing_fraction|groups_without_signal|grading_timeouts|grading_failures)": "min",
    r"train/rollout_logprob_difference(_max)?": "min",
    r"train/(reward|eos_rate|tokens_generated)": "max",
    r"health/(accuracy|distinct_3)": "max",
    r"health/(leak_fraction|trace_overlap)": "min",
    r"health/forward_kl_(first_\d+|quarter_\d|math|style|word|mark|special)": "min",
    r"time/\w+_tokens_per_second": "max",
    r"time/\w+_seconds": "min",
    r"step|epoch": "max",  # Lightning's own: the latest
}


def better(metric: str) -> Literal["min", "max"] | None:
    """Return ``max`` if a larger value is better, ``min`` if a smaller one is, and None for other or unknown metrics."""
    return next((direction for pattern, direction in _BETTER.items() if re.fullmatch(pattern, metric)), None)
