"""Tests of divergences and objectives against golden values, identities, closed-form gradients and a float64 oracle."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings, strategies as st
from torch import Tensor

from helpers.classes import subclasses
from opsd_lightning.losses.clips import Clip, NoClip, PointwiseClip, RescaleClip, TokenClip
from opsd_lightning.losses.divergences import Divergence, ForwardKL, GeneralizedJSD, ReverseKL
from opsd_lightning.losses.objectives import (
    DivergenceObjective,
    NegativeLogLikelihood,
    Objective,
    SampledKLObjective,
    SampledTokenObjective,
)
from opsd_lightning.losses.position_weights import DecayingPositions, FirstPositions, PositionWeight
from opsd_lightning.losses.supports import FullVocabulary, Support, TopKRenormalized, TopKWithTail
from opsd_lightning.types import ConfigError, Rollouts, TokenStates

DIVERGENCES = [ForwardKL(), ReverseKL(), GeneralizedJSD(0.1), GeneralizedJSD(0.5), GeneralizedJSD(0.9)]
SUPPORTS = [FullVocabulary(), TopKRenormalized(3), TopKWithTail(3)]
CLIPS = [NoClip(), PointwiseClip(0.05), TokenClip(0.3), RescaleClip(0.3)]
S, T = [2.0, 1.0, 0.0, -1.0], [0.5, 2.5, 0.0, -2.0]


@pytest.mark.parametrize(
    ("base", "tested"),
    [
        (Divergence, DIVERGENCES),
        (Support, SUPPORTS),
        (Clip, CLIPS),
        (Objective, [DivergenceObjective(), SampledTokenObjective(), SampledKLObjective(), NegativeLogLikelihood()]),
        (PositionWeight, [DecayingPositions(2.0), FirstPositions(3, 0.25)]),
    ],
)
def test_every_subclass_is_under_test(base: type, tested: list[object]) -> None:
    ours = {cls for cls in subclasses(base) if cls.__module__.startswith("opsd_lightning")}
    assert ours == {type(part) for part in tested}


def run(
    objective: Objective, student: Tensor, teacher: Tensor, targets: Tensor | None = None, weights: Tensor | None = None
):
    """The objective on logits: an identity head."""
    rows = student.shape[0]
    targets = torch.zeros(rows, dtype=torch.long) if targets is None else targets
    weights = torch.ones(rows, dtype=student.dtype) if weights is None else weights
    return objective(TokenStates(student, lambda h: h), TokenStates(teacher, lambda h: h), targets, weights)


def in_chunks(objective: Objective, chunk: int, block: int = 2) -> Objective:
    """The same objective with chunks of that many tokens (after its small first one), as a small memory would make them."""
    objective._sizes = lambda logits: (chunk, block)  # type: ignore[method-assign]
    return objective


GOLDEN = {  # opsd-method: student logits S, teacher logits T, float64
    1.0: [0.78106095, 0.06920192, 0.19242600, 0.07718937, 0.90823381, -0.17369488, 0.10408914],
    1.1: [0.66503835, 0.05903441, 0.16386010, 0.06449608, 0.74988029, -0.18160458, 0.10412379],
}


@pytest.mark.parametrize("temperature", GOLDEN)
def test_divergences_equal_golden_values(temperature: float) -> None:
    student, teacher = torch.tensor([S], dtype=torch.float64), torch.tensor([T], dtype=torch.float64)
    parts = [
        (ForwardKL(), NoClip()),
        (GeneralizedJSD(0.1), NoClip()),
        (GeneralizedJSD(0.5), NoClip()),
        (GeneralizedJSD(0.9), NoClip()),
        (ReverseKL(), NoClip()),
        (ForwardKL(), PointwiseClip(0.05)),
        (GeneralizedJSD(0.5), PointwiseClip(0.05)),
    ]
    for (divergence, clip), expected in zip(parts, GOLDEN[temperature], strict=True):
        loss, _ = run(DivergenceObjective(divergence, clip=clip, temperature=temperature), student, teacher)
        assert float(loss) == pytest.approx(expected, abs=6e-9)


def test_jsd_ends_are_the_two_kls() -> None:
    student, teacher = torch.randn(5, 7).log_softmax(-1), torch.randn(5, 7).log_softmax(-1)
    for beta, end in [(0.0, ForwardKL()), (1.0, ReverseKL())]:
        torch.testing.assert_close(GeneralizedJSD(beta).entries(student, teacher), end.entries(student, teacher))


@pytest.mark.parametrize("beta", [1e-3, 0.01, 0.99])
def test_jsd_warns_where_it_vanishes(beta: float) -> None:
    with pytest.warns(UserWarning, match="beta"):
        GeneralizedJSD(beta)


def test_beta_weighs_the_teacher() -> None:
    """At small beta the mixture is the student: KL(student || m) vanishes first, KL(teacher || m) is like forward KL."""
    student, teacher = torch.tensor([S]).log_softmax(-1), torch.tensor([T]).log_softmax(-1)
    value = GeneralizedJSD(0.02).entries(student, teacher).sum()
    forward, reverse = (d.entries(student, teacher).sum() for d in (ForwardKL(), ReverseKL()))
    assert abs(value / 0.02 - forward) < abs(value / 0.02 - reverse)


@pytest.mark.parametrize(("divergence", "support"), list(product(DIVERGENCES, SUPPORTS)), ids=lambda x: type(x).__name__)
def test_zero_at_equality_and_never_negative(divergence: Divergence, support: Support) -> None:
    torch.manual_seed(0)
    for scale in (0.1, 1.0, 10.0, 60.0):
        student, teacher = scale * torch.randn(200, 9), scale * torch.randn(200, 9)
        objective = DivergenceObjective(divergence, support)
        same, _ = objective.per_token(*[student.log_softmax(-1)] * 2, torch.zeros(200, dtype=torch.long))
        other, _ = objective.per_token(student.log_softmax(-1), teacher.log_softmax(-1), torch.zeros(200, dtype=torch.long))
        assert float(same.abs().max()) < 1e-5
        assert float(other.min()) > -1e-5
        assert torch.isfinite(other).all()


def closed_form(divergence: Divergence, student: np.ndarray, teacher: np.ndarray) -> np.ndarray:
    """d divergence / d student logits, from the table in the method's document."""
    p_s, p_t = np.exp(student), np.exp(teacher)
    if isinstance(divergence, ForwardKL):
        return p_s - p_t
    if isinstance(divergence, ReverseKL):
        d, factor = student - teacher, 1.0
    else:
        assert isinstance(divergence, GeneralizedJSD)
        beta = divergence.beta
        d, factor = student - np.log(beta * p_t + (1 - beta) * p_s), 1 - beta
    return factor * p_s * (d - (p_s * d).sum(-1, keepdims=True))


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=lambda x: type(x).__name__)
@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_gradients_equal_closed_forms(divergence: Divergence, temperature: float) -> None:
    torch.manual_seed(1)
    student = torch.randn(6, 11, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(6, 11, dtype=torch.float64)
    loss, _ = run(DivergenceObjective(divergence, temperature=temperature), student, teacher)
    loss.backward()
    s, t = ((x.detach() / temperature).log_softmax(-1).numpy() for x in (student, teacher))
    np.testing.assert_allclose(student.grad.numpy(), closed_form(divergence, s, t) / temperature, atol=1e-12)


def oracle(divergence: Divergence, support: Support, clip: Clip, s: np.ndarray, t: np.ndarray) -> float:
    """One token's loss in plain NumPy, written from the definitions alone. s, t: log-probabilities."""
    if not isinstance(support, FullVocabulary):
        top = np.argsort(-t, kind="stable")[: support.k]  # type: ignore[attr-defined]
        rest = np.setdiff1d(np.arange(len(t)), top)
        pick = lambda x: np.exp(x[top])  # noqa: E731
        if isinstance(support, TopKRenormalized):
            ps, pt = pick(s) / pick(s).sum(), pick(t) / pick(t).sum()
        else:
            ps, pt = (np.append(pick(x), np.exp(x[rest]).sum()) for x in (s, t))
    else:
        ps, pt = np.exp(s), np.exp(t)
    beta = {ForwardKL: 0.0, ReverseKL: 1.0}.get(type(divergence), getattr(divergence, "beta", None))
    total, unclipped = 0.0, 0.0
    for a, b in zip(pt, ps, strict=True):
        if beta == 0:
            entry = a * math.log(a / b)
        elif beta == 1:
            entry = b * math.log(b / a)
        else:
            m = beta * a + (1 - beta) * b
            entry = beta * a * math.log(a / m) + (1 - beta) * b * math.log(b / m)
        total += min(entry, clip.tau) if isinstance(clip, PointwiseClip) else entry
        unclipped += entry
    return min(total, clip.tau) if isinstance(clip, (TokenClip, RescaleClip)) else total


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(0, 9),
    vocabulary=st.integers(5, 40),
    chunk=st.integers(1, 5),
    scale=st.floats(0.1, 5.0),
    temperature=st.floats(0.5, 2.0),
    divergence=st.sampled_from(DIVERGENCES),
    support=st.sampled_from(SUPPORTS),
    clip=st.sampled_from(CLIPS),
)
def test_objectives_equal_a_float64_oracle(
    seed: int, rows: int, vocabulary: int, chunk: int, scale: float, temperature: float, divergence: Divergence,
    support: Support, clip: Clip,
) -> None:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (scale * torch.randn(rows, vocabulary, generator=generator, dtype=torch.float64) for _ in range(2))
    weights = torch.rand(rows, generator=generator, dtype=torch.float64)
    targets = torch.randint(vocabulary, (rows,), generator=generator)
    objective = in_chunks(DivergenceObjective(divergence, support, clip, temperature=temperature), chunk)
    loss, tokens = run(objective, student.requires_grad_(), teacher, targets, weights)
    s, t = ((x.detach() / temperature).log_softmax(-1).numpy() for x in (student, teacher))
    expected = [oracle(divergence, support, clip, s[n], t[n]) for n in range(rows)]
    assert float(loss.detach()) == pytest.approx(float(np.dot(weights.numpy(), expected)), rel=1e-9, abs=1e-10)
    for name, reference in [("forward_kl", ForwardKL()), ("reverse_kl", ReverseKL())] if rows else []:
        plain = [oracle(reference, FullVocabulary(), NoClip(), s[n], t[n]) for n in range(rows)]
        np.testing.assert_allclose(tokens[name].numpy(), plain, atol=1e-10)
    if rows:
        np.testing.assert_allclose(tokens["student_entropy"], -(np.exp(s) * s).sum(-1), atol=1e-10)
        np.testing.assert_allclose(tokens["teacher_entropy"], -(np.exp(t) * t).sum(-1), atol=1e-10)
        np.testing.assert_allclose(tokens["student_logprob"], s[np.arange(rows), targets], atol=1e-10)


