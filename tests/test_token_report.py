"""The token report: its numbers against a reference by hand, what it survives, that training does not notice it, and the
page in a real browser."""

from __future__ import annotations

import json
import math
import string
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from browser import Browser, browser, needs_browser
from conftest import CHAT_TEMPLATE, EOS, make_tokenizer, write_jsonl
from opsd_lightning import token_report
from opsd_lightning.data import OPSDDataModule
from opsd_lightning.grpo import GRPOModule
from opsd_lightning.module import OPSDModule
from opsd_lightning.objectives import DivergenceObjective
from opsd_lightning.policy import LoRA, Policy, base_of, evaluating
from opsd_lightning.rollouts import Sampling
from opsd_lightning.sft import SFTModule
from opsd_lightning.shaping import TokenClip
from opsd_lightning.sources import FileSource
from opsd_lightning.teachers import EMATeacher, LiveTeacher, TrustRegionTeacher
from opsd_lightning.token_figure import draw
from opsd_lightning.token_report import TokenReport, read_tokens
from opsd_lightning.token_text import Pieces
from opsd_lightning.types import UserError
from test_distributed import STRATEGIES, both, on_ranks, run
from test_distributed import parts as ranks_parts
from test_training import adapters, parts, trainer

NASTY = "</script><script>alert(1)</script><!-- <b>&amp; \u2028\u2029 \u202eleft $x_1^2$ 'q' \"q\" \\ {{data}} 答え 😀"


