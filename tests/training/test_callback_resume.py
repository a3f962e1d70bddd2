"""Design invariant 8: an interrupted run that resumes gives the weights of the uninterrupted one, bit for bit."""

from __future__ import annotations

import io
import random
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import lightning_peft as lp
from lightning_peft.checkpoint import read_adapter
from lightning_peft.errors import ConfigError
from lightning_peft.training import rng
from tests.backbones import VOCAB, llama, t5, vit
from tests.training.toys import (
    LORA,
    InConfigureModel,
    InSetup,
    Interrupt,
    Plain,
    adapter_state,
    base_state,
    callback,
    loader,
    same,
    trainer,
)

pytestmark = pytest.mark.filterwarnings("ignore:The dirpath has changed")

ADALORA = {
    "class_path": "AdaLoRA",
    "init_args": {"initial_rank": 2, "target_rank": 1, "warmup": 2, "final": 4, "targets": ["0", "3"], "dropout": 0.1},
}
COMPOSED = [ADALORA, {"class_path": "BitFit"}]
# One of its rounds is finished at step 4 of 8, and the next on its way.
RELORA = {"class_path": "ReLoRA", "init_args": {"rank": 1, "rounds": 3, "warmup": 1, "targets": ["0", "3"], "dropout": 0.1}}
DYLORA = {"class_path": "DyLoRA", "init_args": {"rank": 2, "targets": ["0", "3"], "dropout": 0.1}}
DIFF = {"class_path": "DiffPruning", "init_args": {"share": 0.1, "targets": ["0", "3"]}}


def fit(
    folder: Path, make: Any, strategy: Any, *extra: Any, path: Any = None, data: Any = None, keep: Any = None, **options: Any
) -> Any:
    """Fit four epochs from one seed; return the module and the Trainer."""
    torch.manual_seed(11)
    random.seed(11)
    np.random.seed(11)
    module = make()
    checkpoints = ModelCheckpoint(folder, save_top_k=-1, filename="{step}", **(keep or {}))
    options = {"max_epochs": 4, "enable_checkpointing": True, **options}
    run = trainer(folder, callback(strategy), *extra, checkpoints, **options)
    try:
        run.fit(module, loader() if data is None else data, ckpt_path=path)
    except SystemExit:  # what Lightning makes of Ctrl-C
        assert any(isinstance(e, Interrupt) for e in extra)
    return module, run


def assert_equal(one: Any, other: Any) -> None:
    """Weights, optimizer and scheduler are the same, bit for bit."""
    (module, run), (twin, twin_run) = one, other
    assert same(dict(module.state_dict()), dict(twin.state_dict()))
    states = [r.optimizers[0].state_dict()["state"] for r in (run, twin_run)]
    assert states[0].keys() == states[1].keys()
    for key, record in states[0].items():
        assert same(
            {k: torch.as_tensor(v) for k, v in record.items()}, {k: torch.as_tensor(v) for k, v in states[1][key].items()}
        )
    assert [c.scheduler.state_dict() for c in run.lr_scheduler_configs] == [
        c.scheduler.state_dict() for c in twin_run.lr_scheduler_configs
    ]


@pytest.mark.parametrize("make", [Plain, InConfigureModel, InSetup])
@pytest.mark.parametrize("strategy", [LORA, ADALORA, COMPOSED], ids=["lora", "adalora", "composed"])
def test_resume_after_ctrl_c_is_exact(make: Any, strategy: Any, tmp_path: Path) -> None:
    whole = fit(tmp_path / "whole", make, strategy)
    fit(tmp_path / "part", make, strategy, Interrupt(9))
    files = sorted(p.name for p in (tmp_path / "part").iterdir())
    assert files == ["step=4.ckpt", "step=8.ckpt"]  # intact, and no adapter folder from half a run
    resumed = fit(tmp_path / "part2", make, strategy, path=tmp_path / "part" / "step=8.ckpt")
    assert_equal(whole, resumed)


