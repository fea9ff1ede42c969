"""Tests of the method's variants, each against its formula computed row by row with autograd."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers.files import write_jsonl
from helpers.fixed_completions import BATCH, COMPLETIONS, Fixed, same_weights, sgd
from helpers.messages import mentions
from helpers.models import EOS, PROMPTS, TEACHER_PROMPTS, perturb
from helpers.steps import adapter, fit, one_step
from helpers.training import Recorder, parts, trainer
from opsd_lightning.callbacks.export import AdapterExport
from opsd_lightning.data.datamodule import OPSDDataModule
from opsd_lightning.data.drop_reasons import DropReason
from opsd_lightning.data.sources import Columns, FileSource
from opsd_lightning.grading.base import Grade, Grader
from opsd_lightning.grading.no_grader import NoGrader
from opsd_lightning.losses.divergences import ForwardKL
from opsd_lightning.losses.objectives import DivergenceObjective
from opsd_lightning.losses.position_weights import DecayingPositions, FirstPositions, PositionWeight
from opsd_lightning.methods.anchor import Anchor
from opsd_lightning.methods.grpo import GRPOModule
from opsd_lightning.methods.mixed import MixedOPSDModule
from opsd_lightning.methods.opsd import OPSDModule
from opsd_lightning.methods.sft import SFTModule
from opsd_lightning.models.policy import Policy, base_of
from opsd_lightning.models.scoring import Scorer
from opsd_lightning.prompts.contexts import AnswerContext
from opsd_lightning.prompts.online_contexts import (
    Attempts,
    CritiqueContext,
    FeedbackContext,
    MajorityContext,
    OnlineContext,
    ReasonFirst,
    ShortestCorrectContext,
    Write,
    WrittenContext,
)
from opsd_lightning.prompts.templates import Prompts
from opsd_lightning.rollouts.base import RolloutEngine
from opsd_lightning.rollouts.transformers_engine import TransformersEngine
from opsd_lightning.rollouts.vllm.colocated import VLLMEngine
from opsd_lightning.teachers import EMATeacher, FixedTeacher, LiveTeacher, ModelTeacher, TrustRegionTeacher
from opsd_lightning.types import Example, Rollouts, Sampling, UserError

MakePolicy = Callable[..., Policy]


def distributions(model: Any, prompts: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Log-probabilities of the whole vocabulary at every token of COMPLETIONS, each row alone."""
    found = []
    for prompt, completion in zip(prompts, COMPLETIONS, strict=True):
        ids = torch.tensor([[*prompt, *completion]])
        found.append(base_of(model)(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1))
    return found


def kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return (p.exp() * (p - q)).sum(-1)


def flat_run(policy: Policy, loss: Callable[[Any, int], torch.Tensor], steps: int) -> Any:
    torch.manual_seed(0)
    flat = policy.build()
    optimizer = sgd([p for p in flat.parameters() if p.requires_grad])
    for step in range(steps):
        optimizer.zero_grad()
        loss(flat, step).backward()
        optimizer.step()
    return flat


def run(module: OPSDModule, steps: int, folder: Path, batch: Any = BATCH, **trainer: Any) -> OPSDModule:
    torch.manual_seed(0)
    fit(module, steps, folder, batch, **trainer)
    return module


