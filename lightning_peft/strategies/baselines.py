"""The baselines every PEFT result is compared with: full fine-tuning, and a trained head on a frozen base."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_peft.errors import TargetError
from lightning_peft.strategies.registry import register
from lightning_peft.strategies.strategy import ALL_KINDS, PEFTStrategy
from lightning_peft.surgery.anatomy import Anatomy
from lightning_peft.surgery.edits import Plan, Train
from lightning_peft.surgery.layers import DENSE, storage_of
from lightning_peft.surgery.walk import base_parameters


@register(
    name="full",
    family="baseline",
    summary="Trains every parameter of the base model.",
    paper="baseline",
    lr=2e-5,
    weight_decay=0.01,
    mergeable=True,
    storages=frozenset({DENSE}),
    may_rest=("*",),
)
@dataclass(frozen=True, kw_only=True)
class Full(PEFTStrategy):
    """Full fine-tuning, with the same callback, files and tables as every method."""

    def validate(self) -> None:
        if self.targets is not None:
            raise TargetError("Full trains everything; `targets` has no meaning. Use `head` or a selective method.")

    def plan(self, anatomy: Anatomy) -> Plan:
        root = anatomy.root
        # Quantized weights are in the plan, for the error to say that they cannot train.
        return Plan(
            tuple(
                Train(path, name)
                for path, name, p in base_parameters(root)
                if p.dtype.is_floating_point or storage_of(root.get_submodule(path)) != DENSE
            )
        )


@register(
    name="head",
    family="baseline",
    summary="Trains the model's output head only.",
    paper="baseline",
    lr=1e-3,
    mergeable=True,
    layer_kinds=ALL_KINDS,
    default_roles=("head",),
)
@dataclass(frozen=True, kw_only=True)
class Head(PEFTStrategy):
    """Linear probing: the head, or the targeted layers, train whole."""

    def plan(self, anatomy: Anatomy) -> Plan:
        paths = {site.path for site in self.sites(anatomy)}
        found = [(path, name) for path, name, _ in base_parameters(anatomy.root) if path in paths]
        if not found:
            raise TargetError(
                f"Head: the weights of {', '.join(sorted(paths))} are tied to another layer; training the head would train it too. "
                "Choose targets, or another method."
            )
        return Plan(tuple(Train(path, name) for path, name in found))
