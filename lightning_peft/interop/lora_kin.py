"""ADALORA of HF peft, and MoRA as its authors' fork of peft writes it: both have LoRA's fields, and tensors of their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_peft.errors import CompatibilityError, ConfigError, FormatError
from lightning_peft.interop.files import PREFIX
from lightning_peft.interop.lora import BIAS, LORA_FIELDS, LoRAFormat, check_start, write_biases
from lightning_peft.interop.table import (
    CONV1D,
    LINEAR,
    Fields,
    Layer,
    LayerFormat,
    Parsed,
    Row,
    Written,
    integer,
    layers_of,
    number,
    whole,
)
from lightning_peft.strategies.reparameterized.adalora import AdaLoRA
from lightning_peft.strategies.reparameterized.mora import MoRA
from lightning_peft.strategies.strategy import PEFTStrategy
from lightning_peft.surgery.anatomy import Anatomy
from lightning_peft.surgery.handle import Handle
from lightning_peft.surgery.sites import Site

# ---------------------------------------------------------------------- AdaLoRA


@dataclass(frozen=True, kw_only=True)
class AdaLoRAFormat(LayerFormat):
    """ADALORA. Triplets that were switched off (E = 0) are cut out, and ``rank_pattern`` says which stay."""

    def write(self, handle: Handle, anatomy: Anatomy) -> Written:
        written = super().write(handle, anatomy)
        kept = {layer.path: (layer.adapter.lora_E.detach() != 0).flatten() for layer in layers_of(handle)}  # type: ignore[operator]
        if all(not mask.any() for mask in kept.values()) or all(mask.all() for mask in kept.values()):
            return written  # nothing is trained yet, or nothing cut
        for path, mask in kept.items():
            for name in ("lora_A", "lora_E"):
                written.tensors[f"{PREFIX}{path}.{name}"] = written.tensors[f"{PREFIX}{path}.{name}"][mask]
            written.tensors[f"{PREFIX}{path}.lora_B"] = written.tensors[f"{PREFIX}{path}.lora_B"][:, mask]
        pattern = {f"{path}.lora_E": mask.tolist() for path, mask in kept.items()}
        return Written(written.config | {"rank_pattern": pattern}, written.tensors)

    def config(self, handle: Handle, found: list[Layer]) -> dict[str, Any]:
        # The schedule is over: HF asks for one all the same.
        return {"r": handle.strategy.initial_rank, "tinit": 0, "tfinal": 0, "total_step": 1, "rank_pattern": None}

    def args(self, file: Parsed, sites: list[Site], anatomy: Anatomy) -> dict[str, Any]:
        config, where = file.config, file.where
        check_start(config, where)
        if config.get("use_dora") or config.get("use_rslora") or config.get("alpha_pattern"):
            raise CompatibilityError(f"{where}: DoRA, rsLoRA and alpha_pattern mean nothing in ADALORA. Delete them.")
        rank = integer(config.get("init_r", 12), "init_r", where)
        alpha = config.get("lora_alpha", 8)
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
            raise FormatError(f"{where}: lora_alpha={alpha!r} is no number.")
        target = integer(config.get("target_r", 8), "target_r", where)
        return {"initial_rank": rank, "target_rank": min(target, rank), "alpha": float(alpha) if alpha > 0 else float(rank)}

    def state(self, file: Parsed, part: Handle, anatomy: Anatomy) -> dict[str, Tensor]:
        pattern = file.config.get("rank_pattern")
        if pattern is None:
            return super().state(file, part, anatomy)
        if not isinstance(pattern, dict):
            raise FormatError(f"{file.where}: rank_pattern={str(pattern)[:100]!r} is no mapping.")
        rank, layers = part.strategy.initial_rank, {}
        masks = {str(key).removesuffix(".default").removesuffix(".lora_E"): mask for key, mask in pattern.items()}
        for path, given in file.layers.items():
            mask = masks.get(path)
            if not isinstance(mask, list) or len(mask) != rank or not all(type(kept) is bool for kept in mask):
                raise FormatError(
                    f"{file.where}: rank_pattern says for '{path}' not of each of {rank} triplets whether it stays."
                )
            layers[path] = {
                name: _spread(tensor, torch.tensor(mask), name == "lora_B", path, file) for name, tensor in given.items()
            }
        return super().state(replace(file, layers=layers), part, anatomy)


def _spread(tensor: Tensor, mask: Tensor, columns: bool, path: str, file: Parsed) -> Tensor:
    """Return a cut tensor with zeros where triplets were dropped."""
    rows = tensor.mT if columns and tensor.dim() == 2 else tensor
    if rows.dim() != 2 or rows.shape[0] != int(mask.sum()):
        raise CompatibilityError(f"{file.where}: '{path}' has tensors for another number of ranks than rank_pattern says.")
    full = rows.new_zeros(len(mask), rows.shape[1])
    full[mask] = rows
    return full.mT if columns else full


ADALORA = AdaLoRAFormat(
    peft_type="ADALORA",
    methods=(AdaLoRA,),
    layers=frozenset({LINEAR, CONV1D}),
    fields=Fields(
        same={
            "init_r": "initial_rank",
            "target_r": "target_rank",
            "lora_alpha": "alpha",
            "lora_dropout": "dropout",
            "deltaT": "interval",
            "beta1": "beta1",
            "beta2": "beta2",
            "orth_reg_weight": "orthogonality",
        },
        only={**LORA_FIELDS.only} | {"bias": (("none",), "biases beside ADALORA are not read; train them with LoRA")},
        free=LORA_FIELDS.free | {"r", "tinit", "tfinal", "total_step"},
        own=LORA_FIELDS.own | {"use_rslora"},
    ),
    rows=(Row("lora_A", "lora_A"), Row("lora_B", "lora_B"), Row("lora_E", "lora_E")),
)

# ---------------------------------------------------------------------- MoRA


@dataclass(frozen=True, kw_only=True)
class MoRAFormat(LoRAFormat):
    """LORA with ``use_mora``, in the fork of the authors of MoRA: both keys hold the one square matrix, the scaling is 1."""

    def cls(self, config: Mapping[str, Any]) -> type[PEFTStrategy]:
        return MoRA

    def check(self, strategy: Any) -> None:
        if strategy.rank_per_target:
            raise ConfigError("MoRA: rank_per_target cannot be written; the fork's files have one rank for all layers.")

    def write(self, handle: Handle, anatomy: Anatomy) -> Written:
        strategy: Any = handle.strategy
        found = layers_of(handle)
        for layer in found:
            LayerFormat.check_layer(self, layer)
        tensors = {}
        for layer in found:
            for name in ("lora_A.weight", "lora_B.weight"):
                tensors[f"{PREFIX}{layer.path}.{name}"] = layer.adapter.mora_M.detach()  # type: ignore[operator]
        claimed = {slot.key: slot.tensor().detach() for slot in handle.slots if slot.claimed}
        bias, values = write_biases(claimed, handle, {layer.path for layer in found})
        config = {"use_mora": True, "mora_type": strategy.mora_type, "r": strategy.rank, "lora_alpha": whole(strategy.alpha)}
        config |= {"lora_dropout": strategy.dropout, "bias": bias}
        return Written(config | self.where(found, anatomy), tensors | values)

    def args(self, file: Parsed, sites: list[Site], anatomy: Anatomy) -> dict[str, Any]:
        config, where = file.config, file.where
        if config.get("use_dora") or config.get("rank_pattern"):
            raise CompatibilityError(f"{where}: use_mora together with DoRA or rank_pattern is no file of the fork.")
        bias = {there: ours for ours, there in BIAS.items()}.get(str(config.get("bias", "none")), "none")
        rank, alpha = integer(config.get("r", 8), "r", where), number(config.get("lora_alpha", 8), "lora_alpha", where)
        return {"rank": rank, "alpha": alpha, "bias": bias, "mora_type": config.get("mora_type", 1)}

    def state(self, file: Parsed, part: Handle, anatomy: Anatomy) -> dict[str, Tensor]:
        layers = {}
        for path, given in file.layers.items():
            both = dict(given)
            second = both.pop("lora_B.weight", None)
            if second is not None and "lora_A.weight" in both and not torch.equal(second, both["lora_A.weight"]):
                raise FormatError(
                    f"{file.where}: '{path}' has two different matrices, and MoRA has one. It is a LoRA, or damaged."
                )
            layers[path] = both
        return super().state(replace(file, layers=layers), part, anatomy)


MORA = MoRAFormat(
    peft_type="LORA",
    methods=(MoRA,),
    layers=frozenset({LINEAR}),
    fields=LORA_FIELDS,
    rows=(Row("mora_M", "lora_A.weight"), Row("mora_B", "lora_B.weight")),
)
