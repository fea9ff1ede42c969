"""``opsd doctor``: check data, prompts and settings before training.

Takes the arguments of ``opsd fit``. Nothing is trained, and the only file that is written is that of ``--json``.
"""

from __future__ import annotations

from pathlib import Path

from opsd_lightning.utils.fast_imports import fast_imports
from opsd_lightning.utils.near_names import near_names, question
from opsd_lightning.utils.terminal import SafeArgumentParser, say


def main(argv: list[str] | None = None) -> None:
    """Run ``opsd doctor``.

    Raises:
        SystemExit: With status 1 if something needs a fix, with status 2 if the arguments cannot be parsed.
    """
    parser = SafeArgumentParser(
        prog="opsd doctor",
        description="Check data, prompts and settings before training.",
        epilog="All other arguments are those of `opsd fit`, such as --config or a single setting. Nothing is trained. "
        "Exit status: 0 if nothing needs a fix, 1 if something does, 2 if the arguments cannot be parsed.",
        allow_abbrev=False,
    )
    parser.add_argument("--json", metavar="PATH", type=Path, help="also write the findings and all numbers to this file")
    parser.add_argument(
        "--examples", type=int, default=4, help="training questions that the model is run on (default: %(default)s)"
    )
    parser.add_argument(
        "--no-model", action="store_true", help="read the model's configuration and tokenizer, but not its weights"
    )
    options, rest = parser.parse_known_args(argv)
    if options.examples < 1:
        parser.error("--examples must be at least 1")
    own = [name for name in parser._option_string_actions if name.startswith("--")]
    for name in (argument.partition("=")[0] for argument in rest if argument.startswith("--") and "." not in argument):
        if near := [each for each in near_names(name, own) if name[:3] == each[:3]]:
            parser.error(f"{name}: there is no such option. {question(near)}")
    with fast_imports():  # here, so that `opsd doctor --help` answers at once
        from opsd_lightning.doctor.display import show, write_json
        from opsd_lightning.doctor.examination import examine

    found = examine(rest, options.examples, not options.no_model)
    show(found)
    if options.json is not None:
        try:
            write_json(found, options.json)
        except OSError as error:
            say(f"error: --json: cannot write {options.json} ({error.strerror})", error=True)
            raise SystemExit(2) from None
    if not found.healthy:
        raise SystemExit(1)
