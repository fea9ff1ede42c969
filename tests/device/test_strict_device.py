"""Tests of the imitated device itself: it refuses, counts and casts as CUDA does."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from transformers import AutoModelForCausalLM

from helpers.paths import ROOT
from helpers.strict_device import (
    CUDA,
    FLOAT32_RESULT,
    LOWER_PRECISION,
    UNSUPPORTED,
    WIDEST,
    Card,
    DeviceMixError,
    DeviceTensor,
    StrictDevice,
    autocast_operations,
    strict_device,
    unavailable,
)

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))


@pytest.fixture
def device() -> Iterator[StrictDevice]:
    with strict_device() as found:
        yield found


def test_tensors_report_the_device_and_compute_on_it(device: StrictDevice) -> None:
    x = torch.arange(4.0, device="cuda", requires_grad=True)
    (x * x).sum().backward()
    assert isinstance(x.grad, DeviceTensor)
    assert x.device == x.grad.device == torch.zeros(2).to("cuda").device == torch.zeros(2).cuda().device == CUDA
    assert x.is_cuda and not x.is_cpu
    assert x.grad.tolist() == [0, 2, 4, 6]
    layer = torch.nn.Linear(2, 2).to("cuda")
    assert layer.weight.device == CUDA and layer.cpu().weight.device.type == "cpu"


def test_nothing_of_the_imitation_is_left_outside() -> None:
    with strict_device():
        x = torch.ones(2, device="cuda")
        with torch.autocast("cuda", dtype=torch.bfloat16):
            pass
    assert not torch.cuda.is_available() and torch.zeros(2).to("cpu").tolist() == [0, 0]
    with pytest.raises(RuntimeError):
        x + 1


@pytest.mark.parametrize(
    "mix",
    [
        lambda x: x + torch.ones(3),
        lambda x: torch.cat([x, torch.ones(3)]),
        lambda x: torch.ones(3).index_put_((torch.arange(3),), x),
        lambda x: torch.rand(3, device="cuda", generator=torch.Generator()),
        lambda x: functional.scaled_dot_product_attention(x[None, None], x[None, None], torch.ones(1, 1, 3)),
        lambda x: functional.rms_norm(x, (3,), torch.ones(3)),
    ],
)
def test_a_mix_of_devices_raises(mix: Callable[[torch.Tensor], torch.Tensor], device: StrictDevice) -> None:
    with pytest.raises(DeviceMixError):
        mix(torch.ones(3, device="cuda"))


def test_a_mix_in_a_backward_pass_raises(device: StrictDevice) -> None:
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):  # type: ignore[no-untyped-def]
            return x * 2

        @staticmethod
        def backward(ctx, gradient):  # type: ignore[no-untyped-def]
            return gradient * torch.ones(3)

    x = torch.ones(3, device="cuda", requires_grad=True)
    with pytest.raises(DeviceMixError):
        Wrong.apply(x).sum().backward()


def test_scalars_and_indices_may_be_on_the_cpu(device: StrictDevice) -> None:
    x = torch.ones(3, device="cuda")
    assert (x * torch.tensor(2.0))[torch.tensor([0, 2])].tolist() == [2, 2]


def test_mixes_are_counted_if_they_do_not_raise() -> None:
    with strict_device(strict=False) as device:
        assert (torch.ones(3, device="cuda") + torch.ones(3)).tolist() == [2, 2, 2]
    assert device.mixes.total() == 1


@pytest.mark.parametrize(
    ("wait", "times"),
    [
        (lambda x: x.sum().item(), 1),
        (lambda x: bool((x > 0).all()), 1),
        (lambda x: x.tolist(), 1),
        (lambda x: x.cpu(), 1),
        (lambda x: x[x > 0], 1),
        (lambda x: x.nonzero(), 1),
        (lambda x: torch.where(x > 0), 1),
        (lambda x: x.long().repeat_interleave(x.long()), 1),
        (lambda x: torch.equal(x, x), 1),
        (lambda x: torch.cuda.synchronize(), 1),
        (lambda x: torch.cuda.Event().synchronize(), 1),
        (lambda x: x.masked_fill(x > 0, 1.0), 0),
        (lambda x: x.__setitem__(x > 0, 1.0), 0),
        (lambda x: x[torch.arange(2, device="cuda")], 0),
        (lambda x: x.softmax(-1).argmax(), 0),
        (lambda x: torch.multinomial(x, 1), 0),
    ],
)
def test_waits_of_the_host_are_counted(wait: Callable[[torch.Tensor], object], times: int, device: StrictDevice) -> None:
    x = torch.ones(4, device="cuda")
    with device.phase("read") as counts:
        wait(x)
    assert counts.waits.total() == times
    assert counts.uploads.total() == 0


@pytest.mark.parametrize(
    ("upload", "times"),
    [
        (lambda x: torch.tensor([1.0, 2.0], device="cuda"), 1),
        (lambda x: torch.ones(4).to("cuda"), 1),
        (lambda x: x.copy_(torch.ones(4)), 1),
        (lambda x: x[torch.arange(2)], 1),
        (lambda x: torch.ones(4).to("cuda", non_blocking=True), 0),
        (lambda x: torch.ones(4, device="cuda"), 0),
        (lambda x: torch.arange(4, device="cuda"), 0),
    ],
)
def test_copies_to_the_device_are_counted(
    upload: Callable[[torch.Tensor], object], times: int, device: StrictDevice
) -> None:
    x = torch.ones(4, device="cuda")
    with device.phase("upload") as counts:
        upload(x)
    assert counts.synchronizations.total() == counts.uploads.total() == times


def test_kernels_are_counted_and_views_are_free(device: StrictDevice) -> None:
    x, w = torch.ones(2, 3, device="cuda"), torch.ones(5, 3, device="cuda")
    with device.phase("layer") as counts:
        functional.silu(functional.linear(x, w)).view(-1)[2:].unsqueeze(0)
    assert counts.kernels == {"mm": 1, "silu": 1}


@pytest.mark.parametrize(
    ("fused", "name"),
    [
        (lambda x: functional.scaled_dot_product_attention(x, x, x, is_causal=True), "scaled_dot_product_attention"),
        (lambda x: functional.rms_norm(x, (4,), torch.ones(4).to(x.device), 1e-6), "_fused_rms_norm"),
    ],
)
def test_fused_operations_are_one_kernel_with_the_cpu_results(
    fused: Callable[[torch.Tensor], torch.Tensor], name: str, device: StrictDevice
) -> None:
    expected = torch.rand(1, 2, 6, 4, requires_grad=True)
    x = expected.detach().to("cuda").requires_grad_()
    weight = torch.rand(1, 2, 6, 4)
    with device.phase("fused") as counts:
        out = fused(x)
    assert counts.kernels == {name: 1}
    with device.phase("backward") as counts:
        (out * weight.to("cuda")).sum().backward()
    assert counts.kernels[f"{name}_backward"] == 1
    assert not counts.on_cpu
    on_cpu = fused(expected)
    (on_cpu * weight).sum().backward()
    assert x.grad is not None and expected.grad is not None
    torch.testing.assert_close(out.cpu(), on_cpu)
    torch.testing.assert_close(x.grad.cpu(), expected.grad)


def test_large_results_and_work_on_the_cpu_are_counted() -> None:
    with strict_device(large=100) as device:
        with device.phase("small") as small:
            torch.zeros(10, 10, device="cuda").exp()
        with device.phase("large") as large:
            torch.zeros(10, 11, device="cuda").exp().view(-1)
        with device.phase("cpu") as cpu:
            torch.zeros(5000).exp()
    assert small.large.total() == 0 and large.large.total() == 2
    assert cpu.on_cpu.total() == 1 and large.on_cpu.total() == 0


def test_the_device_draws_from_its_own_generator(device: StrictDevice) -> None:
    torch.manual_seed(3)
    first = torch.rand(4, device="cuda").tolist()
    torch.manual_seed(3)
    with device.phase("step"):
        torch.rand(100)
        torch.nn.Linear(2, 2, device="meta")
    assert torch.rand(4, device="cuda").tolist() == first
    assert device.cpu_random["step"].total() == 1 and device.cpu_random["outside"].total() == 0


# -- autocast ----------------------------------------------------------------------------------------------------------


def test_autocast_lists_are_those_of_this_torch() -> None:
    """A torch with other lists fails here, so that the lists of the imitation are renewed."""
    named = LOWER_PRECISION | FLOAT32_RESULT | WIDEST | UNSUPPORTED
    # `norm` appends the dtype to its arguments, which is a float32 computation, too.
    assert named - autocast_operations() == set()


X, Y = (3, 4), (4, 3)
AUTOCAST: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "mm": lambda x, y: x @ y,
    "linear": lambda x, y: functional.linear(x, x),
    "bmm": lambda x, y: x.unsqueeze(0) @ y.unsqueeze(0),
    "baddbmm": lambda x, y: torch.baddbmm(x.narrow(1, 0, 3).unsqueeze(0), x.unsqueeze(0), y.unsqueeze(0)),
    "einsum": lambda x, y: torch.einsum("ij,jk->ik", x, y),
    "vecdot": lambda x, y: torch.linalg.vecdot(x, x),
    "attention": lambda x, y: functional.scaled_dot_product_attention(*[x.view(1, 1, 3, 4)] * 3),
    "sum": lambda x, y: x.sum(),
    "sum of a dimension": lambda x, y: x.sum(-1),
    "sum with a dtype": lambda x, y: x.sum(-1, dtype=torch.float16),
    "mean": lambda x, y: x.mean(-1),
    "softmax": lambda x, y: x.softmax(-1),
    "log_softmax": lambda x, y: x.log_softmax(-1),
    "logsumexp": lambda x, y: x.logsumexp(-1),
    "exp": lambda x, y: x.exp(),
    "log": lambda x, y: x.log(),
    "pow": lambda x, y: x.pow(2),
    "rsqrt": lambda x, y: x.rsqrt(),
    "cumsum": lambda x, y: x.cumsum(-1),
    "vector norm": lambda x, y: torch.linalg.vector_norm(x),
    "norm": lambda x, y: x.norm(),
    "norm of a dimension": lambda x, y: x.norm(dim=-1),
    "layer_norm": lambda x, y: functional.layer_norm(x, (4,)),
    "cross entropy": lambda x, y: functional.cross_entropy(x, torch.zeros(3, dtype=torch.long, device=x.device)),
    "mul": lambda x, y: x * x,
    "silu": lambda x, y: functional.silu(x),
    "cat": lambda x, y: torch.cat([x, x]),
    "gather": lambda x, y: x.gather(-1, torch.zeros(3, 1, dtype=torch.long, device=x.device)),
    "addcmul": lambda x, y: torch.addcmul(x, x, x),
    "addcmul of two dtypes": lambda x, y: torch.addcmul(x, x.float(), x),
    "lerp": lambda x, y: x.lerp(x, 0.5),
    "cosine similarity": lambda x, y: functional.cosine_similarity(x, x),
    "kl_div": lambda x, y: functional.kl_div(x, x),
    "double": lambda x, y: x.double() @ y.double(),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", AUTOCAST)
@pytest.mark.filterwarnings("ignore:reduction.*'mean':UserWarning")
def test_autocast_gives_the_dtypes_of_cuda(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference is CUDA's own autocast on fake tensors, which hold no values."""
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda: True)
    with FakeTensorMode(), torch.autocast("cuda", dtype=torch.bfloat16):
        expected = AUTOCAST[name](*(torch.empty(shape, device="cuda", dtype=dtype) for shape in (X, Y))).dtype
    monkeypatch.undo()
    with strict_device(), torch.autocast("cuda", dtype=torch.bfloat16):
        assert AUTOCAST[name](*(torch.ones(shape, device="cuda", dtype=dtype) for shape in (X, Y))).dtype == expected


