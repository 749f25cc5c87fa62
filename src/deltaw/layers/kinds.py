"""Kinds of dense layers: how a layer's weight reads as W0 [d, k] (d out, k in), and how h = W0x + scale·BAx is computed on it.

To add a kind: write one class here, a subclass of `Kind` with its `layer_class`, and add one line to `KINDS`. Attaching, merging,
files and pickles then know it. tests/layers/test_kinds.py does so and says what must hold.

Knows one layer, never a model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from deltaw.layers import quantised
from deltaw.layers.ops import linear
from deltaw.layers.source import once, only_scales
from deltaw.layers.unwrap import itself, own_forward, plain_class, shell


class Branch(Protocol):
    """The parts of an update that a kind computes with."""

    @property
    def A(self) -> Tensor:
        """[r, k]"""

    @property
    def B(self) -> Tensor:
        """[d, r]"""

    @property
    def scale(self) -> float: ...
    @property
    def dropout(self) -> float:
        """Probability of zeroing an entry of the branch's input, in training."""

    @property
    def training(self) -> bool: ...


class Kind:
    """A kind of dense layer. It has no state, and there is one instance of each: a pickle or a copy of it is that one."""

    layer_class: ClassVar[type[nn.Module]]
    transposed: ClassVar[bool] = False
    """The weight is stored [k, d]."""
    multiplies: ClassVar[bool] = True
    """The layer is a product of its input's last dimension with W0, and nothing else."""
    as_it_is: ClassVar[bool] = True
    """`W0` is a view of the layer's weight. Else it is computed anew each time, and nothing can be written to it."""
    alike: ClassVar[tuple[str, ...]] = ()
    """Full names of subclasses whose own forward computes the same in another way."""
    wrapped: ClassVar[bool] = False
    """Subclasses whose forward only scales this one's (Gemma's scaled embeddings) are adapted within it."""

    def W0(self, layer: nn.Module) -> Tensor:
        """Return the layer's weight as a [d, k] view of its storage."""
        W = layer._parameters["weight"]
        assert W is not None
        return W.t() if self.transposed else W

    def shape(self, layer: nn.Module) -> tuple[int, int]:
        """Return (d, k)."""
        d, k = self.W0(layer).shape
        return d, k

    def branch(self, layer: nn.Module, x: Tensor, update: Branch, bias: Tensor | None) -> Tensor:
        """Compute h = W0x + bias + scale·B(Ax) by the update's A, B, scale and dropout: x [..., k] → [..., d]."""
        return linear.lowrank_linear(
            x, self.W0(layer), bias, update.A, update.B, update.scale, update.dropout, training=update.training
        )

    def per_output(self, layer: nn.Module, vector: Tensor) -> Tensor:
        """Return a vector [d], a number for each output, in a shape that fits the layer's output."""
        return vector

    def __reduce__(self) -> tuple[Callable[[str], Kind], tuple[str]]:
        return kind_named, (type(self).__name__,)


class LinearKind(Kind):
    """`nn.Linear`."""

    layer_class = nn.Linear
    alike = ("transformers.models.falcon.modeling_falcon.FalconLinear",)


class QuantisedKind(Kind):
    """A linear layer whose weight a package keeps quantised. Its own forward computes W0x, the branch is added to that."""

    layer_class = nn.Linear
    as_it_is = False

    def W0(self, layer: nn.Module) -> Tensor:
        form = quantised.form_of(layer)
        assert form is not None
        return form.dense(layer, torch.float32)

    def shape(self, layer: nn.Module) -> tuple[int, int]:
        assert isinstance(layer, nn.Linear)
        return layer.out_features, layer.in_features

    def branch(self, layer: nn.Module, x: Tensor, update: Branch, bias: Tensor | None) -> Tensor:
        with_bias = layer if bias is layer._parameters["bias"] else shell(layer, {"bias": bias})
        out = quantised.output(plain_class(layer), with_bias, x)
        Ax = F.linear(F.dropout(x, update.dropout, update.training), update.A.to(x.dtype))
        return torch.add(out, F.linear(Ax, update.B.to(x.dtype)), alpha=update.scale).to(out.dtype)


class Conv1DKind(Kind):
    """GPT-2's `Conv1D`, a dense layer whose weight is stored [k, d]."""

    layer_class = Conv1D
    transposed = True


