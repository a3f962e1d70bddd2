"""The handle: ownership, state, tied weights, the merged state, and changes of the model behind its back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_peft as lp
from lightning_peft.errors import CompatibilityError, ConflictError, MergeError
from lightning_peft.nn.adapter import BaseLayer, MergeableModule
from lightning_peft.surgery.anatomy import anatomy_of
from lightning_peft.surgery.edits import Plan, adapt
from lightning_peft.surgery.inject import apply_plan
from lightning_peft.surgery.sites import make_site

D = torch.float64


class Tied(nn.Module):
    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.body = nn.Linear(4, 4)
        self.head = nn.Linear(4, 7, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.embed(x)))


IDS = torch.tensor([[1, 2, 6]])


def tied(tie: bool = True) -> Tied:
    torch.manual_seed(0)
    return Tied(tie).to(D)


def randomize(handle: lp.Handle) -> None:
    with torch.no_grad():
        for p in handle.trainable_parameters():
            p.copy_(torch.randn_like(p) * 0.5)


@pytest.mark.parametrize("targets", ["embed", "head", ["embed", "head"], ["embed", "body"]])
def test_merging_a_tied_weight_is_refused_or_unties(targets: Any) -> None:
    model = tied()
    handle = lp.inject(model, lp.LoRA(rank=2, targets=targets))
    randomize(handle)
    expected = model(IDS).detach()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(MergeError, match="tied.*untie=True"):
        handle.merge()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.head.weight is model.embed.weight
    handle.merge(untie=True)
    torch.testing.assert_close(model(IDS), expected)
    assert model.head.weight is not model.embed.weight
    assert list(model.state_dict()) == list(before)
    handle.unmerge()
    torch.testing.assert_close(model(IDS), expected)
    torch.testing.assert_close(model.embed.weight.detach(), before["embed.weight"])
    torch.testing.assert_close(model.head.weight.detach(), before["head.weight"])


def test_exact_unmerge_restores_untied_weights_as_well_as_others() -> None:
    model = tied()
    handle = lp.inject(model, lp.LoRA(rank=2, targets=["embed", "body"]))
    randomize(handle)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    handle.merge(exact=True, untie=True)
    handle.unmerge()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_weights_of_the_same_value_are_not_tied() -> None:
    model = tied(False)
    with torch.no_grad():
        model.head.weight.copy_(model.embed.weight)
    handle = lp.inject(model, lp.LoRA(rank=2, targets="head"))
    randomize(handle)
    expected = model(IDS).detach()
    handle.merge()
    torch.testing.assert_close(model(IDS), expected)
    assert not torch.equal(model.head.weight, model.embed.weight)


def test_two_equal_zero_matrices_are_two_parameters() -> None:
    # Every LoRA B starts at zero; a comparison by value would drop one of them from the optimizer.
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    handle = lp.inject(model, lp.LoRA(rank=2, targets="all-linear"))
    assert len(handle.trainable_parameters()) == 4
    assert handle.num_trainable() == 4 * 8


def test_names_of_the_base_that_look_like_an_adapters_stay_frozen_and_out_of_the_state() -> None:
    class Lookalike(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lora_head, self.lora_A, self.target = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)
            self.magnitude = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.lora_head(self.lora_A(self.target(x))) * self.magnitude

    model = Lookalike()
    handle = lp.inject(model, lp.LoRA(rank=2, targets="target"))
    assert set(handle.state_dict()) == {"target.lora_A", "target.lora_B"}
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        "target.peft.default.lora_A",
        "target.peft.default.lora_B",
    }


def test_state_round_trips_and_is_checked_before_the_first_write() -> None:
    model = tied(False)
    handle = lp.inject(model, lp.LoRA(rank=2, targets="all-linear"))
    randomize(handle)
    state = {k: v.clone() for k, v in handle.state_dict().items()}
    randomize(handle)
    handle.load_state_dict(state)
    assert all(torch.equal(v, state[k]) for k, v in handle.state_dict().items())
    first, *_, last = state
    for broken, text in (
        ({k: v for k, v in state.items() if k != last}, f"Missing.*{last}"),
        ({**state, "body.lora_Q": state[first]}, "unexpected.*lora_Q"),
        ({**{k: v + 1 for k, v in state.items()}, last: torch.zeros(9, 9)}, f"{last}.*9, 9"),
    ):
        with pytest.raises(CompatibilityError, match=text):
            handle.load_state_dict(broken)
        assert all(torch.equal(v, state[k]) for k, v in handle.state_dict().items())


def test_a_module_replaced_after_injection_is_noticed() -> None:
    model = tied(False)
    handle = lp.inject(model, lp.LoRA(rank=2, targets=["head", "body"]))
    handle.verify()
    model.head = nn.Linear(4, 9, bias=False)
    with pytest.raises(ConflictError, match="head"):
        handle.verify()
    with pytest.raises(ConflictError, match="head"):
        handle.merge()


def test_resizing_an_untied_head_is_noticed() -> None:
    import transformers as hf

    sizes = dict(vocab_size=11, n_embd=12, n_layer=1, n_head=3, n_positions=16, tie_word_embeddings=False)
    model = hf.GPT2LMHeadModel(hf.GPT2Config(**sizes, bos_token_id=1, eos_token_id=2))
    handle = lp.inject(model, lp.LoRA(rank=2, targets="lm_head"))
    model.resize_token_embeddings(13)
    with pytest.raises(ConflictError, match="lm_head"):
        handle.verify()


def test_disabled_freezes_what_it_claims_and_gives_it_back() -> None:
    model = tied(False)
    handle = lp.inject(model, lp.BitFit())
    randomize(handle)
    trained = model.body.bias.detach().clone()
    with handle.disabled():
        assert not model.body.bias.requires_grad
        assert not torch.equal(model.body.bias, trained)
    assert model.body.bias.requires_grad
    assert torch.equal(model.body.bias, trained)


def test_disabled_ends_with_an_exception_too() -> None:
    model = tied(False)
    handle = lp.inject(model, lp.LoRA(rank=2, targets="body", bias="adapted"))
    randomize(handle)
    expected = model(IDS).detach()
    with pytest.raises(KeyError), handle.disabled():
        raise KeyError
    assert torch.equal(model(IDS), expected)


def test_inside_disabled_the_trained_state_is_saved_and_nothing_may_change_it() -> None:
    model = tied(False)
    handle = lp.inject(model, lp.LoRA(rank=2, targets="body", bias="adapted"))
    randomize(handle)
    state = {k: v.clone() for k, v in handle.state_dict().items()}
    with handle.disabled():
        assert all(torch.equal(v, state[k]) for k, v in handle.state_dict().items())
        for change in (handle.remove, handle.merge, lambda: handle.load_state_dict(state)):
            with pytest.raises(ConflictError, match=r"inside disabled\(\)"):
                change()
    assert all(torch.equal(v, state[k]) for k, v in handle.state_dict().items())


@pytest.mark.parametrize("strategy", [lp.LoRA(rank=2, targets="body"), lp.VeRA(rank=2, targets="body"), lp.BitFit()])
def test_installed_and_disabled_in_inference_mode_it_still_trains(strategy: lp.PEFTStrategy) -> None:
    model = tied(False)
    with torch.inference_mode():
        handle = lp.inject(model, strategy)
        model(IDS)
        with handle.disabled():
            model(IDS)
    model(IDS).square().sum().backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in handle.trainable_parameters())
    handle.remove()
    assert torch.equal(model.body.bias, tied(False).body.bias)


def test_removing_twice_does_not_touch_what_others_train_since() -> None:
    model = tied(False)
    first = lp.inject(model, lp.BitFit(), "first")
    first.remove()
    second = lp.inject(model, lp.BitFit(), "second")
    randomize(second)
    trained = model.body.bias.detach().clone()
    first.remove()
    assert torch.equal(model.body.bias, trained)
    assert list(lp.handles(model)) == ["second"]


def test_merging_into_a_weight_that_another_adapter_trains_is_refused() -> None:
    # The other one's disabled() and remove() would put values back that lack the merged effect.
    model = tied(False)
    lora = lp.inject(model, lp.LoRA(rank=2, targets="body"), "lora")
    lp.inject(model, lp.Head(targets="body"), "whole")
    randomize(lora)
    with pytest.raises(MergeError, match="whole"):
        lora.merge()
    assert not lora.merged


def test_training_a_weight_that_holds_a_merged_adapter_is_refused() -> None:
    model = tied(False)
    lora = lp.inject(model, lp.LoRA(rank=2, targets="body"), "lora")
    randomize(lora)
    lora.merge()
    with pytest.raises(MergeError, match="lora"):
        lp.inject(model, lp.Full(), "whole")
    lora.unmerge()
    lp.inject(model, lp.Full(), "whole")


class ShiftAdapter(MergeableModule):
    """Adds a vector to the output: a method that needs a bias to merge."""

    def __init__(self, context: Any) -> None:
        super().__init__(context)
        self.shift = context.empty(context.spec.out_features)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.shift)

    def forward(self, base: BaseLayer, x: Tensor) -> Tensor:
        return base(x) + self.shift

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight, self.shift if bias is None else bias + self.shift

    def unmerged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight, None if bias is None else bias - self.shift


def shifted(path: str) -> tuple[Tied, lp.Handle]:
    model = tied(False)
    plan = Plan((adapt(make_site(model, path), ShiftAdapter),))
    handle = apply_plan(model, plan, anatomy_of(model), None, name="default")
    randomize(handle)
    return model, handle


def test_a_merge_that_needs_a_bias_adds_one_only_on_request() -> None:
    model, handle = shifted("head")
    expected = model(IDS).detach()
    with pytest.raises(MergeError, match="add_bias=True"):
        handle.merge()
    assert model.head.bias is None
    handle.merge(add_bias=True)
    torch.testing.assert_close(model(IDS), expected)
    handle.unmerge()
    torch.testing.assert_close(model(IDS), expected)


def test_a_change_of_an_existing_bias_merges_and_comes_back() -> None:
    model, handle = shifted("body")
    bias = model.body.bias.detach().clone()
    expected = model(IDS).detach()
    handle.merge()
    torch.testing.assert_close(model(IDS), expected)
    assert not torch.equal(model.body.bias, bias)
    handle.unmerge()
    torch.testing.assert_close(model.body.bias.detach(), bias)
    torch.testing.assert_close(model(IDS), expected)


def test_summary_names_places_counts_and_share() -> None:
    model = tied(False)
    handle = lp.inject(model, lp.LoRA(rank=2, targets="body"))
    text = handle.summary()
    base = sum(p.numel() for n, p in model.named_parameters() if "peft" not in n)
    assert "16 trainable" in text
    assert f"{base:,}" in text
    assert "body" in text


def test_handles_of_two_adapted_roots_are_all_there() -> None:
    model = nn.ModuleDict({"left": tied(), "right": tied()})
    for name, root in model.items():
        lp.inject(root, lp.LoRA(rank=1, targets=["body"]), name)
    assert list(lp.handles(model)) == ["left", "right"]
    lp.handles(model)["left"].remove()
    lp.inject(model["left"], lp.LoRA(rank=1, targets=["body"]), "right")
    with pytest.raises(ConflictError, match="two adapters named 'right'"):
        lp.handles(model)
