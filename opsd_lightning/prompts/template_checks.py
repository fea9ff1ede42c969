"""Checks that settings reach the prompts: question, context, system message and arguments of the chat template.

The prompts of both roles are rendered with texts that no template contains, and again without each argument. The checks need
only the tokenizer.
"""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

from opsd_lightning.prompts.chat_template import SETTING
from opsd_lightning.prompts.control_tokens import without_control_tokens
from opsd_lightning.prompts.templates import Prompts, Role
from opsd_lightning.types import ConfigError, Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Both cases, digits, white space, TeX, quotes, markup and other scripts: text that a template may change. Long texts detect
# templates that cut.
_HARD = "aB 12  $\\frac{1}{2}$\n\n\t<x> & \"y\" 'z' {v} \N{LATIN SMALL LETTER E WITH ACUTE}\N{CJK UNIFIED IDEOGRAPH-4E2D} "
_QUESTION = "Pangolin " + _HARD * 400 + "aardvark"
_CONTEXT = "Quokka " + _HARD * 1600 + "wombat"
_SYSTEM = "Okapi " + _HARD * 100 + "numbat"
_SHORT = Example("Pangolin 1+1?", "", "")
_FAILED = "\0"

# Words for truth values, with their opposites.
_OPPOSITE = {"true": "false", "yes": "no", "on": "off", "1": "0"}
_OPPOSITE |= {other: word for word, other in _OPPOSITE.items()}


class _Role(NamedTuple):
    name: Role
    kwargs: dict[str, Any]
    setting: str

    def messages(self, prompts: Prompts, question: str = _QUESTION, context: str = _CONTEXT) -> list[dict[str, Any]]:
        """Return the messages of this role's prompt for a question."""
        return prompts.messages(Example(question, "", ""), context if self.name == "teacher" else None)


def rendering_problems(tokenizer: PreTrainedTokenizerBase, prompts: Prompts, teacher: bool = True) -> list[ConfigError]:
    """Return the settings that do not reach the prompts.

    Args:
        tokenizer: The policy's tokenizer.
        prompts: Templates of the prompts.
        teacher: If True, check the teacher's prompts too.
    """
    roles = [_Role("student", prompts.student_chat_template_kwargs, "data.prompts.student_chat_template_kwargs")]
    if prompts.evaluation_chat_template_kwargs is not None:
        setting = "data.prompts.evaluation_chat_template_kwargs"
        roles.append(_Role("student", prompts.evaluation_chat_template_kwargs, setting))
    if teacher:
        roles.append(_Role("teacher", prompts.teacher_chat_template_kwargs, "data.prompts.teacher_chat_template_kwargs"))
    found: dict[str, ConfigError] = {}
    for role in roles:
        for problem in _role_problems(tokenizer, prompts, role):
            found.setdefault(str(problem), problem)
    return list(found.values())


def _role_problems(tokenizer: PreTrainedTokenizerBase, prompts: Prompts, role: _Role) -> Iterator[ConfigError]:
    reserved = set(inspect.signature(tokenizer.apply_chat_template).parameters) - {"self", "tools", "documents", "kwargs"}
    reserved |= {"messages", "strftime_now", "raise_exception"}
    taken = [name for name in role.kwargs if name in reserved]
    for name in taken:
        problem = f"{name} is an argument of apply_chat_template, and would cut or change the prompts"
        yield ConfigError(problem, role.setting, f"Leave {name} out, and give only variables of the chat template")
    role = role._replace(kwargs={name: value for name, value in role.kwargs.items() if name not in taken})

    def rendered(wording: Prompts) -> str:
        return wording.rendered(tokenizer, role.messages(wording), role.kwargs)

    try:
        text = rendered(prompts)
    except ConfigError as error:
        yield _failure(tokenizer, prompts, role, error)
        return
    if lost := _lost_content(prompts, role, text):
        yield _lost(tokenizer, prompts, role, lost, text)
        return
    if prompts.system is not None:
        try:
            times = rendered(replace(prompts, system=_SYSTEM)).count(_SYSTEM)
        except ConfigError:  # the template accepts only some system messages
            times = 1
        if times != 1:
            does = "repeats it" if times else "drops or changes it"
            yield ConfigError(
                f"the chat template {does}",
                "data.prompts.system",
                "Set it to null and put its text into data.prompts.student_template and teacher_template, or give another "
                "model.policy.chat_template",
            )
    yield from _idle_kwargs(tokenizer, prompts, role)


