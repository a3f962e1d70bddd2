"""``init_from``: what lies beside the adapter finds its place in another module too, or is announced."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn

import lightning_peft as lp
from tests.training.toys import Plain, adapter_state, callback, loader, network, same, trainer

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


def test_an_adapter_that_is_there_already_is_a_conflict(tmp_path: Path) -> None:
    _, adapter = _saved(tmp_path)
    module = Plain()
    callback(STRATEGY, module="net").apply(module)
    again = callback(STRATEGY, module="net", extra_modules=["net.3"], init_from=adapter)
    with pytest.raises(lp.errors.ConflictError, match="init_from=.* would be ignored"):
        trainer(tmp_path, again).fit(module, loader(8))
    assert list(lp.handles(module)) == ["default"]


def test_a_second_fit_with_the_same_callback_goes_on(tmp_path: Path) -> None:
    first, adapter = _saved(tmp_path)
    module = Plain()
    peft = callback(STRATEGY, module="net", extra_modules=["net.3"], init_from=adapter)
    peft.apply(module)
    trainer(tmp_path, peft).fit(module, loader(8))
    trained = adapter_state(module)
    copied = copy.deepcopy(module)
    run = trainer(tmp_path, pickle.loads(pickle.dumps(peft)))  # as in a child process
    run.validate(copied, loader(8, shuffle=False), verbose=False)
    assert same(trained, adapter_state(copied))
    assert not same(trained, adapter_state(first))


class Materialises(SingleDeviceStrategy):
    """Puts values where the module is, as a sharded strategy does."""

    scale = 1.0

    def model_to_device(self) -> None:
        net = self.lightning_module.net.to_empty(device="cpu")
        values = network()
        with torch.no_grad():
            for index in (0, 3):
                net[index].weight.copy_(values[index].weight * self.scale)
                net[index].bias.copy_(values[index].bias)


class OnMeta(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.net = self.net.to("meta")


@pytest.mark.filterwarnings("ignore:adapter 'default'. the base weights could not be compared")
@pytest.mark.parametrize("scale", [1.0, 1.5])
def test_the_base_is_checked_once_it_has_values(scale: float, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    handle = lp.inject(Plain().net, STRATEGY)
    nn.init.ones_(handle.slots[0].tensor())
    lp.save_adapter(handle, folder)
    module, strategy = OnMeta(), Materialises(device=torch.device("cpu"))
    strategy.scale = scale
    run = trainer(tmp_path, callback(STRATEGY, module="net", init_from=folder, gradient_sentinel="off"), strategy=strategy)
    if scale == 1.0:
        run.fit(module, loader(8))
        assert set(adapter_state(module)) == {"net.0.peft.default.lora_A", "net.0.peft.default.lora_B"}
        assert torch.allclose(adapter_state(module)["net.0.peft.default.lora_A"], torch.ones(2, 32), atol=0.1)
    else:
        with pytest.raises(lp.errors.CompatibilityError, match="another base model"):
            run.fit(module, loader(8))


class MaterialisesFirst(Materialises):
    restore_checkpoint_after_setup = True


@pytest.mark.filterwarnings("ignore:adapter 'default'. the base weights could not be compared")
@pytest.mark.filterwarnings("ignore:for net.*copying from a non-meta parameter")
def test_a_resumed_run_goes_on_from_its_checkpoint_and_not_from_init_from(tmp_path: Path) -> None:
    handle = lp.inject(Plain().net, STRATEGY)
    nn.init.ones_(handle.slots[0].tensor())
    lp.save_adapter(handle, tmp_path / "adapter")
    options = {"module": "net", "init_from": tmp_path / "adapter", "gradient_sentinel": "off"}
    run = trainer(tmp_path, callback(STRATEGY, **options), strategy=MaterialisesFirst(device=torch.device("cpu")))
    module = OnMeta()
    run.fit(module, loader(8))
    run.save_checkpoint(tmp_path / "a.ckpt")

    class Look(pl.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            assert same(adapter_state(pl_module), adapter_state(module))

    strategy = MaterialisesFirst(device=torch.device("cpu"))
    run = trainer(tmp_path, callback(STRATEGY, **options), Look(), strategy=strategy, max_epochs=2)
    run.fit(OnMeta(), loader(8), ckpt_path=tmp_path / "a.ckpt")
    assert run.global_step == 4
    late = trainer(tmp_path, callback(STRATEGY, **options), strategy=Materialises(device=torch.device("cpu")), max_epochs=2)
    with pytest.raises(NotImplementedError, match="meta") as caught:  # Lightning then moves the module to the CPU
        late.fit(OnMeta(), loader(8), ckpt_path=tmp_path / "a.ckpt")
    assert isinstance(caught.value.__context__, lp.errors.CompatibilityError)
    assert "read while the module is on the meta device" in str(caught.value.__context__)
