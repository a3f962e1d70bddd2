"""Save, then load into a fresh model: the same output, bit for bit, from a file that holds the owned tensors only."""

from __future__ import annotations

from pathlib import Path

import safetensors.torch
import torch

import lightning_peft as lp
from tests.backbones import run
from tests.contract.cases import WORKING, Case, over, train


@over(WORKING)
def test_save_and_load_give_the_same_output(case: Case, tmp_path: Path) -> None:
    batch = case.backbone.batch()
    model, handle = case.installed(name="trained")
    train(model, handle, batch)
    expected = run(model, batch)
    lp.save_adapter(handle, tmp_path / "adapter")
    (file,) = (tmp_path / "adapter").glob("*.safetensors")
    stored = safetensors.torch.load_file(file)
    assert set(stored) == {slot.key for slot in handle.slots}, "owned tensors and nothing else"
    fresh = case.fresh()
    torch.manual_seed(99)  # another start than that of the saved adapter
    loaded = lp.load_adapter(fresh, tmp_path / "adapter", name="loaded")
    assert loaded.strategy == handle.strategy
    assert torch.equal(run(fresh, batch), expected)
    assert lp.handles(fresh) == {"loaded": loaded}
