"""Training runs on the imitated device: every teacher, method, part of an objective and engine, in pairs.

Each run makes a step, validates, writes a checkpoint and tests. Tensors of two devices raise in any phase. In the step,
`helpers.device_cases.checked_steps` looks for tensors of shape [tokens, vocabulary], for too many synchronizations, and for
random numbers and work of the CPU.
"""

from __future__ import annotations

import importlib
import inspect
import itertools
import pkgutil
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import opsd_lightning
from helpers.classes import subclasses
from helpers.covering import Case, covering, pairs_of, pairwise, product
from helpers.device_cases import (
    CLIPS,
    DEFAULT,
    DIVERGENCES,
    ENGINES,
    FACTORS,
    LOSS_FACTORS,
    METHODS,
    POSITIONS,
    RUN_FACTORS,
    SAMPLED,
    SUPPORTS,
    TEACHERS,
    checked_steps,
    parts_of,
    save_model,
    trainer_of,
    valid,
    watched_device,
)
from helpers.strict_device import DeviceMixError, unavailable
from opsd_lightning.losses.clips import Clip
from opsd_lightning.losses.divergences import Divergence
from opsd_lightning.losses.objectives import DivergenceObjective, NegativeLogLikelihood, Objective
from opsd_lightning.losses.position_weights import PositionWeight
from opsd_lightning.losses.supports import Support
from opsd_lightning.methods.base import PolicyModule
from opsd_lightning.rollouts.base import RolloutEngine
from opsd_lightning.rollouts.continuous_batching import ContinuousBatchingEngine
from opsd_lightning.rollouts.transformers_engine import TransformersEngine
from opsd_lightning.rollouts.vllm.colocated import VLLMEngine
from opsd_lightning.rollouts.vllm.engines import VLLMServerEngine
from opsd_lightning.teachers import Teacher

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(unavailable() is not None, reason=str(unavailable())),
    # Completions of a random model, on which both roles can agree.
    pytest.mark.filterwarnings("ignore:the teacher and the student differ by:UserWarning"),
]

PAIRWISE = pairwise(FACTORS, valid)
EACH_VALUE = covering(PAIRWISE)
#: Engines that cannot run on the imitated device, with the reason.
CANNOT_RUN = {
    ContinuousBatchingEngine: "samples in a thread, and the imitation works in the main thread",
    VLLMEngine: "needs vLLM",
    VLLMServerEngine: "needs a server of vLLM",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("device"))


def case_id(case: Case) -> str:
    return ", ".join(value for name, value in case.items() if value != DEFAULT[name]) or "default"


