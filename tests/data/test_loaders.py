"""What an epoch of the training loader consists of under the trainer's limits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback, Trainer

from opsd_lightning.data.datamodule import OPSDDataModule
from opsd_lightning.data.loaders import TrainLoader
from opsd_lightning.data.sources import WordProblems
from opsd_lightning.methods.opsd import OPSDModule
from opsd_lightning.models.policy import Policy
from opsd_lightning.prompts.templates import Prompts
from opsd_lightning.types import Example, PromptBatch, Sampling


def rows(count: int) -> PromptBatch:
    prompts, examples = [[n] for n in range(count)], [Example(str(n), "", "") for n in range(count)]
    return PromptBatch(prompts, prompts, examples, [True] * count)


def ids(batch: PromptBatch) -> list[int]:
    return [prompt[0] for prompt in batch.student]


@pytest.mark.parametrize(("limit", "batches"), [(1, 1), (3, 3), (99, 5), (0.4, 2), (1.0, 5)])
@pytest.mark.parametrize("shuffle", [False, True])
def test_epoch_length_follows_the_trainers_limits(limit: float, batches: int, shuffle: bool) -> None:
    """The same batches each epoch in the data's order, or a new order each; every batch tells the one that follows it, and a
    restored loader goes on with it, also from an epoch's end. Two ranks share each batch."""
    loaders = [TrainLoader(rows(21), 2, 0, rank, 2, limit, shuffle) for rank in range(2)]
    assert len(loaders[0]) == 5
    for loader in loaders:
        epochs = []
        for _ in range(4):
            taken = []
            for batch in loader:
                if taken:
                    assert taken[-1][1] == ids(batch)
                taken.append((ids(batch), [prompt[0] for prompt in batch.upcoming]))
                other = TrainLoader(rows(21), 2, 0, loader.rank, 2, limit, shuffle)
                other.load_state_dict(loader.state_dict())
                assert ids(next(iter(other))) == taken[-1][1]
                if len(taken) == batches:
                    break  # as Lightning does, which asks for no more
            epochs.append([part for part, _ in taken])
        assert [len(epoch) for epoch in epochs] == [batches] * 4
        if shuffle:
            assert len({str(epoch) for epoch in epochs}) == 4
        else:
            assert epochs == [[[4 * n + loader.rank, 4 * n + 2 + loader.rank] for n in range(batches)]] * 4


class Questions(Callback):
    def __init__(self) -> None:
        self.trained: list[tuple[str, ...]] = []
        self.validated: list[tuple[str, ...]] = []

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: PromptBatch, *args: Any) -> None:
        self.trained.append(tuple(e.question for e in batch.examples))

    def on_validation_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: PromptBatch, *args: Any) -> None:
        self.validated.append(tuple(e.question for e in batch.examples))


def test_overfit_batches_repeats_the_same_batches_after_a_resume(make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    policy, seen = make_policy(), []
    for steps in (3, 7):
        data = OPSDDataModule(
            policy, train=WordProblems(size=8, seed=1), val=WordProblems(size=6, seed=2),
            prompts=Prompts("{question}", "{question} {context}"), batch_size=2, eval_batch_size=2, max_new_tokens=4,
        )  # fmt: skip
        questions = Questions()
        run = Trainer(
            accelerator="cpu", callbacks=[questions], max_steps=steps, overfit_batches=2, logger=False, num_sanity_val_steps=0,
            enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, default_root_dir=tmp_path,
        )  # fmt: skip
        start = {"ckpt_path": str(tmp_path / "half.ckpt"), "weights_only": True} if seen else {}
        run.fit(OPSDModule(policy, sampling=Sampling(max_new_tokens=4)), data, **start)
        run.save_checkpoint(tmp_path / "half.ckpt")
        seen += questions.trained
        first = [tuple(e.question for e in data.rows["val"].examples[n : n + 2]) for n in (0, 2)]
        assert questions.validated[:2] == first and set(questions.validated) == set(first)
    assert len(seen) == 7 and seen == [seen[n % 2] for n in range(7)] and seen[0] != seen[1]
    examples = data.rows["train"].examples
    assert set(seen) == {tuple(e.question for e in examples[n : n + 2]) for n in (0, 2)}
