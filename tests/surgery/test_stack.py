"""Several adapters on one layer, a forward that is already there, signatures, and adapters that never run."""

from __future__ import annotations

import copy
import functools
import inspect
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_peft as lp
from lightning_peft.errors import AdapterBypassedError, ConflictError, MergeError, TargetError

D = torch.float64


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 5)
        self.second = nn.Linear(5, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def net() -> Net:
    torch.manual_seed(0)
    return Net().to(D)


def randomize(handle: lp.Handle) -> None:
    with torch.no_grad():
        for p in handle.trainable_parameters():
            p.copy_(torch.randn_like(p) * 0.5)


def lora(model: nn.Module, name: str, **options: Any) -> lp.Handle:
    handle = lp.inject(model, lp.LoRA(**{"rank": 2, "targets": "first", **options}), name)
    randomize(handle)
    return handle


def bottleneck(model: nn.Module, name: str) -> lp.Handle:
    handle = lp.inject(model, lp.HoulsbyAdapter(width=3, targets="first"), name)
    randomize(handle)
    return handle


X = torch.randn(3, 6, dtype=D, generator=torch.Generator().manual_seed(1))


def by_hand(model: nn.Module, x: Tensor, order: list[lp.Handle]) -> Tensor:
    """Apply adapters of ``first`` from the inside out, from their definitions."""
    y = torch.nn.functional.linear(x, model.first.weight, model.first.bias)
    for handle in order:
        a = handle.entries[0].adapter
        if hasattr(a, "lora_A"):
            y = y + a.scaling * x @ a.lora_A.T @ a.lora_B.T
        else:
            y = y + torch.nn.functional.gelu(y @ a.down.T + a.down_bias) @ a.up.T + a.up_bias
    return model.second(torch.tanh(y))


@pytest.mark.parametrize("order", [("lora", "bottleneck"), ("bottleneck", "lora")])
def test_two_adapters_nest_in_install_order_and_either_can_leave(order: tuple[str, str]) -> None:
    kinds = {"lora": lora, "bottleneck": bottleneck}
    for leaving in range(2):
        model = net()
        plain = model(X).detach()
        both = [kinds[kind](model, kind) for kind in order]
        torch.testing.assert_close(model(X), by_hand(model, X, both))
        with both[0].disabled():
            torch.testing.assert_close(model(X), by_hand(model, X, both[1:]))
        both[leaving].remove()
        torch.testing.assert_close(model(X), by_hand(model, X, [both[1 - leaving]]))
        assert list(lp.handles(model)) == [order[1 - leaving]]
        both[1 - leaving].remove()
        assert torch.equal(model(X), plain)
        assert "forward" not in vars(model.first)


def test_order_matters_so_the_test_above_can_fail() -> None:
    model = net()
    both = [lora(model, "a"), bottleneck(model, "b")]
    assert (by_hand(model, X, both) - by_hand(model, X, both[::-1])).abs().max() > 1e-3


def test_adapters_merge_in_install_order_and_unmerge_in_reverse() -> None:
    model = net()
    weight = model.first.weight.detach().clone()
    inner, outer = lora(model, "inner"), lora(model, "outer", rank=3)
    expected = model(X).detach()
    with pytest.raises(MergeError, match="Merge 'inner' first"):
        outer.merge()
    inner.merge()
    torch.testing.assert_close(model(X), expected)
    outer.merge()
    torch.testing.assert_close(model(X), expected)
    with pytest.raises(MergeError, match="unmerge 'outer' first"):
        inner.unmerge()
    outer.unmerge()
    torch.testing.assert_close(model(X), expected)
    inner.unmerge()
    torch.testing.assert_close(model(X), expected)
    torch.testing.assert_close(model.first.weight, weight, rtol=0, atol=1e-13)


def test_a_merged_adapter_below_an_active_one() -> None:
    model = net()
    inner, outer = lora(model, "inner"), bottleneck(model, "outer")
    expected = model(X).detach()
    inner.merge()
    torch.testing.assert_close(model(X), expected)
    inner.remove()
    torch.testing.assert_close(model(X), expected)
    with pytest.raises(MergeError, match="cannot be merged"):
        outer.merge()


def test_freezing_is_counted_over_handles() -> None:
    model = net()
    model.second.weight.requires_grad_(False)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    one = lp.inject(model, lp.LoRA(rank=2, targets="first"), "one")
    two = lp.inject(model, lp.BitFit(), "two")
    assert model.first.bias.requires_grad
    assert not model.first.weight.requires_grad
    one.remove()
    assert model.first.bias.requires_grad
    assert not model.first.weight.requires_grad
    two.remove()
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags


def test_the_first_handle_may_leave_first_or_last_with_claims() -> None:
    model = net()
    bias = model.first.bias.detach().clone()
    claims = lp.inject(model, lp.BitFit(), "claims")
    other = lp.inject(model, lp.LoRA(rank=2, targets="first"), "other")
    randomize(claims)
    claims.remove()
    assert torch.equal(model.first.bias, bias)
    assert not model.first.bias.requires_grad, "the other adapter still freezes the base"
    other.remove()
    assert model.first.bias.requires_grad


# A forward that is already on the instance


def outside(forward: Any, scale: float, *args: Any, **kwargs: Any) -> Any:
    return forward(*args, **kwargs) * scale


def test_an_existing_instance_forward_stays_inside_and_comes_back() -> None:
    model = net()
    wrapped = functools.update_wrapper(functools.partial(outside, model.first.forward, 2.0), model.first.forward)
    model.first.forward = wrapped
    plain = model(X).detach()
    handle = lora(model, "default")
    a = handle.entries[0].adapter
    inner = 2 * torch.nn.functional.linear(X, model.first.weight, model.first.bias) + a.scaling * X @ a.lora_A.T @ a.lora_B.T
    torch.testing.assert_close(model(X), model.second(torch.tanh(inner)))
    handle.remove()
    assert model.first.forward is wrapped
    assert torch.equal(model(X), plain)


def test_hooks_of_accelerate_stay_inside() -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    model = net()
    seen: list[str] = []

    class Note(hooks.ModelHook):
        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            seen.append("ran")
            return args, kwargs

    hooks.add_hook_to_module(model.first, Note())
    plain = model(X).detach()
    handle = lp.inject(model, lp.LoRA(rank=2, targets="first"))
    assert torch.equal(model(X), plain)
    assert seen == ["ran", "ran"]
    handle.remove()
    hooks.remove_hook_from_module(model.first)
    assert torch.equal(model(X), plain)


def test_forward_keeps_its_signature() -> None:
    class Signed(Net):
        def forward(self, x: Tensor, scale: float = 1.0, *, shift: float = 0.0) -> Tensor:
            return super().forward(x) * scale + shift

    model = Signed().to(D)
    before = inspect.signature(model.forward)
    handle = lora(model, "default")
    assert inspect.signature(model.forward) == before
    assert torch.equal(model(X, scale=2.0, shift=1.0), model(X) * 2.0 + 1.0)
    assert inspect.signature(model.first.forward) == inspect.signature(nn.Linear(1, 1).forward)
    handle.remove()


def test_generate_sees_the_arguments_of_an_adapted_model() -> None:
    import transformers as hf

    sizes = dict(vocab_size=11, n_embd=12, n_layer=1, n_head=3, n_positions=16, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    model = hf.GPT2LMHeadModel(hf.GPT2Config(**sizes)).eval()
    tokens = torch.tensor([[3, 4, 5]])
    options: dict[str, Any] = dict(max_new_tokens=4, do_sample=False, attention_mask=torch.ones_like(tokens), min_new_tokens=4)
    plain = model.generate(tokens, **options)
    handle = lp.inject(model, "lora")
    assert torch.equal(model.generate(tokens, **options), plain)
    randomize(handle)
    with_cache = model.generate(tokens, **options)
    assert torch.equal(model.generate(tokens, use_cache=False, **options), with_cache)


# Copies


def test_a_copy_of_an_adapted_encoder_can_be_removed_without_touching_the_original() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 8, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 1).eval()
    handle = lp.inject(model, lp.LoRA(rank=2, targets="linear1"))
    randomize(handle)
    x, mask = torch.randn(2, 3, 8), torch.tensor([[False, False, True], [False, False, False]])
    with torch.no_grad():
        expected = model(x, src_key_padding_mask=mask)
        twin = copy.deepcopy(model)
        assert torch.equal(twin(x, src_key_padding_mask=mask), expected)
        lp.handles(twin)["default"].remove()
        assert not twin.layers[0].linear1._forward_pre_hooks
        assert model.layers[0].linear1._forward_pre_hooks
        assert torch.equal(model(x, src_key_padding_mask=mask), expected), "the original still leaves the fast path"


def test_pickled_model_keeps_its_handles() -> None:
    model = net()
    lora(model, "default")
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again(X), model(X))
    handle = lp.handles(again)["default"]
    handle.verify()
    handle.remove()
    assert "forward" not in vars(again.first)


