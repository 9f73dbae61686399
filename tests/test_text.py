"""Text for terminals and files."""

from __future__ import annotations

import io
import os

import pytest

from edge_tokcomp.text import encodable, printable, unheard


def test_printable_text_is_one_line_that_steers_no_terminal() -> None:
    assert printable("a\nb\tc\x1b[2Jd\u202e") == "a\\nb\\tc\\x1b[2Jd\\u202e"
    assert printable("Grüße 猫 →") == "Grüße 猫 →"


def test_letters_that_python_calls_unprintable_stay_as_they_are() -> None:
    persian, hindi, joined = "می\u200cخواهم", "क्\u200dष", "👩\u200d👩\u200d👧\ufe0f"
    for text in (persian, hindi, joined, "猫\u3000犬", "10\u00a0km", "a\u2009b"):
        assert printable(text) == text
    for character in "\u2028\u2029\u0085\u202a\u202e\u2066\u2069\u200e\u200f\ufeff\x7f\x9b\ud800":
        assert printable(character).isascii()


def test_names_that_are_no_utf8_can_be_encoded() -> None:
    assert encodable(os.fsdecode(b"caf\xe9.png")) == "caf\\xe9.png"
    assert encodable("\ud800 Grüße 猫") == "\\ud800 Grüße 猫"


def test_only_a_stream_that_is_gone_is_unheard() -> None:
    closed = io.StringIO()
    closed.close()
    with unheard(closed):
        print("x", file=closed)
    narrow = io.TextIOWrapper(io.BytesIO(), "ascii")
    with pytest.raises(UnicodeEncodeError), unheard(narrow):
        print("猫", file=narrow)
