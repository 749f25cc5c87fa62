"""The objective: the loss is the sum computed by hand, by either path, and no [tokens, vocabulary] tensor is made."""

from typing import Any

import pytest
import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

from deltaw import LoRA, attach
from deltaw.data import Batch, Example, collate
from deltaw.model.summary import parameters
from deltaw.training import head as head_module
from deltaw.training.losses import CompletionLoss
from tests.conftest import MAKERS, fill, tiny_llama

EXAMPLES = [
    Example([5, 9, 11, 4, 2], [False, False, True, True, True], "a:1"),
    Example([7, 8, 2], [False, True, True], "a:2"),
    Example([3, 6, 9, 12, 15, 18, 2], [False, False, False, False, True, False, True], "a:3"),
]


def by_hand(model: Any, examples: list[Example]) -> tuple[float, int]:
    """Σ −log p(y_t | x, y_<t), one record at a time, straight from the definition."""
    total, count = 0.0, 0
    for example in examples:
        logits = model(torch.tensor([example.input_ids])).logits[0].double()
        for t, wanted in enumerate(example.supervised):
            if wanted:
                p = logits[t - 1].exp() / logits[t - 1].exp().sum()
                total -= float(p[example.input_ids[t]].log())
                count += 1
    return total, count


def forced(model: Any, path: str) -> CompletionLoss:
    """Its loss by this path."""
    measure = CompletionLoss(model)
    with torch.no_grad():
        measure(collate(EXAMPLES, 0))
    assert measure.path == "head"
    measure.path = path
    return measure


@pytest.mark.parametrize("path", ["head", "logits"])
def test_the_loss_is_the_sum_computed_by_hand(tiny: Any, path: str) -> None:
    fill(attach(tiny, LoRA(rank=4, alpha=10)))
    with torch.no_grad():
        total, count = forced(tiny, path)(collate(EXAMPLES, 0))
        expected, expected_count = by_hand(tiny, EXAMPLES)
    assert count == expected_count == 7
    assert float(total) == pytest.approx(expected, rel=1e-5)


def softcapped() -> Any:
    return Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=5.0))


def divided() -> Any:
    return GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=3.0, tie_word_embeddings=False))


def multiplied() -> Any:
    return CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.25))


def biased() -> Any:
    model = PhiForCausalLM(PhiConfig(**SIZES))
    torch.nn.init.normal_(model.lm_head.bias)
    return model


def projected() -> Any:
    config = OPTConfig(
        hidden_size=32, word_embed_proj_dim=16, ffn_dim=56, num_hidden_layers=2, num_attention_heads=4, vocab_size=96,
        max_position_embeddings=64, dropout=0.0,
    )  # fmt: skip
    return OPTForCausalLM(config)


HEADS = {
    "tied": tiny_llama, "untied": lambda: tiny_llama(tied=False), "soft-capped": softcapped, "divided": divided,
    "multiplied": multiplied, "biased": biased, "projected": projected,
}  # fmt: skip
SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 96, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@pytest.mark.parametrize("adapted_head", [False, True])
@pytest.mark.parametrize("kind", list(HEADS))
def test_every_head_gives_the_values_and_gradients_of_the_models_own_logits(kind: str, adapted_head: bool) -> None:
    torch.manual_seed(0)
    model = HEADS[kind]().eval()
    with torch.no_grad():  # logits as large as a trained model's, on which a cap can be seen
        model.get_output_embeddings().weight.mul_(40)
    targets = ["all-linear", "lm_head"] if adapted_head else "all-linear"
    fill(attach(model, LoRA(rank=4, alpha=10, targets=targets)))
    with torch.no_grad():
        expected, _ = by_hand(model, EXAMPLES)
        assert float(forced(model, "head")(collate(EXAMPLES, 0))[0]) == pytest.approx(expected, rel=1e-4)
    ours, theirs = (
        torch.autograd.grad(forced(model, path)(collate(EXAMPLES, 0))[0], parameters(model))
        for path in ("head", "logits")
    )
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()))


def test_logits_never_exist_for_all_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fill(attach(tiny_llama(), LoRA(rank=4, alpha=10)))
    measure = CompletionLoss(model)
    measure(collate(EXAMPLES, 0))  # the first, which tries the ways to the model's own logits
    heights: list[int] = []
    model.lm_head.register_forward_hook(lambda m, i, o: heights.append(-1))
    plain = torch.nn.functional.linear
    monkeypatch.setattr(
        head_module.F,
        "linear",
        lambda x, w, b=None: (heights.append(len(x)), plain(x, w, b))[1] if len(w) == 96 else plain(x, w, b),
    )
    many = EXAMPLES * 20
    total, count = measure(collate(many, 0))
    total.backward()
    assert count == 140
    # All 400 positions of the rows have hidden states; only the supervised ones, up to a round number, have logits
    assert heights == [160]


def test_a_head_of_its_own_kind_falls_back_to_the_models_logits(caplog: pytest.LogCaptureFixture) -> None:
    class Doubled(type(tiny_llama())):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out = super().forward(*args, **kwargs)
            out.logits = out.logits.sigmoid()
            return out

    torch.manual_seed(0)
    model = Doubled(tiny_llama().config).eval()
    attach(model, LoRA(rank=4, alpha=10))
    measure = CompletionLoss(model)
    with torch.no_grad():
        total, _ = measure(collate(EXAMPLES, 0))
        assert float(total) == pytest.approx(by_hand(model, EXAMPLES)[0], rel=1e-5)
    assert measure.path == "logits" and "in a way that is not known" in caplog.text


@pytest.mark.parametrize("kind", list(MAKERS))
def test_an_adapted_head_is_used_as_adapted(kind: str) -> None:
    model = MAKERS[kind]().eval()
    fill(attach(model, LoRA(rank=4, alpha=10, targets="lm_head")))
    measure = CompletionLoss(model)
    with torch.no_grad():
        assert float(measure(collate(EXAMPLES, 0))[0]) == pytest.approx(by_hand(model, EXAMPLES)[0], rel=1e-5)
    assert measure.path == "head"


def test_per_token_losses_know_their_rows(tiny: Any) -> None:
    with torch.no_grad():
        losses, rows = CompletionLoss(tiny).each(collate(EXAMPLES, 0))
    assert rows.tolist() == [0, 0, 0, 1, 1, 2, 2]
    with torch.no_grad():
        expected, _ = by_hand(tiny, EXAMPLES[1:2])
    assert float(losses[3:5].sum()) == pytest.approx(expected, rel=1e-5)


def test_padding_is_not_attended_to(tiny: Any) -> None:
    batch = collate(EXAMPLES, 0)
    other = Batch(torch.where(batch.attention_mask.bool(), batch.input_ids, 77), batch.attention_mask, batch.supervised)
    with torch.no_grad():
        torch.testing.assert_close(CompletionLoss(tiny)(batch)[0], CompletionLoss(tiny)(other)[0])
