"""QuantLinear: a linear layer whose weights, and activations if asked, are quantized."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import count
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit.quant.activations import Codes, quantize_rows
from dit.quant.formats import weight_format
from dit.quant.kernels.contract import After, LinearKernel, Use, Weights, activate, has_integer_activations
from dit.quant.kernels.dequantize import dequantized, multiply
from dit.quant.kernels.onednn import has_vnni
from dit.quant.kernels.prepacked import PrepackedWeight
from dit.quant.kernels.table import choose_kernel
from dit.quant.rotation import input_factors, prepare, unrotate
from dit.quant.scheme import LEVELS, Scheme

Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""Shape and dtype by name."""
FEW_NUMBERS = 2**16
"""Inputs (M x K) of fewer numbers aren't kept for layers that read them too."""


class QuantLinear(nn.Linear):
    """A quantized linear layer.

    The input is balanced (multiplied channel by channel), rotated in blocks, quantized with a scale for each token, and
    multiplied by quantized weights; a low-rank branch in 16 bits may add what quantization lost. Each of these is
    optional, see `Scheme`. It computes in the dtype of its input, and has a gradient with respect to that.

    Args:
        in_features: K.
        out_features: N.
        bias: whether it has one.
        scheme: how it is quantized, resolved: `group` is a number, `rotate` divides K.
        device: of the tensors.
        dtype: of the bias.

    Attributes:
        scheme: how it is quantized.
        kernel: "auto", or one of `dit.quant.kernels.table.linear_kernels()`.
        full_precision: leave activations as they are for the time being, e.g. in the last steps of a run.
        calls: how often each kernel multiplied.

    Raises:
        ValueError: a scheme that isn't resolved or doesn't fit the sizes.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        scheme: Scheme,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.scheme = in_features, out_features, scheme
        for name, (shape, kind) in stored_shapes(scheme, in_features, out_features).items():
            empty = torch.empty(shape, dtype=kind, device=device)
            self.register_parameter(name, nn.Parameter(empty, requires_grad=False))
        empty = torch.empty(out_features, dtype=dtype, device=device) if bias else None
        self.bias: Any = None if empty is None else nn.Parameter(empty, requires_grad=False)
        self._init_runtime()

    def _init_runtime(self) -> None:
        self.kernel = "auto"
        self.full_precision = False
        self.calls: dict[str, int] = {}
        self.shared: SharedInput | None = None
        self._weights: Weights | None = None
        self._register()

    def _register(self) -> None:
        """Take a number, by which compiled code finds the layer.

        It is a tensor: a graph would hold an int, and blocks of a network, which are compiled alike, would each need
        a graph of their own.
        """
        number = next(_NUMBERS)
        self._number = torch.tensor(number, device="cpu")
        _LAYERS[number] = self

    @classmethod
    def from_tensors(
        cls, scheme: Scheme, tensors: Mapping[str, Tensor], in_features: int, out_features: int, bias: Tensor | None
    ) -> Self:
        """Make a layer of what `dit.quant.layer.quantize_linear` returned, or of a file's tensors.

        Args:
            scheme: resolved.
            tensors: by their names in the layer.
            in_features: K.
            out_features: N.
            bias: (N,) or None.

        Raises:
            ValueError: a tensor is missing, or has another shape or dtype than the scheme asks for.
        """
        with torch.device("meta"):
            made = cls(in_features, out_features, bias is not None, scheme=scheme)
        check_tensors(scheme, tensors, in_features, out_features)
        for name in stored_shapes(scheme, in_features, out_features):
            setattr(made, name, nn.Parameter(tensors[name].detach(), requires_grad=False))
        if bias is not None:
            made.bias = nn.Parameter(bias.detach(), requires_grad=False)
        return made

    # --------------------------------------------------------------------------- weights

    @property
    def stored(self) -> dict[str, Tensor]:
        """The quantized weights and what belongs to them, by name, without the bias."""
        return {name: tensor for name, tensor in self._parameters.items() if name != "bias" and tensor is not None}

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.parameters())

    @torch.no_grad()
    def effective_weight(self) -> Tensor:
        """Return the weight (N, K), float32, of a plain linear layer with the same output but for the activations."""
        weight = dequantized(self._bundle())  # (N, K), of the balanced and rotated inputs
        down, up = self._parameters.get("low_rank_down"), self._parameters.get("low_rank_up")
        branch = None if down is None or up is None else up.float() @ down.float()  # (N, K)
        if branch is not None and not self.scheme.raw_branch:
            weight = weight + branch
        parameters = self._parameters
        weight = unrotate(weight, parameters.get("rotation_sign"), self.scheme.rotate)  # (N, K)
        balance = parameters.get("input_balance")
        weight = weight if balance is None else weight * balance
        return weight + branch if branch is not None and self.scheme.raw_branch else weight

    def _bundle(self) -> Weights:
        if self._weights is None or "_hf_hook" in self.__dict__:
            found = Weights(self.scheme, self.stored, self.out_features, self.in_features, self._parameters.get("bias"))
            sums = dequantized(found).sum(dim=1) if self.scheme.shift else None  # (N,)
            found = replace(found, input_sums=sums)
            if "_hf_hook" in self.__dict__:
                return found  # accelerate takes the tensors away after each call: what is kept would keep their memory
            self._weights = found
        return self._weights

    def _prepack(self) -> None:
        """Have the weights lie in the order that the fastest kernel of this CPU reads."""
        weight = self._parameters["weight"]
        assert weight is not None
        is_plain = weight.dtype == torch.int8 and not isinstance(weight, PrepackedWeight)
        if is_plain and weight.device.type == "cpu" and has_vnni() and has_integer_activations(self.scheme):
            self._parameters["weight"] = nn.Parameter(PrepackedWeight(weight.data), requires_grad=False)
            self._weights = None

    def _unpack(self) -> None:
        """Have the weights lie as they are stored."""
        weight = self._parameters["weight"]
        if isinstance(weight, PrepackedWeight):
            self._parameters["weight"] = nn.Parameter(weight.plain(), requires_grad=False)
        self._weights = None

    # --------------------------------------------------------------------------- forward

    def forward(self, input: Tensor, after: After = "") -> Tensor:
        """Map (..., K) to (..., N).

        Args:
            input: (..., K).
            after: activation function of the output that some kernels apply themselves: "gelu_tanh" or "gelu".
        """
        if torch.is_autocast_enabled(input.device.type):
            input = input.to(torch.get_autocast_dtype(input.device.type))
        if torch.compiler.is_compiling():
            return activate(self._forward_compiled(input), after)
        if torch.is_grad_enabled() and input.requires_grad:
            return activate(_WithGradient.apply(input, self), after)  # pyright: ignore
        return self._multiply(input, after)

    @torch.no_grad()
    def _multiply(self, input: Tensor, after: After = "") -> Tensor:
        if input.shape[-1] != self.in_features:
            raise ValueError(f"the input has {input.shape[-1]} channels, the layer takes {self.in_features}")
        if not input.is_floating_point():
            raise ValueError(f"the input is {input.dtype}; give a float dtype")
        if not isinstance(self._parameters["weight"], PrepackedWeight) and self.kernel in ("auto", "onednn"):
            self._prepack()
        flat = input.reshape(-1, self.in_features)  # (M, K)
        if not len(flat):
            return input.new_empty(*input.shape[:-1], self.out_features)
        weights = self._bundle()
        prepared = self._shared(flat, "prepared", self._prepare)  # (M, K)
        down, up = self._parameters.get("low_rank_down"), self._parameters.get("low_rank_up")
        own = after if down is None else ""
        samples = math.prod(input.shape[:-2]) if input.ndim > 2 and self.scheme.per_sample else len(flat)
        if self.full_precision:
            exact = replace(
                self.scheme, activations="none", static=False, per_sample=False, activation_group=None, shift=0.0
            )
            out, name = multiply(replace(weights, scheme=exact), prepared, Use(after=own)), "full_precision"
        else:
            kernel = choose_kernel(weights, prepared, self.kernel)
            use = Use(self._codes(flat, prepared, kernel, samples), samples, own)
            out, name = kernel.function(weights, prepared, use), kernel.name  # (M, N)
        self.calls[name] = self.calls.get(name, 0) + 1
        if down is not None and up is not None:
            branched = flat if self.scheme.raw_branch else prepared
            branch = F.linear(branched.to(down.dtype), down)  # (M, r), of this layer's own projection
            out = out.addmm_(branch.to(out.dtype), up.t().to(out.dtype))  # in place: no second output
            out = activate(out, after)
        return out.view(*input.shape[:-1], self.out_features)

    def _prepare(self, flat: Tensor) -> Tensor:
        """Balance and rotate inputs (M, K)."""
        factors = input_factors(self._parameters.get("input_balance"), self._parameters.get("rotation_sign"))
        return prepare(flat, factors, self.scheme.rotate)

    def _codes(self, flat: Tensor, prepared: Tensor, kernel: LinearKernel, samples: int) -> Codes | None:
        """Quantize prepared inputs (M, K) as a kernel wants them, a scale for each of the samples."""
        if not kernel.codes:
            return None
        levels, unsigned = LEVELS[self.scheme.activations], kernel.codes == "unsigned"
        scale = self._parameters.get("input_scale")
        parts = None if samples == len(flat) else samples

        def make(_: Tensor) -> Codes:
            return quantize_rows(
                prepared, levels, unsigned=unsigned, scale=scale, samples=parts, shift=self.scheme.shift
            )

        return self._shared(flat, f"codes {kernel.codes} {parts}", make)

    def _shared(self, flat: Tensor, use: str, make: Any) -> Any:
        """Return what is made of the input, once for all layers that read it."""
        if self.shared is None or flat.is_inference() or flat.numel() < FEW_NUMBERS:
            return make(flat)
        return self.shared.get(flat, use, make)

    def _forward_compiled(self, input: Tensor) -> Tensor:
        """Compute in compiled code: one operator, or plain products where a gradient is wanted."""
        if torch.is_grad_enabled() and input.requires_grad:
            weight = self.effective_weight().to(input.dtype)
            bias = self._parameters.get("bias")
            return F.linear(input, weight, None if bias is None else bias.to(input.dtype))
        return torch.ops.tessera.quant_linear(input, self._number, self.out_features)

    # --------------------------------------------------------------------------- module

    def reset_parameters(self) -> None:
        """Leave the weights alone; torch's layers draw random ones here."""

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Move the tensors. No dtype changes: scales would lose digits, and codes are no numbers."""
        self._unpack()
        for name, tensor in self._parameters.items():
            if tensor is None:
                continue
            moved = fn(tensor.data)
            if moved.dtype != tensor.dtype:
                moved = tensor.data.to(moved.device)
            self._parameters[name] = nn.Parameter(moved, requires_grad=False)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        weight = destination[prefix + "weight"]
        if isinstance(weight, PrepackedWeight):
            destination[prefix + "weight"] = weight.plain()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        self._unpack()
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, nn.Parameter):
            self.__dict__["_weights"] = None  # loaders replace parameters one by one
        super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        self._unpack()
        return dict(vars(self))

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._weights = None
        self._register()  # compiled code of the copied layer must not find this one

    def extra_repr(self) -> str:
        """Describe the layer in one line."""
        fields = ", ".join(f"{name}={value}" for name, value in self.scheme.to_dict().items())
        has_bias = self._parameters.get("bias") is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={has_bias}, {fields}"


class SharedInput:
    """Keeps what layers that read the same input make of it, until all of them have it.

    Args:
        count: how many layers share it.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._input: weakref.ref[Tensor] | None = None
        self._version = -1
        self._made: dict[str, tuple[Any, int]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"count": self.count, "_input": None, "_version": -1, "_made": {}}

    def get(self, flat: Tensor, use: str, make: Any) -> Any:
        """Return what is made of an input, (M, K), for one use of it.

        Args:
            flat: the input, or a view of it.
            use: what for.
            make: from the input to what is kept.
        """
        source = flat if flat._base is None else flat._base
        if self._input is None or self._input() is not source or self._version != source._version:
            self._input, self._version, self._made = weakref.ref(source), source._version, {}
        key = f"{use} {flat.data_ptr()} {tuple(flat.shape)}"
        if key not in self._made:
            self._made[key] = make(flat), 0
        value, uses = self._made[key]
        if uses + 1 >= self.count:
            del self._made[key]
        else:
            self._made[key] = value, uses + 1
        return value


