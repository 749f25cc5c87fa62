"""Layers' names in the order in which the layers are."""

from __future__ import annotations

import random

from deltaw.layers.names import brief, by_family, in_order

STACK = [f"model.layers.{i}.{part}" for i in range(12) for part in ("mlp.up_proj", "self_attn.q_proj")]


def test_numbers_count_by_their_value() -> None:
    shuffled = random.Random(0).sample([*STACK, "lm_head"], k=25)
    assert in_order(shuffled) == ["lm_head", *STACK]


def test_a_familys_middle_is_the_models() -> None:
    """Files have their names as text has them: 0, 1, 10, 11, 2 …"""
    found = by_family(sorted(STACK))
    assert [layers[len(layers) // 2] for layers in found.values()] == [
        "model.layers.6.mlp.up_proj", "model.layers.6.self_attn.q_proj"
    ]  # fmt: skip


def test_brief_names_tell_apart() -> None:
    assert brief(["a.b.c.d", "a.b.e.d"]) == {"a.b.c.d": "c.d", "a.b.e.d": "e.d"}
    assert brief(["x.0.a.d", "x.1.a.d"]) == {"x.0.a.d": "0.a.d", "x.1.a.d": "1.a.d"}
