"""README, documentation, and the code blocks and commands in them."""

from __future__ import annotations

import re
from collections.abc import Iterator

from helpers.paths import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "configs" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(text: str, languages: set[str]) -> Iterator[str]:
    for match in re.finditer(r"^[ ]*```(\w*)\n(.*?)^[ ]*```", text, re.DOTALL | re.MULTILINE):
        if match[1] in languages:
            yield match[2]


def commands(text: str) -> Iterator[str]:
    """Yield the commands of a page: joined lines of shell blocks, and inline code that starts like a command."""
    for block in blocks(text, {"bash", "sh", "shell"}):
        for line in block.replace("\\\n", " ").splitlines():
            line = re.sub(r"(^|\s)#.*", "", line).strip()
            yield from (part.strip() for part in line.split("&&") if part.strip())
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    yield from (
        " ".join(found.split()) for found in re.findall(r"`((?:opsd|make|python(?: -m)? benchmarks)[ ./][^`]+)`", prose)
    )
