"""Tests of the model cards of exports, and of the push to the hub at the end of `fit`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, constants
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from helpers.hub_server import TOKEN, HubServer, Repository
from helpers.training import metrics, parts, trainer
from opsd_lightning.callbacks.export import AdapterExport
from opsd_lightning.callbacks.model_card import (
    BaseModel,
    add_held_out_result,
    base_model_of,
    loaded_commit,
    model_card,
)
from opsd_lightning.data.sources import FileSource
from opsd_lightning.models.policy import Policy
from opsd_lightning.prompts.templates import Prompts
from opsd_lightning.runs.provenance import file_digest, hub_license, license_in
from opsd_lightning.types import ConfigError

pytestmark = [
    pytest.mark.integration,
    pytest.mark.filterwarnings("ignore:Use .content=<...>. to upload:DeprecationWarning"),  # huggingface_hub's own call
]

Make = Callable[..., Policy]


def texts(folder: Path) -> dict[str, str]:
    """The text files of a folder."""
    return {path.name: path.read_text() for path in folder.iterdir() if path.suffix in (".json", ".md", ".jinja")}


def table(card: str) -> list[list[str]]:
    """The rows of the validation curve."""
    lines = [line for line in card.partition("## Validation")[2].splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in (lines[0], *lines[2:])]


def test_the_card_has_the_facts_of_the_run_and_no_paths(make_policy: Make, tmp_path: Path) -> None:
    policy, root = make_policy(), tmp_path / "run"
    module, data = parts(policy)
    best = ModelCheckpoint(root / "checkpoints", monitor="val/avg@2", mode="max", save_top_k=-1)
    export = AdapterExport(merged_folder="merged", base_model="owner/base")
    trainer(root, best, export, max_steps=4, val_check_interval=2, num_sanity_val_steps=-1).fit(module, data)
    card = ModelCard.load(root / "adapter" / "README.md")
    assert card.data.base_model == "owner/base" and card.data.library_name == "peft" and card.data.datasets is None
    head, *points = table(card.text)
    assert head[2] == "val/avg@2" and [point[0] for point in points] == ["0", "2", "4"]
    logged = [row["val/avg@2"] for row in metrics(root) if "val/avg@2" in row]
    assert [point[2].split(" ")[0] for point in points[1:]] == [f"{value:.1%}" for value in logged]
    assert int(points[-1][1]) == module.tokens_generated > int(points[1][1]) > int(points[0][1]) == 0
    step = 4 if logged[1] > logged[0] else 2
    assert f"optimizer step {step}" in card.text.partition("## Validation")[2]
    digest = file_digest(Path(policy.model) / "model.safetensors")
    for fact in (
        digest,
        "LlamaForCausalLM",
        "WordProblems",
        "OPSDModule",
        "FixedTeacher",
        "ForwardKL",
        "AdamW",
        "2601.18734",
    ):
        assert fact in card.text, fact
    assert json.loads((root / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == "owner/base"
    merged = ModelCard.load(root / "merged" / "README.md")
    assert merged.data.base_model == "owner/base" and merged.data.library_name == "transformers"
    assert table(merged.text) == table(card.text)
    for folder in (root / "adapter", root / "merged"):
        for name, text in texts(folder).items():
            assert not [path for path in (policy.model, str(tmp_path), str(Path.home())) if path in text], (folder, name)
    # A local chat program needs these of the merged folder.
    theirs = GenerationConfig.from_pretrained(policy.model)
    assert GenerationConfig.from_pretrained(root / "merged").eos_token_id == theirs.eos_token_id
    assert (
        AutoTokenizer.from_pretrained(root / "merged").chat_template
        == AutoTokenizer.from_pretrained(policy.model).chat_template
    )
    assert AutoModelForCausalLM.from_pretrained(root / "merged").config.architectures == ["LlamaForCausalLM"]
    for result in ("| first |", "| second |"):
        add_held_out_result(root / "adapter", result)
    text = (root / "adapter" / "README.md").read_text()
    assert "| second |" in text.partition("## Validation")[2] and "| first |" not in text
    assert ModelCard(text).data.to_dict() == card.data.to_dict() and text.replace(
        "## Held-out result\n\n| second |\n\n", ""
    ) == str(card)
    # A resumed run keeps the validations before its checkpoint, and replaces the export.
    again = AdapterExport(merged_folder="merged")
    module, data = parts(policy)
    path = next(path for path in (root / "checkpoints").iterdir() if "step=2" in path.name)
    trainer(root, again, max_steps=5, val_check_interval=1, enable_checkpointing=False).fit(module, data, ckpt_path=path)
    text = (root / "adapter" / "README.md").read_text()
    assert [point[0] for point in table(text)[1:]] == ["0", "2", "3", "4", "5"]
    # Without a name of the base model, the card has the digest of its weights.
    assert digest in text and "owner/base" not in text and policy.model not in text
    assert ModelCard(text).data.base_model is None


def test_the_card_shows_no_secrets_and_names_files_without_their_folder(
    make_policy: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_API_KEY", "correct-horse-battery-staple")
    rows = [{"problem": f"{n} + 1?", "solution": f"{n} + 1 = {n + 1}. The answer is {n + 1}."} for n in range(8)]
    (tmp_path / "private").mkdir()
    path = tmp_path / "private" / "my rows | 1.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    module, data = parts(make_policy())
    data.sources = {"train": FileSource(str(path)), "val": None, "test": None}
    data.prompts = Prompts(f"Key {TOKEN} or correct-horse-battery-staple.\n~~~~\n{{question}}", "{question} {context}")
    run = trainer(tmp_path / "run", AdapterExport(), max_steps=1)
    run.fit(module, data)
    text = (tmp_path / "run" / "adapter" / "README.md").read_text()
    assert TOKEN not in text and "correct-horse" not in text and "private" not in text
    assert "FileSource" in text and "my rows \\| 1.jsonl" in text and "| 8 |" in text and "{question}" in text
    assert text.count("\n~~~~\n") == 1, "the prompt ends its block"
    # The base model is loaded in the revision that was trained. The text of its license is shown as it is.
    text = model_card(run, module, "adapter", BaseModel("owner/base", "v2", license="<b>x</b>`\n- y"), None, {})
    python = text.partition("```python\n")[2].partition("```")[0]
    compile(python, "card", "exec")
    assert python.count('revision="v2"') == 2 and "owner/base --revision v2 " in text
    assert "`<b>x</b>' - y`" in text


def readme(folder: Path, metadata: str) -> None:
    folder.mkdir(parents=True)
    (folder / "README.md").write_text(f"---\n{metadata}\n---\n# Model\n")


def test_base_model_of_the_hub_is_named_with_commit_and_license(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    files = tmp_path / "models--owner--model"
    (files / "refs").mkdir(parents=True)
    for revision, commit, licence in [("main", "0" * 40, "mit"), ("v2", "1" * 40, "apache-2.0")]:
        readme(files / "snapshots" / commit, f"license: {licence}")
        (files / "snapshots" / commit / "config.json").write_text('{"model_type": "llama"}')
        (files / "refs" / revision).write_text(commit)
    policy = Policy("owner/model")
    commit = loaded_commit(policy)
    found = base_model_of(policy, "another/name", commit)
    assert (found.name, found.revision, found.commit, found.license) == ("owner/model", None, "0" * 40, "mit")
    (files / "refs" / "main").write_text("1" * 40)  # another process downloads a newer commit
    assert base_model_of(policy, None, commit).commit == "0" * 40
    policy = Policy("owner/model", revision="v2")
    found = base_model_of(policy, None, loaded_commit(policy))
    assert (found.revision, found.commit, found.license, found.digest) == ("v2", "1" * 40, "apache-2.0", None)
    policy = Policy("owner/unknown")
    assert base_model_of(policy, None, loaded_commit(policy)).license is None
    readme(tmp_path / "datasets--owner--data" / "snapshots" / ("2" * 40), "license: other\nlicense_name: ours")
    assert hub_license("owner/data", kind="dataset") == "ours" and hub_license("owner/data") is None
    assert hub_license("owner/data", "v1", "dataset") is None, "another revision may have another license"
    readme(tmp_path / "datasets--owner--data" / "snapshots" / ("3" * 40), "license: mit")
    assert hub_license("owner/data", kind="dataset") is None, "two revisions differ"
    for number, text in enumerate(["license: [mit, apache-2.0]", "license: &a [*a]", "- mit", "license: {", ""]):
        readme(tmp_path / str(number), text)
    assert license_in(tmp_path / "0") == "mit, apache-2.0"
    assert [license_in(tmp_path / name) for name in ("2", "3", "4", "none")] == [None] * 4


def test_the_export_is_pushed_at_the_end_and_a_failed_push_keeps_it(
    make_policy: Make, tmp_path: Path, hub: HubServer
) -> None:
    policy = make_policy()
    export = AdapterExport(base_model="owner/base", hub_id="mine")
    trainer(tmp_path, export, max_steps=1, limit_val_batches=0).fit(*parts(policy))
    local = {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()}
    assert hub.repositories["ann/mine"].private
    assert local.items() >= hub.repositories["ann/mine"].files.items() >= {"README.md": local["README.md"]}.items()
    assert "adapter_model.safetensors" in hub.repositories["ann/mine"].files
    assert '"ann/mine"' in local["README.md"].decode(), "the card shows how to load it from the hub"
    hub.failures["/commit/"] = 403
    with pytest.warns(UserWarning, match="hf upload ann/mine"):
        trainer(tmp_path, export, max_steps=2, limit_val_batches=0).fit(*parts(policy))
    now = {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()}
    assert now["adapter_model.safetensors"] != local["adapter_model.safetensors"]


def test_a_push_that_cannot_work_is_refused_before_training(make_policy: Make, tmp_path: Path, hub: HubServer) -> None:
    hub.repositories["ann/public"] = Repository(private=False)
    cases = {
        "base_model": [AdapterExport(hub_id="mine"), AdapterExport(base_model="not/an/id")],
        "hub_id": [AdapterExport(base_model="owner/base", hub_id="public")],
    }
    for setting, exports in cases.items():
        for export in exports:
            module, data = parts(make_policy())
            with pytest.raises(ConfigError) as refused:
                trainer(tmp_path, export, max_steps=1).fit(module, data)
            assert refused.value.setting == f"trainer.callbacks.{setting}"
            assert not module.tokens_generated and not (tmp_path / "adapter").exists()
    trainer(tmp_path, AdapterExport(base_model="a/b", hub_id="public"), fast_dev_run=True).fit(*parts(make_policy()))
    assert not hub.repositories["ann/public"].commits
