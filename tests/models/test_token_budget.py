"""Tests of scoring after out-of-memory errors: smaller passes, and the same result."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from peft import PeftModel

from helpers.messages import mentions
from helpers.models import EOS
from helpers.training import adapters, parts, trainer
from opsd_lightning.distributed.collectives import TrainerRanks
from opsd_lightning.models.policy import LoRA, Policy
from opsd_lightning.models.scoring import Scorer, SingleRank
from opsd_lightning.models.token_budget import TokenBudget
from opsd_lightning.types import ConfigError

PROMPTS = [[40, 41, 42, 43, 44, 45, 46]] * 4 + [[50], [60, 61, 62], [70, 71, 72, 73]]
COMPLETIONS = [[20, 21, EOS], [22], list(range(20, 40)), [23, 24], list(range(30, 50)), [25, 26, 27], []]


class Memory:
    """A device that holds passes of up to ``tokens`` tokens.

    Args:
        tokens: Tokens that fit.
        backward: If True, the error comes at the end of backward passes, after gradients were accumulated. Otherwise it comes
            at the start of forward passes.
    """

    def __init__(self, tokens: int, backward: bool = False) -> None:
        self.tokens, self.backward, self.passes, self.failures = tokens, backward, [], 0

    @contextmanager
    def of(self, model: PeftModel) -> Iterator[Memory]:
        embeddings = model.get_base_model().get_input_embeddings()
        with embeddings.register_forward_hook(self._after_embeddings):
            yield self

    def _after_embeddings(self, module: torch.nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> Any:
        tokens = inputs[0].numel()
        if tokens <= self.tokens or (self.backward and not torch.is_grad_enabled()):
            self.passes.append(tokens)
        elif self.backward:
            output.requires_grad_().register_hook(self._fail)
        else:
            self._fail()

    def _fail(self, *_: Any) -> None:
        self.failures += 1
        raise torch.OutOfMemoryError("CUDA out of memory")


@torch.no_grad()
def test_scores_do_not_depend_on_the_memory(built: Callable[..., PeftModel]) -> None:
    model = built("llama").eval()
    expected = Scorer(model, 10_000).score(PROMPTS, COMPLETIONS).hidden
    scorer = Scorer(model, 10_000)
    with Memory(40).of(model) as memory, pytest.warns(UserWarning, match="model.token_budget") as warned:
        found = scorer.score(PROMPTS, COMPLETIONS).hidden
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert memory.failures and max(memory.passes) <= 40
    assert len(warned) == 1 and re.search(mentions(scorer.budget.tokens), str(warned[0].message))
    with Memory(40).of(model) as memory:  # the limit stays, without another failure
        scorer.score(PROMPTS, COMPLETIONS)
    assert memory.failures == 0


@torch.no_grad()
def test_passes_that_succeeded_are_not_repeated(built: Callable[..., PeftModel]) -> None:
    model = built("llama").eval()
    prompts = [[token] for token in range(20, 29)]
    completions = [[40] * 39] * 3 + [[40] * 9] * 6
    with Memory(39).of(model) as memory, pytest.warns(UserWarning, match="token_budget"):
        Scorer(model, 120).score(prompts, completions)
    assert sum(memory.passes) == 3 * 39 + 6 * 9


def test_a_row_that_does_not_fit_is_an_error(built: Callable[..., PeftModel]) -> None:
    model = built("llama")
    with Memory(15).of(model), pytest.raises(ConfigError, match=mentions("model.sampling.max_new_tokens", 27)):
        Scorer(model, 10_000).score(PROMPTS, COMPLETIONS)


def test_ranks_do_not_repeat_passes_alone(built: Callable[..., PeftModel]) -> None:
    class OneOfTwo(SingleRank):
        repeats_passes = False

    model = built("llama")
    with Memory(40).of(model), pytest.raises(ConfigError) as error:
        Scorer(model, 100, OneOfTwo()).score(PROMPTS, COMPLETIONS)
    assert error.value.setting == "model.token_budget"


@pytest.mark.parametrize(("strategy", "repeats"), [("auto", True), ("ddp", False)])
def test_only_a_run_without_a_distributed_strategy_repeats_passes(strategy: str, repeats: bool) -> None:
    """DDP's reducer cannot restart a backward pass that was broken off, not even on one rank."""
    trainer = Trainer(accelerator="cpu", devices=1, strategy=strategy, logger=False, enable_progress_bar=False)
    assert TrainerRanks(trainer).repeats_passes is repeats


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_a_step_does_not_depend_on_the_memory(
    backward: bool, checkpointing: bool, make_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    """Two optimizer steps: the loss, the adapter, and the measurements."""
    policy = make_policy(lora=LoRA(r=4, alpha=8, dropout=0.0), gradient_checkpointing=checkpointing)

    def run(name: str, memory: Memory) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], int]:
        torch.manual_seed(0)  # the adapter starts at random
        module, data = parts(policy, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))  # Adam would scale rounding up
        ours = trainer(tmp_path / name, max_steps=2, limit_val_batches=0, enable_checkpointing=False)
        module.trainer = ours
        module.configure_model()
        with memory.of(module.model):
            ours.fit(module, data)
        return adapters(module), dict(ours.logged_metrics), module.scoring_budget.tokens

    expected, logged, whole = run("whole", Memory(10_000))
    memory = Memory(150 if backward else 300, backward)  # the rollouts need almost 300
    with pytest.warns(UserWarning, match="token_budget"):
        found, logged_again, used = run("broken", memory)
    assert used < whole == 8192 and memory.failures
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-4)
    for name, value in logged.items():
        if not name.startswith("time/"):
            torch.testing.assert_close(logged_again[name], value, atol=1e-5, rtol=1e-3)


def test_dropout_is_that_of_the_smaller_budget(make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    """A run that had to lower its budget equals a run that began with it, and a resumed one goes on with it."""
    policy = make_policy(lora=LoRA(r=4, alpha=8, dropout=0.3))

    def run(name: str, steps: int, resume: Path | None = None, tokens: int = 10_000, **settings: Any) -> Any:
        torch.manual_seed(0)
        module, data = parts(policy, lr_scheduler=None, optimizer=lambda p: torch.optim.SGD(p, lr=0.1), **settings)
        ours = trainer(tmp_path / name, max_steps=steps, limit_val_batches=0)
        module.trainer = ours
        module.configure_model()
        with Memory(tokens, backward=True).of(module.model):
            ours.fit(module, data, ckpt_path=resume)
        ours.save_checkpoint(tmp_path / f"{name}.ckpt")
        return module

    with pytest.warns(UserWarning, match="token_budget"):
        broken = run("broken", 1, tokens=150)
    budget = broken.scoring_budget.tokens
    begun = run("begun", 1, token_budget=budget)
    for name, value in adapters(begun).items():
        torch.testing.assert_close(adapters(broken)[name], value, atol=1e-7, rtol=1e-5)
    resumed = run("resumed", 2, tmp_path / "broken.ckpt")
    assert resumed.scoring_budget.tokens == budget


@pytest.mark.parametrize("state", [{"given": 8, "tokens": 9}, {"given": 8, "tokens": 0}, {"given": 8, "tokens": "4"}])
def test_a_limit_from_elsewhere_is_refused(state: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="not a limit"):
        TokenBudget(8).load_state_dict(state)
    other = TokenBudget(16)  # set by the user since
    other.load_state_dict({"given": 8, "tokens": 4})
    assert other.tokens == 16
