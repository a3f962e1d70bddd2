"""A method adds positions where it says so, and nowhere else: the number of keys that attention looks at."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

import lightning_peft as lp
from tests.backbones import BACKBONES, run
from tests.contract.cases import WORKING, Case, over


class Keys(TorchFunctionMode):
    """Notes for every attention how many keys it looks at."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[int] = set()

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:  # (..., keys, d)
            self.seen.add(args[1].shape[-2])
        elif func is F.multi_head_attention_forward:  # (keys, batch, d)
            self.seen.add(args[1].shape[0])
        return func(*args, **(kwargs or {}))


def keys(model: nn.Module, batch: dict[str, Tensor]) -> set[int]:
    with Keys() as counted:
        run(model, batch)
    return counted.seen


ATTENDING = {name for name, backbone in BACKBONES.items() if keys(backbone.fresh(), backbone.batch())}


@over([case for case in WORKING if case.backbone.name in ATTENDING])
def test_attention_sees_more_keys_where_that_is_promised_and_nowhere_else(case: Case) -> None:
    batch = case.backbone.batch()
    model, handle = case.installed()
    with handle.disabled():
        before = keys(model, batch)
    after = keys(model, batch)
    if case.strategy.adds_positions:
        assert max(after) > max(before)
    else:
        assert after == before


PREFIX, PROMPT = lp.PrefixTuning(num_virtual_tokens=3), lp.PromptTuning(num_virtual_tokens=3)
MADE_OF_OTHERS = {
    "gated": (lp.Gated(part=PREFIX, gate="static"), True),
    "composed": (lp.Compose(parts=("bitfit", lp.Compose(parts=("lora", PROMPT)))), True),
    "neither": (lp.Compose(parts=("bitfit", lp.Gated(part="lora"))), False),
}


@pytest.mark.parametrize("name", MADE_OF_OTHERS)
def test_what_is_made_of_others_adds_positions_where_a_part_does(name: str) -> None:
    strategy, adds = MADE_OF_OTHERS[name]
    assert strategy.adds_positions is adds
    model, batch = BACKBONES["llama"].fresh(), BACKBONES["llama"].batch()
    lp.inject(model, strategy)
    assert max(keys(model, batch)) == batch["input_ids"].shape[1] + 3 * adds


def test_every_method_that_attends_is_seen() -> None:
    assert set(BACKBONES) - {"conv_net", "unet", "experts"} == ATTENDING
