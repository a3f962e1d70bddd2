"""What an adapter is: a module that is given the layer it adapts, as a function and as a matrix.

The mathematics of a method is written against :class:`BaseLayer` only, so it holds for every layer kind (linear, embedding,
convolution, norm, fused slices, expert stacks) and every storage.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

LayerKindName = Literal["linear", "embedding", "conv", "norm", "tensor", "module"]


@dataclass(frozen=True)
class LayerSpec:
    """Logical shape of one adapted weight, independent of how the layer stores it.

    Args:
        kind: ``linear``, ``embedding``, ``conv``, ``norm``, ``tensor`` (a raw parameter: nn.MultiheadAttention, experts)
            or ``module`` (no weight of its own: a block, an attention module).
        out_features: Rows of the canonical weight; output channels.
        in_features: Columns of the canonical weight. Convolution: in_channels / groups x kernel size. Norm: 1.
        groups: Convolution groups; 1 for anything else.
        kernel: Kernel size of a convolution, its dimensions multiplied; 1 for anything else.
        batch: Leading dimensions of the canonical weight, ``(experts,)`` for an expert stack.
        has_bias: The layer has a bias of ``out_features``.
        has_input: The adapter sees the layer's input. False for weights that are read inside somebody else's forward: then
            only :meth:`MergeableModule.merged` is called.
        dtype: dtype of the stored weight.
        device: Device of the stored weight.
    """

    kind: LayerKindName
    out_features: int
    in_features: int
    groups: int = 1
    kernel: int = 1
    batch: tuple[int, ...] = ()
    has_bias: bool = False
    has_input: bool = True
    dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def compose(self, B: Tensor, A: Tensor) -> Tensor:
        """Return the canonical weight ``(*batch, out, in)`` of the two-step map B∘A.

        Args:
            B: ``(*batch, out, r / groups)``.
            A: ``(*batch, r, in)``. With g groups, output group i sees rows ``i*r/g ... (i+1)*r/g`` of A only.
        """
        if self.groups == 1:
            return B @ A
        product: Tensor = B.unflatten(0, (self.groups, -1)) @ A.unflatten(0, (self.groups, -1))
        return product.flatten(0, 1)


class BaseLayer(Protocol):
    """The adapted layer as an adapter sees it during one call."""

    @property
    def spec(self) -> LayerSpec:
        """Logical shape of the adapted weight."""

    def __call__(self, x: Tensor, /) -> Tensor:
        """Run the layer, with the adapters installed before this one: ``(..., in) -> (..., out)``."""

    def weight(self) -> Tensor:
        """Return the canonical base weight ``(*batch, out, in)``, detached."""

    @property
    def pass_number(self) -> int | None:
        """Which pass over the batch runs, from 0; None in a recomputation that is not known."""

    def along_channels(self, values: Tensor) -> Tensor:
        """Return ``values`` (out,) in a shape that broadcasts over the layer's output."""

    def low_rank(
        self, x: Tensor, A: Tensor, B: Tensor, *, scaling: float = 1.0, dropout: float = 0.0, gain: Tensor | None = None
    ) -> Tensor:
        """Return ``g ⊙ (W x + c B A drop(x)) + b``, the layer and a low-rank branch beside it, by the leanest way there is.

        Args:
            x: Input of the layer.
            A: ``(r, in)``, which reads ``x`` as the layer does (look-up, kernel, stride, groups).
            B: ``(out, r / groups)``, which maps the r channels of that to the layer's channels.
            scaling: c.
            dropout: Probability of dropping an entry of the branch's input; the caller passes 0 in evaluation. Token ids have
                nothing that could be dropped.
            gain: g ``(out,)``, None for 1. Together with dropout the result is ``W x + (g - 1) ⊙ W drop(x) + g ⊙ c B A drop(x) + b``
                (DoRA, arXiv 2402.09353, as its authors' code has it).
        """

    def full_rank(self, x: Tensor, delta: Tensor, *, dropout: float = 0.0) -> Tensor:
        """Return ``W x + ΔW drop(x) + b``, the layer and a branch beside it that is given as one matrix.

        Args:
            x: Input of the layer.
            delta: ΔW ``(out, in)``, which reads ``x`` as the layer does.
            dropout: As in :meth:`low_rank`.
        """

    def entries(self, x: Tensor, positions: Tensor, values: Tensor) -> Tensor:
        """Return ``(W + ΔW) x + b``, the layer with a few entries of its weight changed.

        Args:
            x: Input of the layer.
            positions: (n,), in the flattened W (out, in); none twice unless its value is 0.
            values: (n,), those of ΔW.
        """


