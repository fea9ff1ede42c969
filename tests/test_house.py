"""The house's laws: imports point only to lower layers, and the lower rooms know no framework."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import opsd_lightning

ROOT = Path(__file__).parents[1]
ROOMS = {path.stem: path for path in (ROOT / "opsd_lightning").glob("*.py") if path.stem != "__init__"}
LAYERS = [
    {
        "types",
        "files",
        "import_path",
        "early_signals",
        "bounded",
        "yaml_bounds",
        "texts",
        "metric_directions",
        "idle",
        "answer_text",
        "quantities",
        "math_worker",
        "math_pool",
    },
    {"answer_forms", "folders"},
    {"answers", "csv_tables"},
    {"tokens", "control_tokens", "chat_template", "grading", "redaction", "token_text", "findings", "exchange"},
    {"terminal", "prompts", "divergences", "shaping", "runs", "tables"},
    {"template_checks", "objectives", "sources", "record", "curves"},
    {"rope", "base_checks", "gguf_header", "checkpoint_settings", "checkpoint_values", "adapter_checks"},
    {"policy", "report", "resuming"},
    {"tensor_parallel", "optimization", "precision", "fingerprint", "checkpoint_file", "shards", "disk_errors"},
    {"checkpoint_io"},
    {"requeue"},
    {"signals"},
    {
        "verification",
        "scoring",
        "inference",
        "strategies",
        "vllm_servers",
        "loggers",
        "cli_parser",
        "run_checks",
        "saved_config",
    },
    {"teachers", "rollouts", "metrics", "data", "export", "importance"},
    {"serving", "adapter_versions", "contexts", "anchors", "checkpoint_record"},
    {"self_checks"},
    {"vllm_rollouts"},
    {"evaluation"},
    {"trainer_checks", "run_lock"},
    {"training", "results"},
    {"module", "sft", "grpo", "token_scores", "token_figure", "health"},
    {"off_policy", "data_checks", "prompt_checks", "estimates"},
    {"probe"},
    {"diagnosis"},
    {"callbacks"},
    {"guard"},
    {"token_report", "run_report", "health_log"},
    {"main"},
    {"quickstart", "doctor", "__main__"},
]
LAYER = {room: layer for layer, rooms in enumerate(LAYERS) for room in rooms}


def test_contributors_are_told_of_every_room() -> None:
    """In the order of the layers."""
    rows = re.findall(r"^\| (`\w+`.*?) \|", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.MULTILINE)
    told = [room for row in rows for room in re.findall(r"`(\w+)`", row)]
    assert sorted(told) == sorted(ROOMS) and [LAYER[room] for room in told] == sorted(LAYER.values())


def imports(path: Path, top_level_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{a.name}" for a in node.names} if node.module == "opsd_lightning" else {node.module}
    return found


def test_every_room_has_a_layer() -> None:
    assert set(ROOMS) == set(LAYER)


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_imports_point_down(room: str) -> None:
    for module in imports(ROOMS[room]):
        if module.startswith("opsd_lightning."):
            other = module.split(".")[1]
            assert other == "__version__" or LAYER[other] < LAYER[room], f"{room} imports {other}"


@pytest.mark.parametrize("room", sorted(room for room, layer in LAYER.items() if layer < 6 and room != "sources"))
def test_lower_rooms_import_no_framework(room: str) -> None:
    heavy = {"transformers", "peft", "lightning", "datasets", "bitsandbytes"}
    assert not {module.split(".")[0] for module in imports(ROOMS[room], top_level_only=True)} & heavy


def test_the_package_alone_imports_nothing_heavy() -> None:
    code = "import sys, opsd_lightning; assert 'torch' not in sys.modules; print(opsd_lightning.__version__)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_public_names_exist_and_are_documented() -> None:
    for name in opsd_lightning.__all__:
        part = getattr(opsd_lightning, name)
        assert name == "__version__" or (part.__doc__ and not part.__doc__.startswith(f"{name}(")), name


def test_safe_by_default() -> None:
    for path in ROOMS.values():
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"\b(eval|exec)\(|pickle|weights_only=False", text.replace("model.eval()", "")), path


def test_the_docs_name_tests_that_exist() -> None:
    tests = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    for path in [*(ROOT / "docs").glob("*.md"), ROOT / "README.md"]:
        for name in re.findall(r"\b(test_\w+)(?:\[[^\]]*\])?`", path.read_text(encoding="utf-8")):
            assert f"def {name}(" in tests or any((ROOT / "tests").rglob(f"{name}.py")), (path, name)
