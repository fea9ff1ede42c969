"""Tests of rollouts from vLLM: from a server that speaks its protocol, and with the marker vllm from vLLM itself."""

from __future__ import annotations

import copy
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from lightning.pytorch import Callback
from peft import PeftModel
from transformers import BitsAndBytesConfig

from helpers.distributed import STRATEGIES, run
from helpers.engines import check_greedy_rollouts
from helpers.messages import mentions
from helpers.models import EOS, PROMPTS, SECOND_EOS, perturb
from helpers.paths import ROOT
from helpers.processes import on_ranks
from helpers.training import Recorder, parts, trainer
from helpers.vllm_protocol import ProtocolServer, hang
from opsd_lightning.losses.objectives import token_logprobs
from opsd_lightning.models.dequantized import write_dequantized
from opsd_lightning.models.policy import LoRA, Policy
from opsd_lightning.models.scoring import Scorer, score
from opsd_lightning.rollouts.transformers_engine import TransformersEngine
from opsd_lightning.rollouts.vllm.client import ServerPool
from opsd_lightning.rollouts.vllm.engines import VLLMServerEngine
from opsd_lightning.rollouts.vllm.protocol import Expected, Row, as_rollouts
from opsd_lightning.teachers import EMATeacher, FixedTeacher
from opsd_lightning.types import Rollouts, Sampling, UserError

pytestmark = [
    pytest.mark.integration,
    # Servers fail here on purpose. Killed ones leave sockets.
    pytest.mark.filterwarnings("ignore:vLLM server http:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:Exception ignored in. <socket:pytest.PytestUnraisableExceptionWarning"),
    # `pytest.warns` issues this one again, without the module by which pyproject.toml ignores it.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


class Watch(Callback):
    """Records the metrics of each step, and calls a function before it."""

    def __init__(self, before: Callable[[int], None] = lambda step: None) -> None:
        self.before, self.logged = before, []

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        self.before(trainer.global_step)

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *args: Any) -> None:
        self.logged.append({k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("train/")})


def worst_difference(model: PeftModel, rollouts: Any) -> float:
    """Between the engine's log-probabilities and those of the model as it is now."""
    prompts = [prompt for prompt in PROMPTS for _ in range(rollouts.n)]
    states, targets = score(model, prompts, rollouts.completions)
    theirs = torch.tensor([value for row in rollouts.logprobs for value in row])
    return float((token_logprobs(states, targets) - theirs).abs().max())


# -- a server that speaks its protocol ----------------------------------------------------------------------------------


@pytest.fixture
def servers(folders: dict[str, str]) -> Iterator[Callable[..., ProtocolServer]]:
    started = []

    def start(architecture: str = "llama", **settings: Any) -> ProtocolServer:
        started.append(ProtocolServer(folders[architecture], **settings))
        return started[-1]

    yield start
    for server in started:
        server.kill()


@pytest.fixture
def make_engine(tmp_path: Path) -> Iterator[Callable[..., VLLMServerEngine]]:
    made = []

    def make(*servers: ProtocolServer, **settings: Any) -> VLLMServerEngine:
        settings = {"retries": 2, "timeout_seconds": 20.0, "max_concurrency": 4} | settings
        made.append(VLLMServerEngine([server.url for server in servers], str(tmp_path / "adapters"), **settings))
        return made[-1]

    yield make
    for engine in made:
        engine.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("opsd-")], "threads are left"


def train(policy: Policy, engine: VLLMServerEngine, folder: Path, *callbacks: Callback, **settings: Any) -> Any:
    """A fit without a second thought: three steps of two questions, four completions."""
    run = {"max_steps": 3, "limit_val_batches": 0} | settings.pop("run", {})
    torch.manual_seed(0)
    module, data = parts(policy, rollouts=engine, **{"lr_scheduler": None} | settings)
    fit = trainer(folder, *callbacks, **run)
    fit.fit(module, data)
    return module


def test_greedy_rollouts_are_the_models_own(
    servers: Callable[..., ProtocolServer], make_engine: Callable[..., VLLMServerEngine], built: Callable[..., PeftModel]
) -> None:
    model, engine = built(), make_engine(servers(), servers())
    check_greedy_rollouts(engine, model)