def _lost_content(prompts: Prompts, role: _Role, text: str) -> str:
    """Return the content of a message that is not exactly once in a rendered prompt, or an empty text."""
    for message in role.messages(prompts):
        content = str(message["content"]).strip()  # templates may strip it too
        checked = message["role"] == "user" or _CONTEXT in content  # `system` has a check of its own
        if checked and text.count(content) != 1:
            return content
    return ""


def _failure(tokenizer: PreTrainedTokenizerBase, prompts: Prompts, role: _Role, error: ConfigError) -> ConfigError:
    """Return the error of a template that fails, with the setting that makes it fail."""

    def works(wording: Prompts, kwargs: dict[str, Any]) -> bool:
        try:
            wording.rendered(tokenizer, role.messages(wording, _SHORT.question, "Quokka"), kwargs)
        except ConfigError:
            return False
        return True

    if prompts.system is not None and works(replace(prompts, system=None), role.kwargs):
        fix = "Set it to null and put its text into data.prompts.student_template and teacher_template"
        return ConfigError(error.problem, "data.prompts.system", fix)
    for name in role.kwargs:
        if works(prompts, {key: value for key, value in role.kwargs.items() if key != name}):
            return ConfigError(error.problem, role.setting, f"Leave {name} out, or give it another value")
    if prompts.context_position != "user" and works(_in_user_turn(prompts), role.kwargs):
        return ConfigError(error.problem, "data.prompts.context_position", "Set it to user")
    return error


def _in_user_turn(prompts: Prompts) -> Prompts:
    return replace(prompts, context_position="user", teacher_template=None)


def _lost(tokenizer: PreTrainedTokenizerBase, prompts: Prompts, role: _Role, content: str, text: str) -> ConfigError:
    """Return the error of a template that drops or changes a role's message, with the setting that makes it do so."""
    parts = {name: value for name, value in (("question", _QUESTION), ("context", _CONTEXT)) if value in content}
    ends = {part: (value.split()[0], value.split()[-1]) for part, value in parts.items()}
    lower = text.lower()
    gone = [part for part, words in ends.items() if not any(word.lower() in lower for word in words)]
    if gone:
        problem = f"the chat template drops the {' and the '.join(gone)} of the {role.name}'s prompt"
    elif text.count(content) > 1:
        problem = f"the chat template writes the {role.name}'s message {text.count(content)} times"
    else:
        problem = f"the chat template cuts or changes the {role.name}'s message"

    def keeps(wording: Prompts, kwargs: dict[str, Any]) -> bool:
        try:
            return not _lost_content(wording, role, wording.rendered(tokenizer, role.messages(wording), kwargs))
        except ConfigError:
            return False

    for name in role.kwargs:
        if keeps(prompts, {key: value for key, value in role.kwargs.items() if key != name}):
            return ConfigError(f"with {name}: {role.kwargs[name]!r} {problem}", role.setting, f"Leave {name} out")
    if prompts.context_position != "user" and keeps(_in_user_turn(prompts), role.kwargs):
        return ConfigError(problem, "data.prompts.context_position", "Set it to user")
    return ConfigError(problem, SETTING, "Give a template that writes the content of a message as it is")


def _idle_kwargs(tokenizer: PreTrainedTokenizerBase, prompts: Prompts, role: _Role) -> Iterator[ConfigError]:
    """Yield arguments that change nothing, and values that the template does not know or reads as another type."""
    messages = role.messages(prompts, _SHORT.question, "Quokka")
    template = str(tokenizer.get_chat_template(tools=role.kwargs.get("tools")))
    literals = _literals(template)

    def rendered(kwargs: dict[str, Any]) -> str:
        try:
            return prompts.rendered(tokenizer, messages, kwargs)
        except ConfigError:
            return _FAILED

    now = rendered(role.kwargs)
    for name, value in role.kwargs.items():
        opposite = _OPPOSITE.get(value.strip().lower()) if isinstance(value, str) else None
        if opposite is not None:  # the template may compare with a word: "True" for "False"
            as_words = [opposite, opposite.capitalize(), opposite.upper()]
            told_apart = any(rendered(role.kwargs | {name: word}) != now for word in as_words)
        else:
            told_apart = True
        as_without = rendered({key: other for key, other in role.kwargs.items() if key != name}) == now
        idle = as_without and not any(rendered(role.kwargs | {name: other}) != now for other in _others(value, literals))
        unknown = as_without and isinstance(value, str) and opposite is None and value not in literals
        if not idle and told_apart and not unknown:
            continue
        if unknown and not idle:
            problem = f"{name}: {value!r} changes nothing in the prompt, and other values do"
            meant = ", ".join(difflib.get_close_matches(str(value), literals, cutoff=0.5))
            meant = f"; did you mean one of: {meant}?" if meant else ""
            fix = f"Give {name} a value that the chat template knows, or leave it out{meant}"
        elif opposite is not None or (type(value) in (int, float) and value in (0, 1)):
            problem = f"{name} is {value!r}, which the chat template does not read as true or false"
            fix = f"Give {name} as true or false, without quotes, or leave it out if the template knows no such argument"
        else:
            problem = (
                f"{name}: {str(value).lower() if isinstance(value, bool) else repr(value)} changes nothing in the prompt"
            )
            known = difflib.get_close_matches(name, set(re.findall(r"[A-Za-z_]\w+", template)) - {name}, n=1, cutoff=0.75)
            meant = f"; did you mean {known[0]}?" if known else ""
            fix = f"Leave it out: the chat template knows no such argument{meant}"
        yield ConfigError(problem, role.setting, fix)