# -- the card ----------------------------------------------------------------------------------------------------------


def test_memory_queries_follow_the_tensors(device: StrictDevice) -> None:
    free, total = torch.cuda.mem_get_info()
    assert total == device.card.total_memory == torch.cuda.get_device_properties(0).total_memory and free == total
    x = torch.zeros(1000, device="cuda")
    view = x[10:]
    torch.zeros(500, device="cuda")
    assert torch.cuda.memory_allocated() == 4000
    assert torch.cuda.max_memory_allocated() == 6000
    assert torch.cuda.mem_get_info()[0] == total - 4000
    torch.cuda.reset_peak_memory_stats()
    assert torch.cuda.max_memory_allocated() == 4000
    del x
    assert torch.cuda.memory_allocated() == 4000, "a view keeps the memory"
    del view
    torch.cuda.empty_cache()
    assert torch.cuda.memory_allocated() == 0


def test_activations_are_kept_for_the_backward_pass_and_then_released(device: StrictDevice) -> None:
    x = torch.ones(1000, device="cuda", requires_grad=True)
    out = x.exp().exp().sum()
    kept = torch.cuda.memory_allocated()
    assert kept >= 12000
    out.backward()
    del out
    assert torch.cuda.memory_allocated() == 8000  # x and its gradient


def test_an_allocation_beyond_the_card_raises(device: StrictDevice) -> None:
    device.card.total_memory = 10_000
    device.card.used_elsewhere = 2_000
    kept = torch.zeros(1000, device="cuda")
    with pytest.raises(torch.OutOfMemoryError):
        torch.zeros(1001, device="cuda")
    with pytest.raises(torch.OutOfMemoryError):
        torch.zeros(1001).to("cuda")
    assert torch.cuda.memory_allocated() == 4000
    torch.zeros(1000, device="cuda")
    assert kept.sum().item() == 0