def test_compiled_in_one_graph_with_two_adapters() -> None:
    model = net()
    lora(model, "a")
    bottleneck(model, "b")
    expected = model(X)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(X), expected)


# Adapters that never run


class Bypassing(nn.Module):
    """Reads the weight of a layer directly, as WavLM's attention and Mamba's mixer do."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(self.used(x), self.unused.weight)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_an_adapter_that_never_runs_is_an_error_after_the_first_forward(training: bool) -> None:
    model = Bypassing().train(training)
    handle = lp.inject(model, lp.LoRA(rank=2, targets=["used", "unused"]))
    with pytest.raises(AdapterBypassedError, match="'unused'"):
        model(torch.randn(2, 4))
    handle.remove()
    lp.inject(model, lp.LoRA(rank=2, targets=["used"]))
    model(torch.randn(2, 4))


def test_a_second_adapter_is_checked_on_its_own() -> None:
    model = Bypassing()
    lp.inject(model, lp.LoRA(rank=2, targets="used"), "fine")
    model(torch.randn(2, 4))
    lp.inject(model, lp.LoRA(rank=2, targets="unused"), "silent")
    with pytest.raises(AdapterBypassedError, match="'silent'"):
        model(torch.randn(2, 4))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("targets", [["linear1", "linear2"], ["self_attn"], "all-linear", "attention.output", "norm1"])
def test_encoder_layers_leave_their_fast_path(targets: Any, training: bool) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 6, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).to(D).train(training)
    x, mask = torch.randn(2, 3, 8, dtype=D), torch.tensor([[False, False, True], [False, False, False]])
    keep = ~mask
    reference = copy.deepcopy(model)
    nested = model.use_nested_tensor
    handle = lp.inject(model, lp.LoRA(rank=1, targets=targets))
    with torch.no_grad():
        expected = reference(x, src_key_padding_mask=mask)
        torch.testing.assert_close(model(x, src_key_padding_mask=mask)[keep], expected[keep])
        randomize(handle)
        changed = model(x, src_key_padding_mask=mask)
        assert (changed - expected)[keep].abs().max() > 1e-3, "the adapter has an effect"
        handle.merge()
        torch.testing.assert_close(model(x, src_key_padding_mask=mask)[keep], changed[keep])
    handle.remove()
    assert model.use_nested_tensor == nested
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_children_of_multihead_attention_are_adapted_through_it_or_refused() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x, x)[0]

    model = Attention().eval()
    handle = lp.inject(model, lp.LoRA(rank=2, targets="attention.out_proj"))
    assert [e.path for e in handle.entries] == ["attention"]
    before = model(torch.ones(1, 3, 8))
    randomize(handle)
    assert not torch.equal(model(torch.ones(1, 3, 8)), before)
    handle.remove()
    with pytest.raises(TargetError):
        lp.inject(model, lp.VeRA(rank=2, targets="attention.out_proj"))


def known_bypasses() -> dict[str, Any]:
    import transformers as hf

    speech = dict(
        hidden_size=12, num_hidden_layers=1, num_attention_heads=3, intermediate_size=16, conv_dim=(8,), conv_stride=(4,)
    )
    wavlm = dict(conv_kernel=(4,), num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, num_feat_extract_layers=1)
    mamba = dict(vocab_size=11, hidden_size=12, state_size=4, num_hidden_layers=1, use_cache=False)
    t5 = dict(vocab_size=11, d_model=12, d_kv=4, d_ff=16, num_layers=1, num_heads=3, decoder_start_token_id=0, use_cache=False)
    tokens = torch.tensor([[3, 4, 5]])
    return {
        "wavlm": (lambda: hf.WavLMModel(hf.WavLMConfig(**speech, **wavlm)), "q_proj", {"input_values": torch.randn(1, 200)}),
        "mamba": (lambda: hf.MambaForCausalLM(hf.MambaConfig(**mamba)), "dt_proj", {"input_ids": tokens}),
        "t5": (
            lambda: hf.T5ForConditionalGeneration(hf.T5Config(**t5)),
            "shared",
            {"input_ids": tokens, "decoder_input_ids": tokens},
        ),
    }


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", ["wavlm", "mamba", "t5"])
def test_known_bypasses_raise(name: str, training: bool) -> None:
    build, target, inputs = known_bypasses()[name]
    model = build().train(training)

    def install_and_run() -> None:
        lp.inject(model, lp.LoRA(rank=2, targets=[target]))
        model(**inputs)

    with pytest.raises((TargetError, AdapterBypassedError), match=target):
        install_and_run()


def test_a_child_called_peft_of_the_base_itself_is_a_conflict() -> None:
    model = net()
    model.first.peft = nn.Linear(2, 2)
    with pytest.raises(ConflictError, match="'peft'"):
        lp.inject(model, lp.LoRA(rank=2, targets="second"))


def test_a_reparametrized_weight_does_not_act_below_an_adapter_installed_before() -> None:
    model = nn.Sequential(nn.LayerNorm(6)).to(D)
    lp.inject(model, lp.LoRA(rank=1, targets="0"), "a")
    lp.inject(model, lp.LoRA(rank=1, targets="0"), "b")
    for handle in lp.handles(model).values():
        randomize(handle)
    out = model(X).detach()
    for handle in lp.handles(model).values():
        handle.merge()
    torch.testing.assert_close(model(X), out)
