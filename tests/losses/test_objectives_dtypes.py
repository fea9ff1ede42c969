"""Tests that losses and measurements are computed in float32, whatever the dtypes of logits, teacher and autocast."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from opsd_lightning.losses.clips import PointwiseClip
from opsd_lightning.losses.divergences import Divergence, ForwardKL, GeneralizedJSD, ReverseKL
from opsd_lightning.losses.objectives import (
    DivergenceObjective,
    NegativeLogLikelihood,
    Objective,
    SampledKLObjective,
    SampledTokenObjective,
    log_softmax,
    token_logprobs,
)
from opsd_lightning.losses.position_weights import DecayingPositions, FirstPositions
from opsd_lightning.losses.supports import FullVocabulary, Support, TopKRenormalized, TopKWithTail
from opsd_lightning.types import Rollouts, TokenStates

ROWS, VOCABULARY = 24, 60
OBJECTIVES: list[Objective] = [
    DivergenceObjective(ForwardKL(), temperature=1.1),
    DivergenceObjective(ReverseKL(), TopKWithTail(5)),
    DivergenceObjective(GeneralizedJSD(0.3), TopKRenormalized(7), PointwiseClip(0.05)),
    SampledTokenObjective(),
    SampledKLObjective(),
    NegativeLogLikelihood(),
]


def identity(hidden: Tensor) -> Tensor:
    return hidden


def run(
    objective: Objective, student: Tensor, teacher: Tensor | None, weights: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Loss, measurements, and the gradient at the student's logits."""
    leaf = student.detach().clone().requires_grad_()
    targets = torch.arange(len(student)) % VOCABULARY
    weights = torch.full((len(student),), 1 / len(student), dtype=torch.float32) if weights is None else weights
    states = TokenStates(leaf, lambda hidden: hidden.clone())
    other = None if teacher is None or not objective.uses_teacher else TokenStates(teacher, identity)
    loss, measured = objective(states, other, targets, weights)
    loss.backward()
    assert leaf.grad is not None
    return loss.detach(), measured, leaf.grad


def logits(seed: int, scale: float = 4.0) -> Tensor:
    return scale * torch.randn(ROWS, VOCABULARY, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda objective: type(objective).__name__)