class ByHand(Callback):
    """Both roles' log-probabilities of every completion token, from the model's own forward pass; the step's measurements."""

    def __init__(self) -> None:
        self.steps: list[list[dict[str, Any]]] = []
        self.outputs: list[Any] = []

    @torch.no_grad()
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        if (now := pl_module.current) is None:
            return
        rows = []
        for row, completion in enumerate(now.rollouts.completions):
            found = {"completion": completion, "example": now.batch.examples[row // now.rollouts.n]}
            for role in ("student", "teacher"):
                prompts = now.students if role == "student" else now.terms[0].teacher_prompts
                if prompts is None or not completion:
                    continue
                with evaluating(pl_module.model):
                    ids = torch.tensor([[*prompts[row], *completion]])
                    if role == "teacher":
                        with pl_module.model.disable_adapter():
                            logits = base_of(pl_module.model)(ids).logits[0]
                    else:
                        logits = base_of(pl_module.model)(ids).logits[0]
                scaled = logits[len(prompts[row]) - 1 : -1].double() / pl_module.objective.temperature
                found[role] = scaled.log_softmax(-1)
            rows.append(found)
        self.steps.append(rows)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, *args: Any) -> None:
        self.outputs.append(outputs)


def check_role(shown: dict[str, Any], logprobs: torch.Tensor, tokens: list[int]) -> None:
    """What is shown of a role's distributions against them."""
    for place, (token, row) in enumerate(zip(tokens, logprobs, strict=True)):
        assert shown["logprob"][place] == pytest.approx(float(row[token]), rel=1e-3, abs=1e-4)
        rank = 1 + int((row > row[token] + 1e-6).sum())
        assert rank <= shown["rank"][place] <= int((row >= row[token] - 1e-6).sum())
        values, ids = row.topk(5)
        assert shown["top_millinats"][place] == pytest.approx((1000 * values).tolist(), abs=1)
        if (values[:-1] - values[1:]).min() > 1e-4:  # no tie
            assert shown["top"][place][:-1] == ids.tolist()[:-1]


def test_the_page_holds_what_the_models_computed(make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    """Probabilities and likeliest tokens by hand, at the temperature of the loss; divergences as the step measured them."""
    objective = DivergenceObjective(clip=TokenClip(0.5), temperature=1.7, skip_first_tokens=1, logits_memory_mib=1)
    module, data = parts(make_policy(lora=LoRA(r=4, alpha=8, dropout=0.3)), objective=objective)
    reference = ByHand()
    trainer(tmp_path, TokenReport(every_n_steps=2, rows=3, max_tokens=6), reference, max_steps=5).fit(module, data)
    page = read_tokens(tmp_path / "tokens.html")
    assert page["run"]["method"] == "OPSDModule" and page["run"]["clip"] == "TokenClip"
    assert [step["step"] for step in page["steps"]] == [1, 2, 4]
    tokenizer, clipped = make_tokenizer(), 0
    for step in page["steps"]:
        rows, outputs = reference.steps[step["step"] - 1], reference.outputs[step["step"] - 1]
        assert step["temperature"] == 1.7
        # Two completions of each of two questions: the first of both come before a second.
        assert [shown["row"] for shown in step["rollouts"]] == [0, 1, 2]
        for shown in step["rollouts"]:
            found = rows[shown["row"]]
            tokens = found["completion"][:6]
            assert shown["tokens"] == tokens and shown["length"] == len(found["completion"])
            assert shown["question"] == found["example"].question and shown["trace"] == found["example"].trace
            assert found["example"].trace.split()[0] in shown["teacher_prompt"]
            assert shown["truncated"] == (found["completion"][-1] not in (EOS, EOS + 1))
            for role in ("student", "teacher"):
                check_role(shown[role], found[role][:6], tokens)
            for name in token_report.MEASURED:
                expected = outputs["measured"][name][shown["row"]][:6].tolist()
                assert shown[name] == pytest.approx(expected, rel=1e-3, abs=1e-7), name
            # Dropout is in what the step measured, and not in the probabilities.
            by_hand = (found["teacher"].exp() * (found["teacher"] - found["student"])).sum(-1)
            assert shown["forward_kl"] == pytest.approx(by_hand[:6].tolist(), rel=0.8, abs=0.5)
            clipped += sum(shown["clipped"])
            assert shown["unweighted"] == [0]
            for token in tokens:
                piece = step["pieces"][str(token)]
                assert (piece if isinstance(piece, str) else piece[0]) == tokenizer.decode([token])
    assert clipped > 0


@pytest.mark.parametrize("teacher", [LiveTeacher(), EMATeacher(0.5), TrustRegionTeacher(0.3)], ids=["live", "ema", "trust"])
def test_probabilities_give_the_measured_divergence(teacher: Any, make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    """Without dropout both agree, whatever teacher; of a batch with several updates the first is shown."""
    module, data = parts(make_policy(), teacher=teacher, updates_per_batch=2)
    seen: list[Any] = []

    class Keep(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, *args: Any) -> None:
            seen.append((trainer.global_step, outputs["measured"]))

    trainer(tmp_path, TokenReport(every_n_steps=3, rows=2), Keep(), max_steps=7).fit(module, data)
    steps = read_tokens(tmp_path / "tokens.html")["steps"]
    # Batches end at 2, 4, 6 and 7; the first is shown, and those that end at or pass 3 and 6.
    assert [step for step, _ in seen] == [2, 4, 6, 7]
    assert [step["step"] for step in steps] == [2, 4, 6]
    for step, (_, measured) in zip(steps, seen, strict=False):
        for shown in step["rollouts"]:
            for role in ("student", "teacher"):
                expected = measured[f"{role}_logprob"][shown["row"]].tolist()
                assert shown[role]["logprob"] == pytest.approx(expected, rel=2e-3, abs=1e-4)


@pytest.mark.parametrize("method", [SFTModule, GRPOModule])
def test_methods_without_a_teacher(method: Any, make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    _, data = parts(make_policy())
    module = method(make_policy(), sampling=Sampling(max_new_tokens=8, n=2))
    trainer(tmp_path, TokenReport(rows=2), max_steps=1).fit(module, data)
    (step,) = read_tokens(tmp_path / "tokens.html")["steps"]
    for shown in step["rollouts"]:
        assert shown["teacher"] is None and shown["teacher_prompt"] is None and "forward_kl" not in shown
        assert shown["sampled"] == (method is GRPOModule)
        if method is SFTModule:
            assert shown["grade"] == "correct"
            assert [-v for v in shown["loss"]] == pytest.approx(shown["student"]["logprob"], rel=2e-3, abs=1e-4)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_does_not_notice(checkpointing: bool, make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    """Weights bit for bit, with dropout, sampling, several updates on a batch and gradient checkpointing."""
    policy = make_policy(lora=LoRA(r=4, alpha=8, dropout=0.3), gradient_checkpointing=checkpointing)
    found = []
    for callbacks in ((), (TokenReport(every_n_steps=1, rows=3, max_tokens=5),)):
        torch.manual_seed(0)
        module, data = parts(policy, updates_per_batch=2)
        trainer(tmp_path, *callbacks, max_steps=4).fit(module, data)
        found.append((adapters(module), torch.rand(3)))
    (plain, drawn), (watched, still_drawn) = found
    assert all(torch.equal(value, watched[name]) for name, value in plain.items()) and torch.equal(drawn, still_drawn)


@both
def test_ranks_train_the_same_with_it(strategy: str, make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    """Also where ranks have different numbers of passes to make; one page is written, of the first rank."""
    policy = make_policy()
    settings = {"teacher": EMATeacher(0.8), "token_budget": 60}

    def work(rank: int) -> Any:
        plain = run(policy, tmp_path / "plain", 2, STRATEGIES[strategy], **settings)
        torch.distributed.destroy_process_group()
        report = TokenReport(every_n_steps=2, rows=5)
        return plain, run(policy, tmp_path / "watched", 2, STRATEGIES[strategy], callbacks=[report], **settings)

    for plain, watched in on_ranks(work, tmp_path):
        assert plain.losses == watched.losses
        for ours, theirs in zip(plain.weights, watched.weights, strict=True):
            assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    steps = read_tokens(tmp_path / "watched" / "tokens.html")["steps"]
    assert [step["step"] for step in steps] == [1, 2] and all(len(step["rollouts"]) == 5 for step in steps)