def frozen(flat: Any, prompts: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    with torch.no_grad(), flat.disable_adapter():
        return distributions(flat, prompts)


# -- terms of the loss -------------------------------------------------------------------------------------------------


def test_an_anchor_adds_the_divergence_from_the_base(make_policy: MakePolicy, tmp_path: Path) -> None:
    policy = make_policy()

    def loss(flat: Any, step: int) -> torch.Tensor:
        student, teacher = torch.cat(distributions(flat, PROMPTS)), torch.cat(frozen(flat, TEACHER_PROMPTS))
        reference = torch.cat(frozen(flat, PROMPTS))
        return kl(teacher, student).mean() + 0.7 * kl(student, reference).mean()

    flat = flat_run(policy, loss, 3)
    same_weights(run(OPSDModule(policy, anchor=Anchor(0.7), rollouts=Fixed(), optimizer=sgd), 3, tmp_path), flat)


def test_an_anchor_holds_the_student_nearer_to_the_base(make_policy: MakePolicy, tmp_path: Path) -> None:
    def distance(anchor: Anchor | None) -> float:
        module = OPSDModule(make_policy(), anchor=anchor, rollouts=Fixed(), optimizer=lambda p: torch.optim.SGD(p, lr=0.02))
        run(module, 20, tmp_path)
        with torch.no_grad():
            student = torch.cat(distributions(module.model, PROMPTS))
        return float(kl(student, torch.cat(frozen(module.model, PROMPTS))).mean())

    assert distance(Anchor(5.0)) < 0.5 * distance(None)


@pytest.mark.parametrize("teacher", [FixedTeacher(), EMATeacher(0.5)], ids=["fixed", "ema"])
def test_the_anchor_of_a_trained_adapter(teacher: Any, make_policy: MakePolicy, tmp_path: Path) -> None:
    """With a start that is not the base, the anchor is that start: one copy serves both, or it is refused."""
    model = make_policy().build()
    perturb(model)
    model.save_pretrained(str(tmp_path / "start"))
    policy = make_policy(adapter=str(tmp_path / "start"))
    module = OPSDModule(policy, teacher=teacher, anchor=Anchor(), rollouts=Fixed(), optimizer=sgd)
    if isinstance(teacher, EMATeacher):
        with pytest.raises(UserError, match=r"model\.anchor"):
            module.configure_model()
    else:
        run(module, 1, tmp_path)
        assert list(module.model.peft_config) == ["default", "teacher"]


@pytest.mark.parametrize("limit", [1.05, 100.0])
def test_updates_on_one_batch_are_weighted_by_the_clipped_ratio(
    limit: float, make_policy: MakePolicy, tmp_path: Path
) -> None:
    policy = make_policy()
    old: list[torch.Tensor] = []
    seen: list[float] = []

    def loss(flat: Any, step: int) -> torch.Tensor:
        rows = distributions(flat, PROMPTS)
        picked = [r.gather(-1, torch.tensor(c)[:, None])[:, 0] for r, c in zip(rows, COMPLETIONS, strict=True)]
        now = torch.cat(picked).detach()
        if step == 0:
            old.append(now)
        ratio = (now - old[0]).exp()
        seen.append(float(ratio.max()))
        away = kl(torch.cat(rows), torch.cat(frozen(flat, PROMPTS)))  # the anchor's samples are the same
        return (ratio.clamp(max=limit) * (kl(torch.cat(frozen(flat, TEACHER_PROMPTS)), torch.cat(rows)) + 0.7 * away)).mean()

    flat = flat_run(policy, loss, 3)
    assert max(seen) > 1.05
    module = OPSDModule(
        policy,
        anchor=Anchor(0.7),
        rollouts=Fixed(),
        optimizer=sgd,
        updates_per_batch=3,
        max_importance_ratio=limit,
        token_budget=30,
    )
    same_weights(run(module, 3, tmp_path), flat)
    assert module.global_step == 3 and module.tokens_generated == sum(map(len, COMPLETIONS))


@pytest.mark.parametrize("weight", [DecayingPositions(2.0), FirstPositions(2, 0.25)], ids=["decaying", "first"])
def test_position_weights(weight: PositionWeight, make_policy: MakePolicy, tmp_path: Path) -> None:
    policy = make_policy()
    formula = {DecayingPositions: lambda n: 2 ** (-n / 2), FirstPositions: lambda n: 1.0 if n < 2 else 0.25}[type(weight)]
    each = torch.tensor([formula(n) for completion in COMPLETIONS for n in range(len(completion))])

    def loss(flat: Any, step: int) -> torch.Tensor:
        values = kl(torch.cat(frozen(flat, TEACHER_PROMPTS)), torch.cat(distributions(flat, PROMPTS)))
        return (values * each).sum() / each.sum()

    flat = flat_run(policy, loss, 2)
    objective = DivergenceObjective(ForwardKL(), position_weight=weight)
    same_weights(run(OPSDModule(policy, objective=objective, rollouts=Fixed(), optimizer=sgd), 2, tmp_path), flat)


def test_a_trust_region_teacher_in_training(make_policy: MakePolicy, tmp_path: Path) -> None:
    """The teacher's logits are interpolated, not its probabilities."""
    policy = make_policy()

    def loss(flat: Any, step: int) -> torch.Tensor:
        fixed = torch.cat(frozen(flat, TEACHER_PROMPTS))
        with torch.no_grad():
            live = torch.cat(distributions(flat, TEACHER_PROMPTS))
        return kl((0.6 * fixed + 0.4 * live).log_softmax(-1), torch.cat(distributions(flat, PROMPTS))).mean()

    flat = flat_run(policy, loss, 3)
    same_weights(run(OPSDModule(policy, TrustRegionTeacher(0.4), rollouts=Fixed(), optimizer=sgd), 3, tmp_path), flat)


# -- what is sampled ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_share_of_steps_on_the_traces(share: float, make_policy: MakePolicy, tmp_path: Path) -> None:
    sampled: list[bool] = []

    class Spying(Fixed):
        def generate(self, *arguments: Any) -> Rollouts:
            sampled.append(True)
            return super().generate(*arguments)

    module = MixedOPSDModule(make_policy(), trace_share=share, rollouts=Spying(), optimizer=sgd, seed=3)
    run(module, 8, tmp_path)
    tokens = sum(map(len, COMPLETIONS))
    assert module.tokens_generated == tokens * len(sampled)
    assert len(sampled) == {0.0: 8, 1.0: 0}.get(share, len(sampled)) and (share != 0.5 or 0 < len(sampled) < 8)
    # The traces of BATCH are the completions that the engine returns: the loss must be the same one.
    plain = run(OPSDModule(make_policy(), rollouts=Fixed(), optimizer=sgd, seed=3), 8, tmp_path)
    ours, theirs = adapter(module), adapter(plain)
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-6) for name in ours)


def test_steps_on_traces_read_the_datas_context(make_policy: MakePolicy, tmp_path: Path) -> None:
    """A majority of completions is nothing that a trace could be compared with."""

    def weights(context: OnlineContext | None) -> dict[str, torch.Tensor]:
        sampling = Sampling(n=2)
        module = MixedOPSDModule(make_policy(), 1.0, context=context, sampling=sampling, rollouts=Fixed(), optimizer=sgd)
        return adapter(run(module, 2, tmp_path))

    ours, theirs = weights(MajorityContext()), weights(None)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours) and any(bool(value.any()) for value in ours.values())


