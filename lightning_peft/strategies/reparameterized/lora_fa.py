"""LoRA-FA: Zhang et al. 2023, arXiv 2308.03303: LoRA with A frozen as it was drawn, so that the input of a layer is not kept."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor, optim

from lightning_peft.errors import UnsupportedLayerError
from lightning_peft.nn.low_rank import FrozenReadAdapter
from lightning_peft.strategies.registry import register
from lightning_peft.strategies.reparameterized.lora import LoRA
from lightning_peft.strategies.schedule import Schedule
from lightning_peft.surgery.edits import Build
from lightning_peft.surgery.handle import Handle
from lightning_peft.surgery.sites import Site

_RIDGE = 1e-8  # makes A Aᵀ safe to invert


@register(
    name="lora_fa",
    family="reparameterized",
    summary="LoRA with its first matrix frozen, which halves what trains and saves the memory of the layer's input.",
    paper="LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language Models Fine-tuning, arXiv 2308.03303",
    lr=2e-4,
    mergeable=True,
    layer_kinds=LoRA.info.layer_kinds - {"embedding"},
    default_roles=("attention.query", "attention.value"),
    example={"rank": 2, "alpha": 4.0},
)
@dataclass(frozen=True, kw_only=True)
class LoRAFA(LoRA):
    """LoRA with A frozen. Not for embeddings, whose A starts at zero.

    The options of LoRA, and:

    Args:
        precondition: Before each step replace the gradient of B by ``(1/c²) ∇B (A Aᵀ)⁻¹``, which makes the change of c·BA the best
            approximation of the gradient of W that A allows (as HF peft's LoRA-FA optimizer).
    """

    precondition: bool = False

    def build(self, site: Site, rank: int, alpha: float) -> Build:
        if self.precondition and site.spec.groups > 1:
            raise UnsupportedLayerError(
                f"LoRAFA: precondition=True at '{site.key}', a grouped convolution. Exclude it, or set precondition to False."
            )
        return super().build(site, rank, alpha)

    def adapter(self, rank: int, scaling: float) -> Build:
        return functools.partial(FrozenReadAdapter, rank=rank, scaling=scaling, dropout=self.dropout, init=self.init)

    def schedule(self, handle: Handle) -> Schedule:
        return _Preconditioner(handle) if self.precondition else Schedule()


class _Preconditioner(Schedule):
    """Multiplies the gradients of B by the inverse of c² A Aᵀ."""

    def __init__(self, handle: Handle) -> None:
        self.adapters = [e.adapter for e in handle.entries if isinstance(e.adapter, FrozenReadAdapter)]
        self._inverses: list[Tensor] = []

    @torch.no_grad()
    def before_step(self, optimizer: optim.Optimizer) -> None:
        if not self._inverses:  # only now is A what was loaded
            self._inverses = [_inverse(adapter) for adapter in self.adapters]
        for adapter, inverse in zip(self.adapters, self._inverses, strict=True):
            gradient = adapter.lora_B.grad
            if gradient is not None:
                gradient.copy_(gradient.to(inverse.dtype) @ inverse)


def _inverse(adapter: FrozenReadAdapter) -> Tensor:
    A = adapter.lora_A.to(torch.promote_types(adapter.lora_A.dtype, torch.float32))
    gram = A @ A.mT + _RIDGE * torch.eye(adapter.rank, dtype=A.dtype, device=A.device)
    inverse: Tensor = torch.linalg.inv(gram) / adapter.scaling**2
    return inverse