@pytest.mark.parametrize(("card", "supported"), [(Card(), True), (Card.t4(), False)])
def test_bfloat16_is_that_of_the_card(card: Card, supported: bool) -> None:
    with strict_device(card):
        assert torch.cuda.is_bf16_supported(including_emulation=False) is supported
        assert torch.cuda.get_device_capability() == card.capability
        assert torch.cuda.get_device_name() == torch.cuda.get_device_properties(0).name == card.name


def test_a_model_that_is_loaded_here_first_has_its_frequencies(folders: dict[str, str]) -> None:
    """Torch caches the functions that a meta device acts on. A replaced one would leave transformers' buffers unset."""
    torch.utils._device._device_constructors.cache_clear()
    with strict_device():
        here = AutoModelForCausalLM.from_pretrained(folders["llama"]).model.rotary_emb.inv_freq
    after = AutoModelForCausalLM.from_pretrained(folders["llama"]).model.rotary_emb.inv_freq
    assert torch.equal(here, after) and float(after[0]) == 1


def test_the_context_of_another_device_holds_inside() -> None:
    """Transformers builds models on the meta device, and computes their buffers only if a new tensor is there."""
    torch.utils._device._device_constructors.cache_clear()
    with strict_device():
        with torch.device("meta"):
            assert torch.tensor([]).device.type == torch.empty(2).device.type == "meta"
        with torch.device(CUDA):
            assert torch.tensor([]).device == torch.empty(2).device == CUDA
    with torch.device("meta"):
        assert torch.tensor([]).device.type == torch.as_tensor([1]).device.type == "meta"


_BACKWARD_BEFORE_A_FORK = """
import os, torch
from helpers.strict_device import strict_device
with strict_device():
    torch.ones(2, device="cuda", requires_grad=True).sum().backward()
if not (child := os.fork()):
    torch.ones(2, requires_grad=True).sum().backward()
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""


@pytest.mark.integration
def test_processes_forked_later_can_make_backward_passes() -> None:
    """Also if the first backward pass of the process was on the device. Other tests fork this process."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    code = [sys.executable, "-W", "ignore", "-c", _BACKWARD_BEFORE_A_FORK]
    ran = subprocess.run(code, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
