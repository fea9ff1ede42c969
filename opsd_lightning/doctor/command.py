"""``opsd doctor``: examine data, prompts and settings before any training, and say what to change.

Takes exactly the arguments of ``opsd fit``. Nothing is trained, and nothing is written but the file of ``--json``.
"""

from __future__ import annotations

import io
import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer

from opsd_lightning import __version__
from opsd_lightning.cli.command import OPSDCLI, cli_settings
from opsd_lightning.data.datamodule import OPSDDataModule
from opsd_lightning.doctor.diagnosis import diagnose, refusal_finding
from opsd_lightning.doctor.findings import Diagnosis, Finding
from opsd_lightning.doctor.memory import GIB
from opsd_lightning.doctor.probe import LOOKED_AT
from opsd_lightning.methods.base import PolicyModule
from opsd_lightning.reports.html import duration
from opsd_lightning.types import UserError
from opsd_lightning.utils.files import atomic_write
from opsd_lightning.utils.redaction import redact
from opsd_lightning.utils.terminal import SafeArgumentParser, safe_markup, safe_messages, safe_text, say

_WIDTH = 100
_MARKS = {"error": "[bold red]fix[/]", "warning": "[yellow]look[/]", "note": "[dim]note[/]"}


def main(argv: list[str] | None = None) -> None:
    """``opsd doctor``. Exits with status 1 where something needs a fix, 2 where its own arguments are wrong."""
    parser = SafeArgumentParser(
        prog="opsd doctor",
        description="Examine data, prompts and settings before any training.",
        epilog="All other arguments are those of `opsd fit`: --config, overlays, single settings. Nothing is trained. "
        "Exit status: 0 if nothing needs a fix, 1 if something does.",
        allow_abbrev=False,
    )
    parser.add_argument("--json", metavar="PATH", type=Path, help="write the findings and all numbers there, too")
    parser.add_argument(
        "--examples", type=int, default=4, help="training questions that the model is tried on (default: %(default)s)"
    )
    parser.add_argument(
        "--no-model", action="store_true", help="read the model's configuration and tokenizer alone, not its weights"
    )
    options, rest = parser.parse_known_args(argv)
    if options.examples < 1:
        parser.error("--examples must be at least 1")
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


def examine(arguments: list[str], examples: int = 4, with_model: bool = True) -> Diagnosis:
    """Build what ``opsd fit`` with these arguments would run, and `diagnose` it."""
    with _quietly(), safe_messages():
        cli, problems = _parts(arguments, with_model)
        if cli is None:
            return Diagnosis(problems)
        found = diagnose(cli.model, cli.datamodule, cli.trainer, examples, with_model, say)
    found.findings[:0] = problems
    return found


class _Unstarted(OPSDCLI):
    """Parses the arguments and makes the parts, and stops there."""

    def __init__(self, problems: list[Finding], with_model: bool, **settings: Any) -> None:
        self.problems, self.with_model = problems, with_model
        super().__init__(PolicyModule, OPSDDataModule, **settings)

    def before_instantiate_classes(self) -> None:
        try:
            super().before_instantiate_classes()
        except UserError as error:
            self.problems.append(refusal_finding("settings", error))

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        if not self.problems:
            try:
                return super().instantiate_trainer(**kwargs)
            except (MisconfigurationException, ValueError, TypeError, ImportError, RuntimeError) as error:
                found = refusal_finding("settings", str(error).strip().splitlines()[0])
                if "accelerator" in str(error).lower() or "gpu" in str(error).lower():
                    # Only of this machine: the run may be meant for another.
                    text = f"{found.text} The rest is examined on the CPU"
                    found = Finding("error" if self.with_model else "warning", "settings", text, "trainer.accelerator")
                self.problems.append(found)
        wanted = self.config_init[self.subcommand].trainer
        # The rest is worth looking at all the same.
        return Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, max_steps=wanted.max_steps)

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def _parts(arguments: list[str], with_model: bool) -> tuple[Any, list[Finding]]:
    """The run's parts, unless they cannot be made; and what stood in the way."""
    problems: list[Finding] = []
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            return _Unstarted(problems, with_model, args=["fit", *arguments], **cli_settings()), problems
    except (UserError, MisconfigurationException) as error:
        problems.append(refusal_finding("settings", error))
    except SystemExit as stop:
        if stop.code in (0, None):  # --help, --print_config
            raise
        message = said.getvalue()
        message = message[message.rindex("error:") + len("error:") :] if "error:" in message else message
        problems.append(refusal_finding("settings", " ".join(message.split())))
    return None, problems


