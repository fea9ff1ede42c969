"""``opsd chat``: arguments, and the loop over questions."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from opsd_lightning.types import ConfigError, UserError
from opsd_lightning.utils.fast_imports import fast_imports
from opsd_lightning.utils.library_messages import hide_library_messages
from opsd_lightning.utils.terminal import SafeArgumentParser, error_line, say

if TYPE_CHECKING:
    import argparse

    from opsd_lightning.chat.roles import Roles

_NEW = "/new"
# Options by the setting that they replace.
_OPTIONS = {
    **{f"model.policy.{name}": f"--{name}" for name in ("model", "adapter", "dtype", "pad_token", "chat_template")},
    "data.prompts.system": "--system",
}


def main(argv: list[str] | None = None) -> None:
    """Run ``opsd chat``.

    Raises:
        SystemExit: With status 2, after one message, for a mistake of the user.
    """
    parser = _parser()
    options = parser.parse_args(argv)
    if options.max_new_tokens < 1:
        parser.error(f"--max_new_tokens: it is {options.max_new_tokens}. Give at least 1")
    if not 0 <= options.temperature < float("inf"):
        parser.error(f"--temperature: it is {options.temperature}. Give 0 or more")
    if options.adapter is None and options.model is None:
        parser.error("--model: missing. Give a Hugging Face id or a folder, or an exported adapter with --adapter")
    if options.shade and options.adapter is None and options.context is None:
        parser.error("--shade: student and teacher are the same. Give an --adapter, a --context or both")
    try:
        context = None if options.context is None else _read(options.context)
        say("Loading the model ...", error=True)
        with hide_library_messages():
            with fast_imports():
                from opsd_lightning.chat.roles import Roles
                from opsd_lightning.types import Sampling

            sampling = Sampling(max_new_tokens=options.max_new_tokens, temperature=options.temperature)
            given = {name: getattr(options, name) for name in ("dtype", "pad_token", "chat_template")}
            roles = Roles.load(options.model, options.adapter, context, sampling, options.system, **given)
        converse(roles, options)
    except UserError as error:
        say(error_line(error, _OPTIONS), error=True)
        raise SystemExit(2) from error
    except KeyboardInterrupt:
        say("")


def converse(roles: Roles, options: argparse.Namespace) -> None:
    """Answer the questions of standard input until it ends. In a terminal, each question continues the conversation.

    Raises:
        UserError: Standard input is not UTF-8. If it is not a terminal: a question does not fit the model.
    """
    from opsd_lightning.chat.shading import shaded, summary

    role = options.role or ("teacher" if options.context is not None and not options.shade else "student")
    interactive, colours = sys.stdin.isatty(), sys.stdout.isatty() and "NO_COLOR" not in os.environ
    if interactive:
        say(f"The {role} answers. A line is a question, {_NEW} begins a new conversation, and Ctrl-D ends.")
    for number, question in enumerate(_questions(interactive)):
        if question == _NEW or not interactive:
            roles.history.clear()
        if question == _NEW:
            continue
        try:
            answer = roles.answer(question, role, options.seed + number)
        except UserError as error:  # such as a conversation that has become too long
            if not interactive:
                raise
            say(error_line(error, _OPTIONS), error=True)
            continue
        if options.shade:
            divergence = roles.divergence(answer)
            if colours:
                encoding = sys.stdout.encoding or "utf-8"  # `say` would escape the colours
                print(shaded(answer.pieces, divergence).encode(encoding, "backslashreplace").decode(encoding), flush=True)
            else:
                say(answer.text)
            say(summary(answer.pieces, divergence))
        else:
            say(answer.text)
        if answer.truncated:
            limit = "--max_new_tokens" if len(answer.tokens) == options.max_new_tokens else "the length limit of the model"
            say(f"(cut after {len(answer.tokens)} tokens by {limit})", error=True)


def _questions(interactive: bool) -> Iterator[str]:
    while True:
        try:
            line = input("> ") if interactive else sys.stdin.readline()
        except EOFError:
            say("")
            return
        except UnicodeDecodeError as error:
            raise UserError(f"standard input is not UTF-8 ({error.reason}): convert the questions to UTF-8") from None
        if not interactive and not line:
            return
        if line.strip():
            yield line.strip()


def _read(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else error.strerror
        raise ConfigError(f"cannot read {path} ({reason})", "--context", "Name a text file in UTF-8") from None
    if not text:
        raise ConfigError(f"{path} is empty", "--context", "Write the solution or another text for the teacher into it")
    return text


def _parser() -> SafeArgumentParser:
    parser = SafeArgumentParser(
        prog="opsd chat",
        description="Talk to the student, or to the teacher with a context. Each line of standard input is a question.",
        epilog="The student is the model with the adapter. The teacher is the model without it, and reads the context.",
        allow_abbrev=False,
    )
    parser.add_argument("--model", metavar="MODEL", help="Hugging Face id, folder or .gguf file (default: the adapter's)")
    parser.add_argument("--adapter", metavar="PATH", help="exported adapter: a peft folder or Hugging Face id")
    parser.add_argument("--context", metavar="FILE", type=Path, help="text that the teacher reads beside each question")
    parser.add_argument(
        "--role", choices=("student", "teacher"), help="who answers (default: the teacher with --context, without --shade)"
    )
    parser.add_argument(
        "--shade", action="store_true", help="shade each token by the divergence of student and teacher, in a terminal"
    )
    parser.add_argument("--system", metavar="TEXT", help="system message of both roles")
    parser.add_argument("--max_new_tokens", metavar="N", type=int, default=512, help="longest answer (default: %(default)s)")
    parser.add_argument(
        "--temperature", metavar="T", type=float, default=0.0, help="0 for greedy decoding (default: %(default)s)"
    )
    parser.add_argument("--pad_token", metavar="TOKEN", help="padding token, for a model without one, such as its EOS token")
    parser.add_argument("--chat_template", metavar="FILE", help="Jinja file with a chat template, for a model without one")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="seed for sampling (default: %(default)s)")
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="type of the weights (default: that of the adapter's run, else that of the model's files)",
    )
    return parser
