"""Kinds of dense layers. Knows one layer, never a model.

A kind says how a layer's weight reads as W0 [d, k] (d out, k in) and how h = W0x + scale·BAx is computed on it. To add one:
subclass `Kind`, list it in `KINDS`, test it in tests/layers/test_kinds.py.
"""

from __future__ import annotations

import dis
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from deltaw.layers import quantised
from deltaw.layers.ops import linear
from deltaw.layers.unwrap import itself, own_forward, plain_class, shell


class Kind:
    """A kind of dense layer. Classes of this are used as they are, not made into objects."""

    layer_class: ClassVar[type[nn.Module]]
    transposed: ClassVar[bool] = False
    """The weight is stored [k, d]."""
    multiplies: ClassVar[bool] = True
    """The layer is a product of its input's last dimension with W0, and nothing else."""
    as_it_is: ClassVar[bool] = True
    """`W0` is a view of the layer's weight. Else it is made anew each time, and nothing can be written to it."""
    alike: ClassVar[tuple[str, ...]] = ()
    """Full names of subclasses whose own forward computes the same in another way."""
    wrapped: ClassVar[bool] = False
    """Subclasses whose forward goes through this one's (Gemma's scaled embeddings) are adapted within it."""

    @classmethod
    def W0(cls, layer: Any) -> Tensor:
        """The layer's weight as a [d, k] view of its storage."""
        W = layer._parameters["weight"]
        return W.t() if cls.transposed else W

    @classmethod
    def shape(cls, layer: Any) -> tuple[int, int]:
        """(d, k)"""
        d, k = cls.W0(layer).shape
        return d, k

    @classmethod
    def branch(cls, layer: Any, x: Tensor, update: Any, bias: Tensor | None) -> Tensor:
        """h = W0x + bias + scale·B(Ax) by the update's A, B, scale and dropout: x [..., k] → [..., d]."""
        return linear.lowrank_linear(
            x, cls.W0(layer), bias, update.A, update.B, update.scale, update.dropout, training=update.training
        )

    @classmethod
    def per_output(cls, layer: Any, vector: Tensor) -> Tensor:
        """A number for each of the d outputs, [d], in a shape that fits the layer's output."""
        return vector


class LinearKind(Kind):
    """`nn.Linear`."""

    layer_class = nn.Linear
    alike = ("transformers.models.falcon.modeling_falcon.FalconLinear",)


class QuantisedKind(Kind):
    """A linear layer whose weight a package keeps in few bits. Its own forward computes W0x, the branch is added to that."""

    layer_class = nn.Linear
    as_it_is = False

    @classmethod
    def W0(cls, layer: Any) -> Tensor:
        form = quantised.form_of(layer)
        assert form is not None
        return form.dense(layer, torch.float32)

    @classmethod
    def shape(cls, layer: Any) -> tuple[int, int]:
        return layer.out_features, layer.in_features

    @classmethod
    def branch(cls, layer: Any, x: Tensor, update: Any, bias: Tensor | None) -> Tensor:
        own = layer if bias is layer.bias else shell(layer, {"bias": bias})
        out = quantised.output(plain_class(layer), own, x)
        Ax = F.linear(F.dropout(x, update.dropout, update.training), update.A.to(x.dtype))
        return torch.add(out, F.linear(Ax, update.B.to(x.dtype)), alpha=update.scale).to(out.dtype)


class Conv1DKind(Kind):
    """GPT-2's `Conv1D`, a dense layer whose weight is stored [k, d]."""

    layer_class = Conv1D
    transposed = True


class EmbeddingKind(Kind):
    """`nn.Embedding`, a dense layer of one-hot vectors: k tokens, d dimensions, the weight stored [k, d]. The row of
    `padding_idx` takes no update, as it gets no gradient in PyTorch. Dropout zeroes a token's one entry: all of its branch."""

    layer_class = nn.Embedding
    transposed = True
    multiplies = False
    wrapped = True

    @classmethod
    def branch(cls, layer: Any, x: Tensor, update: Any, bias: Tensor | None) -> Tensor:
        """x: token ids [...] → [..., d]."""
        out = own_forward(layer)(itself(layer), x)
        Ax = F.embedding(x, update.A.t(), layer.padding_idx)
        if update.training and update.dropout:
            Ax = Ax * F.dropout(Ax.new_ones(*x.shape, 1), update.dropout)
        return out + (Ax @ update.B.t() * update.scale).to(out.dtype)


