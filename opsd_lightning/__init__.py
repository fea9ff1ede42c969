"""On-Policy Self-Distillation (OPSD, arXiv 2601.18734) for PyTorch Lightning.

Names are imported on first use, so that ``import opsd_lightning`` alone is fast.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:  # the names of _NAMES, for type checkers, which do not follow __getattr__
    from opsd_lightning.callbacks.baseline import BaselineEvaluation as BaselineEvaluation
    from opsd_lightning.callbacks.collapse_guard import (
        Ceiling as Ceiling,
        CollapseGuard as CollapseGuard,
        CollapseRule as CollapseRule,
        Drift as Drift,
    )
    from opsd_lightning.callbacks.export import AdapterExport as AdapterExport
    from opsd_lightning.callbacks.health import Health as Health
    from opsd_lightning.callbacks.health_metrics import (
        ClassDivergence as ClassDivergence,
        CorrectnessGap as CorrectnessGap,
        Distinct as Distinct,
        MeanLength as MeanLength,
        PhraseRate as PhraseRate,
        PositionDivergence as PositionDivergence,
        TraceOverlap as TraceOverlap,
    )
    from opsd_lightning.callbacks.kept_skills import KeptSkills as KeptSkills
    from opsd_lightning.callbacks.progress import ProgressLines as ProgressLines
    from opsd_lightning.callbacks.rollouts import RolloutTable as RolloutTable, RolloutWriter as RolloutWriter
    from opsd_lightning.data.datamodule import OPSDDataModule as OPSDDataModule
    from opsd_lightning.data.drop_reasons import DropReason as DropReason
    from opsd_lightning.data.reworded_problems import RewordedProblems as RewordedProblems
    from opsd_lightning.data.skill_sources import (
        CommonFacts as CommonFacts,
        FormatInstructions as FormatInstructions,
        SkillSource as SkillSource,
        StoryContinuations as StoryContinuations,
    )
    from opsd_lightning.data.sources import (
        Columns as Columns,
        ExampleSource as ExampleSource,
        FileSource as FileSource,
        HubSource as HubSource,
        ReasoningGymSource as ReasoningGymSource,
        WordProblems as WordProblems,
    )
    from opsd_lightning.data.task_sources import (
        CategoryQuestions as CategoryQuestions,
        HomeRequests as HomeRequests,
        HotelReplies as HotelReplies,
        NumberFunctions as NumberFunctions,
        TableBookings as TableBookings,
        TaskSource as TaskSource,
    )
    from opsd_lightning.distributed.fsdp2 import FSDP2Strategy as FSDP2Strategy
    from opsd_lightning.doctor.diagnosis import diagnose as diagnose
    from opsd_lightning.doctor.findings import Diagnosis as Diagnosis, Finding as Finding
    from opsd_lightning.evaluation.accuracy import AccuracyAtK as AccuracyAtK
    from opsd_lightning.evaluation.skill_sets import (
        BaseDivergence as BaseDivergence,
        ChoicesByLikelihood as ChoicesByLikelihood,
        GradedCompletions as GradedCompletions,
    )
    from opsd_lightning.evaluation.skills import (
        ItemScore as ItemScore,
        SkillResult as SkillResult,
        SkillSet as SkillSet,
    )
    from opsd_lightning.grading.base import Grade as Grade, Grader as Grader
    from opsd_lightning.grading.choice_grader import ChoiceGrader as ChoiceGrader
    from opsd_lightning.grading.exact_match import ExactMatch as ExactMatch
    from opsd_lightning.grading.format_grader import FormatGrader as FormatGrader
    from opsd_lightning.grading.json_grader import JSONGrader as JSONGrader
    from opsd_lightning.grading.judge_grader import JudgeGrader as JudgeGrader
    from opsd_lightning.grading.math_grader import MathGrader as MathGrader
    from opsd_lightning.grading.no_grader import NoGrader as NoGrader
    from opsd_lightning.grading.python_tests import PythonTestsGrader as PythonTestsGrader
    from opsd_lightning.grading.reasoning_gym_grader import ReasoningGymGrader as ReasoningGymGrader
    from opsd_lightning.losses.clips import (
        Clip as Clip,
        NoClip as NoClip,
        PointwiseClip as PointwiseClip,
        RescaleClip as RescaleClip,
        TokenClip as TokenClip,
    )
    from opsd_lightning.losses.divergences import (
        Divergence as Divergence,
        ForwardKL as ForwardKL,
        GeneralizedJSD as GeneralizedJSD,
        ReverseKL as ReverseKL,
    )
    from opsd_lightning.losses.objectives import (
        DivergenceObjective as DivergenceObjective,
        NegativeLogLikelihood as NegativeLogLikelihood,
        Objective as Objective,
        SampledKLObjective as SampledKLObjective,
        SampledTokenObjective as SampledTokenObjective,
    )
    from opsd_lightning.losses.position_weights import (
        DecayingPositions as DecayingPositions,
        FirstPositions as FirstPositions,
        PositionWeight as PositionWeight,
    )
    from opsd_lightning.losses.supports import (
        FullVocabulary as FullVocabulary,
        Support as Support,
        TopKRenormalized as TopKRenormalized,
        TopKWithTail as TopKWithTail,
    )
    from opsd_lightning.methods.anchor import Anchor as Anchor
    from opsd_lightning.methods.base import PolicyModule as PolicyModule
    from opsd_lightning.methods.grpo import AnswerReward as AnswerReward, GRPOModule as GRPOModule, Reward as Reward
    from opsd_lightning.methods.mixed import MixedOPSDModule as MixedOPSDModule
    from opsd_lightning.methods.opsd import DistillationModule as DistillationModule, OPSDModule as OPSDModule
    from opsd_lightning.methods.sft import SFTModule as SFTModule
    from opsd_lightning.methods.step import StepCallback as StepCallback, StepRecord as StepRecord
    from opsd_lightning.models.export import merge_adapter as merge_adapter, write_adapter as write_adapter
    from opsd_lightning.models.policy import LoRA as LoRA, Policy as Policy
    from opsd_lightning.models.scoring import Scorer as Scorer
    from opsd_lightning.prompts.contexts import (
        AnswerContext as AnswerContext,
        ColumnContext as ColumnContext,
        HintContext as HintContext,
        NoContext as NoContext,
        OtherProblemContext as OtherProblemContext,
        PrivilegedContext as PrivilegedContext,
        TraceContext as TraceContext,
        WrongContext as WrongContext,
    )
    from opsd_lightning.prompts.online_contexts import (
        CritiqueContext as CritiqueContext,
        FeedbackContext as FeedbackContext,
        MajorityContext as MajorityContext,
        OnlineContext as OnlineContext,
        ReasonFirst as ReasonFirst,
        ShortestCorrectContext as ShortestCorrectContext,
        WrittenContext as WrittenContext,
    )
    from opsd_lightning.prompts.templates import Prompts as Prompts
    from opsd_lightning.reports.page import write_report as write_report
    from opsd_lightning.reports.run_report import RunReport as RunReport
    from opsd_lightning.reports.token_report import TokenReport as TokenReport, read_tokens as read_tokens
    from opsd_lightning.rollouts.base import RolloutEngine as RolloutEngine
    from opsd_lightning.rollouts.continuous_batching import ContinuousBatchingEngine as ContinuousBatchingEngine
    from opsd_lightning.rollouts.transformers_engine import TransformersEngine as TransformersEngine
    from opsd_lightning.rollouts.vllm.colocated import VLLMEngine as VLLMEngine
    from opsd_lightning.rollouts.vllm.engines import VLLMServerEngine as VLLMServerEngine
    from opsd_lightning.runs.reader import Point as Point, Run as Run, read_run as read_run
    from opsd_lightning.teachers import (
        EMATeacher as EMATeacher,
        FixedTeacher as FixedTeacher,
        GenerativeTeacher as GenerativeTeacher,
        LiveTeacher as LiveTeacher,
        ModelTeacher as ModelTeacher,
        ReferenceTeacher as ReferenceTeacher,
        SyncTeacher as SyncTeacher,
        Teacher as Teacher,
        TrustRegionTeacher as TrustRegionTeacher,
    )
    from opsd_lightning.types import (
        ConfigError as ConfigError,
        DataRequirements as DataRequirements,
        Example as Example,
        PromptBatch as PromptBatch,
        Rollouts as Rollouts,
        Sampling as Sampling,
        TokenStates as TokenStates,
        UserError as UserError,
    )

_NAMES = {
    "callbacks.baseline": "BaselineEvaluation",
    "callbacks.collapse_guard": "Ceiling CollapseGuard CollapseRule Drift",
    "callbacks.export": "AdapterExport",
    "callbacks.health": "Health",
    "callbacks.health_metrics": "ClassDivergence CorrectnessGap Distinct MeanLength PhraseRate PositionDivergence "
    "TraceOverlap",
    "callbacks.kept_skills": "KeptSkills",
    "callbacks.progress": "ProgressLines",
    "callbacks.rollouts": "RolloutTable RolloutWriter",
    "data.datamodule": "OPSDDataModule",
    "data.drop_reasons": "DropReason",
    "data.reworded_problems": "RewordedProblems",
    "data.skill_sources": "CommonFacts FormatInstructions SkillSource StoryContinuations",
    "data.sources": "Columns ExampleSource FileSource HubSource ReasoningGymSource WordProblems",
    "data.task_sources": "CategoryQuestions HomeRequests HotelReplies NumberFunctions TableBookings TaskSource",
    "distributed.fsdp2": "FSDP2Strategy",
    "doctor.diagnosis": "diagnose",
    "doctor.findings": "Diagnosis Finding",
    "evaluation.accuracy": "AccuracyAtK",
    "evaluation.skill_sets": "BaseDivergence ChoicesByLikelihood GradedCompletions",
    "evaluation.skills": "ItemScore SkillResult SkillSet",
    "grading.base": "Grade Grader",
    "grading.choice_grader": "ChoiceGrader",
    "grading.exact_match": "ExactMatch",
    "grading.format_grader": "FormatGrader",
    "grading.json_grader": "JSONGrader",
    "grading.judge_grader": "JudgeGrader",
    "grading.math_grader": "MathGrader",
    "grading.python_tests": "PythonTestsGrader",
    "grading.no_grader": "NoGrader",
    "grading.reasoning_gym_grader": "ReasoningGymGrader",
    "losses.clips": "Clip NoClip PointwiseClip RescaleClip TokenClip",
    "losses.divergences": "Divergence ForwardKL GeneralizedJSD ReverseKL",
    "losses.objectives": "DivergenceObjective NegativeLogLikelihood Objective SampledKLObjective SampledTokenObjective",
    "losses.position_weights": "DecayingPositions FirstPositions PositionWeight",
    "losses.supports": "FullVocabulary Support TopKRenormalized TopKWithTail",
    "methods.anchor": "Anchor",
    "methods.base": "PolicyModule",
    "methods.grpo": "AnswerReward GRPOModule Reward",
    "methods.mixed": "MixedOPSDModule",
    "methods.opsd": "DistillationModule OPSDModule",
    "methods.sft": "SFTModule",
    "methods.step": "StepCallback StepRecord",
    "models.export": "merge_adapter write_adapter",
    "models.policy": "LoRA Policy",
    "models.scoring": "Scorer",
    "prompts.contexts": "AnswerContext ColumnContext HintContext NoContext "
    "OtherProblemContext PrivilegedContext TraceContext WrongContext",
    "prompts.online_contexts": "CritiqueContext FeedbackContext MajorityContext OnlineContext ReasonFirst "
    "ShortestCorrectContext WrittenContext",
    "prompts.templates": "Prompts",
    "reports.page": "write_report",
    "reports.run_report": "RunReport",
    "reports.token_report": "TokenReport read_tokens",
    "rollouts.base": "RolloutEngine",
    "rollouts.continuous_batching": "ContinuousBatchingEngine",
    "rollouts.transformers_engine": "TransformersEngine",
    "rollouts.vllm.colocated": "VLLMEngine",
    "rollouts.vllm.engines": "VLLMServerEngine",
    "runs.reader": "Point Run read_run",
    "teachers": "EMATeacher FixedTeacher GenerativeTeacher LiveTeacher ModelTeacher ReferenceTeacher SyncTeacher Teacher "
    "TrustRegionTeacher",
    "types": "ConfigError DataRequirements Example PromptBatch Rollouts Sampling TokenStates UserError",
}
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names.split()}
__all__ = ["__version__", *_MODULE_OF]


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        return getattr(import_module(f"opsd_lightning.{_MODULE_OF[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