_OF_INPUTS = ("activations", "activation_group", "static", "per_sample", "shift", "rotate")
"""Fields of a scheme that say how inputs are prepared and quantized."""


def can_share(layers: Sequence[QuantLinear]) -> bool:
    """Return whether layers prepare their inputs alike, so that those that read one input can share what they make.

    Args:
        layers: one or more.
    """
    first = layers[0]
    for other in layers[1:]:
        if any(getattr(other.scheme, name) != getattr(first.scheme, name) for name in _OF_INPUTS):
            return False
        for name in ("input_balance", "rotation_sign", "input_scale"):
            one, two = first.stored.get(name), other.stored.get(name)
            if (one is None) != (two is None) or (one is not None and two is not None and not torch.equal(one, two)):
                return False
    return True


def share_inputs(layers: Iterable[QuantLinear]) -> None:
    """Have layers that read the same input quantize it once; they must prepare it alike.

    Args:
        layers: two or more.

    Raises:
        ValueError: they prepare their inputs in different ways.
    """
    members = list(layers)
    if not can_share(members):
        raise ValueError("layers that share an input must have one balance, rotation and format of activations")
    shared = SharedInput(len(members))
    for layer in members:
        layer.shared = shared


def stored_shapes(scheme: Scheme, in_features: int, out_features: int) -> Shapes:
    """Return shapes and dtypes of a layer's tensors, without the bias.

    Args:
        scheme: resolved.
        in_features: K.
        out_features: N.

    Raises:
        ValueError: the scheme doesn't fit the sizes.
    """
    if scheme.alpha == "search" or scheme.group is None:
        raise ValueError(f"the scheme {scheme} is not resolved: alpha and group must be numbers")
    if scheme.rotate and in_features % scheme.rotate:
        raise ValueError(f"rotate is {scheme.rotate}, which does not divide the {in_features} inputs")
    shapes = dict(weight_format(scheme.weights).stored_shapes(out_features, in_features, scheme.group))
    if scheme.alpha is not None:
        shapes["input_balance"] = ((in_features,), torch.float32)
    if scheme.rotate:
        shapes["rotation_sign"] = ((in_features,), torch.int8)
    if scheme.rank:
        shapes["low_rank_down"] = ((scheme.rank, in_features), torch.bfloat16)
        shapes["low_rank_up"] = ((out_features, scheme.rank), torch.bfloat16)
    if scheme.static:
        shapes["input_scale"] = ((1,), torch.float32)
    return shapes


