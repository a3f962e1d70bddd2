"""Calibration in a Trainer: once, on the train dataloader, through the user's own training_step; and never again."""

from __future__ import annotations

import functools
import random
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torchmetrics
from lightning.pytorch.callbacks import LearningRateFinder, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_peft as lp
from lightning_peft.errors import ConfigError, ConflictError, DataError
from lightning_peft.nn.masking import Mask
from tests.training.test_callback_resume import Stateful, assert_equal
from tests.training.toys import (
    InConfigureModel,
    InSetup,
    Interrupt,
    Plain,
    adapter_state,
    base_state,
    callback,
    data,
    loader,
    network,
    same,
    trainer,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore:The dirpath has changed", "ignore:Checkpoint directory .* exists", "ignore:Be aware that when using `ckpt_path`"
)
FISH = {"class_path": "FISHMask", "init_args": {"share": 0.1, "samples": 8}}
DIFF = {"class_path": "DiffPruning", "init_args": {"share": 0.1, "penalty": 1e-3, "fine_tune": 0.4, "alpha_lr_scale": 10.0}}


class Counting(Plain):
    """Notes what its training_step is called with, and in which mode."""

    def __init__(self, lr: float = 0.01) -> None:
        super().__init__(lr)
        self.calls: list[tuple[int, bool]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.calls.append((len(batch[0]), self.net.training))
        return super().training_step(batch, batch_idx)


class CountingLate(Counting):
    def __init__(self, lr: float = 0.01) -> None:
        super().__init__(lr)
        self.net = None

    def configure_model(self) -> None:
        if self.net is None:
            self.net = network()


class CountingSetup(Counting):
    def __init__(self, lr: float = 0.01) -> None:
        super().__init__(lr)
        self.net = None
        self.rows: Any = None

    def setup(self, stage: str) -> None:
        self.rows = data()  # the dataloader exists after setup only
        if self.net is None:
            self.net = network()

    def train_dataloader(self) -> Any:
        return DataLoader(self.rows, batch_size=4, shuffle=True)


def mask(module: nn.Module) -> Mask:
    (found,) = (m for m in module.modules() if isinstance(m, Mask))
    return found


def fit(
    folder: Path, make: Any, strategy: Any, *extra: Any, path: Any = None, data: Any = "default", keep: Any = None, **options: Any
) -> Any:
    torch.manual_seed(11)
    module = make()
    checkpoints = ModelCheckpoint(folder, save_top_k=-1, filename="{step}", **(keep or {}))
    options = {"max_epochs": 3, "enable_checkpointing": True, **options}
    run = trainer(folder, callback(strategy), *extra, checkpoints, **options)
    try:
        run.fit(module, loader() if data == "default" else data, ckpt_path=path)
    except SystemExit:
        assert any(isinstance(e, Interrupt) for e in extra)
    return module, run


@pytest.mark.parametrize("make", [Counting, CountingLate, CountingSetup])
def test_it_runs_once_on_single_examples_in_eval_mode(make: Any, tmp_path: Path) -> None:
    module, run = fit(tmp_path, make, FISH, max_epochs=1, data=None if make is CountingSetup else "default")
    assert module.calls[:8] == [(1, False)] * 8
    assert module.calls[8:] == [(4, True)] * 4
    indices = mask(module).indices
    assert len(indices) == round(0.1 * sum(p.numel() for p in network().parameters())) == len(indices.unique())
    assert same({k: v for k, v in base_state(module).items()}, {f"net.{k}": v for k, v in network().state_dict().items()})
    assert mask(module).values.abs().min() > 0
    run.fit_loop.max_epochs = 2
    run.fit(module, loader())
    assert module.calls[12:] == [(4, True)] * 4, "a second fit goes on"


def test_the_mask_is_that_of_the_data(tmp_path: Path) -> None:
    module, _ = fit(tmp_path, Plain, FISH, max_epochs=1, data=loader(8, shuffle=False))
    twin = Plain()
    rows = DataLoader(data(8), batch_size=3)
    found = lp.calibrate(twin.net, lp.resolve(FISH), rows, lambda batch: twin.loss(batch))
    assert torch.equal(found["shared-mask.indices"].int(), mask(module).indices)


def test_it_logs_nothing_draws_no_random_number_and_counts_in_no_metric(tmp_path: Path) -> None:
    class Logs(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.sizes = torchmetrics.SumMetric()
            self.sizes.update(1000.0)  # before this run

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.logger.log_metrics({"direct": 1.0}, step=0)
            self.log_dict({"size": float(len(batch[0]))}, on_step=True)
            self.sizes.update(float(len(batch[0])))
            random.random()
            np.random.rand()
            torch.rand(1)
            return super().training_step(batch, batch_idx)

    def random_states() -> list[Any]:
        _, keys, place, *_ = np.random.get_state(legacy=True)
        return [random.getstate(), keys.tolist(), place, torch.get_rng_state().tolist()]

    class Looks(pl.Callback):
        state: Any = None

        def setup(self, *args: Any, **kwargs: Any) -> None:
            self.before = random_states()

        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            assert random_states() == self.before
            assert (pl_module.sizes.update_count, float(pl_module.sizes.compute())) == (1, 1000.0)
            assert "log" not in vars(pl_module)
            assert "log_dict" not in vars(pl_module)
            assert trainer.logger is logger
            assert lp.handles(pl_module)["default"].calibrated

    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=1)
    fit(tmp_path, Logs, FISH, Looks(), max_epochs=1, logger=logger, log_every_n_steps=1)
    lines = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    sizes = {line.split(",")[lines[0].split(",").index("size")] for line in lines[1:]} - {""}
    assert sizes == {"4.0"}


def test_batch_statistics_are_as_before(tmp_path: Path) -> None:
    counts: list[int] = []

    class Normed(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.net.insert(1, nn.BatchNorm1d(16))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.net[1].train()
            loss = super().training_step(batch, batch_idx)
            counts.append(int(self.net[1].num_batches_tracked))
            return loss

    class Looks(pl.Callback):
        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            assert counts == [1, 2], "the calibration was before"
            assert torch.equal(pl_module.net[1].running_mean, torch.zeros(16))
            assert torch.equal(pl_module.net[1].running_var, torch.ones(16))

    whole = {"class_path": "FISHMask", "init_args": {"share": 0.1, "samples": 2, "per": "batch"}}
    fit(tmp_path, Normed, whole, Looks(), max_epochs=1)
    assert counts == [1, 2, 1, 2, 3, 4]


def test_a_calibrated_run_is_the_one_that_was_given_its_mask(tmp_path: Path) -> None:
    """What calibration reads of the loader, and draws, is taken back: the order of the batches is the same."""
    whole, _ = fit(tmp_path / "a", Plain, FISH)
    given = Plain()
    indices = mask(whole).indices.clone()

    def make() -> Plain:
        torch.manual_seed(11)
        lp.inject(given.net, lp.resolve(FISH), calibration={"shared-mask.indices": indices})
        torch.manual_seed(11)
        return given

    fit(tmp_path / "b", make, FISH)
    assert same(adapter_state(whole), adapter_state(given))


@pytest.mark.parametrize("make", [Counting, CountingLate])
def test_resuming_does_not_repeat_it_and_is_exact(make: Any, tmp_path: Path) -> None:
    whole = fit(tmp_path / "whole", make, FISH)
    fit(tmp_path / "part", make, FISH, Interrupt(9))
    resumed = fit(tmp_path / "again", make, FISH, path=tmp_path / "part" / "step=8.ckpt")
    assert resumed[0].calls == [(4, True)] * 4
    assert_equal(whole, resumed)


@pytest.mark.parametrize("strategy", [FISH, DIFF], ids=["fish", "diff"])
def test_resuming_at_every_step_is_exact(strategy: Any, tmp_path: Path) -> None:
    steps = {"every_n_train_steps": 1}
    whole = fit(tmp_path, Plain, strategy, data=Stateful(loader()), keep=steps, accumulate_grad_batches=2)
    for step in (1, 2, 3, 4, 5):
        start = tmp_path / f"step={step}.ckpt"
        resumed = fit(
            tmp_path / str(step), Plain, strategy, data=Stateful(loader()), path=start, keep=steps, accumulate_grad_batches=2
        )
        assert_equal(whole, resumed)


def test_a_stateful_loader_is_where_it_was(tmp_path: Path) -> None:
    seen: list[Tensor] = []

    class Sees(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            seen.append(batch[0])
            return super().training_step(batch, batch_idx)

    def order(strategy: Any, make_loader: Any) -> list[Tensor]:
        seen.clear()
        fit(tmp_path, Sees, strategy, data=make_loader(), max_epochs=2)
        return [x for x in seen if len(x) == 4]

    lora = {"class_path": "LoRA", "init_args": {"rank": 2, "targets": ["0"]}}
    own = functools.partial(DataLoader, data(), batch_size=4, shuffle=True)
    for make_loader in (
        lambda: Stateful(loader()),
        lambda: own(generator=torch.Generator().manual_seed(3)),
    ):
        for a, b in zip(order(FISH, make_loader), order(lora, make_loader), strict=True):
            assert torch.equal(a, b)


def test_files_and_evaluation_need_no_data(tmp_path: Path) -> None:
    module, _ = fit(tmp_path, Plain, FISH, max_epochs=1)
    path = next(iter(tmp_path.glob("step=*.ckpt")))
    x = torch.randn(3, 32)
    module.eval()
    again = lp.load_from_checkpoint(Plain, path)
    assert torch.equal(again.eval()(x), module(x))
    bare = network().eval()
    lp.load_adapter(bare, path)
    assert torch.equal(bare(x), module(x))
    fresh = Counting()
    tester = trainer(tmp_path, callback(FISH))
    tester.test(fresh, loader(8, shuffle=False), ckpt_path=path, verbose=False)
    assert torch.equal(fresh.eval()(x), module(x))
    assert fresh.calls == []
    other = Plain().eval()
    trainer(tmp_path, callback(FISH)).validate(other, verbose=False)
    assert torch.equal(other(x), Plain().eval()(x)), "an adapter without calibration changes nothing"


def test_init_from_brings_the_mask(tmp_path: Path) -> None:
    module, _ = fit(tmp_path, Plain, FISH, max_epochs=1)
    folder = lp.save_adapter(lp.handles(module)["default"], tmp_path / "adapter")
    fresh = Counting()
    trainer(tmp_path, callback(FISH, init_from=folder)).fit(fresh, loader())
    assert fresh.calls == [(4, True)] * 4
    assert torch.equal(mask(fresh).indices, mask(module).indices)


def test_a_checkpoint_from_before_peft_is_loaded_first(tmp_path: Path) -> None:
    torch.manual_seed(5)
    plain = Plain()
    for p in plain.parameters():
        nn.init.normal_(p)
    run = trainer(tmp_path, max_epochs=1, enable_checkpointing=False)
    run.fit(plain, loader())
    run.save_checkpoint(tmp_path / "full.ckpt")
    with torch.no_grad():
        expected = lp.calibrate(plain.net, lp.resolve(FISH), DataLoader(data(8), batch_size=4), lambda b: plain.loss(b))
    module, _ = fit(tmp_path, Counting, FISH, path=tmp_path / "full.ckpt", data=loader(8, shuffle=False), max_epochs=1)
    assert module.calls == [(1, False)] * 8 + [(4, True)] * 2
    assert torch.equal(mask(module).indices, expected["shared-mask.indices"].int())


def test_before_a_learning_rate_finder(tmp_path: Path) -> None:
    module, _ = fit(tmp_path, Counting, FISH, LearningRateFinder(num_training_steps=3), max_epochs=1, data=loader(), logger=False)
    assert module.calls[:8] == [(1, False)] * 8
    assert {mode for _, mode in module.calls[8:]} == {True}


@pytest.mark.filterwarnings("ignore:`Trainer.fit` stopped")
def test_without_data(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no training batch.*Attach a train dataloader"):
        fit(tmp_path, Plain, FISH, max_epochs=1, limit_train_batches=0)

    class Manual(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

    with pytest.raises(ConfigError, match=r"optimizes by itself.*calibration_loss.*lp\.calibrate"):
        fit(tmp_path, Manual, FISH, max_epochs=1)

    class ByItself(Manual):
        def calibration_loss(self, batch: Any) -> Tensor:
            return self.loss(batch)

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()

    module, _ = fit(tmp_path, ByItself, FISH, max_epochs=1, data=loader(8, shuffle=False))
    assert torch.equal(
        mask(module).indices, mask(fit(tmp_path, Plain, FISH, max_epochs=1, data=loader(8, shuffle=False))[0]).indices
    )

    class Silent(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None

    with pytest.raises(ConfigError, match="returned NoneType.*not a loss"):
        fit(tmp_path, Silent, FISH, max_epochs=1)

    class Odd(Plain):
        def train_dataloader(self) -> Any:
            return DataLoader(
                TensorDataset(torch.randn(8, 32)), batch_size=4, collate_fn=lambda rows: {"x": torch.ones(4), "y": torch.ones(3)}
            )

    with pytest.raises(DataError, match="batch_size=1"):
        fit(tmp_path, Odd, FISH, max_epochs=1, data=None)


def test_an_interrupted_calibration_leaves_nothing(tmp_path: Path) -> None:
    class Fails(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if len(batch[0]) == 1:
                raise RuntimeError("in calibration")
            return super().training_step(batch, batch_idx)

    module = Fails()
    before, flags = dict(module.state_dict()), [p.requires_grad for p in module.parameters()]
    with pytest.raises(RuntimeError, match="in calibration"):
        trainer(tmp_path, callback(FISH)).fit(module, loader())
    assert list(module.state_dict()) == list(before)
    assert [p.requires_grad for p in module.parameters()] == flags
    assert "log" not in vars(module)


def test_training_on_a_base_that_cannot_be_calibrated_is_refused() -> None:
    from lightning_peft.training.calibrating import require

    handle = lp.inject(network(), lp.resolve(FISH), calibration="later")
    with pytest.raises(ConflictError, match=r"\(FSDP\) or on the meta device.*lp\.calibrate"):
        require(handle)


@pytest.mark.parametrize("make", [InConfigureModel, InSetup])
@pytest.mark.parametrize("name", ["RandomMask", "MagnitudeMask"])
def test_masks_without_data_resume_exactly_under_another_seed(make: Any, name: str, tmp_path: Path) -> None:
    strategy = {"class_path": name, "init_args": {"share": 0.1}}
    whole = fit(tmp_path / "whole", make, strategy)
    fit(tmp_path / "part", make, strategy, Interrupt(9))
    resumed = fit(tmp_path / "again", make, strategy, path=tmp_path / "part" / "step=8.ckpt")
    assert_equal(whole, resumed)
    other = make()
    torch.manual_seed(99)
    trainer(tmp_path, callback(strategy)).validate(other, ckpt_path=tmp_path / "part" / "step=8.ckpt", verbose=False)
    assert torch.equal(mask(other).indices, mask(whole[0]).indices)