def test_autocast_changes_neither_loss_nor_measurement_nor_gradient(objective: Objective) -> None:
    """The same logits inside and outside: what is made of them is not rounded."""
    expected = run(objective, logits(0), logits(1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = run(objective, logits(0), logits(1))
        logprobs = token_logprobs(TokenStates(logits(0), identity), torch.arange(ROWS))
    assert torch.equal(found[0], expected[0]) and torch.equal(found[2], expected[2])
    assert set(found[1]) == set(expected[1])
    for name, values in expected[1].items():
        assert found[1][name].dtype == torch.float32 and torch.equal(found[1][name], values), name
    assert torch.equal(logprobs, token_logprobs(TokenStates(logits(0), identity), torch.arange(ROWS)))


@pytest.mark.parametrize("theirs", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("objective", OBJECTIVES[:4], ids=lambda objective: type(objective).__name__)
def test_the_gradient_is_not_rounded_to_the_teachers_dtype(objective: Objective, theirs: torch.dtype) -> None:
    """A teacher of another dtype against one whose logits are the same numbers in the student's dtype; tiny weights, as of a
    step of many tokens, leave no room for float16."""
    teacher = logits(1).to(theirs)
    weights = torch.full((ROWS,), 1e-7)
    _, _, found = run(objective, logits(0), teacher, weights)
    _, _, expected = run(objective, logits(0), teacher.float(), weights)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=1e-14)


def test_one_buffer_serves_teacher_and_gradient_where_dtypes_agree() -> None:
    """No third tensor of logits: the teacher's own memory holds the gradient after the call."""
    teacher = logits(1)
    made: list[Tensor] = []

    def head(hidden: Tensor) -> Tensor:
        made.append(hidden.clone())
        return made[-1]

    leaf = logits(0).requires_grad_()
    targets = torch.arange(ROWS)
    DivergenceObjective()(TokenStates(leaf, lambda h: h.clone()), TokenStates(teacher, head), targets, torch.ones(ROWS))
    assert all(bool((chunk.sum(-1).abs() < 1e-4).all()) for chunk in made)  # p_S - p_T sums to 0, logits do not


@pytest.fixture
def default_bfloat16() -> Iterator[None]:
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(torch.float32)


def test_token_weights_do_not_take_the_default_dtype(default_bfloat16: None) -> None:
    rollouts = Rollouts([list(range(700)), [1, 2, 3]], [True, True])
    found = DecayingPositions(100.0).weights(700)
    torch.testing.assert_close(found[[0, 100, 650]], torch.tensor([1.0, 0.5, 2**-6.5], dtype=torch.float32))
    assert FirstPositions(2, 0.3).weights(4).tolist() == pytest.approx([1, 1, 0.3, 0.3], rel=1e-7)
    for position in (None, DecayingPositions(), FirstPositions(2, 0.3)):
        for weight in DivergenceObjective(position_weight=position, reduction="sequence_mean").token_weights(rollouts):
            assert weight.dtype == torch.float32 and float(weight.double().sum()) == pytest.approx(1, abs=1e-6)
    loss, measured = NegativeLogLikelihood()(
        TokenStates(torch.zeros(0, 4), identity), None, torch.zeros(0, dtype=torch.long), torch.zeros(0)
    )
    assert loss.dtype == torch.float32 and not measured


DIVERGENCES: list[Divergence] = [ForwardKL(), ReverseKL(), GeneralizedJSD(0.1), GeneralizedJSD(0.5)]
SUPPORTS: list[Support] = [FullVocabulary(), TopKRenormalized(6), TopKWithTail(6), TopKWithTail(VOCABULARY - 4)]


@pytest.mark.parametrize("mask", [-torch.inf, torch.finfo(torch.float32).min], ids=["-inf", "finfo.min"])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
@pytest.mark.parametrize("support", SUPPORTS, ids=lambda support: f"{type(support).__name__}{getattr(support, 'k', '')}")
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=lambda divergence: type(divergence).__name__)
def test_entries_masked_in_both_roles_are_ignored(
    divergence: Divergence, support: Support, temperature: float, mask: float
) -> None:
    """A padded vocabulary against the vocabulary without its padding."""
    objective = DivergenceObjective(divergence, support, temperature=temperature)
    kept = VOCABULARY - 10
    student, teacher = logits(0), logits(1)
    if getattr(support, "k", 0) < kept:  # else the top holds masked entries, and nothing is left to compare with
        expected = run(objective, student[:, :kept], teacher[:, :kept])
    else:
        expected = run(DivergenceObjective(divergence, temperature=temperature), student[:, :kept], teacher[:, :kept])
    student[:, kept:], teacher[:, kept:] = mask, mask
    loss, measured, gradient = run(objective, student, teacher)
    torch.testing.assert_close(loss, expected[0], rtol=1e-4, atol=1e-6)
    for name in ("forward_kl", "reverse_kl", "student_entropy", "teacher_entropy"):
        torch.testing.assert_close(measured[name], expected[1][name], rtol=1e-4, atol=1e-6)
    assert not gradient[:, kept:].any()
    torch.testing.assert_close(gradient[:, :kept], expected[2], rtol=1e-3, atol=1e-6)


def test_an_entry_that_one_role_alone_rules_out_is_never_nan() -> None:
    """Their divergence is beyond all bounds where the other role may choose it: far above what training goes on with."""
    student, teacher = logits(0), logits(1)
    student[:, 3] = -torch.inf
    loss, measured, gradient = run(DivergenceObjective(ForwardKL()), student, teacher)
    assert float(loss) > 1e20 and torch.isfinite(measured["reverse_kl"]).all() and torch.isfinite(gradient).all()
    loss, _, gradient = run(DivergenceObjective(ReverseKL()), student, teacher)
    assert 0 < float(loss) < 100 and torch.isfinite(gradient).all()


def test_log_softmax_is_torchs_own() -> None:
    values = logits(2).double().requires_grad_()
    torch.testing.assert_close(log_softmax(values), torch.log_softmax(values, -1), rtol=0, atol=0)
    assert torch.autograd.gradcheck(log_softmax, (values[:3],))


def test_a_half_precision_head_under_autocast_is_measured_in_float32() -> None:
    """Hidden states through a head that autocast computes in bfloat16: only its logits are rounded."""
    torch.manual_seed(0)
    hidden, head = torch.randn(ROWS, 16), nn.Linear(16, VOCABULARY)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = head(hidden).float()
        states = TokenStates(hidden.requires_grad_(), head, tuple(head.parameters()))
        loss, measured = DivergenceObjective()(
            states, TokenStates(2 * hidden.detach(), head), torch.arange(ROWS), torch.ones(ROWS)
        )
        doubled = head(2 * hidden).float()
    s, t = rounded.log_softmax(-1), doubled.log_softmax(-1)
    expected = (t.exp() * (t - s)).sum(-1)
    torch.testing.assert_close(measured["forward_kl"], expected.detach(), rtol=1e-5, atol=1e-7)
    assert loss.dtype == torch.float32 and float(loss.detach()) == pytest.approx(float(expected.detach().sum()), rel=1e-5)