class ConvKind(Kind):
    """A convolution: a dense layer of the patches [c/groups, …] that its kernel sees, k numbers each. A convolves as the layer
    does (stride, padding, dilation), in each group by the same r kernels; B mixes what they give at a place into the outputs."""

    multiplies = False
    along: ClassVar[Callable[..., Tensor]]
    """The convolution as a function."""

    @classmethod
    def W0(cls, layer: Any) -> Tensor:
        return layer._parameters["weight"].flatten(1)

    @classmethod
    def branch(cls, layer: Any, x: Tensor, update: Any, bias: Tensor | None) -> Tensor:
        """x [n, c, …] → [n, d, …], also without n."""
        W = layer._parameters["weight"]
        (d, *kernel), r = W.shape, update.A.shape[0]
        A = update.A.to(W.dtype).view(r, *kernel).repeat(layer.groups, *[1] * len(kernel))
        B = update.B.to(W.dtype).view(d, r, *[1] * (len(kernel) - 1))
        Ax = layer._conv_forward(F.dropout(x, update.dropout, update.training), A, None)
        BAx = cls.along(Ax, B, groups=layer.groups)
        return layer._conv_forward(x, W, bias) + BAx * update.scale

    @classmethod
    def per_output(cls, layer: Any, vector: Tensor) -> Tensor:
        return vector.view(-1, *[1] * (layer.weight.dim() - 2))


class Conv1dKind(ConvKind):
    """`nn.Conv1d`."""

    layer_class = nn.Conv1d
    along = staticmethod(F.conv1d)


class Conv2dKind(ConvKind):
    """`nn.Conv2d`."""

    layer_class = nn.Conv2d
    along = staticmethod(F.conv2d)


class Conv3dKind(ConvKind):
    """`nn.Conv3d`."""

    layer_class = nn.Conv3d
    along = staticmethod(F.conv3d)


KINDS: tuple[type[Kind], ...] = (LinearKind, Conv1DKind, EmbeddingKind, Conv1dKind, Conv2dKind, Conv3dKind)


def kind_of(layer: nn.Module) -> type[Kind] | None:
    """The kind of this layer, or None when `why_not` has a reason."""
    if why_not(layer):
        return None
    cls: Any = plain_class(layer)
    return _kind_of_class(cls) if quantised.form_of(layer) is None else QuantisedKind


def why_not(layer: nn.Module) -> str | None:
    """Why this layer cannot take a low-rank update; None when it can."""
    cls: Any = plain_class(layer)
    if why := _why_not_class(cls) or why_bypassed(layer):
        return why
    if isinstance(layer, nn.Embedding) and layer.max_norm is not None:
        return "its forward changes its weight (max_norm)"
    weight = layer._parameters.get("weight")
    if weight is None:
        return "its weight is no parameter of its own (another parametrization computes it)"
    if (form := quantised.form_of(layer)) is not None:
        if _kind_of_class(cls) is not LinearKind:
            return f"its weight is {type(weight).__name__}, which deltaw knows in linear layers only"
        return form.why_not(layer)
    if not weight.is_floating_point():
        return f"its weight is {weight.dtype}, not a floating-point tensor"
    return None


@cache
def _kind_of_class(cls: Any) -> type[Kind] | None:
    return next((kind for kind in KINDS if issubclass(cls, kind.layer_class)), None)


@cache
def _why_not_class(cls: Any) -> str | None:
    """What layers of this class have against a low-rank update."""
    kind = _kind_of_class(cls)
    if kind is None:
        return f"{cls.__name__} is not a dense layer that deltaw adapts"
    own = quantised.package_class(cls) or kind.layer_class
    same = cls.forward is own.forward or f"{cls.__module__}.{cls.__qualname__}" in kind.alike or inner_class(cls)
    return None if same else f"{cls.__name__} has a forward of its own"


@cache
def inner_class(cls: Any) -> Any:
    """The class of a kind through whose forward alone the forward of `cls`, another one, gets at the weight; None where there is
    no such."""
    kind = _kind_of_class(cls)
    if kind is None or not kind.wrapped:
        return None
    between = cls.__mro__[: cls.__mro__.index(kind.layer_class)]
    forwards = [vars(c)["forward"] for c in between if "forward" in vars(c)]
    return kind.layer_class if forwards and all(map(_goes_through, forwards)) else None


