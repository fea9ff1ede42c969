"""The memory estimate of a run, from its module and data."""

from __future__ import annotations

from typing import Any

from opsd_lightning.data.datamodule import OPSDDataModule
from opsd_lightning.doctor.memory import DeviceMemory, Estimator, Step, size_of, skeleton, weight_bytes
from opsd_lightning.methods.base import PolicyModule
from opsd_lightning.methods.sft import SFTModule
from opsd_lightning.rollouts.base import LocalEngine
from opsd_lightning.teachers import EMATeacher, FixedTeacher, ModelTeacher, SyncTeacher, TrustRegionTeacher

_KEEP_START = (FixedTeacher, TrustRegionTeacher)


def step_of(module: PolicyModule, data: OPSDDataModule, prompt: int, completion: int | None = None) -> Step:
    """Return the sizes of an optimizer step, and of a validation batch, on one device.

    Args:
        module: The method.
        data: The data. It need not be set up.
        prompt: Tokens of a long student's prompt.
        completion: Tokens of the longest completion. Defaults to ``sampling.max_new_tokens``.
    """
    samples = not isinstance(module, SFTModule)
    # Without grades validation samples nothing, and scores demonstrations within the token budget of training.
    evaluates = data.sources["val"] is not None and module.evaluator.demonstrations is None
    rows, eval_rows = data.batch_size, data.eval_batch_size * module.evaluator.sampling.n
    if samples:
        rows *= module.sampling.n
    at_once = getattr(module.rollouts, "max_rows", None) or max(rows, eval_rows)
    return Step(
        rows,
        prompt,
        completion or module.sampling.max_new_tokens,
        at_once if isinstance(module.rollouts, LocalEngine) and (samples or evaluates) else 0,
        module.token_budget,
        eval_rows if evaluates else 0,
        module.evaluator.sampling.max_new_tokens,
    )


def estimator_of(module: PolicyModule, device: DeviceMemory, precision: str, shards: int = 1) -> Estimator:
    """Return an estimator of a run's memory on a device.

    Args:
        module: The method. Its model is not built.
        device: Memory of the device.
        precision: ``trainer.precision``.
        shards: Devices over which the weights are sharded.

    Raises:
        UserError: The model's configuration cannot be read, or the adapter does not fit it.
    """
    policy: Any = module.policy
    model = skeleton(policy)
    trainable, kept = [p for p in model.parameters() if p.requires_grad], 0
    for teacher in module.teachers:
        if isinstance(teacher, ModelTeacher):
            recipe = teacher.recipe
            kept += weight_bytes(model, None) if recipe is None else weight_bytes(skeleton(recipe), recipe.quantization)
        elif isinstance(teacher, _KEEP_START) and policy.trains_all:
            kept = kept or weight_bytes(model, None)  # the anchor uses the same copy
        elif isinstance(teacher, (EMATeacher, SyncTeacher)) or (isinstance(teacher, _KEEP_START) and policy.adapter):
            kept += size_of(trainable)
    states = sum(2 if isinstance(teacher, TrustRegionTeacher) else 1 for teacher in module.teachers)
    return Estimator(
        model, policy, module.objective, module.make_optimizer, module.rollouts, device, precision, kept, states, shards
    )
