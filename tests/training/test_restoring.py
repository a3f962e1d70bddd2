"""Files that do not fit a run are refused by name, before anything changes; those that differ in wrappers only are taken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import nn

import lightning_peft as lp
from lightning_peft.errors import CompatibilityError, MergeError
from tests.training.toys import Plain, adapter_state, base_state, callback, loader, same, trainer

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
ONE = lp.LoRA(rank=2, targets=["0"])


class Sized(Plain):
    """The last layer has a size of its own; the loss needs two outputs."""

    def __init__(self, outputs: int = 2) -> None:
        super().__init__()
        self.net[3] = nn.Linear(16, outputs)

    def forward(self, x: Any) -> Any:
        return super().forward(x)[:, :2]


class Compiled(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.compile(self.net, backend="eager")


def saved(folder: Path, module: Any, *callbacks: Any, epochs: int = 1) -> Path:
    run = trainer(folder, *callbacks, max_epochs=epochs)
    run.fit(module, loader(8))
    run.save_checkpoint(folder / "x.ckpt")
    return folder / "x.ckpt"


# ---------------------------------------------------------------------- a checkpoint from before PEFT


def test_shapes_of_a_checkpoint_from_before_peft_are_checked_before_anything_changes(tmp_path: Path) -> None:
    path = saved(tmp_path, Sized(5))
    module = Sized(3)
    before = module.state_dict()
    before = {key: value.clone() for key, value in before.items()}
    with pytest.raises(CompatibilityError, match=r"'net\.3\.weight' has shape \(5, 16\), Sized expects \(3, 16\)"):
        trainer(tmp_path, callback(ONE)).fit(module, loader(8), ckpt_path=path)
    assert same(before, dict(module.state_dict()))


def test_keys_of_a_checkpoint_from_before_peft_are_checked_before_anything_changes(tmp_path: Path) -> None:
    class More(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.more = nn.Linear(2, 2)

        def forward(self, x: Any) -> Any:
            return self.more(self.net(x))

    path = saved(tmp_path, More())
    module = Plain()
    before = base_state(module)
    with pytest.raises(CompatibilityError, match=r"no place for 'more\.bias', 'more\.weight'"):
        trainer(tmp_path, callback(ONE)).fit(module, loader(8), ckpt_path=path)
    assert same(before, dict(module.state_dict()))


# ---------------------------------------------------------------------- extra modules


@pytest.mark.parametrize("holds", ["adapter", "full"])
def test_forgotten_extra_modules_are_named(holds: Any, tmp_path: Path) -> None:
    path = saved(tmp_path, Plain(), callback(ONE, extra_modules=["3"], checkpoint=holds))
    with pytest.raises(CompatibilityError, match=r"also holds 'net\.3\.bias', 'net\.3\.weight'.*extra_modules=\['net\.3'\]"):
        trainer(tmp_path, callback(ONE, checkpoint=holds), max_epochs=2).fit(Plain(), loader(8), ckpt_path=path)


def test_added_extra_modules_are_named(tmp_path: Path) -> None:
    path = saved(tmp_path, Plain(), callback(ONE))
    with pytest.raises(CompatibilityError, match=r"lacks 'net\.3\.bias', 'net\.3\.weight', which trains here"):
        trainer(tmp_path, callback(ONE, extra_modules=["3"]), max_epochs=2).fit(Plain(), loader(8), ckpt_path=path)


def test_a_part_outside_the_root_may_have_been_frozen_meanwhile(tmp_path: Path) -> None:
    class Beside(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(2, 2)

        def forward(self, x: Any) -> Any:
            return self.head(self.net(x))

    module = Beside()
    path = saved(tmp_path, module, callback(ONE, module="net"))
    again = Beside()
    again.head.requires_grad_(False)
    trainer(tmp_path, callback(ONE, module="net")).test(again, loader(8, shuffle=False), ckpt_path=path, verbose=False)
    assert torch.equal(again.head.weight, module.head.weight)


def test_size_of_a_trained_head_is_checked_before_anything_changes(tmp_path: Path) -> None:
    class Beside(Plain):
        def __init__(self, outputs: int) -> None:
            super().__init__()
            self.head = nn.Linear(2, outputs)

        def forward(self, x: Any) -> Any:
            return self.head(self.net(x))[:, :2]

    path = saved(tmp_path, Beside(5), callback(ONE, module="net"))
    module, peft = Beside(3), callback(ONE, module="net")
    peft.apply(module)
    before = adapter_state(module)
    with pytest.raises(CompatibilityError, match=r"'head\.bias' has shape \(5,\), the module expects \(3,\)"):
        trainer(tmp_path, peft).fit(module, loader(8), ckpt_path=path)
    assert same(before, adapter_state(module))


# ---------------------------------------------------------------------- torch.compile on one side


@pytest.mark.parametrize(("before", "after"), [(Compiled, Plain), (Plain, Compiled)])
@pytest.mark.parametrize("holds", ["adapter", "full"])
def test_a_compiled_network_resumes_as_the_same_network(before: Any, after: Any, holds: Any, tmp_path: Path) -> None:
    first, second = before(), after()
    path = saved(tmp_path, first, callback(ONE, extra_modules=["3"], checkpoint=holds))
    run = trainer(tmp_path, callback(ONE, extra_modules=["3"], checkpoint=holds), max_epochs=1)
    run.fit(second, loader(8), ckpt_path=path)  # ended already: what was restored is what is there
    assert run.global_step == 2
    x = torch.randn(3, 32)
    assert torch.equal(first.eval()(x), second.eval()(x))


def test_a_compiled_network_resumes_its_average(tmp_path: Path) -> None:
    first, second = Compiled(), Plain()
    path = saved(tmp_path, first, callback(ONE), EMAWeightAveraging(decay=0.5))
    trainer(tmp_path, callback(ONE), EMAWeightAveraging(decay=0.5), max_epochs=2).fit(second, loader(8), ckpt_path=path)
    assert not torch.equal(adapter_state(second)["net.0.peft.default.lora_B"], torch.zeros(16, 2))


@pytest.mark.parametrize(("before", "after"), [(Compiled, Plain), (Plain, Compiled)])
def test_a_compiled_checkpoint_from_before_peft_becomes_the_base(before: Any, after: Any, tmp_path: Path) -> None:
    first, second = before(), after()
    path = saved(tmp_path, first, epochs=2)
    trainer(tmp_path, callback(ONE)).fit(second, loader(8), ckpt_path=path)
    x = torch.randn(3, 32)
    with lp.handles(second)["default"].disabled():
        assert torch.equal(first.eval()(x), second.eval()(x))


# ---------------------------------------------------------------------- what is left behind


def test_a_refused_checkpoint_leaves_no_adapter(tmp_path: Path) -> None:
    path = saved(tmp_path, Plain(), callback(ONE))
    module = Plain()
    nn.init.normal_(module.net[0].weight)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    with pytest.raises(CompatibilityError, match="another base model"):
        trainer(tmp_path, callback(ONE)).fit(module, loader(8), ckpt_path=path)
    assert same(before, dict(module.state_dict()))
    assert all(p.requires_grad for p in module.parameters())


def test_a_refused_checkpoint_leaves_an_adapter_that_was_there(tmp_path: Path) -> None:
    path = saved(tmp_path, Plain(), callback(ONE))
    module, peft = Plain(), callback(ONE)
    nn.init.normal_(module.net[0].weight)
    handle = peft.apply(module)
    with pytest.raises(CompatibilityError, match="another base model"):
        trainer(tmp_path, peft).fit(module, loader(8), ckpt_path=path)
    assert lp.handles(module) == {"default": handle}


@pytest.mark.parametrize("holds", ["adapter", "full"])
def test_nothing_is_saved_while_the_adapter_is_merged(holds: Any, tmp_path: Path) -> None:
    """A full file would hold the effect twice: in the base, and as an adapter."""
    module = Plain()
    run = trainer(tmp_path, callback(ONE, checkpoint=holds, merge_on_end=True))
    run.fit(module, loader(8))
    with pytest.raises(MergeError, match="saving while adapter 'default' is merged"):
        run.save_checkpoint(tmp_path / "x.ckpt")
    lp.handles(module)["default"].unmerge()
    run.save_checkpoint(tmp_path / "x.ckpt")
    again = lp.load_from_checkpoint(Plain, tmp_path / "x.ckpt") if holds == "adapter" else None
    x = torch.randn(3, 32)
    assert again is None or torch.allclose(again.eval()(x), module.eval()(x), atol=1e-6)
