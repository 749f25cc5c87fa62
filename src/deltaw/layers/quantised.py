"""Linear layers whose weight a package keeps in few bits: bitsandbytes' in 4 and 8, torchao's. Knows one layer, never a model or
an update.

A package is imported only where a layer of it is there already: its layers are told by the names of their classes, or of their
weights'. To add one: subclass `Form`, list it in `FORMS`, test it in tests/layers/test_quantised.py.
"""

from __future__ import annotations

import copy
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor


class Form:
    """How a package keeps a weight W0 [d, k] in few bits. Classes of this are used as they are, not made into objects."""

    known_by: ClassVar[str]
    """Full name of a class that the layer is of, or its weight."""
    name: ClassVar[str]

    @classmethod
    def why_not(cls, layer: Any) -> str | None:
        """Why this layer cannot take an update."""
        return None

    @classmethod
    def dense(cls, layer: Any, dtype: torch.dtype) -> Tensor:
        """W0 [d, k] as it stands for, made anew."""
        raise NotImplementedError

    @classmethod
    def stored(cls, layer: Any) -> list[Tensor]:
        """The tensors that W0 is kept in."""
        raise NotImplementedError

    @classmethod
    def content(cls, layer: Any) -> list[Tensor]:
        """Their values, in one order whatever the package does with them in the meantime."""
        return cls.stored(layer)

    @classmethod
    def stops_gradients(cls, layer: Any) -> bool:
        """Whether the layer's own forward may leave its input without a gradient."""
        return False


class BitsAndBytes4(Form):
    """`bitsandbytes.nn.Linear4bit`, NF4 or FP4: a code of 4 bits an entry, and a scale for each block of them. In evaluation on a
    CPU that multiplies bfloat16, bitsandbytes lays the codes in another order and rounds the scales to bfloat16, for good; it
    then has no gradients, in training neither."""

    known_by = "bitsandbytes.nn.modules.Linear4bit"
    name = "bitsandbytes, 4 bits"

    @classmethod
    def why_not(cls, layer: Any) -> str | None:
        return None if _state(layer) is not None else "its weight has no 4 bits yet: move the model to its device first"

    @classmethod
    def dense(cls, layer: Any, dtype: torch.dtype) -> Tensor:
        from bitsandbytes.functional import QuantState, dequantize_4bit

        own = _state(layer)
        state = QuantState(_scales(layer), own.shape, own.code, own.blocksize, own.quant_type, dtype)
        return dequantize_4bit(_codes(layer).view(-1, 1), state)  # type: ignore[no-any-return]

    @classmethod
    def stored(cls, layer: Any) -> list[Tensor]:
        state = _state(layer)
        return [layer.weight, state.absmax, *([state.state2.absmax] if state.nested else [])]

    @classmethod
    def content(cls, layer: Any) -> list[Tensor]:
        return [_codes(layer), _scales(layer).to(torch.bfloat16)]

    @classmethod
    def stops_gradients(cls, layer: Any) -> bool:
        return layer.weight.device.type == "cpu" and bool(layer.support_avx512bf16_for_cpu or _is_laid_out(layer))


def _state(layer: Any) -> Any:
    found = getattr(layer.weight, "quant_state", None)
    return layer.quant_state if found is None else found


def _is_laid_out(layer: Any) -> bool:
    """In the order of a CPU's products."""
    return bool(getattr(_state(layer), "packing_format_for_cpu", False))


def _codes(layer: Any) -> Tensor:
    """Two to a byte, in the order of W0's rows."""
    codes = layer.weight.detach().data
    if _is_laid_out(layer):
        from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

        state = copy.copy(_state(layer))  # which that function writes to
        state.original_nested = False
        codes, _ = _convert_weight_packed_for_cpu_inverse(codes, state)
    return codes.reshape(-1).view(torch.uint8)


def _scales(layer: Any) -> Tensor:
    """Of each block, in fp32."""
    from bitsandbytes.functional import dequantize_blockwise

    state = _state(layer)
    if _is_laid_out(layer):
        return state.absmax.t().reshape(-1).float()  # type: ignore[no-any-return]
    if not state.nested:
        return state.absmax.float()  # type: ignore[no-any-return]
    return (dequantize_blockwise(state.absmax, state.state2) + state.offset).float()  # type: ignore[no-any-return]


