"""Linear layers whose weight a package keeps quantised: bitsandbytes' in 4 and 8 bits, torchao's.

A package is imported only where a layer of it is there already: its layers are told by the names of their classes, or of their
weights'. To add one, write one subclass of `Form`, add one line to `FORMS`, and its name to those that
tests/layers/test_quantised.py goes through.

What a layer or a tensor of another package has is not known to a type checker: it is `Any` here, and only here.

Knows one layer, never a model or an update.
"""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltaw.layers.source import once

Packages = Any
"""A layer, a tensor or a state of a package that need not be installed."""


class Form:
    """A package's way to store a quantised weight W0 [d, k]. It has no state; `FORMS` has one instance of each."""

    known_by: ClassVar[str]
    """Full name of the class of the layer, or of its weight."""
    name: ClassVar[str]
    """For messages."""

    def why_not(self, layer: Packages) -> str | None:
        """Return why this layer cannot take an update; None when it can."""
        return None

    def dense(self, layer: Packages, dtype: torch.dtype) -> Tensor:
        """Return W0 [d, k] as it is dequantised, a new tensor."""
        raise NotImplementedError

    def stored(self, layer: Packages) -> list[Tensor]:
        """Return the tensors that W0 is kept in."""
        raise NotImplementedError

    def content(self, layer: Packages) -> list[Tensor]:
        """Return their values, in one order whatever the package does with them in the meantime."""
        return self.stored(layer)

    def stops_gradients(self, layer: Packages) -> bool:
        """Tell if the layer's own forward may leave its input without a gradient."""
        return False


class BitsAndBytes4(Form):
    """`bitsandbytes.nn.Linear4bit`, NF4 or FP4: a code of 4 bits for each entry, and a scale for each block of them.

    In evaluation on a CPU that multiplies bfloat16 (AVX512-BF16), bitsandbytes puts the codes into another order and rounds the
    scales to bfloat16, for good. Its product then rounds inputs and outputs to bfloat16, whatever their dtype, and has no
    gradients, in training neither.
    """

    known_by = "bitsandbytes.nn.modules.Linear4bit"
    name = "bitsandbytes, 4 bits"

    def why_not(self, layer: Packages) -> str | None:
        return None if _state(layer) is not None else "its weight has no 4 bits yet: move the model to its device first"

    def dense(self, layer: Packages, dtype: torch.dtype) -> Tensor:
        from bitsandbytes.functional import QuantState, dequantize_4bit

        stored = _state(layer)
        state = QuantState(_scales(layer), stored.shape, stored.code, stored.blocksize, stored.quant_type, dtype)
        return dequantize_4bit(_codes(layer).view(-1, 1), state)

    def stored(self, layer: Packages) -> list[Tensor]:
        state = _state(layer)
        return [layer.weight, state.absmax, *([state.state2.absmax] if state.nested else [])]

    def content(self, layer: Packages) -> list[Tensor]:
        return [_codes(layer), _scales(layer).to(torch.bfloat16)]

    def stops_gradients(self, layer: Packages) -> bool:
        return layer.weight.device.type == "cpu" and bool(layer.support_avx512bf16_for_cpu or _is_reordered(layer))


def _state(layer: Packages) -> Packages:
    state = getattr(layer.weight, "quant_state", None)
    return layer.quant_state if state is None else state


def _is_reordered(layer: Packages) -> bool:
    """Tell if the codes are in the order of a CPU's products."""
    return bool(getattr(_state(layer), "packing_format_for_cpu", False))


def _codes(layer: Packages) -> Tensor:
    """Return the codes, uint8 [d·k/2], two to a byte in the order of W0's rows."""
    codes: Tensor = layer.weight.detach().data
    if _is_reordered(layer):
        from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

        state = copy.copy(_state(layer))  # which that function writes to
        state.original_nested = False
        codes, _ = _convert_weight_packed_for_cpu_inverse(codes, state)
    return codes.reshape(-1).view(torch.uint8)


