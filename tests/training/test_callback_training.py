from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import BatchSizeFinder, EarlyStopping, LearningRateFinder
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning_peft as lp
from lightning_peft.errors import AdapterBypassedError, ConfigError, DeadAdapterError
from lightning_peft.strategies.schedule import Schedule
from lightning_peft.training.modes import BaseModes
from tests.backbones import llama
from tests.training.toys import (
    EarlyOptimizer,
    Plain,
    adapter_state,
    base_state,
    callback,
    data,
    loader,
    registered,
    same,
    trainer,
)

NORM = {"class_path": "LoRA", "init_args": {"rank": 2, "targets": ["0", "4"]}}


class Norm(Plain):
    """A base with running statistics and dropout, left in eval mode as from_pretrained does."""

    def __init__(self, lr: float = 0.01) -> None:
        super().__init__(lr)
        self.net = nn.Sequential(nn.Linear(32, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 2)).eval()


class Modes(pl.Callback):
    """Notes the modes of the network at every training batch."""

    def __init__(self) -> None:
        self.seen: list[list[bool]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append([pl_module.net[i].training for i in range(5)])


# ---------------------------------------------------------------------- the frozen base


def test_train_is_called_and_statistics_stay(tmp_path: Path) -> None:
    """S6: eval mode would leave dropout and activation checkpointing off; train mode would move BatchNorm's statistics."""
    module, modes = Norm(), Modes()
    before = base_state(module)
    trainer(tmp_path, callback(NORM), modes, max_epochs=2).fit(module, loader())
    assert modes.seen == [[True, False, True, True, True]] * 8  # in the second epoch, after validation, too
    assert same(before, base_state(module))
    assert [module.net[i].training for i in range(5)] == [False] * 5  # as it was before fit


def test_statistics_stay_when_the_user_calls_train(tmp_path: Path) -> None:
    class CallsTrain(Norm):
        def on_train_epoch_start(self) -> None:
            self.train()

    module = CallsTrain()
    before = base_state(module)
    trainer(tmp_path, callback(NORM)).fit(module, loader())
    assert same(before, base_state(module))


def test_base_dropout_can_be_turned_off(tmp_path: Path) -> None:
    modes = Modes()
    trainer(tmp_path, callback(NORM, base_dropout=False), modes).fit(Norm(), loader())
    assert modes.seen[0] == [False] * 5


def test_adapter_dropout_stays_on_without_base_dropout(tmp_path: Path) -> None:
    module = llama(attention_dropout=0.5).eval()
    handle = lp.inject(module, {"class_path": "LoRA", "init_args": {"rank": 2, "dropout": 0.5}})
    modes = BaseModes(module, [], base_dropout=False)
    modes.apply()
    assert all(e.adapter.training for e in handle.entries)
    assert not any(m.training for m in module.modules() if type(m).__name__ == "LlamaAttention")
    module.activation_checkpointing_enable()
    BaseModes(module, [], base_dropout=False).apply()
    assert all(layer.training for layer in module.model.layers)  # recomputation is on in train mode only


def test_dropout_that_cannot_be_told_apart_is_refused() -> None:
    class Layer(nn.Module):
        gradient_checkpointing = True
        dropout = 0.1

    with pytest.raises(ConfigError, match="dropout rates in the model's config"):
        BaseModes(nn.Sequential(Layer()), [], base_dropout=False)


def test_user_is_still_warned_of_other_modules_in_eval_mode(tmp_path: Path) -> None:
    class Teacher(Norm):
        def __init__(self) -> None:
            super().__init__()
            self.teacher = nn.Linear(32, 2).eval()

    with pytest.warns(UserWarning, match=r"Found 1 module\(s\) in eval mode"):
        trainer(tmp_path, callback(NORM, module="net")).fit(Teacher(), loader())


# ---------------------------------------------------------------------- nothing dead


class Bypassing(Plain):
    """Reads a weight instead of calling the layer."""

    def forward(self, x: Tensor) -> Tensor:
        return self.net[3](nn.functional.linear(x, self.net[0].weight).relu())


class BypassingRoot(Bypassing):
    """The same where the adapted root's own forward is called."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(2, 2)


@pytest.mark.parametrize("cls", [Bypassing, BypassingRoot])
@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
def test_bypassed_adapter_is_an_error_in_every_stage(cls: Any, stage: str, tmp_path: Path) -> None:
    class NoValidation(cls):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("n", 0.0)

    module = NoValidation() if stage == "fit" else cls()
    targets = {"class_path": "LoRA", "init_args": {"rank": 2, "targets": ["net.0", "net.3"]}}
    with pytest.raises(AdapterBypassedError, match=r"'(net\.)?0'"):
        getattr(trainer(tmp_path, callback(targets)), stage)(module, loader(shuffle=False))


def test_validation_that_does_not_use_the_model_is_no_bypass(tmp_path: Path) -> None:
    class Counts(Plain):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("n", float(batch_idx))

    trainer(tmp_path, callback()).fit(Counts(), loader())


class Detached(Plain):
    """Cuts the graph in front of the last layer."""

    def forward(self, x: Tensor) -> Tensor:
        return self.net[3](self.net[0](x).relu().detach())


class Refreezes(Plain):
    def on_train_start(self) -> None:
        self.net[0].peft.default.lora_B.requires_grad_(False)


class Replaces(Plain):
    """Makes a new optimizer behind the callback's back."""

    def on_train_start(self) -> None:
        (optimizer,) = self.trainer.optimizers
        optimizer.param_groups[0]["params"][:] = list(self.net[3].peft.parameters())


class ZeroRate(Plain):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([{"params": [], "lr": 0.0}, {"params": self.net[3].parameters(), "lr": 0.1}])


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (Detached, r"2 of 4 trainable tensors.*\n  0\.lora_A, 0\.lora_B: no gradient arrives: the graph is cut"),
        (Refreezes, r"0\.lora_B: frozen: something set requires_grad=False"),
        (Replaces, r"0\.lora_A, 0\.lora_B: in no optimizer"),
        (ZeroRate, r"0\.lora_B: the learning rate of its parameter group is 0"),
    ],
)
def test_sentinel_names_dead_tensors_and_the_reason(cls: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(DeadAdapterError, match=message):
        trainer(tmp_path, callback()).fit(cls(), loader())
    with pytest.warns(UserWarning, match=message):
        trainer(tmp_path, callback(gradient_sentinel="warn")).fit(cls(), loader())
    trainer(tmp_path, callback(gradient_sentinel="off")).fit(cls(), loader())


def test_sentinel_waits_for_effective_steps(tmp_path: Path) -> None:
    """A warm-up starts at a learning rate of 0: those steps prove nothing."""

    class WarmsUp(Plain):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(step >= 3))
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    trainer(tmp_path, callback(), max_epochs=2).fit(WarmsUp(), loader())


