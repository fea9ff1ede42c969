"""Anchor: a second term of the loss, which holds the student near a fixed reference on the student's own prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from opsd_lightning.losses.divergences import ReverseKL
from opsd_lightning.losses.objectives import DivergenceObjective, Objective
from opsd_lightning.models.policy import TEACHER, base_of
from opsd_lightning.models.scoring import Scorer
from opsd_lightning.teachers import FixedTeacher, ReferenceTeacher, Teacher, TrustRegionTeacher, is_identity
from opsd_lightning.types import ConfigError, PositiveFloat, Rollouts, TokenStates, checked

# Type checkers refuse other teachers. The command line accepts any, and shows the reason for refusing it.
if not TYPE_CHECKING:
    _Reference = Teacher
else:
    _Reference = ReferenceTeacher


@checked
class Anchor:
    """A second term of the loss: a divergence from a reference that reads the student's own prompt.

    Args:
        weight: Weight of the term, above 0.
        objective: Loss of a token. Defaults to the reverse KL over the full vocabulary.
        teacher: The reference. Defaults to the initial policy. Its ``privileged`` has no effect here.

    Raises:
        ConfigError: The reference follows the student, or the objective has no reference.

    Example::

        >>> from opsd_lightning import Anchor, ModelTeacher
        >>> Anchor(weight=0.05).weight
        0.05
    """

    def __init__(
        self, weight: PositiveFloat = 0.01, objective: Objective | None = None, teacher: _Reference | None = None
    ) -> None:
        self.weight = weight
        self.objective = objective or DivergenceObjective(ReverseKL())
        self.teacher = teacher or FixedTeacher()
        self.teacher.setting = "model.anchor.teacher"
        if not isinstance(self.teacher, ReferenceTeacher):
            raise ConfigError(
                f"{type(self.teacher).__name__} follows the student, and an anchor needs a reference that never changes",
                "model.anchor.teacher",
                "Use FixedTeacher or ModelTeacher",
            )
        if not self.objective.uses_teacher:
            raise ConfigError(
                f"{type(self.objective).__name__} compares with no reference",
                "model.anchor.objective",
                "Use an objective with a reference, such as DivergenceObjective",
            )

    def attach(self, model: PeftModel, tokenizer: PreTrainedTokenizerBase, beside: Teacher | None = None) -> None:
        """Attach the reference to the freshly built policy.

        Args:
            model: The policy.
            tokenizer: The policy's tokenizer.
            beside: The method's teacher, which is attached first.

        Raises:
            ConfigError: A part does not fit the policy, or both teachers need an adapter, and the policy has room for one.
        """
        self.objective.check(base_of(model).config.get_text_config().vocab_size, "model.anchor.objective")
        self.teacher.check(tokenizer)
        if isinstance(beside, TrustRegionTeacher):
            beside = beside.fixed
        if not isinstance(self.teacher, FixedTeacher) or (isinstance(model, PeftModel) and TEACHER not in model.peft_config):
            self.teacher.attach(model)
        elif isinstance(beside, FixedTeacher):
            if not isinstance(model, PeftModel):
                self.teacher.share(beside)
            # With an adapter, both score with the same frozen copy.
        elif not isinstance(model, PeftModel):
            self.teacher.attach(model)
        elif is_identity(model):
            self.teacher.use_base_weights()
        else:
            raise ConfigError(
                "the reference is the adapter that training starts from (model.policy.adapter), and model.teacher keeps "
                "another adapter. The policy has room for one",
                "model.anchor.teacher",
                "Use ModelTeacher here, or FixedTeacher as model.teacher",
            )

    def score(self, scorer: Scorer, prompts: Sequence[list[int]], rollouts: Rollouts) -> TokenStates:
        """Return the reference's states at all completion tokens. Every rank must call.

        Args:
            scorer: A scorer of the policy.
            prompts: The student's prompt of each completion.
            rollouts: The completions, T tokens in total.
        """
        return self.teacher.score(scorer, prompts, rollouts.completions)
