"""Methods of the test bed, the settings to tune for each, and the ablations.

To add a method, add an entry to ``METHODS`` and one of equal length to ``TUNING``. To add an ablation, add a line to
``ABLATIONS``. A change is a dictionary of `Method` fields. A key with dots names an entry of ``arguments`` or ``data``.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from benchmarks.learning.bases import STRONG
from benchmarks.learning.run import Method


def divergence(name: str, **arguments: Any) -> dict[str, Any]:
    """Return the specification of an objective with a divergence over the full vocabulary."""
    return {"class": "DivergenceObjective", "divergence": {"class": name, **arguments}}


def part(name: str, **arguments: Any) -> dict[str, Any]:
    return {"class": name, **arguments}


TRACE_SHARE = 0.25  # share of steps of ``mixed`` on the references (off-policy)

METHODS = {
    method.name: method
    for method in (
        Method("opsd", arguments={"objective": divergence("ReverseKL")}, steps=200),
        Method("grpo", module="GRPOModule", questions=8, n=8, uses="answer", steps=600),
        Method("sft-terse", module="SFTModule", trace="terse", steps=480),
        Method("sft-worked", module="SFTModule", trace="worked", steps=100),
        # On-policy distillation: the teacher is another model, which solves the task and reads only the question.
        Method(
            "distill",
            arguments={
                "objective": divergence("ReverseKL"),
                "teacher": part("ModelTeacher", model={"beside_base": STRONG}),
            },
            steps=200,
            uses="nothing",
        ),
        # OPSD with a quarter of its steps on the tokens of the terse references.
        Method("mixed", "MixedOPSDModule", {"objective": divergence("ReverseKL"), "trace_share": TRACE_SHARE}, steps=200),
    )
}

# Runs only by name (``sweep main --methods grpo-long``), with the rate chosen for ``grpo``. It shows whether GRPO still
# improves in four times the steps.
LONG = {"grpo-long": replace(METHODS["grpo"], name="grpo-long", learning_rate=3e-4, steps=2400)}

# All methods have the same number of settings, from which validation questions choose one.
TUNING: dict[str, list[dict[str, Any]]] = {
    "opsd": [{"learning_rate": rate} for rate in (1e-3, 2e-3, 4e-3)],
    "grpo": [{"learning_rate": rate} for rate in (1e-4, 3e-4, 6e-4)],
    "sft-terse": [{"learning_rate": rate} for rate in (5e-4, 1e-3, 2e-3)],
    "sft-worked": [{"learning_rate": rate} for rate in (5e-4, 1e-3, 2e-3)],
    "distill": [{"learning_rate": rate} for rate in (1e-3, 2e-3, 4e-3)],
    "mixed": [{"learning_rate": rate} for rate in (1e-3, 2e-3, 4e-3)],
}

_LIVE, _EMA = part("LiveTeacher"), "EMATeacher"
_ANCHOR = part("Anchor", weight=0.1)

#: Start of all ablations: the chosen OPSD settings with half as many steps.
ABLATION_STEPS = 100

# Changes by table and row. A row without a change is the same run in all tables.
ABLATIONS: dict[str, dict[str, dict[str, Any]]] = {
    "divergence": {
        "reverse KL": {},
        "forward KL": {"arguments.objective": divergence("ForwardKL")},
        "JSD 0.1": {"arguments.objective": divergence("GeneralizedJSD", beta=0.1)},
        "JSD 0.5": {"arguments.objective": divergence("GeneralizedJSD", beta=0.5)},
        "JSD 0.9": {"arguments.objective": divergence("GeneralizedJSD", beta=0.9)},
        "sampled token": {"arguments.objective": part("SampledTokenObjective")},
    },
    "support": {
        "full": {},
        "top 2, renormalized": {"arguments.objective.support": part("TopKRenormalized", k=2)},
        "top 2, tail": {"arguments.objective.support": part("TopKWithTail", k=2)},
        "top 4, tail": {"arguments.objective.support": part("TopKWithTail", k=4)},
    },
    "clip": {
        "none": {},
        "pointwise 0.05": {"arguments.objective.clip": part("PointwiseClip", tau=0.05)},
        "token 0.5": {"arguments.objective.clip": part("TokenClip", tau=0.5)},
        "rescale 0.05": {"arguments.objective.clip": part("RescaleClip", tau=0.05)},
        "forward KL, pointwise 0.05": {
            "arguments.objective": {**divergence("ForwardKL"), "clip": part("PointwiseClip", tau=0.05)}
        },
    },
    "teacher": {
        "fixed": {},
        "live": {"arguments.teacher": _LIVE},
        "live, a tenth of the rate": {"arguments.teacher": _LIVE, "learning_rate": 2e-4},
        "live, anchor 0.1": {"arguments.teacher": _LIVE, "arguments.anchor": _ANCHOR},
        "EMA 0.9": {"arguments.teacher": part(_EMA, decay=0.9)},
        "EMA 0.99": {"arguments.teacher": part(_EMA, decay=0.99)},
        "EMA 0.999": {"arguments.teacher": part(_EMA, decay=0.999)},
        "sync every 50": {"arguments.teacher": part("SyncTeacher", every_n_steps=50)},
        "trust region 0.1": {"arguments.teacher": part("TrustRegionTeacher", weight=0.1)},
        "trust region 0.5": {"arguments.teacher": part("TrustRegionTeacher", weight=0.5)},
    },
    "context": {
        "trace (terse)": {},
        "trace (worked)": {"data.context": part("ColumnContext", column="worked")},
        "answer alone": {"data.context": part("ColumnContext", column="answer")},
        "another question's trace": {"data.context": part("OtherProblemContext")},
        "wrong trace": {"data.context": part("ColumnContext", column="wrong")},
        "none": {"data.context": part("NoContext")},
    },
    "rollouts": {
        "64 questions, 1 rollout": {},
        "16 questions, 4 rollouts": {"questions": 16, "n": 4},
        "16 questions, 1 rollout": {"questions": 16},
        "at most 8 tokens": {"max_new_tokens": 8},
        "at most 16 tokens": {"max_new_tokens": 16},
    },
    "temperature": {
        "0.01": {"temperature": 0.01},
        "1": {},
        "1.1": {"temperature": 1.1},
        "1.5": {"temperature": 1.5},
    },
    "references": {
        "a new one every time": {},
        "1,024 different": {"train_questions": 1024},
        "64 different": {"train_questions": 64},
    },
}


def changed(method: Method, change: Mapping[str, Any], name: str | None = None) -> Method:
    """Return the method with a change.

    Raises:
        KeyError: A key names no field.
    """
    fields = copy.deepcopy(asdict(method))
    for path, value in change.items():
        *parents, last = path.split(".")
        place = fields
        for parent in parents:
            place = place[parent]
        if not parents and last not in fields:
            raise KeyError(last)
        place[last] = value
    return replace(Method(**fields), name=name or method.name)


def ablations(chosen: Method, tables: Mapping[str, Mapping[str, Mapping[str, Any]]] = ABLATIONS) -> dict[str, Method]:
    """Return each row of the tables as a method, by ``table/row``. Rows with the same settings share their runs."""
    found: dict[str, Method] = {}
    unchanged = changed(chosen, {"steps": ABLATION_STEPS}, "ablation")
    # Its file's name must not depend on which tables are asked for.
    seen = {repr(sorted(asdict(unchanged).items())): replace(unchanged, name="unchanged")}
    for table, rows in tables.items():
        for row, change in rows.items():
            method = changed(chosen, {"steps": ABLATION_STEPS, **change}, "ablation")
            settings = repr(sorted(asdict(method).items()))
            name = f"{table}-{row}".replace(" ", "_").replace(",", "").replace("/", "over").replace("'", "")
            found[f"{table}/{row}"] = seen.setdefault(settings, replace(method, name=name))
    return found
