"""QLoRA, arXiv 2305.14314, and DoRA on a 4-bit base: LoRA and DoRA, on the base that they ask for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import lightning_peft as lp
from lightning_peft.errors import ConfigError, UnsupportedLayerError
from lightning_peft.quantization.backend import backend_of
from tests.backbones import BACKBONES, run
from tests.contract.cases import assert_same, snapshot

PRESETS = [("qlora", lp.QLoRA, lp.LoRA), ("qdora", lp.QDoRA, lp.DoRA)]
BOTH = pytest.mark.parametrize(("name", "cls", "plain"), PRESETS, ids=["qlora", "qdora"])


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.classifier = nn.Linear(16, 64), nn.Linear(64, 64), nn.Linear(64, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(torch.tanh(self.down(torch.tanh(self.up(x)))))


class Project(pl.LightningModule):
    def __init__(self, scheme: str | None = None) -> None:
        super().__init__()
        self.net = Net()
        if scheme is not None:
            lp.quantize(self.net, scheme)

    def training_step(self, batch: Any, _: int) -> torch.Tensor:
        return self.net(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def dequantize(module: nn.Module) -> torch.Tensor:
    backend = backend_of(module)
    assert backend is not None
    assert isinstance(module, nn.Linear)
    return backend.dequantize(module)


@BOTH
def test_defaults_are_those_of_the_paper(name: str, cls: type[lp.LoRA], plain: type[lp.LoRA]) -> None:
    strategy = lp.resolve(name)
    assert isinstance(strategy, cls)
    assert isinstance(strategy, plain)
    assert (strategy.rank, strategy.alpha, strategy.dropout) == (64, 16.0, 0.1)
    assert strategy.targets == lp.Targets(include=("all-linear",))
    assert strategy.info.lr == 2e-4
    assert strategy.base_quantization == "nf4"
    assert strategy.to_dict() == {"class_path": cls.__name__, "init_args": {}}
    with pytest.raises(ConfigError, match="targets"):
        cls(targets=None)


@BOTH
@pytest.mark.parametrize("scheme", ["nf4", "fp4", "int8"])
def test_it_is_the_plain_method_over_the_dequantized_weights(
    name: str, cls: type[lp.LoRA], plain: type[lp.LoRA], scheme: str
) -> None:
    model, dense = Net(), Net()
    lp.quantize(model, scheme)
    handle = lp.inject(model, cls(rank=4, dropout=0.0))
    paths = [entry.path for entry in handle.entries]
    assert paths == ["up", "down", "classifier"] or paths == ["up", "down"]
    with torch.no_grad():
        for path, module in model.named_modules():
            if backend_of(module) is not None:
                dense.get_submodule(path).weight.copy_(dequantize(module))
    twin = lp.inject(dense, plain(rank=4, targets=paths))
    with torch.no_grad():
        for p in handle.trainable_parameters():
            p.add_(0.1 * torch.randn_like(p))
    twin.load_state_dict(handle.state_dict())
    x = torch.randn(5, 16)
    torch.testing.assert_close(model(x), dense(x), rtol=1e-5, atol=1e-5)
    for each in (model, dense):
        each(x).square().mean().backward()
    for a, b in zip(handle.trainable_parameters(), twin.trainable_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)


@BOTH
@pytest.mark.parametrize("composed", [False, True])
def test_a_dense_base_is_refused_with_the_remedy(name: str, cls: type[lp.LoRA], plain: type[lp.LoRA], composed: bool) -> None:
    model = BACKBONES["llama"].fresh()
    before = snapshot(model)
    strategy: Any = [cls(rank=2), lp.BitFit()] if composed else cls(rank=2)
    with pytest.raises(UnsupportedLayerError, match=r"none of the 14 layers.*lp.quantize\(model, 'nf4'\).*quantization='auto'"):
        lp.inject(model, strategy)
    assert_same(snapshot(model), before)


@BOTH
def test_what_it_trained_runs_and_merges_on_the_dense_base(
    name: str, cls: type[lp.LoRA], plain: type[lp.LoRA], tmp_path: Path
) -> None:
    model = Net()
    lp.quantize(model, "nf4")
    handle = lp.inject(model, cls(rank=4))
    with torch.no_grad():
        for p in handle.trainable_parameters():
            p.add_(0.1 * torch.randn_like(p))
    lp.save_adapter(handle, tmp_path / "adapter")
    dense = Net().eval()
    loaded = lp.load_adapter(dense, tmp_path / "adapter")
    assert loaded.strategy == handle.strategy
    x = torch.randn(5, 16)
    expected = dense(x).detach()
    loaded.merge()
    loaded.remove()
    torch.testing.assert_close(dense(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:The dirpath has changed")  # Lightning's, of a run that goes on in another folder
@pytest.mark.parametrize(
    "strategy",
    ["qlora", pytest.param("qdora", marks=pytest.mark.slow), [lp.QLoRA(rank=4), lp.BitFit()]],
    ids=["qlora", "qdora", "composed"],
)
def test_the_callback_quantizes_for_it_and_resumes(strategy: Any, tmp_path: Path) -> None:
    if isinstance(strategy, str):
        strategy = {"class_path": strategy, "init_args": {"rank": 4}}
    data = DataLoader(torch.randn(8, 16, generator=torch.Generator().manual_seed(1)), batch_size=4)

    def fit(name: str, epochs: int, ckpt: str | None = None) -> tuple[Project, pl.Trainer]:
        module = Project()
        trainer = pl.Trainer(
            max_epochs=epochs, callbacks=[lp.PEFTCallback(strategy, verbose=False)], default_root_dir=tmp_path / name, accelerator="cpu",
            logger=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        pl.seed_everything(3)
        trainer.fit(module, data, ckpt_path=ckpt, weights_only=True if ckpt else None)
        return module, trainer

    whole, _ = fit("whole", 2)
    assert all(backend_of(whole.net.get_submodule(path)) is not None for path in ("up", "down"))
    before = {path: dequantize(whole.net.get_submodule(path)) for path in ("up", "down")}
    reference = Net()
    lp.quantize(reference, "nf4")
    assert all(torch.equal(dequantize(reference.get_submodule(path)), value) for path, value in before.items())
    _, first = fit("first", 1)
    resumed, _ = fit("second", 2, first.checkpoint_callback.best_model_path)
    expected, found = (lp.handles(module)["default"].state_dict() for module in (whole, resumed))
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    again = lp.load_from_checkpoint(Project, first.checkpoint_callback.best_model_path)
    assert backend_of(again.net.up) is not None


def callback_on(module: Project, **options: Any) -> lp.Handle:
    return lp.PEFTCallback(lp.QLoRA(rank=4), verbose=False, **options).apply(module)


def test_auto_leaves_a_base_that_is_quantized_in_another_way() -> None:
    module = Project("int8")
    handle = callback_on(module)
    backend = backend_of(module.net.up)
    assert backend is not None
    assert backend.config(module.net.up).scheme == "int8"
    assert "quantization" not in handle.usage
    assert callback_on(Project()).usage["quantization"]["scheme"] == "nf4"


def test_an_outright_wish_is_followed() -> None:
    module = Project()
    callback_on(module, quantization={"scheme": "fp4", "block_size": 128})
    backend = backend_of(module.net.up)
    assert backend is not None
    assert (backend.config(module.net.up).scheme, backend.config(module.net.up).block_size) == ("fp4", 128)
    with pytest.raises(UnsupportedLayerError, match="none of the"):
        callback_on(Project(), quantization=None)


def test_auto_does_nothing_for_methods_of_dense_bases() -> None:
    module = Project()
    lp.PEFTCallback(lp.LoRA(rank=4, targets="all-linear"), verbose=False).apply(module)
    assert all(backend_of(m) is None for m in module.modules())


def test_the_module_quantizes_a_model_for_it() -> None:
    base = BACKBONES["llama"].fresh()
    module = lp.PEFTLightningModule({"class_path": "QLoRA", "init_args": {"rank": 4, "dropout": 0.0}}, base=base)
    assert backend_of(module.base.model.layers[0].self_attn.q_proj) is not None
    assert len(module.handle.entries) == 14
    assert torch.isfinite(run(module.base, BACKBONES["llama"].batch())).all()
