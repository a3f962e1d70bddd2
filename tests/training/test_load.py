"""``lp.load_from_checkpoint``: a checkpoint back into the user's own class."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import lightning_peft as lp
from tests.training.toys import Plain, callback, loader, trainer


class WithHead(Plain):
    """A new head lies inside the adapted root."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net.append(nn.Linear(self.net[-1].out_features, self.net[-1].out_features))


def test_an_extra_module_inside_the_adapted_root_comes_back_and_trains_on(tmp_path: Path) -> None:
    module = WithHead()
    head = f"net.{len(module.net) - 1}"
    run = trainer(tmp_path, callback(lp.LoRA(rank=2, targets=["net.0"]), extra_modules=[head]))
    run.fit(module, loader(8))
    run.save_checkpoint(tmp_path / "x.ckpt")
    again = lp.load_from_checkpoint(WithHead, tmp_path / "x.ckpt")
    x = torch.randn(3, module.net[0].in_features)
    assert torch.equal(module.eval()(x), again.eval()(x))
    trains = {name for name, p in again.named_parameters() if p.requires_grad}
    assert trains == {name for name, p in module.named_parameters() if p.requires_grad}
    assert f"{head}.weight" in trains


class Compiled(Plain):
    """Compiles its network itself."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.compile(self.net, backend="eager")


@pytest.mark.parametrize(("saved", "wanted"), [(Compiled, Plain), (Plain, Compiled), (Compiled, Compiled)])
def test_a_compiled_network_is_the_same_network(saved: type[Plain], wanted: type[Plain], tmp_path: Path) -> None:
    module = saved()
    run = trainer(tmp_path, callback(lp.LoRA(rank=2, targets=["0"]), extra_modules=["3"]))
    run.fit(module, loader(8))
    run.save_checkpoint(tmp_path / "x.ckpt")
    again = lp.load_from_checkpoint(wanted, tmp_path / "x.ckpt")
    x = torch.randn(3, 32)
    assert torch.equal(module.eval()(x), again.eval()(x))


ANATOMY = {"name": "own", "stacks": [{"blocks": "layers", "roles": {"mlp.up": "first"}}]}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


class Own(nn.Module):
    """An architecture that the package does not know."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.layers = nn.ModuleList([Block(), Block()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers[1](self.layers[0](x))[:, :2]


class WithOwn(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.net = Own()


def test_roles_of_a_callback_with_its_own_anatomy_come_back(tmp_path: Path) -> None:
    module = WithOwn()
    run = trainer(tmp_path, callback(lp.LoRA(rank=2, targets=["mlp.up"]), anatomy=ANATOMY))
    run.fit(module, loader(8))
    run.save_checkpoint(tmp_path / "x.ckpt")
    with pytest.raises(lp.errors.TargetError, match=r"mlp\.up"):
        lp.load_from_checkpoint(WithOwn, tmp_path / "x.ckpt")
    again = lp.load_from_checkpoint(WithOwn, tmp_path / "x.ckpt", anatomy=ANATOMY)
    x = torch.randn(3, 32)
    assert torch.equal(module.eval()(x), again.eval()(x))
    assert {entry.key for entry in lp.handles(again)["default"].entries} == {"layers.0.first", "layers.1.first"}
