from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import pytorch_lightning
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn

import lightning_peft as lp
from lightning_peft.errors import ConfigError, ConflictError, TargetError, UnknownMethodError
from tests.training.toys import (
    EarlyOptimizer,
    InConfigureModel,
    InSetup,
    Plain,
    adapter_state,
    base_state,
    callback,
    loader,
    network,
    same,
    trainer,
)


@pytest.mark.parametrize("cls", [Plain, InSetup, InConfigureModel, EarlyOptimizer])
def test_fit_trains_the_adapter_and_nothing_else(cls: type[Plain], tmp_path: Path) -> None:
    module = cls()
    run = trainer(tmp_path, callback())
    run.fit(module, loader())
    adapter = adapter_state(module)
    assert sorted(adapter) == [f"net.{i}.peft.default.lora_{m}" for i in (0, 3) for m in "AB"]
    assert same(base_state(module), {f"net.{k}": v for k, v in network().state_dict().items()})
    assert all(adapter[f"net.{i}.peft.default.lora_B"].abs().max() > 0 for i in (0, 3))
    trained = {id(p) for g in run.optimizers[0].param_groups for p in g["params"]}
    assert trained == {id(p) for p in lp.handles(module)["default"].trainable_parameters()}


@pytest.mark.parametrize("cls", [Plain, InSetup, InConfigureModel])
def test_module_is_left_clean(cls: type[Plain], tmp_path: Path) -> None:
    module = cls()
    attributes = set(vars(module))
    trainer(tmp_path, callback()).fit(module, loader())
    assert set(vars(module)) == attributes
    assert type(module) is cls
    assert not module._load_state_dict_post_hooks
    assert module.strict_loading
    twin = pickle.loads(pickle.dumps(module))
    x = torch.randn(2, 32)
    assert torch.equal(twin.eval()(x), module.eval()(x))


@pytest.mark.parametrize("cls", [Plain, InSetup, InConfigureModel])
def test_module_is_left_clean_after_an_error(cls: type[Plain], tmp_path: Path) -> None:
    class Broken(pl.Callback):
        def on_train_start(self, *args: Any) -> None:
            raise RuntimeError("boom")

    module = cls()
    attributes = set(vars(module))
    with pytest.raises(RuntimeError, match="boom"):
        trainer(tmp_path, callback(), Broken()).fit(module, loader())
    assert set(vars(module)) == attributes
    trainer(tmp_path, callback()).fit(module, loader())


def test_pytorch_lightning_namespace(tmp_path: Path) -> None:
    class Other(pytorch_lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net: Any = None

        configure_model = InConfigureModel.configure_model
        forward, loss = Plain.forward, Plain.loss

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.loss(batch)

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=0.01)

    module = Other()
    options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    run = pytorch_lightning.Trainer(default_root_dir=tmp_path, max_epochs=1, callbacks=[callback(export=True)], **options)
    run.fit(module, loader())
    assert adapter_state(module)["net.0.peft.default.lora_B"].abs().max() > 0
    (file,) = (tmp_path / "checkpoints").iterdir()
    assert set(torch.load(file, weights_only=True)["state_dict"]) == set(adapter_state(module))
    assert (tmp_path / "adapter" / "last" / "adapter.json").is_file()


@pytest.mark.parametrize("cls", [Plain, InSetup, InConfigureModel])
def test_every_stage_in_any_order_and_twice(cls: type[Plain], tmp_path: Path) -> None:
    module = cls()
    run = trainer(tmp_path, callback())
    run.validate(module, loader(shuffle=False), verbose=False)
    start = adapter_state(module)
    for _ in range(2):
        run.predict(module, loader(shuffle=False))
        run.test(module, loader(shuffle=False), verbose=False)
    assert same(start, adapter_state(module))
    run.fit(module, loader())
    once = adapter_state(module)
    assert not same(start, once)
    run.fit_loop.max_epochs = 2
    run.fit(module, loader())
    twice = adapter_state(module)
    assert not same(once, twice)
    fresh = trainer(tmp_path, callback())  # another Trainer and callback on the adapted module
    fresh.test(module, loader(shuffle=False), verbose=False)
    assert same(twice, adapter_state(module))
    fresh.fit(module, loader())
    assert not same(twice, adapter_state(module))
    assert list(lp.handles(module)) == ["default"]


def test_same_name_with_another_strategy_is_refused(tmp_path: Path) -> None:
    module = Plain()
    callback().apply(module)
    other = callback({"class_path": "LoRA", "init_args": {"rank": 1, "targets": ["0"]}})
    with pytest.raises(ConflictError, match="installed already"):
        trainer(tmp_path, other).fit(module, loader())


