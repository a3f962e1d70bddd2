"""Save, then load into a fresh model: the same output, bit for bit, from a file that holds the owned tensors only."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch

import lightning_peft as lp
from lightning_peft.errors import FormatError
from lightning_peft.surgery.anatomy import anatomy_of
from lightning_peft.surgery.inject import apply_plan
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


@over(WORKING)
def test_an_adapter_is_made_in_the_room_that_its_file_takes(case: Case) -> None:
    """Every tensor comes from ``BuildContext.empty``, so that a forged strategy gets no more memory than its file has numbers."""
    model, handle = case.installed()
    own = sum(slot.tensor().numel() for slot in handle.slots if not slot.claimed)
    handle.remove()
    anatomy = anatomy_of(model)
    plan = case.strategy.plan(anatomy)
    apply_plan(model, plan, anatomy, case.strategy, name="enough", room=own).remove()
    if own:
        with pytest.raises(FormatError, match="finds no room"):
            apply_plan(model, plan, anatomy, case.strategy, name="too-little", room=own - 1)
    assert lp.handles(model) == {}