def test_updates_on_traces_have_no_ratio(make_policy: MakePolicy, tmp_path: Path) -> None:
    """They were not sampled from the student."""
    policy = make_policy()

    def loss(flat: Any, step: int) -> torch.Tensor:
        return kl(torch.cat(frozen(flat, TEACHER_PROMPTS)), torch.cat(distributions(flat, PROMPTS))).mean()

    flat = flat_run(policy, loss, 3)
    module = MixedOPSDModule(policy, 1.0, rollouts=Fixed(), optimizer=sgd, updates_per_batch=3, max_importance_ratio=9.0)
    same_weights(run(module, 3, tmp_path), flat)


def test_a_teacher_follows_every_update_of_a_batch(make_policy: MakePolicy, tmp_path: Path) -> None:
    module = OPSDModule(make_policy(), EMATeacher(0.5), rollouts=Fixed(), optimizer=sgd, updates_per_batch=3)
    told: list[int] = []
    after = module.teacher.after_step
    module.teacher.after_step = lambda model, step: told.append(step) or after(model, step)  # type: ignore[method-assign, func-returns-value]
    run(module, 3, tmp_path)
    assert told == [1, 2, 3]


@pytest.mark.parametrize("teacher", [EMATeacher(), LiveTeacher()])
def test_an_anchor_stays_where_it_is(teacher: Any) -> None:
    with pytest.raises(UserError, match=mentions("model.anchor.teacher")):
        Anchor(teacher=teacher)


def test_an_anchor_beside_a_moving_teacher_is_the_base(make_policy: MakePolicy, tmp_path: Path) -> None:
    """The teacher's copy is where the student is after each step; the anchor is not."""
    policy = make_policy()

    def loss(flat: Any, step: int) -> torch.Tensor:
        student = torch.cat(distributions(flat, PROMPTS))
        with torch.no_grad():
            teacher = torch.cat(distributions(flat, TEACHER_PROMPTS))
        return kl(teacher, student).mean() + 0.7 * kl(student, torch.cat(frozen(flat, PROMPTS))).mean()

    flat = flat_run(policy, loss, 3)
    module = OPSDModule(policy, EMATeacher(0.0), anchor=Anchor(0.7), rollouts=Fixed(), optimizer=sgd)
    same_weights(run(module, 3, tmp_path), flat)


def test_updates_end_with_max_steps(make_policy: MakePolicy, tmp_path: Path) -> None:
    module = OPSDModule(make_policy(), rollouts=Fixed(), optimizer=sgd, updates_per_batch=3)
    assert run(module, 5, tmp_path).global_step == 5


# -- contexts ----------------------------------------------------------------------------------------------------------


def graded(answers: Sequence[str | None], right: Sequence[bool] = (False,) * 8) -> list[Grade]:
    return [Grade(float(correct), answer) for answer, correct in zip(answers, right, strict=True)]


ATTEMPTS = Attempts(
    examples=[Example("one?", "because 1", "1"), Example("two?", "because 2", "2")],
    texts=["it is long, 1", "so 1", "7", "also 1", "2!", "3", "3 indeed", "4"],
    grades=graded(["1", "1", "7", "1", "2", "3", "3", None], [True, True, False, True, True, False, False, False]),
    finished=[True, True, True, False, True, True, True, True],
    n=4,
)


def no_writing(examples: Sequence[Example], messages: Sequence[str], sampling: Sampling) -> list[str]:
    raise AssertionError("this context needs no writing")


def test_shortest_correct() -> None:
    """The shortest other one: never the completion itself, nor one that ran into the length limit."""
    found = ShortestCorrectContext().texts(ATTEMPTS, no_writing)
    assert found == ["so 1", "it is long, 1", "so 1", "so 1", None, "2!", "2!", "2!"]


def test_majority_needs_no_reference() -> None:
    found = MajorityContext().texts(ATTEMPTS, no_writing)
    assert found == ["so 1", "it is long, 1", "so 1", "so 1", "3", "3 indeed", "3", "3"]
    assert MajorityContext(0.6).texts(ATTEMPTS, no_writing)[4:] == [None] * 4
    tie = ATTEMPTS._replace(grades=graded(["1", "1", "7", "7", *ATTEMPTS.answers[4:]]))
    assert MajorityContext().texts(tie, no_writing)[:4] == [None] * 4
    wrong = [Example(e.question, "", "another") for e in ATTEMPTS.examples]
    blind = ATTEMPTS._replace(examples=wrong, grades=graded(ATTEMPTS.answers))
    assert MajorityContext().texts(blind, no_writing) == found
    equal = ATTEMPTS._replace(finished=[True] * 8, grades=graded(["0.5", "\\frac{1}{2}", "1/2", "3", *ATTEMPTS.answers[4:]]))
    assert MajorityContext().texts(equal, no_writing)[3] == "7"  # the shortest of the three halves


def test_only_the_longest_wrong_completion_of_a_question() -> None:
    """The longest completion that disagrees, where the others agree: SSOPD with grades, U-OPSD with votes."""
    assert ShortestCorrectContext(only_longest_wrong=True).texts(ATTEMPTS, no_writing) == [
        *(None, None, "so 1", None), *(None, None, "2!", None),
    ]  # fmt: skip
    found = MajorityContext(only_longest_wrong=True).texts(ATTEMPTS, no_writing)
    assert found == [None, None, "so 1", None, "3", None, None, None]
    assert MajorityContext(0.6, only_longest_wrong=True).texts(ATTEMPTS, no_writing)[4:] == [None] * 4
    for share in (0.0, 1.5):
        with pytest.raises(UserError, match=mentions("prefix_share", share)):
            MajorityContext(prefix_share=share)


