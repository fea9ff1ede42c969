"""Tests that training traces end with the end-of-turn token of the chat template."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from helpers.files import write_jsonl
from helpers.models import CHAT_TEMPLATE, make_model, make_tokenizer
from opsd_lightning.data.datamodule import OPSDDataModule
from opsd_lightning.data.sources import FileSource
from opsd_lightning.models.policy import Policy, eos_ids
from opsd_lightning.prompts.templates import Prompts
from opsd_lightning.types import ConfigError, DataRequirements, UserError

TURN = "{% for m in messages %}{{ m['content'] }}ENDING{% endfor %}"
PAD, EOS, END = "<pad>", "<|im_end|>", "<|end|>"  # the last is what templates below end a turn with


@pytest.mark.parametrize(
    ("ending", "expected"),
    [
        ("{{ '<|end|>' }}", [END]),
        ("{{ '<|end|>\n' }}{{ eos_token if loop.last }}", [END]),  # as Phi 3 does
        ("{{ ' ' + eos_token }}", [" ", EOS]),  # as Llama 2 does
        ("{{ '<pad>\n<|end|>' }}", [PAD, "\n", END]),
        (
            "{{ '<pad><|im_start|>x' if loop.last and not add_generation_prompt else '' }}{{ '<|end|>' }}",
            [PAD, "<|im_start|>", "x", END],
        ),
        ("\n", [EOS]),  # it writes none
        ("", [EOS]),
    ],
)
def test_traces_end_like_the_chat_template(ending: str, expected: list[str]) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TURN.replace("ENDING", ending)
    eos = tokenizer.convert_tokens_to_ids([EOS, END])
    assert tokenizer.convert_ids_to_tokens(Prompts().end(tokenizer, eos)) == expected


@pytest.mark.parametrize("ending", ["{{ '<pad>' }}", " [/A]\n", "{{ '<pad>\n### User:' }}"])
def test_unknown_end_of_turn_is_refused(ending: str) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TURN.replace("ENDING", ending)
    with pytest.raises(ConfigError) as caught:
        Prompts().end(tokenizer, tokenizer.convert_tokens_to_ids([EOS, END]))
    assert caught.value.setting == "model.policy.chat_template"


@pytest.mark.parametrize(
    "template", ["{{ messages[0]['content'] }}", "{{ raise_exception('no') if messages | length > 1 }}"]
)
def test_template_without_assistant_turns_ends_with_eos(template: str) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    assert Prompts().end(tokenizer, [7, 3]) == [7]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Policy]:
    """A policy with a template of its own beside the same weights."""
    root = tmp_path_factory.mktemp("ends")
    make_model("llama").save_pretrained(root)

    def make(template: str, eos: str) -> Policy:
        tokenizer = make_tokenizer()
        tokenizer.chat_template, tokenizer.eos_token = template, eos
        tokenizer.save_pretrained(root)
        return Policy(str(root))

    return make


def test_training_rows_end_like_the_chat_template(folder: Callable[[str, str], Policy], tmp_path: Path) -> None:
    """The tokenizer's EOS is another token than that which ends a turn, as of base models that were tuned to chat."""
    path = write_jsonl(tmp_path / "rows.jsonl", [{"problem": "1+1?", "solution": "1 and <|end|> 1. The answer is 2."}])
    module = SimpleNamespace(data_requirements=DataRequirements(trace_completions=True))
    for template, end in ((CHAT_TEMPLATE, EOS), (CHAT_TEMPLATE.replace(EOS, END), END)):
        policy = folder(template, "<pad>")
        data = OPSDDataModule(
            policy, FileSource(str(path)), prompts=Prompts("{question}", "{context}{question}"), batch_size=1
        )
        data.max_new_tokens = 8
        data.trainer = SimpleNamespace(lightning_module=module, world_size=1, global_rank=0, progress_bar_callback=None)  # type: ignore[assignment]
        data.rows["train"] = data._prepare("train", policy.load_tokenizer(), 512)
        (trace,) = data.rows["train"].traces
        stops = make_tokenizer().convert_tokens_to_ids([EOS, END, "<pad>"])
        assert trace[-1] == make_tokenizer().convert_tokens_to_ids(end) and not set(trace[:-1]) & set(stops)


def test_end_tokens_are_the_models(folder: Callable[[str, str], Policy]) -> None:
    policy = folder(CHAT_TEMPLATE, "<pad>")
    found = policy.end_ids(policy.load_tokenizer())
    assert set(found) == eos_ids(policy.build()) and found[0] == make_tokenizer().convert_tokens_to_ids("<pad>")


def test_model_without_an_end_token_is_refused(tmp_path: Path) -> None:
    model, tokenizer = make_model("llama"), make_tokenizer()
    tokenizer.eos_token = model.config.eos_token_id = model.generation_config.eos_token_id = None
    tokenizer.pad_token = "<pad>"
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    policy = Policy(str(tmp_path))
    with pytest.raises(UserError):
        policy.end_ids(policy.load_tokenizer())
