"""Any change of weights as a plain LoRA: exact where it has a low rank, the best of a rank (by SVD) with its error elsewhere."""

from __future__ import annotations

import copy
from collections.abc import Collection
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lightning_peft.errors import ConfigError, MergeError, UnsupportedLayerError
from lightning_peft.interop.lora import LORA, lora_config, lora_tensors
from lightning_peft.interop.table import Layer, Written, layers_of
from lightning_peft.nn.adapter import MergeableModule
from lightning_peft.surgery.anatomy import Anatomy
from lightning_peft.surgery.handle import Handle
from lightning_peft.surgery.layers import dense

_ZERO = 1e-10  # relative to the largest singular value, in float64


@dataclass(frozen=True)
class LowRank:
    """A change of one weight as B A, and ‖ΔW − BA‖ / ‖ΔW‖."""

    A: Tensor
    B: Tensor
    error: float


def write_as_lora(handle: Handle, anatomy: Anatomy, rank: int | bool) -> tuple[Written, dict[str, float]]:
    """Return the adapters of a handle as one LORA, and the relative error of each layer.

    Args:
        handle: The adapter; its base weights are read where its effect depends on them.
        anatomy: The model.
        rank: The most ranks of a layer; True takes as many as the change has.

    Raises:
        MergeError: The adapter is no change of weights, or changes a bias.
        UnsupportedLayerError: HF has no LoRA for a layer.
    """
    if rank is not True and (not isinstance(rank, int) or rank < 1):
        raise ConfigError(f"as_lora={rank!r}, but a rank of at least 1, or True, is needed.")
    other = [entry for entry in handle.entries if not isinstance(entry.adapter, MergeableModule)]
    found: dict[str, list[Layer]] = {}
    for layer in layers_of(handle):
        LORA.check_layer(replace(layer, site=replace(layer.site, rows=None)))
        found.setdefault(layer.path, []).append(layer)
    if other or not found:
        what = f"'{other[0].path}' has a {type(other[0].adapter).__name__}, which" if other else type(handle.strategy).__name__
        raise MergeError(
            f"{what} is no change of weights, so it cannot be written as a LoRA. Keep the own format (lp.save_adapter)."
        )
    shared = handle.shared.values()
    parts = {path: _low_rank(_change(layers, shared), None if rank is True else rank) for path, layers in found.items()}
    most = max(part.A.shape[0] for part in parts.values())
    branches = {path: (*_padded(part, most), 1.0) for path, part in parts.items()}
    first = {path: layers[0] for path, layers in found.items()}
    config = lora_config({path: (most, 1.0) for path in parts}) | LORA.where(list(first.values()), anatomy)
    return Written(config, lora_tensors(first, branches)), {path: part.error for path, part in parts.items()}


def _change(layers: list[Layer], shared: Collection[nn.Module]) -> Tensor:
    """Return ΔW (out, in) of one module in float64: what all adapters on it, in their order, make of its weight."""
    site, module = layers[0].site, layers[0].module
    full = site.kind.canonical(_stored(layers[0])).double()
    weight = full
    for layer in layers:
        # What layers share is not copied: it is large, may hold the model, and stays in its dtype.
        adapter = copy.deepcopy(layer.adapter, {id(module): module for module in shared}).double()
        assert isinstance(adapter, MergeableModule)
        part = weight if layer.site.rows is None else layer.site.rows.take(weight, -2)
        bias = layer.site.bias(module)
        with torch.no_grad():
            new, new_bias = adapter.merged(part, None if bias is None else bias.double())
        if new_bias is not None and (bias is None or not torch.equal(new_bias, bias.double())):
            raise MergeError(
                f"'{layer.site.key}': {type(layer.adapter).__name__} changes the bias too, which a LoRA cannot hold."
            )
        weight = new if layer.site.rows is None else layer.site.rows.put(weight, new, -2)
    if weight.dim() != 2:
        raise UnsupportedLayerError(f"'{site.key}' is a stack of matrices, which is not written as a LoRA.")
    return weight - full


def _stored(layer: Layer) -> Tensor:
    weight = dense(layer.module, layer.site.tensor)
    if weight.is_meta:
        raise UnsupportedLayerError(f"'{layer.path}' is on the meta device; as_lora reads the base weights. Load them first.")
    return weight


def _low_rank(change: Tensor, rank: int | None) -> LowRank:
    U, S, Vh = torch.linalg.svd(change, full_matrices=False)
    exact = max(1, int((S / S[0].clamp_min(torch.finfo(S.dtype).tiny) > _ZERO).sum()))
    kept = exact if rank is None else min(rank, exact)
    root = S[:kept].sqrt()
    A, B = (root[:, None] * Vh[:kept]).float(), (U[:, :kept] * root).float()
    norm = torch.linalg.matrix_norm(change)
    error = torch.linalg.matrix_norm(change - B.double() @ A.double()) / norm if norm else norm
    return LowRank(A, B, float(error))


def _padded(part: LowRank, rank: int) -> tuple[Tensor, Tensor]:
    """Return A and B with zeros up to a rank, so that all layers have one."""
    missing = rank - part.A.shape[0]
    A = torch.cat([part.A, part.A.new_zeros(missing, part.A.shape[1])])
    return A, torch.cat([part.B, part.B.new_zeros(part.B.shape[0], missing)], dim=1)