@contextmanager
def _quietly() -> Iterator[None]:
    """Without bars of files being read, and what Lightning says of a machine."""
    from datasets.utils.logging import disable_progress_bar, enable_progress_bar
    from transformers.utils import logging as transformers_logging

    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    transformers_logging.disable_progress_bar()
    disable_progress_bar()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        transformers_logging.enable_progress_bar()
        enable_progress_bar()


def write_json(found: Diagnosis, path: Path) -> None:
    """The findings and all numbers as a file."""
    content = {
        "opsd_lightning": __version__,
        "healthy": found.healthy,
        "findings": [{k: safe_text(v) for k, v in finding._asdict().items()} for finding in found.findings],
        "facts": redact(asdict(found)["facts"]),
    }
    atomic_write(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


# -- the report --------------------------------------------------------------------------------------------------------


def show(found: Diagnosis) -> None:
    """Print the report."""
    from rich.console import Console

    console = Console(width=_WIDTH, highlight=False, emoji=False)
    facts = found.facts
    if "data" in facts:
        _show_data(console, facts["data"])
    if "lengths" in facts:
        _show_lengths(console, facts["lengths"])
    if "template" in facts:
        _show_template(console, facts)
    if "divergence" in facts:
        _show_divergence(console, facts["divergence"])
    if "memory" in facts:
        _show_memory(console, facts["memory"])
    if "time" in facts:
        _show_time(console, facts["time"])
    _show_findings(console, found)


def _table(title: str, *headings: str) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, title_style="bold", pad_edge=False)
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="left" if number == 0 else "right")
    return table


def _show_data(console: Any, facts: Mapping[str, Any]) -> None:
    table = _table("Data", "", *(safe_markup(f"data.{split}") for split in facts))
    reasons = list(dict.fromkeys(reason for each in facts.values() for reason in each["left_out"]))
    table.add_row("rows", *(str(each["rows"]) for each in facts.values()))
    for reason in reasons:
        table.add_row(
            safe_markup(f"  left out: {reason}"), *(str(each["left_out"].get(reason, 0)) for each in facts.values())
        )
    table.add_row("kept", *(str(each["kept"]) for each in facts.values()))
    console.print(table)


def _show_lengths(console: Any, facts: Mapping[str, Any]) -> None:
    table = _table("Lengths in tokens", "", "rows", "mean", "median", "99 %", "longest", "limit", "over")
    names = {"student_prompts": "student's prompts", "teacher_prompts": "teacher's prompts", "traces": "traces"}
    for key, name in names.items():
        each = facts[key]
        if each["count"]:
            values = [each["count"], round(each["mean"]), each["median"], each["99 %"], each["longest"]]
            table.add_row(name, *map(str, values), str(each["limit"] or "-"), str(each["over"]))
    console.print(table)
    for key, name in names.items():
        bins = facts[key]["bins"]
        if len(bins) > 1:
            console.print(f"[bold]{name}[/]")
            most = max(count for _, _, count in bins)
            for low, high, count in bins:
                bar = "\N{FULL BLOCK}" * round(50 * count / most) or ("\N{LEFT ONE EIGHTH BLOCK}" if count else "")
                over = facts[key]["limit"] is not None and low > facts[key]["limit"]
                span = str(low) if high == low + 1 else f"{low}-{high - 1}"
                console.print(f"  {span:>13} [{'red' if over else 'cyan'}]{bar}[/] {count}")
    console.print()


