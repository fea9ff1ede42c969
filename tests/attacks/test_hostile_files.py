"""Attacks with hostile checkpoints, base models and adapters: refused with one message, and no code runs."""

from __future__ import annotations

import ast
import copy
import io
import json
import os
import pickle
import signal
import sys
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer

from helpers.attack import Attack
from helpers.models import make_model, make_tokenizer
from helpers.paths import ROOT
from opsd_lightning.checkpoints.io import AtomicCheckpointIO, read_adapters
from opsd_lightning.checkpoints.shards import write_meta, write_shards
from opsd_lightning.data.datamodule import OPSDDataModule
from opsd_lightning.data.sources import WordProblems
from opsd_lightning.methods.opsd import OPSDModule
from opsd_lightning.methods.sft import SFTModule
from opsd_lightning.models.policy import LoRA, Policy
from opsd_lightning.types import ConfigError, UserError

pytestmark = pytest.mark.integration


SECONDS = 60  # in which each attack has to end


class Calls:
    """Calls a function as it is unpickled."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


class Builds:
    """Sets the state of an object that calls a function by it."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return (type(self), (self.marker,), {"marker": self.marker})

    def __setstate__(self, state: Any) -> None:
        self.marker.touch()


def gadgets(marker: Path) -> dict[str, Any]:
    """Objects that make a file as they are unpickled, each by another function."""
    import code
    import functools
    import runpy
    import shutil
    import subprocess
    import timeit

    python = f"open({str(marker)!r}, 'w')"
    script = marker.with_name("script.py")
    script.write_text(python)
    nested = marker.with_name("nested.pkl")
    nested.write_bytes(pickle.dumps(Calls(os.system, f"touch '{marker}'")))
    return {
        "os.system": Calls(os.system, f"touch '{marker}'"),
        "subprocess": Calls(subprocess.call, ["touch", str(marker)]),
        "Popen": Calls(subprocess.Popen, ["touch", str(marker)]),
        "eval": Calls(eval, python),
        "exec": Calls(exec, python),
        "open": Calls(open, str(marker), "w"),
        "FileIO": Calls(io.FileIO, str(marker), "w"),
        "touch": Calls(Path.touch, marker),
        "runpy": Calls(runpy.run_path, str(script)),
        "timeit": Calls(timeit.timeit, python, "pass", timeit.default_timer, 1),
        "interpreter": Calls(code.InteractiveInterpreter.runsource, code.InteractiveInterpreter(), python),
        "partial": Calls(functools.partial(os.system, f"touch '{marker}'")),
        "copy": Calls(shutil.copy, str(script), str(marker)),
        "pickle in pickle": Calls(pickle.loads, nested.read_bytes()),
        "torch.load": Calls(functools.partial(torch.load, weights_only=False), str(nested)),
        "torch.hub": Calls(functools.partial(torch.hub.load, source="local"), str(marker.parent), "script"),
        "state": Builds(marker),
        "map": Calls(list, Calls(map, os.system, [f"touch '{marker}'"])),
        "tensor": Calls(torch._tensor._rebuild_from_type_v2, os.system, torch.Tensor, (f"touch '{marker}'",), {}),
        "parameter": Calls(torch._utils._rebuild_parameter, Calls(os.system, f"touch '{marker}'"), True, {}),
    }


def archive(path: Path, change: Callable[[str, bytes], bytes | None], more: dict[str, bytes] = {}, **how: Any) -> None:  # noqa: B006
    """Write an archive of torch's anew, with other records."""
    with zipfile.ZipFile(path) as file:
        records = {info.filename: file.read(info) for info in file.infolist()}
    with zipfile.ZipFile(path, "w", **how) as file:
        for name, content in (records | more).items():
            if (changed := change(name, content)) is not None:
                file.writestr(name, changed)


def changed(good: dict[str, Any], *keys: Any, value: Any) -> dict[str, Any]:
    """A copy of a checkpoint with one value replaced, or left out."""
    found: Any = copy.deepcopy(good)
    inner = found
    for key in keys[:-1]:
        inner = inner[key]
    if value is ...:
        del inner[keys[-1]]
    else:
        inner[keys[-1]] = value
    return dict(found)


def places(value: Any, *keys: Any) -> Iterator[tuple[Any, ...]]:
    """The way to every value in a checkpoint."""
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else []
    for key, part in parts:
        yield (*keys, key)
        yield from places(part, *keys, key)


