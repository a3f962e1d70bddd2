"""LORA of HF peft, with which most of the methods here are written.

ΔW = α/r · B A (α/√r with ``use_rslora``): Hu et al. 2021, arXiv 2106.09685. PiSSA and OLoRA are written as what they have learnt,
``c·(B A − B₀ A₀)``, of rank 2r: HF's own files of them hold for a base that HF has changed, and are refused. Parts of a fused
weight are written as one LoRA of the whole, with zeros where a part has no rows.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.errors import CompatibilityError, ConfigError, FormatError, UnsupportedLayerError
from lightning_peft.interop.files import PREFIX
from lightning_peft.interop.names import address, hf_values, our_targets, our_values, strings, value_at
from lightning_peft.interop.table import (
    CONV,
    CONV1D,
    EMBEDDING,
    LINEAR,
    Fields,
    Layer,
    LayerFormat,
    Parsed,
    Row,
    Written,
    check_kernel,
    integer,
    kernel,
    layers_of,
    most_common,
    number,
    pointwise,
    whole,
    words,
)
from lightning_peft.nn.low_rank import LowRankAdapter
from lightning_peft.strategies.reparameterized.dora import DoRA
from lightning_peft.strategies.reparameterized.dylora import DyLoRA
from lightning_peft.strategies.reparameterized.lora import LoRA
from lightning_peft.strategies.reparameterized.lora_fa import LoRAFA
from lightning_peft.strategies.reparameterized.lora_plus import LoRAPlus
from lightning_peft.strategies.reparameterized.qlora import QDoRA, QLoRA
from lightning_peft.strategies.reparameterized.relora import ReLoRA
from lightning_peft.strategies.strategy import PEFTStrategy
from lightning_peft.surgery.anatomy import Anatomy
from lightning_peft.surgery.builder import in_order
from lightning_peft.surgery.handle import Handle
from lightning_peft.surgery.layers import TransposedTensorKind
from lightning_peft.surgery.sites import Site
from lightning_peft.surgery.targets import Targets
from lightning_peft.surgery.tree import is_within
from lightning_peft.surgery.walk import biases

BIAS = {"none": "none", "adapted": "lora_only", "all": "all"}
_NOT_HERE = "is a variant of LoRA that lightning_peft does not have; merge it with peft (merge_and_unload)"
_MUTATES = (
    "the base was changed when this adapter was made, so it does not fit the plain one; save it with peft's "
    "save_pretrained(..., path_initial_model_for_weight_conversion=...), which makes a plain LoRA of it"
)

LORA_FIELDS = Fields(
    same={"lora_dropout": "dropout", "use_rslora": "rank_stabilized"},
    only={
        "lora_bias": ((False,), "a bias of B " + _NOT_HERE),
        "use_qalora": ((False,), "QA-LoRA " + _NOT_HERE),
        "use_bdlora": ((None,), "block-diagonal LoRA " + _NOT_HERE),
        "kasa_config": ((None,), "KaSA " + _NOT_HERE),
        "arrow_config": ((None,), "Arrow " + _NOT_HERE),
        "monteclora_config": ((None,), "MonteCLoRA " + _NOT_HERE),
        "velora_config": ((None,), "VeLoRA " + _NOT_HERE),
        "alora_invocation_tokens": ((None,), "aLoRA " + _NOT_HERE),
        "layer_replication": ((None,), "layer replication makes another model, which lightning_peft does not build"),
        "ensure_weight_tying": ((False,), "one adapter for two tied weights is not read; merge it with peft (merge_and_unload)"),
        "megatron_config": ((None,), "layers of Megatron are not supported"),
    },
    free=words("megatron_core loftq_config eva_config corda_config lora_ga_config qalora_group_size runtime_config"),
    own=words(
        "r lora_alpha rank_pattern alpha_pattern bias init_lora_weights use_dora trainable_token_indices "
        "target_parameters use_mora mora_type"
    ),
)


_TABLES = frozenset({LINEAR, CONV1D, CONV, "tensor"})


def _read(A: Tensor, layer: Layer) -> Tensor:
    """A (r, in); of a convolution (r, in, *kernel); of a stack of experts (experts x r, in)."""
    return A.flatten(0, 1) if layer.site.spec.batch else kernel(A, layer)


def _write(B: Tensor, layer: Layer) -> Tensor:
    """B (out, r); of a convolution (out, r, 1, 1); of a stack of experts (out, r x experts)."""
    return B.permute(1, 2, 0).flatten(1) if layer.site.spec.batch else pointwise(B, layer)


def _written(B: Tensor, layer: Layer) -> Tensor:
    """The way back of :func:`_write`."""
    return B.unflatten(1, (-1, *layer.site.spec.batch)).permute(2, 0, 1) if layer.site.spec.batch else B


def _magnitude(tensor: Tensor, layer: Layer) -> Tensor:
    """(out,), of a convolution (1, out, 1, 1)."""
    return tensor.reshape(1, -1, *(1,) * (len(layer.weight_shape) - 2)) if layer.kind == CONV else tensor


@dataclass(frozen=True, kw_only=True)
class LoRAFormat(LayerFormat):
    """LORA."""

    def cls(self, config: Mapping[str, Any]) -> type[PEFTStrategy]:
        return DoRA if config.get("use_dora") else LoRA

    # ------------------------------------------------------------------ here -> there

    def write(self, handle: Handle, anatomy: Anatomy) -> Written:
        found = layers_of(handle)
        whole_layers: dict[str, list[Layer]] = {}
        for layer in found:
            self.check_layer(layer)
            whole_layers.setdefault(layer.path, []).append(layer)
        branches = {path: _branch(parts) for path, parts in whole_layers.items()}
        tensors = lora_tensors({path: parts[0] for path, parts in whole_layers.items()}, branches)
        stacks = [layer for layer in found if layer.site.spec.batch]
        for layer in found:
            if hasattr(layer.adapter, "magnitude"):
                tensors[f"{PREFIX}{layer.path}.lora_magnitude_vector"] = _magnitude(layer.adapter.magnitude.detach(), layer)  # type: ignore[operator]
        strategy = handle.strategy
        config = {"lora_dropout": strategy.dropout, "use_dora": isinstance(strategy, DoRA)}
        config |= lora_config({p: (A.shape[-2], c) for p, (A, _, c) in branches.items()}, stabilized=strategy.rank_stabilized)
        claimed = {slot.key: slot.tensor().detach() for slot in handle.slots if slot.claimed}
        bias, values = write_biases(claimed, handle, set(whole_layers))
        config |= {"bias": bias, "target_parameters": [layer.path for layer in stacks] or None}
        return Written(config | self.where(found, anatomy), tensors | values)

    def check_layer(self, layer: Layer) -> None:
        if layer.site.spec.batch:
            _check_stack(layer.site, layer.module, layer.adapter)
        elif layer.site.rows is None or hasattr(layer.adapter, "magnitude") or layer.site.spec.kind == "tensor":
            super().check_layer(layer)
        check_kernel(layer)

    # ------------------------------------------------------------------ there -> here

    def addressed(self, file: Parsed, anatomy: Anatomy) -> Parsed:
        asked = strings(file.config.get("target_parameters"), "target_parameters", file.where)
        stacks = {key: site for key, site in _stacks(anatomy).items() if any(key == t or key.endswith(f".{t}") for t in asked)}
        keys = _stack_keys({path: (site, site.module(anatomy.root)) for path, site in stacks.items()})
        back = {key: path for path, key in keys.items()}
        return replace(file, layers={back.get(path, path): tensors for path, tensors in file.layers.items()})

    def sites(self, file: Parsed, anatomy: Anatomy) -> list[Site]:
        stacks = {key: site for key, site in _stacks(anatomy).items() if key in file.layers}
        for site in stacks.values():
            _check_stack(site, site.module(anatomy.root), None)
        rest = replace(file, layers={path: tensors for path, tensors in file.layers.items() if path not in stacks})
        return [*(super().sites(rest, anatomy) if rest.layers else ()), *stacks.values()]

    def args(self, file: Parsed, sites: list[Site], anatomy: Anatomy) -> dict[str, Any]:
        config, where = file.config, file.where
        check_start(config, where)
        ranks, alphas = per_layer(file, sites)
        names = {there: ours for ours, there in BIAS.items()}
        bias = config.get("bias", "none")
        if not isinstance(bias, str) or bias not in names:
            raise FormatError(f"{where}: bias={bias!r} is none of {', '.join(names)}.")
        for site in sites:
            path = address(site)
            given = file.layers[path].get("lora_embedding_A" if site.spec.kind == "embedding" else "lora_A.weight")
            if given is not None and given.dim() and given.shape[0] != ranks[path] * math.prod(site.spec.batch):
                raise CompatibilityError(
                    f"{where}: '{path}' has rank {given.shape[0]} in the tensors and {ranks[path]} in the config."
                )
        rank, alpha = integer(config.get("r", 8), "r", where), number(config.get("lora_alpha", 8), "lora_alpha", where)
        return {
            "rank": rank,
            "alpha": alpha,
            "bias": names[bias],
            "rank_per_target": our_values(ranks, rank, sites, anatomy),
            "alpha_per_target": our_values(alphas, alpha, sites, anatomy),
        }

    def state(self, file: Parsed, part: Handle, anatomy: Anatomy) -> dict[str, Tensor]:
        return super().state(file, part, anatomy) | read_biases(file, part)

    def takes(self, file: Parsed, key: str) -> bool:
        return file.config.get("bias", "none") != "none" and key.rpartition(".")[2] == "bias"


def per_layer(file: Parsed, sites: list[Site]) -> tuple[dict[str, int], dict[str, float]]:
    """Return rank and alpha of every layer, as the config gives them."""
    config, where = file.config, file.where
    patterns: list[Mapping[str, Any]] = []
    for name in ("rank_pattern", "alpha_pattern"):
        value = config.get(name) or {}
        if not isinstance(value, dict):
            raise FormatError(f"{where}: {name}={value!r} is no mapping.")
        patterns.append(value)
    alpha = "lora_alpha" if "lora_alpha" in config or config["peft_type"] == "LORA" else "alpha"
    r, a = integer(config.get("r", 8), "r", where), number(config.get(alpha, 8), alpha, where)
    paths = [address(site) for site in sites]
    ranks = {path: integer(value_at(patterns[0], path, r, where), "rank_pattern", where) for path in paths}
    alphas = {path: number(value_at(patterns[1], path, a, where), "alpha_pattern", where) for path in paths}
    return ranks, alphas


def check_start(config: Mapping[str, Any], where: str) -> None:
    """Refuse files that hold for another base than the plain one."""
    start = str(config.get("init_lora_weights", True)).lower()
    if start.startswith(("pissa", "olora", "corda", "lora_ga", "loftq")):
        raise CompatibilityError(f"{where}: init_lora_weights={config['init_lora_weights']!r}: {_MUTATES}.")


def lora_config(layers: Mapping[str, tuple[int, float]], *, stabilized: bool = False) -> dict[str, Any]:
    """Return the fields of ranks and alphas.

    Args:
        layers: Rank and c of every path.
        stabilized: c = α/√r instead of α/r.
    """
    ranks = {path: rank for path, (rank, _) in layers.items()}
    alphas = {path: whole(c * (rank**0.5 if stabilized else rank)) for path, (rank, c) in layers.items()}
    rank, alpha = most_common(ranks.values()), most_common(alphas.values())
    return {
        "r": rank,
        "lora_alpha": alpha,
        "use_rslora": stabilized,
        "rank_pattern": hf_values(ranks, rank),
        "alpha_pattern": hf_values(alphas, alpha),
        "init_lora_weights": True,
    }


def lora_tensors(layers: Mapping[str, Layer], branches: Mapping[str, tuple[Tensor, Tensor, float]]) -> dict[str, Tensor]:
    """Return the tensors of plain LoRAs, canonical (r, in) and (out, r), as the layers of HF hold them."""
    tensors: dict[str, Tensor] = {}
    keys = _stack_keys({path: (layer.site, layer.module) for path, layer in layers.items() if layer.site.spec.batch})
    for path, (A, B, _) in branches.items():
        layer, path = layers[path], keys.get(path, path)
        names = ("lora_embedding_A", "lora_embedding_B") if layer.kind == EMBEDDING else ("lora_A.weight", "lora_B.weight")
        tensors[f"{PREFIX}{path}.{names[0]}"], tensors[f"{PREFIX}{path}.{names[1]}"] = _read(A, layer), _write(B, layer)
    return tensors


def _branch(parts: list[Layer]) -> tuple[Tensor, Tensor, float]:
    """Return A, B and c of one module, from the branches of the parts of its fused weight."""
    products = []
    for layer in parts:
        assert isinstance(layer.adapter, LowRankAdapter)
        A, B, c = layer.adapter.product()
        products.append((A.detach(), B.detach(), c))
    if parts[0].site.rows is None:
        return products[0]
    scaling = products[0][2]
    rows = parts[0].site.kind.spec(parts[0].module, parts[0].site.tensor).out_features
    columns = []
    for layer, (_, B, c) in zip(parts, products, strict=True):
        assert layer.site.rows is not None
        columns.append(layer.site.rows.put(B.new_zeros(rows, B.shape[1]), B if c == scaling else B * (c / scaling), 0))
    return torch.cat([A for A, _, _ in products]), torch.cat(columns, dim=1), scaling


# ---------------------------------------------------------------------- stacks of experts (target_parameters)


def _stacks(anatomy: Anatomy) -> dict[str, Site]:
    """Return the stacks of experts of a model by address."""
    sites = {site for found in anatomy.roles.values() for site in found if len(site.spec.batch) == 1 and site.rows is None}
    return {address(site): site for site in in_order(anatomy.tree, sites)}


def _stack_keys(stacks: Mapping[str, tuple[Site, nn.Module]]) -> dict[str, str]:
    """Return where HF keeps the tensors of stacks: it wraps a module once for each parameter, later ones outside."""
    keys: dict[str, str] = {}
    for path, (site, module) in stacks.items():
        own = [other.tensor for other, _ in stacks.values() if other.path == site.path]
        order = [name for name in module._parameters if name in own]
        keys[path] = site.path + ".base_layer" * (len(order) - 1 - order.index(site.tensor))
    return keys


def _check_stack(site: Site, module: nn.Module, adapter: nn.Module | None) -> None:
    """Check that HF sees a stack of experts as it is seen here: which of its dimensions is the input, and a plain LoRA.

    Raises:
        UnsupportedLayerError: It does not.
    """
    turned = isinstance(site.kind, TransposedTensorKind) != bool(getattr(module, "is_transposed", False))
    if turned or len(site.spec.batch) != 1 or site.rows is not None or hasattr(adapter, "magnitude"):
        raise UnsupportedLayerError(
            f"'{address(site)}' is a stack of experts that HF peft cannot adapt in this way. Exclude it, or keep the own format "
            "(lp.save_adapter)."
        )


# ---------------------------------------------------------------------- biases


def write_biases(
    claimed: Mapping[str, Tensor], handle: Handle, adapted: set[str], beside: Iterable[str] = ()
) -> tuple[str, dict[str, Tensor]]:
    """Return HF's ``bias`` and the tensors, for biases that train in place.

    Args:
        claimed: The trained biases by key.
        handle: The adapter.
        adapted: Paths of the modules with a LoRA.
        beside: Keys of what trains in modules that are saved whole.

    Raises:
        ConfigError: They are neither all of the model's nor those of the adapted layers.
    """
    if not claimed:
        return "none", {}
    every = {f"{path}.{name}" for path, name in biases(handle.root)}
    own = {f"{path}.{name}" for path, name in biases(handle.root, adapted)}
    mode = "all" if claimed.keys() | (every & set(beside)) == every else "lora_only" if claimed.keys() == own else None
    odd = next((key for key in claimed if not key.endswith(".bias")), None)
    if mode is None or odd is not None:
        raise ConfigError(
            f"HF peft trains all biases of a model, or those of the adapted layers, by the name 'bias'; this adapter has "
            f"{odd or f'{len(claimed)} of {len(every)}'}. Train one of the two, or save the parts apart."
        )
    # HF wraps an adapted module, whose own bias is then called base_layer.bias.
    keys = {key: f"{path}.base_layer.bias" if (path := key.rpartition(".")[0]) in adapted else key for key in claimed}
    return mode, {f"{PREFIX}{keys[key]}": value for key, value in claimed.items()}


def biases_outside(anatomy: Anatomy, modules: Collection[str]) -> Targets:
    """Return targets that name the modules with a bias, but those within ``modules``."""
    paths = dict.fromkeys(path for path, _ in biases(anatomy.root) if not any(is_within(path, m) for m in modules))
    return our_targets(list(paths), anatomy, None)


def read_biases(file: Parsed, part: Handle) -> dict[str, Tensor]:
    """Return the biases of a file for the slots that train in place."""
    given = {re.sub(r"\.base_layer\.bias$", ".bias", key): tensor for key, tensor in file.rest.items() if key.endswith("bias")}
    return {slot.key: given[slot.key] for slot in part.slots if slot.claimed and slot.key in given}


LORA = LoRAFormat(
    peft_type="LORA",
    methods=(LoRA, QLoRA, DoRA, QDoRA, LoRAPlus, LoRAFA, ReLoRA, DyLoRA),
    layers=frozenset({LINEAR, CONV1D, EMBEDDING, CONV}),
    fields=LORA_FIELDS,
    rows=(
        Row("lora_A", "lora_A.weight", _read, kinds=_TABLES),
        Row("lora_B", "lora_B.weight", _write, load=_written, kinds=_TABLES),
        Row("lora_A", "lora_embedding_A", kinds=frozenset({EMBEDDING})),
        Row("lora_B", "lora_embedding_B", kinds=frozenset({EMBEDDING})),
        Row("magnitude", "lora_magnitude_vector", _magnitude),
    ),
)