def _goes_through(forward: Any) -> bool:
    """Whether this forward calls that of its super class, and of the weight asks for no more than dtype, device and shape."""
    code = getattr(forward, "__code__", None)
    if code is None or "__class__" not in code.co_freevars or "forward" not in code.co_names:
        return False
    steps = [step for step in dis.get_instructions(code) if step.opname.startswith(("LOAD_ATTR", "LOAD_METHOD"))]
    asked = {after.argval for step, after in pairwise(steps) if step.argval == "weight"}
    last = bool(steps) and steps[-1].argval == "weight"
    return not last and asked <= {"dtype", "device", "shape"} and not {"parameters", "_parameters"} & set(code.co_names)


def why_bypassed(layer: nn.Module) -> str | None:
    """Why no update of any kind can be put on this module; None when there is no reason."""
    if "forward" in vars(layer):
        return "its forward was replaced on the object (accelerate does so to offload a layer), which would bypass the update"
    return None


def padding_token(layer: nn.Module | Weight) -> int | None:
    """The token of an embedding whose row gets no gradient and no update (`padding_idx`); None where there is none."""
    return layer.padding_idx if isinstance(layer, nn.Embedding) else None


def shape(layer: nn.Module | Weight) -> tuple[int, int]:
    """(d, k) of a layer that has a kind, or of each matrix of a weight."""
    if isinstance(layer, Weight):
        return layer.shape
    kind = kind_of(layer)
    assert kind is not None
    return kind.shape(layer)


class Weight(NamedTuple):
    """A dense layer that is only a parameter of its module, whose forward uses it: the projections of `nn.MultiheadAttention`, a
    matrix for each expert of a mixture [E, d, k]."""

    module: nn.Module
    own: str

    @property
    def value(self) -> Tensor:
        found = self.module._parameters[self.own]
        assert found is not None
        return found

    @property
    def transposed(self) -> bool:
        """Its matrices are stored [k, d], as GPT-OSS has them."""
        return self.value.ndim == 3 and bool(getattr(self.module, "is_transposed", False))

    @property
    def shape(self) -> tuple[int, int]:
        """(d, k)"""
        d, k = self.value.shape[-2:]
        return (k, d) if self.transposed else (d, k)


_PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


def weights_of(module: nn.Module) -> list[str]:
    """The module's own names of parameters that are dense layers of that kind."""
    if isinstance(module, nn.MultiheadAttention):
        return [own for own in _PROJECTIONS if module._parameters.get(own) is not None]
    if "Experts" not in plain_class(module).__name__ or kind_of(module) is not None:
        return []
    return [own for own, p in module._parameters.items() if p is not None and p.ndim == 3 and p.is_floating_point()]


def takes_tokens(module: nn.Module) -> bool:
    """Whether this is a mixture's experts: what they are called with has a row for each token, [T, …], the batch's in order."""
    return any(Weight(module, own).value.ndim == 3 for own in weights_of(module))


def matrices_of(module: nn.Module) -> list[str]:
    """The module's own names of parameters that a file's update may change: those of `weights_of`, and the matrix of a module
    that is no dense layer, as routers of mixtures are. The latter is no target by itself."""
    if own := weights_of(module):
        return own
    weight = module._parameters.get("weight")
    plain = weight is not None and weight.ndim == 2 and weight.is_floating_point()
    module_class: Any = plain_class(module)
    return ["weight"] if plain and _kind_of_class(module_class) is None else []


def in_few_bits(layer: nn.Module, own_name: str) -> type[quantised.Form] | None:
    """How a package keeps this parameter, where it is the weight of a layer in few bits."""
    return quantised.form_of(layer) if own_name == "weight" else None


def as_matrix(layer: nn.Module, own_name: str, value: Tensor) -> Tensor:
    """A parameter of a module, or a value of its shape, as the view that merges work on: a kind's weight [d, k], a vector as one
    row."""
    if value.ndim == 2:
        return value.t() if _is_transposed(layer, own_name) else value
    if value.ndim < 2:
        return value.reshape(1, -1)
    return value.flatten(0, -2) if own_name in weights_of(layer) else value.flatten(1)


def as_stored(layer: nn.Module, own_name: str, matrix: Tensor) -> Tensor:
    """The inverse of `as_matrix`."""
    parameter = layer._parameters[own_name]
    assert parameter is not None
    if parameter.ndim == 2:
        return matrix.t() if _is_transposed(layer, own_name) else matrix
    return matrix.view(parameter.shape)


def _is_transposed(layer: nn.Module, own_name: str) -> bool:
    """Whether this matrix is one that a kind stores [k, d]."""
    return own_name == "weight" and any(k.transposed and isinstance(layer, k.layer_class) for k in KINDS)


Runs = tuple[tuple[int, int], ...]
"""Rows of a layer's output: from … to (the latter excluded), in order."""