def test_samples_are_seeded_and_end_at_any_eos(
    servers: Callable[..., ProtocolServer], make_engine: Callable[..., VLLMServerEngine], built: Callable[..., PeftModel]
) -> None:
    model, engine = built(), make_engine(servers(), servers())
    sampling = Sampling(max_new_tokens=30, n=4, temperature=0.9, top_p=0.9, top_k=30, min_p=0.01)
    first = engine.generate(model, PROMPTS, sampling, seed=1)
    assert engine.generate(model, PROMPTS, sampling, seed=1) == first
    assert engine.generate(model, PROMPTS, sampling, seed=2) != first
    assert len(set(map(tuple, first.completions))) > 8
    for row, ended, logprobs in zip(first.completions, first.terminated, first.logprobs or [], strict=True):
        ends = [n for n, token in enumerate(row) if token in (EOS, SECOND_EOS)]
        assert ends == ([len(row) - 1] if ended else []) and (ended or len(row) == 30) and len(logprobs) == len(row)
    # At temperature 1, whatever is sampled at.
    assert worst_difference(model, first) < 1e-4


@pytest.mark.parametrize("start", ["base", "adapter"])
def test_active_adapter_is_served(
    start: str,
    servers: Callable[..., ProtocolServer],
    make_engine: Callable[..., VLLMServerEngine],
    built: Callable[..., PeftModel],
) -> None:
    """The base model for a fixed teacher, the frozen adapter for another, the student's own otherwise."""
    model, server = built(), servers()
    engine = make_engine(server)
    teacher = FixedTeacher() if start == "base" else EMATeacher(0.5)
    if start == "adapter":
        teacher.attach(model)
        perturb(model, 0.3, seed=9)
    sampling = Sampling(max_new_tokens=6)
    for _ in range(2):
        with teacher.weights(model):
            assert worst_difference(model, engine.generate(model, PROMPTS, sampling, 0)) < 1e-4
        assert worst_difference(model, engine.generate(model, PROMPTS, sampling, 0)) < 1e-4
    names = {body["model"] for body in server.requests}
    kinds = {server.folder, "opsd"} if start == "base" else {"opsd-teacher", "opsd"}
    assert {name if name == server.folder else name.rsplit("-", 2)[0] for name in names} == kinds
    assert server.paths.count("/v1/load_lora_adapter") == len(names - {server.folder}), (
        "unchanged weights are not sent again"
    )


def test_every_step_samples_from_the_weights_just_trained(
    servers: Callable[..., ProtocolServer],
    make_engine: Callable[..., VLLMServerEngine],
    make_policy: Callable[..., Policy],
    tmp_path: Path,
) -> None:
    pair = servers(), servers()
    watch = Watch()
    train(make_policy(), make_engine(*pair), tmp_path, watch, optimizer=lambda p: torch.optim.AdamW(p, lr=0.05))
    assert len(watch.logged) == 3
    for step in watch.logged:
        assert step["train/rollout_logprob_difference_max"] < 1e-4
        assert "train/importance_ratio" not in step
    for server in pair:
        assert server.requests, "both servers get a share"
        assert server.paths.count("/v1/load_lora_adapter") == 3
        assert server.adapters == {}, "unloaded at the end"
    assert len({body["model"] for server in pair for body in server.requests}) == 3
    assert not list((tmp_path / "adapters").iterdir()), "no version is left behind"