@pytest.mark.integration
@settings(max_examples=120, deadline=None, derandomize=True, phases=[Phase.generate])
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(8_400, 8_900),
    vocabulary=st.integers(4, 24),
    chunk=st.integers(100, 9_000),
    block=st.integers(50, 3_000),
    scale=st.floats(0.1, 4.0),
    temperature=st.floats(0.5, 2.0),
    cap=st.sampled_from([None, 3.0]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    divergence=st.sampled_from(DIVERGENCES),
    support=st.sampled_from(SUPPORTS),
    clip=st.sampled_from(CLIPS),
)
def test_million_tokens_equal_the_plain_computation(
    seed: int, rows: int, vocabulary: int, chunk: int, block: int, scale: float, temperature: float, cap: float | None,
    dtype: torch.dtype, divergence: Divergence, support: Support, clip: Clip,
) -> None:  # fmt: skip
    """120 draws of at least 8,400 tokens: loss, gradients at the states and at the head, and every measurement, against
    plain autograd in float64 on the whole [tokens, vocabulary] at once."""
    generator = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    weight, bias = scale * rand(vocabulary, 3), rand(vocabulary)
    student, teacher = rand(rows, 3), rand(rows, 3)
    token_weights = torch.rand(rows, generator=generator, dtype=torch.float64) / rows
    targets = torch.randint(vocabulary, (rows,), generator=generator)

    def head_with(weight: Tensor, bias: Tensor):
        def head(hidden: Tensor) -> Tensor:
            logits = hidden @ weight.T + bias
            return logits if cap is None else cap * torch.tanh(logits / cap)

        return head

    def leaves(kind: torch.dtype) -> list[Tensor]:
        # rounded first, so that both see the same numbers
        return [x.to(dtype).to(kind).requires_grad_() for x in (student, weight, bias)]

    hidden, *parameters = leaves(dtype)
    objective = in_chunks(DivergenceObjective(divergence, support, clip, temperature=temperature), chunk, block)
    teacher_states = TokenStates(teacher.to(dtype), head_with(*[p.detach() for p in parameters]))
    states = TokenStates(hidden, head_with(*parameters), tuple(parameters))
    loss, tokens = objective(states, teacher_states, targets, token_weights.to(dtype))
    gradients = torch.autograd.grad(loss, [hidden, *parameters])

    exact = leaves(torch.float64)
    s = (head_with(*exact[1:])(exact[0]) / temperature).log_softmax(-1)
    t = (head_with(*exact[1:])(teacher.to(dtype).double()) / temperature).log_softmax(-1).detach()
    entries = divergence.entries(*support.restrict(s, t))
    value = clip.apply(entries)
    plain = (value * token_weights).sum()
    expected = torch.autograd.grad(plain, exact, retain_graph=True)
    single = dtype == torch.float32
    total = float((entries.detach().sum(-1) * token_weights).sum())
    tolerance = 1e-6 if single else 1e-12
    assert float(loss.detach()) == pytest.approx(float(plain.detach()), rel=tolerance, abs=tolerance * max(total, 0.1))
    for ours, theirs in zip(gradients, expected, strict=True):
        # A token whose divergence is within rounding of tau may fall on either side of a clip: leave such rows out.
        edge = (
            (entries - clip.tau).abs().min(-1).values < 1e-5
            if isinstance(clip, PointwiseClip)
            else ((entries.sum(-1) - clip.tau).abs() < 1e-5 if isinstance(clip, TokenClip) else torch.zeros(rows).bool())
        )
        if ours.shape[0] == rows:
            ours, theirs = ours[~edge], theirs[~edge]
        elif single and edge.any():
            continue
        assert float((ours - theirs).norm()) <= (1e-5 if single else 1e-11) * float(theirs.norm()) + (
            1e-8 if single else 1e-14
        )
    plainly = {
        "forward_kl": (t.exp() * (t - s)).sum(-1),
        "reverse_kl": (s.exp() * (s - t)).sum(-1),
        "student_entropy": -(s.exp() * s).sum(-1),
        "teacher_entropy": -(t.exp() * t).sum(-1),
        "student_logprob": s[torch.arange(rows), targets],
        "teacher_logprob": t[torch.arange(rows), targets],
        "loss": value,
        "clipped_mass": entries.sum(-1) - value,
    }
    for name, reference in plainly.items():
        torch.testing.assert_close(tokens[name].double(), reference.detach(), atol=2e-5 if single else 1e-10, rtol=1e-5)