def test_apply_is_idempotent() -> None:
    module, peft = Plain(), callback()
    handle = peft.apply(module)
    assert peft.apply(module) is handle
    assert callback().apply(module) is handle


def test_model_built_anew_in_a_later_hook_is_named(tmp_path: Path) -> None:
    class Rebuilds(Plain):
        def on_fit_start(self) -> None:
            self.net = network()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    with pytest.raises(ConflictError, match="built the model anew"):
        trainer(tmp_path, callback()).fit(Rebuilds(), loader())


# ---------------------------------------------------------------------- where


class TwoParts(Plain):
    """Root, head and teacher side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(32, 16), nn.ReLU())
        self.head = nn.Sequential(nn.Linear(16, 2), nn.BatchNorm1d(2))
        self.teacher = nn.Sequential(nn.Linear(32, 2), nn.BatchNorm1d(2)).requires_grad_(False)

    def forward(self, x: Any) -> Any:
        return self.head(self.net(x))


@pytest.mark.parametrize("targets", [["net.0"], ["0"], "net.0", "re:0", "net.0*"])
def test_targets_as_the_user_sees_them(targets: Any) -> None:
    module = Plain()
    handle = callback({"class_path": "LoRA", "init_args": {"rank": 2, "targets": targets}}).apply(module)
    assert handle.root is module.net
    assert handle.entries[0].path == "0"
    again = lp.inject(network(), handle.strategy.to_dict())  # the strategy in the manifest fits the root alone
    assert [e.path for e in again.entries] == ["0"]


def test_root_is_the_module_itself_when_it_has_several_parts() -> None:
    module = TwoParts()
    handle = callback({"class_path": "LoRA", "init_args": {"rank": 2, "targets": ["net.0"]}}).apply(module)
    assert handle.root is module
    assert [e.path for e in handle.entries] == ["net.0"]
    assert not module.head[0].weight.requires_grad


def test_root_given_by_path_freezes_only_what_is_below(tmp_path: Path) -> None:
    module = TwoParts()
    peft = callback({"class_path": "LoRA", "init_args": {"rank": 2, "targets": ["net.0"]}}, module="net")
    before = base_state(module)
    trainer(tmp_path, peft).fit(module, loader())
    after = base_state(module)
    moved = {k.split(".")[0] for k in before if not torch.equal(before[k], after[k])}
    assert moved == {"head"}


def test_extra_module_trains_whole(tmp_path: Path) -> None:
    module = TwoParts()
    peft = callback({"class_path": "LoRA", "init_args": {"rank": 1, "targets": ["net.0"]}}, extra_modules=["head"])
    before = base_state(module)
    trainer(tmp_path, peft).fit(module, loader())
    after = base_state(module)
    moved = {k for k in before if not torch.equal(before[k], after[k])}
    assert moved == {k for k in before if k.startswith("head.")}  # running statistics too


def test_extra_module_keeps_training_when_a_second_adapter_comes(tmp_path: Path) -> None:
    module = TwoParts()
    first = callback({"class_path": "LoRA", "init_args": {"rank": 1, "targets": ["net.0"]}}, extra_modules=["head"])
    second = callback({"class_path": "LoRA", "init_args": {"rank": 2, "targets": ["net.0"]}}, name="second")
    flags = {n: p.requires_grad for n, p in module.named_parameters()}
    trainer(tmp_path, first, second).fit(module, loader())
    assert module.head[0].weight.requires_grad
    for name in ("second", "default"):
        lp.handles(module)[name].remove()
    assert {n: p.requires_grad for n, p in module.named_parameters()} == flags


def test_path_relative_to_the_root_names_an_extra_module() -> None:
    module = Plain()
    peft = callback({"class_path": "LoRA", "init_args": {"rank": 2, "targets": ["0"]}}, extra_modules=["3"])
    peft.apply(module)
    assert list(peft.extras_of(module)) == ["net.3"]
    assert module.net[3].weight.requires_grad
    assert not module.net[0].weight.requires_grad


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"module": "nett"}, TargetError, "no such module.*'net'"),
        ({"extra_modules": ["nett.3"]}, TargetError, "no such module"),
        ({"extra_modules": ["net"]}, ConflictError, "holds the adapted root"),
        ({"extra_modules": ["net.3"]}, ConflictError, "has an adapter too"),
        ({"strategy": {"class_path": "LoRA", "init_args": {"targets": ["net.9"]}}}, TargetError, "matches no role and no module"),
    ],
)
def test_what_cannot_be_installed_leaves_the_module_as_it_was(
    options: dict[str, Any], error: Any, message: str, tmp_path: Path
) -> None:
    module = Plain()
    flags = [p.requires_grad for p in module.parameters()]
    with pytest.raises(error, match=message):
        trainer(tmp_path, callback(**options)).fit(module, loader())
    assert adapter_state(module) == {}
    assert [p.requires_grad for p in module.parameters()] == flags
    assert "forward" not in vars(module.net[0])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"strategy": "lroa"}, UnknownMethodError, "'lora'"),
        ({"strategy": {"class_path": "LoRA", "init_args": {"rnk": 2}}}, ConfigError, "'rank'"),
        ({"checkpoint": "adaptor"}, ConfigError, "'adapter'"),
        ({"gradient_sentinel": "rise"}, ConfigError, "'raise'"),
        ({"adapter_dtype": "fp32"}, ConfigError, "float32"),
        ({"name": "a.b"}, ConfigError, "parameter names"),
        ({"strategy": "houlsby", "merge_on_end": True}, ConfigError, "cannot be merged"),
    ],
)
def test_options_are_checked_when_the_callback_is_made(options: dict[str, Any], error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        callback(**options)


def test_several_callbacks_train_side_by_side(tmp_path: Path) -> None:
    module = Plain()
    second = callback({"class_path": "LoRA", "init_args": {"rank": 1, "targets": ["net.3"]}}, name="second")
    run = trainer(tmp_path, callback(), second, enable_checkpointing=True)
    run.fit(module, loader())
    assert list(lp.handles(module)) == ["default", "second"]
    state = torch.load(run.checkpoint_callback.best_model_path, weights_only=True)
    assert set(state["peft"]["adapters"]) == {"default", "second"}
    assert set(state["state_dict"]) == set(adapter_state(module))
    assert "net.3.peft.second.lora_B" in state["state_dict"]


def test_callbacks_that_disagree_about_checkpoints_are_refused(tmp_path: Path) -> None:
    second = callback({"class_path": "LoRA", "init_args": {"targets": ["net.3"], "rank": 1}}, name="second", checkpoint="full")
    with pytest.raises(ConfigError, match="One file serves both"):
        trainer(tmp_path, callback(), second).fit(Plain(), loader())


# ---------------------------------------------------------------------- neighbours


@pytest.mark.parametrize("averaging", [EMAWeightAveraging, lambda: StochasticWeightAveraging(0.1)])
def test_averaging_before_the_callback_is_refused(averaging: Any, tmp_path: Path) -> None:
    with pytest.raises(ConflictError, match="stands before PEFTCallback"):
        trainer(tmp_path, averaging(), callback()).fit(Plain(), loader())


def test_callback_is_copied_without_the_run(tmp_path: Path) -> None:
    peft = callback()
    trainer(tmp_path, peft).fit(Plain(), loader())
    assert copy.deepcopy(peft)._run is None
    assert pickle.loads(pickle.dumps(peft)).strategy == peft.strategy


def test_guard_of_model_parallel_strategy_stays(tmp_path: Path) -> None:
    """S10: a patched configure_model would look like the user's, and training would run unsharded and unsynchronised."""

    class OnlySetup(Plain):
        def setup(self, stage: str) -> None:
            pass

    for cls in (Plain, OnlySetup):
        strategy = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1)
        run = trainer(tmp_path, callback(), strategy=strategy)
        with pytest.raises(TypeError, match="required to override the `configure_model"):
            run.fit(cls(), loader())
        torch.distributed.destroy_process_group()


def test_sharded_module_is_refused() -> None:
    class FSDPModule(nn.Linear):
        """Stands in for a module after fully_shard, which is told by its class's name."""

    module = Plain()
    module.net[0] = FSDPModule(32, 16)
    with pytest.raises(ConflictError, match="between building the module and sharding"):
        callback().apply(module)


def test_no_adapter_is_an_nn_linear() -> None:
    """S11: precision plug-ins convert every nn.Linear they find, adapters included."""
    module = Plain()
    handle = callback().apply(module)
    assert not any(isinstance(m, nn.Linear) for e in handle.entries for m in e.adapter.modules())


@pytest.mark.dist
@pytest.mark.parametrize("strategy", ["ddp_fork", pytest.param("ddp_spawn", marks=pytest.mark.slow)])
def test_parent_of_child_processes_gets_the_trained_adapter(strategy: str, tmp_path: Path) -> None:
    """S8, and S5: ranks stay equal."""
    command = [sys.executable, "-m", "tests.training.child_processes", str(tmp_path), strategy]
    result = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=120)
    assert "parent has the trained adapter" in result.stdout, result.stderr
