"""The loss of an optimizer step is the mean over all its labelled tokens, however they are spread over batches."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from torch.optim import SGD
from torch.utils.data import DataLoader, IterableDataset
from transformers import LlamaForCausalLM

from lightning_peft.errors import ConfigError
from lightning_peft.nn.chunked_loss import IGNORE
from lightning_peft.strategies.reparameterized.lora import LoRA
from lightning_peft.training.losses import LookAhead
from lightning_peft.training.module import PEFTLightningModule
from tests.training.tiny import llama, loader, ragged, trained, trainer

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
LENGTHS = [[9, 4], [3, 5], [12, 7], [4, 4], [11, 3]]


def _module(*, strategy=None, dtype=torch.float64, **options) -> PEFTLightningModule:
    torch.manual_seed(0)
    base = LlamaForCausalLM(llama(tied=False)).to(dtype)
    options = {"lr_scheduler": None, "optimizer": lambda groups: SGD(groups, lr=0.5), **options}
    module = PEFTLightningModule(strategy or LoRA(rank=2), base, **options)
    with torch.no_grad():
        for parameter in module.handle.trainable_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return module


def _batches():
    generator = torch.Generator().manual_seed(0)
    return [ragged(lengths, generator=generator) for lengths in LENGTHS]


def _joined(batches):
    longest = max(b["input_ids"].shape[1] for b in batches)
    fill = {"input_ids": 0, "attention_mask": 0, "labels": IGNORE}
    return {
        key: torch.cat([F.pad(b[key], (0, longest - b[key].shape[1]), value=value) for b in batches])
        for key, value in fill.items()
    }


def _hf_step(batch):
    """The reference: the mean over all labels of one large batch, one SGD step."""
    module = _module()
    loss = _mean(module, batch)
    loss.backward()
    return loss.detach(), {n: p.detach() - 0.5 * p.grad for n, p in module.named_parameters() if p.requires_grad}


def _mean(module, batch):
    logits = module.base(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())


class Unsized(IterableDataset):
    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


@pytest.mark.parametrize("sized", [True, False])
def test_accumulated_small_batches_equal_one_large_batch(sized):
    batches = _batches()[:3]
    expected_loss, expected = _hf_step(_joined(batches))
    module = _module()
    data = loader(batches) if sized else DataLoader(Unsized(batches), batch_size=None)
    losses = []
    original = module.training_step

    def record(batch, batch_idx):
        losses.append(original(batch, batch_idx))
        return losses[-1]

    module.training_step = record
    trainer(accumulate_grad_batches=3).fit(module, data)
    assert abs(sum(losses) / 3 - expected_loss) < 1e-12
    weights = trained(module)
    for name, value in expected.items():
        assert (weights[name] - value).abs().max() < 1e-12, name
    # an average of averages is something else, so the test can tell
    plain = sum(_mean(_module(), b) for b in batches) / 3
    assert abs(plain - expected_loss) > 1e-3


def test_the_last_short_window_of_an_epoch_is_a_mean_of_its_own():
    batches = _batches()
    first = _module()
    trainer(accumulate_grad_batches=2).fit(first, loader(batches))
    second = _module()
    windows = [_joined(batches[:2]), _joined(batches[2:4]), batches[4]]
    trainer().fit(second, loader(windows))
    for name, value in trained(second).items():
        assert (trained(first)[name] - value).abs().max() < 1e-12, name


def test_a_window_ends_at_the_limit_of_batches():
    batches = _batches()
    first, second = _module(), _module()
    trainer(accumulate_grad_batches=2, limit_train_batches=3).fit(first, loader(batches))
    trainer().fit(second, loader([_joined(batches[:2]), batches[2]]))
    for name, value in trained(second).items():
        assert (trained(first)[name] - value).abs().max() < 1e-12, name


def test_nothing_is_read_beyond_the_window():
    batches = _batches()[:4]
    taken = []

    class Counting(torch.utils.data.Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, index):
            taken.append(index)
            return batches[index]

    module = _module()
    seen = []
    module.on_before_zero_grad = lambda optimizer: seen.append(len(taken))
    trainer(accumulate_grad_batches=2).fit(module, DataLoader(Counting(), batch_size=None))
    assert max(n for n in seen[:-1]) <= 4
    assert 2 in seen  # at the first optimizer step the loader stands at the end of the window
    assert taken == [0, 1, 2, 3]


def test_a_batch_without_labels_adds_nothing():
    batches = _batches()[:2]
    batches[1]["labels"].fill_(IGNORE)
    first, second = _module(), _module()
    trainer(accumulate_grad_batches=2).fit(first, loader(batches))
    trainer().fit(second, loader(batches[:1]))
    for name, value in trained(second).items():
        assert (trained(first)[name] - value).abs().max() < 1e-12, name


def test_ranks_share_one_mean(monkeypatch):
    """The number of labels is averaged over ranks, as DDP averages gradients: here another rank has three times as many."""
    batch = _batches()[0]
    alone, shared = _module(), _module()
    trainer().fit(alone, loader([batch]))
    run = trainer()
    monkeypatch.setattr(type(run), "world_size", 2)
    monkeypatch.setattr(run.strategy, "reduce", lambda value, reduce_op: value * 2)
    before = trained(shared)
    run.fit(shared, loader([batch]))
    for name, value in trained(alone).items():
        moved, half = value - before[name], trained(shared)[name] - before[name]
        assert (half - moved / 2).abs().max() < 1e-12, name


def test_look_ahead_hands_out_what_it_showed():
    ahead = LookAhead(iter(range(5)))
    assert next(ahead) == 0
    assert ahead.peek(2) == [1, 2]
    assert ahead.peek(9) == [1, 2, 3, 4]
    assert list(ahead) == [1, 2, 3, 4]


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_label_smoothing_is_for_training_only(smoothing):
    batch = _batches()[0]
    module = _module(label_smoothing=smoothing)
    logits = module.base(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].flatten(0, 1)
    loss = F.cross_entropy(logits, batch["labels"][:, 1:].flatten(), label_smoothing=smoothing)
    expected = {n: p.detach() - 0.5 * g for (n, p), g in _gradients(module, loss)}
    run = trainer()
    (before,) = run.validate(module, loader([batch]), verbose=False)
    assert abs(before["val_loss"] - _mean(module, batch)) < 1e-6  # plain, whatever trains
    run.fit(module, loader([batch]))
    assert abs(run.callback_metrics["train_loss"] - loss) < 1e-6
    for name, value in expected.items():
        assert (trained(module)[name] - value).abs().max() < 1e-12, name


def _gradients(module, loss):
    named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
    return zip(named, torch.autograd.grad(loss, [p for _, p in named]), strict=True)


@pytest.mark.parametrize("smoothing", [-0.1, 1.0])
def test_label_smoothing_is_a_share(smoothing):
    with pytest.raises(ConfigError, match=f"label_smoothing={smoothing}"):
        _module(label_smoothing=smoothing)


def test_mixed_precision_trains_as_in_fp32():
    def run(precision):
        module = _module(strategy=LoRA(rank=2, targets=["q_proj", "lm_head"]), dtype=torch.float32)
        before = trained(module)
        trainer(precision=precision, accumulate_grad_batches=2).fit(module, loader(_batches()[:2]))
        return {n: v - before[n] for n, v in trained(module).items()}

    wide, mixed = run("32-true"), run("bf16-mixed")
    for name, step in wide.items():
        assert step.norm() > 0
        assert (mixed[name] - step).norm() < 0.05 * step.norm(), name


@pytest.mark.dist
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded", "ignore:.*sync_dist=True")
def test_two_ranks_equal_one_large_batch():
    batches = _batches()[:4]
    first, second = _module(), _module()
    trainer().fit(first, loader([_joined(batches)]))
    trainer(strategy="ddp_fork", devices=2, accumulate_grad_batches=2).fit(second, loader(batches))
    for name, value in trained(first).items():
        assert (trained(second)[name] - value).abs().max() < 1e-12, name


def test_validation_in_bf16_sums_in_double():
    """Lightning's bf16-true converts the states of metrics too, and a sum in bf16 stands still after 256 equal batches."""
    module, batches = _module(dtype=torch.bfloat16), _batches()
    with torch.no_grad():
        totals = [module._score(module.base, batch).evaluate()[0].double() for batch in batches]
    labels = sum(int((batch["labels"][:, 1:] != IGNORE).sum()) for batch in batches)
    loss = trainer(precision="bf16-true").validate(module, loader(batches * 80), verbose=False)[0]["val_loss"]
    assert loss == pytest.approx(float(sum(totals)) / labels, rel=1e-6)
