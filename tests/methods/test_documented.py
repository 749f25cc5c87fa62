"""What `help()` says of public names: each field with its type, default and text."""

from __future__ import annotations

import dataclasses
import inspect
import pydoc
import re
import typing

import pytest

import deltaw
from deltaw.methods.documented import document, field_texts, sentences
from deltaw.methods.registry import METHODS

PUBLIC = {name: getattr(deltaw, name) for name in deltaw.__all__}
CLASSES = [name for name, value in PUBLIC.items() if dataclasses.is_dataclass(value)]
FUNCTIONS = [name for name, value in PUBLIC.items() if inspect.isfunction(value)]


@pytest.mark.parametrize("name", CLASSES)
def test_help_explains_each_field(name: str) -> None:
    cls = PUBLIC[name]
    shown = pydoc.render_doc(cls, renderer=pydoc.plaintext)
    words = " ".join(shown.replace(" |  ", " ").split())
    texts = field_texts(cls)
    for field in dataclasses.fields(cls):
        assert re.search(rf"^ \|      {field.name}: ", shown, re.MULTILINE), field.name
        assert len(texts[field.name]) > 10 and texts[field.name] in words, field.name
    assert shown.index("Attributes:") < shown.index(">>> ")
    assert shown.count("Attributes:") == 1


def test_every_method_is_public_and_explained() -> None:
    assert {cls.__name__ for cls in METHODS.values()} <= set(CLASSES)
    text = deltaw.LoRA.__doc__ or ""
    for part in ("rank: int = 8", "at least 1", "§4.1", "above 0", "arXiv 2404.02948", "Raises:", "Example:"):
        assert part in text
    assert text.index("rank: int") < text.index("whole: str")  # as a call takes them
    assert "§2.1" in (deltaw.Bottleneck.__doc__ or "") and "§3.3" in (deltaw.IA3.__doc__ or "")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_public_functions_explain_each_argument_and_take_no_any(name: str) -> None:
    function = PUBLIC[name]
    doc = inspect.getdoc(function) or ""
    for argument in inspect.signature(function).parameters.values():
        assert re.search(rf"\b{argument.name}\b", doc), argument.name
        assert "Any" not in str(argument.annotation), argument
    assert ">>> " in doc


@pytest.mark.parametrize("name", CLASSES)
def test_public_fields_are_of_no_any_type(name: str) -> None:
    assert not [f.name for f in dataclasses.fields(PUBLIC[name]) if re.search(r"\bAny\b", str(f.type))]


def test_a_class_without_source_keeps_its_docstring() -> None:
    cls = dataclasses.make_dataclass("Made", [("rank", int)], namespace={"__doc__": "Made by a program."})
    document(cls)
    assert (cls.__doc__ or "").startswith("Made by a program.") and field_texts(cls) == {}
    assert typing.cast(str, cls.__doc__).count("rank: ") == 1
    document(cls)  # a second time adds nothing
    assert typing.cast(str, cls.__doc__).count("rank: ") == 1


def test_sentences_end_where_another_begins() -> None:
    assert sentences("") == []
    assert sentences("Layers, as in 2.5. (Lin et al. 2020, arXiv 2004.03829.) auto: by size. Default: 3.") == [
        "Layers, as in 2.5.", "(Lin et al. 2020, arXiv 2004.03829.)", "auto: by size.", "Default: 3.",
    ]  # fmt: skip
