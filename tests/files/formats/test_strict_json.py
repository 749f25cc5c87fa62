"""The one strict reader of JSON: what it refuses, and that each refusal is one error with the file's name."""

from pathlib import Path

import pytest

from deltaw.errors import FileError
from deltaw.files.formats.strict_json import is_natural, parse, parse_texts, read_object


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('{"r": 8, "r": 16}', "'r' is in it twice"),
        ('{"a": {"b": 1, "b": 1}}', "'b' is in it twice"),
        ("[" * 50_000 + "]" * 50_000, "deeper than 100 levels"),
        ('{"a":' * 200 + "1" + "}" * 200, "deeper than 100 levels"),
        ('{"\\ud800": 1}', "half a character"),
        ("9" * 5000, "digits"),
        ("{", "Expecting"),
    ],
    ids=lambda value: value[:20],
)
def test_what_is_refused(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        parse(text)


def test_what_is_read() -> None:
    assert parse('{"a": [1, {"b": null}], "c": "\\ud83d\\ude00"}') == {"a": [1, {"b": None}], "c": "😀"}
    assert parse(b"[" * 99 + b"]" * 99) is not None
    assert parse_texts('["a"]') == ["a"]
    with pytest.raises(ValueError, match="no list of texts"):
        parse_texts('["a", 1]')


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff\xfe", b'{"a": 1, "a": 2}'], ids=repr)
def test_a_file_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(FileError, match=r"x\.json cannot be read as JSON"):
        read_object(tmp_path / "x.json")


def test_natural_numbers() -> None:
    assert is_natural(0) and is_natural(2**63 - 1)
    assert not any(map(is_natural, (-1, 2**63, 1.0, True, "1", None)))
