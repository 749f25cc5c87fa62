"""Bottleneck adapters: where they are, and how large."""

from __future__ import annotations

import deltaw
from deltaw.methods.bottleneck import Bottleneck
from deltaw.model.summary import updates
from tests.methods.test_methods import FORMS, build


def test_each_kind_is_where_its_paper_has_it() -> None:
    found = {}
    for form in ("houlsby", "pfeiffer", "lin", "adapterdrop"):
        model = build("llama")
        method = FORMS[form]
        deltaw.attach(model, Bottleneck(**{**vars(method), "norms": False}))
        found[form] = sorted(updates(model))
    layer = "model.layers.{}.{}".format
    assert found["houlsby"] == [layer(i, n) for i in (0, 1) for n in ("mlp.down_proj", "self_attn.o_proj")]
    assert found["pfeiffer"] == [layer(i, "mlp.down_proj") for i in (0, 1)]
    assert found["lin"] == ["model.layers.0", "model.layers.1"]
    assert found["adapterdrop"] == [layer(1, n) for n in ("mlp.down_proj", "self_attn.o_proj")]


def test_adapters_and_prefixes_have_the_papers_counts_of_parameters() -> None:
    """§5.1: adapters L̂·(2·d·r + r + d) and 2·d for each trained LayerNorm; prefix-embedding d·l, prefix-layer L·d·l."""
    d, m, L = 32, 4, 2
    counts = {}
    for form in ("pfeiffer", "lin", "prefix", "prompt"):
        model = build("llama")
        deltaw.attach(model, FORMS[form])
        counts[form] = deltaw.summary(model).adapters["default"].parameters
    assert counts["pfeiffer"] == L * (2 * d * m + m + d)
    assert counts["lin"] == L * (2 * d * m + m + d) + L * 2 * d
    assert counts["prompt"] == 3 * d and counts["prefix"] == L * d * 4