@pytest.mark.parametrize("strategy", [LORA, ADALORA], ids=["lora", "adalora"])
def test_what_ctrl_c_itself_saves_can_be_resumed(strategy: Any, tmp_path: Path) -> None:
    """The file is written after on_exception, when the run of the callback is over; the batch at hand is done again."""
    whole = fit(tmp_path / "whole", Plain, strategy, data=Stateful(loader()))
    keep = {"save_on_exception": True, "every_n_train_steps": 100}
    fit(tmp_path / "a", Plain, strategy, Interrupt(9), data=Stateful(loader()), keep=keep)
    (path,) = (tmp_path / "a").iterdir()
    assert path.name == "step=9.ckpt"
    assert_equal(whole, fit(tmp_path / "b", Plain, strategy, data=Stateful(loader()), path=path, keep=keep))


def test_resume_from_what_is_saved_after_fit_is_exact(tmp_path: Path) -> None:
    whole = fit(tmp_path / "whole", Plain, LORA)
    _, run = fit(tmp_path / "part", Plain, LORA, max_epochs=2)
    torch.rand(3)  # what the user does in between is no part of the run
    run.save_checkpoint(tmp_path / "after.ckpt")
    assert_equal(whole, fit(tmp_path / "part2", Plain, LORA, path=tmp_path / "after.ckpt"))


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_what_a_finder_saves_in_a_resumed_run_keeps_the_schedule(tmp_path: Path) -> None:
    """It saves between the restore and on_fit_start, and restores that."""
    fit(tmp_path / "a", Plain, ADALORA)
    steps: list[int] = []

    class Finder(pl.Callback):
        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            peft = next(c for c in trainer.callbacks if hasattr(c, "init_from"))
            peft.load_state_dict(peft.state_dict())

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            steps.append(next(c for c in trainer.callbacks if hasattr(c, "init_from")).run.schedule.step)

    run = trainer(tmp_path, Finder(), callback(ADALORA), max_epochs=4)
    run.fit(Plain(), loader(), ckpt_path=tmp_path / "a" / "step=8.ckpt")
    assert steps == [8]


@pytest.mark.parametrize("options", [{"save_on_train_epoch_end": True}, {"every_n_train_steps": 4}])
def test_resume_is_exact_wherever_an_epoch_end_is_saved(options: dict[str, Any], tmp_path: Path) -> None:
    whole = fit(tmp_path / "a", Plain, LORA, keep=options)
    assert_equal(whole, fit(tmp_path / "b", Plain, LORA, path=tmp_path / "a" / "step=8.ckpt", keep=options))


def test_resume_is_exact_when_steps_are_counted(tmp_path: Path) -> None:
    """With max_steps Lightning enters the finished epoch once more, and its iterator draws a seed."""
    options = {"max_epochs": -1, "max_steps": 14}
    whole = fit(tmp_path / "a", Plain, LORA, **options)
    assert_equal(whole, fit(tmp_path / "b", Plain, LORA, path=tmp_path / "a" / "step=8.ckpt", **options))


@pytest.mark.parametrize("strategy", [ADALORA, RELORA, DYLORA], ids=["adalora", "relora", "dylora"])
def test_resume_with_accumulation_is_exact(strategy: Any, tmp_path: Path) -> None:
    options = {"accumulate_grad_batches": 2}
    whole = fit(tmp_path / "a", Plain, strategy, **options)
    assert_equal(whole, fit(tmp_path / "b", Plain, strategy, path=tmp_path / "a" / "step=4.ckpt", **options))