def _show_template(console: Any, facts: Mapping[str, Any]) -> None:
    table = _table("Prompts", "", "ends with", "thinking")
    for name, end in facts["template"].get("prompts_end_with", {}).items():
        table.add_row(safe_markup(name), safe_markup(repr(end)), safe_markup(facts["thinking"]["prompts"][name]))
    console.print(table)
    if "agreement" in facts:
        agreed, total = facts["agreement"]["agreed"], facts["agreement"]["tokens"]
        console.print(f"Scoring agrees with sampling: {agreed} of {total} greedily sampled tokens are its likeliest, too\n")


def _show_divergence(console: Any, facts: list[dict[str, Any]]) -> None:
    title = f"Divergence on the first {LOOKED_AT} tokens of traces (forward KL, nats)"
    table = _table(title, "", "first token", "mean of the next", "student would begin", "teacher would begin")
    for number, line in enumerate(facts, 1):
        rest = "-" if line["next_forward_kl"] is None else f"{line['next_forward_kl']:.3f}"
        begins = [f"{safe_markup(repr(line[f'{r}_first']))} {line[f'{r}_probability']:.0%}" for r in ("student", "teacher")]
        table.add_row(str(number), f"{line['first_forward_kl']:.3f}", rest, *begins)
    console.print(table)


def _show_memory(console: Any, facts: Mapping[str, Any]) -> None:
    table = _table("Memory of one device, estimated", "", "MiB")
    for name, value in facts["bytes"].items():
        if value and name != "total":
            table.add_row(safe_markup(name), f"{value / 2**20:,.1f}")
    table.add_row("[bold]at most at one time[/]", f"[bold]{facts['bytes']['total'] / 2**20:,.1f}[/]")
    console.print(table)
    console.print(
        f"{safe_markup(facts['device'])} has {facts['device_bytes'] / GIB:.1f} GiB. With all completions at full length; "
        "libraries, a CUDA context and its allocator's reserve come on top (about 1 GiB)\n"
    )


def _show_time(console: Any, facts: Mapping[str, Any]) -> None:
    low, high = facts["step_seconds"]
    table = _table("Time, extrapolated", "", "all completions at full length")
    for phase, seconds in facts["phases"].items():
        table.add_row(safe_markup(phase), duration(seconds))
    console.print(table)
    text = f"A step takes {_between(low, high)}"
    if "run_seconds" in facts:
        text += f", {facts['steps']} steps {_between(*facts['run_seconds'])}"
    if "validation_seconds" in facts:
        text += f"; a validation up to {duration(facts['validation_seconds'])}"
    console.print(
        f"{text}. From {facts['measured']['rows']} examples measured here, for completions of "
        f"{facts['usual_completion']:.0f} (the traces' mean) to {facts['longest_completion']} tokens. "
        "How rollouts grow with their number is taken from a CPU: on a GPU they may take less\n"
    )


def _show_findings(console: Any, found: Diagnosis) -> None:
    for level in ("note", "warning", "error"):
        for finding in found.of(level):  # type: ignore[arg-type]
            console.print(
                f"{_MARKS[level]} [bold]{safe_markup(finding.part)}[/]: {safe_markup(finding.text)}", soft_wrap=True
            )
            if finding.fix:
                where = f"{finding.setting}: " if finding.setting else ""
                console.print(f"     -> {safe_markup(where + finding.fix)}", soft_wrap=True)
    fixes, looks = len(found.of("error")), len(found.of("warning"))
    warned = f"{looks} warning{'s' * (looks != 1)}"
    if fixes:
        console.print(f"\n[bold red]{fixes} thing{'s' * (fixes != 1)} to fix[/], {warned}")
    else:
        console.print(f"\n[bold green]Nothing to fix[/], {warned}")


def _between(low: float, high: float) -> str:
    one, other = duration(low), duration(high)
    return f"about {one}" if one == other else f"{one} to {other}"