def _scales(layer: Packages) -> Tensor:
    """Return the scale of each block, fp32."""
    from bitsandbytes.functional import dequantize_blockwise

    state = _state(layer)
    scales: Tensor = state.absmax
    if _is_reordered(layer):
        return scales.t().reshape(-1).float()
    if state.nested:
        scales = dequantize_blockwise(scales, state.state2) + state.offset
    return scales.float()


class BitsAndBytes8(Form):
    """`bitsandbytes.nn.Linear8bitLt` (LLM.int8()): int8, and a scale for each row."""

    known_by = "bitsandbytes.nn.modules.Linear8bitLt"
    name = "bitsandbytes, 8 bits"

    def why_not(self, layer: Packages) -> str | None:
        if layer.state.has_fp16_weights:
            return "it keeps its weight in 16 bits and rounds it in each pass (has_fp16_weights)"
        if layer.weight.dtype != torch.int8:
            return "its weight has no 8 bits yet: move the model to its device first"
        return None

    def dense(self, layer: Packages, dtype: torch.dtype) -> Tensor:
        codes, scales = self.stored(layer)
        return codes.detach().data.to(dtype) * (scales / 127).to(dtype)[:, None]

    def stored(self, layer: Packages) -> list[Tensor]:
        return [layer.weight, layer.state.SCB if layer.weight.SCB is None else layer.weight.SCB]

    def content(self, layer: Packages) -> list[Tensor]:
        codes, scales = self.stored(layer)
        return [codes.detach().data, scales]


class TorchAO(Form):
    """Any of torchao's weights of an `nn.Linear`, which are tensors of a class of their own.

    Where they quantise the layer's input as well, torchao gives it no gradient; here it gets that of W0.
    """

    known_by = "torchao.utils.TorchAOBaseTensor"
    name = "torchao"

    def dense(self, layer: Packages, dtype: torch.dtype) -> Tensor:
        W0: Tensor = layer._parameters["weight"].detach().dequantize()
        return W0.to(dtype)

    def stored(self, layer: Packages) -> list[Tensor]:
        weight = layer._parameters["weight"]
        return [getattr(weight, name) for name in weight.__tensor_flatten__()[0]]

    def stops_gradients(self, layer: Packages) -> bool:
        weight = layer._parameters["weight"]
        return any(getattr(weight, name, None) is not None for name in ("act_quant_kwargs", "activation_quantization"))


FORMS: tuple[Form, ...] = (BitsAndBytes4(), BitsAndBytes8(), TorchAO())


def form_of(layer: nn.Module) -> Form | None:
    """Return how the layer's weight is kept; None for one that is not quantised."""
    return _form(type(layer)) or _form(type(layer._parameters.get("weight")))


@once
def _form(cls: type) -> Form | None:
    """Return the form of layers of this class, or of those whose weight is of it."""
    names = {_full_name(c) for c in cls.__mro__}
    return next((form for form in FORMS if form.known_by in names), None)


def _full_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


@once
def package_class(cls: type) -> type[nn.Module] | None:
    """Return a package's own class of layers that this class is, or is made of; None where there is none."""
    known = {form.known_by for form in FORMS}
    return next((c for c in cls.__mro__ if issubclass(c, nn.Module) and _full_name(c) in known), None)


def output(cls: type[nn.Module], layer: nn.Module, x: Tensor) -> Tensor:
    """Return the layer's output [..., d] for x [..., k], as its class `cls` computes it. Gradients reach x in any case."""
    form = form_of(layer)
    through = form is not None and torch.is_grad_enabled() and x.requires_grad and form.stops_gradients(layer)
    out: Tensor = _Through.apply(x, layer, cls, form) if through else cls.forward(layer, x)  # type: ignore[no-untyped-call]
    if not torch.is_grad_enabled():
        return out
    # A package's functions may return what is a view to autograd, and branches of rows are added in place
    viewless: Tensor = torch.ops.aten._unsafe_view(out, out.shape)
    return viewless


class _Through(torch.autograd.Function):
    """A layer whose forward has no gradient of its own: that of W0x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: nn.Module, cls: type[nn.Module], form: Form) -> Tensor:
        ctx.layer, ctx.form = layer, form
        out: Tensor = cls.forward(layer, x)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        g = grads[0]
        return g @ ctx.form.dense(ctx.layer, g.dtype), None, None, None
