"""Which table belongs to a strategy, and which to a file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_peft.errors import CompatibilityError, did_you_mean
from lightning_peft.interop import lora, lora_kin, parts, prompts, weights
from lightning_peft.interop.table import Format
from lightning_peft.strategies.strategy import PEFTStrategy

FORMATS: tuple[Format, ...] = (
    lora.LORA,
    lora_kin.MORA,
    lora_kin.ADALORA,
    weights.VERA,
    weights.LOHA,
    weights.LOKR,
    weights.OFT_,
    weights.HRA_,
    weights.IA3_,
    parts.LN_TUNING,
    parts.TRAINABLE_TOKENS,
    prompts.PROMPT_TUNING,
    prompts.P_TUNING,
    prompts.PREFIX_TUNING,
)
PROMPTS = frozenset({"PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING"})

# Types of HF peft whose files hold something else than their config says, or than HF itself computes elsewhere.
_DEFECTS = {
    "BOFT": "its layers have one butterfly factor on a machine without the CUDA extension, whatever the config says",
    "RANDLORA": "its files hold the frozen bases once more for every layer",
    "XLORA": "it mixes other adapters, which are not in its file",
}


def format_for(strategy: PEFTStrategy) -> Format | None:
    """Return the table with which a strategy is written, None where HF has no type for it."""
    return next((f for f in FORMATS if type(strategy) in f.methods), None)


def format_of(config: Mapping[str, Any], where: str) -> Format:
    """Return the table with which a file is read.

    Raises:
        CompatibilityError: Its type is none that is here.
    """
    name = config["peft_type"]
    for candidate in FORMATS:
        if candidate.peft_type == name and (candidate is lora_kin.MORA) == (name == "LORA" and config.get("use_mora") is True):
            return candidate
    known = list(dict.fromkeys(f.peft_type for f in FORMATS))
    why = f" ({_DEFECTS[name]})" if name in _DEFECTS else ""
    raise CompatibilityError(
        f"{where} is of type {name}, which lightning_peft does not read{why}.{did_you_mean(name, known)} It reads {', '.join(known)}. Merge "
        "it with peft (merge_and_unload, then save_pretrained) and use the result as the base."
    )