def run(case: Case, folder: str, path: Path, *callbacks: Any, **settings: Any) -> PolicyModule:
    """Fit, validate, write a checkpoint and test on the imitated device, with all checks."""
    with watched_device() as device:
        module, data = parts_of(case, folder, **settings)
        trainer = trainer_of(path, *callbacks, precision=(DEFAULT | case)["precision"])
        with checked_steps(device, module):
            trainer.fit(module, data)
        trainer.save_checkpoint(path / "end.ckpt")
        trainer.test(module, data, verbose=False)
        assert not device.mixes
    return module


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=case_id(case), marks=[pytest.mark.slow] * (case not in EACH_VALUE)) for case in PAIRWISE]
)
def test_pairs_of_settings_run_on_the_device(case: Case, folder: str, tmp_path: Path) -> None:
    run(case, folder, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("case", list(product(RUN_FACTORS, valid)), ids=case_id)
def test_all_parts_of_a_run_run_on_the_device(case: Case, folder: str, tmp_path: Path) -> None:
    run(case, folder, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("case", list(product(LOSS_FACTORS | {"precision": RUN_FACTORS["precision"]}, valid)), ids=case_id)
def test_all_parts_of_an_objective_run_on_the_device(case: Case, folder: str, tmp_path: Path) -> None:
    run(case, folder, tmp_path)


# -- completeness of the cases -----------------------------------------------------------------------------------------


def test_every_valid_pair_of_settings_is_covered() -> None:
    """The reference is the full product of the factors on which it depends whether a case can run."""
    free = {"checkpointing", "positions", "updates"}
    draw = random.Random(0)
    for _ in range(2000):
        case = {name: draw.choice(values) for name, values in FACTORS.items()}
        assert valid(case) == valid({name: value for name, value in case.items() if name not in free})
    possible: set[Any] = set()
    for case in product({name: values for name, values in FACTORS.items() if name not in free}, valid):
        possible.update(itertools.combinations(case.items(), 2))
    single = {setting for pair in possible for setting in pair}
    order = list(FACTORS)
    for name in free:
        for value in FACTORS[name]:
            others = single | {(other, choice) for other in free - {name} for choice in FACTORS[other]}
            pairs = (sorted(((name, value), setting), key=lambda each: order.index(each[0])) for setting in others)
            possible.update(map(tuple, pairs))
    assert set(itertools.chain.from_iterable(map(pairs_of, PAIRWISE))) == possible
    assert all(map(valid, PAIRWISE))


def test_a_covering_array_without_constraints_covers_the_product_of_each_pair() -> None:
    factors = {name: ("0", "1", "2") for name in "abcd"}
    cases = pairwise(factors, lambda case: True)
    for (one, ones), (other, others) in itertools.combinations(factors.items(), 2):
        assert {(case[one], case[other]) for case in cases} == set(itertools.product(ones, others))
    assert len(cases) < 20 < 3**4


def concrete(base: type) -> set[type]:
    """Return the concrete subclasses of the package, after importing all of its modules."""
    for module in pkgutil.walk_packages(opsd_lightning.__path__, "opsd_lightning."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    found = (cls for cls in subclasses(base) if cls.__module__.startswith("opsd_lightning."))
    return {cls for cls in found if not inspect.isabstract(cls)}


@pytest.mark.parametrize(
    ("base", "present"),
    [
        (PolicyModule, set(METHODS.values())),
        (Divergence, set(map(type, DIVERGENCES.values()))),
        (Support, set(map(type, SUPPORTS.values()))),
        (Clip, set(map(type, CLIPS.values()))),
        (PositionWeight, {type(part) for part in POSITIONS.values() if part is not None}),
        (Objective, {DivergenceObjective, NegativeLogLikelihood, *SAMPLED.values()}),
        (Teacher, {type(make("folder")) for make in TEACHERS.values()}),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_every_class_has_a_case(base: type, present: set[type]) -> None:
    """A new class without a case fails here: add it to `helpers.device_cases`."""
    assert concrete(base) == present


def test_every_engine_has_a_case_or_a_reason() -> None:
    own = {type(make()) for make in ENGINES.values()} & concrete(RolloutEngine)
    assert own | set(CANNOT_RUN) == concrete(RolloutEngine)
    assert own.isdisjoint(CANNOT_RUN)


# -- planted faults ----------------------------------------------------------------------------------------------------


class Planted(DivergenceObjective):
    """An objective with a fault in each block of tokens."""

    def __init__(self, fault: str) -> None:
        super().__init__(logits_memory_mib=64 if fault == "large" else 1)
        self.fault = fault

    def per_token(self, student_logprobs: Tensor, teacher_logprobs: Tensor | None, targets: Tensor) -> tuple[Tensor, Tensor]:
        loss, clipped = super().per_token(student_logprobs, teacher_logprobs, targets)
        if self.fault == "mix":
            loss = loss + torch.zeros(len(loss))
        elif self.fault == "synchronization":
            assert float(loss.detach().sum()) >= 0
        elif self.fault == "random":
            loss = loss * (1 + 1e-6 * torch.rand(()))
        elif self.fault == "work":
            assert torch.zeros(10_000).sum() == 0
        return loss, clipped


class Reading(TransformersEngine):
    """An engine that reads every token twice more."""

    def generate(self, model: Any, prompts: Any, sampling: Any, seed: int) -> Any:
        found = super().generate(model, prompts, sampling, seed)
        for _ in range(4 * sampling.max_new_tokens):
            torch.ones(1, device="cuda").item()
        return found


@pytest.mark.parametrize("fault", ["none", "mix", "synchronization", "large", "random", "work"])
def test_a_planted_fault_in_the_objective_is_found(fault: str, folder: str, tmp_path: Path) -> None:
    if fault == "none":
        run({}, folder, tmp_path, objective=Planted(fault))
        return
    with pytest.raises(DeviceMixError if fault == "mix" else AssertionError):
        run({}, folder, tmp_path, objective=Planted(fault), token_budget=512 if fault == "large" else 128)


def test_a_planted_synchronization_in_the_rollout_is_found(folder: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="tokens after"):
        run({}, folder, tmp_path, rollouts=Reading())
