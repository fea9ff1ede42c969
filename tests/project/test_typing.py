"""Types of the public interface: what a type checker sees, and checks of arguments at run time."""

from __future__ import annotations

import ast
import copy
import inspect
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

import opsd_lightning
from opsd_lightning.losses.clips import PointwiseClip
from opsd_lightning.losses.supports import TopKWithTail
from opsd_lightning.models.policy import LoRA, Policy
from opsd_lightning.rollouts.transformers_engine import TransformersEngine
from opsd_lightning.teachers import EMATeacher, SyncTeacher
from opsd_lightning.types import ConfigError, Sampling

ROOT = Path(opsd_lightning.__file__).parents[1]

# Libraries are skipped, for speed: their types do not matter here.
CONFIG = """
[mypy]
strict = true
ignore_missing_imports = true
disallow_subclassing_any = false
disallow_untyped_calls = false
disallow_any_unimported = false
warn_unused_ignores = false
disable_error_code = untyped-decorator, no-any-return
[mypy-torch.*,lightning.*,transformers.*,peft.*,datasets.*,torchmetrics.*,numpy.*,pyarrow.*,bitsandbytes.*,sympy.*]
follow_imports = skip
[mypy-opsd_lightning.*]
ignore_errors = true
"""

CODE = """
from opsd_lightning import LoRA, OPSDDataModule, OPSDModule, Policy, Sampling, WordProblems

policy = Policy("model", lora=LoRA(r=3))
module = OPSDModule(policy, sampling=Sampling(n=2), updates_per_batch=2)
data = OPSDDataModule(policy, train=WordProblems(size=8), batch_size=2)

LoRA(rank=3)  # wrong: no such argument
LoRA(r="3")  # wrong: a text
OPSDModule(policy, teacher="EMATeacher")  # wrong: a text
OPSDModule(teacher=None)  # wrong: no policy
OPSDDataModule(policy, source=WordProblems())  # wrong: no such argument
OPSDDataModule(policy, train="rows.jsonl")  # wrong: a text
Sampling(max_tokens=3)  # wrong: no such argument
"""


def test_a_type_checker_finds_wrong_arguments_and_no_others(tmp_path: Path) -> None:
    (tmp_path / "mypy.ini").write_text(CONFIG)
    (tmp_path / "uses.py").write_text(CODE)
    command = [sys.executable, "-m", "mypy", "--config-file=mypy.ini", "--no-error-summary", "uses.py"]
    ran = subprocess.run(command, cwd=tmp_path, env={"MYPYPATH": str(ROOT), "PATH": ""}, capture_output=True, text=True)
    expected = {number for number, line in enumerate(CODE.splitlines(), 1) if "# wrong" in line}
    errors = [line for line in ran.stdout.splitlines() if ": error: " in line]
    assert {int(line.split(":")[1]) for line in errors} == expected, ran.stdout + ran.stderr


def test_type_checkers_and_the_interpreter_import_the_same_names() -> None:
    tree = ast.parse(Path(opsd_lightning.__file__).read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    seen = {}
    for node in block.body:
        assert isinstance(node, ast.ImportFrom)
        for alias in node.names:
            assert alias.asname == alias.name, "a type checker takes `import X as X` alone for a public name"
            seen[alias.name] = node.module
    assert seen == {name: f"opsd_lightning.{module}" for name, module in opsd_lightning._MODULE_OF.items()}


def test_py_typed_is_installed() -> None:
    assert (ROOT / "opsd_lightning" / "py.typed").exists()


@pytest.mark.parametrize(
    ("make", "setting"),
    [
        (lambda: Sampling(n=0), "Sampling.n"),
        (lambda: Sampling(4, -1.0), "Sampling.temperature"),
        (lambda: Sampling(n=None), "Sampling.n"),  # type: ignore[arg-type]
        (lambda: LoRA(r=True), "LoRA.r"),
        (lambda: LoRA(dropout=1.0), "LoRA.dropout"),
        (lambda: EMATeacher(update_every_steps=0), "EMATeacher.update_every_steps"),
        (lambda: SyncTeacher(0), "SyncTeacher.every_n_steps"),
        (lambda: TransformersEngine(max_rows=0), "TransformersEngine.max_rows"),
        (lambda: PointwiseClip(tau=0.0), "PointwiseClip.tau"),
        (lambda: Policy("model", max_length=-1), "Policy.max_length"),
    ],
)  # fmt: skip
def test_python_callers_are_checked_as_the_command_line_is(make: object, setting: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make()  # type: ignore[operator]
    assert caught.value.setting == setting


def test_checked_arguments_are_plain_numbers() -> None:
    assert type(EMATeacher(1).decay) is float and type(Sampling(n=2).n) is int
    assert TransformersEngine(max_rows=None).max_rows is None


def test_checked_classes_keep_their_signature_and_are_copied() -> None:
    assert list(inspect.signature(EMATeacher).parameters) == ["decay", "update_every_steps"]
    for part in (Sampling(n=3), LoRA(r=2)):
        assert pickle.loads(pickle.dumps(part)) == copy.deepcopy(part) == part
    with pytest.raises(TypeError, match="rank"):
        LoRA(rank=3)  # type: ignore[call-arg]


class Own(TopKWithTail):
    def __init__(self, name: str, k: int = 3) -> None:
        super().__init__(k)
        self.name = name


def test_subclasses_of_checked_classes_are_checked() -> None:
    assert Own("mine").k == 3
    with pytest.raises(ConfigError) as caught:
        Own("mine", 0)
    assert caught.value.setting == "Own.k"
