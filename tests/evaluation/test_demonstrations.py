"""Tests of validation without answers: likelihood and divergence of demonstrations against plain transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.messages import mentions
from helpers.training import metrics, trainer
from opsd_lightning.callbacks.baseline import BaselineEvaluation
from opsd_lightning.callbacks.health import Health
from opsd_lightning.callbacks.rollouts import RolloutWriter
from opsd_lightning.data.datamodule import OPSDDataModule
from opsd_lightning.data.drop_reasons import DropReason
from opsd_lightning.data.sources import ExampleSource
from opsd_lightning.grading.base import Grader
from opsd_lightning.grading.math_grader import MathGrader
from opsd_lightning.grading.no_grader import NoGrader
from opsd_lightning.methods.grpo import GRPOModule
from opsd_lightning.methods.opsd import OPSDModule
from opsd_lightning.methods.sft import SFTModule
from opsd_lightning.models.policy import Policy, base_of
from opsd_lightning.prompts.online_contexts import ReasonFirst
from opsd_lightning.prompts.templates import Prompts
from opsd_lightning.reports.run_report import RunReport
from opsd_lightning.reports.token_report import TokenReport
from opsd_lightning.types import ConfigError, Example, Sampling

pytestmark = pytest.mark.integration

MakePolicy = Callable[..., Policy]
ROWS = [Example(f"Greet {name}.", f"Ahoy, {name}!", "") for name in ("Ada", "Ben", "Caroline", "Dan", "Eve")]
SAMPLING = Sampling(max_new_tokens=4)


class Greetings(ExampleSource):
    def __init__(self, start: int = 0) -> None:
        self.start = start

    def examples(self) -> list[Example]:
        return [row._replace(question=f"{self.start}: {row.question}") for row in ROWS]


def data(policy: Policy, grader: Grader | None = None, **settings: Any) -> OPSDDataModule:
    settings = {"val": Greetings(1), "test": Greetings(2)} | settings
    return OPSDDataModule(
        policy, train=Greetings(), prompts=Prompts("{question}", "{question} {context}"), grader=grader or NoGrader(),
        batch_size=2, eval_batch_size=2, max_new_tokens=4, **settings,
    )  # fmt: skip


def expected(model: Any, rows: Any) -> dict[str, float]:
    """Means over all tokens, each row alone."""
    nll, divergence = [], []
    for student, teacher, trace in zip(rows.student, rows.teacher, rows.traces, strict=True):
        logprobs = []
        for prompt in (student, teacher):
            logits = base_of(model)(input_ids=torch.tensor([[*prompt, *trace]])).logits
            logprobs.append(logits[0, len(prompt) - 1 : -1].log_softmax(-1))
        nll.append(-logprobs[0].gather(-1, torch.tensor(trace)[:, None])[:, 0])
        divergence.append((logprobs[1].exp() * (logprobs[1] - logprobs[0])).sum(-1))
    return {"nll": float(torch.cat(nll).mean()), "divergence": float(torch.cat(divergence).mean())}


def test_values_equal_plain_transformers(make_policy: MakePolicy, tmp_path: Path) -> None:
    policy = make_policy()
    module, rows = OPSDModule(policy, grader=NoGrader(), sampling=SAMPLING), data(policy)
    run = trainer(tmp_path)
    run.validate(module, rows, verbose=False)
    with torch.no_grad():
        values = expected(module.model, rows.rows["val"])
    assert set(run.callback_metrics) == {"val/nll", "val/divergence"} == module.evaluator.names("val")
    for name, value in values.items():
        assert float(run.callback_metrics[f"val/{name}"]) == pytest.approx(value, rel=1e-4)
    ends = policy.end_ids(policy.load_tokenizer())
    assert all(trace[-1] in ends for trace in rows.rows["val"].traces), "the EOS token counts"


def test_training_lowers_the_loss_of_demonstrations(
    make_policy: MakePolicy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With every callback, and a record and pages that can be read."""
    policy = make_policy()
    module = SFTModule(policy, grader=NoGrader(), sampling=SAMPLING, optimizer=lambda p: torch.optim.AdamW(p, lr=0.02))
    callbacks = [BaselineEvaluation(), Health(every_n_steps=1), RolloutWriter(), RunReport()]
    run = trainer(tmp_path, *callbacks, max_steps=12, max_epochs=-1, val_check_interval=6, check_val_every_n_epoch=None,
                  num_sanity_val_steps=-1)  # fmt: skip
    run.fit(module, data(policy))
    assert module.evaluator.names("val") == {"val/nll"}
    logged = [row["val/nll"] for row in metrics(tmp_path) if "val/nll" in row]
    assert len(logged) == 3 and logged[-1] < logged[0]
    run.test(module, data(policy), verbose=False)
    assert "test/nll" in run.callback_metrics and (tmp_path / "report.html").exists()
    assert "test.jsonl" not in capsys.readouterr().out, "no completion was sampled"