class Language(Plain):
    """A causal LM as from_pretrained returns it: in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.net = self.network()

    def network(self) -> Any:
        return llama(attention_dropout=0.1).eval()

    def loss(self, batch: Any) -> Tensor:
        return self.net(input_ids=batch[0], labels=batch[0]).loss

    def val_dataloader(self) -> Any:
        return tokens(shuffle=False)


class LazyLanguage(Language):
    def __init__(self) -> None:
        super().__init__()
        self.net = None

    def configure_model(self) -> None:
        if self.net is None:
            self.net = self.network()


class EncoderDecoder(Language):
    def network(self) -> Any:
        return t5(dropout_rate=0.1).eval()


def tokens(*, shuffle: bool = True) -> Any:
    ids = torch.randint(3, VOCAB, (8, 6), generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(ids), batch_size=4, shuffle=shuffle)


PROMPTED = {
    "lora": {"class_path": "LoRA", "init_args": {"rank": 2, "dropout": 0.1}},
    "prefix": {"class_path": "PrefixTuning", "init_args": {"num_virtual_tokens": 2}},
    "prompt": {"class_path": "PromptTuning", "init_args": {"num_virtual_tokens": 2}},
    "p-tuning-lstm": {
        "class_path": "PTuning",
        "init_args": {"num_virtual_tokens": 2, "encoder": "lstm", "hidden_size": 4, "dropout": 0.1},
    },
    "p-tuning-v2": {"class_path": "PTuningV2", "init_args": {"num_virtual_tokens": 2, "dropout": 0.1}},
}
# What a network computes, and what stands beside other adapters: how early the model is built is the same to them.
COMPUTED = {
    "prefix-mlp": {
        "class_path": "PrefixTuning",
        "init_args": {"num_virtual_tokens": 2, "projection": True, "projection_size": 5},
    },
    "p-tuning-mlp": {"class_path": "PTuning", "init_args": {"num_virtual_tokens": 2, "encoder": "mlp", "hidden_size": 4}},
    "mam": {"class_path": "MAM", "init_args": {"num_virtual_tokens": 2, "projection_size": 5, "width": 3}},
    "unipelt": {
        "class_path": "UniPELT",
        "init_args": {"num_virtual_tokens": 2, "projection_size": 5, "rank": 2, "reduction_factor": 4, "dropout": 0.1},
    },
}


@pytest.mark.parametrize(
    ("make", "strategy"),
    [
        *(pytest.param(m, s, id=f"{m.__name__}-{k}") for m in (Language, LazyLanguage) for k, s in PROMPTED.items()),
        *(pytest.param(m, s, id=f"{m.__name__}-{k}") for m in (Language, EncoderDecoder) for k, s in COMPUTED.items()),
        pytest.param(EncoderDecoder, PROMPTED["prompt"], id="EncoderDecoder-prompt"),
    ],
)
def test_language_model_resumes_exactly(make: Any, strategy: Any, tmp_path: Path) -> None:
    whole = fit(tmp_path / "a", make, strategy, data=tokens())
    assert_equal(whole, fit(tmp_path / "b", make, strategy, path=tmp_path / "a" / "step=4.ckpt", data=tokens()))


class Vision(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.net = vit().eval()

    def loss(self, batch: Any) -> Tensor:
        return self.net(pixel_values=batch[0]).logits.square().mean()

    def val_dataloader(self) -> Any:
        return images(shuffle=False)


def images(*, shuffle: bool = True) -> Any:
    pixels = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(pixels), batch_size=4, shuffle=shuffle)


@pytest.mark.parametrize("deep", [True, False])
def test_vision_model_with_prompts_resumes_exactly(deep: bool, tmp_path: Path) -> None:
    strategy = {"class_path": "VisualPromptTuning", "init_args": {"num_virtual_tokens": 2, "deep": deep, "dropout": 0.1}}
    whole = fit(tmp_path / "a", Vision, strategy, data=images())
    assert_equal(whole, fit(tmp_path / "b", Vision, strategy, path=tmp_path / "a" / "step=4.ckpt", data=images()))


@pytest.mark.parametrize("make", [Plain, InConfigureModel])
def test_adapters_are_fp32_under_bf16_true_and_resume_exactly(make: Any, tmp_path: Path) -> None:
    options = {"precision": "bf16-true"}
    module, run = fit(tmp_path / "a", make, LORA, **options)
    assert {v.dtype for v in adapter_state(module).values()} == {torch.float32}
    assert module.net[0].weight.dtype == torch.bfloat16
    saved = read_adapter(tmp_path / "a" / "step=8.ckpt").state["0.lora_B"]
    assert not torch.equal(saved, saved.bfloat16().float())  # a step was kept that 16 bit would have rounded
    assert run.optimizers[0].state_dict()["state"][0]["exp_avg"].dtype == torch.float32
    assert_equal((module, run), fit(tmp_path / "b", make, LORA, path=tmp_path / "a" / "step=8.ckpt", **options))


def test_initial_adapter_is_not_rounded_by_bf16_true(tmp_path: Path) -> None:
    class Look(pl.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            self.state = adapter_state(pl_module)

    look = Look()
    fit(tmp_path, Plain, LORA, look, precision="bf16-true", max_epochs=1)
    torch.manual_seed(11)
    twin = Plain()
    callback().apply(twin)
    assert same(look.state, adapter_state(twin))


def test_chosen_adapter_dtype_is_kept(tmp_path: Path) -> None:
    module = Plain()
    trainer(tmp_path, callback(adapter_dtype="bfloat16"), precision="bf16-true").fit(module, loader())
    assert {v.dtype for v in adapter_state(module).values()} == {torch.bfloat16}


def test_schedule_needs_to_know_the_end(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="set max_epochs or max_steps"):
        trainer(tmp_path, callback(ADALORA), max_epochs=-1).fit(Plain(), loader())


# How many steps are too few is known when the Trainer is made, or once the loader is read.
@pytest.mark.parametrize(
    ("make", "length"), [(Plain, "max_steps"), (Plain, "limit_train_batches"), (InConfigureModel, "max_steps")]
)
@pytest.mark.parametrize(
    ("strategy", "steps", "message"),
    [
        (ADALORA, 4, "leave no step of 4 in which the budget could shrink. Train longer, or lower them"),
        (RELORA, 4, "3 rounds of 4 steps have 1 each, and warmup=1 leaves none of them. Train longer, or lower"),
        (DIFF, 1, "of 1 steps leaves 1 before the pruning and 0 after it; both stages need one. Train longer"),
    ],
    ids=["adalora", "relora", "diff"],
)
def test_run_too_short_for_a_schedule_leaves_the_module_as_it_was(
    make: Any, length: str, strategy: Any, steps: int, message: str, tmp_path: Path
) -> None:
    module, peft, before = make(), callback(strategy), base_state(Plain())
    with pytest.raises(ConfigError, match=message):
        trainer(tmp_path, peft, **{length: steps}, max_epochs=-1 if length == "max_steps" else 1).fit(module, loader())
    assert not lp.handles(module)
    assert same(before, dict(module.state_dict()))
    assert all(parameter.requires_grad for parameter in module.parameters())
    run = trainer(tmp_path, peft, max_epochs=2)
    run.fit(module, loader())
    assert run.global_step == peft.state_dict()["schedule"]["step"] == 8
    assert same(before, base_state(module))


def test_frozen_tensors_of_a_resumed_run_stay_frozen(tmp_path: Path) -> None:
    module, _ = fit(tmp_path / "a", Plain, LORA)
    resumed, _ = fit(tmp_path / "b", Plain, LORA, path=tmp_path / "a" / "step=8.ckpt")
    flags = [{n: p.requires_grad for n, p in m.named_parameters()} for m in (module, resumed)]
    assert flags[0] == flags[1]
    assert {n for n, flag in flags[0].items() if flag} == set(adapter_state(module))


# ---------------------------------------------------------------------- mid-epoch


class Stateful(DataLoader[Any]):
    """The smallest loader that resumes in the middle: an order from the epoch, and where it is."""

    def __init__(self, source: DataLoader[Any]) -> None:
        super().__init__(source.dataset, batch_size=source.batch_size)
        self.at = self.epoch = 0

    def __iter__(self) -> Any:
        order = torch.randperm(len(self.dataset), generator=torch.Generator().manual_seed(self.epoch)).split(self.batch_size)
        start, self.at = self.at, 0
        for index in range(start, len(order)):
            self.at = (index + 1) % len(order)
            self.epoch += self.at == 0
            yield [torch.stack(column) for column in zip(*(self.dataset[i] for i in order[index].tolist()), strict=True)]

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at, "epoch": self.epoch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at, self.epoch = state["at"], state["epoch"]


def test_middle_of_an_epoch_is_exact_with_a_loader_that_has_state(tmp_path: Path) -> None:
    keep = {"every_n_train_steps": 3}
    whole = fit(tmp_path / "a", Plain, LORA, keep=keep, data=Stateful(loader()))
    path = tmp_path / "a" / "step=6.ckpt"
    assert_equal(whole, fit(tmp_path / "b", Plain, LORA, keep=keep, data=Stateful(loader()), path=path))


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
def test_middle_of_an_epoch_names_a_loader_without_state(tmp_path: Path) -> None:
    keep = {"every_n_train_steps": 3}
    fit(tmp_path / "a", Plain, LORA, keep=keep)
    with pytest.warns(UserWarning, match="batch 2 of an epoch, and DataLoader over TensorDataset has no state"):
        fit(tmp_path / "b", Plain, LORA, keep=keep, path=tmp_path / "a" / "step=6.ckpt")


class Stream:
    """A loader with a state and without a length."""

    def __init__(self) -> None:
        self.at = 0

    def __iter__(self) -> Any:
        batches = list(loader(shuffle=False))
        start, self.at = self.at, 0
        for self.at in range(start + 1, len(batches) + 1):
            yield batches[self.at - 1]
        self.at = 0

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


def test_middle_of_an_epoch_names_a_loader_that_is_read_ahead(tmp_path: Path) -> None:
    keep = {"every_n_train_steps": 3}
    fit(tmp_path / "a", Plain, LORA, keep=keep, data=Stream())
    with pytest.warns(UserWarning, match="Stream has no length, so Lightning reads it one batch ahead"):
        fit(tmp_path / "b", Plain, LORA, keep=keep, path=tmp_path / "a" / "step=6.ckpt", data=Stream())


# ---------------------------------------------------------------------- random states


def draw() -> tuple[Any, ...]:
    return random.random(), random.gauss(0, 1), float(np.random.randn()), torch.rand(2).tolist()


def test_random_states_survive_a_safe_checkpoint() -> None:
    random.gauss(0, 1), np.random.randn()  # both keep a second number for the next call
    buffer = io.BytesIO()
    torch.save({"rng": rng.gather_rng_states()}, buffer)
    expected = [draw() for _ in range(3)]
    buffer.seek(0)
    rng.restore_rank(torch.load(buffer, weights_only=True)["rng"])
    assert [draw() for _ in range(3)] == expected


def test_another_number_of_processes_is_said() -> None:
    states = rng.gather_rng_states() * 2
    before = torch.get_rng_state()
    torch.rand(1)
    with pytest.warns(UserWarning, match="2 processes, this run has 1"):
        rng.restore_rank(states)
    assert not torch.equal(before, torch.get_rng_state())


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_testing_a_checkpoint_leaves_random_states_alone(tmp_path: Path) -> None:
    class Look(pl.Callback):
        def on_test_start(self, *args: Any) -> None:
            self.state = torch.get_rng_state()

    fit(tmp_path, Plain, LORA, max_epochs=1)
    seen = []
    for path in (None, tmp_path / "step=4.ckpt"):
        torch.manual_seed(99)
        run = trainer(tmp_path, callback(), look := Look())
        run.test(Plain(), loader(shuffle=False), ckpt_path=path, verbose=False)
        seen.append(look.state)
    assert torch.equal(*seen)
