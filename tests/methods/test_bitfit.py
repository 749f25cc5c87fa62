"""BitFit: every bias, and nothing else."""

from __future__ import annotations

import pytest

import deltaw
from deltaw.errors import TargetError
from deltaw.methods.bitfit import BitFit
from tests.methods.test_methods import build


def test_a_model_without_biases_is_refused_with_what_to_do() -> None:
    with pytest.raises(TargetError, match=r"this LlamaForCausalLM has none .* BitFit\(add=True\)"):
        deltaw.attach(build("llama"), BitFit())


def test_it_trains_every_bias_and_nothing_else() -> None:
    model = build("bert")
    deltaw.attach(model, BitFit())
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    biases = {n for n, _ in model.named_parameters() if n.endswith("bias") and ".deltaw." not in n}
    assert {n.replace(".deltaw.default", "") for n in trainable} == biases
