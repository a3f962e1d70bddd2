"""The second pass of AdaMix in training: any LightningModule, both kinds of optimisation, accumulation, checkpointing, exact resume."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import lightning_peft as lp
from lightning_peft.errors import ConfigError
from lightning_peft.nn.chunked_loss import IGNORE
from lightning_peft.nn.mixture import consistency
from lightning_peft.strategies.schedule import SecondPass
from lightning_peft.surgery.passes import in_pass
from lightning_peft.surgery.recompute import GradientCheckpointing
from lightning_peft.training.second_pass import Repeater
from tests.training.language import Language, batches
from tests.training.test_callback_resume import assert_equal, fit
from tests.training.test_module_loss import _batches, _joined, _module
from tests.training.tiny import loader as fixed_loader
from tests.training.tiny import trainer as quiet_trainer
from tests.training.toys import Interrupt, Plain, adapter_state, callback, network, trainer

pytestmark = pytest.mark.filterwarnings(
    "ignore:You defined a `validation_step` but have no `val_dataloader`", "ignore:The dirpath has changed"
)
MIX = lp.AdaMix(part=lp.LoRA(rank=2, targets=("0", "3")), consistency=0.5, outputs=".")
# Sharing one copy of `up`, which starts at zero, the two passes would hardly differ in eight steps.
BOTTLENECKS = lp.AdaMix(part=lp.HoulsbyAdapter(width=2, targets=("0", "3")), sharing_up=False, consistency=0.5, outputs=".")
ADAMIX = {
    "class_path": "AdaMix",
    "init_args": {
        "part": {"class_path": "LoRA", "init_args": {"rank": 2, "targets": ["0", "3"], "dropout": 0.1}},
        "outputs": ".",
    },
}


def rows(count: int = 8) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(7)
    return [(torch.randn(4, 32, generator=generator), torch.randint(2, (4,), generator=generator)) for _ in range(count)]


def data(count: int = 8) -> DataLoader[Any]:
    return DataLoader(rows(count), batch_size=None)  # type: ignore[arg-type]


class Classifier(Plain):
    """A project's own module."""

    def __init__(self) -> None:
        super().__init__()
        self.net[2].p = 0.0

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return F.cross_entropy(self(x), y)

    def val_dataloader(self) -> Any:
        return data(1)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05)


class Manual(Classifier):
    """Steps by hand, after every second batch."""

    def __init__(self, every: int) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.every = every

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.manual_backward(self.loss(batch) / self.every)
        if (batch_idx + 1) % self.every == 0:
            optimizer: Any = self.optimizers()
            optimizer.step()
            optimizer.zero_grad()


def by_hand(mix: lp.AdaMix, every: int, weight: float = 0.5) -> dict[str, Tensor]:
    """The same training without Lightning."""
    torch.manual_seed(11)
    net = network().train()
    net[2].p = 0.0
    handle = lp.inject(net, mix)
    schedule = handle.strategy.schedule(handle)
    schedule.on_start(8)
    optimizer = torch.optim.SGD(handle.trainable_parameters(), lr=0.05)
    for i, (x, y) in enumerate(rows()):
        first = net(x)
        with in_pass(1):
            second = net(x)
        ((F.cross_entropy(first, y) + weight * consistency(first, second)) / every).backward()
        if (i + 1) % every == 0:
            optimizer.step()
            optimizer.zero_grad()
            schedule.after_step(optimizer)
    return handle.state_dict()


def found(module: pl.LightningModule) -> dict[str, Tensor]:
    return lp.handles(module)["default"].state_dict()


