"""A LoRA adapter as it is on disk.

A file's tensors are `base_model.model.<layer>.lora_A.weight` [r, k] and `.lora_B.weight` [d, r] (keys.py has the others). The
settings give α, by pattern where it varies (ranks.py). What deltaw adds is in the safetensors metadata (metadata.py).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from torch import Tensor

from deltaw.files.formats.peft.config import PeftConfig
from deltaw.files.formats.peft.keys import unstacked
from deltaw.files.formats.peft.metadata import is_ours
from deltaw.files.formats.peft.ranks import pattern_names, rank_in
from deltaw.layers.ops.merging import Change, Product, Rescaled

# PEFT (0.21) adds the ΔW of the output projection inside a wrapped nn.MultiheadAttention twice in each pass: what a file has for
# it is half of what it means
TWICE = 2.0

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class LoRAFile:
    """A low-rank adapter as it is on disk, its tensors on the CPU."""

    factors: dict[str, Pair]
    """Layer name → A [r, k], B [d, r]; of a stack of E matrices A [E·r, k], B [d, r·E] (see keys.py)."""
    scales: dict[str, float]
    """Layer name → the factor of BA."""
    config: PeftConfig
    """adapter_config.json."""
    metadata: dict[str, str] = field(default_factory=dict)
    """The safetensors header's, by metadata.py's keys. Empty for foreign files."""
    embeddings: frozenset[str] = frozenset()
    """The layers of `factors` that are embeddings: k tokens, d dimensions."""
    kernels: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Convolution among the layers of `factors` → the shape of one kernel, [c/groups, …], k numbers."""
    magnitudes: dict[str, Tensor] = field(default_factory=dict)
    """Layer name → DoRA's m [d]."""
    biases: dict[str, Tensor] = field(default_factory=dict)
    """Layer name → b [d], of which scale·b is added to the layer's own bias."""
    rows: dict[str, Pair] = field(default_factory=dict)
    """Layer name → token ids [n], and the rows [n, e] that stand for the base's."""
    whole: dict[str, Tensor] = field(default_factory=dict)
    """Name of a parameter of the base → the value in its place."""
    copies: dict[str, Tensor] = field(default_factory=dict)
    """Name of a parameter of a layer in `factors` → the base's own value, where the file has that too."""
    originals: dict[str, Tensor] = field(default_factory=dict)
    """Name of a parameter of a module that PEFT copied to train it → the base's own value, where the file has that too."""

    wrapped: str | None = None
    """The first of the file's keys with the parts that torch.compile, DDP and their like put into names; names here have none."""
    unclear: frozenset[str] = frozenset()
    """The layers of `factors` of which only a model tells whether PEFT computes with them."""

    def rank(self, layer: str) -> int:
        """Return r; of a stack that of each of its matrices."""
        return rank_in(layer, self.factors[layer][0], self.config)

    def is_stack(self, layer: str) -> bool:
        """Return whether A and B are those of a stack of matrices."""
        return self.rank(layer) != len(self.factors[layer][0])

    def matrices(self, layer: str) -> Pair:
        """Return A [r, k] and B [d, r]; of a stack of E matrices A [E, r, k] and B [E, d, r]."""
        A, B = self.factors[layer]
        return unstacked(A, B, self.rank(layer)) if self.is_stack(layer) else (A, B)

    def shown(self, layer: str) -> str:
        """Return the layer's name for people: of a stack the parameter's name, where the file says which one it is."""
        names = self.names_in_peft(layer)
        return names[0] if len(names) == 1 and self.is_stack(layer) else layer

    @property
    def ours(self) -> bool:
        """Deltaw wrote it."""
        return is_ours(self.metadata)

    @property
    def changes_anything(self) -> bool:
        """It has more than low-rank updates whose B is zero, as they are before the first step of a training."""
        others = self.magnitudes or self.biases or self.rows or self.whole
        # float8 has no test of its own for zero
        return bool(others) or any(bool(B.float().any()) for _, B in self.factors.values())

    def product(self, layer: str) -> Product:
        """Return ΔW of a layer's low-rank update, without DoRA's magnitude."""
        return Product(*self.factors[layer], self.scales[layer])

    def change(self, layer: str) -> Change:
        """Return what a merge makes of a layer's weight."""
        product = self.product(layer)
        return Rescaled(product, self.magnitudes[layer]) if layer in self.magnitudes else product

    def replaced(self) -> set[str]:
        """Return the names of the base's parameters that the adapter has values for, whole or some rows of them."""
        return {*self.whole, *(f"{layer}.weight" for layer in self.rows)}

    def beyond(self) -> dict[str, list[str]]:
        """Return what the adapter has besides A and B of dense layers, in words → the names of it."""
        every = {
            "DoRA's magnitudes": self.magnitudes, "biases": self.biases, "embeddings": self.embeddings,
            "rows of tokens": self.rows, "parameters trained whole": self.whole, "values of the base": self.copies,
        }  # fmt: skip
        return {what: list(names) for what, names in every.items() if names}

    def names_in_peft(self, layer: str) -> list[str]:
        """Return the name that PEFT's patterns know a layer by; several where the file does not say which one it is.

        Files of ours do: they have a module's parameters in its own order, of which PEFT wraps the last one outermost.
        """
        names = pattern_names(layer, self.config)
        return [names[-1 - layer.count(".base_layer")]] if len(names) > 1 and self.ours else names

    @property
    def stacks_by_inputs(self) -> bool:
        """PEFT wrote it before 0.19, which took every stack's matrices for [k, d]."""
        if self.ours:
            return False
        numbers = re.match(r"(\d+)\.(\d+)", self.config.peft_version or "0.17")
        return numbers is not None and (int(numbers[1]), int(numbers[2])) < (0, 19)