@pytest.mark.parametrize("clip", CLIPS, ids=lambda x: type(x).__name__)
def test_clip_gradients(clip: Clip) -> None:
    """Clipping at a huge tau changes nothing; rescaling keeps the direction; a clipped token has no gradient."""
    torch.manual_seed(2)
    student = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    teacher = 2 * torch.randn(5, 8, dtype=torch.float64)
    plain, tokens = run(DivergenceObjective(ForwardKL()), student, teacher)
    (reference,) = torch.autograd.grad(plain, student)
    value, clipped = run(DivergenceObjective(ForwardKL(), clip=clip), student, teacher)
    (gradient,) = torch.autograd.grad(value, student)
    if isinstance(clip, NoClip):
        torch.testing.assert_close(gradient, reference)
        assert not clipped["clipped"].any()
    if isinstance(clip, TokenClip):
        above = tokens["forward_kl"] > clip.tau
        assert above.any() and (gradient[above] == 0).all()
        torch.testing.assert_close(gradient[~above], reference[~above])
        assert clipped["clipped"].bool().equal(above)
        torch.testing.assert_close(clipped["clipped_mass"], (tokens["forward_kl"] - clip.tau).clamp(min=0))
    if isinstance(clip, RescaleClip):
        factor = (clip.tau / tokens["forward_kl"]).clamp(max=1)
        torch.testing.assert_close(gradient, reference * factor[:, None])
    if isinstance(clip, PointwiseClip):
        # The trap: the entry that the teacher most wants raised is clipped, so it is pushed *down*.
        one, two = torch.tensor([[0.0, 0.0, 0.0]], requires_grad=True), torch.tensor([[3.0, 0.0, 0.0]])
        for tau, sign in [(1e3, -1), (0.05, 1)]:
            (g,) = torch.autograd.grad(run(DivergenceObjective(ForwardKL(), clip=PointwiseClip(tau)), one, two)[0], one)
            assert float(g[0, 0]) * sign > 0


