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
from opsd_lightning.utils.terminal import SafeArgumentParser, say

if TYPE_CHECKING:
    import argparse

    from opsd_lightning.chat.roles import Roles

_NEW = "/new"
_SETTINGS = "model.policy."  # prefix of the names of these options in YAML


def main(argv: list[str] | None = None) -> None:
    """Run ``opsd chat``.

    Raises:
        SystemExit: With status 2, after one message, for a mistake of the user.
    """
    parser = _parser()
    options = parser.parse_args(argv)
    if options.max_new_tokens < 1:
        parser.error(f"--max_new_tokens: it is {options.max_new_tokens}. Give at least 1")
    if options.temperature < 0:
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
            roles = Roles.load(options.model, options.adapter, context, sampling, options.dtype, options.system)
        converse(roles, options)
    except UserError as error:
        text = str(error)
        if isinstance(error, ConfigError) and error.setting.startswith(_SETTINGS):
            text = f"--{error.setting.removeprefix(_SETTINGS)}: {error.problem}. {error.fix}"
        say(f"error: {text}", error=True)
        raise SystemExit(2) from error
    except KeyboardInterrupt:
        say("")


def converse(roles: Roles, options: argparse.Namespace) -> None:
    """Answer the questions of standard input until it ends. In a terminal, the conversation goes on until ``/new``."""
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
            say(f"error: {error}", error=True)
            if not interactive:
                raise SystemExit(2) from error
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
            say(f"(cut after {len(answer.tokens)} tokens: --max_new_tokens)", error=True)


def _questions(interactive: bool) -> Iterator[str]:
    while True:
        try:
            line = input("> ") if interactive else sys.stdin.readline()
        except EOFError:
            say("")
            return
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
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="seed for sampling (default: %(default)s)")
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="type of the weights (default: that of the adapter's run, else that of the model's files)",
    )
    return parser
