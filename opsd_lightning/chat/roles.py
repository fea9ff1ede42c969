"""Student and teacher of a conversation. Both are one model: the student has the adapter, the teacher has not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from peft import PeftModel

from opsd_lightning.losses.objectives import DivergenceObjective
from opsd_lightning.models.policy import LoRA, Policy, device_of
from opsd_lightning.models.scoring import Scorer
from opsd_lightning.prompts.templates import Prompts
from opsd_lightning.rollouts.transformers_engine import TransformersEngine
from opsd_lightning.runs.exported_adapter import load_exported
from opsd_lightning.teachers import FixedTeacher, GenerativeTeacher, LiveTeacher
from opsd_lightning.types import ConfigError, Example, Sampling
from opsd_lightning.utils.token_text import Pieces


class Answer(NamedTuple):
    """An answer to a question.

    Args:
        text: Its text.
        tokens: Its token ids.
        pieces: The text of each token.
        truncated: True if it ends at the length limit.
        prompts: Token ids of the student's prompt and of the teacher's.
    """

    text: str
    tokens: list[int]
    pieces: list[str]
    truncated: bool
    prompts: tuple[list[int], list[int]]


class Roles:
    """Student and teacher of a conversation.

    Args:
        policy: Settings of the model.
        context: Text that the teacher reads. None if it reads the student's prompt.
        sampling: Settings of the sampler.
        prompts: Templates of the prompts.

    Attributes:
        history: Messages of the conversation so far. The first question gets the template for questions. Later questions
            get the template for conversations.
    """

    def __init__(self, policy: Policy, context: str | None, sampling: Sampling, prompts: Prompts) -> None:
        self.policy, self.context, self.sampling, self.prompts = policy, context, sampling, prompts
        self.tokenizer = policy.load_tokenizer()
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model: PeftModel = policy.build(device).to(device)
        self.limit = policy.context_length()
        self.pieces = Pieces(self.tokenizer)
        self.history: list[dict[str, Any]] = []
        teacher = FixedTeacher()
        teacher.use_base_weights()
        self.teachers: dict[str, GenerativeTeacher] = {"student": LiveTeacher(), "teacher": teacher}

    @classmethod
    def load(
        cls,
        model: str | None,
        adapter: str | None,
        context: str | None,
        sampling: Sampling,
        system: str | None = None,
        **given: Any,
    ) -> Roles:
        """Load a model, with an adapter if there is one.

        Args:
            model: Hugging Face id, folder or ``.gguf`` file. Defaults to the base model of the adapter.
            adapter: Peft folder or Hugging Face id. If it is in the folder of its run, prompts and settings of the model are
                those of the run.
            context: See `Roles`.
            sampling: See `Roles`.
            system: System message. Defaults to that of the run, or to none.
            given: Other settings of the `Policy`, such as ``dtype``. For a value of None, the setting is that of the run.

        Raises:
            ConfigError: The model or the adapter cannot be loaded, or they do not fit each other.
        """
        if adapter is None:
            lora = LoRA(r=1, dropout=0.0)  # a new adapter changes nothing
            settings = {name: value for name, value in given.items() if value is not None}
            policy, prompts = Policy(model or "", lora=lora, **settings), Prompts()
        else:
            policy, prompts, _ = load_exported(adapter, model, "--adapter", **given)
        if system is not None:
            prompts = replace(prompts, system=system)
        return cls(policy, context, sampling, prompts)

    def answer(self, question: str, role: str, seed: int) -> Answer:
        """Let a role answer a question, and add both to the history.

        Args:
            question: The question.
            role: ``student`` or ``teacher``.
            seed: Seed for sampling.

        Raises:
            ConfigError: The prompt does not fit the model's context.
        """
        asked = {"role": "user", "content": question}
        example = Example(question, "", "", messages=[*self.history, asked] if self.history else ())
        prompts = (
            list(self.prompts.student(self.tokenizer, example)),
            list(self.prompts.teacher(self.tokenizer, example, self.context, whole=True)),
        )
        room = self.sampling.max_new_tokens if self.limit is None else self.limit - max(map(len, prompts))
        if room < 1:
            problem = f"a prompt of {max(map(len, prompts))} tokens leaves no room in a context of {self.limit}"
            raise ConfigError(problem, "--context", "Shorten the question or the context, or begin a new conversation")
        sampling = Sampling(min(room, self.sampling.max_new_tokens), self.sampling.temperature)
        with self.teachers[role].weights(self.model):
            prompt = prompts[role == "teacher"]
            rollouts = TransformersEngine().generate(self.model, [prompt], sampling, seed)
        tokens = rollouts.completions[0]
        text = str(self.tokenizer.decode(tokens, skip_special_tokens=True))
        self.history += [asked, {"role": "assistant", "content": text}]
        return Answer(text, tokens, self._pieces_of(tokens), not rollouts.terminated[0], prompts)

    @torch.no_grad()
    def divergence(self, answer: Answer) -> list[float]:
        """Return the forward KL divergence of teacher and student at each token of an answer, in nats."""
        if not answer.tokens:
            return []
        scorer = Scorer(self.model)
        states = [
            teacher.score(scorer, [prompt], [answer.tokens])
            for teacher, prompt in zip(self.teachers.values(), answer.prompts, strict=True)
        ]
        targets = torch.tensor(answer.tokens, device=device_of(self.model))
        _, measured = DivergenceObjective()(states[0], states[1], targets, torch.ones_like(targets, dtype=torch.float32))
        return [float(value) for value in measured["forward_kl"]]

    def _pieces_of(self, tokens: Sequence[int]) -> list[str]:
        joined = self.pieces.joined(tokens)
        return [joined.get(place, self.pieces[token].text) for place, token in enumerate(tokens)]
