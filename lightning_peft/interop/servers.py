"""Whether an adapter loads elsewhere, and what to change: told from its files, without a model.

vLLM: its ``PEFTHelper`` and ``LoRAModel`` (vllm/lora/peft_helper.py, lora_model.py, config/lora.py, read in 2026). It takes plain LoRA,
rank-stabilised too, with one rank and alpha for all layers: patterns are not read, so their layers would be scaled wrongly.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from lightning_peft.checkpoint import read_adapter
from lightning_peft.errors import CompatibilityError, ConfigError, FormatError
from lightning_peft.hub import local_copy
from lightning_peft.interop.files import is_hf_folder, read_folder
from lightning_peft.interop.lora import LORA
from lightning_peft.interop.lora_kin import MORA
from lightning_peft.interop.registry import format_for, format_of
from lightning_peft.strategies.hybrid.compose import Compose
from lightning_peft.strategies.reparameterized.dora import DoRA
from lightning_peft.strategies.reparameterized.lora import LoRA
from lightning_peft.strategies.selective.bitfit import BitFit
from lightning_peft.strategies.selective.ln_tuning import LNTuning
from lightning_peft.strategies.selective.token_rows import TokenRows
from lightning_peft.strategies.strategy import PEFTStrategy

Server = Literal["hf", "vllm"]
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_VLLM_DEFAULT = 16
_AS_LORA = "lightning-peft convert ADAPTER OUTPUT --to hf --as-lora RANK"
_FORK = (
    f"only the fork of MoRA's authors reads use_mora, released versions of HF peft do not; write its change as a LoRA: {_AS_LORA}"
)


@dataclass
class Verdict:
    """What stands in the way, and what has to be known.

    Args:
        target: ``hf`` or ``vllm``.
        blockers: Reasons for which it does not load, or computes something else, each with the remedy.
        hints: What to set or to know where it loads.
    """

    target: Server
    blockers: list[str] = field(default_factory=list)
    hints: list[str] = field(default_factory=list)

    def text(self) -> str:
        """Return the verdict for a terminal."""
        name = {"hf": "Hugging Face peft", "vllm": "vLLM"}[self.target]
        lines = [f"for {name}: {'does not load as it is' if self.blockers else 'loads'}"]
        lines += [f"  change: {blocker}" for blocker in self.blockers]
        return "\n".join(lines + [f"  note: {hint}" for hint in self.hints])


def suitability(source: str | os.PathLike[str], target: Server, revision: str | None = None) -> Verdict:
    """Tell whether an adapter loads in HF peft or vLLM.

    Args:
        source: Folder of the own format or of HF peft, a Lightning ``.ckpt``, or a repository on the hub.
        target: Where it is to load.
        revision: Branch, tag or commit on the hub.

    Raises:
        FormatError: Nothing is there, or it is damaged.
    """
    path = local_copy(source, revision)
    verdict = Verdict(target)
    if path.exists() and not is_hf_folder(path):
        adapter = read_adapter(path)
        verdict.hints.append(
            "the files are of the own format: convert them first (lightning-peft convert ADAPTER OUTPUT --to hf), which refuses by name what "
            "HF's files cannot say of this model's layers"
        )
        _of_strategy(adapter.strategy, adapter.state, bool(adapter.extra_state), verdict)
    else:
        file = read_folder(path)
        _of_config(file.config, file.tensors, file.where, verdict)
    return verdict


def _of_strategy(strategy: PEFTStrategy, state: Mapping[str, Tensor], extra: bool, verdict: Verdict) -> None:
    singles = _singles(strategy)
    named = ", ".join(type(s).__name__ for s in singles)
    beside = (TokenRows, LNTuning) if len(singles) > 1 else ()
    mains = [s for s in singles if format_for(s) is not None and not isinstance(s, beside)]
    if not mains:
        rest = f" or write its change of the weights as a LoRA: {_AS_LORA}" if strategy.mergeable else ""
        verdict.blockers.append(
            f"HF peft, and so vLLM, has no type for {named}; merge it into the base (lightning-peft merge){rest}"
        )
    elif len(mains) > 1:
        verdict.blockers.append(f"{named} are several methods, and a file has one; write them as one LoRA: {_AS_LORA}")
    if not verdict.blockers:
        tell = _strategy_for_hf if verdict.target == "hf" else _strategy_for_vllm
        tell(mains[0], singles, state, extra, verdict)


def _strategy_for_hf(
    main: PEFTStrategy, singles: list[PEFTStrategy], state: Mapping[str, Tensor], extra: bool, verdict: Verdict
) -> None:
    table = format_for(main)
    assert table is not None
    if table is MORA:
        verdict.blockers.append(_FORK)
    if table is not LORA and any(isinstance(s, (TokenRows, BitFit)) for s in singles if s is not main):
        verdict.blockers.append(
            f"HF peft has token rows and biases beside a LoRA only, not beside {table.peft_type}; save them apart"
        )
    try:
        table.check(main)
    except ConfigError as error:
        verdict.blockers.append(str(error))


def _strategy_for_vllm(
    main: PEFTStrategy, singles: list[PEFTStrategy], state: Mapping[str, Tensor], extra: bool, verdict: Verdict
) -> None:
    if type(main) not in LORA.methods or isinstance(main, DoRA):
        way = (
            f"write its change of the weights as one: {_AS_LORA}"
            if main.mergeable
            else "merging is not possible either; train a LoRA"
        )
        verdict.blockers.append(f"vLLM loads plain LoRA only, and this is {type(main).__name__}; {way}")
        return
    assert isinstance(main, LoRA)
    ranks: Counter[str] = Counter()
    for key, tensor in state.items():
        if key.endswith((".lora_A", ".initial_A", ".finished_A")):
            ranks[key.rpartition(".")[0]] += tensor.shape[-2]
    if main.rank_per_target or main.alpha_per_target:
        verdict.blockers.append(
            f"vLLM reads one rank and alpha for all layers, and this has some of its own; {_AS_LORA} gives all one rank"
        )
    if main.bias != "none" or any(isinstance(s, BitFit) for s in singles):
        verdict.blockers.append("vLLM takes no trained biases; train with bias='none', or merge (lightning-peft merge)")
    if any(isinstance(s, TokenRows) for s in singles):
        verdict.blockers.append("vLLM takes no trained token rows; merge them into the base (lightning-peft merge)")
    if extra or len(singles) > 1 + sum(isinstance(s, TokenRows) for s in singles):
        verdict.blockers.append("vLLM takes no modules_to_save; merge the adapter (lightning-peft merge), or train without them")
    _vllm_rank(max(ranks.values(), default=main.rank), verdict)
    verdict.hints.append(
        "ranks of the parts of a fused projection (GPT-2's c_attn) add up in HF's files: inspect the converted folder again"
    )


def _of_config(config: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str, verdict: Verdict) -> None:
    if verdict.target == "vllm":
        _config_for_vllm(config, tensors, verdict)
        return
    verdict.hints.append("the files are HF peft's own")
    if config.get("use_mora"):
        verdict.blockers.append(_FORK)
    try:
        format_of(config, where).fields.check(config, where)
    except (CompatibilityError, FormatError) as error:
        verdict.hints.append(f"lightning_peft does not read it: {error}")


def _config_for_vllm(config: Mapping[str, Any], tensors: Mapping[str, Tensor], verdict: Verdict) -> None:
    if config["peft_type"] != "LORA":
        verdict.blockers.append(
            f"vLLM loads plain LoRA only, and this is {config['peft_type']}; convert it to the own format and then: {_AS_LORA}"
        )
        return
    if config.get("use_dora"):
        verdict.blockers.append(f"vLLM does not load DoRA; convert it to the own format and then: {_AS_LORA}")
    if config.get("use_mora"):
        verdict.blockers.append(f"MoRA is no LoRA; convert it to the own format and then: {_AS_LORA}")
    if config.get("modules_to_save"):
        verdict.blockers.append("vLLM takes no modules_to_save; merge the adapter with peft, or train without them")
    if config.get("trainable_token_indices"):
        verdict.blockers.append("vLLM takes no trained token rows; merge them into the base")
    if config.get("bias", "none") != "none" or config.get("lora_bias"):
        verdict.blockers.append("vLLM takes no trained biases; train with bias='none', or merge")
    if config.get("rank_pattern") or config.get("alpha_pattern"):
        verdict.blockers.append(
            f"vLLM reads one rank and alpha for all layers, and this has patterns; to give all one: {_AS_LORA}"
        )
    if config.get("target_parameters"):
        verdict.hints.append("LoRA on experts loads in versions of vLLM with fused-expert LoRA only")
    if any(".lora_embedding_" in key or ".lm_head." in key for key in tensors):
        verdict.hints.append(
            "it adapts the token embedding or the head, which vLLM supports for models that list them as embedding_modules"
        )
    ranks = [t.shape[0] for key, t in tensors.items() if key.endswith((".lora_A.weight", ".lora_embedding_A")) and t.dim() == 2]
    _vllm_rank(max(ranks, default=config.get("r", 8)), verdict)


def _vllm_rank(rank: int, verdict: Verdict) -> None:
    fitting = next((most for most in VLLM_RANKS if most >= rank), None)
    if fitting is None:
        verdict.blockers.append(f"rank {rank} is beyond vLLM's largest, {VLLM_RANKS[-1]}; lower it: {_AS_LORA}")
    elif fitting > _VLLM_DEFAULT:
        verdict.hints.append(f"start vLLM with --enable-lora --max-lora-rank {fitting}; its default is {_VLLM_DEFAULT}")
    else:
        verdict.hints.append("start vLLM with --enable-lora")


def _singles(strategy: PEFTStrategy) -> list[PEFTStrategy]:
    if isinstance(strategy, Compose):
        return [single for part in strategy.strategies for single in _singles(part)]
    return [strategy]