def _literals(template: str) -> list[str]:
    """Return the string and number literals of a template: values that it compares with or sets by default."""
    from jinja2 import Environment

    tokens = Environment().lexer.tokenize(template)
    return list(dict.fromkeys(str(token.value) for token in tokens if token.type in ("string", "integer", "float")))


def _others(value: Any, literals: list[str]) -> list[Any]:
    """Return other values of the same type. They show if the template reads an argument that has its default value."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int | float):
        return [value + 1, *(other for other in (-1, 0, 1, 10**6) if other != value)]
    if isinstance(value, str):
        return [f"{value}x", *[word for word in literals if len(word) <= 24][:300]]
    return [True, False, "x"] if value is None else []


# -- warnings ----------------------------------------------------------------------------------------------------------


def reads_date(tokenizer: PreTrainedTokenizerBase, prompts: Prompts) -> bool:
    """Return True if the template writes today's date."""
    other = replace(prompts, date=str(prompts.day - timedelta(days=400)))
    return other.student(tokenizer, _SHORT) != prompts.student(tokenizer, _SHORT)


def added_text(tokenizer: PreTrainedTokenizerBase, prompts: Prompts, tools: bool = False) -> str:
    """Return the text that the chat template puts in front of a prompt by itself, such as a default system message.

    Args:
        tokenizer: The policy's tokenizer.
        prompts: Templates of the prompts.
        tools: If True, return what it adds where there are tools.
    """
    tool = {"type": "function", "function": {"name": "quokka", "description": "wombat", "parameters": {"type": "object"}}}
    given = [tool] if tools else []
    messages, kwargs = prompts.messages(_SHORT), prompts.kwargs("student")
    try:
        text = prompts.rendered(tokenizer, messages, kwargs, tools=given)
        bare = prompts.rendered(tokenizer, messages, kwargs) if tools else ""
    except ConfigError:
        return ""
    content = str(messages[-1]["content"]).strip()  # with the wording of data.prompts; templates may strip it too
    text = text.partition(content if content in text else _SHORT.question)[0].replace(prompts.system or "\0", "\n")
    lines = [line for piece in without_control_tokens(tokenizer, text) for line in piece.splitlines() if line not in bare]
    # Of a line with the tool, take the words before its JSON or its name. Lines of few words are roles and headings.
    words = [re.split(r"[\[{<]|quokka", line)[0].strip() if "quokka" in line else line.strip() for line in lines]
    return " ".join(line for line in words if len(line.split()) > 3)


def is_null_control(tokenizer: PreTrainedTokenizerBase, prompts: Prompts) -> bool:
    """Return True if the prompts of both roles are equal without a context."""
    return prompts.student(tokenizer, _SHORT) == prompts.teacher(tokenizer, _SHORT, None)


def opens_answer(tokenizer: PreTrainedTokenizerBase, prompts: Prompts, kwargs: dict[str, Any]) -> bool:
    """Return True if an answer can follow a prompt: the template has a generation prompt, or needs none."""
    messages = prompts.messages(_SHORT)
    bare = prompts.rendered(tokenizer, messages, kwargs, generation=False)
    opened = prompts.rendered(tokenizer, messages, kwargs)
    if opened != bare:
        return True
    answer = "Pangolin7"
    try:
        whole = prompts.rendered(tokenizer, [*messages, {"role": "assistant", "content": answer}], kwargs, generation=False)
    except ConfigError:
        return False
    return whole.startswith(opened.rstrip()) and whole[len(opened.rstrip()) :].lstrip().startswith(answer)
