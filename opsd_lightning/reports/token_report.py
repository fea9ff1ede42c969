"""Callback `TokenReport`: an HTML page that compares teacher and student token by token on some rollouts.

The page is one file that needs no network and no server. It holds its data as JSON (see `read_tokens`), from which a resumed
run also reads the earlier steps.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import quote

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

import opsd_lightning
from opsd_lightning.callbacks.schedule import is_due
from opsd_lightning.distributed.collectives import run_on_all_ranks
from opsd_lightning.methods.base import PolicyModule
from opsd_lightning.methods.step import StepCallback, StepRecord
from opsd_lightning.reports.html import check_extension, relative_path, render_template
from opsd_lightning.reports.repeated_questions import RepeatedQuestions
from opsd_lightning.reports.run_report import RunReport
from opsd_lightning.reports.token_data import TOP, MeasuredCompletion, completion_data, pieces_of
from opsd_lightning.reports.token_scores import score_tokens
from opsd_lightning.rollouts.base import Demand
from opsd_lightning.runs.reader import RECORD_FOLDER
from opsd_lightning.runs.record import CHECKPOINT_ID, belongs_to_another_run
from opsd_lightning.types import Example, NonNegativeInt, PositiveInt, PromptBatch, UserError, checked
from opsd_lightning.utils.disk_errors import warn_on_write_error
from opsd_lightning.utils.files import atomic_write, script_json
from opsd_lightning.utils.folders import check_page
from opsd_lightning.utils.loggers import accepts_figures, log_figure, log_page
from opsd_lightning.utils.redaction import redact_text
from opsd_lightning.utils.token_text import Pieces

_DATA = re.compile(r'<script type="application/json" id="data">(.*?)</script>', re.DOTALL)


@checked
class TokenReport(StepCallback):
    """Callback that writes an HTML page with the disagreement of student and teacher at each token of some rollouts.

    Each token is shaded by its divergence. The page shows the probability that each role gives the token, the most probable
    tokens of each role, entropies and clip, and for each rollout its question, trace, prompts and grade. The first step is
    always shown. All values are from before the step's update, so that those of the first step are from before training.
    Loggers that accept images get a figure of each shown step, and loggers that accept HTML pages get the page at the end of
    ``fit``. With ``fast_dev_run`` nothing is written.

    Args:
        every_n_steps: Number of optimizer steps between shown steps, at least 1. With ``updates_per_batch`` above 1, a batch
            is shown at its first update if its updates reach or pass a multiple of this number.
        rows: Number of completions to show of a step, at least 1. They are of the first rank and of as many questions as
            possible. They need one more scoring pass of the student in the steps that are shown.
        keep: Number of latest shown steps to keep on the page, at least 1.
        max_tokens: Number of first tokens to show of a completion, at least 1.
        path: Path of the page, relative to the trainer's ``default_root_dir``. A new run replaces the page. A resumed run
            adds to it.
        pictures: If True, loggers get figures. Needs matplotlib (extra ``plots``).
        repeated_questions: Number of training questions to sample again at each shown step, in addition to ``rows``. The
            page shows each of them across the steps. ``model.seed`` chooses them, so that a resumed run has the same. They
            are sampled with ``model.sampling`` and the same random numbers at each step, and scored without dropout. Each
            costs one completion (``model.sampling.n`` with ``model.context``) and a scoring pass of both roles. Needs an
            `OPSDDataModule`. Defaults to 0.

    Raises:
        ConfigError: ``path`` is not that of an HTML page, or ``fit`` has no data for ``repeated_questions``.

    Example::

        >>> from opsd_lightning import TokenReport
        >>> report = TokenReport(every_n_steps=10, rows=2, path="tokens.html", pictures=False)

        After a run, read the data of the page with ``read_tokens("tokens.html")``.
    """

    #: True for callbacks that write to ``default_root_dir`` in ``fit``. `runs.lock` allows one such run at a time.
    writes_to_root = True

    def __init__(
        self,
        every_n_steps: PositiveInt = 25,
        rows: PositiveInt = 4,
        keep: PositiveInt = 20,
        max_tokens: PositiveInt = 512,
        path: str = "tokens.html",
        pictures: bool = True,
        repeated_questions: NonNegativeInt = 0,
    ) -> None:
        self.every_n_steps, self.rows, self.keep = every_n_steps, rows, keep
        self.max_tokens, self.path, self.pictures = max_tokens, path, pictures
        self.repeated_questions = repeated_questions
        check_extension(path, "TokenReport")
        self._steps: list[tuple[int, str]] = []  # the optimizer step, and its data as JSON
        self._repeated: RepeatedQuestions | None = None
        self._again: list[dict[str, Any]] = []  # rollouts of the repeated questions at the current step
        self._shown: list[dict[str, Any]] | None = None  # rollouts of the current step
        self._pieces: Pieces | None = None
        self._is_new = False  # True if the run starts from a checkpoint of another run
        self._unwritten = False  # True if the page on disk is older than `_steps`

    # -- hooks -------------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._begins = False
        if stage == "fit":
            page = self._page(trainer)
            run_on_all_ranks(lambda: check_page(page, "trainer.callbacks.path") if trainer.is_global_zero else None)
            self._repeated = None
            if self.repeated_questions:
                self._repeated = RepeatedQuestions(trainer, pl_module, self.repeated_questions)

    def demand(self, stage: str) -> list[Demand]:
        """Return the largest rollout of the repeated questions, for engines that reserve room. Called after `setup`."""
        return [self._repeated.demand()] if stage == "fit" and self._repeated is not None else []

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._is_new = belongs_to_another_run(Path(trainer.default_root_dir) / RECORD_FOLDER, checkpoint.get(CHECKPOINT_ID))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, PolicyModule)
        self._steps, self._shown, self._again, self._unwritten = [], None, [], False
        if not trainer.is_global_zero:
            return
        self._pieces = Pieces(pl_module.tokenizer)
        page = self._page(trainer)
        if trainer.global_step and page.exists() and not self._is_new:
            try:
                earlier = read_tokens(page)["steps"]
                kept = [step for step in earlier if step["step"] <= trainer.global_step][-self.keep :]
                self._steps = [(step["step"], script_json(step)) for step in kept]
            except (UserError, KeyError, TypeError):
                rank_zero_warn(f"{page} has no data of a token report, and is replaced instead of extended")
        if self.pictures and accepts_figures(trainer.loggers) and find_spec("matplotlib") is None:
            rank_zero_warn(
                "TokenReport writes the page but draws no figures for the loggers, because matplotlib is not installed: run "
                "pip install 'opsd-lightning[plots]', or set trainer.callbacks.pictures to false"
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        assert isinstance(pl_module, PolicyModule)
        if self._repeated is not None and is_due(trainer, pl_module, self.every_n_steps):
            # Every rank samples and scores the questions, since a pass of a sharded model needs all ranks.
            completions = self._repeated.measure(trainer, pl_module)
            self._again = [self._described(pl_module, each) for each in completions] if trainer.is_global_zero else []

    def on_step_scored(self, trainer: Trainer, pl_module: PolicyModule, record: StepRecord) -> None:
        # The condition is the same on every rank, since a pass of a sharded model needs all ranks.
        if is_due(trainer, pl_module, self.every_n_steps):
            self._shown = self._rollout_data(trainer, pl_module, record)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: PromptBatch, batch_idx: int
    ) -> None:
        rollouts, self._shown, again, self._again = self._shown, None, self._again, []
        if not trainer.is_global_zero or rollouts is None or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        rollouts = [*again, *rollouts]
        assert isinstance(pl_module, PolicyModule) and self._pieces is not None
        step = {
            "step": trainer.global_step,
            "temperature": pl_module.objective.temperature,
            "pieces": pieces_of(self._pieces, rollouts),
            "rollouts": rollouts,
        }
        self._steps = [*self._steps, (trainer.global_step, script_json(step))][-self.keep :]
        self._write(trainer, pl_module)
        if self.pictures and accepts_figures(trainer.loggers) and find_spec("matplotlib") is not None:
            from opsd_lightning.reports.token_figure import draw

            log_figure(trainer.loggers, "tokens", draw(step), trainer.global_step)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero and self._steps:
            if self._unwritten:
                assert isinstance(pl_module, PolicyModule)
                self._write(trainer, pl_module)
            log_page(trainer.loggers, "tokens", self._page(trainer), trainer.global_step)

    # -- data of a step ----------------------------------------------------------------------------------------------

    def _rollout_data(self, trainer: Trainer, module: PolicyModule, record: StepRecord) -> list[dict[str, Any]]:
        """Return the data of the rollouts to show. Other ranks than the first only take part in the scoring pass."""
        rollouts = record.rollouts
        # The first completions of all questions come before the second ones.
        order = sorted(range(len(rollouts.completions)), key=lambda row: (row % rollouts.n, row // rollouts.n))
        rows = sorted(order[: self.rows])
        scores = score_tokens(module, record, rows, self.max_tokens, TOP)
        if not trainer.is_global_zero:
            return []
        found = []
        for row, shown in zip(rows, scores, strict=True):
            term = record.terms[0]
            completion = MeasuredCompletion(
                row,
                record.batch.examples[row // rollouts.n],
                rollouts.completions[row],
                rollouts.terminated[row],
                record.student_prompts[row],
                None if term.teacher_prompts is None else term.teacher_prompts[row],
                term.weights[row],
                {name: values[row] for name, values in record.measured.items()},
                shown,
                rollouts.sampled,
            )
            found.append(self._described(module, completion))
        return found

    def _described(self, module: PolicyModule, found: MeasuredCompletion) -> dict[str, Any]:
        """Return the data of a completion. Call it on the first rank."""
        assert self._pieces is not None
        decode = module.tokenizer.decode
        read = None if found.teacher_prompt is None else redact_text(str(decode(found.teacher_prompt)))
        return {
            "row": found.row,
            "repeated": found.repeated,
            "question": found.example.question,
            "trace": found.example.trace,
            "reference": module.evaluator.grader.shown_reference(found.example),
            "student_prompt": redact_text(str(decode(found.student_prompt))),
            "teacher_prompt": read,
            **self._grade(module, found.completion, found.example),
            "truncated": not found.terminated,
            "sampled": found.sampled,
            **completion_data(self._pieces, found.completion, self.max_tokens, found.weights, found.measured, found.scores),
        }

    def _grade(self, module: PolicyModule, completion: Sequence[int], example: Example) -> dict[str, Any]:
        grader = module.evaluator.grader
        if not grader.can_grade(example):
            return {"answer": None, "grade": "ungraded"}
        text = str(module.tokenizer.decode(list(completion), skip_special_tokens=True))
        (found,) = grader.grades([text], [example])
        right = grader.is_right(found.score)
        grade = "correct" if right else "none" if found.answer is None else "wrong"
        return {"answer": found.answer, "grade": grade}

    # -- the page ----------------------------------------------------------------------------------------------------

    def _page(self, trainer: Trainer) -> Path:
        return Path(trainer.default_root_dir) / self.path

    def _report(self, trainer: Trainer) -> str | None:
        """Return the address of the run's report, relative to the page, or None if the run writes none."""
        root = Path(trainer.default_root_dir)
        reports = [callback for callback in trainer.callbacks if isinstance(callback, RunReport)]  # type: ignore[attr-defined]
        return quote(relative_path(root / reports[0].path, self._page(trainer).parent)) if reports else None

    def _write(self, trainer: Trainer, module: PolicyModule) -> None:
        run = {
            "version": opsd_lightning.__version__,
            "model": redact_text(module.policy.model),
            "method": type(module).__name__,
            "objective": type(module.objective).__name__,
            "teacher": type(module.teacher).__name__ if hasattr(module, "teacher") else None,
            "every_n_steps": self.every_n_steps,
            "report": self._report(trainer),
        }
        for part in ("divergence", "clip"):
            run[part] = type(getattr(module.objective, part)).__name__ if hasattr(module.objective, part) else None
        data = f'{{"run":{script_json(run)},"steps":[{",".join(text for _, text in self._steps)}]}}'
        self._unwritten = True
        with warn_on_write_error(trainer, self.path):
            atomic_write(self._page(trainer), render_template("token_report.html", data))
            self._unwritten = False


def read_tokens(path: str | Path) -> dict[str, Any]:
    """Read the data of a page of `TokenReport`.

    Args:
        path: Path of the page.

    Returns:
        ``run`` (model, method, objective) and ``steps``. A step has ``rollouts`` and ``pieces``. A rollout has its question,
        prompts and grade, ``repeated`` (True for a question of ``repeated_questions``, the first rollouts of each step), the
        objective's measurements of each token (in nats), and for each role the ``logprob`` (nats) and
        ``rank`` of each token, the ids ``top`` of the most probable tokens, and their log-probabilities ``top_millinats``
        (thousandths of a nat). ``pieces`` has the text of each token id, or a list of text and kind for tokens of other
        kinds than text (see `token_text.Piece`).

    Raises:
        UserError: The file is not a page of `TokenReport`.
    """
    try:
        found = _DATA.search(Path(path).read_text(encoding="utf-8"))
        if found is not None:
            return json.loads(found[1])
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a page of TokenReport: {error}") from None
    raise UserError(f"{path} is not a page of TokenReport")