@dataclass(frozen=True)
class BuildContext:
    """What an adapter may know about its place when it is built.

    Args:
        path: Module path relative to the adapted root.
        spec: Logical shape of the adapted weight.
        weight: Returns the canonical base weight, detached; raises on the meta device.
        dtype: dtype of the adapter's parameters.
        device: Device of the adapter's parameters.
        seed: Seed of this adapter's initialisation, equal on every rank.
        shared: Modules shared by several edits of the plan, by name.
        residual: Returns factors L (out, r), R (r, in) of what the storage of the weight has lost, W ≈ weight() + L R, in fp32; None
            where none were kept.
        claim: Called with the number of entries of every tensor before it is made; raises where there is no room for it.
    """

    path: str
    spec: LayerSpec
    weight: Callable[[], Tensor]
    dtype: torch.dtype
    device: torch.device
    seed: int
    shared: Mapping[str, nn.Module] = field(default_factory=dict)
    residual: Callable[[], tuple[Tensor, Tensor] | None] = lambda: None
    claim: Callable[[int], None] = lambda entries: None

    def empty(self, *shape: int) -> nn.Parameter:
        """Return an uninitialised parameter; :meth:`AdapterModule.reset_parameters` fills it."""
        self.claim(math.prod(shape))
        return nn.Parameter(torch.empty(*shape, dtype=self.dtype, device=self.device))


class AdapterModule(nn.Module, ABC):
    """Base of all adapters. Parameters are raw ``nn.Parameter``s: precision plug-ins convert every ``nn.Linear`` they find."""

    # The forward depends on the values of the base weight, so no other adapter may lie between the two.
    reads_base_weight: bool = False
    # The branch reads the layer's output, not its input: adapters in series.
    reads_output: bool = False
    # Names of the parameters of the two maps of which the branch is made, the one that reads and the one that writes; empty for any
    # other form.
    projections: ClassVar[tuple[tuple[str, ...], ...]] = ()

    def __init__(self, context: BuildContext) -> None:
        super().__init__()
        self.spec = context.spec
        self.seed = context.seed

    @property
    def channels_read(self) -> int:
        """Channels of what the branch reads."""
        spec = self.spec
        if self.reads_output or spec.kind in ("embedding", "norm"):
            return spec.out_features
        return spec.in_features * spec.groups // spec.kernel

    def generator(self) -> torch.Generator:
        """Return a fresh CPU generator of this adapter's own seed; the global random state is never touched."""
        return torch.Generator().manual_seed(self.seed)

    @abstractmethod
    def reset_parameters(self) -> None:
        """Initialise all parameters, the same way on every rank. Called at build and after ``to_empty``."""

    @abstractmethod
    def forward(self, base: BaseLayer, x: Tensor) -> Tensor:
        """Return the adapted output for input ``x``, given the layer ``base``."""


class MergeableModule(AdapterModule):
    """An adapter whose effect is a change of the layer's weight and bias."""

    @abstractmethod
    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the adapted canonical weight ``(*batch, out, in)`` and bias ``(out,)``."""

    def unmerged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None] | None:
        """Invert :meth:`merged`, or return None if only a backup can restore the weight exactly enough."""
        return None


class DeltaModule(MergeableModule):
    """A mergeable adapter that adds ``delta()`` to the weight and leaves the bias alone."""

    dropout: float = 0.0

    @abstractmethod
    def delta(self) -> Tensor:
        """Return ΔW, canonical ``(*batch, out, in)``, in the dtype of the adapter's parameters."""

    def forward(self, base: BaseLayer, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), by ΔW as one matrix; a method that knows a leaner way overrides it."""
        return base.full_rank(x, self.delta(), dropout=self.dropout if self.training else 0.0)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + self.delta().to(weight.dtype), bias

    def unmerged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None] | None:
        return weight - self.delta().to(weight.dtype), bias


def fill_normal(parameter: Tensor, std: float, generator: torch.Generator) -> None:
    """Fill with N(0, std²) from a CPU generator, whatever the device, so that all devices and ranks agree."""
    if parameter.is_meta:
        return  # no numbers to fill, and drawing them for a deep model takes seconds
    with torch.no_grad():
        parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float32) * std)


def fill_kaiming(parameter: Tensor, fan_in: int, generator: torch.Generator) -> None:
    """Fill with U(-1/sqrt(fan_in), 1/sqrt(fan_in)), the default of ``nn.Linear`` (kaiming with a = sqrt(5))."""
    if parameter.is_meta:
        return
    bound = fan_in**-0.5
    with torch.no_grad():
        parameter.copy_((torch.rand(parameter.shape, generator=generator, dtype=torch.float32) * 2 - 1) * bound)
