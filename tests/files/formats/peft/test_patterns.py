"""Patterns of settings: the same answers as Python's engine, in bounded time."""

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltaw.files.formats.peft import patterns

NAMES = [
    "model.layers.0.self_attn.q_proj", "model.layers.12.mlp.down_proj", "lm_head", "a", "", "aaaaaaaab", "transformer.h.1.attn.c_attn",
]  # fmt: skip
USUAL = [
    r".*\.(q_proj|v_proj)", r"^(?!.*mlp).*(?:q_proj|down_proj).*", r"(.*\.)?(q_proj)$", r"model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj",
    r"(?i)LM_HEAD", r".*(?<=self_)attn.*", r".*(?<!self_)attn.*", r".*\bq_proj\b", r".*layers\.(1[0-9]|2[0-3]).*(down|up).*proj.*",
]  # fmt: skip
SLOW = [
    r"(a|aa)+b?", r"(?:.*\.)*[^.]*", r"a{2,}b$", r"a?a?a?a?a?a?a?a?a?a?a?aaa.*", r"(?:[a-z]+\.)+(?:\d\.)?(?:[a-z_]+\.?)*", r"|x", r"(a*)*",
    r"(?:a(?=a))*.*", r"(a{2}|b){1,3}.*", r"(?:(?:^|\.)[a-z0-9_]+)+$",
]  # fmt: skip


@pytest.mark.parametrize("pattern", [*USUAL, *SLOW])
def test_the_answers_are_those_of_re(pattern: str) -> None:
    for name in NAMES:
        assert patterns.matches(pattern, name) == (re.fullmatch(pattern, name) is not None), name
        assert patterns.starts(pattern, name) == (re.match(pattern, name) is not None), name


_PARTS = st.sampled_from(["a", "b", ".", "[ab]", "[^a]", r"\.", "^", "$", r"\b"])
_PATTERNS = st.recursive(
    _PARTS,
    lambda inner: st.one_of(
        st.lists(inner, min_size=2, max_size=3).map("".join),
        st.tuples(inner, inner).map(lambda pair: f"({pair[0]}|{pair[1]})"),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "{2}", "{1,9}", "*?"])).map(
            lambda pair: f"(?:{pair[0]}){pair[1]}"
        ),
        st.tuples(st.sampled_from(["?=", "?!"]), inner).map(lambda pair: f"({pair[0]}{pair[1]})"),
    ),
    max_leaves=6,
)


@given(pattern=_PATTERNS, name=st.text("ab.", max_size=6))
def test_any_pattern_has_the_answers_of_re(pattern: str, name: str) -> None:
    assert patterns.matches(pattern, name) == (re.fullmatch(pattern, name) is not None)
    assert patterns.starts(pattern, name) == (re.match(pattern, name) is not None)


@pytest.mark.parametrize(
    "pattern",
    [
        r"(a+)+$",
        r"(a|a)*$",
        r"((((a*)*)*)*)*c",
        "a?" * 30 + "a" * 30 + "c",
        r"(.*)(.*)(.*)(.*)(.*)(.*)x",
        r"(.*\.)*(.*)*q",
    ],
    ids=lambda pattern: pattern[:20],
)
def test_no_pattern_takes_long(pattern: str) -> None:
    start = time.monotonic()
    patterns.matches(pattern, "a" * 300 + "b")
    assert time.monotonic() - start < 2


@pytest.mark.parametrize(
    "pattern", ["q_proj", "a", "layers.0.self_attn.q_proj", "self.attn.q_proj", ".", "x", "0.mlp.down_proj"]
)
def test_plain_patterns_are_the_ends_of_names(pattern: str) -> None:
    assert patterns.is_plain(pattern) and not patterns.is_plain(r"a\.b")
    for name in NAMES:
        assert patterns.ends_in(pattern, name) == (re.match(rf"(.*\.)?({pattern})$", name) is not None), name


@pytest.mark.parametrize(
    ("pattern", "why"),
    [("(", "no regular expression"), (r"(a)\1", "groupref"), ("a" * 5000, "5,000 characters"), ("(?>a)b", "atomic")],
    ids=lambda value: value[:10],
)
def test_what_is_no_pattern(pattern: str, why: str) -> None:
    assert why in (patterns.problem(pattern) or "")
    with pytest.raises(ValueError, match=why):
        patterns.matches(pattern, "a")