def hostile_files(good: dict[str, Any], folder: Path, marker: Path, attack: Attack) -> Iterator[tuple[str, Path]]:
    """Files that no part of the package may load: each with what is wrong with it."""
    path = folder / "hostile.ckpt"
    for name, gadget in gadgets(marker).items():
        for place in ("state_dict", "hyper_parameters", "callbacks"):
            torch.save(good | {place: {**good.get(place, {}), "x": gadget}}, path)
            yield f"{name} in {place}", path
        for protocol in (0, 2, 4, 5):
            path.write_bytes(pickle.dumps(gadget, protocol))
            yield f"{name}, pickle of protocol {protocol}", path
        torch.save(good | {"x": gadget}, path, _use_new_zipfile_serialization=False)
        yield f"{name}, old format", path
        with tarfile.open(path, "w") as file:
            for record in ("sys_info", "pickle", "storages", "tensors"):
                data = pickle.dumps(gadget)
                info = tarfile.TarInfo(record)
                info.size = len(data)
                file.addfile(info, io.BytesIO(data))
        yield f"{name}, tar", path
    torch.save(good, path)
    whole = path.read_bytes()
    for _ in range(attack.tries(sample=6, whole=60)):
        cut = attack.random.randrange(len(whole))
        path.write_bytes(whole[:cut])
        yield f"cut off at {cut}", path
    for how in (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        path.write_bytes(whole)
        archive(path, lambda name, content: content, {"hostile/data/999": bytes(2**24)}, compression=how)
        yield f"packed {how}", path
    for name in ("data.pkl", "version", "data/0"):
        path.write_bytes(whole)
        archive(path, lambda record, content, name=name: None if record.endswith(name) else content)
        if name != "version":
            yield f"without {name}", path
    for name, data in (("empty", b""), ("pickled", pickle.dumps({"state_dict": {}})), ("zip", b"PK\x05\x06" + bytes(18))):
        path.write_bytes(data)
        yield name, path
    path.unlink()
    for name, make in {
        "FIFO": os.mkfifo,
        "folder": os.mkdir,
        "loop of links": lambda p: os.symlink(p, p),
        "link to a device": lambda p: os.symlink("/dev/zero", p),
        "link to nothing": lambda p: os.symlink(folder / "nothing", p),
        "file with holes": lambda p: Path(p).touch() or os.truncate(p, 2**42),
    }.items():
        make(path)
        yield name, path
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()


def wrong_contents(good: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Checkpoints whose file is right, and whose contents are not."""
    key = next(iter(good["state_dict"]))
    weight, keep = good["state_dict"][key], next(iter(good["callbacks"]))
    found = {
        f"{name} is {kind}": changed(good, name, value=value)
        for name in good
        if name not in ("hparams_name", "datamodule_hparams_name")
        for kind, value in {"a number": 5.5, "a text": "x", "a list": [None], "nothing": None}.items()
        if not isinstance(value, type(good[name]))
    }
    huge = weight.flatten()[:1].as_strided((2**40,), (0,))
    found |= {
        "weights of another type": changed(good, "state_dict", key, value=[1, 2]),
        "a huge weight": changed(good, "state_dict", key, value=huge),
        "a weight without memory": changed(good, "state_dict", key, value=torch.empty(2**40, device="meta")),
        "a sparse weight": changed(good, "state_dict", key, value=weight.to_sparse()),
        "a weight that is no number": changed(good, "state_dict", key, value=weight * float("nan")),
        "a missing weight": changed(good, "state_dict", key, value=...),
        "one more weight": changed(good, "state_dict", "model.x", value=weight),
        "a wider weight": changed(good, "state_dict", key, value=torch.cat([weight, weight])),
        "a huge moment": changed(good, "optimizer_states", 0, "state", 0, "exp_avg", value=huge),
        "unlike moments": changed(good, "optimizer_states", 0, "state", 0, "exp_avg", value=weight[:1]),
        "no moments": changed(good, "optimizer_states", 0, "state", 0, "exp_avg", value=None),
        "a count below 0": changed(good, "loops", "fit_loop", "epoch_progress", "current", "ready", value=-1),
        "no groups": changed(good, "optimizer_states", 0, "param_groups", value=[]),
        "an old version": changed(good, "pytorch-lightning_version", value="0.7.6"),
        "no version": changed(good, "pytorch-lightning_version", value="x"),
        "steps below 0": changed(good, "global_step", value=-1),
        "a name outside": changed(good, "callbacks", keep, "best_model_path", value="/tmp/run/../../home"),
        "names outside": changed(good, "callbacks", keep, "best_k_models", value={"a/../../b": torch.tensor(1.0)}),
        "a name of another type": changed(good, "callbacks", keep, "kth_best_model_path", value=5),
    }
    return found


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("base")
    model = make_model("llama")
    model.config.max_position_embeddings = 1024
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def command(base: str, folder: Path, stage: str, *more: str) -> list[str]:
    return [
        stage, "--model=SFTModule", f"--model.policy.model={base}", "--model.policy.lora={r: 4, alpha: 8}",
        "--model.sampling.max_new_tokens=4", "--data.train=WordProblems", "--data.train.size=4", "--data.val=WordProblems",
        "--data.val.size=2", "--data.batch_size=2", "--trainer.accelerator=cpu", f"--trainer.default_root_dir={folder}",
        "--trainer.logger=false", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false",
        "--trainer.limit_val_batches=1", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def good_file(base: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the command line, with its settings in it."""
    from opsd_lightning.cli.command import main

    folder = tmp_path_factory.mktemp("run")
    cli = main(command(base, folder, "fit", "--trainer.max_steps=1", "--trainer.num_sanity_val_steps=0"))
    return Path(cli.trainer.checkpoint_callback.best_model_path)


@pytest.fixture
def deadline() -> Iterator[Callable[[], None]]:
    """Ends what hangs, where it runs Python."""

    def late(*_: Any) -> None:
        raise AssertionError(f"it took more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    yield lambda: signal.alarm(SECONDS)  # type: ignore[arg-type, return-value]
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def said(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that the command line ends with, or nothing where it does its work."""
    from opsd_lightning.cli.command import main

    capsys.readouterr()
    left = raised(lambda: main(arguments))
    error = capsys.readouterr().err
    if left is None:
        return ""
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    assert isinstance(left, SystemExit) and left.code == 2, repr(left)
    assert len(lines) == 1 and "Traceback" not in error, error
    return lines[0]


def raised(call: Callable[[], Any]) -> BaseException | None:
    try:
        call()
    except BaseException as error:
        return error
    return None


@pytest.mark.filterwarnings("ignore")
def test_hostile_checkpoint_files(attack: Attack, good_file: Path, tmp_path: Path, deadline: Callable[[], None]) -> None:
    marker = tmp_path / "marker"
    good = torch.load(good_file, weights_only=True)
    folder = tmp_path / "files"
    folder.mkdir()
    loads: list[Callable[[Path], Any]] = [
        AtomicCheckpointIO().load_checkpoint, read_adapters, SFTModule.load_from_checkpoint, OPSDDataModule.load_from_checkpoint,
    ]  # fmt: skip
    count = 0
    for name, path in hostile_files(good, folder, marker, attack):
        deadline()
        for load in loads if attack.round else [attack.random.choice(loads)]:
            with pytest.raises(ConfigError) as refused:
                load(path)
            assert refused.value.setting and "\n" not in str(refused.value), name
            assert not marker.exists(), f"{name} ran code"
        count += 1
    attack.tried("hostile checkpoint files", count)
    assert count >= 50


@pytest.mark.filterwarnings("ignore")
def test_hostile_checkpoint_contents_on_the_command_line(
    attack: Attack, base: str, good_file: Path, tmp_path: Path, deadline: Callable[[], None],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Each is refused with one line, also where only what is deep inside is wrong."""
    good = torch.load(good_file, weights_only=True)
    path, kept = tmp_path / "hostile.ckpt", tmp_path / "kept"
    kept.mkdir()
    cases = wrong_contents(good)
    chosen = attack.random.sample(sorted(cases), attack.tries(sample=1, whole=len(cases) // 2))
    deep = ["a missing weight", "a remote name", "no groups", "one more weight"]  # what only the run itself finds
    for name, case in cases.items():
        deadline()
        torch.save(case, path)
        refused = raised(lambda: AtomicCheckpointIO().load_checkpoint(path))
        assert refused is None or isinstance(refused, ConfigError), f"{name}: {refused!r}"
        if name in chosen or (name in deep[: attack.tries(sample=2, whole=4)]):
            told = said(command(base, tmp_path, "fit", "--trainer.max_steps=2", f"--ckpt_path={path}"), capsys)
            assert told or (refused is None and name not in deep), name
    attack.tried("hostile checkpoint contents", len(cases))


@pytest.mark.filterwarnings("ignore")
def test_checkpoints_with_any_value_replaced(
    attack: Attack, base: str, good_file: Path, tmp_path: Path, deadline: Callable[[], None],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """One message or a run: never an error of a library."""
    good = torch.load(good_file, weights_only=True)
    ways = list(places(good))
    path = tmp_path / "hostile.ckpt"
    values = [None, -1, 2**70, "x", [], {}, {"x": {}}, float("nan"), torch.zeros(0), b"x", ...]
    tries = attack.tries(sample=1, whole=25)
    for _ in range(tries):
        way, value = attack.random.choice(ways), attack.random.choice(values)
        deadline()
        torch.save(changed(good, *way, value=value), path)
        stage = attack.random.choice(["fit", "validate"])
        more = ["--trainer.max_steps=2"] if stage == "fit" else []
        try:
            said(command(base, tmp_path, stage, *more, f"--ckpt_path={path}"), capsys)
        except BaseException as error:
            raise AssertionError(f"{way} = {value!r}, {stage}: {type(error).__name__}: {error}") from error
    attack.tried("checkpoints with a value replaced", tries)


@pytest.mark.filterwarnings("ignore")
def test_settings_in_a_checkpoint_run_nothing(attack: Attack, good_file: Path, tmp_path: Path, base: str) -> None:
    """They name classes, which ``load_from_checkpoint`` would import, and code of a model's repository."""
    marker = tmp_path / "marker"
    (tmp_path / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Evil: pass\ndef call(*args): pass\n")
    good = torch.load(good_file, weights_only=True)
    assert SFTModule.load_from_checkpoint(good_file)
    assert OPSDDataModule.load_from_checkpoint(good_file, policy=Policy(base), batch_size=2).batch_size == 2
    plain = {"_instantiator": good["hyper_parameters"]["_instantiator"], "policy": good["hyper_parameters"]["policy"]}
    plain |= {
        "prompts": {"student_template": "a: {question}\nb: c"},
        "grader": {"class_path": "opsd_lightning.MathGrader", "init_args": {"answer_pattern": "[(](.*)[)]"}},
    }
    torch.save(good | {"hyper_parameters": plain}, tmp_path / "honest.ckpt")
    assert OPSDModule.load_from_checkpoint(tmp_path / "honest.ckpt").policy.model == base
    for broken in ({}, {"policy": plain["policy"]}, plain | {"seed": "x"}, plain | {"sampling": 3}, {"_instantiator": 5}):
        torch.save(good | {"hyper_parameters": broken}, tmp_path / "broken.ckpt")
        with pytest.raises(ConfigError):
            OPSDModule.load_from_checkpoint(tmp_path / "broken.ckpt")
    sys.path.insert(0, str(tmp_path))
    cases: list[dict[str, Any]] = [
        {"optimizer": {"class_path": "evil.Evil"}}, {"optimizer": "evil.call"}, {"lr_scheduler": "evil.call"},
        {"rollouts": {"class_path": "evil.Evil"}}, {"grader": {"class_path": "evil.Evil", "init_args": {}}},
        {"_instantiator": "evil.call"}, {"_class_path": "evil.Evil"}, {"optimizer": {"class_path": "os.system"}},
        {"rollouts": {"class_path": "opsd_lightning.TransformersEngine", "init_args": {"x": {"class_path": "evil.Evil"}}}},
        {"policy": {**good["hyper_parameters"]["policy"], "trust_remote_code": True}}, {"policy": {"class_path": "evil.Evil"}},
    ]  # fmt: skip
    policy = good["hyper_parameters"]["policy"]
    part, known = {"class_path": "evil.Evil"}, "opsd_lightning.DivergenceObjective"
    texts = {name: tmp_path / f"{name}.yaml" for name in ("part", "policy", "list")}
    texts["part"].write_text("class_path: evil.Evil\n")
    texts["policy"].write_text(json.dumps(policy | {"trust_remote_code": True}))
    texts["list"].write_text("[{class_path: evil.Evil}]")
    for name in ("teacher", "objective", "sampling", "eval_sampling", "rollouts", "grader", "context", "prompts", "anchor"):
        bad = ["evil.Evil", json.dumps(part), "class_path: evil.Evil", "{class_path: evil.Evil}", str(texts["part"])]
        cases += [{name: value} for value in bad]
    for value in (json.dumps(policy | {"trust_remote_code": True}), str(texts["policy"]), "evil.Evil", " evil.Evil"):
        cases += [{"policy": value}, {"optimizer": value}, {"lr_scheduler": value}]
    for value in ("evil.Evil", json.dumps(part), str(texts["part"])):
        cases += [
            {"objective": {"class_path": known, "init_args": {"divergence": value}}},
            {"objective": {"class_path": known, "dict_kwargs": {"divergence": value}}},
            {"objective": {"class_path": known, "init_args": value}}, {"objective.divergence": value},
            {"anchor": {"teacher": value}}, {"anchor": {"init_args": {"teacher": value}}},
            {"policy": policy | {"quantization": value}}, {"policy": policy | {"lora": value}},
            {"policy": policy | {"lora": {"options": {"config": {"x": [f"[{{class_path: evil.Evil}}, {value}]"]}}}}},
        ]  # fmt: skip
    cases += [
        {"policy.trust_remote_code": True}, {"policy": policy | {"lora": {"options": json.dumps({"a": part})}}},
        {"policy": policy | {"lora": {"target_modules": str(texts["list"])}}}, {"teacher": {"__path__": "evil.yaml"}},
        {"optimizer": "transformers.utils.hub.os.system"}, {"teacher": {"class_path": "opsd_lightning.__main__.main"}},
    ]  # fmt: skip
    module = {k: v for k, v in good["hyper_parameters"].items() if k != "_class_path"}
    data = {"_instantiator": "lightning.pytorch.cli.instantiate_module", "policy": policy}
    try:
        for place, case in enumerate(cases):
            settings = good["hyper_parameters"] | case
            ways: list[tuple[Any, dict[str, Any]]] = [
                (OPSDModule, {"hyper_parameters": module | case}),
                (SFTModule, {"hyper_parameters": settings}),
                (SFTModule, {"module_arguments": settings, "hyper_parameters": {}}),
            ]
            for kind, entries in ways if attack.round else [ways[place % 3]]:
                torch.save(good | entries, tmp_path / "hostile.ckpt")
                with pytest.raises(UserError):
                    kind.load_from_checkpoint(tmp_path / "hostile.ckpt")
                assert not marker.exists() and "evil" not in sys.modules, case
        for value in ("evil.Evil", json.dumps(part), str(texts["part"]), part):
            for name in ("train", "val", "policy", "prompts", "grader", "context"):
                torch.save(good | {"datamodule_hyper_parameters": data | {name: value}}, tmp_path / "hostile.ckpt")
                with pytest.raises(UserError):
                    OPSDDataModule.load_from_checkpoint(tmp_path / "hostile.ckpt")
                assert not marker.exists() and "evil" not in sys.modules, (name, value)
        with pytest.raises(ConfigError):
            SFTModule.load_from_checkpoint(good_file, hparams_file=tmp_path / "evil.yaml")
        with pytest.raises(ConfigError):
            SFTModule.load_from_checkpoint(good_file, weights_only=False)
    finally:
        sys.path.remove(str(tmp_path))
    attack.tried("hostile settings in a checkpoint", (3 if attack.round else 1) * len(cases) + 24)


def test_remote_checkpoints_are_refused(
    attack: Attack, base: str, good_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Nothing is asked of a server, and what a cache holds under the file's name is not taken."""
    asked: list[str] = []

    class Server(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(good_file.read_bytes())

        do_HEAD = do_GET

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    (tmp_path / "torch" / "hub" / "checkpoints").mkdir(parents=True)
    (tmp_path / "torch" / "hub" / "checkpoints" / "x.ckpt").write_bytes(good_file.read_bytes())
    server = HTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        host = f"127.0.0.1:{server.server_port}/x.ckpt"
        urls = [
            f"http://{host}", f"HTTP://{host}", f"https://{host}", f"http:/{host}", f"simplecache::http://{host}",
            f"file://{good_file}", "memory://x.ckpt", "s3://bucket/x.ckpt", "hf://user/repo/x.ckpt", "gs://b/x.ckpt",
            "ftp://h/x.ckpt", "data:;base64,AAAA", "registry:x", "zip://x::http://y",
        ]  # fmt: skip
        stages = ["fit", "validate", "test", "predict"]
        for place, url in enumerate(urls):
            for load in (
                AtomicCheckpointIO().load_checkpoint, read_adapters, SFTModule.load_from_checkpoint,
                OPSDDataModule.load_from_checkpoint,
            ):  # fmt: skip
                with pytest.raises(ConfigError):
                    load(url)
            if attack.round or place < 2:
                assert said(command(base, tmp_path, stages[place % 4], f"--ckpt_path={url}"), capsys), url
        policy = Policy(base, LoRA(r=4, alpha=8), dtype="float32")
        trainer = Trainer(
            accelerator="cpu", logger=False, default_root_dir=tmp_path, enable_checkpointing=False, max_steps=1
        )
        for stage in stages:
            split = {"fit": "train", "validate": "val"}.get(stage, "test")
            data = OPSDDataModule(policy, max_new_tokens=4, batch_size=2, **{split: WordProblems(4)})
            with pytest.raises(ConfigError) as refused:
                getattr(trainer, stage)(SFTModule(policy), data, ckpt_path=urls[0])
            assert refused.value.setting == "ckpt_path"
            with pytest.raises(ConfigError) as refused:
                getattr(trainer, stage)(SFTModule(policy), data, ckpt_path=good_file, weights_only=False)
            assert refused.value.setting == "weights_only"
        assert said(command(base, tmp_path, "fit", f"--ckpt_path={good_file}", "--weights_only=false"), capsys)
    finally:
        server.shutdown()
        server.server_close()
    assert not asked
    attack.tried("remote checkpoints", len(urls))


@pytest.mark.filterwarnings("ignore")
def test_hostile_shards(attack: Attack, tmp_path: Path, deadline: Callable[[], None]) -> None:
    """Their description is a pickle in torch's own format, and so are values that are no tensors."""
    marker = tmp_path / "marker"
    good = tmp_path / "good"
    good.mkdir()
    write_shards({"state_dict": {"a": torch.ones(8), "b": torch.zeros(3)}}, good)
    write_meta({"pytorch-lightning_version": "2.6.0"}, good)
    assert sorted(read_adapters(good)) == ["a", "b"]
    description = (good / ".metadata").read_bytes()
    shard = next(good.glob("*.distcp"))

    def with_description(change: Callable[[Any], None]) -> bytes:
        from opsd_lightning.checkpoints.shards import _CLASSES

        with torch.serialization.safe_globals(_CLASSES):
            found = torch.load(io.BytesIO(description), weights_only=True)
        change(found)
        buffer = io.BytesIO()
        torch.save(found, buffer)
        return buffer.getvalue()

    def info(found: Any, **values: Any) -> None:
        for each in found.storage_data.values():
            each.__dict__.update(values)

    def entry(found: Any, **values: Any) -> None:
        next(iter(found.state_dict_metadata.values())).__dict__.update(values)

    cases: dict[str, bytes] = {}
    for name, gadget in gadgets(marker).items():
        cases[name] = pickle.dumps(gadget)
        buffer = io.BytesIO()
        torch.save(gadget, buffer)
        cases[f"{name}, saved"] = buffer.getvalue()
    cases |= {
        "another file": with_description(lambda f: info(f, relative_path="../secret")),
        "an absolute file": with_description(lambda f: info(f, relative_path="/etc/passwd")),
        "a missing file": with_description(lambda f: info(f, relative_path="__9_0.distcp")),
        "an offset": with_description(lambda f: info(f, offset=-5)),
        "a text": with_description(lambda f: info(f, length="x")),
        "an extension": with_description(lambda f: info(f, transform_descriptors=["evil"])),
        "a size": with_description(lambda f: entry(f, size=torch.Size([2**40]))),
        "a size of another type": with_description(lambda f: entry(f, size=7.5)),
        "no chunks": with_description(lambda f: entry(f, chunks=None)),
        "no properties": with_description(lambda f: entry(f, properties=None)),
        "no entries": with_description(lambda f: f.__dict__.update(state_dict_metadata=None)),
        "no files": with_description(lambda f: f.__dict__.update(storage_data=None)),
    }
    for name, data in cases.items():
        deadline()
        (good / ".metadata").write_bytes(data)
        refused = raised(lambda: read_adapters(good))
        assert isinstance(refused, ConfigError), f"{name}: {refused!r}"
        assert not marker.exists(), f"{name} ran code"
    (good / ".metadata").write_bytes(description)
    held = shard.read_bytes()
    for _ in range(attack.tries(sample=5, whole=40)):
        cut = attack.random.randrange(len(held) // 2)
        shard.write_bytes(held[:cut])
        refused = raised(lambda: read_adapters(good))
        assert isinstance(refused, ConfigError), f"cut off at {cut} of {len(held)}: {refused!r}"
    attack.tried("hostile shards", len(cases) + attack.tries(sample=5, whole=40))


@pytest.mark.filterwarnings("ignore")
def test_hostile_models_and_adapters(
    attack: Attack, base: str, tmp_path: Path, deadline: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    marker = tmp_path / "marker"
    model, adapter = tmp_path / "model", tmp_path / "adapter"
    code = f"open({str(marker)!r}, 'w')\n"
    policy = Policy(base, LoRA(r=4, alpha=8), dtype="float32")
    policy.build().save_pretrained(adapter)
    settings = json.loads((adapter / "adapter_config.json").read_text())
    config = json.loads((Path(base) / "config.json").read_text())
    tokens = json.loads((Path(base) / "tokenizer_config.json").read_text())
    weights = (adapter / "adapter_model.safetensors").read_bytes()
    monkeypatch.chdir(tmp_path)
    remote = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model", "AutoTokenizer": ["evil.Tokenizer", None]}

    def models() -> Iterator[tuple[str, dict[str, Any]]]:
        for name, gadget in gadgets(marker).items():
            yield f"{name} in pytorch_model.bin", {"model.safetensors": None, "pytorch_model.bin": pickle.dumps(gadget)}
            buffer = io.BytesIO()
            torch.save({"x": gadget}, buffer)
            yield f"{name} in an archive", {"model.safetensors": None, "pytorch_model.bin": buffer.getvalue()}
        yield "code of a configuration", {"config.json": config | {"auto_map": remote, "model_type": "evil"}}
        yield "an adapter's", {"adapter_config.json": settings | {"base_model_name_or_path": "evil/base"}}
        for value in (-1, 2**40, "x", None, [], {}):
            for name in ("hidden_size", "num_hidden_layers", "vocab_size"):
                yield f"{name} = {value!r}", {"config.json": config | {name: value}}
        for name in ("../../x.safetensors", "/etc/passwd", 5):
            index = {"metadata": {}, "weight_map": {"lm_head.weight": name}}
            yield f"an index with {name}", {"model.safetensors": None, "model.safetensors.index.json": index}
        yield "weights cut off", {"model.safetensors": (Path(base) / "model.safetensors").read_bytes()[:1000]}
        yield "weights of another kind", {"model.safetensors": b"\xff" * 64}
        yield "a configuration that is no JSON", {"config.json": b"{"}
        yield "a configuration that is a list", {"config.json": [1]}

    def adapters() -> Iterator[tuple[str, dict[str, Any]]]:
        for name, gadget in gadgets(marker).items():
            yield (
                f"{name} in adapter_model.bin",
                {"adapter_model.safetensors": None, "adapter_model.bin": pickle.dumps(gadget)},
            )
        core = {"megatron_config": {"x": 1}, "megatron_core": "evil"}
        yield "a module to import", {"adapter_config.json": settings | core}
        for kind in ("PREFIX_TUNING", "IA3", "XLORA", "evil", None, 5):
            yield f"of kind {kind}", {"adapter_config.json": settings | {"peft_type": kind}}
        for name, value in {"r": -1, "target_modules": 5, "lora_alpha": "x", "rank_pattern": []}.items():
            yield f"{name} = {value!r}", {"adapter_config.json": settings | {name: value}}
        yield "weights cut off", {"adapter_model.safetensors": weights[:200]}
        yield "no JSON", {"adapter_config.json": b"\x00"}

    def tried(source: Any, folder: Path, cases: Any, load: Callable[[], Any]) -> int:
        number = 0
        found = list(cases)
        for name, files in found if attack.round else attack.random.sample(found, 12):
            deadline()
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(source, folder)
            for file, content in files.items():
                if content is None:
                    (folder / file).unlink()
                else:
                    (folder / file).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
            for place in (folder, tmp_path):
                (place / "evil.py").write_text(code)
            (folder / "training_args.bin").write_bytes(pickle.dumps(gadgets(marker)["os.system"]))
            refused = raised(load)
            assert isinstance(refused, UserError), f"{folder.name}, {name}: {refused!r}"
            assert not marker.exists(), f"{folder.name}: {name} ran code"
            number += 1
        return number

    shutil.copytree(adapter, tmp_path / "good adapter")
    given = Policy(base, adapter=str(adapter), dtype="float32")
    count = tried(tmp_path / "good adapter", adapter, adapters(), given.build)
    count += tried(base, model, models(), Policy(str(model), LoRA(r=4, alpha=8), dtype="float32").build)
    # Code that a tokenizer names is left alone, and one that is not allowed to run it loads.
    shutil.rmtree(model)
    shutil.copytree(base, model)
    (model / "evil.py").write_text(code)
    (model / "tokenizer_config.json").write_text(json.dumps(tokens | {"auto_map": remote}))
    raised(Policy(str(model)).load_tokenizer)
    assert not marker.exists()
    attack.tried("hostile models and adapters", count + 1)


def test_every_load_in_the_repository_is_safe() -> None:
    """Nothing that runs code which a file holds, in the package, benchmarks and notebooks."""
    root = ROOT
    sources = {str(path): path.read_text(encoding="utf-8") for part in ("opsd_lightning", "benchmarks")
               for path in (root / part).rglob("*.py")}  # fmt: skip
    sources |= {str(path): path.read_text(encoding="utf-8") for path in (root / "notebooks").glob("*.py")}
    sources["cli.py"] = (root / "cli.py").read_text(encoding="utf-8")
    for path in (root / "notebooks").glob("*.ipynb"):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
        code = [cell for cell in code if not cell.startswith("%%")]  # files and shells
        lines = [line for cell in code for line in cell.splitlines() if not line.lstrip().startswith(("!", "%"))]
        sources[str(path)] = "\n".join(lines)
    # It executes the code of completions, as a script in a sandbox (test_hostile_code.py).
    del sources[str(root / "opsd_lightning" / "grading" / "sandbox_worker.py")]
    found = {path: list(unsafe(ast.parse(text))) for path, text in sources.items()}
    assert not {path: names for path, names in found.items() if names}
    for text in (
        "import pickle", "from pickle import loads", "import joblib", "import dill", "torch.load(x)", "eval('1')", "exec(x)",
        "torch.load(x, weights_only=False)", "load = torch.load", "from torch import load", "np.load(x, allow_pickle=True)",
        "yaml.load(x)", "yaml.load(x, Loader=yaml.Loader)", "yaml.full_load(x)", "yaml.unsafe_load(x)", "import shelve",
        "torch.hub.load('x')", "torch.hub.load_state_dict_from_url('x')", "A.from_pretrained(x, trust_remote_code=True)",
        "A.from_pretrained(x, weights_only=False)", "pandas.read_pickle(x)", "FileSystemReader(x)", "_load(x, weights_only=None)",
        "marshal.loads(x)", "torch.jit.load(x)", "torch.package.PackageImporter(x)", "getattr(torch, 'load')(x)",
    ):  # fmt: skip
        assert list(unsafe(ast.parse(text))), f"the check does not see {text}"


_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
_NAMES = {"read_pickle", "full_load", "unsafe_load", "full_load_all", "unsafe_load_all", "PackageImporter"}


def unsafe(tree: ast.AST) -> Iterator[str]:
    """Code that could run what a file holds."""
    called = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        told = ast.unparse(node) if isinstance(node, (ast.Attribute, ast.Name, ast.Call)) else ""
        if isinstance(node, ast.Import) and any(alias.name.partition(".")[0] in _MODULES for alias in node.names):
            yield ast.unparse(node)
        elif isinstance(node, ast.ImportFrom):
            names = {alias.name for alias in node.names}
            if (node.module or "").partition(".")[0] in _MODULES or (node.module == "torch" and "load" in names):
                yield ast.unparse(node)
        elif (isinstance(node, ast.Name) and (node.id in ("eval", "exec") or node.id in _MODULES)) or (
            isinstance(node, ast.Attribute) and (node.attr in _NAMES or told.startswith(("torch.hub.", "torch.jit.load")))
        ):
            yield told
        elif isinstance(node, ast.Attribute) and told in ("torch.load", "yaml.load", "torch.serialization.load"):
            call = called.get(id(node))
            options = {} if call is None else {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            safe = options.get("weights_only") == "True" or options.get("Loader") in ("yaml.SafeLoader", "yaml.CSafeLoader")
            if not safe:
                yield told
        elif isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name) and node.func.id in ("FileSystemReader", "getattr"):
                torch_load = len(node.args) > 1 and isinstance(node.args[1], ast.Constant) and node.args[1].value == "load"
                if node.func.id == "FileSystemReader" or torch_load:
                    yield told
            for keyword in node.keywords:
                value = ast.unparse(keyword.value)
                if (keyword.arg in ("allow_pickle", "trust_remote_code") and value == "True") or (
                    keyword.arg == "weights_only" and value in ("False", "None")
                ):
                    yield told
