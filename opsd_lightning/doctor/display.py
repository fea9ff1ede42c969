"""A diagnosis on the terminal and as a JSON file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from opsd_lightning import __version__
from opsd_lightning.doctor.findings import Diagnosis
from opsd_lightning.doctor.memory import GIB
from opsd_lightning.doctor.probe import LOOKED_AT
from opsd_lightning.reports.html import duration
from opsd_lightning.utils.files import atomic_write
from opsd_lightning.utils.redaction import redact
from opsd_lightning.utils.terminal import safe_markup, safe_text

_WIDTH = 100
_MARKS = {"error": "[bold red]fix[/]", "warning": "[yellow]look[/]", "note": "[dim]note[/]"}


def write_json(found: Diagnosis, path: Path) -> None:
    """Write the findings and all numbers to a file."""
    content = {
        "opsd_lightning": __version__,
        "healthy": found.healthy,
        "findings": [{k: safe_text(v) for k, v in finding._asdict().items()} for finding in found.findings],
        "facts": redact(asdict(found)["facts"]),
    }
    atomic_write(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


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
    for name, text in facts["template"].get("prompts", {}).items():
        console.print(f"[bold]The {safe_markup(name)}'s first prompt[/]")
        console.print(safe_markup(text), soft_wrap=True)
        console.print()
    if "agreement" in facts:
        agreed, total = facts["agreement"]["agreed"], facts["agreement"]["tokens"]
        console.print(f"Scoring agrees with sampling: {agreed} of {total} greedily sampled tokens are the likeliest\n")


def _show_divergence(console: Any, facts: list[dict[str, Any]]) -> None:
    title = f"Divergence on the first {LOOKED_AT} tokens of traces (forward KL, nats)"
    table = _table(title, "", "first token", "mean of the next", "student begins with", "teacher begins with")
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
    table.add_row("[bold]peak[/]", f"[bold]{facts['bytes']['total'] / 2**20:,.1f}[/]")
    console.print(table)
    if "measured" in facts:
        measured = facts["measured"]
        console.print(
            f"A training step of {measured['rows']} completions of {measured['completion']} tokens took "
            f"{measured['peak_bytes'] / GIB:.1f} GiB. Extrapolated to a step of the run: "
            f"{measured['extrapolated_bytes'] / GIB:.1f} GiB"
        )
    free = "" if facts["free_bytes"] == facts["device_bytes"] else f", {facts['free_bytes'] / GIB:.1f} GiB of it free"
    text = f"{safe_markup(facts['device'])} has {facts['device_bytes'] / GIB:.1f} GiB{free}. "
    if facts["rows_at_once"] < min(facts["step"]["rows_at_once"], facts["step"]["rows"]):
        text += f"{facts['rows_at_once']} completions fit at one time. "
    console.print(f"{text}The estimate is for completions of full length, without the libraries\n")


def _show_time(console: Any, facts: Mapping[str, Any]) -> None:
    table = _table("Time, extrapolated", "", "all completions at full length")
    for phase, seconds in facts["phases"].items():
        table.add_row(safe_markup(phase), duration(seconds))
    console.print(table)
    text = f"A step takes {_between(*facts['step_seconds'])}"
    if "run_seconds" in facts:
        text += f", {facts['steps']} steps {_between(*facts['run_seconds'])}"
    if "validation_seconds" in facts:
        text += f"; a validation up to {duration(facts['validation_seconds'])}"
    measured = facts["measured"][-1]
    rows = "" if measured["rows"] == facts["rows"] else f" and to {facts['rows']} completions"
    console.print(
        f"{text}. Extrapolated from a training step of {measured['rows']} completions of {measured['completion']} tokens to "
        f"{facts['usual_completion']:.0f} (the traces' mean) to {facts['longest_completion']} tokens{rows}\n"
    )
    if "decoding_bound" in facts:
        text = f"Decoding on this GPU is bound by {facts['decoding_bound']}"
        if facts["decoding_bound"] == "kernel launches":
            text += ": more completions at one time take hardly longer"
        console.print(f"{text}\n")


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