def test_sentinel_watches_extra_modules(tmp_path: Path) -> None:
    class Unused(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(2, 2)

    with pytest.raises(DeadAdapterError, match=r"head\.weight, head\.bias: no gradient arrives"):
        trainer(tmp_path, callback(module="net", extra_modules=["head"])).fit(Unused(), loader())


def test_reentrant_checkpointing_is_named(tmp_path: Path) -> None:
    class Reentrant(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.net = llama()
            self.net.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": True})
            self.net.disable_input_require_grads()

        def loss(self, batch: Any) -> Tensor:
            ids = torch.arange(3, 9).expand(2, -1)
            return self.net(input_ids=ids, labels=ids).loss + 0 * self.net.lm_head.weight.new_zeros(1, requires_grad=True).sum()

    peft = callback({"class_path": "LoRA", "init_args": {"rank": 2}})
    with (
        pytest.warns(UserWarning, match="requires_grad=True"),
        pytest.raises(DeadAdapterError, match="reentrant activation checkpointing cuts the graph"),
    ):
        trainer(tmp_path, peft).fit(Reentrant(), loader())


# ---------------------------------------------------------------------- schedules


class Recorded(Schedule):
    """Notes what it is told, and pulls all B factors towards zero."""

    log: ClassVar[list[Any]] = []

    def __init__(self, handle: Any) -> None:
        self.handle = handle

    def on_start(self, total_steps: int) -> None:
        self.log.append(("start", total_steps))

    def penalty(self) -> Tensor:
        return sum((s.tensor().square().sum() for s in self.handle.trainable_slots()), torch.zeros(())) * 3.0

    def before_step(self, optimizer: Any) -> None:
        self.log.append(("before", [s.tensor().grad.clone() for s in self.handle.trainable_slots()]))

    def after_step(self, optimizer: Any, *, skipped: bool = False) -> None:
        self.log.append(("after", skipped, all(s.tensor().grad is not None for s in self.handle.trainable_slots())))


@dataclass(frozen=True, kw_only=True)
class Scheduled(lp.LoRA):
    def schedule(self, handle: Any) -> Schedule:
        return Recorded(handle)


class InLoss(Plain):
    """The same penalty written into the loss."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        penalty = sum(p.square().sum() for p in lp.handles(self)["default"].trainable_parameters())
        return self.loss(batch) + 3.0 * penalty


class Manual(Plain):
    def __init__(self, lr: float = 0.01) -> None:
        super().__init__(lr)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()


@pytest.mark.parametrize(
    ("cls", "options"),
    [(Plain, {}), (Plain, {"accumulate_grad_batches": 2}), (Plain, {"precision": "bf16-mixed"}), (Manual, {})],
)
def test_schedule_sees_every_step_and_its_penalty_is_the_loss_plus_penalty(cls: Any, options: Any, tmp_path: Path) -> None:
    Recorded.log.clear()
    module, twin = cls(), InLoss()
    strategy = {"rank": 2, "targets": ["0", "3"]}
    torch.manual_seed(1)
    with registered(Scheduled):
        trainer(tmp_path, callback(Scheduled(**strategy)), **options).fit(module, loader())
    torch.manual_seed(1)
    trainer(tmp_path, callback(lp.LoRA(**strategy)), **options).fit(twin, loader())
    steps = 4 // options.get("accumulate_grad_batches", 1)
    assert Recorded.log[0] == ("start", steps)
    assert [entry[0] for entry in Recorded.log[1:]] == ["before", "after"] * steps
    assert all(entry[1:] == (False, True) for entry in Recorded.log if entry[0] == "after")
    for key, value in adapter_state(module).items():
        torch.testing.assert_close(value, adapter_state(twin)[key], rtol=1e-4, atol=1e-6)


class ZeroesAfter(Manual):
    """Has no gradients left at the end of a batch."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        self.manual_backward(self.loss(batch))
        optimizer.step()
        optimizer.zero_grad()


TARGETS = {"targets": ["0", "3"]}
SCHEDULED = [  # over 8 steps each of them comes to all that its schedule does
    lp.AdaLoRA(initial_rank=2, target_rank=1, warmup=2, final=3, **TARGETS),
    lp.DyLoRA(rank=2, **TARGETS),
    lp.ReLoRA(rank=1, rounds=3, warmup=1, **TARGETS),
    lp.ReMoRA(rank=2, rounds=3, warmup=1, **TARGETS),
    lp.DiffPruning(share=0.1, penalty=1e-3, alpha_lr_scale=10.0, **TARGETS),
    lp.LoRAFA(rank=2, precondition=True, **TARGETS),
]
every_schedule = pytest.mark.parametrize("strategy", SCHEDULED, ids=lambda strategy: type(strategy).__name__)


@pytest.mark.parametrize("cls", [Manual, ZeroesAfter])
@every_schedule
def test_manual_optimisation_trains_what_automatic_optimisation_does(strategy: Any, cls: Any, tmp_path: Path) -> None:
    ended = []
    for make in (Plain, cls):
        module, peft = make(), callback(strategy)
        torch.manual_seed(1)
        run = trainer(tmp_path, peft)
        run.fit(module, loader(32))
        ended.append((dict(module.state_dict()), run.optimizers[0].state_dict()["state"], peft.state_dict()["schedule"]))
    torch.testing.assert_close(ended[0], ended[1], rtol=0, atol=0)
    assert ended[0][2].get("step", 8) == 8


# ---------------------------------------------------------------------- the gradient scaler of fp16


def half(**options: Any) -> dict[str, Any]:
    """fp16 as on a GPU; on a CPU ``Trainer(precision="16-mixed")`` would take bf16 without a scaler."""
    return {"plugins": MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**10, **options))}


