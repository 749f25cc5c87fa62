"""Prefixes: trained vectors before the input, as embeddings alone (the paper's prefix-embedding tuning, §5.1; prompt tuning,
Lester et al. 2021, arXiv 2104.08691) or as the activations before every block (prefix-layer tuning, after Li and Liang 2021,
arXiv 2101.00190). Knows how their settings become updates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from deltaw.config import check
from deltaw.methods.shared import Beside

if TYPE_CHECKING:
    from torch import nn

    from deltaw.methods.plan import Plan
    from deltaw.methods.updates.base import Update


@dataclass(frozen=True)
class Prefix(Beside):
    """Prefix-embedding and prefix-layer tuning, of a decoder's input or an encoder's."""

    length: int = 16
    """Positions that the prefix takes."""
    where: Literal["embedding", "layers"] = "layers"
    """embedding trains the prefix's embeddings; layers the activations at its positions before each block as well."""

    def __post_init__(self) -> None:
        check(self, length=(1, None))

    @property
    def positions(self) -> int:
        """Of the model's positions, those that rows of tokens cannot have."""
        return self.length

    def plan(self, model: nn.Module) -> Plan:
        """Embeddings that start as those of random tokens, and activations drawn with these embeddings' standard deviation, from
        torch's global generator; fp32 (float64 on a float64 base). Unlike other methods' it changes the output from the start.
        Raises TargetError."""
        import torch

        from deltaw.errors import TargetError
        from deltaw.methods.targets import blocks_of
        from deltaw.methods.updates.prefix import PrefixOfBlock, Prepended

        name, body = _body(model)
        embedding = body.get_input_embeddings().weight
        dtype = torch.promote_types(embedding.dtype, torch.float32)
        chosen = torch.randint(len(embedding), (self.length,)).to(embedding.device)
        rows = embedding.detach()[chosen].to(dtype)
        updates: dict[str, Update] = {name: Prepended(rows)}
        if self.where == "layers":
            inside = {n: i for n, i in blocks_of(model).items() if not name or n.startswith(f"{name}.")}
            if len(inside) < 2:
                raise TargetError(
                    f"{type(body).__name__} has no stack of several blocks (ALBERT's are one, shared): take where='embedding'."
                )
            for block, index in inside.items():
                if index:
                    drawn = torch.randn(rows.shape).to(rows) * rows.std()
                    updates[block] = PrefixOfBlock(drawn, index)
        return self.planned(model, updates)


def _body(model: Any) -> tuple[str, Any]:
    """The part of the model that turns tokens into hidden states (an encoder-decoder's encoder), and its name."""
    from torch import nn

    from deltaw.errors import TargetError

    body = getattr(model, getattr(model, "base_model_prefix", "") or "_", model)
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        body = model.get_encoder()
    embedding = getattr(body, "get_input_embeddings", lambda: None)()
    if not isinstance(embedding, nn.Embedding):
        raise TargetError(f"{type(model).__name__} does not read tokens through an embedding, which a prefix needs.")
    return next(n for n, m in model.named_modules() if m is body), body