def test_sampled_token_is_reverse_kl_in_expectation() -> None:
    """Its gradient, averaged over tokens drawn from the student, is the reverse KL's."""
    torch.manual_seed(3)
    student = torch.randn(1, 6, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(1, 6, dtype=torch.float64)
    (reference,) = torch.autograd.grad(run(DivergenceObjective(ReverseKL()), student, teacher)[0], student)
    probabilities = student.detach().softmax(-1)[0]
    mean = torch.zeros_like(reference)
    for token in range(6):
        loss, _ = run(SampledTokenObjective(), student, teacher, torch.tensor([token]))
        mean += probabilities[token] * torch.autograd.grad(loss, student)[0]
    torch.testing.assert_close(mean, reference)


@pytest.mark.parametrize(
    "objective", [DivergenceObjective(), SampledTokenObjective(), SampledKLObjective(), NegativeLogLikelihood()]
)
@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_gradient_reaches_the_student_and_its_head_alone(objective: Objective, chunk: int) -> None:
    """Chunks and hand-over against plain autograd, with a head that trains."""
    torch.manual_seed(4)
    hidden = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    head = torch.nn.Linear(5, 9, dtype=torch.float64)
    teacher = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    targets, weights = torch.randint(9, (7,)), torch.rand(7, dtype=torch.float64)
    inputs = [hidden, *head.parameters()]
    states = TokenStates(hidden, head, tuple(head.parameters()))
    loss, _ = in_chunks(objective, chunk)(states, TokenStates(teacher, head), targets, weights)
    (3 * loss).backward()
    logprobs = head(hidden).log_softmax(-1)
    plain = objective.per_token(logprobs, head(teacher).detach().log_softmax(-1), targets)[0]
    expected = torch.autograd.grad(3 * (plain * weights).sum(), inputs)
    assert teacher.grad is None
    for tensor, gradient in zip(inputs, expected, strict=True):
        torch.testing.assert_close(tensor.grad, gradient)


def test_half_precision_states_give_a_full_precision_divergence() -> None:
    hidden, head = torch.randn(50, 8).bfloat16(), torch.nn.Linear(8, 30).bfloat16()
    teacher = (hidden.float() + 0.01 * torch.randn(50, 8)).bfloat16()
    objective = DivergenceObjective()
    with torch.no_grad():
        _, tokens = objective(TokenStates(hidden, head), TokenStates(teacher, head), torch.zeros(50).long(), torch.ones(50))
        s, t = (head(x).double().log_softmax(-1) for x in (hidden, teacher))
    expected = (t.exp() * (t - s)).sum(-1)
    assert tokens["forward_kl"].dtype == torch.float32
    torch.testing.assert_close(tokens["forward_kl"].double(), expected, atol=1e-6, rtol=1e-3)


def test_no_token_gives_a_zero_that_keeps_its_graph() -> None:
    hidden = torch.randn(4, 3, requires_grad=True)
    loss, tokens = run(DivergenceObjective(), hidden[:0], torch.randn(0, 3))
    loss.backward()
    assert float(loss.detach()) == 0 and tokens == {} and (hidden.grad == 0).all()


def test_a_token_without_weight_cannot_spoil_the_loss() -> None:
    student = torch.tensor([S, [math.inf, 0.0, 0.0, 0.0]])
    loss, _ = run(DivergenceObjective(), student, torch.tensor([T, T]), weights=torch.tensor([1.0, 0.0]))
    assert float(loss) == pytest.approx(GOLDEN[1.0][0], rel=1e-5)


def test_token_weights_equal_their_formula() -> None:
    rollouts = Rollouts([[1, 2, 3], [4], [], [5, 6, 7, 8]], [True, True, True, False])
    rows = lambda **kw: [w.tolist() for w in DivergenceObjective(**kw).token_weights(rollouts)]  # noqa: E731
    assert rows() == [[1, 1, 1], [1], [], [1, 1, 1, 1]]
    assert rows(skip_first_tokens=2) == [[0, 0, 1], [0], [], [0, 0, 1, 1]]
    assert rows(include_truncated=False) == [[1, 1, 1], [1], [], [0, 0, 0, 0]]
    third = pytest.approx(1 / 3)
    assert rows(reduction="sequence_mean") == [[third] * 3, [1], [], [0.25] * 4]
    assert rows(reduction="sequence_mean", skip_first_tokens=1) == [[0, 0.5, 0.5], [0], [], [0, third, third, third]]


@pytest.mark.parametrize("support", [TopKRenormalized, TopKWithTail])
def test_top_k_must_be_smaller_than_the_vocabulary(support: type) -> None:
    support(9).check(10, "support")
    with pytest.raises(ConfigError) as refused:
        support(10).check(10, "support")
    assert refused.value.setting == "support.k"


def test_position_weights_equal_their_formula() -> None:
    halving = DivergenceObjective(position_weight=DecayingPositions(2.0))
    rollouts = Rollouts([[5, 6, 7, 8, 9], [5]], [True, False])
    torch.testing.assert_close(halving.token_weights(rollouts)[0], torch.tensor([1, 0.5**0.5, 0.5, 0.5**1.5, 0.25]))
    first = DivergenceObjective(position_weight=FirstPositions(2, 0.25), skip_first_tokens=1)
    assert first.token_weights(rollouts)[0].tolist() == [0, 1, 0.25, 0.25, 0.25]
    each = DivergenceObjective(reduction="sequence_mean", position_weight=FirstPositions(2, 0.25))
    assert [float(row.sum()) for row in each.token_weights(rollouts)] == pytest.approx([1, 1])
    one = DivergenceObjective(reduction="sequence_mean", position_weight=DecayingPositions(0.1), skip_first_tokens=3)
    assert [float(row.sum()) for row in one.token_weights(rollouts)] == pytest.approx([1, 0])


def test_the_sampled_estimate_of_the_reverse_kl_is_unbiased_and_never_negative() -> None:
    student, teacher = (torch.tensor(values).log_softmax(-1)[None] for values in (S, T))
    each = torch.stack(
        [SampledKLObjective().per_token(student, teacher, torch.tensor([token]))[0] for token in range(len(S))]
    )
    assert bool((each >= 0).all())
    assert float((student.exp()[0] * each[:, 0]).sum()) == pytest.approx(0.90823381, rel=1e-5)