def overflowing(*batches: int, size: int = 16) -> DataLoader[Any]:
    """The loss of some batches is infinite."""
    rows = data(size)
    rows.tensors[1][[4 * batch for batch in batches]] = math.inf
    return DataLoader(rows, batch_size=4)


@pytest.mark.parametrize(("cls", "every"), [(Plain, 1), (Plain, 2), (Manual, 1)])
def test_schedule_under_fp16_sees_true_gradients_and_what_is_skipped(cls: Any, every: int, tmp_path: Path) -> None:
    def fit(module: Any, strategy: Any, **scaler: Any) -> list[Any]:
        Recorded.log.clear()
        torch.manual_seed(1)
        trainer(tmp_path, callback(strategy), accumulate_grad_batches=every, **half(**scaler)).fit(module, overflowing(2))
        return Recorded.log[1:]

    module, twin = cls(), InLoss()
    with registered(Scheduled):
        seen = fit(module, Scheduled(rank=2, **TARGETS))
        unscaled = fit(cls(), Scheduled(rank=2, **TARGETS), enabled=False)
    fit(twin, lp.LoRA(rank=2, **TARGETS))
    bad = 2 // every
    assert [entry[1] for entry in seen if entry[0] == "after"] == [step == bad for step in range(4 // every)]
    # Without a scaler nothing is skipped, so that there is nothing to compare with after the overflow.
    for (_, gradients), (_, expected) in zip(seen[: 2 * bad : 2], unscaled[: 2 * bad : 2], strict=True):
        torch.testing.assert_close(gradients, expected, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(adapter_state(module), adapter_state(twin), rtol=1e-4, atol=1e-6)  # after it the scale is another
    assert all(value.isfinite().all() for value in adapter_state(module).values())


@every_schedule
def test_skipped_steps_do_not_count_in_a_plan(strategy: Any, tmp_path: Path) -> None:
    module, peft = Plain(), callback(strategy)
    run = trainer(tmp_path, peft, **half())
    run.fit(module, overflowing(0, 1, size=32))  # the sentinel waits for two others
    assert run.global_step == 8
    assert peft.state_dict()["schedule"].get("step", 6) == 6
    assert all(value.isfinite().all() for value in adapter_state(module).values())


# ---------------------------------------------------------------------- several optimizers


class TwoOptimizers(Manual):
    """The second one trains another network, and may come first or last."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(32, 2)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        for optimizer, network in zip(self.optimizers(), (self.net, self.other), strict=True):
            optimizer.zero_grad()
            self.manual_backward(((network(x) - y) ** 2).mean())
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.AdamW(m.parameters(), lr=0.01) for m in (self.net, self.other)]


class HalfAndHalf(TwoOptimizers):
    """Each trains a part of the adapted network."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        one, two = self.optimizers()
        one.zero_grad(), two.zero_grad()
        self.manual_backward(self.loss(batch))
        one.step(), two.step()

    def configure_optimizers(self) -> Any:
        lp.handles(self)  # the adapter is there: it lies below these layers
        return [torch.optim.AdamW(self.net[i].parameters(), lr=0.01) for i in (0, 3)]


@pytest.mark.parametrize("cls", [TwoOptimizers, HalfAndHalf])
def test_schedule_counts_a_batch_once_however_many_optimizers_step(cls: Any, tmp_path: Path) -> None:
    Recorded.log.clear()
    with registered(Scheduled):
        run = trainer(tmp_path, callback(Scheduled(rank=2, targets=["0", "3"]), module="net"))
        run.fit(cls(), loader())
    assert Recorded.log[0] == ("start", 4)
    assert run.global_step == 8  # Lightning counts every optimizer
    names = [entry[0] for entry in Recorded.log[1:]]
    assert names.count("after") == 4
    assert names.count("before") == (4 if cls is TwoOptimizers else 8)


# ---------------------------------------------------------------------- neighbours


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_learning_rate_finder_leaves_the_base_and_trains_early_optimizers(tmp_path: Path) -> None:
    """It trains before on_fit_start and without other callbacks: the base has to be still and the adapter in the optimizer by then."""

    class EarlyNorm(Norm):
        def __init__(self, lr: float = 0.01) -> None:
            super().__init__(lr)
            self.early = torch.optim.AdamW(self.parameters(), lr=lr)

        def configure_optimizers(self) -> Any:
            return self.early

    class Look(pl.Callback):
        moved: ClassVar[list[float]] = []

    module = EarlyNorm()
    before = base_state(module)
    step = EarlyNorm.training_step

    def spy(self: Any, batch: Any, batch_idx: int) -> Tensor:
        Look.moved.append(float(self.net[0].peft.default.lora_B.detach().abs().max()))
        return step(self, batch, batch_idx)

    EarlyNorm.training_step = spy  # type: ignore[method-assign]
    finder = LearningRateFinder(num_training_steps=6, min_lr=1e-4, max_lr=1e-2)
    run = trainer(tmp_path, finder, callback(NORM), max_epochs=2)
    run.fit(module, loader())
    assert max(Look.moved[1:6]) > 0  # it measured the adapter
    assert Look.moved[6] == 0  # and put it back
    assert same(before, base_state(module))
    assert finder.optimal_lr is not None
    assert {id(p) for g in run.optimizers[0].param_groups for p in g["params"]} == {
        id(p) for p in lp.handles(module)["default"].trainable_parameters()
    }


def test_batch_size_finder(tmp_path: Path) -> None:
    class Sized(Plain):
        size = 2

        def train_dataloader(self) -> Any:
            return loader(64, batch_size=self.size)

    module = Sized()
    before = base_state(module)
    trainer(tmp_path, BatchSizeFinder(max_trials=2, steps_per_trial=1, batch_arg_name="size"), callback()).fit(module)
    assert module.size == 4
    assert same(before, base_state(module))
    assert adapter_state(module)["net.0.peft.default.lora_B"].abs().max() > 0


@pytest.mark.filterwarnings("ignore:You requested to overfit")
@pytest.mark.parametrize(
    "options",
    [
        {"fast_dev_run": True},
        {"overfit_batches": 2},
        {"accumulate_grad_batches": 3},
        {"precision": "bf16-mixed"},
        {"precision": "bf16-true"},
        {"precision": "64-true"},
        {"gradient_clip_val": 0.1},
        {"max_steps": 4, "max_epochs": -1},
    ],
    ids=lambda options: ",".join(options),
)
@pytest.mark.parametrize("cls", [Plain, EarlyOptimizer])
def test_trainer_options(options: dict[str, Any], cls: Any, tmp_path: Path) -> None:
    module = cls()
    before = base_state(module)
    trainer(tmp_path, callback(export=True), EarlyStopping("val_loss"), **options).fit(module, loader(shuffle=False))
    assert all(torch.equal(before[k].to(v), v) for k, v in base_state(module).items())
    assert adapter_state(module)["net.0.peft.default.lora_B"].abs().max() > 0
    assert (tmp_path / "adapter").exists() is not options.get("fast_dev_run", False)


def test_table_says_what_trains(tmp_path: Path, capsys: Any) -> None:
    trainer(tmp_path, callback(verbose=True)).fit(Plain(), loader())
    text = capsys.readouterr().out
    for word in ("LoRA on 'net', a Sequential", "lora_A 2x32", "lora_B 2x2", "checkpoint"):
        assert word in text
    trainer(tmp_path, callback()).fit(Plain(), loader())
    assert capsys.readouterr().out == ""


def test_table_estimates_the_checkpoint(tmp_path: Path) -> None:
    from lightning_peft.training.shards import Shards
    from lightning_peft.training.table import budget

    module = Plain()
    handle = callback().apply(module)
    parameters = handle.trainable_parameters()
    size = sum(p.numel() * 4 for p in parameters)
    for optimizer, copies in (
        (torch.optim.AdamW(parameters), 2),
        (torch.optim.SGD(parameters, lr=1.0), 0),
        (torch.optim.SGD(parameters, lr=1.0, momentum=0.9), 1),
        (torch.optim.AdamW(parameters, amsgrad=True), 3),
    ):
        assert budget(handle, {}, [optimizer], Shards(handle.root), full=False).checkpoint == (1 + copies) * size
    whole = budget(handle, {}, [], Shards(handle.root), full=True).checkpoint
    assert whole == sum(p.numel() * 4 for p in module.parameters())


@pytest.mark.parametrize("scheme", ["nf4", "int8"])
def test_table_counts_what_codes_stand_for(scheme: str) -> None:
    from lightning_peft.training.shards import Shards
    from lightning_peft.training.table import budget

    net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 64, bias=False))
    entries = sum(p.numel() for p in net.parameters())
    handle = lp.inject(lp.quantize(net, scheme, backend="torch", skip=[]), lp.LoRA(rank=2, targets="all-linear"))
    assert budget(handle, {}, [], Shards(net), full=False).base == entries


ADALORA = lp.AdaLoRA(initial_rank=2, target_rank=1, warmup=1, final=1, targets=["0", "3"])


class Steps(pl.Callback):
    """Notes the steps of the schedule at the end of training."""

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        schedule = next(c for c in trainer.callbacks if isinstance(c, lp.PEFTCallback)).run.schedule
        self.seen = (schedule.step, schedule.total_steps, trainer.global_step)


def test_learning_rate_finder_and_a_schedule(tmp_path: Path) -> None:
    """The finder saves and restores before the schedule has started."""
    finder, steps = LearningRateFinder(num_training_steps=6, min_lr=1e-4, max_lr=1e-2), Steps()
    trainer(tmp_path, callback(ADALORA), finder, steps, max_epochs=2).fit(Plain(), loader())
    assert steps.seen == (8, 8, 8)


def test_batch_size_finder_and_a_schedule(tmp_path: Path) -> None:
    class Sized(pl.LightningDataModule):
        batch_size = 2

        def train_dataloader(self) -> Any:
            return loader(32, batch_size=self.batch_size)

        def val_dataloader(self) -> Any:
            return loader(8, shuffle=False)

    data, steps = Sized(), Steps()
    finder = BatchSizeFinder(steps_per_trial=1, max_trials=1)
    trainer(tmp_path, callback(ADALORA), finder, steps, max_epochs=1).fit(Plain(), datamodule=data)
    total = 32 // data.batch_size
    assert steps.seen == (total, total, total)
