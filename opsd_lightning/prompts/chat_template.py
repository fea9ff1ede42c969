"""Render messages with a tokenizer's chat template.

Templates of vision models take the content of a message as a list of parts; `takes_parts` tests for that. Templates such as
Llama 3's write today's date; they get a fixed date, so that prompts are the same on every day.

A template is a program, which may come with a downloaded model. transformers denies it access to files and Python objects,
but does not limit its run time. So each template is first rendered in a child process with a time and a memory limit.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date, datetime
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from opsd_lightning.types import ConfigError
from opsd_lightning.utils.limited_process import exceeded_limit

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SETTING = "model.policy.chat_template"

# Replaces transformers' function of the same name, which reads the clock. For a date format that is not in `days`, it raises
# an error with the format, which `_apply` reads. Jinja removes the line break behind a block.
_DAY = (
    "{%- macro strftime_now(format) -%}{{ days[format] if format in days else raise_exception(asks ~ format) }}"
    "{%- endmacro %}\n"
)
_ASKS = "opsd: format of a date: "
_FORMATS: set[str] = set()
_PARTS: WeakKeyDictionary[Any, tuple[str, bool]] = WeakKeyDictionary()
_WORD = "Pangolin"
_SECONDS, _MEMORY = 10.0, 1 << 29  # limits of the first rendering
_LONGEST = 1 << 24  # longest rendered text in characters, far more than any model reads
_ENDING: set[tuple[str, str, bool]] = set()  # templates, with their arguments, that stayed within the limits


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[dict[str, str]],
    kwargs: dict[str, Any],
    day: date,
    generation: bool = True,
) -> str:
    """Render messages as the text that the model reads.

    Args:
        tokenizer: Tokenizer with the chat template.
        messages: Messages with ``role`` and ``content``.
        kwargs: Further arguments of the template.
        day: Date that the template writes as today's.
        generation: If True, open the assistant's turn at the end.

    Raises:
        ConfigError: The template fails.
    """
    _check_ends(tokenizer, messages, kwargs, day, generation)
    try:
        if takes_parts(tokenizer):
            return _apply(tokenizer, _as_parts(messages), kwargs, day, generation)
        return _apply(tokenizer, messages, kwargs, day, generation)
    except Exception as error:  # templates are programs, which can raise anything
        reason = " ".join(str(error).split()) or "no message"
        raise ConfigError(
            f"the chat template fails with {type(error).__name__}: {reason}",
            SETTING,
            "Check data.prompts.system and the chat_template_kwargs, or use another template",
        ) from None


def _check_ends(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[dict[str, str]],
    kwargs: dict[str, Any],
    day: date,
    generation: bool,
) -> None:
    """Raise `ConfigError` if rendering with these arguments exceeds a time or memory limit."""
    key = (str(tokenizer.chat_template), repr(sorted(kwargs.items())), generation)
    if key in _ENDING:
        return

    def both() -> None:
        for written in (messages, _as_parts(messages)):
            try:
                if len(_apply(tokenizer, written, kwargs, day, generation)) > _LONGEST:
                    raise MemoryError
            except MemoryError:
                raise
            except Exception:  # a template may accept only one of the two
                continue

    taken = exceeded_limit(both, _SECONDS, _MEMORY)
    if taken:
        limit = f"{_SECONDS:g} seconds" if taken == "time" else f"{_MEMORY >> 20} MiB"
        problem = f"rendering one prompt through the chat template takes more than {limit} of {taken}"
        raise ConfigError(problem, SETTING, "Use another template, and check the origin of this one")
    _ENDING.add(key)


def takes_parts(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return True if the template writes content that is a list of parts, but drops content that is a text."""
    template = str(tokenizer.chat_template)
    known = _PARTS.get(tokenizer)
    if known is None or known[0] != template:
        messages = [{"role": "user", "content": _WORD}]
        known = (template, not _shows(tokenizer, messages) and _shows(tokenizer, _as_parts(messages)))
        _PARTS[tokenizer] = known
    return known[1]


def _shows(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, Any]]) -> bool:
    try:
        return _WORD in _apply(tokenizer, messages, {}, date(2024, 7, 26), True)
    except Exception:  # see `render`
        return False


def _as_parts(messages: Sequence[dict[str, str]]) -> list[dict[str, Any]]:
    return [message | {"content": [{"type": "text", "text": message["content"]}]} for message in messages]


def _apply(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[dict[str, Any]],
    kwargs: dict[str, Any],
    day: date,
    generation: bool,
) -> str:
    template = tokenizer.get_chat_template(tools=kwargs.get("tools"))
    given: dict[str, Any] = {}
    if "strftime_now" in template:
        template = _DAY + template
        midnight = datetime(day.year, day.month, day.day)
        given = {"asks": _ASKS}
    while True:
        if given:
            given["days"] = {form: midnight.strftime(form) for form in _FORMATS}
        try:
            return str(
                tokenizer.apply_chat_template(
                    list(messages),
                    chat_template=template,
                    add_generation_prompt=generation,
                    tokenize=False,
                    **given,
                    **kwargs,
                )
            )
        except Exception as error:
            asked = str(error)
            if not asked.startswith(_ASKS) or asked[len(_ASKS) :] in _FORMATS:
                raise
            _FORMATS.add(asked[len(_ASKS) :])
