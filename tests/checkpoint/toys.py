"""A small model, adapters that have moved, and the state by which "untouched" is judged."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import lightning_peft as lp

LORA = lp.LoRA(rank=2, targets=["up", "down"])
STRATEGIES: dict[str, Any] = {
    "lora": LORA,
    "bitfit": lp.BitFit(),
    "vera": lp.VeRA(rank=4, targets=["up", "down"]),
    "lora with biases": lp.LoRA(rank=2, targets=["up"], bias="all", alpha_per_target={"up": 3.0}),
    "composed": lp.Compose(parts=(LORA, lp.BitFit())),
    "full": lp.Full(),
}


class Net(nn.Module):
    def __init__(self, seed: int = 0, width: int = 12) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.up, self.down = nn.Linear(8, width), nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


class Whole(nn.Module):
    """What a LightningModule looks like: the base as one child, a head beside it."""

    def __init__(self, seed: int = 0, head_seed: int = 0, classes: int = 3) -> None:
        super().__init__()
        self.net = Net(seed)
        torch.manual_seed(100 + head_seed)
        self.head = nn.Linear(4, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.net(x))


def x(seed: int = 5) -> Tensor:
    return torch.randn(3, 8, generator=torch.Generator().manual_seed(seed))


def adapted(model: nn.Module, strategy: Any = LORA, name: str = "default", *, seed: int = 0, **more: Any) -> lp.Handle:
    """Inject and move every owned number, as training would."""
    handle = lp.inject(model, strategy, name, **more)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in handle.trainable_parameters():
            p.add_(torch.randn(p.shape, generator=generator).to(p))
    return handle


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Return all that an injection could change."""
    return {
        "values": {k: v.clone() for k, v in model.state_dict().items()},
        "grad": [(n, p.requires_grad) for n, p in model.named_parameters()],
        "modules": [(n, type(m), "forward" in m.__dict__) for n, m in model.named_modules()],
        "handles": list(lp.handles(model)),
    }


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert list(before["values"]) == list(after["values"])
    assert all(torch.equal(v, after["values"][k]) for k, v in before["values"].items())
    assert before["grad"] == after["grad"]
    assert before["modules"] == after["modules"]
    assert before["handles"] == after["handles"]
