"""Anchor: a second term of the loss, which holds the student near a fixed reference on the student's own prompt."""

from __future__ import annotations

from collections.abc import Sequence

from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from opsd_lightning.losses.divergences import ReverseKL
from opsd_lightning.losses.objectives import DivergenceObjective, Objective
from opsd_lightning.models.policy import TEACHER, base_of
from opsd_lightning.models.scoring import Scorer
from opsd_lightning.teachers import FixedTeacher, ReferenceTeacher, Teacher, TrustRegionTeacher, is_identity
from opsd_lightning.types import ConfigError, PositiveFloat, Rollouts, TokenStates, checked


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
        self, weight: PositiveFloat = 0.01, objective: Objective | None = None, teacher: ReferenceTeacher | None = None
    ) -> None:
        self.weight = weight
        self.objective = objective or DivergenceObjective(ReverseKL())
        self.teacher = teacher or FixedTeacher()
        self.teacher.setting = "model.anchor.teacher"
        if not isinstance(self.teacher, ReferenceTeacher):  # callers whose types nothing checks
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
        fixed, fixed_beside = isinstance(self.teacher, FixedTeacher), isinstance(beside, FixedTeacher)
        if isinstance(self.teacher, FixedTeacher) and isinstance(beside, FixedTeacher) and not isinstance(model, PeftModel):
            self.teacher.share(beside)
        elif fixed and fixed_beside and TEACHER in model.peft_config:
            return  # both score with the same frozen copy
        elif isinstance(self.teacher, FixedTeacher) and isinstance(model, PeftModel) and TEACHER in model.peft_config:
            if not is_identity(model):
                raise ConfigError(
                    "the reference is the adapter that training starts from (model.policy.adapter), and model.teacher keeps "
                    "another adapter; there is one place",
                    "model.anchor.teacher",
                    "Use ModelTeacher here, or FixedTeacher as model.teacher",
                )
            self.teacher.use_base_weights()
        else:
            self.teacher.attach(model)

    def score(self, scorer: Scorer, prompts: Sequence[list[int]], rollouts: Rollouts) -> TokenStates:
        """Return the reference's states at all completion tokens. Every rank must call.

        Args:
            scorer: A scorer of the policy.
            prompts: The student's prompt of each completion.
            rollouts: The completions, T tokens in total.
        """
        return self.teacher.score(scorer, prompts, rollouts.completions)
