"""On-Policy Self-Distillation (OPSD, arXiv 2601.18734) for PyTorch Lightning.

Names are imported when they are first used: importing the package alone costs nothing.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_ROOMS = {
    "anchors": ["Anchor"],
    "callbacks": ["AdapterExport", "BaselineEvaluation", "ProgressLines", "RolloutTable", "RolloutWriter"],
    "contexts": ["FeedbackContext", "MajorityContext", "OnlineContext", "ReasonFirst", "ShortestCorrectContext"],
    "data": ["OPSDDataModule"],
    "diagnosis": ["diagnose"],
    "divergences": [
        "Divergence",
        "ForwardKL",
        "FullVocabulary",
        "GeneralizedJSD",
        "ReverseKL",
        "Support",
        "TopKRenormalized",
        "TopKWithTail",
    ],
    "export": ["merge_adapter", "write_adapter"],
    "findings": ["Diagnosis", "Finding"],
    "grading": ["MathGrader"],
    "grpo": ["AnswerReward", "GRPOModule", "Reward"],
    "guard": ["Ceiling", "CollapseGuard", "CollapseRule", "Drift"],
    "health": [
        "ClassDivergence",
        "CorrectnessGap",
        "Distinct",
        "MeanLength",
        "PhraseRate",
        "PositionDivergence",
        "TraceOverlap",
    ],
    "health_log": ["Health"],
    "metrics": ["AccuracyAtK"],
    "module": ["OPSDModule"],
    "objectives": [
        "DivergenceObjective",
        "NegativeLogLikelihood",
        "Objective",
        "SampledKLObjective",
        "SampledTokenObjective",
    ],
    "off_policy": ["MixedOPSDModule"],
    "policy": ["LoRA", "Policy"],
    "prompts": [
        "AnswerContext",
        "ColumnContext",
        "HintContext",
        "NoContext",
        "OtherProblemContext",
        "PrivilegedContext",
        "Prompts",
        "TraceContext",
        "WrongContext",
    ],
    "report": ["write_report"],
    "rollouts": ["ContinuousBatchingEngine", "RolloutEngine", "Sampling", "TransformersEngine"],
    "run_report": ["RunReport"],
    "runs": ["Point", "Run", "read_run"],
    "sft": ["SFTModule"],
    "shaping": [
        "Clip",
        "DecayingPositions",
        "FirstPositions",
        "NoClip",
        "PointwiseClip",
        "PositionWeight",
        "RescaleClip",
        "TokenClip",
    ],
    "sources": ["Columns", "ExampleSource", "FileSource", "HubSource", "ReasoningGymSource", "WordProblems"],
    "strategies": ["FSDP2Strategy"],
    "teachers": [
        "EMATeacher",
        "FixedTeacher",
        "LiveTeacher",
        "ModelTeacher",
        "SyncTeacher",
        "Teacher",
        "TrustRegionTeacher",
    ],
    "token_report": ["TokenReport", "read_tokens"],
    "training": ["PolicyModule"],
    "vllm_rollouts": ["VLLMEngine", "VLLMServerEngine"],
    "types": ["ConfigError", "Example", "PromptBatch", "Rollouts", "TokenStates", "UserError"],
}
_WHERE = {name: room for room, names in _ROOMS.items() for name in names}
__all__ = ["__version__", *_WHERE]


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(import_module(f"opsd_lightning.{_WHERE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
