"""Tests of zero-width characters in printed text."""

from __future__ import annotations

import pytest

from opsd_lightning.utils.terminal import escape_controls

JOINED = [
    "\u0645\u06cc\u200c\u0634\u0648\u062f",  # Persian
    "\u06a9\u062a\u0627\u0628\u200c\u0647\u0627",
    "\u0915\u094d\u200d\u0937, \u0930\u093e\u091c\u094d\u200c\u092f",  # Hindi
    "\u09b0\u200d\u09cd\u09af",  # Bengali
    "\u0d85\u0d9a\u0dca\u200d\u0dc2\u0dbb",  # Sinhala
    "\u0d05\u0d35\u0d28\u0d4d\u200d \u0d35",  # Malayalam, at a word's end
    "\U0001f468\u200d\U0001f469\u200d\U0001f467",
    "\U0001f469\U0001f3fd\u200d\U0001f680 \U0001f3f3\ufe0f\u200d\U0001f308 \u2764\ufe0f\u200d\U0001f525",
    "\U0001f43b\u200d\u2744\ufe0f \U0001f937\u200d\u2642\ufe0f",
]
ALONE = [
    "pass\u200dword", "a\u200cb", "\u200d", "\u200c\u0634", "\u0634\u200c", "\u0634\u200c\u200c\u0634", "\u0634\u200ca", "a\u200d\u0634",
    "\U0001f468\u200c\U0001f469", "\U0001f468\u200da", "a\ufe0f\u200d\U0001f469", "\U0001f468\u200d\u200d\U0001f469", "\u65e5\u200d\u672c",
    "\u0634\u200b\u0634", "\u0634\u202e\u0634", "\u0661\u200d\u0662", "\U0001f468\u200d",
]  # fmt: skip


@pytest.mark.parametrize("text", JOINED)
def test_joiners_of_words_and_emoji_stay(text: str) -> None:
    assert escape_controls(text) == text


@pytest.mark.parametrize("text", ALONE)
def test_joiners_without_an_effect_are_written_out(text: str) -> None:
    assert not set(escape_controls(text)) & set("\u200b\u200c\u200d\u202e")