def assert_close(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for key, value in a.items():
        torch.testing.assert_close(b[key], value, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("how", ["automatic", "manual"])
@pytest.mark.parametrize("mix", [MIX, BOTTLENECKS], ids=lambda mix: mix.inner.info.name)
def test_training_adds_the_consistency_of_two_passes(mix: lp.AdaMix, how: str, every: int, tmp_path: Path) -> None:
    torch.manual_seed(11)
    module: Any = Manual(every) if how == "manual" else Classifier()
    accumulate = every if how == "automatic" else 1
    trainer(tmp_path, callback(mix), accumulate_grad_batches=accumulate).fit(module, data())
    expected = by_hand(mix, every)
    if how == "manual" and every == 2:
        # What is added to a loss that a module has divided by itself is not divided with it.
        expected = by_hand(mix, every, weight=1.0)
    assert_close(expected, found(module))
    assert not module.net._forward_hooks


def test_without_consistency_there_is_one_pass(tmp_path: Path) -> None:
    module, calls = Classifier(), []
    module.net.register_forward_hook(lambda net, *args: calls.append(net.training))
    trainer(tmp_path, callback(lp.AdaMix(part=MIX.inner, consistency=0.0, outputs="."))).fit(module, data())
    assert sum(calls) == 8


def test_evaluation_runs_the_averages_once(tmp_path: Path) -> None:
    module, peft, calls = Classifier(), callback(MIX), []
    trainer(tmp_path, peft).fit(module, data())
    module.net.register_forward_hook(lambda *args: calls.append(1))
    (result,) = trainer(tmp_path, peft).validate(module, data(2), verbose=False)
    assert len(calls) == 2
    plain = lp.Mixture.deploy(lp.handles(module)["default"])
    with torch.no_grad():
        expected = torch.stack([F.cross_entropy(module.net(x), y) for x, y in rows(2)]).mean()
    assert result["val_loss"] == pytest.approx(float(expected), rel=1e-6)
    assert isinstance(plain.strategy, lp.LoRA)


# ---------------------------------------------------------------- models that return logits among other things


def language(folder: Path, checkpointing: Any, **options: Any) -> Any:
    torch.manual_seed(11)
    strategy = lp.AdaMix(part=lp.LoRA(rank=2, dropout=0.1), sharing_up=False)
    module = Language()
    trainer(folder, callback(strategy, gradient_checkpointing=checkpointing), **options).fit(module, batches())
    return module


@pytest.mark.parametrize("checkpointing", [True, {"reentrant": True}, {"offload": True}], ids=str)
def test_training_is_the_same_under_gradient_checkpointing(checkpointing: Any, tmp_path: Path) -> None:
    assert_close(adapter_state(language(tmp_path, False)), adapter_state(language(tmp_path, checkpointing)))


def test_padding_does_not_count(tmp_path: Path) -> None:
    seen: list[Tensor] = []

    def loss(first: Tensor, second: Tensor) -> Tensor:
        seen.append(first)
        return consistency(first, second)

    net = network().train()
    repeater = Repeater(lp.inject(net, MIX), SecondPass(loss), by_itself=True)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    for given, count in ((mask, 3), (None, 6), (torch.ones(2, 4), 6)):
        logits = torch.randn(2, 3, 5, requires_grad=True)
        repeater.open()
        output = SimpleNamespace(logits=logits)
        repeater._after_forward(_Root(output), (), {} if given is None else {"attention_mask": given}, output)
        assert seen[-1].shape == (count, 5)
        assert repeater.term is not None


class _Root(nn.Module):
    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.output


@pytest.mark.parametrize(
    ("outputs", "output"),
    [
        (None, {"logits": torch.zeros(2, 3)}),
        ("scores", SimpleNamespace(scores=torch.zeros(2, 3))),
        ("1", (torch.zeros(2), torch.zeros(2, 3))),
        (".", torch.zeros(2, 3)),
    ],
)
def test_logits_are_where_the_user_says(outputs: str | None, output: Any) -> None:
    handle = lp.inject(network(), MIX)
    repeater = Repeater(handle, SecondPass(consistency, outputs), by_itself=True)
    assert repeater._logits(output).shape == (2, 3)
    for wrong in (torch.zeros(2), torch.zeros(2, 1), torch.zeros(2, 3).long(), None, (), {"loss": torch.zeros(())}):
        with pytest.raises(ConfigError, match="outputs='name'"):
            repeater._logits(wrong)


# ---------------------------------------------------------------- PEFTLightningModule, whose loss does not call the head of all positions

TEXT = lp.Mixture(part=lp.LoRA(rank=2), sharing_up=False, consistency=0.5)


def fitted(given: list[dict[str, Tensor]], **options: Any) -> dict[str, Tensor]:
    module = _module(strategy=TEXT)
    quiet_trainer(max_steps=1, **options).fit(module, fixed_loader(given))
    return module.handle.state_dict()


def test_a_language_model_compares_its_labelled_positions() -> None:
    batch = _joined(_batches()[:2])
    module = _module(strategy=TEXT)
    schedule = module.handle.strategy.schedule(module.handle)
    schedule.on_start(1)
    module.base.train()
    parameters = {s.key: s.tensor() for s in module.handle.slots}

    def logits() -> Tensor:
        all_of_them = module.base(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        return all_of_them[batch["labels"][:, 1:] != IGNORE]

    first = logits()
    with in_pass(1):
        second = logits()
    labels = batch["labels"][:, 1:]
    (F.cross_entropy(first, labels[labels != IGNORE]) + 0.5 * consistency(first, second)).backward()
    expected = {key: (p - 0.5 * p.grad).detach() for key, p in parameters.items()}
    result = fitted([batch])
    for key, value in expected.items():
        torch.testing.assert_close(result[key], value, rtol=1e-9, atol=1e-11)


def test_accumulated_small_batches_equal_one_large_batch() -> None:
    small = _batches()[:2]
    one, two = fitted([_joined(small)]), fitted(small, accumulate_grad_batches=2)
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-9, atol=1e-11)


# ---------------------------------------------------------------- resume, and what is refused


def test_a_resumed_run_draws_what_the_whole_one_did(tmp_path: Path) -> None:
    whole = fit(tmp_path / "whole", Plain, ADAMIX)
    fit(tmp_path / "part", Plain, ADAMIX, Interrupt(9))
    assert_equal(whole, fit(tmp_path / "part2", Plain, ADAMIX, path=tmp_path / "part" / "step=8.ckpt"))


def test_a_root_that_does_not_run_is_an_error(tmp_path: Path) -> None:
    class Calls(Classifier):
        """Runs the layers of its root one by one."""

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.net:
                x = layer(x)
            return x

    class CallsByHand(Manual):
        forward = Calls.forward

    for module in (Calls(), CallsByHand(1)):
        with pytest.raises(ConfigError, match="did not run in the training_step"):
            trainer(tmp_path, callback(MIX)).fit(module, data())
        assert not module.net._forward_hooks


def test_an_output_without_logits_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"outputs='\.'"):
        trainer(tmp_path, callback(lp.AdaMix(part=MIX.inner))).fit(Classifier(), data())


def test_reentrant_checkpointing_on_several_ranks_is_refused() -> None:
    repeater = Repeater(lp.inject(network(), MIX), SecondPass(consistency), by_itself=True)
    for reentrant, world in ((True, 1), (False, 2)):
        repeater.check(SimpleNamespace(world_size=world), GradientCheckpointing(reentrant=reentrant))
    with pytest.raises(ConfigError, match="'reentrant': False"):
        repeater.check(SimpleNamespace(world_size=2), GradientCheckpointing(reentrant=True))
