"""Prefixes: trained vectors before the input, as embeddings alone (the paper's prefix-embedding tuning, §5.1; prompt tuning,
Lester et al. 2021, arXiv 2104.08691) or as the activations before every block (prefix-layer tuning, after Li and Liang 2021,
arXiv 2101.00190). Knows how their settings become updates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from deltaw.config import check
from deltaw.methods.plan import Plan, Preset, register
from deltaw.methods.shared import Beside

if TYPE_CHECKING:
    from torch import nn

    from deltaw.methods.updates.base import Update


@register("prefix", lr=1e-2, presets={"prompt": Preset(lr=1e-2, settings={"where": "embedding"})})
@dataclass(frozen=True)
class Prefix(Beside):
    """Trained vectors before the input of a decoder, or of an encoder (Hu et al. 2021, arXiv 2106.09685, §5.1).

    Trains l embeddings [l, d] (where: embedding, prefix-embedding tuning), or also the activations [l, d] before each further
    block (where: layers, prefix-layer tuning). Unlike other methods it changes the output from the start.

    Raises:
        ConfigError: A setting is out of range.

    Example:
        >>> import deltaw
        >>> from transformers import AutoModelForCausalLM
        >>> model = AutoModelForCausalLM.from_pretrained("model")
        >>> model = deltaw.attach(model, deltaw.Prefix(length=3))
        >>> [tuple(p.shape) for p in deltaw.parameters(model)]  # embeddings, and activations before the second block
        [(3, 32), (3, 32)]
    """

    length: int = 16
    """Positions that the prefix takes, at least 1. (The paper's l_p, §5.1.)"""
    where: Literal["embedding", "layers"] = "layers"
    """Values that are trained: the prefix's embeddings alone (embedding), or the activations before each block as well
    (layers)."""

    def __post_init__(self) -> None:
        check(self, length=(1, None))

    @property
    def positions(self) -> int:
        """The number of positions that the prefix takes from each row."""
        return self.length

    def plan(self, model: nn.Module) -> Plan:
        """Return the prefix of the model's body, and of its blocks, fp32 (float64 on a float64 base).

        Embeddings start as those of random tokens. Activations are drawn with these embeddings' standard deviation. Both come
        from torch's global generator. Raises TargetError for a model without an embedding of tokens, or without blocks.
        """
        import torch

        from deltaw.errors import TargetError
        from deltaw.methods.targets import blocks_of
        from deltaw.methods.updates.prefix import PrefixOfBlock, Prepended

        name, body, embedding = _body(model)
        weight = embedding.weight.detach()
        dtype = torch.promote_types(weight.dtype, torch.float32)
        tokens = torch.randint(len(weight), (self.length,)).to(weight.device)
        rows = weight[tokens].to(dtype)
        updates: dict[str, Update] = {name: Prepended(rows)}
        if self.where == "layers":
            inside = {n: i for n, i in blocks_of(model).items() if not name or n.startswith(f"{name}.")}
            if len(inside) < 2:
                raise TargetError(
                    f"{type(body).__name__} has no stack of several blocks (ALBERT's are one, shared): set where to embedding."
                )
            for block, index in inside.items():
                if index:
                    drawn = torch.randn(rows.shape).to(rows) * rows.std()
                    updates[block] = PrefixOfBlock(drawn, index)
        return self.planned(model, updates)


def _body(model: nn.Module) -> tuple[str, nn.Module, nn.Embedding]:
    """Return the part of the model that reads tokens (an encoder-decoder's encoder): its name, itself, its embedding of tokens.

    Raises TargetError where the model has none.
    """
    from torch import nn

    from deltaw.errors import TargetError

    body = getattr(model, getattr(model, "base_model_prefix", "") or "_", model)
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        body = getattr(model, "get_encoder")()  # noqa: B009  (which nn.Module does not have)
    embedding = getattr(body, "get_input_embeddings", lambda: None)()
    if not isinstance(embedding, nn.Embedding):
        raise TargetError(f"{type(model).__name__} does not read tokens through an embedding, which a prefix needs.")
    return next(n for n, m in model.named_modules() if m is body), body, embedding