def test_only_a_prefix_is_learned_from(make_policy: MakePolicy, tmp_path: Path) -> None:
    """The first half of each completion, rounded up."""
    policy, prompts = make_policy(), Prompts()
    tokenizer = policy.load_tokenizer()

    class Half(Only):
        prefix_share = 0.5

    told = {row: "told" for row in range(3)}
    read = [prompts.teacher(tokenizer, example, "told") for example in BATCH.examples]

    def loss(flat: Any, step: int) -> torch.Tensor:
        teacher = frozen(flat, read)
        rows = zip(teacher, distributions(flat, PROMPTS), strict=True)
        return torch.cat([kl(theirs, ours)[: -(-len(ours) // 2)] for theirs, ours in rows]).mean()

    module = OPSDModule(policy, context=Half(told), prompts=prompts, rollouts=Fixed(), optimizer=sgd)
    same_weights(run(module, 2, tmp_path), flat_run(policy, loss, 2))


class Second(Grader):
    """Right is the completion of the second question; without a verdict on the third."""

    def grade(self, completion: str, example: Example) -> Grade:
        return Grade(float(example.question == "1"), problem="timeout" if example.question == "2" else "")


@pytest.mark.parametrize(("learn_from", "rows"), [("right", [1]), ("wrong", [0, 2])])
def test_learning_from_right_or_wrong_completions(
    learn_from: Any, rows: list[int], make_policy: MakePolicy, tmp_path: Path
) -> None:
    policy = make_policy()

    def loss(flat: Any, step: int) -> torch.Tensor:
        teacher, student = frozen(flat, TEACHER_PROMPTS), distributions(flat, PROMPTS)
        return torch.cat([kl(teacher[row], student[row]) for row in rows]).mean()

    module = OPSDModule(policy, learn_from=learn_from, grader=Second(), rollouts=Fixed(), optimizer=sgd)
    examples = [Example(str(row), "", "") for row in range(3)]
    torch.manual_seed(0)
    trainer = fit(module, 1, tmp_path, BATCH._replace(examples=examples))
    assert float(trainer.callback_metrics["train/selected_fraction"]) == pytest.approx(len(rows) / 3)
    assert float(trainer.callback_metrics["train/grading_timeouts"]) == 1
    same_weights(module, flat_run(policy, loss, 1))
    for bad in ({"learn_from": "best"}, {"learn_from": learn_from, "grader": NoGrader()}):
        with pytest.raises(UserError, match=mentions("model.learn_from")):
            OPSDModule(policy, **bad)


def test_critique_of_each_completion() -> None:
    """Written about the completion without its thinking, with the trace, or else the answer, as the reference."""
    examples = [Example("one?", "because 1", "1"), Example("two?", "", "2"), Example("three?", "", "")]
    texts = ["<think>{reference}</think>{critique}", "<think>so", "3"]
    grades = [Grade(0.0, feedback="line 1"), Grade(0.0), Grade(0.0)]
    attempts = Attempts(examples, texts, grades, [True] * 3, 1)
    asked: list[tuple[Example, str]] = []

    def write(examples: Sequence[Example], messages: Sequence[str], sampling: Sampling) -> list[str | None]:
        asked.extend(zip(examples, messages, strict=True))
        return ["{attempt}", "good", "good"]

    context = CritiqueContext("{question} {reference} {attempt} {feedback}", "{attempt} / {critique}")
    found = context.texts(attempts, write)
    assert asked[0] == (examples[0], "one? because 1 {critique} line 1") and asked[1][1].startswith("two? 2 (")
    assert found[0] == "{critique} / {attempt}" and found[1] is not None and "so" not in found[1] and found[2] is None
    for bad in ({"template": "{question}"}, {"joined": "{attempt}"}, {"sampling": Sampling(n=2)}):
        with pytest.raises(UserError, match=mentions("model.context.init_args")):
            CritiqueContext(**bad)


def test_feedback_of_the_grader_or_of_a_column() -> None:
    """A column before the grader's feedback, and the reference answer without both. Thinking is not shown."""
    examples = [
        Example("one?", "", "1", {"note": "look"}),
        Example("two?", "", "2", {"note": None}),
        Example("three?", "", ""),
    ]
    grades = [Grade(0.5, "7", "half of it"), Grade(0.0, None, "line 2: no"), Grade(1.0, "3")]
    attempts = Attempts(examples, ["<think>7?</think>7", "x", "3"], grades, [True] * 3, 1)
    context = FeedbackContext("{attempt} ok {feedback}", "{attempt}|{score}|{feedback}")
    assert context.texts(attempts, no_writing) == ["7|0.5|half of it", "x|0|line 2: no", "3 ok"]
    with_column = attempts._replace(examples=examples[:2], texts=attempts.texts[:2], grades=grades[:2])
    context = FeedbackContext(wrong="{attempt}|{feedback}", column="note")
    assert context.texts(with_column, no_writing) == ["7|look", "x|line 2: no"]
    with pytest.raises(UserError, match=mentions("model.context.init_args.column", "nothing")):
        FeedbackContext(column="nothing").texts(with_column, no_writing)
    with pytest.raises(UserError, match=mentions("model.context.init_args.column", "{feedback}")):
        FeedbackContext("right", "wrong", "note", "undecided")
    told = FeedbackContext().texts(attempts._replace(grades=[Grade(0.0)] * 3), no_writing)
    assert "1" in str(told[0]) and "2" in str(told[1])


def test_a_missing_column_of_feedback_is_refused_before_the_first_step(make_policy: MakePolicy, tmp_path: Path) -> None:
    module, data = parts(make_policy(), context=FeedbackContext(column="nothing"))
    with pytest.raises(UserError, match=mentions("model.context.init_args.column", "nothing")):
        trainer(tmp_path, Recorder(crash_before=0), num_sanity_val_steps=1).fit(module, data)
    assert module.validated == 0


def test_feedback_tells_right_from_wrong() -> None:
    found = FeedbackContext("{answer} right", "{attempt}: {answer} is not {reference}").texts(ATTEMPTS, no_writing)
    assert found[0] == "1 right" and found[2] == "7: 7 is not 1" and found[7] == "4: none is not 2"


def test_completions_without_a_verdict_are_not_called_wrong() -> None:
    """They count as wrong in metrics, but the teacher is not told so."""
    grades = [Grade(0.0, "1", "too slow", "timeout"), Grade(0.0, "1", "no reply", "failure"), Grade(0.0, "1", "no")]
    attempts = Attempts([Example("q", "", "")] * 3, ["a", "b", "c"], grades, [True] * 3, 1)
    context = FeedbackContext("right", "wrong", undecided="{attempt}: {feedback}")
    assert context.texts(attempts, no_writing) == ["a: too slow", "b: no reply", "wrong"]
    timeout, failure, wrong = map(str, FeedbackContext().texts(attempts, no_writing))
    assert "wrong" in wrong and "wrong" not in timeout + failure and "too slow" in timeout


@pytest.mark.parametrize(
    "context", [CritiqueContext(joined="{critique}"), ReasonFirst(joined="{analysis}")], ids=["critique", "reason"]
)
def test_thinking_of_the_teacher_is_no_context(context: WrittenContext) -> None:
    """A thinking teacher writes its text behind its thinking, or runs out of tokens before."""
    texts = ["<think>Hm.</think>Step 2.", "<think>Hm", "<think>Hm</think> ", "", None, " Step 3."]
    attempts = Attempts([Example("q", "t", "1")] * 6, ["a"] * 6, [Grade(0.0)] * 6, [True] * 6, 1)
    assert context.texts(attempts, lambda *_: texts) == ["Step 2.", None, None, None, None, "Step 3."]


def test_placeholders_inside_what_is_filled_in_stay() -> None:
    """A completion that writes a placeholder is not told the reference answer, nor does a trace bring the analysis in."""
    example = Example("q {trace}", "t {analysis}", "42")
    attempts = Attempts([example], ["{reference} and {answer}"], [Grade(0.0, "7")], [True], 1)
    assert FeedbackContext(wrong="{attempt}: {answer}").texts(attempts, no_writing) == ["{reference} and {answer}: 7"]
    asked: list[str] = []

    def write(examples: Sequence[Example], messages: Sequence[str], sampling: Sampling) -> list[str]:
        asked.extend(messages)
        return ["because {trace}"]

    context = ReasonFirst("{question} / {trace}", "{trace} / {analysis}")
    assert context.texts(attempts, write) == ["t {analysis} / because {trace}"] and asked == ["q {trace} / t {analysis}"]


@pytest.mark.parametrize("context", [ShortestCorrectContext(), MajorityContext()])
def test_own_completions_need_several(context: OnlineContext, make_policy: MakePolicy) -> None:
    with pytest.raises(UserError, match=mentions("model.sampling.n")):
        OPSDModule(make_policy(), context=context)


class Reading(FixedTeacher):
    """Keeps the prompts of the last step."""

    def score(self, scorer: Any, prompts: Any, completions: Any) -> Any:
        self._read = prompts
        return super().score(scorer, prompts, completions)


@pytest.mark.parametrize("position", ["user", "system", "turn"])
@pytest.mark.parametrize("conversation", [False, True], ids=["question", "conversation"])
def test_an_attempt_is_no_reference(position: Any, conversation: bool, make_policy: MakePolicy, tmp_path: Path) -> None:
    """The student's request, its wrong attempt and the whole verdict, and nothing that presents them as a solution."""
    prompts = Prompts(max_trace_tokens=5, context_position=position)
    messages = [{"role": "user", "content": "one?"}] if conversation else []
    example = Example("one?", "", "1", messages=messages)
    module = OPSDModule(
        make_policy(), Reading(), context=FeedbackContext(), prompts=prompts, rollouts=Fixed(), optimizer=sgd
    )
    fit(module, 1, tmp_path, BATCH._replace(examples=[example] * 3))
    for read, completion in zip(module.teacher._read, COMPLETIONS, strict=True):
        text = module.tokenizer.decode(read)
        request = prompts.messages(example)[-1]["content"]
        verdict = "It is wrong. The correct answer is 1."
        for part in (request, module.tokenizer.decode(completion, skip_special_tokens=True).strip(), verdict):
            assert part in text
        assert "eference" not in text
    asked = Prompts(teacher_template="{question}: {context}", context_position=position)
    assert "one?: told" in str(asked.messages(example, "told")) or position != "user"
    assert asked.messages(example, "told") == [dict(turn.message) for turn in asked.turns(example, "told", attempt=True)]


class Only(OnlineContext):
    """A text for some questions, nothing for the others."""

    def __init__(self, told: dict[int, str]) -> None:
        self.told = told

    def texts(self, attempts: Attempts, write: Write) -> list[str | None]:
        return [self.told.get(row) for row in range(len(attempts.texts))]


def test_a_completion_without_context_is_not_learned_from(make_policy: MakePolicy, tmp_path: Path) -> None:
    policy, prompts = make_policy(), Prompts()
    tokenizer = policy.load_tokenizer()
    read = prompts.teacher(tokenizer, BATCH.examples[1], "told")

    def loss(flat: Any, step: int) -> torch.Tensor:
        teacher = frozen(flat, [PROMPTS[0], read, PROMPTS[2]])
        return kl(teacher[1], distributions(flat, PROMPTS)[1]).mean()

    flat = flat_run(policy, loss, 2)
    module = OPSDModule(policy, context=Only({1: "told"}), prompts=prompts, rollouts=Fixed(), optimizer=sgd)
    same_weights(run(module, 2, tmp_path), flat)
    module = OPSDModule(policy, context=Only({}), rollouts=Fixed(), optimizer=sgd)
    module.configure_model()
    before = adapter(module)
    run(module, 1, tmp_path)
    assert all(torch.equal(before[name], value) for name, value in adapter(module).items())


def test_a_context_that_does_not_fit_is_not_learned_from(make_policy: MakePolicy, tmp_path: Path) -> None:
    """Behind the longest text that fits, the completion ends with the model's context; with one more it does not."""
    policy = make_policy()
    limit, tokenizer = policy.context_length(), policy.load_tokenizer()
    assert limit is not None
    length = len(Prompts().teacher(tokenizer, BATCH.examples[0], "")) + len(COMPLETIONS[0])
    for more, missing in ((0, 2 / 3), (1, 1.0)):
        context = Only({0: "x" * (limit - length + more)})
        module = OPSDModule(policy, context=context, prompts=Prompts(), rollouts=Fixed(), optimizer=sgd)
        trainer = fit(module, 1, tmp_path, BATCH)
        assert float(trainer.callback_metrics["train/context_missing_fraction"]) == pytest.approx(missing)


def test_reason_first_with_long_traces(make_policy: MakePolicy, tmp_path: Path) -> None:
    """The trace is cut, not the analysis below it; where the question to the teacher does not fit there is no context."""
    policy, prompts, told = make_policy(), Prompts(max_trace_tokens=5), []

    class Says(Fixed):
        def generate(self, model: Any, asked: Any, sampling: Sampling, seed: int) -> Rollouts:
            if sampling.max_new_tokens != 7:
                return super().generate(model, asked, sampling, seed)
            told.extend(asked)
            return Rollouts([tokenizer.encode("why")] * len(asked), [True] * len(asked))

    limit, tokenizer, read = policy.context_length(), policy.load_tokenizer(), []
    assert limit is not None
    examples = [Example("q", "a long trace", "1"), Example("q" * limit, "t", "1"), Example("q", "t", "1")]

    class Reading(FixedTeacher):
        def score(self, scorer: Any, prompts: Any, completions: Any) -> Any:
            read.extend(prompts)
            return super().score(scorer, prompts, completions)

    context = ReasonFirst("{question} {trace}", sampling=Sampling(max_new_tokens=7))
    module = OPSDModule(policy, Reading(), context=context, prompts=prompts, rollouts=Says(), optimizer=sgd)
    trainer = fit(module, 1, tmp_path, BATCH._replace(examples=examples))
    assert (
        told == [prompts.ask(tokenizer, examples[0], "q a lon"), told[1], prompts.ask(tokenizer, examples[2], "q t")]
        and len(told[1]) == 1
    )
    assert "a lon\n\nWhy it holds:\nwhy" in tokenizer.decode(read[0]) and read[1] == PROMPTS[1]
    assert float(trainer.callback_metrics["train/context_missing_fraction"]) == pytest.approx(1 / 3)
    with pytest.raises(UserError, match=mentions("model.context.init_args.sampling.max_new_tokens")):
        OPSDModule(policy, context=ReasonFirst(sampling=Sampling(max_new_tokens=limit))).configure_model()


def test_a_context_is_for_a_teacher_that_reads_it(make_policy: MakePolicy, folders: dict[str, str]) -> None:
    with pytest.raises(UserError, match=mentions("model.teacher", "ModelTeacher")):
        OPSDModule(make_policy(), ModelTeacher(folders["llama"]), context=FeedbackContext())


def test_reason_first_has_the_teachers_weights_write(make_policy: MakePolicy, tmp_path: Path) -> None:
    """Once the student has moved, the analysis is still what the base model writes, and the teacher reads it."""
    read: list[list[list[int]]] = []

    class Reading(FixedTeacher):
        def score(self, scorer: Any, prompts: Any, completions: Any) -> Any:
            read.append(prompts)
            return super().score(scorer, prompts, completions)

    class Engine(RolloutEngine):
        """Fixed rollouts of the student; what else is asked for is sampled."""

        def generate(self, model: Any, prompts: Any, sampling: Sampling, seed: int) -> Rollouts:
            real = TransformersEngine()
            return (Fixed() if prompts == PROMPTS else real).generate(model, prompts, sampling, seed)

    policy, sampling = make_policy(), Sampling(max_new_tokens=12, temperature=0.0)
    module = OPSDModule(
        policy,
        Reading(),
        context=ReasonFirst(sampling=sampling),
        rollouts=Engine(),
        optimizer=lambda p: torch.optim.SGD(p, lr=20.0),
    )
    run(module, 2, tmp_path)
    tokenizer = module.tokenizer
    message = module.context.template.replace("{question}", "q").replace("{trace}", "t")  # type: ignore[union-attr]
    prompt = Prompts().ask(tokenizer, Example("q", "t", "1"), message)

    def written() -> Rollouts:
        return TransformersEngine().generate(module.model, [prompt], sampling, 0)

    with module.model.disable_adapter():
        by_base = written()
    assert written().completions != by_base.completions  # the student would write something else by now
    analysis = tokenizer.decode(by_base.completions[0], skip_special_tokens=True)
    text = f"t\n\nWhy it holds:\n{analysis.strip()}"
    assert read[1] == [Prompts().teacher(tokenizer, BATCH.examples[0], text)] * 3
    assert module.tokens_generated == 2 * (sum(map(len, COMPLETIONS)) + 3 * by_base.tokens)


def test_a_teacher_that_cannot_write_is_refused_where_it_must(make_policy: MakePolicy) -> None:
    for settings in ({"context": ReasonFirst()}, {"evaluate_teacher": True}):
        with pytest.raises(UserError, match=mentions("TrustRegionTeacher")):
            OPSDModule(make_policy(), TrustRegionTeacher(), **settings)  # type: ignore[arg-type]


# -- full fine-tuning --------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::UserWarning:opsd_lightning.methods.checkpoint_record")
@pytest.mark.parametrize("fixed", [FixedTeacher, partial(ModelTeacher, privileged=True)])
def test_full_fine_tuning_equals_the_flat_loss_and_resumes(fixed: Any, make_policy: MakePolicy, tmp_path: Path) -> None:
    policy = make_policy(lora=None)
    start = policy.build()
    with torch.no_grad():
        teacher = torch.cat(distributions(start, TEACHER_PROMPTS))
    flat = flat_run(policy, lambda model, step: kl(teacher, torch.cat(distributions(model, PROMPTS))).mean(), 3)
    module = OPSDModule(policy, fixed(), rollouts=Fixed(), optimizer=sgd)
    run(module, 3, tmp_path)
    theirs = dict(flat.named_parameters())
    moved = 0
    for name, value in module.model.named_parameters():
        torch.testing.assert_close(value, theirs[name], atol=1e-5, rtol=1e-4)
        moved += not torch.equal(value, dict(start.named_parameters())[name])
    assert moved > len(theirs) / 2
    again = OPSDModule(policy, fixed(), rollouts=Fixed(), optimizer=sgd)
    again.on_load_checkpoint({"state_dict": module.state_dict()})
    again.load_state_dict(module.state_dict(), strict=False)
    assert all(torch.equal(a, b) for a, b in zip(again.model.parameters(), module.model.parameters(), strict=True))
    # The copy stays the model that it started from: on a resumed run too it is the untrained one.
    scored = again.teacher.score(Scorer(again.model), TEACHER_PROMPTS, COMPLETIONS)
    torch.testing.assert_close(scored.head(scored.hidden).log_softmax(-1), teacher, atol=1e-4, rtol=1e-4)


def test_full_fine_tuning_samples_for_itself(make_policy: MakePolicy, tmp_path: Path) -> None:
    """With the default engine; greedy completions are those of plain `generate` with the weights just trained."""
    sampling = Sampling(max_new_tokens=6, temperature=0.0)
    module = OPSDModule(make_policy(lora=None), ModelTeacher(privileged=True), sampling=sampling, optimizer=sgd)
    run(module, 2, tmp_path)
    found = module.rollouts.generate(module.model, PROMPTS, sampling, 0)
    for prompt, completion in zip(PROMPTS, found.completions, strict=True):
        plain = module.model.eval().generate(
            torch.tensor([prompt]), max_new_tokens=6, do_sample=False, repetition_penalty=1.0, top_k=None
        )
        assert plain[0, len(prompt) :].tolist()[: len(completion)] == completion


def test_full_fine_tuning_in_half_precision_is_asked_for_by_name(folders: dict[str, str], tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(folders["llama"], dtype=torch.bfloat16).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(folders["llama"]).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=mentions("model.policy.dtype", "float32", "trainer.precision", "bf16-mixed")):
        Policy(str(tmp_path), lora=None).build()
    assert Policy(str(tmp_path), lora=None, dtype="bfloat16").build().dtype == torch.bfloat16
    assert Policy(str(tmp_path), lora=None, dtype="float32").build().dtype == torch.float32
    Policy(str(tmp_path)).build()  # under LoRA the checkpoint's type is right


@pytest.mark.parametrize("method", [SFTModule, GRPOModule, MixedOPSDModule])
def test_every_method_generates_and_learns_in_earnest(method: Any, make_policy: MakePolicy, tmp_path: Path) -> None:
    """With the real engine, sampling anew at every step."""
    module = method(make_policy(), sampling=Sampling(max_new_tokens=6, n=2), optimizer=sgd)
    before: dict[str, torch.Tensor] = {}
    module.on_train_start = lambda: before.update(adapter(module))
    trainer = fit(module, 3, tmp_path, BATCH)
    assert math.isfinite(float(trainer.callback_metrics["train/loss"]))
    if method is not GRPOModule:  # whose reward is 0 for what a random model writes
        assert any(not torch.equal(before[name], value) for name, value in adapter(module).items())
    else:
        assert float(trainer.callback_metrics["train/groups_without_signal"]) == 1


def test_live_teacher_and_student_agree_where_the_context_is_empty(make_policy: MakePolicy, tmp_path: Path) -> None:
    """A teacher with the student's weights and prompt leaves nothing to learn, whatever the method's other parts do."""
    batch = BATCH._replace(teacher=PROMPTS)
    module = OPSDModule(make_policy(), LiveTeacher(), rollouts=Fixed(), optimizer=sgd)
    trainer = fit(module, 2, tmp_path, batch)
    assert abs(float(trainer.callback_metrics["train/forward_kl"])) < 1e-6 and COMPLETIONS[0][-1] == EOS


# -- data --------------------------------------------------------------------------------------------------------------


def test_majority_needs_neither_traces_nor_answers(make_policy: MakePolicy, tmp_path: Path) -> None:
    policy = make_policy()
    questions = write_jsonl(tmp_path / "questions.jsonl", [{"problem": f"{i}?"} for i in range(4)])
    source = FileSource(str(questions), columns=Columns(trace=None))
    sampling = Sampling(max_new_tokens=4, n=2)
    methods = {
        4: OPSDModule(policy, sampling=sampling, context=MajorityContext()),
        0: OPSDModule(policy, sampling=sampling, context=FeedbackContext()),
    }
    for usable, module in methods.items():
        data = OPSDDataModule(policy, train=source, batch_size=2, max_new_tokens=4)
        trainer = one_step(tmp_path)
        with nullcontext() if usable else pytest.raises(UserError, match=mentions("data.train", 4)):
            trainer.fit(module, data)
            assert len(data.rows["train"].examples) == usable


@pytest.mark.parametrize("method", ["opsd", "sft", "mixed", "ask", "grpo", "feedback"])
def test_only_methods_that_read_traces_need_them(method: str, make_policy: MakePolicy, tmp_path: Path) -> None:
    policy = make_policy()
    rows = [
        {"problem": f"{i} and 1?", "solution": "" if i % 2 else f"so \\boxed{{{i + 1}}}", "gold": str(i + 1)}
        for i in range(8)
    ]
    source = FileSource(str(write_jsonl(tmp_path / "rows.jsonl", rows)), columns=Columns(answer="gold"))
    sampling = Sampling(max_new_tokens=4, n=2)
    make: dict[str, Any] = {
        "opsd": lambda: OPSDModule(policy, sampling=sampling),
        "sft": lambda: SFTModule(policy),
        "mixed": lambda: MixedOPSDModule(policy, sampling=sampling, context=MajorityContext()),
        "ask": lambda: OPSDModule(policy, sampling=sampling, context=ReasonFirst(sampling=Sampling(max_new_tokens=4))),
        "grpo": lambda: GRPOModule(policy, sampling=sampling),
        "feedback": lambda: OPSDModule(policy, sampling=sampling, context=FeedbackContext()),
    }
    data = OPSDDataModule(policy, train=source, batch_size=2, max_new_tokens=4)
    trainer = one_step(tmp_path)
    trainer.fit(make[method](), data)
    usable = len(data.rows["train"].examples)
    assert usable == (8 if method in ("grpo", "feedback") else 4)
    assert data.dropped["train"][DropReason.EMPTY_TRACE] == 8 - usable


def test_a_trace_that_does_not_fit_behind_the_students_prompt(make_policy: MakePolicy, tmp_path: Path) -> None:
    """The teacher reads the answer alone, so that the trace is nowhere else measured against the context."""
    policy = make_policy()
    limit = policy.context_length()
    assert limit is not None
    rows = [{"problem": "1?", "solution": "x" * limit + "\\boxed{1}"}, {"problem": "2?", "solution": "so \\boxed{2}"}]
    source = FileSource(str(write_jsonl(tmp_path / "rows.jsonl", rows)))
    for module, reasons in ((SFTModule(policy), 1), (OPSDModule(policy, sampling=Sampling(max_new_tokens=4)), 0)):
        data = OPSDDataModule(policy, train=source, context=AnswerContext(), batch_size=1, max_new_tokens=4)
        trainer = one_step(tmp_path)
        trainer.fit(module, data)
        assert data.dropped["train"][DropReason.TRACE_TOO_LONG] == reasons


def test_full_fine_tuning_writes_a_model(make_policy: MakePolicy, tmp_path: Path) -> None:
    """What `AdapterExport` leaves is a whole model, with the trained weights and a tokenizer."""
    policy = make_policy(lora=None)
    module = OPSDModule(policy, ModelTeacher(privileged=True), rollouts=Fixed(), optimizer=sgd)
    run(module, 2, tmp_path, callbacks=[AdapterExport()])
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    AutoTokenizer.from_pretrained(tmp_path / "adapter")
    for name, value in read.named_parameters():
        assert torch.equal(value, dict(module.model.named_parameters())[name])


def test_vllm_needs_an_adapter(make_policy: MakePolicy) -> None:
    with pytest.raises(UserError, match=mentions("model.policy.lora")):
        VLLMEngine().generate(make_policy(lora=None).build(), PROMPTS, Sampling(), 0)
