"""The direction in which each logged metric is better, for callbacks that choose or stop by one."""

from __future__ import annotations

import re
from typing import Literal

# By pattern of the whole name. A metric that stands in no line has no better direction: an entropy, a length, an error bar.
_BETTER: dict[str, Literal["min", "max"]] = {
    r"(val|test)/(teacher_)?(avg|pass|maj)@\d+": "max",
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
    """Return ``max`` where more is better, ``min`` where less is, and None where neither is or the metric is unknown."""
    return next((direction for pattern, direction in _BETTER.items() if re.fullmatch(pattern, metric)), None)
