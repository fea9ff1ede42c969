"""Tests of the token report: its numbers, resumed runs, unchanged training, and the page in a browser."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from helpers.browser import Browser, browser, needs_browser
from helpers.distributed import STRATEGIES, FirstHalfSilent, both, run
from helpers.files import write_jsonl
from helpers.messages import mentions
from helpers.models import CHAT_TEMPLATE, EOS, make_tokenizer
from helpers.processes import on_ranks
from helpers.training import adapters, metrics, parts, trainer
from opsd_lightning.data.datamodule import OPSDDataModule
from opsd_lightning.data.sources import Columns, FileSource
from opsd_lightning.losses.clips import TokenClip
from opsd_lightning.losses.objectives import DivergenceObjective
from opsd_lightning.methods.base import PolicyModule
from opsd_lightning.methods.grpo import GRPOModule
from opsd_lightning.methods.opsd import OPSDModule
from opsd_lightning.methods.sft import SFTModule
from opsd_lightning.methods.step import StepCallback, StepRecord
from opsd_lightning.models.policy import LoRA, Policy, base_of, evaluating
from opsd_lightning.prompts.online_contexts import CritiqueContext, FeedbackContext, MajorityContext
from opsd_lightning.prompts.templates import Prompts
from opsd_lightning.reports.html import render_template
from opsd_lightning.reports.repeated_questions import choose_questions
from opsd_lightning.reports.token_data import MEASURED
from opsd_lightning.reports.token_figure import draw
from opsd_lightning.reports.token_report import TokenReport, read_tokens
from opsd_lightning.rollouts.base import RolloutEngine
from opsd_lightning.teachers import EMATeacher, LiveTeacher, TrustRegionTeacher
from opsd_lightning.types import ConfigError, Example, PromptBatch, Rollouts, Sampling, UserError
from opsd_lightning.utils.files import script_json
from opsd_lightning.utils.token_text import Pieces

pytestmark = pytest.mark.integration


NASTY = "</script><script>alert(1)</script><!-- <b>&amp; \u2028\u2029 \u202eleft $x_1^2$ 'q' \"q\" \\ {{data}} 答え 😀"


class ByHand(StepCallback):
    """Both roles' log-probabilities of every completion token, from the model's own forward pass; the step's measurements."""

    def __init__(self) -> None:
        self.steps: list[list[dict[str, Any]]] = []
        self.outputs: list[Any] = []

    @torch.no_grad()
    def on_step_scored(self, trainer: Trainer, pl_module: Any, now: StepRecord) -> None:
        rows = []
        for row, completion in enumerate(now.rollouts.completions):
            found = {"completion": completion, "example": now.batch.examples[row // now.rollouts.n]}
            for role in ("student", "teacher"):
                prompts = now.student_prompts if role == "student" else now.terms[0].teacher_prompts
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
            for name in MEASURED:
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
def test_probabilities_give_the_measured_divergence(
    teacher: Any, make_policy: Callable[..., Policy], tmp_path: Path
) -> None:
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
def test_methods_without_a_teacher_show_the_student_alone(
    method: Any, make_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    _, data = parts(make_policy())
    module = method(make_policy(), sampling=Sampling(max_new_tokens=8, n=2))
    trainer(tmp_path, TokenReport(rows=2, repeated_questions=1), max_steps=1).fit(module, data)
    (step,) = read_tokens(tmp_path / "tokens.html")["steps"]
    assert [shown["repeated"] for shown in step["rollouts"]] == [True, False, False]
    for shown in step["rollouts"]:
        assert shown["teacher"] is None and shown["teacher_prompt"] is None and "forward_kl" not in shown
        assert shown["sampled"] == (method is GRPOModule or shown["repeated"])
        if not shown["sampled"]:
            assert shown["grade"] == "correct"
        if method is SFTModule:
            assert [-v for v in shown["loss"]] == pytest.approx(shown["student"]["logprob"], rel=2e-3, abs=1e-4)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_is_unchanged_by_the_report(
    checkpointing: bool, make_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    """Weights bit for bit, with dropout, sampling, several updates on a batch and gradient checkpointing."""
    policy = make_policy(lora=LoRA(r=4, alpha=8, dropout=0.3), gradient_checkpointing=checkpointing)
    found = []
    for callbacks in ((), (TokenReport(every_n_steps=1, rows=3, max_tokens=5, repeated_questions=3),)):
        torch.manual_seed(0)
        module, data = parts(policy, updates_per_batch=2)
        trainer(tmp_path, *callbacks, max_steps=4).fit(module, data)
        found.append((adapters(module), torch.rand(3)))
    (plain, drawn), (watched, still_drawn) = found
    assert all(torch.equal(value, watched[name]) for name, value in plain.items()) and torch.equal(drawn, still_drawn)


@both
def test_ranks_train_the_same_with_the_report(strategy: str, make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    """The second has only empty completions, and fewer passes to make. Under sharding the head, which trains here, must not
    stay gathered from the look at it to the next step. One page is written, of the first rank."""
    policy = make_policy(lora=LoRA(r=4, alpha=8, dropout=0.3, target_modules=["q_proj", "lm_head"]))

    def settings(rank: int) -> dict[str, Any]:
        return {"teacher": EMATeacher(0.8), "token_budget": 60, "rollouts": FirstHalfSilent(1 - rank)}

    def work(rank: int) -> Any:
        return run(policy, tmp_path / "plain", 2, STRATEGIES[strategy], **settings(rank))

    def watched(rank: int) -> Any:
        report = TokenReport(every_n_steps=2, rows=5, repeated_questions=3)
        return run(policy, tmp_path / "watched", 2, STRATEGIES[strategy], callbacks=[report], **settings(rank))

    for ours, theirs in zip(on_ranks(work, tmp_path), on_ranks(watched, tmp_path), strict=True):
        assert ours.losses == theirs.losses and ours.completions == theirs.completions
        for mine, other in zip(ours.weights, theirs.weights, strict=True):
            assert all(torch.equal(value, other[name]) for name, value in mine.items())
    steps = read_tokens(tmp_path / "watched" / "tokens.html")["steps"]
    assert [step["step"] for step in steps] == [1, 2]
    assert all([shown["repeated"] for shown in step["rollouts"]] == 3 * [True] + 5 * [False] for step in steps)


def test_the_latest_steps_are_kept_and_a_resumed_run_goes_on(make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    policy, saved = make_policy(), ModelCheckpoint(tmp_path, filename="at", every_n_train_steps=3)

    def fit(steps: int, *callbacks: Callback, **more: Any) -> list[dict[str, Any]]:
        torch.manual_seed(0)
        module, data = parts(policy)
        report = TokenReport(every_n_steps=1, rows=1, keep=4, path="out/tokens.html", repeated_questions=1)
        trainer(tmp_path, report, *callbacks, max_steps=steps).fit(module, data, weights_only=True, **more)
        assert not list(tmp_path.glob("out/.*"))  # nothing half-written
        return read_tokens(tmp_path / "out" / "tokens.html")["steps"]

    whole = fit(6)
    assert [step["step"] for step in whole] == [3, 4, 5, 6]
    first = fit(5, saved)  # its steps after the checkpoint did not happen, for the run that resumes
    assert [step["step"] for step in first] == [2, 3, 4, 5]
    assert fit(6, ckpt_path=tmp_path / "at.ckpt") == whole
    (tmp_path / "out" / "tokens.html").write_text('<meta name="generator" content="opsd-lightning"><p>damaged</p>')
    with pytest.warns(UserWarning, match=r"tokens\.html"):
        assert fit(6, ckpt_path=tmp_path / "at.ckpt") == whole[1:]
    assert [step["step"] for step in fit(1)] == [1]  # a run of its own


def test_unusable_settings_are_refused() -> None:
    for settings in ({"every_n_steps": 0}, {"rows": 0}, {"keep": 0}, {"max_tokens": 0}, {"repeated_questions": -1}):
        with pytest.raises((TypeError, ValueError)):
            TokenReport(**settings)  # type: ignore[arg-type]
    with pytest.raises(ConfigError) as refused:
        TokenReport(path="tokens.json")
    assert refused.value.setting == "trainer.callbacks.path"
    for found in ("nowhere.html", __file__):
        with pytest.raises(UserError, match=re.escape(found)):
            read_tokens(found)


def test_command_line_accepts_the_short_name(folders: dict[str, str], tmp_path: Path) -> None:
    from opsd_lightning.cli.command import main

    main(
        ["fit", f"--model.policy.model={folders['llama']}", "--model.sampling.max_new_tokens=4", "--data.train.size=8",
         "--data.batch_size=1", "--trainer.max_steps=1", "--trainer.accelerator=cpu", f"--trainer.default_root_dir={tmp_path}",
         "--trainer.logger=false", "--trainer.enable_progress_bar=false", "--trainer.callbacks+=TokenReport",
         "--trainer.callbacks.rows=1", "--trainer.callbacks.repeated_questions=1"]
    )  # fmt: skip
    (step,) = read_tokens(tmp_path / "tokens.html")["steps"]
    assert [shown["repeated"] for shown in step["rollouts"]] == [True, False]


# -- questions of every step -----------------------------------------------------------------------------------------------


class WeightsBefore(Callback):
    """Weights before each step."""

    def __init__(self) -> None:
        self.found: list[dict[str, torch.Tensor]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        self.found.append(adapters(pl_module))


def test_repeated_questions_are_scored_with_the_weights_before_each_step(
    make_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    """Both roles by hand, without the dropout of training. The questions are the same at each step."""
    objective = DivergenceObjective(temperature=1.7, skip_first_tokens=1)
    module, data = parts(make_policy(lora=LoRA(r=4, alpha=8, dropout=0.3)), objective=objective, max_grad_norm=None)
    before, report = WeightsBefore(), TokenReport(every_n_steps=2, rows=1, max_tokens=6, repeated_questions=3)
    trainer(tmp_path, report, before, max_steps=4).fit(module, data)
    assert [(demand.rows, demand.tokens > 8) for demand in report.demand("fit")] == [(3, True)]
    steps = read_tokens(tmp_path / "tokens.html")["steps"]
    asked = [[shown["question"] for shown in step["rollouts"] if shown["repeated"]] for step in steps]
    assert [step["step"] for step in steps] == [1, 2, 4] and asked[0] == asked[1] == asked[2] and len({*asked[0]}) == 3
    rows = data.rows["train"]
    written = []
    for step in steps:
        module.load_state_dict(before.found[step["step"] - 1], strict=False)
        assert [shown["row"] for shown in step["rollouts"]] == [0, 1, 2, 0]
        for shown in step["rollouts"][:3]:
            (place,) = (i for i, example in enumerate(rows.examples) if example.question == shown["question"])
            written.append(shown["tokens"])
            found = []
            for prompt, adapted in ((rows.student[place], True), (rows.teacher[place], False)):
                ids = torch.tensor([[*prompt, *shown["tokens"]]])
                with torch.no_grad(), evaluating(module.model), nullcontext() if adapted else module.model.disable_adapter():
                    logits = base_of(module.model)(ids).logits[0]
                found.append((logits[len(prompt) - 1 : -1].double() / 1.7).log_softmax(-1))
            for role, logprobs in zip(("student", "teacher"), found, strict=True):
                check_role(shown[role], logprobs, shown["tokens"])
            by_hand = (found[1].exp() * (found[1] - found[0])).sum(-1)
            assert shown["forward_kl"] == pytest.approx(by_hand.tolist(), rel=1e-3, abs=1e-6)
            assert shown["unweighted"] == [0] and shown["sampled"]
    assert written[:3] != written[6:]  # the weights changed


def test_repeated_questions_change_only_with_the_weights(make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    module, data = parts(make_policy(), optimizer=lambda p: torch.optim.SGD(p, lr=1e-12))
    trainer(tmp_path, TokenReport(every_n_steps=1, rows=1, repeated_questions=99), max_steps=2).fit(module, data)
    first, second = (
        [shown["tokens"] for shown in step["rollouts"]] for step in read_tokens(tmp_path / "tokens.html")["steps"]
    )
    assert len(first) == 8 + 1 and first[:8] == second[:8] and first[8] != second[8]  # all questions, each once


CONTEXTS = {
    "feedback": FeedbackContext(),
    "majority": MajorityContext(min_share=0.1),
    "critique": CritiqueContext(sampling=Sampling(max_new_tokens=5)),
}


@pytest.mark.parametrize("context", CONTEXTS)
def test_repeated_questions_have_contexts_of_their_own_completions(
    context: str, make_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    """Neither weights nor logged values nor counters of the run change."""
    found, logged = [], []
    for number, callbacks in enumerate(((), (TokenReport(every_n_steps=1, rows=2, repeated_questions=2),))):
        torch.manual_seed(0)
        module, data = parts(make_policy(), context=CONTEXTS[context], learn_from="wrong", prompts=Prompts("{question}"))
        trainer(tmp_path / str(number), *callbacks, max_steps=2, limit_val_batches=0).fit(module, data)
        found.append((adapters(module), module.tokens_generated))
        logged.append([{k: v for k, v in row.items() if "time" not in k} for row in metrics(tmp_path / str(number))])
    (plain, tokens), (watched, same_tokens) = found
    assert all(torch.equal(value, watched[name]) for name, value in plain.items()) and tokens == same_tokens
    assert logged[0] == logged[1] and "train/context_missing_fraction" in logged[0][0]
    for step in read_tokens(tmp_path / "1" / "tokens.html")["steps"]:
        for shown in step["rollouts"][:2]:
            assert shown["repeated"]
            if context == "feedback":
                written = make_tokenizer().decode(shown["tokens"], skip_special_tokens=True)
                assert written.strip() in shown["teacher_prompt"] and "attempt" in shown["teacher_prompt"]


def test_the_choice_of_repeated_questions() -> None:
    """Different questions, although some have several rows. More of them include fewer."""
    examples = [Example(f"question {i % 5}", f"trace {i}", "1") for i in range(12)]
    ids = [[i] for i in range(12)]
    rows = PromptBatch(ids, ids, examples, [True] * 12)
    chosen = [choose_questions(rows, count, seed=3) for count in range(1, 8)]
    for count, batch in enumerate(chosen, start=1):
        assert len({example.question for example in batch.examples}) == len(batch.examples) == min(count, 5)
        assert batch.student == chosen[-1].student[:count]
        assert all(examples[i] == example for (i,), example in zip(batch.student, batch.examples, strict=True))
    assert {choose_questions(rows, 1, seed).student[0][0] % 5 for seed in range(40)} == set(range(5))


def test_repeated_questions_need_data_and_room(make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    module, data = parts(make_policy())
    loader = DataLoader([0])
    with pytest.raises(ConfigError) as refused:
        trainer(tmp_path, TokenReport(repeated_questions=1), max_steps=1).fit(module, loader)
    assert refused.value.setting == "trainer.callbacks.repeated_questions"
    module.__class__ = type("Own", (OPSDModule,), {"term_of": PolicyModule.term_of})  # a method with a teacher of its own
    with pytest.raises(ConfigError, match=mentions("Own")) as refused:
        trainer(tmp_path, TokenReport(repeated_questions=1), max_steps=1).fit(module, data)
    assert refused.value.setting == "trainer.callbacks.repeated_questions"
    module = SFTModule(make_policy(), sampling=Sampling(max_new_tokens=5000))  # samples nothing in training
    with pytest.raises(ConfigError, match=mentions("model.sampling.max_new_tokens")) as refused:
        trainer(tmp_path, TokenReport(repeated_questions=1), max_steps=1).fit(module, data)
    assert refused.value.setting == "trainer.callbacks.repeated_questions"


# -- pieces of text --------------------------------------------------------------------------------------------------------


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, as in GPT-2's vocabulary before any merge."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|im_start|>", "<|im_end|>"]
    inner = Tokenizer(models.BPE({token: index for index, token in enumerate([*special, *letters])}, []))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|im_end|>", pad_token="<|im_end|>", additional_special_tokens=["<|im_start|>"]
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def shown(pieces: Pieces, tokens: list[int]) -> list[str]:
    joined = pieces.joined(tokens)
    return [joined.get(place, pieces[token].text) for place, token in enumerate(tokens)]


def test_split_characters_are_put_together() -> None:
    tokenizer = byte_tokenizer()
    pieces = Pieces(tokenizer)
    tokens = tokenizer.encode(NASTY)
    assert "".join(shown(pieces, tokens)) == NASTY
    assert shown(pieces, tokenizer.encode("é😀"))[:6] == ["", "é", "", "", "", "😀"]
    # What is cut off, or no character at all, stays as bytes; it must not hide what follows.
    cut = [*tokenizer.encode("😀")[:3], *tokenizer.encode("a"), *tokenizer.encode("é")[1:], *tokenizer.encode("é")]
    assert shown(pieces, cut) == ["F0", "9F", "98", "a", "A9", "", "é"]
    assert pieces[tokenizer.eos_token_id] == ("<|im_end|>", "special", b"")
    assert pieces[len(tokenizer) + 3].kind == "unknown"


def test_sentencepiece_keeps_its_spaces() -> None:
    vocabulary = ["<unk>", "\u2581the", "the", "\u2581", "<0xC3>", "<0xA9>", "<0x0A>"]
    inner = Tokenizer(models.BPE({token: index for index, token in enumerate(vocabulary)}, []))
    inner.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    pieces = Pieces(PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>"))
    assert shown(pieces, [1, 2, 3, 4, 5, 6]) == [" the", "the", " ", "", "é", "\n"]


# -- pictures and pages for loggers ----------------------------------------------------------------------------------------


def test_pictures_are_logged(make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="pip install 'opsd-lightning[plots]'")
    from PIL import Image

    logger = CSVLogger(tmp_path / "logs")
    report = TokenReport(every_n_steps=2, rows=2)
    trainer(tmp_path, report, logger=logger, max_steps=2).fit(*parts(make_policy()))
    pictures = sorted((Path(logger.log_dir) / "tokens").iterdir())
    assert [path.name for path in pictures] == ["step-000001.png", "step-000002.png"]
    with Image.open(pictures[0]) as picture:
        pixels = torch.tensor(np.asarray(picture.convert("RGB"))).reshape(-1, 3)
    assert len(pixels.unique(dim=0)) > 50  # shades and letters, not an empty sheet
    silent = CSVLogger(tmp_path / "silent")
    trainer(tmp_path, TokenReport(pictures=False), logger=silent, max_steps=1).fit(*parts(make_policy()))
    assert not (Path(silent.log_dir) / "tokens").exists()


def test_a_picture_holds_the_text_and_its_shades() -> None:
    pytest.importorskip("matplotlib", reason="pip install 'opsd-lightning[plots]'")
    rollout = {
        "row": 0, "question": NASTY, "grade": "correct", "truncated": True, "length": 5, "tokens": [1, 2, 3, 4, 4],
        "joined": {3: "", 4: "é"}, "forward_kl": [0.0, 1.0, None, 0.25, 1.0],
    }  # fmt: skip
    figure = draw(
        {
            "step": 7,
            "pieces": {1: "$x_1^", 2: " two\nlines", 3: ["<|end|>", "special"], 4: ["C3", "bytes"]},
            "rollouts": [rollout],
        }
    )
    figure.canvas.draw()
    texts = {text.get_text(): text.get_position() for text in figure.axes[0].texts}
    one, two = (texts[text] for text in ("$x_1^ two", "lines<|end|>\u00b7é"))
    assert one[0] == two[0] == 0 and two[1] == one[1] + 1
    (shades,) = figure.axes[0].collections
    boxes = [tuple(map(float, path.get_extents().extents)) for path in shades.get_paths()]
    assert [box[0] for box in boxes] == [0, 5, 0, 5, 12, 13] and [box[2] for box in boxes] == [5, 9, 5, 12, 13, 14]
    assert [box[1] < y < box[3] for box, y in zip(boxes, [one[1]] * 2 + [two[1]] * 4, strict=True)] == [True] * 6
    colours = shades.get_facecolor()[:, :3].sum(1).round(4).tolist()
    assert colours[0] == colours[3] == 3 > colours[4] > colours[1] == colours[2] == colours[5]


def test_letters_of_a_picture_stand_on_their_shades() -> None:
    pytest.importorskip("matplotlib", reason="pip install 'opsd-lightning[plots]'")
    rollout = {
        "row": 0, "question": "", "grade": "none", "truncated": False, "length": 1, "tokens": [1], "joined": {}, "loss": [1.0]
    }  # fmt: skip
    figure = draw({"step": 1, "pieces": {1: 100 * "n"}, "rollouts": [rollout]})
    figure.canvas.draw()
    (line,) = (text for text in figure.axes[0].texts if text.get_text() == 100 * "n")
    (box,) = figure.axes[0].collections[0].get_paths()
    shade = figure.axes[0].transData.transform_path(box).get_extents()
    assert line.get_window_extent().width == pytest.approx(shade.width, abs=3)


def test_without_matplotlib_there_is_one_warning(
    make_policy: Callable[..., Policy], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("opsd_lightning.reports.token_report.find_spec", lambda name: None)
    logger = CSVLogger(tmp_path / "logs")
    with pytest.warns(UserWarning, match=r"opsd-lightning\[plots\]") as caught:
        trainer(tmp_path, TokenReport(every_n_steps=1), logger=logger, max_steps=2).fit(*parts(make_policy()))
    assert sum("TokenReport" in str(warning.message) for warning in caught) == 1
    assert len(read_tokens(tmp_path / "tokens.html")["steps"]) == 2
    assert not (Path(logger.log_dir) / "tokens").exists()


def test_loggers_get_the_page_at_the_end(
    make_policy: Callable[..., Policy], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow", reason="pip install 'opsd-lightning[mlflow]'")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    logger = MLFlowLogger("opsd", tracking_uri=(tmp_path / "mlruns").as_uri())
    trainer(tmp_path, TokenReport(pictures=False), logger=logger, max_steps=1).fit(*parts(make_policy()))
    path = logger.experiment.download_artifacts(logger.run_id, "pages/tokens.html")
    assert read_tokens(path) == read_tokens(tmp_path / "tokens.html")


# -- in the browser --------------------------------------------------------------------------------------------------------


class Scripted(RolloutEngine):
    """Four completions of two questions: right, wrong, cut off inside a character, and right but cut off."""

    def __init__(self, tokenizer: Any) -> None:
        self.rows = [
            [*tokenizer.encode("So 6 * 7 = 42.\nThe answer is 42."), tokenizer.eos_token_id],
            [*tokenizer.encode(NASTY + " The answer is 7."), tokenizer.eos_token_id],
            tokenizer.encode("é 😀")[:-2],
            tokenizer.encode("\\boxed{42} and" + 120 * "o"),
        ]

    def generate(self, model: Any, prompts: Any, sampling: Sampling, seed: int) -> Rollouts:
        return Rollouts(self.rows, [True, True, False, False], 2)


@pytest.fixture(scope="module")
def nasty_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a real run on a byte-level model whose vocabulary is padded, with text that means to break out."""
    folder, tokenizer = tmp_path_factory.mktemp("nasty"), byte_tokenizer()
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(vocab_size=288, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                    num_key_value_heads=2, max_position_embeddings=1024, bos_token_id=None, eos_token_id=1,
                    initializer_range=0.6)
    ).save_pretrained(folder / "model")  # fmt: skip
    tokenizer.save_pretrained(folder / "model")
    rows = [
        {"problem": f"{90 * 'w'}{number} {NASTY}", "solution": f"{NASTY} The answer is 42", "answer": "42"}
        for number in range(4)
    ]
    source = FileSource(str(write_jsonl(folder / "train.jsonl", rows)), columns=Columns(answer="answer"))
    policy = Policy(str(folder / "model"), lora=LoRA(r=4, alpha=8, dropout=0.0), dtype="float32")
    data = OPSDDataModule(
        policy, train=source, batch_size=2, max_new_tokens=8, prompts=Prompts("{question}", "{question} {context}")
    )
    module = OPSDModule(
        policy, rollouts=Scripted(tokenizer), sampling=Sampling(max_new_tokens=8, n=2),
        objective=DivergenceObjective(clip=TokenClip(1.0)), optimizer=lambda p: torch.optim.AdamW(p, lr=0.05),
    )  # fmt: skip
    trainer(folder, TokenReport(every_n_steps=1), logger=False, max_steps=2, limit_val_batches=0).fit(module, data)
    return folder / "tokens.html"


@pytest.fixture(scope="module")
def tab() -> Iterator[Browser]:
    with browser() as found:
        yield found


CARDS = "[...document.querySelectorAll('.card')].map(card => card.querySelector('h2').textContent)"


@pytest.mark.browser
@needs_browser
def test_the_page_shows_every_token_and_runs_nothing_else(nasty_page: Path, tab: Browser) -> None:
    tab.open(nasty_page)
    source, data = nasty_page.read_text(encoding="utf-8"), read_tokens(nasty_page)
    assert source.count("</script>") == 3 and tab.js("document.scripts.length") == 3  # colours, its data, and its own
    step = data["steps"][-1]
    assert [shown["grade"] for shown in step["rollouts"]] == ["correct", "wrong", "none", "correct"]
    questions = tab.js("[...document.querySelectorAll('.question')].map(p => p.textContent)")
    visible = NASTY.replace("\u2028", "⟨2028⟩").replace("\u2029", "⟨2029⟩").replace("\u202e", "⟨202E⟩")
    assert all(question.endswith(visible) for question in questions)
    texts = tab.js("[...document.querySelectorAll('.tokens')].map(e => [...e.children].map(t => t.textContent))")
    assert [len(row) for row in texts] == [len(shown["tokens"]) for shown in step["rollouts"]]
    assert "".join(texts[0]) == "So 6 * 7 = 42.↵\nThe answer is 42.<|im_end|>"
    assert "".join(texts[1]).replace("◦", "") == visible + " The answer is 7.<|im_end|>"
    assert texts[2] == ["◦", "é", " ", "⟨F0⟩", "⟨9F⟩"]
    assert not tab.errors and not tab.requests


@pytest.mark.browser
@needs_browser
def test_a_token_tells_what_both_roles_expected(nasty_page: Path, tab: Browser) -> None:
    """By the mouse, a click and the keys; the numbers are those of the data."""
    tab.open(nasty_page)
    step = read_tokens(nasty_page)["steps"][-1]
    shown = step["rollouts"][0]

    def panel() -> str:
        return tab.js("document.getElementById('detail').innerText")

    def percents(selector: str) -> list[float]:
        found = tab.js(f"[...document.querySelectorAll('#detail {selector}')].map(e => e.textContent)")
        return [float(text.split("%")[0].strip(" <").replace("\u2212", "-")) / 100 for text in found]

    def check(place: int) -> None:
        assert f"Token {place + 1} of {shown['length']}" in panel()
        roles = [shown["student"], shown["teacher"]]
        assert percents(".roles b") == pytest.approx(
            [math.exp(role["logprob"][place]) for role in roles], rel=0.06, abs=6e-4
        )
        expected = [math.exp(value / 1000) for role in roles for value in role["top_millinats"][place]]
        assert percents(".tops li > span") == pytest.approx(expected, rel=0.06, abs=6e-4)
        numbers = dict(
            zip(
                *(
                    tab.js(f"[...document.querySelectorAll('#detail {tag}')].map(e => e.textContent)")
                    for tag in ("dt", "dd")
                ),
                strict=True,
            )
        )
        for label, name in {
            "Forward KL": "forward_kl",
            "Reverse KL": "reverse_kl",
            "Loss": "loss",
            "Student's entropy": "student_entropy",
        }.items():
            assert float(numbers[label].replace("\u2212", "-")) == pytest.approx(shown[name][place], rel=0.06, abs=6e-4)
        assert numbers["Clip"] == "not clipped" if not shown["clipped"][place] else numbers["Clip"].endswith("nats removed")

    assert "Point at a token" in panel()
    tab.point(".card:nth-of-type(1) .t:nth-child(3)")
    check(2)
    tab.point(".card:nth-of-type(1) .t:nth-child(7)", click=True)
    tab.point(".card:nth-of-type(1) .t:nth-child(9)")
    check(6)  # a click keeps it
    tab.press("Escape")
    assert "Point at a token" in panel()
    tab.point("h1", click=True)
    while not tab.js("document.activeElement.matches('.tokens')"):
        tab.press("Tab")
    check(0)
    tab.press("ArrowRight")
    check(1)
    assert tab.js("document.getElementById(document.activeElement.getAttribute('aria-activedescendant')).i") == 1
    tab.press("End")
    check(shown["length"] - 1)
    # The largest value of what is shown leads the summary, and leads there.
    values = [(value, shown["row"], place) for shown in step["rollouts"] for place, value in enumerate(shown["forward_kl"])]
    _, row, place = max(values)
    tab.point(".places button", click=True)
    assert f"Token {place + 1} of {step['rollouts'][row]['length']}, step {step['step']}, rollout {row + 1}," in panel()
    assert not tab.errors


@pytest.mark.browser
@needs_browser
def test_page_filters_rollouts_and_changes_measures(nasty_page: Path, tab: Browser) -> None:
    tab.open(nasty_page)
    steps = read_tokens(nasty_page)["steps"]

    def press(*selectors: str) -> list[int]:
        for selector in selectors:
            tab.point(selector, click=True)
        return [int(name.split("rollout ")[1]) - 1 for name in tab.js(CARDS)]

    correct, wrong, cut = (f"[data-filter={name}]" for name in ("correct", "wrong", "truncated"))
    assert press() == [0, 1, 2, 3]
    assert press(correct) == [0, 3] and press(cut) == [3] and press(correct, wrong) == []
    assert tab.js("document.querySelector('main .none').innerText").strip()  # A sentence, not a blank page.
    assert press(cut) == [1] and press(wrong) == [0, 1, 2, 3] and press(cut) == [2, 3]
    assert press(cut, ".step:last-child") == [0, 1, 2, 3] * 2
    press(".step:first-child")
    assert tab.js(CARDS) == [f"Step {steps[0]['step']}, rollout {n}" for n in (1, 2, 3, 4)]
    for measure in ("forward_kl", "reverse_kl", "loss", "student_entropy", "teacher_entropy", "gap"):
        tab.js(f"measure.value = '{measure}', measure.dispatchEvent(new Event('change'))")
        shades = tab.js(
            "[...document.querySelectorAll('.card .t')].map(t => [+t.className.match(/l(\\d+)/)[1], t.className.includes(' up')])"
        )
        values: list[float] = []
        for shown in steps[0]["rollouts"]:
            gap = [t - s for t, s in zip(shown["teacher"]["logprob"], shown["student"]["logprob"], strict=True)]
            values += gap if measure == "gap" else shown[measure]
        # The more, the darker; which side of zero is told by the colour.
        pairs = sorted((abs(value), shade[0]) for value, shade in zip(values, shades, strict=True))
        assert [shade for _, shade in pairs] == sorted(shade for _, shade in pairs) and pairs[-1][1] == 10 > pairs[0][1]
        assert [up for _, up in shades] == [value > 0 if measure == "gap" else value < 0 for value in values]
        assert tab.js("document.getElementById('ticks').textContent").strip() and tab.js(
            "document.getElementById('keys').textContent"
        )
    assert not tab.errors


# A token's contrast with what stands behind it, for every shade: colours are mixed on a canvas, as the browser does.
CONTRAST = """(() => {
  const brush = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
  const light = colours => {
    for (const colour of colours) { brush.fillStyle = colour; brush.fillRect(0, 0, 1, 1); }
    const [r, g, b] = [...brush.getImageData(0, 0, 1, 1).data].map(v => v / 255).map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const card = getComputedStyle(document.querySelector('.card')).backgroundColor, found = [];
  const probe = document.querySelector('.t').cloneNode(true);
  document.querySelector('.tokens').append(probe);
  for (let level = 0; level <= 10; level++) for (const side of ['', ' up', ' unweighted']) {
    probe.className = 't l' + level + side;
    const style = getComputedStyle(probe), pair = [light([card, style.backgroundColor]), light([card, style.color])].sort((a, b) => b - a);
    found.push((pair[0] + .05) / (pair[1] + .05));
  }
  probe.remove();
  for (const e of document.querySelectorAll('.meta, .chip, .step, .badge, .facts, summary, .keys, .ticks, .hint, .how p, .finds label, .themes button, .corner a')) {
    const pair = [light([getComputedStyle(document.body).backgroundColor]), light([getComputedStyle(e).color])].sort((a, b) => b - a);
    if (e.getAttribute('aria-pressed') !== 'true') found.push((pair[0] + .05) / (pair[1] + .05));
  }
  return Math.min(...found);
})()"""


@pytest.mark.browser
@needs_browser
@pytest.mark.parametrize("width", [390, 768, 1280])
def test_page_fits_narrow_screens(width: int, nasty_page: Path, tab: Browser) -> None:
    """No sideways scroll whatever is open, by day and by night; a token's panel covers neither it nor the whole screen."""
    papers = []
    for dark in (False, True):
        tab.open(nasty_page, width, 844, dark)
        papers.append(tab.js("getComputedStyle(document.body).backgroundColor"))
        assert tab.js(CONTRAST) >= 4.5
        tab.js("document.querySelectorAll('details').forEach(details => details.open = true)")
        tab.point(".step:last-child", click=True)
        tab.point(".card:nth-of-type(2) .t:nth-child(40)", click=True)
        assert tab.js("document.documentElement.scrollWidth") <= width
        over = "[...document.querySelectorAll('body *')].filter(e => !e.closest('svg, .steps, .same, .unseen, .skip') && e.getClientRects().length && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 80))"
        assert tab.js(over) == []
        token, panel = (
            tab.js(f"document.querySelector('{s}').getBoundingClientRect().toJSON()") for s in (".t.on", "#detail")
        )
        if width == 390:
            assert token["top"] >= 0 and token["bottom"] <= panel["top"] and panel["top"] > 300 and panel["bottom"] == 844
            tab.point(".close", click=True)
            assert not tab.js("document.querySelector('#detail').getClientRects().length")
    day, night = papers
    assert day != night
    # Chosen colours hold for the next page too; "auto" follows the system again, which is dark here.
    for chosen, paper in (("light", day), ("dark", night), ("light", day), ("auto", night)):
        tab.point(f"[data-colours={chosen}]", click=True)
        assert tab.js("getComputedStyle(document.body).backgroundColor") == paper
        tab.open(nasty_page, width, 844, dark=True)
        assert tab.js("getComputedStyle(document.body).backgroundColor") == paper
        pressed = "[...document.querySelectorAll('[data-colours][aria-pressed=true]')].map(b => b.dataset.colours)"
        assert tab.js(pressed) == [chosen]
    assert not tab.errors and not tab.requests


@pytest.mark.browser
@needs_browser
def test_cards_are_as_tall_as_their_contents(nasty_page: Path, tab: Browser) -> None:
    """The question and the tokens stand below each other, in the whole width of the card, with no empty half."""
    for width in (390, 1280):
        tab.open(nasty_page, width, 844)
        boxes = "card => [card, card.querySelector('.tokens')].map(e => e.getBoundingClientRect().toJSON())"
        for card, tokens in tab.js(f"[...document.querySelectorAll('.card')].map({boxes})"):
            assert tokens["width"] >= card["width"] - 50 and 0 < card["bottom"] - tokens["bottom"] < 60


@pytest.mark.browser
@needs_browser
def test_page_searches_and_sorts_rollouts(nasty_page: Path, tab: Browser) -> None:
    tab.open(nasty_page)
    steps = read_tokens(nasty_page)["steps"]

    def rows() -> list[int]:
        return [int(name.split("rollout ")[1]) - 1 for name in tab.js(CARDS)]

    def find(text: str) -> list[int]:
        typed = f"box.value = {text!r}; box.dispatchEvent(new Event('input'));"
        wait = "return new Promise(done => setTimeout(() => done(0), 400));"
        tab.js(f"(() => {{ const box = document.getElementById('find'); {typed} {wait} }})()")
        return rows()

    hits = "[...document.querySelectorAll('.hit')].map(t => t.textContent).join('')"
    assert find("ANSWER IS 4") == [0, 1, 2, 3]  # the trace of every question has it
    assert find("6 * 7") == [0] and tab.js(hits) == "6 * 7"
    # Every trace has it, and one completion, whose tokens split its characters.
    assert find("答え 😀 The") == [0, 1, 2, 3] and tab.js(hits).replace("◦", "") == "答え 😀 The"
    assert find("no such text") == [] and tab.js("document.querySelector('main .none').innerText").strip()
    assert find("6 * 7") == [0] and tab.js("location.hash.includes('find=')")
    tab.point("#found .link", click=True)  # those of the other step too
    assert rows() == [0, 0]
    assert find("") == [0, 1, 2, 3] * 2
    tab.point(".step:nth-child(2)", click=True)
    for measure in ("forward_kl", "gap"):
        tab.js(f"measure.value = '{measure}', measure.dispatchEvent(new Event('change'))")
        values = []
        for shown in steps[1]["rollouts"]:
            gap = [t - s for t, s in zip(shown["teacher"]["logprob"], shown["student"]["logprob"], strict=True)]
            values.append(gap if measure == "gap" else shown[measure])
        means = [abs(sum(row) / len(row)) for row in values]
        most = [max(map(abs, row)) for row in values]
        for order, keys in (("mean", means), ("most", most), ("least", [-mean for mean in means])):
            tab.js(f"order.value = '{order}', order.dispatchEvent(new Event('change'))")
            assert rows() == sorted(range(4), key=lambda row: -keys[row]), (measure, order)
    assert not tab.errors and not tab.requests


@pytest.mark.browser
@needs_browser
def test_page_shows_a_question_across_steps_and_links_lead_to_steps(nasty_page: Path, tab: Browser, tmp_path: Path) -> None:
    data = read_tokens(nasty_page)
    first, second = data["steps"]
    for step in (first, second):  # one question in both steps, and one in each
        step["rollouts"] = step["rollouts"][::2]
        step["rollouts"][0]["question"] = NASTY
        step["rollouts"][1]["question"] = f"only in step {step['step']}"
    data["run"]["report"] = "a%20b/report.html"
    path = tmp_path / "tokens.html"
    path.write_text(render_template("token_report.html", script_json(data)), encoding="utf-8")
    tab.open(path)
    assert tab.js("document.querySelector('#report').getAttribute('href')") == "a%20b/report.html"
    assert tab.js("[...document.querySelectorAll('.same')].map(e => e.hidden)") == [False, True]
    tab.point(".same button[title]:not([aria-current])", click=True)
    assert tab.js(CARDS)[0] == f"Step {first['step']}, rollout 1"
    tab.point(".same .together", click=True)
    assert tab.js(CARDS) == [f"Step {step['step']}, rollout 1" for step in (first, second)]
    tab.point(".one .link", click=True)
    assert len(tab.js(CARDS)) == 4
    for hash, names in (("#step=1&by=loss", [1, 1]), ("#step=all", [1, 1, 2, 2]), ("#step=99", [2, 2]), ("#step=x", [2, 2])):
        tab.open(path)
        tab.js(f"(location.hash = {hash!r}, new Promise(done => setTimeout(() => done(0), 200)))")
        assert [int(name.split(",")[0].split()[1]) for name in tab.js(CARDS)] == names
        assert tab.js("measure.value") == ("loss" if "loss" in hash else "forward_kl")
    assert not tab.errors and not tab.requests


@pytest.mark.browser
@needs_browser
def test_a_full_page_stays_quick(nasty_page: Path, tab: Browser, tmp_path: Path) -> None:
    """Twenty steps of four rollouts with 512 tokens each: all of them are drawn and shaded anew within seconds."""
    data = read_tokens(nasty_page)
    rollout = data["steps"][0]["rollouts"][1]

    def longer(value: Any) -> Any:
        return (value * 512)[:512] if isinstance(value, list) and value else value

    long = {key: longer(value) for key, value in rollout.items()} | {"joined": {}, "length": 512}
    long |= {role: {key: longer(value) for key, value in rollout[role].items()} for role in ("student", "teacher")}
    # What a tokenizer cannot make, and JSON can hold.
    long["answer"] = "\ud800 lone"
    data["steps"] = [data["steps"][0] | {"step": step, "rollouts": [long] * 4} for step in range(20)]
    path = tmp_path / "full.html"
    path.write_text(render_template("token_report.html", script_json(data)), encoding="utf-8")
    assert path.stat().st_size < 12 * 2**20
    tab.open(path)
    seconds = tab.js(
        "(() => { const start = performance.now(); state.step = -1; draw(); document.body.offsetHeight; state.measure = 'gap'; draw();"
        " document.body.offsetHeight; return (performance.now() - start) / 1000; })()"
    )
    assert tab.js("document.querySelectorAll('.t').length") == 20 * 4 * 512
    assert seconds < 8  # half a second on two cores
    assert "⟨D800⟩ lone" in tab.js("document.querySelector('.facts').textContent")
    tab.point(".same .together", click=True)
    assert tab.js("document.querySelectorAll('.card').length") == 80
    assert not tab.errors and not tab.requests


@pytest.mark.browser
@needs_browser
def test_page_of_a_method_without_a_teacher(make_policy: Callable[..., Policy], tab: Browser, tmp_path: Path) -> None:
    _, data = parts(make_policy())
    trainer(tmp_path, TokenReport(), max_steps=1).fit(SFTModule(make_policy()), data)
    tab.open(tmp_path / "tokens.html")
    assert tab.js("document.querySelector('h1').textContent") == "Predictions of the student"
    assert tab.js("[...measure.options].map(o => o.value)") == ["loss", "student_entropy"]
    tab.point(".t:nth-child(4)", click=True)
    text = tab.js("document.getElementById('detail').innerText")
    assert "Student's top" in text and "Teacher" not in text and "Loss" in text
    assert not tab.errors and not tab.requests


@pytest.fixture(scope="module")
def repeated_page(folders: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a run that samples two questions at every step."""
    folder = tmp_path_factory.mktemp("repeated")
    policy = Policy(folders["llama"], lora=LoRA(r=4, alpha=8, dropout=0.0), dtype="float32")
    module, data = parts(policy, optimizer=lambda p: torch.optim.AdamW(p, lr=0.05), lr_scheduler=None)
    report = TokenReport(every_n_steps=1, rows=1, repeated_questions=2)
    trainer(folder, report, logger=False, max_steps=3, limit_val_batches=0).fit(module, data)
    return folder / "tokens.html"


@pytest.mark.browser
@needs_browser
def test_page_shows_a_repeated_question_at_all_steps(repeated_page: Path, tab: Browser) -> None:
    steps = read_tokens(repeated_page)["steps"]
    tab.open(repeated_page)
    names = [shown["question"] for shown in steps[0]["rollouts"][:2]]
    chips = "[...document.querySelectorAll('.repeated .chip')]"
    assert [
        name.startswith(chip.split(". ")[1])
        for name, chip in zip(names, tab.js(f"{chips}.map(e => e.textContent)"), strict=True)
    ] == [True, True]
    assert [name.split(", ")[1] for name in tab.js(CARDS)] == ["repeated question 1", "repeated question 2", "rollout 1"]
    tab.point(".repeated .chip:last-child", click=True)
    written = [[shown for shown in step["rollouts"] if shown["question"] == names[1]] for step in steps]
    count = sum(map(len, written))
    assert len(tab.js(CARDS)) == count >= 3
    assert [f"Step {step['step']}, repeated question 2" for step in steps] == [
        name for name in tab.js(CARDS) if "question" in name
    ]
    # The question stands once above its completions.
    assert tab.js(
        "[...document.querySelectorAll('.question')].filter(e => e.getClientRects().length).map(e => e.textContent)"
    ) == [names[1]]
    # The filters and the bars are those of this question.
    counts = "[...document.querySelectorAll('[data-filter]:not([data-filter=truncated]) span')].map(e => +e.textContent)"
    assert sum(tab.js(counts)) == count
    heights = tab.js("[...document.querySelectorAll('.step i')].map(e => parseFloat(e.style.height))")
    means = [
        sum(sum(shown["forward_kl"]) for shown in rows) / sum(len(shown["forward_kl"]) for shown in rows) for rows in written
    ]
    assert heights == pytest.approx([40 * mean / max(means) for mean in means], abs=0.1)
    # How far a completion is that of the step before.
    notes = tab.js(
        "[...document.querySelectorAll('.card')].filter(e => e.innerText.includes('question 2')).map(e => e.querySelector('.head').innerText)"
    )
    for step, (before, now), note in zip(steps, pairwise(rows[0]["tokens"] for rows in written), notes[1:], strict=False):
        same = next(
            (i for i, pair in enumerate(zip(before, now, strict=False)) if pair[0] != pair[1]), min(len(before), len(now))
        )
        assert note.endswith(f"step {step['step']}") and (before == now or same < 2 or f"first {same} tokens" in note)
    # The address keeps the question.
    address = tab.js("location.hash")
    tab.open(repeated_page)
    assert len(tab.js(CARDS)) == 3
    tab.js(f"(location.hash = {address!r}, new Promise(done => setTimeout(() => done(0), 200)))")
    assert len(tab.js(CARDS)) == count and tab.js(f"{chips}.map(e => e.getAttribute('aria-pressed'))") == ["false", "true"]
    tab.point(".repeated .chip:last-child", click=True)
    assert len(tab.js(CARDS)) == 9 and tab.js("document.querySelectorAll('.across').length") == 0
    for width in (390, 1280):
        tab.open(repeated_page, width, 844)
        tab.point(".repeated .chip", click=True)
        assert tab.js("document.documentElement.scrollWidth") <= width
    assert not tab.errors and not tab.requests