class EmbeddingKind(Kind):
    """`nn.Embedding`, a dense layer of one-hot vectors: k tokens, d dimensions, the weight stored [k, d].

    The row of `padding_idx` takes no update, as it gets no gradient in PyTorch. Dropout zeroes a token's one entry, which is
    all of its branch.
    """

    layer_class = nn.Embedding
    transposed = True
    multiplies = False
    wrapped = True

    def branch(self, layer: nn.Module, x: Tensor, update: Branch, bias: Tensor | None) -> Tensor:
        """Compute it for token ids x [...] → [..., d]."""
        assert isinstance(layer, nn.Embedding)
        out: Tensor = own_forward(layer)(itself(layer), x)
        Ax = F.embedding(x, update.A.t(), layer.padding_idx)
        if update.training and update.dropout:
            Ax = Ax * F.dropout(Ax.new_ones(*x.shape, 1), update.dropout)
        return out + (Ax @ update.B.t() * update.scale).to(out.dtype)


class ConvKind(Kind):
    """A convolution: a dense layer of the patches [c/groups, …] that its kernel sees, k numbers each.

    A convolves as the layer does (stride, padding, dilation), in each group by the same r kernels. B mixes what they give at a
    place into the outputs.
    """

    multiplies = False
    along: ClassVar[Callable[..., Tensor]]
    """The convolution as a function."""

    def W0(self, layer: nn.Module) -> Tensor:
        return _kernel(layer).flatten(1)

    def branch(self, layer: nn.Module, x: Tensor, update: Branch, bias: Tensor | None) -> Tensor:
        """Compute it for x [n, c, …] → [n, d, …], also without n."""
        assert isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
        W = _kernel(layer)
        (d, *kernel), r = W.shape, update.A.shape[0]
        A = update.A.to(W.dtype).view(r, *kernel).repeat(layer.groups, *[1] * len(kernel))
        B = update.B.to(W.dtype).view(d, r, *[1] * (len(kernel) - 1))
        Ax: Tensor = layer._conv_forward(F.dropout(x, update.dropout, update.training), A, None)
        BAx = self.along(Ax, B, groups=layer.groups)
        out: Tensor = layer._conv_forward(x, W, bias)
        return out + BAx * update.scale

    def per_output(self, layer: nn.Module, vector: Tensor) -> Tensor:
        return vector.view(-1, *[1] * (_kernel(layer).dim() - 2))


def _kernel(layer: nn.Module) -> Tensor:
    """Return a convolution's weight [d, c/groups, …]."""
    W = layer._parameters["weight"]
    assert W is not None
    return W


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


KINDS: tuple[Kind, ...] = (LinearKind(), Conv1DKind(), EmbeddingKind(), Conv1dKind(), Conv2dKind(), Conv3dKind())
QUANTISED = QuantisedKind()
"""The kind of linear layers that `quantised.form_of` knows a form of."""
PARAMETER = Kind()
"""The kind of a `Weight`, which has no layer: its updates are used for their A and B alone."""


def kind_named(name: str) -> Kind:
    """Return the one instance of the kind whose class has this name. Raises KeyError for another name."""
    return {type(kind).__name__: kind for kind in (*KINDS, QUANTISED, PARAMETER)}[name]


def kind_of(layer: nn.Module) -> Kind | None:
    """Return the kind of this layer, or None when `why_not` has a reason."""
    if why_not(layer):
        return None
    return _kind_of_class(plain_class(layer)) if quantised.form_of(layer) is None else QUANTISED


def why_not(layer: nn.Module) -> str | None:
    """Return why this layer cannot take a low-rank update; None when it can."""
    cls = plain_class(layer)
    if why := _why_not_class(cls) or why_bypassed(layer):
        return why
    if isinstance(layer, nn.Embedding) and layer.max_norm is not None:
        return "its forward changes its weight (max_norm)"
    weight = layer._parameters.get("weight")
    if weight is None:
        return "its weight is no parameter of its own (another parametrization computes it)"
    if (form := quantised.form_of(layer)) is not None:
        if not isinstance(_kind_of_class(cls), LinearKind):
            return f"its weight is {type(weight).__name__}, which deltaw knows in linear layers only"
        return form.why_not(layer)
    if not weight.is_floating_point():
        return f"its weight is {weight.dtype}, not a floating-point tensor"
    return None


@once
def _kind_of_class(cls: type) -> Kind | None:
    return next((kind for kind in KINDS if issubclass(cls, kind.layer_class)), None)


@once
def _why_not_class(cls: type) -> str | None:
    """Return what layers of this class have against a low-rank update."""
    kind = _kind_of_class(cls)
    if kind is None:
        return f"{cls.__name__} is not a dense layer that deltaw adapts"
    known = quantised.package_class(cls) or kind.layer_class
    same = getattr(cls, "forward", None) is known.forward
    if same or f"{cls.__module__}.{cls.__qualname__}" in kind.alike or inner_class(cls):
        return None
    return f"{cls.__name__} has a forward of its own"


