"""Tests of deterministic cumulative sums and top-p sampling."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from transformers import TopPLogitsWarper

from helpers.models import PROMPTS
from helpers.strict_device import strict_device, unavailable
from opsd_lightning.models.policy import Policy
from opsd_lightning.rollouts.cumulative import TopP, cumulative_sums
from opsd_lightning.rollouts.transformers_engine import TransformersEngine
from opsd_lightning.types import Sampling


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("deterministic")
@pytest.mark.skipif((reason := unavailable()) is not None, reason=str(reason))
@pytest.mark.parametrize("size", [1, 64, 65, 1000, 64 * 64 + 1])
def test_sums_on_a_gpu_need_no_cumsum(size: int) -> None:
    x = torch.rand(3, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with strict_device() as device:
        with device.phase("sums") as counts:
            found = cumulative_sums(x.to("cuda:0"), torch.float64).cpu()
        with device.phase("top-p"):
            top = TopP(0.7)(torch.zeros(3, 0), x.to("cuda:0")).cpu()
        kernels = {name for each in device.counts.values() for name in each.kernels}
    assert not [name for name in kernels if "cumsum" in name] and counts.kernels
    torch.testing.assert_close(found, x.cumsum(-1), rtol=1e-12, atol=0)
    torch.testing.assert_close(top, TopPLogitsWarper(0.7)(torch.zeros(3, 0), x))


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.95, 0.999])
def test_top_p_is_that_of_transformers(top_p: float) -> None:
    scores = 3 * torch.randn(8, 300, generator=torch.Generator().manual_seed(1))
    ids = torch.zeros(8, 1, dtype=torch.long)
    found = TopP(top_p)(ids, scores)
    torch.testing.assert_close(found, TopPLogitsWarper(top_p)(ids, scores))
    assert 0 < torch.isinf(found).float().mean() < 1


@pytest.mark.usefixtures("deterministic")
@pytest.mark.skipif((reason := unavailable()) is not None, reason=str(reason))
def test_rollouts_on_a_gpu_need_no_cumsum_of_probabilities(make_policy: Callable[..., Policy]) -> None:
    """And give the tokens that they give with it."""
    sampling = Sampling(max_new_tokens=6, temperature=1.0, top_p=0.9, top_k=20, n=2)
    with strict_device() as device:
        model = make_policy().build(torch.device("cuda", 0)).to("cuda:0")
        with device.phase("deterministic") as counts:
            found = TransformersEngine().generate(model, PROMPTS, sampling, seed=0)
        torch.use_deterministic_algorithms(False)
        with device.phase("default") as default:
            expected = TransformersEngine().generate(model, PROMPTS, sampling, seed=0)
    integers = 1  # positions, which transformers counts: sums of integers are deterministic
    assert default.kernels["cumsum"] == integers + 2 * 6 and counts.kernels["cumsum"] == integers
    assert found.completions == expected.completions