class BitsAndBytes8(Form):
    """`bitsandbytes.nn.Linear8bitLt` (LLM.int8()): int8, and a scale for each row."""

    known_by = "bitsandbytes.nn.modules.Linear8bitLt"
    name = "bitsandbytes, 8 bits"

    @classmethod
    def why_not(cls, layer: Any) -> str | None:
        if layer.state.has_fp16_weights:
            return "it keeps its weight in 16 bits and rounds it in each pass (has_fp16_weights)"
        done = layer.weight.dtype == torch.int8
        return None if done else "its weight has no 8 bits yet: move the model to its device first"

    @classmethod
    def dense(cls, layer: Any, dtype: torch.dtype) -> Tensor:
        codes, scales = cls.stored(layer)
        return codes.detach().data.to(dtype) * (scales / 127).to(dtype)[:, None]

    @classmethod
    def stored(cls, layer: Any) -> list[Tensor]:
        return [layer.weight, layer.state.SCB if layer.weight.SCB is None else layer.weight.SCB]

    @classmethod
    def content(cls, layer: Any) -> list[Tensor]:
        codes, scales = cls.stored(layer)
        return [codes.detach().data, scales]


class TorchAO(Form):
    """Any of torchao's weights of an `nn.Linear`, which are tensors of a class of their own. Where they round the layer's input
    as well, torchao gives it no gradient; here it gets that of W0."""

    known_by = "torchao.utils.TorchAOBaseTensor"
    name = "torchao"

    @classmethod
    def dense(cls, layer: Any, dtype: torch.dtype) -> Tensor:
        W0: Tensor = layer._parameters["weight"].detach().dequantize()
        return W0.to(dtype)

    @classmethod
    def stored(cls, layer: Any) -> list[Tensor]:
        weight = layer._parameters["weight"]
        return [getattr(weight, name) for name in weight.__tensor_flatten__()[0]]

    @classmethod
    def stops_gradients(cls, layer: Any) -> bool:
        weight = layer._parameters["weight"]
        return any(getattr(weight, name, None) is not None for name in ("act_quant_kwargs", "activation_quantization"))


FORMS: tuple[type[Form], ...] = (BitsAndBytes4, BitsAndBytes8, TorchAO)


def form_of(layer: Any) -> type[Form] | None:
    """How the layer's weight is kept; None for one that is as it is."""
    layer_class: Any = type(layer)
    weight_class: Any = type(layer._parameters.get("weight"))
    return _form(layer_class, weight_class)


@cache
def _form(layer_class: Any, weight_class: Any) -> type[Form] | None:
    names = {_full_name(c) for c in (*layer_class.__mro__, *weight_class.__mro__)}
    return next((form for form in FORMS if form.known_by in names), None)


def _full_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


@cache
def package_class(cls: Any) -> Any:
    """A package's own class of layers that this class is, or is made of; None where there is none."""
    known = {form.known_by for form in FORMS}
    return next((c for c in cls.__mro__ if _full_name(c) in known), None)


def output(cls: Any, layer: Any, x: Tensor) -> Tensor:
    """The layer's own output, as its class `cls` computes it. Gradients reach x, also where that one stops them."""
    form = form_of(layer)
    through = form is not None and torch.is_grad_enabled() and x.requires_grad and form.stops_gradients(layer)
    out: Tensor = _Through.apply(x, layer, cls, form) if through else cls.forward(layer, x)
    # A package's functions may return what is a view to autograd, and branches of rows are added in place
    unsafe_view: Any = torch.ops.aten._unsafe_view
    return unsafe_view(out, out.shape) if torch.is_grad_enabled() else out  # type: ignore[no-any-return]


class _Through(torch.autograd.Function):
    """A layer whose forward has no gradient of its own: that of W0x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Any, cls: Any, form: type[Form]) -> Tensor:
        ctx.layer, ctx.form = layer, form
        out: Tensor = cls.forward(layer, x)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        g = grads[0]
        return g @ ctx.form.dense(ctx.layer, g.dtype), None, None, None