@once
def inner_class(cls: type) -> type[nn.Module] | None:
    """Return the layer class of a kind whose forward that of `cls`, another class, only scales; None where there is none."""
    kind = _kind_of_class(cls)
    if kind is None or not kind.wrapped:
        return None
    between = [c for c in cls.__mro__[: cls.__mro__.index(kind.layer_class)] if "forward" in vars(c)]
    return kind.layer_class if between and all(map(only_scales, between)) else None


def why_bypassed(layer: nn.Module) -> str | None:
    """Return why no update of any kind can be put on this module; None when there is no reason."""
    if "forward" in vars(layer):
        return "its forward was replaced on the object (accelerate does so to offload a layer), which would bypass the update"
    return None


def padding_token(layer: nn.Module | Weight) -> int | None:
    """Return the token of an embedding whose row gets no gradient and no update (`padding_idx`); None where there is none."""
    return layer.padding_idx if isinstance(layer, nn.Embedding) else None


def shape(layer: nn.Module | Weight) -> tuple[int, int]:
    """Return (d, k) of a layer that has a kind, or of each matrix of a weight."""
    if isinstance(layer, Weight):
        return layer.shape
    kind = kind_of(layer)
    assert kind is not None
    return kind.shape(layer)


class Weight(NamedTuple):
    """A dense layer that is only a parameter of its module, whose forward uses it.

    Such are the projections of `nn.MultiheadAttention`, and a mixture's experts, a matrix for each [E, d, k].
    """

    module: nn.Module
    name: str
    """The module's name of it."""

    @property
    def value(self) -> Tensor:
        """The parameter, [d, k] or [E, d, k], or as `transposed` says."""
        value = self.module._parameters[self.name]
        assert value is not None
        return value

    @property
    def transposed(self) -> bool:
        """True if its matrices are stored [k, d], as GPT-OSS has them."""
        return self.value.ndim == 3 and bool(getattr(self.module, "is_transposed", False))

    @property
    def shape(self) -> tuple[int, int]:
        """(d, k)"""
        d, k = self.value.shape[-2:]
        return (k, d) if self.transposed else (d, k)


_PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


def weights_of(module: nn.Module) -> list[str]:
    """Return the module's names of the parameters that are a `Weight`."""
    if isinstance(module, nn.MultiheadAttention):
        return [name for name in _PROJECTIONS if module._parameters.get(name) is not None]
    if "Experts" not in plain_class(module).__name__ or kind_of(module) is not None:
        return []
    return [name for name, p in module._parameters.items() if p is not None and p.ndim == 3 and p.is_floating_point()]


def takes_tokens(module: nn.Module) -> bool:
    """Tell if this is a mixture's experts: what they are called with has a row for each token, [T, …], the batch's in order."""
    return any(Weight(module, name).value.ndim == 3 for name in weights_of(module))


def matrices_of(module: nn.Module) -> list[str]:
    """Return the module's names of the parameters that a file's update may change.

    They are those of `weights_of`, or the matrix of a module that is no dense layer, as routers of mixtures are. The latter is no
    target by itself.
    """
    if names := weights_of(module):
        return names
    weight = module._parameters.get("weight")
    plain = weight is not None and weight.ndim == 2 and weight.is_floating_point()
    return ["weight"] if plain and _kind_of_class(plain_class(module)) is None else []


def in_few_bits(layer: nn.Module, name: str) -> quantised.Form | None:
    """Return how a package keeps this parameter, where it is the weight of a quantised layer."""
    return quantised.form_of(layer) if name == "weight" else None


def as_matrix(layer: nn.Module, name: str, value: Tensor) -> Tensor:
    """Return a module's parameter, or a value of its shape, as the view that merges work on.

    A kind's weight is read as [d, k], a vector as one row, a stack [E, d, k] as [E·d, k].
    """
    if value.ndim == 2:
        return value.t() if _is_transposed(layer, name) else value
    if value.ndim < 2:
        return value.reshape(1, -1)
    return value.flatten(0, -2) if name in weights_of(layer) else value.flatten(1)


def as_stored(layer: nn.Module, name: str, matrix: Tensor) -> Tensor:
    """Return a matrix in the shape that the module stores the parameter in: the inverse of `as_matrix`."""
    parameter = layer._parameters[name]
    assert parameter is not None
    if parameter.ndim == 2:
        return matrix.t() if _is_transposed(layer, name) else matrix
    return matrix.view(parameter.shape)


def _is_transposed(layer: nn.Module, name: str) -> bool:
    """Tell if this matrix is one that a kind stores [k, d]."""
    return name == "weight" and any(k.transposed and isinstance(layer, k.layer_class) for k in KINDS)


Runs = tuple[tuple[int, int], ...]
"""Rows of a layer's output: from … to (the latter excluded), in order."""
