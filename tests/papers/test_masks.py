"""Unstructured masks, arXiv 2111.09839 (FISH, random) and 2305.16742 (PaFi): which entries train, how many, and that no others move."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

import lightning_peft as lp
from lightning_peft.errors import CompatibilityError, ConfigError, ConflictError, DataError, FormatError, UnsupportedLayerError
from lightning_peft.loading.quantize import quantize
from lightning_peft.nn.entries import scattered
from lightning_peft.nn.masking import Mask, top_entries
from lightning_peft.quantization.config import Quantization
from lightning_peft.strategies.examples import examples_of
from lightning_peft.surgery.squared_gradients import SquaredGradients
from tests.backbones import BACKBONES, flat, loss_of, run
from tests.papers.toys import D, X, check_dense, install, mlp, randomize

ENTRIES = 48 * 32 + 32 + 32 * 64  # of the reference MLP: l1 has a bias
Y = torch.randn(5, 64, dtype=D, generator=torch.Generator().manual_seed(2))


def mask_of(handle: lp.Handle) -> Mask:
    (mask,) = (m for m in handle.shared.values() if isinstance(m, Mask))
    return mask


def theta(model: nn.Module) -> Tensor:
    """All entries in the order of the mask: weight, then bias, layer by layer."""
    return torch.cat([model.l1.weight.flatten(), model.l1.bias, model.l2.weight.flatten()]).detach()


def loss(model: nn.Module) -> Any:
    return lambda batch: F.mse_loss(model(batch[0]), batch[1], reduction="sum")


def fish(model: nn.Module, strategy: lp.FISHMask, batches: Any = ((X, Y),)) -> lp.Handle:
    return lp.inject(model, strategy, calibration=lp.calibrate(model, strategy, batches, loss(model)))


@pytest.mark.parametrize("share", [0.005, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("name", ["random_mask", "magnitude_mask", "fish"])
def test_exactly_so_many_entries(name: str, share: float) -> None:
    model = mlp()
    strategy = lp.get_method(name).cls(share=share)
    handle = fish(model, strategy) if isinstance(strategy, lp.FISHMask) else install(model, strategy)
    indices, count = mask_of(handle).indices, round(share * ENTRIES)
    assert indices.dtype == torch.int32
    assert len(indices) == len(indices.unique()) == handle.num_trainable() == count
    assert (indices.sort().values == indices).all()
    assert 0 <= int(indices[0]) <= int(indices[-1]) < ENTRIES


def test_per_tensor_keeps_a_share_of_each() -> None:
    handle = install(mlp(), lp.RandomMask(share=0.1, per_tensor=True))
    edges = torch.tensor([48 * 32, 48 * 32 + 32, ENTRIES])
    counts = torch.bincount(torch.bucketize(mask_of(handle).indices, edges, right=True)).tolist()
    assert counts == [round(0.1 * n) for n in (48 * 32, 32, 32 * 64)]


@pytest.mark.parametrize(("select", "largest"), [("smallest", False), ("largest", True)])
def test_magnitudes_are_compared_in_the_whole_model(select: Any, largest: bool) -> None:
    model = mlp()
    handle = install(model, lp.MagnitudeMask(share=0.1, select=select))
    expected = theta(model).abs().topk(round(0.1 * ENTRIES), largest=largest).indices.sort().values
    assert torch.equal(mask_of(handle).indices.long(), expected)


def test_equal_scores_go_to_the_first_entries_and_parts_make_no_difference() -> None:
    scores = torch.tensor([1.0, 3.0, 1.0, 2.0, 1.0, 3.0, 0.0, 1.0])
    for parts in ([scores], list(scores.split(3)), list(scores.split(1))):
        assert top_entries(lambda parts=parts: parts, 5).tolist() == [0, 1, 2, 3, 5]
        assert top_entries(lambda parts=parts: parts, 8).tolist() == list(range(8))
    assert top_entries(lambda: [torch.zeros(4), torch.zeros(4)], 5).tolist() == [0, 1, 2, 3, 4]
    mixed = [torch.tensor([1.0, 3.0]).bfloat16(), torch.tensor([1.001, 2.0]), torch.tensor([1.0, 1.5]).half()]
    for parts in (mixed, mixed[::-1]):  # fp16 models with norms in fp32: compared without rounding
        expected = torch.cat([p.float() for p in parts]).topk(4).indices.sort().values
        assert torch.equal(top_entries(lambda parts=parts: parts, 4), expected)
    generator = torch.Generator().manual_seed(1)
    many = torch.randint(0, 9, (500,), generator=generator).double()
    for keep in (1, 17, 250, 499):
        expected = many.argsort(descending=True, stable=True)[:keep].sort().values
        assert torch.equal(top_entries(lambda: many.split(37), keep), expected)


def test_one_seed_one_random_mask() -> None:
    first, again = (mask_of(install(mlp(), lp.RandomMask(share=0.1))).indices for _ in range(2))
    assert torch.equal(first, again)
    model = mlp()
    torch.manual_seed(4)
    other = mask_of(lp.inject(model, lp.RandomMask(share=0.1))).indices
    assert not torch.equal(first, other)
    # Every entry is as likely as any other: halves of the model have the same share, within five standard deviations.
    counts = torch.tensor([float((mask.indices < ENTRIES / 2).sum()) for mask in _masks(40)])
    share, chosen = 0.1, round(0.1 * ENTRIES)
    assert (counts.mean() - chosen / 2).abs() < 5 * (chosen * 0.25 * (1 - share) / 40) ** 0.5


def _masks(count: int) -> Iterator[Mask]:
    for seed in range(count):
        model = mlp()
        torch.manual_seed(seed)
        yield mask_of(lp.inject(model, lp.RandomMask(share=0.1)))


def test_forward_gradients_and_merge_are_those_of_the_dense_model() -> None:
    model = mlp()
    handle = install(model, lp.RandomMask(share=0.3, biases=False))
    randomize(handle)
    mask = mask_of(handle)

    def changed(adapter: Any, W: Tensor) -> Tensor:
        positions, values = mask.part(adapter.segment)
        return W.flatten().scatter_add(0, positions.long(), values).view_as(W)

    check_dense(model, handle, changed)


def adamw(model: nn.Module, handle: lp.Handle, steps: int = 10) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(handle.trainable_parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        F.mse_loss(model(X), Y).backward()
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("name", ["random_mask", "magnitude_mask", "fish"])
def test_no_other_entry_moves_by_a_bit_and_optimizer_states_are_as_small_as_the_mask(name: str) -> None:
    model = mlp()
    strategy = lp.get_method(name).cls(share=0.05)
    handle = fish(model, strategy) if isinstance(strategy, lp.FISHMask) else install(model, strategy)
    before, chosen = theta(model), mask_of(handle).indices.long()
    optimizer = adamw(model, handle)
    assert torch.equal(theta(model), before), "the base is never edited"
    states = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor) and v.dim()]
    assert sum(v.numel() for v in states) == 2 * len(chosen)
    trained = model(X)
    handle.merge()
    moved = (theta(model) != before).nonzero().flatten()
    assert torch.equal(moved, chosen)
    torch.testing.assert_close(model(X), trained, rtol=1e-12, atol=1e-12)


def test_nothing_of_the_size_of_a_weight_is_kept_for_the_backward_pass() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))
    handle = lp.inject(model, lp.RandomMask(share=0.01))
    kept: list[Tensor] = []
    weights = {p.data_ptr() for p in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        out = model(torch.randn(3, 64))
    assert kept
    assert all(t.numel() <= 3 * 64 or t.data_ptr() in weights for t in kept), "W + ΔW is made again in the backward pass"
    out.square().mean().backward()
    assert all(p.grad is None for p in model.parameters() if p is not mask_of(handle).values)


def test_on_a_bf16_base_the_layer_computes_with_the_rounded_sum() -> None:
    model = nn.Sequential(nn.Linear(32, 16, dtype=torch.bfloat16))
    handle = lp.inject(model, lp.RandomMask(share=0.5, biases=False))
    x = torch.randn(4, 32, dtype=torch.bfloat16)
    with torch.no_grad():
        mask_of(handle).values.normal_(std=0.1)
        found = model(x)
        delta = scattered(*mask_of(handle).part(0), 16, 32)
        assert torch.equal(found, F.linear(x, (model[0].weight.float() + delta).bfloat16(), model[0].bias))
    handle.merge()
    assert torch.equal(model(x), found)


# ---------------------------------------------------------------------- Fisher information


def per_sample(model: nn.Module) -> Tensor:
    """Mean of the squared gradients of single samples, in the order of the mask, by torch.func."""
    parameters = {n: p.detach() for n, p in model.named_parameters()}

    def one(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(functional_call(model, parameters, (x[None],)), y[None], reduction="sum")

    found = vmap(grad(one), in_dims=(None, 0, 0))(parameters, X, Y)
    return torch.cat([found[n].square().mean(0).flatten() for n in ("l1.weight", "l1.bias", "l2.weight")])


def scores(model: nn.Module, batches: list[Any]) -> Tensor:
    anatomy = lp.anatomy_of(model)
    sites = lp.RandomMask().sites(anatomy)
    with SquaredGradients(model, sites) as squares:
        for batch in batches:
            squares.add(loss(model)(batch))
        parts = [part for site in sites for part in squares.of(model, site) if part is not None]
    return torch.cat([part.flatten() for part in parts]) / len(batches)


def test_scores_are_the_mean_of_squared_gradients_of_single_samples() -> None:
    model = mlp()
    expected = per_sample(model)
    found = scores(model, list(examples_of((X, Y))))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)
    of_batches = scores(model, [(X, Y)])
    assert not torch.allclose(of_batches / len(X) ** 2, expected, rtol=0.1), "squares of sums are something else"
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    handle = fish(model, lp.FISHMask(share=0.1))
    assert torch.equal(mask_of(handle).indices.long(), expected.topk(round(0.1 * ENTRIES)).indices.sort().values)


def test_scores_of_a_quantized_layer_are_those_of_the_matrix_that_its_codes_stand_for() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64)).double()
    quantized = quantize(copy.deepcopy(model), Quantization(scheme="nf4", backend="torch"))
    dense = copy.deepcopy(model)
    handle = lp.inject(quantized, lp.RandomMask(share=0.1, targets=["0", "2"]))
    with torch.no_grad():
        for entry in handle.entries:
            dense.get_submodule(entry.path).weight.copy_(entry.site.weight(entry.module))
    handle.remove()
    x = torch.randn(3, 64, dtype=D)
    found = []
    for each in (quantized, dense):
        sites = lp.RandomMask(targets=["0", "2"]).sites(lp.anatomy_of(each))
        with SquaredGradients(each, sites) as squares:
            squares.add(each[2](input=torch.tanh(each[0](x))).pow(3).sum())  # by position and by keyword
            found.append([squares.of(each, site) for site in sites])
    for (a, bias_a), (b, bias_b) in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(bias_a, bias_b, rtol=1e-9, atol=1e-12)


def test_parts_of_a_quantized_layer_that_no_gradient_reaches_have_scores_of_zero() -> None:
    model = quantize(BACKBONES["gpt2"].fresh(), Quantization(scheme="nf4", backend="torch"))
    anatomy = lp.anatomy_of(model)
    sites = [site for role in ("query", "key", "value") for site in anatomy.sites(f"attention.{role}")]
    with SquaredGradients(model, sites) as squares:
        squares.add(model.get_output_embeddings().weight.sum())
        assert all(not squares.of(model, site)[0].any() for site in sites)
        assert {tuple(squares.of(model, s)[0].shape) for s in sites} == {(s.spec.out_features, s.spec.in_features) for s in sites}


def test_no_more_samples_than_asked_for_are_drawn() -> None:
    drawn: list[int] = []

    def batches() -> Iterator[Any]:
        for i in range(10):
            drawn.append(i)
            yield X, Y

    seen: list[int] = []
    model = mlp()

    def counted(batch: Any) -> Tensor:
        seen.append(len(batch[0]))
        return loss(model)(batch)

    lp.calibrate(model, lp.FISHMask(samples=7), batches(), counted)
    assert (seen, drawn) == ([1] * 7, [0, 1])
    seen.clear()
    lp.calibrate(model, lp.FISHMask(samples=2, per="batch"), batches(), counted)
    assert seen == [5, 5]


def test_calibration_leaves_everything_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
    model[0].weight.grad = torch.ones(8, 6)
    model[3].bias.requires_grad_(False)
    model[1].eval()
    state, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    flags, rng = [p.requires_grad for p in model.parameters()], torch.get_rng_state()
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    counted = model[1].running_mean

    def trains_its_norm(batch: Tensor) -> Tensor:
        model[1].train()
        out = model(batch) + torch.rand(1)
        assert not torch.equal(counted, state["1.running_mean"])
        return out.square().sum()

    found = lp.calibrate(model, lp.FISHMask(share=0.2, per="batch"), [x], trains_its_norm)
    assert found.keys() == {"shared-mask.indices"}
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == flags
    assert torch.equal(torch.get_rng_state(), rng)
    assert torch.equal(model[0].weight.grad, torch.ones(8, 6))
    assert model[3].weight.grad is None
    assert lp.handles(model) == {}
    assert not any("peft" in key for key in model.state_dict())


class Centered(nn.Module):
    """Puts a new tensor in the place of its buffer at every forward."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)
        self.register_buffer("center", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        self.center = 0.9 * self.center + 0.1 * y.detach().mean(0)
        return y - self.center


def test_calibration_restores_buffers_that_are_replaced() -> None:
    model = Centered()
    center = model.center
    found = lp.calibrate(model, lp.FISHMask(share=0.2), [torch.ones(4, 6)], lambda batch: model(batch).square().sum())
    assert model.center is center
    assert not center.any()
    with pytest.raises(CompatibilityError, match="the calibration is empty"):
        lp.inject(model, lp.FISHMask(share=0.2), calibration={})
    assert lp.handles(model) == {}
    assert found


def test_a_composition_is_calibrated_part_by_part() -> None:
    model = mlp()
    strategy = lp.Compose(parts=(lp.LoRA(rank=2, targets=["l1"]), lp.FISHMask(share=0.1, targets=["l2"])))
    found = lp.calibrate(model, strategy, [(X, Y)], loss(model))
    handle = lp.inject(model, strategy, calibration=found)
    alone = mlp()
    expected = mask_of(fish(alone, lp.FISHMask(share=0.1, targets=["l2"])))
    assert torch.equal(mask_of(handle).indices, expected.indices)
    adamw(model, handle, 2)


# ---------------------------------------------------------------------- files, estimates, errors


def test_a_file_needs_no_data_and_holds_index_and_value_only(tmp_path: Path) -> None:
    model = mlp()
    handle = fish(model, lp.FISHMask(share=0.05))
    adamw(model, handle)
    folder = lp.save_adapter(handle, tmp_path / "fish")
    assert {k: tuple(v.shape) for k, v in handle.state_dict().items()} == {
        "shared-mask.values": (round(0.05 * ENTRIES),),
        "shared-mask.indices": (round(0.05 * ENTRIES),),
    }
    fresh = mlp()
    loaded = lp.load_adapter(fresh, folder)
    assert loaded.calibrated
    assert torch.equal(fresh(X), model(X))


def test_indices_of_a_forged_file_are_refused() -> None:
    model = mlp()
    handle = install(model, lp.RandomMask(share=0.05))
    state = {k: v.clone() for k, v in handle.state_dict().items()}
    for forged in (ENTRIES, -7):
        bad = {**state, "shared-mask.indices": state["shared-mask.indices"].clone()}
        bad["shared-mask.indices"][-1 if forged > 0 else 0] = forged
        handle.load_state_dict(bad)
        with pytest.raises(FormatError, match="do not ascend"):
            model(X)
    handle.load_state_dict(state)
    model(X)


@pytest.mark.parametrize("name", ["random_mask", "magnitude_mask", "fish", "diff_pruning"])
def test_estimates_need_no_data(name: str) -> None:
    model = BACKBONES["llama"].fresh()
    strategy = lp.get_method(name).cls(share=0.01)
    report = lp.estimate(model, strategy, batch_size=2, sequence_length=8)
    sites = strategy.sites(lp.anatomy_of(model))
    entries = sum(strategy.segments(sites))
    assert report.trainable == (2 * entries if name == "diff_pruning" else round(0.01 * entries))


def test_default_targets_are_all_layers_but_embeddings_and_head() -> None:
    model = BACKBONES["bert"].fresh()
    adapted = {e.path for e in lp.inject(model, lp.RandomMask(share=0.1)).entries}
    assert not any("embeddings" in path and "LayerNorm" not in path for path in adapted)
    assert "classifier" not in adapted
    assert {
        "bert.encoder.layer.1.output.dense",
        "bert.encoder.layer.0.attention.output.LayerNorm",
        "bert.pooler.dense",
    } <= adapted


def test_errors_name_the_remedy() -> None:
    model = mlp()
    with pytest.raises(ConfigError, match=r"lp\.calibrate\(model, strategy, batches, loss\)"):
        lp.inject(model, "fish")
    with pytest.raises(ConfigError, match="leave calibration out"):
        lp.inject(model, "lora", calibration={})
    with pytest.raises(DataError, match="no training batch"):
        lp.calibrate(model, "fish", [], loss(model))
    with pytest.raises(DataError, match=r"first dimensions \[4, 5\].*batch_size=1.*per='batch'"):
        lp.calibrate(model, "fish", [(X, Y[:4])], loss(model))
    with pytest.raises(DataError, match="no tensor"):
        lp.calibrate(model, "fish", ["text"], loss(model))
    with pytest.raises(CompatibilityError, match="shared-mask.indices"):
        lp.inject(model, lp.FISHMask(share=0.5), calibration=lp.calibrate(model, "fish", [(X, Y)], loss(model)))
    with pytest.raises(ConfigError, match="does not depend on the weights"):
        lp.calibrate(model, "fish", [(X, Y)], lambda batch: torch.zeros(()))
    with pytest.raises(ConfigError, match="rounds to none"):
        lp.inject(model, lp.RandomMask(share=1e-6))
    with pytest.raises(ConfigError, match="share=0"):
        lp.RandomMask(share=0)
    with torch.device("meta"):
        meta = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(UnsupportedLayerError, match="meta device"):
        lp.inject(meta, lp.MagnitudeMask(share=0.5))
    with pytest.raises(UnsupportedLayerError, match="meta"):
        lp.calibrate(meta, lp.FISHMask(share=0.5), [torch.ones(1, 4)], lambda batch: meta(batch).sum())
    waiting = lp.inject(model, "fish", calibration="later")
    assert torch.equal(model(X), mlp()(X)), "nothing is changed until it is calibrated"
    with pytest.raises(ConflictError, match="waits for its calibration"):
        lp.save_adapter(waiting, "nowhere")


def test_examples_of_nested_batches() -> None:
    class Named(dict[str, Any]):
        """A mapping of its own type, as tokenizers return."""

    batch = Named(ids=torch.arange(6).view(2, 3), rest=(torch.ones(2), ["a", "b"], 7), scale=torch.tensor(3.0))
    first, second = examples_of(batch)
    assert isinstance(first, Named)
    assert first["ids"].tolist() == [[0, 1, 2]]
    assert second["rest"][1:] == (["b"], 7)
    assert second["rest"][0].shape == (1,)
    assert float(second["scale"]) == 3.0


def test_two_masks_on_one_model_add_up() -> None:
    model = mlp()
    first = install(model, lp.RandomMask(share=0.1), "a")
    second = install(model, lp.MagnitudeMask(share=0.1), "b")
    plain = model(X)
    randomize(first)
    randomize(second)
    both = model(X)
    first.merge()
    torch.testing.assert_close(model(X), both)
    second.merge()
    torch.testing.assert_close(model(X), both)
    second.unmerge()
    first.unmerge()
    with first.disabled(), second.disabled():
        torch.testing.assert_close(model(X), plain, rtol=1e-12, atol=1e-12)


def test_backward_of_every_path_is_that_of_the_merged_weight() -> None:
    """Convolutions, norms, attention: the gradients of the values are entries of the gradients of the weights."""
    for name in ("conv_net", "attention", "gpt2", "torch_encoder"):
        backbone = BACKBONES[name]
        model, batch = backbone.fresh(D), backbone.batch(D)
        handle = install(model, lp.RandomMask(share=0.3))
        randomize(handle, 0.05)
        loss_of(model(**batch)).backward()
        mask = mask_of(handle)
        values = mask.values.grad.clone()
        merged = copy.deepcopy(model)
        (twin,) = lp.handles(merged).values()
        assert flat(model(**batch)).shape == run(model, batch).shape
        sites = [e.site for e in twin.entries]
        twin.merge(untie=True)
        twin.remove()
        merged.requires_grad_(True)
        loss_of(merged(**batch)).backward()
        parts = []
        for site in sites:
            module = site.module(merged)
            parts.append(site.kind.canonical(module.get_parameter(site.tensor).grad).flatten())
            if site.spec.has_bias:
                parts.append(module.get_parameter(site.bias_name(module)).grad)
        torch.testing.assert_close(values, torch.cat(parts)[mask.indices.long()], rtol=1e-7, atol=1e-9)