def test_opsd_without_grades_trains_with_all_callbacks(make_policy: MakePolicy, tmp_path: Path) -> None:
    policy = make_policy()
    module = OPSDModule(policy, grader=NoGrader(), sampling=SAMPLING)
    run = trainer(tmp_path, Health(every_n_steps=1), TokenReport(every_n_steps=1), RunReport(), max_steps=2)
    run.fit(module, data(policy))
    assert "val/divergence" in run.callback_metrics and "health/accuracy" not in run.callback_metrics
    predicted = run.predict(module, data(policy))[0]
    assert all(record["correct"] is None and record["score"] is None and record["completion"] for record in predicted)


@pytest.mark.parametrize(
    ("make", "setting"),
    [
        (lambda policy: GRPOModule(policy, grader=NoGrader()), "GRPOModule"),
        (lambda policy: OPSDModule(policy, grader=NoGrader(), evaluate_teacher=True), "model.evaluate_teacher"),
        (lambda policy: OPSDModule(policy, grader=NoGrader(), learn_from="wrong"), "model.learn_from"),
    ],
)
def test_what_needs_grades_is_refused(make: Callable[[Policy], Any], setting: str, make_policy: MakePolicy) -> None:
    with pytest.raises(ConfigError, match=mentions("data.grader", "NoGrader", setting)):
        make(make_policy())


def test_a_context_of_each_step_has_no_divergence(make_policy: MakePolicy) -> None:
    module = OPSDModule(make_policy(), grader=NoGrader(), context=ReasonFirst())
    assert module.evaluator.names("val") == {"val/nll"}


@pytest.mark.parametrize("verify", [True, False])
def test_verification_is_a_choice(verify: bool, make_policy: MakePolicy, caplog: pytest.LogCaptureFixture) -> None:
    """Demonstrations have no final answer for the default grader: dropped, with the first row shown, or kept."""
    rows = data(make_policy(), MathGrader(), verify=verify, val=None, test=None)
    if verify:
        with pytest.raises(
            ConfigError, match=mentions("data.train", "data.grader", "data.verify", "0: Greet Ada.", "Ahoy, Ada!")
        ):
            rows.setup("fit")
        assert rows.dropped["train"] == {DropReason.NO_FINAL_ANSWER: 5}
    else:
        rows.setup("fit")
        assert len(rows.rows["train"].examples) == 5 and not rows.dropped["train"]


def test_rows_without_an_answer_are_no_validation_questions(make_policy: MakePolicy) -> None:
    """With verification off, a grader still cannot grade them: all would count as wrong."""
    rows = data(make_policy(), MathGrader(), verify=False)
    with pytest.raises(ConfigError, match=mentions("data.val", "data.grader", "NoGrader", "data.verify: true")):
        rows.setup("fit")
    assert rows.dropped["val"] == {DropReason.NO_ANSWER: 5}


@pytest.mark.parametrize(
    ("grader", "template", "told"),
    [(NoGrader(), None, True), (NoGrader(), "{question}", False), (MathGrader(), None, False)],
)
def test_a_request_that_the_grader_does_not_read_is_reported(
    grader: Grader, template: str | None, told: bool, make_policy: MakePolicy, caplog: pytest.LogCaptureFixture
) -> None:
    r"""Style demonstrations whose prompts ask for \boxed{}: the default prompts are those of mathematics."""
    rows = data(make_policy(), grader, verify=False, val=None, test=None)
    rows.prompts = Prompts(template, "{question} {context}")
    with caplog.at_level("INFO"):
        rows.setup("fit")
    assert ("data.prompts.student_template" in caplog.text) == told
    rows.prompts, rows.grader = Prompts(), NoGrader()
    chat = [{"role": "user", "content": "Greet Ada."}]
    assert not rows.asks_for_unread_boxes([ROWS[0]._replace(messages=chat)])  # conversations are asked as they are
