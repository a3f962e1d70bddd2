"""``init_from``: what lies beside the adapter finds its place in another module too, or is announced."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lightning_peft as lp
from tests.training.toys import Plain, callback, loader, trainer

STRATEGY = lp.LoRA(rank=2, targets=["0"])


class Renamed(Plain):
    """The same network under another name."""

    def __init__(self) -> None:
        super().__init__()
        self.model, self.net = self.net, None

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


def _saved(folder: Path) -> tuple[nn.Module, Path]:
    module = Plain()
    options = {"module": "net", "extra_modules": ["net.3"], "export": str(folder / "adapter")}
    trainer(folder, callback(STRATEGY, **options)).fit(module, loader(8))
    return module, folder / "adapter" / "last"


def test_a_trained_head_below_the_root_follows_the_root(tmp_path: Path) -> None:
    first, adapter = _saved(tmp_path)
    second = Renamed()
    callback(STRATEGY, module="model", extra_modules=["model.3"], init_from=adapter).apply(second)
    x = torch.randn(4, 32)
    assert torch.equal(first.eval()(x), second.eval()(x))


def test_what_has_no_place_is_announced(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    handle = lp.inject(Plain().net, STRATEGY)
    lp.save_adapter(handle, folder, extra_state={"scale": torch.ones(2)})
    with pytest.warns(UserWarning, match=r"also holds 'scale', for which Plain has no place"):
        callback(STRATEGY, module="net", init_from=folder).apply(Plain())


def test_a_base_that_cannot_be_compared_is_announced(tmp_path: Path) -> None:
    with torch.device("meta"):
        bare = Plain()
        bare.net = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 2))
    _, adapter = _saved(tmp_path)
    with (
        pytest.warns(UserWarning, match="could not be compared"),
        pytest.raises(lp.errors.CompatibilityError, match="meta device"),
    ):
        callback(STRATEGY, module="net", extra_modules=["net.3"], init_from=adapter).apply(bare)
