"""The page on which teacher and student can be read side by side: some rollouts of a step, token by token.

One HTML file that needs nothing else, no network and no server. Its data stand in it as JSON (see `read_tokens`), which is
also how a resumed run finds the steps before it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

import opsd_lightning
from opsd_lightning.callbacks.schedule import due
from opsd_lightning.distributed.collectives import together
from opsd_lightning.losses.objectives import Update
from opsd_lightning.methods.base import PolicyModule
from opsd_lightning.reports.token_scores import Predictions, score_tokens
from opsd_lightning.runs.reader import RECORD
from opsd_lightning.runs.record import CHECKPOINT_ID, is_of_another_run
from opsd_lightning.types import PositiveInt, PromptBatch, UserError, checked
from opsd_lightning.utils.disk_errors import survived
from opsd_lightning.utils.files import replace, script_json
from opsd_lightning.utils.folders import check_page
from opsd_lightning.utils.loggers import log_figure, log_page, takes_pictures
from opsd_lightning.utils.redaction import redact_text
from opsd_lightning.utils.token_text import Pieces

TOP = 5  # tokens of each role's distribution that are kept
#: What the objective measures of each token, under the names it has there.
MEASURED = ("loss", "forward_kl", "reverse_kl", "student_entropy", "teacher_entropy", "clipped", "clipped_mass")
_DATA = re.compile(r'<script type="application/json" id="data">(.*?)</script>', re.DOTALL)


@checked
class TokenReport(Callback):
    """Writes a page that shows where student and teacher disagree, token by token, on some rollouts of some steps.

    Every token is shaded by the divergence, and tells both roles' probability of it, what else each would have written, the
    entropies and the clip; beside it stand the question, the trace, what the teacher read and the grade. The first step is
    always shown. Weights are those before the step's update. Loggers that take pictures get one of the newest rollouts, and
    those that take pages the page at the end of ``fit``. With ``fast_dev_run`` nothing is written.

    Args:
        every_n_steps: Optimizer steps from one shown step to the next, at least 1. With ``updates_per_batch`` a batch is
            shown that ends at a multiple or passes one, by its first update.
        rows: Completions of a shown step, at least 1: of as many different questions as there are, of the first rank. They
            cost one more scoring pass of the student, in those steps only.
        keep: The page holds this many of the latest shown steps, at least 1.
        max_tokens: Of a longer completion the first so many tokens are shown, at least 1.
        path: The page, relative to the trainer's ``default_root_dir``. A new run replaces it; a resumed one goes on with it.
        pictures: Whether loggers get pictures (needs matplotlib, the extra ``plots``).
    """

    #: Whether it writes to ``default_root_dir`` in a fit, of which `runs.lock` lets one write there at a time.
    writes_to_root = True

    def __init__(
        self,
        every_n_steps: PositiveInt = 25,
        rows: PositiveInt = 4,
        keep: PositiveInt = 20,
        max_tokens: PositiveInt = 512,
        path: str = "tokens.html",
        pictures: bool = True,
    ) -> None:
        self.every_n_steps, self.rows, self.keep = every_n_steps, rows, keep
        self.max_tokens, self.path, self.pictures = max_tokens, path, pictures
        if not str(path).endswith((".html", ".htm")):
            raise UserError(f"TokenReport.path is {path}, and the report is a web page: end it in .html")
        self._steps: list[tuple[int, str]] = []  # the optimizer step, and what is shown of it as JSON
        self._shown: list[dict[str, Any]] | None = None  # rollouts of the step that runs
        self._pieces: Pieces | None = None
        self._begins = False  # whether the run goes on from a checkpoint of another
        self._unwritten = False  # whether the page on disk is older than `_steps`

    # -- hooks -------------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._begins = False
        if stage == "fit":
            page = self._page(trainer)
            together(lambda: check_page(page, "trainer.callbacks.path") if trainer.is_global_zero else None)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._begins = is_of_another_run(Path(trainer.default_root_dir) / RECORD, checkpoint.get(CHECKPOINT_ID))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, PolicyModule)
        self._steps, self._shown, self._unwritten = [], None, False
        if not trainer.is_global_zero:
            return
        self._pieces = Pieces(pl_module.tokenizer)
        page = self._page(trainer)
        if trainer.global_step and page.exists() and not self._begins:
            try:
                earlier = read_tokens(page)["steps"]
                kept = [step for step in earlier if step["step"] <= trainer.global_step][-self.keep :]
                self._steps = [(step["step"], script_json(step)) for step in kept]
            except (UserError, KeyError, TypeError):
                rank_zero_warn(f"{page} holds no token report that could go on: it is begun anew")
        if self.pictures and takes_pictures(trainer.loggers) and find_spec("matplotlib") is None:
            rank_zero_warn(
                "TokenReport draws no pictures for the loggers, because matplotlib is missing: install the extra with "
                "pip install 'opsd-lightning[plots]', or set pictures to false. The page is written all the same"
            )

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        assert isinstance(pl_module, PolicyModule)
        # By the step alone: every rank must come to the same, because under sharding the pass needs them all.
        if pl_module.current is not None and due(trainer, pl_module, self.every_n_steps):
            self._shown = self._look(trainer, pl_module, pl_module.current)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: PromptBatch, batch_idx: int
    ) -> None:
        rollouts, self._shown = self._shown, None
        if not trainer.is_global_zero or rollouts is None or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        assert isinstance(pl_module, PolicyModule) and self._pieces is not None
        step = {
            "step": trainer.global_step,
            "temperature": pl_module.objective.temperature,
            "pieces": self._pieces_of(rollouts),
            "rollouts": rollouts,
        }
        self._steps = [*self._steps, (trainer.global_step, script_json(step))][-self.keep :]
        self._write(trainer, pl_module)
        if self.pictures and takes_pictures(trainer.loggers) and find_spec("matplotlib") is not None:
            from opsd_lightning.reports.token_figure import draw

            log_figure(trainer.loggers, "tokens", draw(step), trainer.global_step)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero and self._steps:
            if self._unwritten:
                assert isinstance(pl_module, PolicyModule)
                self._write(trainer, pl_module)
            log_page(trainer.loggers, "tokens", self._page(trainer), trainer.global_step)

    # -- what is shown -----------------------------------------------------------------------------------------------

    def _look(self, trainer: Trainer, module: PolicyModule, update: Update) -> list[dict[str, Any]]:
        """The rollouts of this step that are shown; nothing on ranks that only take part in the pass."""
        rollouts = update.rollouts
        # The first completion of every question before the second of any.
        order = sorted(range(len(rollouts.completions)), key=lambda row: (row % rollouts.n, row // rollouts.n))
        rows = sorted(order[: self.rows])
        scores = score_tokens(module, update, rows, self.max_tokens, TOP)
        if not trainer.is_global_zero:
            return []
        found = []
        for row, (student, teacher) in zip(rows, scores, strict=True):
            completion, example = rollouts.completions[row], update.batch.examples[row // rollouts.n]
            shown, term = completion[: self.max_tokens], update.terms[0]
            read = None if term.teacher_prompts is None else module.tokenizer.decode(term.teacher_prompts[row])
            measured = {name: update.measured[name][row][: len(shown)] for name in MEASURED if name in update.measured}
            found.append(
                {
                    "row": row,
                    "question": example.question,
                    "trace": example.trace,
                    "reference": example.answer,
                    "student_prompt": redact_text(str(module.tokenizer.decode(update.students[row]))),
                    "teacher_prompt": None if read is None else redact_text(str(read)),
                    **self._grade(module, completion, example.answer),
                    "truncated": not rollouts.terminated[row],
                    "sampled": rollouts.sampled,
                    "length": len(completion),
                    "tokens": list(shown),
                    "joined": {} if self._pieces is None else self._pieces.joined(shown),
                    "unweighted": (term.weights[row][: len(shown)] == 0).nonzero()[:, 0].tolist(),
                    **{name: _numbers(values) for name, values in measured.items()},
                    "student": _predictions(student),
                    "teacher": None if teacher is None else _predictions(teacher),
                }
            )
        return found

    def _grade(self, module: PolicyModule, completion: Sequence[int], reference: str) -> dict[str, Any]:
        grader = module.evaluator.grader
        answer = grader.find_answer(str(module.tokenizer.decode(list(completion), skip_special_tokens=True)))
        if not reference:
            grade = "ungraded"
        elif answer is None:
            grade = "none"
        else:
            grade = "correct" if grader.equal(answer, reference) else "wrong"
        return {"answer": answer, "grade": grade}

    def _pieces_of(self, rollouts: list[dict[str, Any]]) -> dict[int, Any]:
        """How every token that occurs is shown: its text, or text and kind where it is none."""
        assert self._pieces is not None
        seen = {token for rollout in rollouts for token in rollout["tokens"]}
        for rollout in rollouts:
            for role in (rollout["student"], rollout["teacher"]):
                seen |= {token for top in (role["top"] if role else ()) for token in top}
        pieces = {token: self._pieces[token] for token in sorted(seen)}
        return {token: p.text if p.kind == "text" else [p.text, p.kind] for token, p in pieces.items()}

    # -- the page ----------------------------------------------------------------------------------------------------

    def _page(self, trainer: Trainer) -> Path:
        return Path(trainer.default_root_dir) / self.path

    def _write(self, trainer: Trainer, module: PolicyModule) -> None:
        run = {
            "version": opsd_lightning.__version__,
            "model": redact_text(module.policy.model),
            "method": type(module).__name__,
            "objective": type(module.objective).__name__,
            "teacher": type(module.teacher).__name__ if hasattr(module, "teacher") else None,
            "every_n_steps": self.every_n_steps,
        }
        for part in ("divergence", "clip"):
            run[part] = type(getattr(module.objective, part)).__name__ if hasattr(module.objective, part) else None
        data = f'{{"run":{script_json(run)},"steps":[{",".join(text for _, text in self._steps)}]}}'
        self._unwritten = True
        with survived(trainer, self.path):
            replace(self._page(trainer), render(data))
            self._unwritten = False


def render(data: str) -> str:
    """The page with its data, which is JSON as of `script_json`."""
    template = (files("opsd_lightning.reports") / "templates" / "token_report.html").read_text(encoding="utf-8")
    before, after = template.split("{{data}}")
    return before + data + after


def read_tokens(path: str | Path) -> dict[str, Any]:
    """The data of a page of `TokenReport`, for reading in Python.

    Args:
        path: The page.

    Returns:
        ``run`` (model, method, objective) and ``steps``; a step has ``rollouts``, and a rollout the question, prompts, grade
        and, one a token, what was measured, by the objective's names in nats, and each role's ``logprob`` (nats), ``rank``,
        ``top`` (token ids) and ``top_millinats`` (their log-probabilities, in thousandths of a nat). ``pieces`` of a step is
        by token id, a string, its text, or a list of text and kind for one that is no text (see `token_text.Piece`).

    Raises:
        UserError: The file is no such page.
    """
    try:
        found = _DATA.search(Path(path).read_text(encoding="utf-8"))
        if found is not None:
            return json.loads(found[1])
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is no page of TokenReport: {error}") from None
    raise UserError(f"{path} is no page of TokenReport")


def _predictions(found: Predictions) -> dict[str, Any]:
    return {
        "logprob": _numbers(found.logprob),
        "rank": found.rank.tolist(),
        "top": found.top.tolist(),
        "top_millinats": (found.top_logprobs * 1000).nan_to_num(0, 0, -999999).round().long().tolist(),
    }


def _numbers(values: torch.Tensor) -> list[float | None]:
    """Four significant digits of each, which is what a page needs; None for what is no number."""
    return [float(f"{value:.4g}") if math.isfinite(value) else None for value in values.tolist()]
