from __future__ import annotations

from pathlib import Path

import torch

from examples.vision_callback import Digits, main


def test_callback_adapts_an_existing_vision_module(tmp_path: Path) -> None:
    accuracy = main(tmp_path, epochs=4)
    assert accuracy["before"] < 0.4  # other digits
    assert accuracy["after"] > 0.75
    assert accuracy["again"] == accuracy["after"]
    state = torch.load(next((tmp_path / "checkpoints").iterdir()), weights_only=True)["state_dict"]
    assert not any(k in state for k in Digits().state_dict() if k.startswith("body."))
    assert {"head.weight", "head.bias"} <= set(state)
