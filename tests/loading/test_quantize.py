"""``quantize``: in place, layer by layer, everything checked first, nothing lost in silence."""

from __future__ import annotations

import copy
import functools
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import lightning_peft as lp
from lightning_peft.errors import ConfigError, ConflictError, DependencyError, PEFTError, TargetError, UnsupportedLayerError
from lightning_peft.quantization.backend import backend_of
from lightning_peft.quantization.options import QuantizeOptions
from lightning_peft.quantization.preparation import loftq_factors, preparation_of
from tests import backbones
from tests.training import tiny

BACKENDS = ("bitsandbytes", "torch")


class Net(nn.Module):
    """One block seen twice, a linear layer that is nobody's child in the tree, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(32, 64)
        self.again = self.first
        self.second = nn.Linear(64, 32, bias=False)
        self.outside = [self.second]

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.outside[0](torch.tanh(self.first(x))))


def dequantized(layer: nn.Module) -> Tensor:
    backend = backend_of(layer)
    assert backend is not None
    return backend.dequantize(layer)


def quantized_paths(model: nn.Module) -> list[str]:
    return [path for path, module in model.named_modules() if backend_of(module) is not None]


def dense_copy(model: nn.Module, quantized: nn.Module) -> nn.Module:
    """The dense model with the weights that the quantized one stands for."""
    with torch.no_grad():
        for path in quantized_paths(quantized):
            layer, weight = model.get_submodule(path), dequantized(quantized.get_submodule(path))
            layer.weight.copy_(weight.T if type(layer).__name__ == "Conv1D" else weight)
    return model


def snapshot(model: nn.Module) -> dict[str, Any]:
    modules = {path: (type(m), id(m), m.training, dict(m._forward_pre_hooks)) for path, m in model.named_modules()}
    return {"modules": modules, "state": {k: v.clone() if v.device.type != "meta" else v for k, v in model.state_dict().items()}}


def assert_untouched(model: nn.Module, before: dict[str, Any]) -> None:
    after = snapshot(model)
    assert after["modules"] == before["modules"]
    assert after["state"].keys() == before["state"].keys()
    bits = ((v.view(torch.uint8), before["state"][k].view(torch.uint8)) for k, v in after["state"].items() if not v.is_meta)
    assert all(torch.equal(a, b) for a, b in bits)


# ---- what it does


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scheme", ["nf4", "fp4", "int8"])
def test_layers_become_quantized_in_place(backend, scheme):
    model = Net().eval()
    reference, first, second = copy.deepcopy(model), model.first, model.second
    assert lp.quantize(model, scheme, backend=backend) is model
    assert model.first is first is model.again
    assert model.outside[0] is second is model.second
    assert quantized_paths(model) == ["first", "second"]
    assert not model.first.training
    assert not any(p.requires_grad for layer in (first, second) for p in layer.parameters())
    x = torch.randn(5, 32)
    expected = dense_copy(reference, model)(x)
    error = (model(x) - expected).norm() / expected.norm()
    assert error < (0.03 if scheme == "int8" else 1e-5)  # int8 quantizes the input too
    assert type(model) is Net


@pytest.mark.parametrize("backend", BACKENDS)
def test_hooks_modes_and_attributes_stay(backend):
    model = Net()
    seen: list[str] = []
    model.first.register_forward_hook(lambda *_: seen.append("forward"))
    model.first.register_forward_pre_hook(lambda *_: seen.append("pre"))
    model.first.register_full_backward_hook(lambda *_: seen.append("backward"))
    model.first.register_state_dict_post_hook(lambda *_: seen.append("state"))
    model.first.note = "mine"
    model.second.eval()
    lp.quantize(model, "nf4", backend=backend)
    assert model.first.training
    assert not model.second.training
    model(torch.randn(2, 32, requires_grad=True)).sum().backward()
    model.state_dict()
    assert set(seen) == {"forward", "pre", "backward", "state"}
    assert model.first.note == "mine"


@pytest.mark.parametrize("backend", BACKENDS)
def test_copies_and_pickles_give_the_same_output(backend):
    model = lp.quantize(Net(), "nf4", backend=backend)
    x = torch.randn(3, 32)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), model(x))
        assert other.first is other.again


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_transformers_models_compute_with_the_rounded_weights(name, backend):
    model = getattr(backbones, name)().eval()
    reference = copy.deepcopy(model)
    lp.quantize(model, "nf4", backend=backend)
    ids = torch.randint(4, backbones.VOCAB, (2, 5))
    torch.testing.assert_close(model(ids).logits, dense_copy(reference, model)(ids).logits)


def test_conv1d_is_stored_as_out_in():
    model = backbones.gpt2()
    weight = model.transformer.h[0].attn.c_attn.weight.detach().clone()
    lp.quantize(model)
    layer = model.transformer.h[0].attn.c_attn
    assert isinstance(layer, nn.Linear)
    assert (layer.in_features, layer.out_features) == tuple(weight.shape)
    plain = nn.Linear(*weight.shape)
    plain.weight = nn.Parameter(weight.T.contiguous())
    assert torch.equal(dequantized(layer), dequantized(lp.quantize(nn.Sequential(plain))[0]))


def test_only_one_dense_weight_is_kept_at_a_time(monkeypatch):
    """The memory that matters: when a layer is quantized, those before it hold no dense weight any more."""
    import gc
    import weakref

    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))
    weights = [weakref.ref(layer.weight) for layer in model]
    backend = lp.Quantization(backend="torch")
    from lightning_peft.quantization.backend import backend_for

    made, original = [], type(backend_for(backend)).linear

    def linear(self, *args):
        gc.collect()
        made.append(sum(ref() is not None for ref in weights))
        return original(self, *args)

    monkeypatch.setattr(type(backend_for(backend)), "linear", linear)
    lp.quantize(model, backend)
    assert made == [4, 3, 2, 1]


def test_torch_leaves_its_fast_path():
    model = backbones.torch_encoder().eval()
    reference = copy.deepcopy(model)
    reference.use_nested_tensor = False
    lp.quantize(model)
    assert quantized_paths(model) == ["layers.0.linear1", "layers.0.linear2", "layers.1.linear1", "layers.1.linear2"]
    x, mask = torch.randn(2, 5, backbones.DIM), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.no_grad():
        y, expected = model(x, src_key_padding_mask=mask), dense_copy(reference, model)(x, src_key_padding_mask=mask)
    torch.testing.assert_close(y[0], expected[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(y[1, :3], expected[1, :3], rtol=1e-4, atol=1e-5)


# ---- what stays dense, and why


class Reader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.read, self.run = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x.to(self.read.weight.dtype))


class Own(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(2 * x)


class Moe(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(16, 4), nn.ModuleList(nn.Linear(16, 16) for _ in range(4))
        self.stack = nn.Parameter(torch.randn(4, 16, 16))

    def forward(self, x: Tensor) -> Tensor:
        share = self.gate(x).softmax(-1)
        return sum(share[..., i, None] * (e(x) + x @ self.stack[i]) for i, e in enumerate(self.experts))


def reasons(model: nn.Module) -> dict[str, str]:
    report = lp.quantization_report(model)
    assert report is not None
    return {part.key: part.reason for part in report.left}


def test_reasons():
    model = nn.Module()
    model.embed, model.conv = nn.Embedding(9, 16), nn.Conv1d(16, 16, 3)
    model.reader, model.own, model.moe = Reader(), Own(16, 16), Moe()
    model.attention, model.keep, model.plain = nn.MultiheadAttention(16, 2), nn.Linear(16, 16), nn.Linear(16, 16)
    model.normed = torch.nn.utils.parametrizations.weight_norm(nn.Linear(16, 16))
    lp.quantize(model, skip=["keep"])
    assert quantized_paths(model) == ["reader.run", *(f"moe.experts.{i}" for i in range(4)), "plain"]
    assert reasons(model) == {
        "embed.weight": "embedding",
        "conv.weight": "convolution",
        "reader.read.weight": "Reader.forward reads its weight",
        "own.weight": "Own has a forward of its own",
        "moe.gate.weight": "router",
        "moe.stack": "experts in one 3-D tensor",
        "attention.in_proj_weight": "nn.MultiheadAttention reads it inside its own forward",
        "attention.out_proj.weight": "nn.MultiheadAttention reads its weight directly",
        "keep.weight": "skip: keep",
        "normed.weight": "its weight is computed from other tensors",
        "normed.parametrizations.weight.original0": "ParametrizationList reads it inside its own forward",
        "normed.parametrizations.weight.original1": "ParametrizationList reads it inside its own forward",
    }
    with torch.no_grad():
        model.moe(torch.randn(2, 16))
        model.reader(torch.randn(2, 16))


def test_heads_and_what_transformers_keeps_wide():
    model = transformers.T5ForConditionalGeneration(tiny.t5())
    lp.quantize(model)
    found = reasons(model)
    assert found["lm_head.weight"] == "output head"
    assert {v for k, v in found.items() if k.endswith("wo.weight")} == {"T5DenseActDense.forward reads its weight"}
    ids = torch.randint(4, tiny.VOCABULARY, (2, 5))
    model(input_ids=ids, labels=ids).loss.backward()


@pytest.mark.parametrize(
    ("skip", "left"),
    [("q_proj", 2), ("attention.query", 2), ("model.layers.0", 7), ("*.mlp.*", 6), (["q_proj", "re:.*layers\\.1.*"], 8)],
)
def test_skip_takes_names_roles_and_patterns(skip, left):
    model = backbones.llama()
    lp.quantize(model, skip=skip)
    assert len(quantized_paths(model)) == 14 - left


def test_the_report_counts_bytes():
    model = transformers.LlamaForCausalLM(tiny.llama()).bfloat16()
    before = sum(p.numel() * p.element_size() for p in model.parameters())
    lp.quantize(model)
    report = lp.quantization_report(model)
    layers = [module for _, module in model.named_modules() if backend_of(module) is not None]
    dense = sum(
        p.numel() * p.element_size() for m in model.modules() if m not in layers for p in m._parameters.values() if p is not None
    )
    dense -= model.lm_head.weight.nbytes  # tied to the embedding
    assert (report.before, report.dense) == (before, dense)
    assert report.quantized == sum(backend_of(layer).nbytes(layer) for layer in layers)
    assert report.share_dense == dense / before
    assert f"{dense / before:.1%} of the bytes stay dense" in str(report)
    assert "lm_head.weight" in str(report)


@pytest.mark.parametrize(("share", "warns"), [(64, True), (8, False)])
def test_a_warning_above_a_fifth(share, warns):
    model = nn.Sequential(nn.Embedding(share, 64), nn.Linear(64, 64, bias=False))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lp.quantize(model)
    assert [str(w.message) for w in caught if "stay dense" in str(w.message)] == (
        ["50% of the bytes of Sequential stay dense, most of all '0.weight' (embedding); see lp.quantization_report(model)."]
        if warns
        else []
    )


# ---- options


def test_options_are_one_value_however_they_are_said():
    wanted = QuantizeOptions(config=lp.Quantization(block_size=128), skip=("a",))
    assert QuantizeOptions.parse("nf4", skip="a", options={"block_size": 128}) == wanted
    assert QuantizeOptions.parse({"scheme": "nf4", "block_size": 128, "skip": ["a"]}) == wanted
    assert QuantizeOptions.parse(lp.Quantization(block_size=128), skip=["a"]) == wanted
    assert QuantizeOptions.parse(wanted.to_dict()) == wanted
    assert QuantizeOptions.parse({"block_size": 128, "skip": ["a"]}) == wanted
    full = QuantizeOptions.parse("int8", loftq={"rank": 2, "targets": "a"})
    assert QuantizeOptions.parse(full.to_dict()) == full


@pytest.mark.parametrize(
    ("arguments", "options", "words"),
    [
        (("nf5",), {}, "Did you mean 'nf4'"),
        ((4,), {}, "neither a scheme"),
        (({"schema": "nf4"},), {}, "Did you mean 'scheme'"),
        (("nf4",), {"blocksize": 64}, "Did you mean 'block_size'"),
        (("nf4",), {"skip": [3]}, "list of names"),
        (({"skip": ["a"]},), {"skip": ["b"]}, "given twice"),
        (("nf4",), {"loftq": {"iterations": 2}}, "mapping with rank"),
        (("nf4",), {"loftq": {"rank": 0}}, "at least 1"),
        (("nf4",), {"loftq": {"rank": 4, "iteration": 2}}, "Did you mean 'iterations'"),
        (("nf4",), {"loftq": {"rank": 99}}, "smaller side of 'first'"),
        (("nf4",), {"loftq": {"rank": 4, "targets": ["second"]}, "skip": "second"}, "none of the quantized"),
    ],
)
def test_wrong_options_are_refused(arguments, options, words):
    model = Net()
    before = snapshot(model)
    with pytest.raises(ConfigError, match=words):
        lp.quantize(model, *arguments, **options)
    assert_untouched(model, before)


# ---- bad input


def _adapted() -> nn.Module:
    model = Net()
    lp.inject(model, lp.LoRA(rank=2, targets="second"))
    return model


def _hf_adapted() -> nn.Module:
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks for a deprecated property of transformers
        return peft.get_peft_model(backbones.llama(), peft.LoraConfig(r=2, target_modules=["q_proj"]))


def _gptq() -> nn.Module:
    layer = nn.Module()
    layer.register_buffer("qweight", torch.zeros(4, 4, dtype=torch.int32))
    return nn.Sequential(nn.Linear(16, 16), layer)


def _bitsandbytes() -> nn.Module:
    import bitsandbytes

    return nn.Sequential(nn.Linear(32, 32), bitsandbytes.nn.Linear4bit(32, 32, quant_type="nf4").to("cpu"))


def _tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    model[1].weight = model[0].weight
    return model


def _patched() -> nn.Module:
    model = Net()
    model.second.forward = functools.partial(nn.Linear.forward, model.second)
    return model


def _spoiled() -> nn.Module:
    model = Net()
    with torch.no_grad():
        model.first.weight[3, 4] = torch.nan
    return model


def _lazy() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 16), nn.LazyLinear(16))


BAD: dict[str, tuple[Callable[[], nn.Module], type[PEFTError], str]] = {
    "quantized by us": (lambda: lp.quantize(Net()), ConflictError, "'first' is quantized already .nf4, bitsandbytes"),
    "quantized by bitsandbytes": (_bitsandbytes, ConflictError, "'1' is quantized already .nf4"),
    "codes of somebody else": (_gptq, ConflictError, "'1' is quantized already .*int32"),
    "adapters": (_adapted, ConflictError, "Quantize before injecting"),
    "adapters of HF peft": (_hf_adapted, ConflictError, "Quantize before injecting"),
    "tied": (_tied, ConflictError, "'0.weight' is tied to '1.weight'.*skip=..0., .1.."),
    "a forward on the instance": (_patched, ConflictError, "'second' has a forward of its own"),
    "a wrapper inside": (lambda: nn.Sequential(nn.DataParallel(nn.Linear(16, 16))), ConflictError, "wrapped by DataParallel"),
    "meta": (lambda: Net().to("meta"), UnsupportedLayerError, "no values yet .meta"),
    "not finite": (_spoiled, UnsupportedLayerError, "first.weight. has the entry nan"),
    "float64": (lambda: Net().double(), UnsupportedLayerError, "float64; what can be quantized is bfloat16, float16, float32"),
    "float8": (lambda: Net().to(torch.float8_e4m3fn), UnsupportedLayerError, "float8_e4m3fn"),
    "nothing": (lambda: nn.Sequential(nn.Conv1d(4, 4, 3)), TargetError, "no linear layer to quantize"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_and_the_model_untouched(case):
    make, error, words = BAD[case]
    model = make()
    before = snapshot(model)
    with pytest.raises(error, match=words):
        lp.quantize(model)
    assert_untouched(model, before)


def test_a_lazy_layer_is_refused():
    model = _lazy()
    with pytest.raises(PEFTError):
        lp.quantize(model, skip="0")
    assert type(model[0]) is nn.Linear


def test_a_tied_pair_can_stay_dense():
    model = nn.Sequential(*_tied(), nn.Linear(16, 16))
    lp.quantize(model, skip=["0", "1"])
    assert quantized_paths(model) == ["2"]
    assert model[0].weight is model[1].weight


def test_an_optimizer_or_a_wrapper_that_exists_is_refused():
    model = Net()
    before = snapshot(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ConflictError, match="an optimizer .SGD. holds parameters"):
        lp.quantize(model)
    del optimizer
    wrapper = nn.DataParallel(model)
    with pytest.raises(ConflictError, match="wrapped by DataParallel already"):
        lp.quantize(model)
    assert_untouched(model, before)
    del wrapper
    lp.quantize(model)


def test_a_skip_that_matches_nothing_is_refused():
    model = Net()
    with pytest.raises(TargetError, match="'frist' matches no role and no module.*Did you mean 'first'"):
        lp.quantize(model, skip="frist")
    assert quantized_paths(model) == []


def test_a_missing_backend_is_named_with_its_install_line(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    model = Net()
    before = snapshot(model)
    with pytest.raises(DependencyError, match="pip install"):
        lp.quantize(model)
    assert_untouched(model, before)


# ---- LoftQ


def _error(weight: Tensor, layer: nn.Module) -> float:
    left, right = loftq_factors(layer)
    return float((weight - dequantized(layer).float() - left @ right).norm())


@pytest.mark.parametrize("shape", [(128, 192), (192, 128)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_loftq_comes_closer_to_the_weight(backend, shape):
    plain = nn.Linear(*shape[::-1])
    nn.init.normal_(plain.weight, std=0.02)
    weight = plain.weight.detach().clone()
    errors, codes = [], []
    for iterations in (1, 2, 5):
        model = nn.Sequential(copy.deepcopy(plain))
        lp.quantize(model, backend=backend, loftq={"rank": 16, "iterations": iterations})
        errors.append(_error(weight, model[0]))
        codes.append(dequantized(model[0]))
    once = dequantized(lp.quantize(nn.Sequential(copy.deepcopy(plain)), backend=backend)[0])
    assert torch.equal(codes[0], once)  # one iteration leaves plain codes
    assert not torch.equal(codes[1], once)
    residual = weight - once.float()
    singular = torch.linalg.svdvals(residual.double())
    # Eckart-Young: with the best rank-16 factors exactly the tail of the spectrum is left.
    assert errors[0] == pytest.approx(float(singular[16:].norm()), rel=1e-5)
    assert errors[1] < errors[0] < float(residual.norm())
    assert errors[2] < errors[0]


def test_loftq_factors_stay_with_the_layer_and_out_of_the_state():
    model = Net()
    keys = lp.quantize(copy.deepcopy(model)).state_dict().keys()
    lp.quantize(model, loftq={"rank": 3, "targets": ["second"]})
    assert loftq_factors(model.first) is None
    left, right = loftq_factors(model.second)
    assert (left.shape, right.shape, left.dtype) == ((32, 3), (3, 64), torch.float32)
    assert model.state_dict().keys() == keys
    other = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert torch.equal(loftq_factors(other.second)[0], left)
    assert loftq_factors(nn.Linear(2, 2)) is None


def test_the_preparation_names_recipe_and_layers():
    model = backbones.llama()
    assert preparation_of(model) == {}
    lp.quantize(model, block_size=128, loftq={"rank": 2, "iterations": 3, "targets": ["q_proj"]})
    recipe = {"rank": 2, "iterations": 3, "scheme": "nf4", "double_quant": True, "block_size": 128}
    assert preparation_of(model) == {"loftq": [{**recipe, "layers": {"model.layers.*.self_attn.q_proj": 2}}]}
    assert preparation_of(lp.quantize(backbones.llama(), loftq={"rank": 2})) == {}