def check_tensors(scheme: Scheme, tensors: Mapping[str, Tensor], in_features: int, out_features: int) -> None:
    """Check the tensors of a layer, whoever wrote them.

    Args:
        scheme: resolved.
        tensors: by name.
        in_features: K.
        out_features: N.

    Raises:
        ValueError: one is missing or has another shape or dtype, or a scale is NaN, infinite or not positive.
    """
    for name, (shape, dtype) in stored_shapes(scheme, in_features, out_features).items():
        tensor = tensors.get(name)
        if tensor is None:
            raise ValueError(f"{name} is missing: the scheme {scheme} needs it")
        if tuple(tensor.shape) != tuple(shape) or tensor.dtype != dtype:
            raise ValueError(
                f"{name} is {tuple(tensor.shape)} of {tensor.dtype}, expected {tuple(shape)} of {dtype}: the file is "
                "damaged, or was written with another group size"
            )
        if name != "weight" and tensor.is_floating_point() and tensor.device.type != "meta":
            if not bool(torch.isfinite(tensor.float()).all()):
                raise ValueError(f"{name} holds NaN or infinity: quantize the model again")
            if name in ("input_scale", "input_balance") and not bool((tensor > 0).all()):
                raise ValueError(f"{name} must be positive: quantize the model again")


_NUMBERS = count(1)
_LAYERS: weakref.WeakValueDictionary[int, QuantLinear] = weakref.WeakValueDictionary()


class _WithGradient(torch.autograd.Function):
    """The layer, with a gradient to its input through the dequantized weights."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, layer: QuantLinear) -> Tensor:
        ctx.layer = layer
        return layer._multiply(input)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:  # pyright: ignore
        (gradient,) = gradients
        return gradient @ ctx.layer.effective_weight().to(gradient.dtype), None


@torch.library.custom_op("tessera::quant_linear", mutates_args=())
def _quant_linear(x: Tensor, number: Tensor, out_features: int) -> Tensor:
    layer = _LAYERS.get(int(number))
    if layer is None:
        raise RuntimeError("the quantized layer that this code was compiled for is gone; compile it again")
    return layer._multiply(x)


@_quant_linear.register_fake
def _quant_linear_fake(x: Tensor, number: Tensor, out_features: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)
