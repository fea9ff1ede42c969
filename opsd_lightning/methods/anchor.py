"""A second term of the loss: a divergence from a reference that stays as it is, on the student's own prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from opsd_lightning.losses.divergences import ReverseKL
from opsd_lightning.losses.objectives import DivergenceObjective, Objective
from opsd_lightning.models.policy import TEACHER, base_of
from opsd_lightning.teachers import FixedTeacher, LiveTeacher, Teacher, is_identity, without_adapter
from opsd_lightning.types import PositiveFloat, Rollouts, TokenStates, UserError, checked


@checked
class Anchor:
    """A second term of the loss, which holds the student near a reference that reads the student's own prompt.

    Args:
        weight: Of the term, above 0.
        objective: What is taken of each token: the reverse KL over the full vocabulary unless given.
        teacher: The reference, one that stays as it is: the initial policy unless given. Its own ``privileged`` does not
            matter here.
    """

    def __init__(
        self, weight: PositiveFloat = 0.01, objective: Objective | None = None, teacher: Teacher | None = None
    ) -> None:
        self.weight = weight
        self.objective = objective or DivergenceObjective(ReverseKL())
        self.teacher = teacher or FixedTeacher()
        self.teacher.setting = "model.anchor.teacher"
        if type(self.teacher).after_step is not Teacher.after_step or isinstance(self.teacher, LiveTeacher):
            raise UserError(
                f"model.anchor.teacher is {type(self.teacher).__name__}, which follows the student: an anchor stays where "
                "it is. Take FixedTeacher or ModelTeacher"
            )
        if not self.objective.uses_teacher:
            raise UserError(f"model.anchor.objective {type(self.objective).__name__} has no reference: choose another")

    def attach(self, model: PeftModel, tokenizer: PreTrainedTokenizerBase, beside: Teacher | None = None) -> None:
        """Once on the freshly built policy, after the teacher that it stands beside.

        Raises:
            UserError: A part does not go with the policy, or both teachers would keep an adapter: there is room for one.
        """
        try:
            self.objective.check(base_of(model).config.get_text_config().vocab_size)
        except ValueError as error:
            raise UserError(f"model.anchor.{error}") from None
        self.teacher.check(tokenizer)
        if isinstance(self.teacher, FixedTeacher) and isinstance(beside, FixedTeacher) and not isinstance(model, PeftModel):
            self.teacher.share(beside)
            return
        if isinstance(self.teacher, FixedTeacher) and isinstance(model, PeftModel) and TEACHER in model.peft_config:
            if isinstance(beside, FixedTeacher):
                return  # the same frozen copy
            if is_identity(model):
                self.teacher = _BaseTeacher()
                self.teacher.setting = "model.anchor.teacher"
                return
            raise UserError(
                "model.anchor holds the student near the adapter that it starts from (model.policy.adapter), and "
                "model.teacher keeps an adapter of its own: take ModelTeacher as model.anchor.teacher, or FixedTeacher as "
                "model.teacher"
            )
        self.teacher.attach(model)

    def score(
        self,
        model: PeftModel,
        prompts: Sequence[list[int]],
        rollouts: Rollouts,
        token_budget: int,
        agree: Callable[[int], int],
    ) -> TokenStates:
        """The reference's states at all completion tokens, behind the student's prompts."""
        students = [prompt for prompt in prompts for _ in range(rollouts.n)]
        return self.teacher.score(model, students, rollouts.completions, token_budget, agree)


class _BaseTeacher(FixedTeacher):
    """The base model, the adapter switched off, whatever adapters there are."""

    def weights(self, model: PeftModel) -> AbstractContextManager[None]:
        return without_adapter(model)