def test_a_stale_adapter_or_another_model_stops_training(
    servers: Callable[..., ProtocolServer],
    make_engine: Callable[..., VLLMServerEngine],
    make_policy: Callable[..., Policy],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stale = servers()
    first: list[str] = []
    complete = stale.complete

    def always_the_first(body: dict[str, Any]) -> Any:
        first.append(body["model"])
        status, found = complete(body | {"model": first[0]})
        return status, found | {"model": body["model"]}

    stale.complete = always_the_first  # type: ignore[method-assign]
    # The first version stays loaded, as a server would have it that forgot to replace it.
    monkeypatch.setattr("opsd_lightning.rollouts.vllm.adapters.AdapterVersions.outdated", lambda self, keep=(): [])
    watch = Watch()
    with pytest.raises(UserError, match=mentions("logprob_tolerance", "0.02")):
        train(
            make_policy(),
            make_engine(stale, logprob_tolerance=0.02),
            tmp_path,
            watch,
            optimizer=lambda p: torch.optim.AdamW(p, lr=0.1),
        )
    assert len(watch.logged) == 1, "the first step was right"
    with pytest.raises(UserError, match="base model"):
        train(make_policy("mistral"), make_engine(servers("llama")), tmp_path)


def test_short_outage_is_retried(
    servers: Callable[..., ProtocolServer], make_engine: Callable[..., VLLMServerEngine], built: Callable[..., PeftModel]
) -> None:
    model, server = built(), servers()
    engine = make_engine(server)
    expected = engine.generate(model, PROMPTS, Sampling(max_new_tokens=8, n=3), seed=0)
    left = [3]

    def busy(path: str) -> tuple[int, str] | None:
        left[0] -= path == "/v1/completions"
        return (503, "busy") if path == "/v1/completions" and left[0] >= 0 else None

    server.hook = busy
    assert engine.generate(model, PROMPTS, Sampling(max_new_tokens=8, n=3), seed=0) == expected
    server.hook = lambda path: None
    server.kill()  # and one that comes back without its adapters
    threading.Timer(0.3, server.start).start()
    assert engine.generate(model, PROMPTS, Sampling(max_new_tokens=8, n=3), seed=0) == expected


@pytest.mark.parametrize("fresh", [True, False], ids=["first request", "kept connection"])
def test_a_load_whose_answer_is_lost_is_sent_again(
    servers: Callable[..., ProtocolServer],
    make_engine: Callable[..., VLLMServerEngine],
    built: Callable[..., PeftModel],
    monkeypatch: pytest.MonkeyPatch,
    fresh: bool,
) -> None:
    model, server, sampling = built(), servers(), Sampling(max_new_tokens=6)
    engine, load = make_engine(server), server.load
    if not fresh:
        engine.generate(model, PROMPTS, sampling, seed=1)
        perturb(model, 0.3, seed=8)

    def lost(name: str, folder: str) -> tuple[int, Any]:
        if (found := load(name, folder))[0] == 200:
            raise ConnectionAbortedError
        return found

    monkeypatch.setattr(server, "load", lost)
    assert worst_difference(model, engine.generate(model, PROMPTS, sampling, seed=7)) < 1e-4


@pytest.mark.parametrize("death", ["killed", "hangs"])
def test_a_dying_servers_rollouts_go_to_the_others(
    death: str,
    servers: Callable[..., ProtocolServer],
    make_engine: Callable[..., VLLMServerEngine],
    built: Callable[..., PeftModel],
) -> None:
    model, dying, other = built(), servers(), servers()
    sampling = Sampling(max_new_tokens=20, n=6)
    engine = make_engine(dying, other, timeout_seconds=20.0 if death == "killed" else 5.0, retries=0)
    expected = engine.generate(model, PROMPTS, sampling, seed=0)
    seen = [0]

    def hook(path: str) -> None:
        seen[0] += path == "/v1/completions"
        if seen[0] >= 2:
            if death == "killed":
                threading.Thread(target=dying.kill).start()
            else:
                hang(9.0)

    dying.hook = hook
    with pytest.warns(RuntimeWarning, match=dying.url):
        assert engine.generate(model, PROMPTS, sampling, seed=0) == expected
    assert engine._pool is not None and [server.alive for server in engine._pool.servers] == [False, True]
    # It is asked again, and back in use with the newest adapter.
    dying.hook = lambda path: None
    if death == "killed":
        dying.start()
    perturb(model, 0.1, seed=5)
    dying.requests.clear()
    assert worst_difference(model, engine.generate(model, PROMPTS, sampling, seed=0)) < 1e-4
    assert dying.requests and engine._pool.servers[0].alive


def test_no_server_left_is_an_error(
    servers: Callable[..., ProtocolServer], make_engine: Callable[..., VLLMServerEngine], built: Callable[..., PeftModel]
) -> None:
    model, server = built(), servers()
    engine = make_engine(server, retries=1)
    engine.generate(model, PROMPTS, Sampling(max_new_tokens=2), seed=0)
    server.kill()
    with pytest.raises(UserError, match=r"^model\.rollouts\.init_args\.urls: "), pytest.warns(RuntimeWarning):
        engine.generate(model, PROMPTS, Sampling(max_new_tokens=2), seed=0)


Case = tuple[dict[str, Any], dict[str, Any], str]
REFUSALS: dict[str, Case] = {
    "no server": ({}, {"retries": 0}, r"http://127.*docs/vllm\.md"),
    "context": ({"max_model_len": 12}, {}, r"--max-model-len .* 12 .* 15 "),
    "rank": ({"max_rank": 2}, {}, "--max-lora-rank"),
    "no run-time loading": ({"lora": False}, {}, "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_server_limits_are_refused_with_one_message(
    case: str,
    servers: Callable[..., ProtocolServer],
    make_engine: Callable[..., VLLMServerEngine],
    built: Callable[..., PeftModel],
) -> None:
    server_settings, settings, message = REFUSALS[case]
    server = servers(**server_settings)
    if case == "no server":
        server.kill()
    catch = pytest.warns(RuntimeWarning) if case == "no server" else nullcontext()
    with catch, pytest.raises(UserError, match=message):
        make_engine(server, **settings).generate(built(), PROMPTS, Sampling(max_new_tokens=8), seed=0)


def test_unusable_settings_are_refused(
    servers: Callable[..., ProtocolServer],
    make_engine: Callable[..., VLLMServerEngine],
    built: Callable[..., PeftModel],
    tmp_path: Path,
) -> None:
    with pytest.raises(UserError, match=r"^model\.rollouts\.init_args\.urls: "):
        VLLMServerEngine([])
    with pytest.raises(UserError, match=r"^model\.rollouts\.init_args\.urls: .*llama.*qwen3"):
        make_engine(servers("llama"), servers("qwen3")).generate(built(), PROMPTS, Sampling(max_new_tokens=2), seed=0)
    for name, value in {"use_dora": True, "rank_pattern": {"k_proj": 2}, "alpha_pattern": {"up_proj": 3}}.items():
        adapted = built(lora=LoRA(r=4, alpha=8, dropout=0.0, options={name: value}))
        with pytest.raises(UserError, match=rf"^model\.policy\.lora\.options: .*{name}"):
            make_engine(servers()).generate(adapted, PROMPTS, Sampling(max_new_tokens=2), seed=0)
    server = servers()
    server.hook = lambda path: (404, f"No adapter found for {tmp_path}") if "load_lora" in path else None
    with pytest.raises(UserError, match="adapter_folder"):
        make_engine(server).generate(built(), PROMPTS, Sampling(max_new_tokens=2), seed=0)
    server = servers()
    server.hook = lambda path: (401, "Unauthorized") if path == "/v1/models" else None
    with pytest.raises(UserError, match="api_key_env"):
        make_engine(server).generate(built(), PROMPTS, Sampling(max_new_tokens=2), seed=0)


@pytest.mark.filterwarnings("ignore:model.optimizer.init_args.lr:UserWarning")  # a rate of 0 on purpose
def test_overlap_samples_a_step_ahead_and_weighs_by_it(
    servers: Callable[..., ProtocolServer],
    make_engine: Callable[..., VLLMServerEngine],
    make_policy: Callable[..., Policy],
    tmp_path: Path,
) -> None:
    """With a learning rate of 0 nothing differs; else rollouts are of the weights before the last step."""
    runs: dict[tuple[bool, float], tuple[Any, Any, ProtocolServer]] = {}
    for overlap in (False, True):
        for rate in (0.0, 0.05):
            server, watch, losses = servers(), Watch(), Recorder()
            engine = make_engine(server, overlap=overlap, logprob_tolerance=5.0)
            optimizer = {"optimizer": lambda p, rate=rate: torch.optim.AdamW(p, lr=rate)}
            folder = tmp_path / f"{overlap}{rate}"
            policy = make_policy()
            # Over an epoch's end, and with validation between: four steps an epoch.
            train(
                policy,
                engine,
                folder,
                watch,
                losses,
                **optimizer,
                run={"max_steps": 5, "limit_val_batches": 1, "val_check_interval": 2},
            )
            runs[overlap, rate] = losses.losses, watch.logged, server
    still, still_ahead = runs[False, 0.0], runs[True, 0.0]
    assert list(still_ahead[0].values()) == pytest.approx(list(still[0].values()), rel=1e-4)
    assert [b["prompt"] for b in still_ahead[2].requests if b["max_tokens"] == 8] != []
    for step in still_ahead[1]:
        assert step["train/importance_ratio"] == pytest.approx(1, abs=1e-4)
        assert step["train/importance_ratio_max"] == pytest.approx(1, abs=1e-3)
        assert step["train/importance_ratio_clipped"] == 0
    moving = runs[True, 0.05][1]
    assert moving[0]["train/rollout_logprob_difference_max"] < 1e-4, "the first step samples for itself"
    assert all(step["train/rollout_logprob_difference_max"] > 1e-3 for step in moving[1:])
    assert all(step["train/rollout_logprob_difference_max"] < 1e-4 for step in runs[False, 0.05][1])
    assert any(step["train/importance_ratio_clipped"] > 0 for step in moving)
    # As many completions as without: nothing was sampled twice, and nothing for a sixth step.
    assert len(runs[True, 0.05][2].requests) == len(runs[False, 0.05][2].requests)


@pytest.mark.parametrize("overlap", [False, True], ids=["in step", "ahead"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_ranks_share_servers(
    strategy: str,
    overlap: bool,
    servers: Callable[..., ProtocolServer],
    make_policy: Callable[..., Policy],
    tmp_path: Path,
) -> None:
    """The first rank hands the adapter over, whole also where it is sharded; each samples its own rows."""
    pair = servers(), servers()
    policy, folder = make_policy(), tmp_path / "adapters"

    def work(rank: int) -> Any:
        engine = VLLMServerEngine(
            [server.url for server in pair],
            str(folder),
            timeout_seconds=20.0,
            retries=0,
            overlap=overlap,
            logprob_tolerance=9.0,
        )
        return run(policy, tmp_path, 2, STRATEGIES[strategy], rollouts=engine, lr_scheduler=None)

    first, second = on_ranks(work, tmp_path)
    assert first.losses == second.losses and len(first.losses) == 3
    assert first.completions != second.completions
    for number, step in enumerate(first.logged):
        assert (step["train/rollout_logprob_difference_max"] < 1e-4) == (not overlap or number == 0)
    assert sum(len(server.requests) for server in pair) == 3 * 16
    assert pair[0].paths.count("/v1/load_lora_adapter") == (2 if overlap else 3), "once a version, not once a rank"
    assert not list(folder.iterdir())


def test_a_failure_fails_on_every_rank(
    servers: Callable[..., ProtocolServer], make_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    server = servers(max_rank=2)
    policy = make_policy()

    def work(rank: int) -> str:
        engine = VLLMServerEngine([server.url], str(tmp_path / "adapters"), timeout_seconds=20.0, retries=0)
        with pytest.raises(UserError) as failed:
            run(policy, tmp_path, 2, STRATEGIES["ddp"], rollouts=engine)
        return str(failed.value)

    first, second = on_ranks(work, tmp_path)
    assert first == second and "--max-lora-rank" in first


def test_a_failure_ahead_shows_at_the_next_step_and_other_prompts_are_sampled_anew(
    servers: Callable[..., ProtocolServer], make_engine: Callable[..., VLLMServerEngine], built: Callable[..., PeftModel]
) -> None:
    model, server, sampling = built(), servers(), Sampling(max_new_tokens=6)
    engine = make_engine(server, overlap=True, retries=0)
    engine.prefetch(model, PROMPTS, sampling, seed=7)
    before = copy.deepcopy([p.detach().clone() for p in model.parameters() if p.requires_grad])
    perturb(model, 0.3, seed=8)
    others = engine.generate(model, PROMPTS[:2], sampling, seed=8)  # validation, say: the newer weights
    states, targets = score(model, PROMPTS[:2], others.completions)
    assert others.logprobs is not None
    flat = torch.tensor([value for row in others.logprobs for value in row])
    assert torch.allclose(token_logprobs(states, targets), flat, atol=1e-4)
    stale = engine.generate(model, PROMPTS, sampling, seed=7)  # what was sampled ahead: the older
    assert worst_difference(model, stale) > 1e-3
    with torch.no_grad():
        for parameter, value in zip((p for p in model.parameters() if p.requires_grad), before, strict=True):
            parameter.copy_(value)
    assert worst_difference(model, stale) < 1e-4
    engine.prefetch(model, PROMPTS, sampling, seed=9)
    engine.prefetch(model, PROMPTS, sampling, seed=10)  # takes the place of the other
    server.kill()
    with pytest.raises(UserError, match=r"^model\.rollouts\.init_args\.urls: "), pytest.warns(RuntimeWarning):
        engine.generate(model, PROMPTS, sampling, seed=11)
    server.start()
    assert worst_difference(model, engine.generate(model, PROMPTS, sampling, seed=12)) < 1e-4


def test_the_importance_ratio_scales_a_tokens_loss(make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    """Against the loss summed by hand from the tokens' own, with ratios that the cut-off reaches."""

    class Off(TransformersEngine):
        """Says log-probabilities that are wrong by a known amount."""

        def generate(self, model: PeftModel, prompts: Any, sampling: Sampling, seed: int) -> Rollouts:
            found = super().generate(model, prompts, sampling, seed)
            rows = [prompt for prompt in prompts for _ in range(sampling.n)]
            states = Scorer(model, 8192).score(rows, found.completions)
            targets = torch.tensor([token for row in found.completions for token in row])
            right = token_logprobs(states, targets)
            self.ratios = torch.tensor([2.0, 0.5, 1.0, 1.2]).repeat(len(targets))[: len(targets)]
            said = (right - self.ratios.log()).split([len(row) for row in found.completions])
            return found._replace(logprobs=[row.tolist() for row in said])

    engine, outputs = Off(max_importance_ratio=1.5), []

    class Keep(Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, output: Any, *args: Any) -> None:
            outputs.append(output)

    watch = Watch()
    train(make_policy(), engine, tmp_path, watch, Keep(), run={"max_steps": 1})  # type: ignore[arg-type]
    losses = torch.cat(outputs[0]["measured"]["loss"])
    weights = engine.ratios.clamp(max=1.5)
    assert float(outputs[0]["loss"]) == pytest.approx(float((losses * weights).sum() / len(losses)), rel=1e-4)
    assert watch.logged[0]["train/importance_ratio_max"] == pytest.approx(2, rel=1e-3)
    assert watch.logged[0]["train/importance_ratio_clipped"] == pytest.approx(float((engine.ratios > 1.5).float().mean()))


def test_quantized_policy_needs_servers_of_its_weights(
    servers: Callable[..., ProtocolServer],
    make_engine: Callable[..., VLLMServerEngine],
    make_policy: Callable[..., Policy],
    folders: dict[str, str],
    tmp_path: Path,
) -> None:
    policy = make_policy(quantization=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32))
    with pytest.raises(UserError, match=r"^model\.rollouts\.init_args\.serves_quantized: "):
        train(policy, make_engine(servers()), tmp_path)
    with pytest.raises(UserError, match=r"model\.policy\.lora"):
        make_engine(servers()).prepare(make_policy(lora=None))
    served = str(tmp_path / "served")
    write_dequantized(policy.build(), served, torch.float32)
    folders["served"] = served
    watch = Watch()
    engine = make_engine(servers("served"), serves_quantized=True, logprob_tolerance=1e-3)
    del folders["served"]
    train(policy, engine, tmp_path, watch, run={"max_steps": 1})
    assert watch.logged[0]["train/rollout_logprob_difference_max"] < 1e-3


def test_copies_hold_only_settings(
    servers: Callable[..., ProtocolServer], make_engine: Callable[..., VLLMServerEngine], built: Callable[..., PeftModel]
) -> None:
    engine = make_engine(servers())
    engine.generate(built(), PROMPTS, Sampling(max_new_tokens=2), seed=0)
    other = copy.deepcopy(engine)
    assert other.urls == engine.urls and other._pool is None and engine._pool is not None


def test_evaluation_refuses_another_models_completions(
    servers: Callable[..., ProtocolServer],
    make_engine: Callable[..., VLLMServerEngine],
    make_policy: Callable[..., Policy],
    tmp_path: Path,
) -> None:
    other = servers()
    with torch.no_grad():
        for parameter in other.base.parameters():
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    module, data = parts(make_policy(), rollouts=make_engine(other, logprob_tolerance=0.05))
    for stage in ("validate", "predict"):
        with pytest.raises(UserError, match="base model"):
            getattr(trainer(tmp_path), stage)(module, datamodule=data)


def test_unknown_tokens_are_refused() -> None:
    row = Row([5, 97], None, "length")
    with pytest.raises(UserError, match=r"^model\.rollouts: .*97.*model\.policy\.model"):
        as_rollouts([row], Expected(2, frozenset(), 97, False), 1)
    assert as_rollouts([row], Expected(2, frozenset(), 98, False), 1).completions == [[5, 97]]


@pytest.mark.parametrize("answer", [b"<html>hello</html>", b"[]", b'{"data": [3]}', b'{"data": []}'])
def test_other_web_servers_are_refused(answer: bytes, built: Callable[..., PeftModel], tmp_path: Path) -> None:
    class Page(BaseHTTPRequestHandler):
        def log_message(self, *args: Any) -> None:
            pass

        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(answer)

    page = HTTPServer(("127.0.0.1", 0), Page)
    threading.Thread(target=page.serve_forever, daemon=True).start()
    try:
        engine = VLLMServerEngine([f"http://127.0.0.1:{page.server_port}"], str(tmp_path), retries=0)
        with pytest.raises(UserError, match=r"^model\.rollouts\.init_args\.urls: .*/v1/models"):
            engine.generate(built(), PROMPTS, Sampling(max_new_tokens=2), seed=0)
        engine.close()
    finally:
        page.shutdown()
        page.server_close()


def test_invalid_address_is_refused(built: Callable[..., PeftModel], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^model\.rollouts\.init_args\.urls: "):
        VLLMServerEngine(["http://host:port"], str(tmp_path)).generate(built(), PROMPTS, Sampling(max_new_tokens=2), 0)


# -- vLLM itself -----------------------------------------------------------------------------------------------------------


def start_vllm(python: str, model: Path, log: Path) -> tuple[subprocess.Popen[bytes], str]:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--dtype", "float32"]
    command += ["--max-model-len", "256", "--enforce-eager", "--enable-lora", "--max-lora-rank", "8", "--host", "127.0.0.1"]
    environment = os.environ | {
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*command, "--port", str(port)], env=environment, stdout=out, stderr=out, start_new_session=True
        )
    return process, f"http://127.0.0.1:{port}"


def stop_vllm(process: subprocess.Popen[bytes]) -> None:
    """The server and its engine, which is a process of its own."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def wait_for(process: subprocess.Popen[bytes], url: str, log: Path, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert process.poll() is None, log.read_text()[-4000:]
        try:
            if httpx.get(url + "/health", timeout=5, trust_env=False).is_success:
                return
        except httpx.TransportError:
            time.sleep(1)
    raise AssertionError(f"no answer within {seconds} s:\n{log.read_text()[-4000:]}")


@pytest.fixture(scope="module")
def two_vllm_servers(
    vllm_python: str, vllm_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[list[tuple[Any, str]]]:
    folder = tmp_path_factory.mktemp("logs")
    servers = [(*start_vllm(vllm_python, vllm_model, folder / f"{n}.log"), folder / f"{n}.log") for n in range(2)]
    try:
        for process, url, log in servers:
            wait_for(process, url, log)
        yield [(process, url) for process, url, _ in servers]
    finally:
        for process, _, log in servers:
            stop_vllm(process)
            print(log.read_text()[-3000:])


@pytest.mark.vllm
@pytest.mark.slow
def test_vllm_serves_what_is_active(two_vllm_servers: list[tuple[Any, str]], vllm_model: Path, tmp_path: Path) -> None:
    """Base, student and teacher; greedy rollouts equal to the model's own; seeds; what a second server shares."""
    torch.manual_seed(0)
    model = Policy(str(vllm_model), dtype="float32", lora=LoRA(r=4, alpha=8, dropout=0.0)).build()
    teacher = EMATeacher(0.5)
    teacher.attach(model)
    perturb(model, 0.3)
    urls = [url for _, url in two_vllm_servers]
    engine = VLLMServerEngine(urls, str(tmp_path / "adapters"))
    seen = []
    for weights in (FixedTeacher().weights, teacher.weights, lambda m: torch.no_grad()):
        with weights(model):
            rollouts = engine.generate(model, PROMPTS, Sampling(max_new_tokens=40, n=4), seed=3)
            assert worst_difference(model, rollouts) < 1e-3
            seen.append(rollouts.completions)
    # A fresh EMA teacher's adapter is the base model.
    assert seen[0] == seen[1] != seen[2]
    again = engine.generate(model, PROMPTS, Sampling(max_new_tokens=40, n=4), seed=3)
    assert again.completions == seen[2]
    assert {row[-1] for row, ended in zip(again.completions, again.terminated, strict=True) if ended} <= {EOS, SECOND_EOS}
    with pytest.raises(UserError, match="--max-model-len"):
        engine.generate(model, PROMPTS, Sampling(max_new_tokens=250), seed=0)
    large = Policy(str(vllm_model), dtype="float32", lora=LoRA(r=16, alpha=8, dropout=0.0)).build()
    with pytest.raises(UserError, match="--max-lora-rank"):
        engine.generate(large, PROMPTS, Sampling(max_new_tokens=4), seed=0)
    assert engine.generate(model, PROMPTS, Sampling(max_new_tokens=40, n=4), seed=3).completions == seen[2]
    engine.close()
    assert not list((tmp_path / "adapters").iterdir())
    cards = httpx.get(urls[0] + "/v1/models", trust_env=False).json()["data"]
    assert len(cards) == 1, "adapters are unloaded at the end"


@pytest.mark.vllm
def test_server_benchmark_runs(
    two_vllm_servers: list[tuple[Any, str]], vllm_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, out = ROOT / "benchmarks" / "servers.py", tmp_path / "servers.json"
    urls = ["--urls", *(url for _, url in two_vllm_servers), "--adapter-folder", str(tmp_path / "adapters")]
    small = ["--device", "cpu", "--repeats", "1", "--steps", "1", "--batch", "2", "--tokens", "4", "--rank", "4"]
    monkeypatch.setattr(sys, "argv", [str(script), "--model", str(vllm_model), "--json", str(out), *urls, *small])
    monkeypatch.syspath_prepend(str(script.parent))
    runpy.run_path(str(script), run_name="__main__")
    refresh, steps = (table for table in json.loads(out.read_text()).values() if isinstance(table, list))
    assert refresh[0]["refreshes"] == 5 and refresh[0]["median s"] < 5
    assert [row["servers"] for row in steps] == ["none: in the trainer", "1", "2", "2, overlapped"]
    assert all(row["difference"] < 1e-3 for row in steps[1:3])


@pytest.mark.vllm
@pytest.mark.slow
def test_training_on_two_vllm_servers(
    two_vllm_servers: list[tuple[Any, str]], vllm_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three steps, each on the adapter just trained; one server dies in the middle of the third one's rollout."""
    (first, url), (_, other) = two_vllm_servers
    policy = Policy(str(vllm_model), dtype="float32", lora=LoRA(r=4, alpha=8, dropout=0.0))
    engine = VLLMServerEngine([url, other], str(tmp_path / "adapters"), logprob_tolerance=1e-3, max_concurrency=8, retries=0)
    complete = ServerPool._complete
    steps: list[int] = []

    def kill_in_the_third_step(pool: ServerPool, server: Any, *args: Any) -> Any:
        found = complete(pool, server, *args)
        if server.url == url and steps[-1] == 2:
            stop_vllm(first)  # with others of its completions under way
        return found

    monkeypatch.setattr(ServerPool, "_complete", kill_in_the_third_step)
    watch, losses = Watch(steps.append), Recorder()
    optimizer = {"optimizer": lambda p: torch.optim.AdamW(p, lr=0.05), "lr_scheduler": None}
    module, data = parts(policy, rollouts=engine, sampling=Sampling(max_new_tokens=120, n=12), **optimizer)
    data.max_new_tokens = 120
    fit = trainer(tmp_path, watch, losses, max_steps=3, limit_val_batches=0)
    with pytest.warns(RuntimeWarning, match="http://"):
        fit.fit(module, data)
    assert first.poll() is not None and fit.global_step == 3
    differences = [step["train/rollout_logprob_difference"] for step in watch.logged]
    print(
        "log-probability differences", differences, [step["train/rollout_logprob_difference_max"] for step in watch.logged]
    )
    print("losses", losses.losses)
    assert len(differences) == 3 and max(differences) < 1e-4
    assert all(step["train/rollout_logprob_difference_max"] < 1e-3 for step in watch.logged)
    assert watch.logged[-1]["train/adapter_norm"] > watch.logged[0]["train/adapter_norm"]
