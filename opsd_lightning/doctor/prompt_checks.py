"""Checks of the chat template, its special tokens and both roles' thinking modes. They need the tokenizer only."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

from transformers import PreTrainedTokenizerBase

from opsd_lightning.doctor.findings import Finding, percent
from opsd_lightning.prompts.contexts import NoContext, PrivilegedContext
from opsd_lightning.prompts.control_tokens import spelled, texts_in
from opsd_lightning.prompts.template_checks import added_text, is_null_control, opens_answer, reads_date
from opsd_lightning.prompts.templates import Prompts
from opsd_lightning.types import ConfigError, Example, PromptBatch

_TEMPLATE = "model.policy.chat_template"
_OPEN, _CLOSE = "<think>", "</think>"
_PROBE = "A reply 7."
_SHORT = Example("1+1?", "", "")

#: The end of a prompt: inside a thinking block, after a closed one, or without one.
Thinking = Literal["open", "closed", "none"]


class Role(NamedTuple):
    """The prompts of a role.

    Args:
        name: ``student``, ``teacher``, or ``evaluation`` for the student in validation and test.
        prompts: Token ids of one prompt per example.
        examples: Questions from which the prompts were rendered.
        kwargs: Further arguments of the chat template.
        prefix: Text after the generation prompt.
    """

    name: str
    prompts: Sequence[Sequence[int]]
    examples: Sequence[Example]
    kwargs: dict[str, Any]
    prefix: str = ""

    @property
    def setting(self) -> str:
        return f"data.prompts.{self.name}_chat_template_kwargs"


def roles_of(
    prompts: Prompts, examples: Sequence[Example], students: Any, teachers: Any, evaluation: PromptBatch | None
) -> list[Role]:
    """Return the role of the student, and those of the teacher and of the evaluation if they have prompts of their own.

    Args:
        prompts: Templates of the prompts.
        examples: Some training questions.
        students: Token ids of the student's prompts.
        teachers: Token ids of the teacher's prompts. Empty if training does not read them.
        evaluation: The validation questions with their prompts, if there are any.
    """
    found = [Role("student", students, examples, prompts.student_chat_template_kwargs)]
    if teachers and all(teachers):
        settings = prompts.teacher_chat_template_kwargs, prompts.teacher_response_prefix
        found.append(Role("teacher", teachers, examples, *settings))
    if evaluation is not None and prompts.evaluation_chat_template_kwargs is not None:
        found.append(Role("evaluation", evaluation.student, evaluation.examples, prompts.evaluation_chat_template_kwargs))
    return found


def template_findings(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Prompts,
    role: Role,
    eos: frozenset[int],
    vocabulary: int,
    traces: Sequence[str],
) -> Iterator[Finding]:
    """Find problems in the prompts of a role.

    Args:
        tokenizer: Tokenizer of the policy.
        prompts: Templates of the prompts.
        role: The role.
        eos: Every token that ends a completion.
        vocabulary: Number of logits of the model.
        traces: Traces that are trained on in the place of completions. Empty if completions are sampled.
    """
    unknown = [token for ids in role.prompts for token in ids if token >= vocabulary]
    if unknown:
        text = f"the {role.name}'s prompts hold token {unknown[0]}, and the model has {vocabulary} tokens"
        fix = "use the model's own tokenizer: this one belongs to another model, or tokens were added to it"
        yield Finding("error", "template", text, "model.policy.model", fix)
    yield from _special_tokens(tokenizer, role)
    if role.name == "student":  # the teacher's context is already part of its tokens
        for ids, example in zip(role.prompts, role.examples, strict=True):
            text = prompts.rendered(tokenizer, prompts.messages(example), role.kwargs, tools=example.tools)
            decoded = str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))  # type: ignore[call-arg]
            if decoded != text:
                place = next((i for i, (a, b) in enumerate(zip(decoded, text, strict=False)) if a != b), len(text))
                shown = decoded[max(place - 15, 0) : place + 15], text[max(place - 15, 0) : place + 15]
                message = f"the student's prompt does not decode to the template's text: {shown[0]!r}, not {shown[1]!r}"
                fix = "clean the data, or use another model: the tokenizer does not know these characters, or changes them"
                yield Finding("warning", "template", message, "model.policy.model", fix)
                break
    if not opens_answer(tokenizer, prompts, role.kwargs):
        text = f"the {role.name}'s prompt has no generation prompt: the template ignores add_generation_prompt"
        fix = "use a template that opens the assistant's turn there"
        yield Finding("error", "template", text, _TEMPLATE, fix)
    elif role.name == "student":
        yield from _answered(tokenizer, prompts, role, eos, traces)


def _special_tokens(tokenizer: PreTrainedTokenizerBase, role: Role) -> Iterator[Finding]:
    bos, unknown = tokenizer.bos_token_id, tokenizer.unk_token_id
    if bos is not None and any(list(ids[:2]) == [bos, bos] for ids in role.prompts):
        text = f"the {role.name}'s prompts begin with {tokenizer.bos_token!r} twice"
        yield Finding("error", "template", text, _TEMPLATE, "write it once in the template, and not in data.prompts")
    strange = sum(list(ids).count(unknown) for ids in role.prompts) if unknown is not None and unknown != bos else 0
    if strange:
        tokens = sum(map(len, role.prompts))
        text = f"{strange} of {tokens} tokens of the {role.name}'s prompts ({percent(strange, tokens)}) are unknown ones"
        level: Any = "error" if strange > tokens / 10 else "warning"
        yield Finding(level, "template", text, "model.policy.model", "clean the data, or use another model")


def _answered(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Prompts,
    role: Role,
    eos: frozenset[int],
    traces: Sequence[str],
) -> Iterator[Finding]:
    """Check that the template puts an answer directly after the prompt, and that the answer ends with an EOS token."""
    messages, tools = prompts.messages(role.examples[0]), role.examples[0].tools
    opened = prompts.rendered(tokenizer, messages, role.kwargs, tools=tools)
    answered = [*messages, {"role": "assistant", "content": _PROBE}]
    try:
        whole = prompts.rendered(tokenizer, answered, role.kwargs, generation=False, tools=tools)
    except ConfigError:
        return
    if not whole.startswith(opened + _PROBE):
        shown = _after(whole, opened)
        text = f"in an answered conversation the template writes {shown!r} where completions begin in training"
        fix = "training is not affected: sampling and scoring agree. Chats of several turns look different to the model"
        yield Finding("note", "template", text, _TEMPLATE, fix)
    ending = whole[whole.rindex(_PROBE) + len(_PROBE) :] if _PROBE in whole else ""
    ids = tokenizer.encode(ending, add_special_tokens=False)
    if ids and not eos & set(ids):
        names = ", ".join(repr(tokenizer.convert_ids_to_tokens(token)) for token in sorted(eos)) or "none"
        text = (
            f"the template ends an answer with {ending.strip()!r}, which holds no token that ends a completion ({names}): "
            "completions run on to the length limit"
        )
        fix = "add the token to eos_token_id in the model's generation_config.json, or use the chat model's own template"
        yield Finding("error", "template", text, "model.policy.model", fix)
    start = tokenizer.encode(opened, add_special_tokens=False)
    merged = 0
    for trace in traces:
        together = tokenizer.encode(opened + trace, add_special_tokens=False)
        merged += together != [*start, *tokenizer.encode(trace, add_special_tokens=False)]
    if merged:
        text = f"{merged} of {len(traces)} traces are tokenized differently after the prompt than on their own"
        fix = "begin traces with a word, not with a space or a line break"
        yield Finding("warning", "template", text, "data.train", fix)


def token_findings(tokenizer: PreTrainedTokenizerBase, eos: frozenset[int], vocabulary: int) -> Iterator[Finding]:
    """Find problems of EOS and pad tokens.

    Args:
        tokenizer: Tokenizer of the policy.
        eos: Every token that ends a completion.
        vocabulary: Number of logits of the model.
    """
    if not eos:
        text = "neither the tokenizer nor the model's configuration names an EOS token: every completion is truncated"
        yield Finding("error", "template", text, "model.policy.model", "set eos_token in its tokenizer_config.json")
    for name, token in (("pad", tokenizer.pad_token_id), *(("EOS", token) for token in sorted(eos))):
        if isinstance(token, int) and token >= vocabulary:
            text = f"the {name} token is {token}, and the model has {vocabulary} tokens"
            yield Finding("error", "template", text, "model.policy.pad_token", "choose one of these, such as the EOS token")
    if tokenizer.pad_token_id in eos:
        text = "the pad token is also an EOS token, which is fine: lengths, not tokens, decide which positions are padding"
        yield Finding("note", "template", text, "model.policy.pad_token")


def injected_findings(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]) -> Iterator[Finding]:
    """Find control tokens that are spelled out in the data, and read as ordinary text."""
    found = []
    for example in examples:
        texts = [example.question, example.trace, *texts_in([*example.messages, *example.tools])]
        found.append([token for token in spelled(tokenizer, "\n".join(texts)) if token not in (_OPEN, _CLOSE)])
    rows = [tokens for tokens in found if tokens]
    if rows:
        text = f"{len(rows)} rows ({percent(len(rows), len(examples))}) write out a special token, such as {rows[0][0]!r}"
        fix = "remove it from questions and traces: it is read as ordinary text, which is unusual for the model"
        yield Finding("warning", "template", text, "data.train", fix)


def tool_findings(tokenizer: PreTrainedTokenizerBase, prompts: Prompts, examples: Sequence[Example]) -> Iterator[Finding]:
    """Find the text that the template adds where a row has tools."""
    rows = sum(bool(example.tools) for example in examples)
    if rows and (added := added_text(tokenizer, prompts, tools=True)):
        text = f"the chat template describes the tools of {rows} rows with a text of its own: {added[:200]!r}"
        yield Finding("note", "template", text, _TEMPLATE)


def context_findings(
    tokenizer: PreTrainedTokenizerBase, prompts: Prompts, context: PrivilegedContext, reads_teacher: bool
) -> Iterator[Finding]:
    """Find valid prompts that probably differ from the intended ones."""
    if reads_teacher and isinstance(context, NoContext) and not is_null_control(tokenizer, prompts):
        text = (
            "the roles' prompts differ even without a context: the teacher trains the student, and this is no null control"
        )
        fix = (
            "leave it as the control of a run with the same prompts and a context; for a null control give both roles the "
            "same chat_template_kwargs, and leave data.prompts.teacher_response_prefix out"
        )
        yield Finding("warning", "template", text, "data.context", fix)
    if added := added_text(tokenizer, prompts):
        text = f"the chat template adds a text of its own to every prompt: {added[:200]!r}"
        yield Finding("note", "template", text, "data.prompts.system", "set a system message to replace a default one")
    if reads_date(tokenizer, prompts):
        text = f"the chat template asks for the date, and always gets {prompts.date}"
        yield Finding("note", "template", text, "data.prompts.date")


# -- thinking ----------------------------------------------------------------------------------------------------------


def thinking_facts(
    tokenizer: PreTrainedTokenizerBase, prompts: Prompts, roles: Sequence[Role], traces: Sequence[str]
) -> dict[str, Any]:
    """Return the thinking mode of the template and of each role's prompts, and the number of traces with thinking.

    A role thinks if its prompt ends in an open thinking block, or is the one with ``enable_thinking: true``, wherever the
    template writes that: Gemma 4 has it in the system turn, and off by default. Templates without that variable, such as
    those of gpt-oss and LFM2.5, do not tell if the model thinks. Their roles count as roles without thinking.
    """
    messages = prompts.messages(_SHORT)

    def rendered(kwargs: dict[str, Any]) -> str:
        return prompts.rendered(tokenizer, messages, kwargs)

    on, off = (rendered({"enable_thinking": value}) for value in (True, False))
    modes = {role.name: _mode(rendered(role.kwargs) + role.prefix) for role in roles}
    asks = {
        role.name: on != off and rendered(role.kwargs) == rendered(role.kwargs | {"enable_thinking": True}) for role in roles
    }
    can_tell = on != off or any(mode != "none" for mode in modes.values())
    return {
        "template_can_switch": on != off,
        "template_thinks": on != off or _OPEN in str(tokenizer.chat_template),
        "prompts": modes,
        # Qwen 3's prompt ends before a thinking block that the model opens itself, other templates open it.
        "thinks": {name: mode == "open" or (asks[name] and mode != "closed") for name, mode in modes.items()},
        "unknown": not can_tell and bool(re.search("think|reasoning", str(tokenizer.chat_template))),
        "traces_with_thinking": sum(_OPEN in trace for trace in traces),
        "traces_with_empty_thinking": sum(bool(re.search(rf"{_OPEN}\s*{_CLOSE}", trace)) for trace in traces),
        "traces": len(traces),
    }


def thinking_findings(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Prompts,
    roles: Sequence[Role],
    facts: dict[str, Any],
    skipped: int,
    in_place: bool,
) -> Iterator[Finding]:
    """Find thinking modes that contradict each other.

    Args:
        tokenizer: Tokenizer of the policy.
        prompts: Templates of the prompts.
        roles: The roles of `roles_of`.
        facts: The result of `thinking_facts`.
        skipped: ``skip_first_tokens`` of the objective.
        in_place: If True, the method trains on traces.
    """
    messages = prompts.messages(_SHORT)
    for role in roles:
        rendered = prompts.rendered(tokenizer, messages, role.kwargs) + role.prefix
        if len(re.findall(rf"{_OPEN}\s*{_CLOSE}", rendered)) > 1:
            text = f"the {role.name}'s prompt ends with an empty thinking block twice"
            fix = "leave it out: the chat template writes one already"
            yield Finding("error", "thinking", text, "data.prompts.teacher_response_prefix", fix)
    modes = facts["prompts"]
    if facts["unknown"]:
        text = "the chat template has no enable_thinking: its prompts do not tell if the model thinks"
        yield Finding("note", "thinking", text, _TEMPLATE, "look for thinking in some completions")
    student = modes["student"]
    teacher = modes.get("teacher", student)
    if facts["template_thinks"] and student != teacher:
        ends: dict[str, str] = {
            "open": "inside a thinking block",
            "closed": "after a closed thinking block",
            "none": "before any thinking block",
        }
        text = f"the student's prompt ends {ends[student]} and the teacher's {ends[teacher]}"
        if student == "closed":
            text += ": the teacher expects <think> where the student answers, so that the first token diverges widely"
        fix = (
            "close the teacher's block with data.prompts.teacher_response_prefix, or set "
            "model.objective.init_args.skip_first_tokens to 1"
        )
        if facts["thinks"]["student"]:
            fix = "set {enable_thinking: false} for the student, with data.prompts.teacher_response_prefix for the teacher"
        if skipped:
            text, fix = f"{text}; skip_first_tokens leaves {skipped} out", ""
        yield Finding("note" if skipped else "warning", "thinking", text, "data.prompts.teacher_chat_template_kwargs", fix)
    if facts["thinks"]["student"] and "teacher" in modes:
        text = (
            "the student thinks in training, and others report that such students lose accuracy (siyan-zhao/OPSD#16; "
            "arXiv 2607.05184; arXiv 2609.20612). We have not rerun these reports"
        )
        fix = (
            "train without thinking, with {enable_thinking: false} if the template knows it, and validate with "
            "data.prompts.evaluation_chat_template_kwargs; or compare with the model before training on held-out questions"
        )
        yield Finding("warning", "thinking", text, "data.prompts.student_chat_template_kwargs", fix)
    if "evaluation" in modes and facts["thinks"]["evaluation"] != facts["thinks"]["student"]:
        does = "thinks" if facts["thinks"]["evaluation"] else "does not think"
        text = f"the student {does} in validation, other than in training: that is how checkpoints are compared"
        yield Finding("note", "thinking", text, "data.prompts.evaluation_chat_template_kwargs")
    having, empty, total = facts["traces_with_thinking"], facts["traces_with_empty_thinking"], facts["traces"]
    if empty:
        text = f"{empty} of {total} traces ({percent(empty, total)}) hold an empty thinking block"
        yield Finding("warning", "thinking", text, "data.train", "remove the blocks from the traces")
    if in_place and facts["thinks"]["student"] and student == "none" and having < total:
        text = f"{total - having} of {total} traces do not think, and the student's prompt asks for it"
        fix = "set {enable_thinking: false}"
        yield Finding("warning", "thinking", text, "data.prompts.student_chat_template_kwargs", fix)
    elif having and not in_place:
        text = (
            f"{having} of {total} traces ({percent(having, total)}) hold {_OPEN}, which the teacher reads in a user's turn"
        )
        mode = "the student's thinking is off" if student == "closed" else "the model writes such blocks itself"
        fix = f"remove the tags from the traces: {mode}"
        yield Finding("warning", "thinking", text, "data.train", fix)


def _mode(rendered: str) -> Thinking:
    opened, closed = rendered.rfind(_OPEN), rendered.rfind(_CLOSE)
    return "none" if opened < 0 else "open" if closed < opened else "closed"


def _after(whole: str, opened: str) -> str:
    """Return the text after the prompt, up to the answer."""
    place = next((i for i, (a, b) in enumerate(zip(whole, opened, strict=False)) if a != b), len(opened))
    return whole[place : place + 30]
