"""Gradient checkpointing: the same numbers from fewer kept bytes, on any stack of blocks, and nothing left behind."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import DynamicCache

import lightning_peft as lp
from lightning_peft.errors import ConfigError, ConflictError, PEFTError, TargetError
from lightning_peft.surgery.recompute import GradientCheckpointing, checkpoint_blocks, recomputed_blocks
from tests.surgery import zoo

TOKENS = {"num_virtual_tokens": 3}
METHODS: dict[str, Any] = {
    "lora": {"class_path": "LoRA", "init_args": {"rank": 2, "dropout": 0.1}},
    "houlsby": "houlsby",
    "prefix_tuning": {"class_path": "PrefixTuning", "init_args": TOKENS},
    "prompt_tuning": {"class_path": "PromptTuning", "init_args": TOKENS},
    "vera": {"class_path": "VeRA", "init_args": {"rank": 2}},
    "adalora": "adalora",
    "full": "full",
}
OPTIONS: dict[tuple[str, str], dict[str, Any]] = {
    ("encoder", "lora"): {"dropout": 0.0},  # the weights of nn.MultiheadAttention have no input to drop
    ("encoder", "vera"): {"targets": "mlp"},
    ("encoder", "houlsby"): {"targets": "mlp.down"},
    ("list", "lora"): {"targets": "all-linear"},
    ("list", "vera"): {"targets": "layers.*"},
    ("list", "adalora"): {"targets": "layers.*", "initial_rank": 3, "target_rank": 2},
    ("list", "houlsby"): {"targets": "down"},
}


class Layer(nn.Module):
    """A block of a user's own: its inputs by name only, several results, one of which is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.drop = nn.Linear(16, 32), nn.Linear(32, 16), nn.Dropout(0.1)

    def forward(self, *, scale: float, hidden: Tensor) -> dict[str, Any]:
        return {"hidden": hidden + scale * self.drop(self.down(torch.tanh(self.up(hidden)))), "note": None}


class Net(nn.Module):
    def __init__(self, blocks: int = 4) -> None:
        super().__init__()
        self.first = nn.Linear(8, 16)
        self.layers = nn.ModuleList(Layer() for _ in range(blocks))
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        for layer in self.layers:
            hidden = layer(hidden=hidden, scale=0.5)["hidden"]
        return self.head(hidden)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(16, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(ids), src_key_padding_mask=ids == 0))


def build(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """Return a model in float64 and train mode, with dropout, and what it takes."""
    torch.manual_seed(0)
    if name == "list":
        model: nn.Module = Net()
        batch = {"x": torch.randn(5, 7, 8)}
    elif name == "encoder":
        model, batch = Encoder(), {"ids": torch.arange(14).view(2, 7)}
    else:
        model = zoo.build(name)
        batch = zoo.inputs(model)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.1
    return model.double().train(), {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}


def adapted(name: str, method: str) -> tuple[nn.Module, lp.Handle, dict[str, Tensor]]:
    model, batch = build(name)
    strategy = dataclasses.replace(lp.resolve(METHODS[method]), **OPTIONS.get((name, method), {}))
    handle = lp.inject(model, strategy)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # off the start, where half of the factors are zero
        for p in handle.trainable_parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return model, handle, batch


def enable(model: nn.Module, **option: Any) -> Callable[[], None]:
    return checkpoint_blocks(model, lp.anatomy_of(model), GradientCheckpointing(**option))


def step(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, list[Tensor | None], int]:
    """Return loss, gradients of what trains, and the bytes that the graph keeps beside parameters."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    model.zero_grad()
    torch.manual_seed(5)
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        out = model(**batch)
        loss = (out if isinstance(out, Tensor) else out.logits).square().mean()
    for p in model.parameters():
        kept.pop(p.untyped_storage().data_ptr(), None)
    loss.backward()
    return loss.detach(), [p.grad for p in model.parameters() if p.requires_grad], sum(kept.values())


@contextmanager
def runs_of(model: nn.Module, child: str) -> Iterator[dict[str, int]]:
    """Count how often the child of each block runs."""
    seen: dict[str, int] = {}
    hooks = []
    for block in lp.anatomy_of(model).blocks:

        def count(*_: Any, block: str = block) -> None:
            seen[block] = seen.get(block, 0) + 1

        hooks.append(model.get_submodule(f"{block}.{child}").register_forward_pre_hook(count))
    yield seen
    for hook in hooks:
        hook.remove()


def close(a: list[Tensor | None], b: list[Tensor | None], tolerance: float) -> bool:
    assert [g is None for g in a] == [g is None for g in b]
    pairs = [(x, y) for x, y in zip(a, b, strict=True) if x is not None and y is not None]
    assert any(x.abs().max() > 0 for x, _ in pairs)
    return all((x - y).abs().max() <= tolerance * (1 + x.abs().max()) for x, y in pairs)


# ---------------------------------------------------------------- the numbers

CASES = [
    (name, method)
    for name in ("llama", "gpt2", "bert", "t5", "vit", "encoder", "list")
    for method in METHODS
    if not (name == "vit" and method == "prompt_tuning")  # no embeddings
    and not (name in ("encoder", "list") and method in ("prefix_tuning", "prompt_tuning"))  # no ports
]


@pytest.mark.parametrize(("name", "method"), CASES)
def test_loss_and_gradients_are_equal_and_a_block_keeps_its_input_only(name: str, method: str) -> None:
    model, _, batch = adapted(name, method)
    loss, gradients, whole = step(model, batch)
    inputs: list[int] = []
    hooks = [
        model.get_submodule(path).register_forward_pre_hook(
            lambda m, args, kwargs: inputs.append(next(t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)).nbytes),
            with_kwargs=True,
        )
        for path in lp.anatomy_of(model).blocks
    ]
    undo = enable(model)
    again, recomputed, kept = step(model, batch)
    for hook in hooks:
        hook.remove()
    assert torch.equal(loss, again)
    assert close(gradients, recomputed, 0.0)
    undo()
    enable(model, offload=True)  # these inputs wait elsewhere: what is left was kept outside the blocks
    moved, offloaded, outside = step(model, batch)
    assert torch.equal(loss, moved)
    assert close(gradients, offloaded, 0.0)
    assert kept - outside == sum(inputs)
    assert kept < whole / 2


@pytest.mark.parametrize("name", ["llama", "t5", "encoder", "list"])
def test_every_kth_block(name: str) -> None:
    model, _, batch = adapted(name, "full")
    child = {"llama": "mlp", "t5": "layer.1", "encoder": "linear1", "list": "up"}[name]
    loss, gradients, whole = step(model, batch)
    enable(model, every=2)
    with runs_of(model, child) as runs:
        again, half, some = step(model, batch)
    assert list(runs.values()) == {"llama": [2, 1], "t5": [2, 1, 2, 1], "encoder": [2, 1], "list": [2, 1, 2, 1]}[name]
    assert torch.equal(loss, again)
    assert close(gradients, half, 0.0)
    assert 0.3 * whole < some < 0.8 * whole


@pytest.mark.parametrize("method", ["lora", "prompt_tuning", "full"])
@pytest.mark.parametrize("name", ["llama", "t5", "list"])
def test_reentrant_with_frozen_inputs_gets_its_gradients(name: str, method: str) -> None:
    """torch's own would return zeros (inputs frozen) or lose T5's encoder (a keyword argument) without a word."""
    if name == "list" and method == "prompt_tuning":
        method = "vera"
    model, _, batch = adapted(name, method)
    loss, gradients, whole = step(model, batch)
    enable(model, reentrant=True)
    again, recomputed, kept = step(model, batch)
    assert torch.equal(loss, again)
    assert close(gradients, recomputed, 1e-12)
    assert kept < whole / 2


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_blocks_recompute_when_gradients_are_recorded_whatever_the_mode(mode: str) -> None:
    """S6: from_pretrained leaves a model in eval mode."""
    model, _, batch = adapted("llama", "lora")
    model.train(mode == "train")
    enable(model)
    with runs_of(model, "mlp") as runs:
        step(model, batch)
        assert set(runs.values()) == {2}
        with torch.no_grad():
            model(**batch)
        assert set(runs.values()) == {3}


def test_autocast_is_that_of_the_first_run() -> None:
    model, _, batch = adapted("gpt2", "lora")
    model.float()

    def amp() -> tuple[Tensor, list[Tensor | None], int]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return step(model, batch)

    loss, gradients, _ = amp()
    enable(model)
    again, recomputed, _ = amp()
    assert torch.equal(loss, again)
    assert close(gradients, recomputed, 0.0)
    assert not close(gradients, step(model, batch)[1], 1e-6)  # bf16 made a difference at all


@pytest.mark.parametrize("option", [{}, {"reentrant": True}], ids=str)
def test_quantized_base(option: dict[str, Any]) -> None:
    model, batch = build("llama")
    lp.quantize(model.float(), {"scheme": "nf4", "backend": "torch"})
    lp.inject(model, {"class_path": "LoRA", "init_args": {"rank": 2, "dropout": 0.1, "targets": "all-linear"}})
    loss, gradients, whole = step(model, batch)
    enable(model, **option)
    again, recomputed, kept = step(model, batch)
    assert torch.equal(loss, again)
    assert close(gradients, recomputed, 0.0)
    assert kept < whole / 2


def test_accumulated_gradients() -> None:
    model, handle, batch = adapted("bert", "lora")

    def two() -> list[Tensor | None]:
        model.zero_grad()
        torch.manual_seed(3)
        for _ in range(2):
            model(**batch).logits.square().mean().backward()
        return [p.grad for p in handle.trainable_parameters()]

    plain = two()
    enable(model)
    assert close(plain, two(), 0.0)


def test_two_forwards_before_one_backward() -> None:
    model, handle, batch = adapted("llama", "lora")

    def both() -> list[Tensor | None]:
        model.zero_grad()
        torch.manual_seed(3)
        first = model(**batch).logits.square().mean()
        second = model(input_ids=batch["input_ids"].flip(1)).logits.square().mean()
        (first + second).backward()
        return [p.grad for p in handle.trainable_parameters()]

    plain = both()
    enable(model)
    assert close(plain, both(), 0.0)


def test_compiled() -> None:
    model, _, batch = adapted("llama", "full")
    model.float()
    for module in model.modules():  # compiled, random numbers come in another order
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    batch = {**batch, "use_cache": False}  # type: ignore[dict-item]
    _, gradients, _ = step(model, batch)
    enable(model, every=2)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert close(gradients, step(compiled, batch)[1], 1e-5)  # type: ignore[arg-type]


def test_side_network_has_nothing_to_recompute() -> None:
    """The body of a ladder runs under no_grad: nothing is kept in it, and nothing runs twice."""
    model, batch = build("llama")
    lp.inject(model, "ladder_side_tuning")
    loss, gradients, whole = step(model, batch)
    enable(model)
    with runs_of(model, "mlp") as runs:
        again, recomputed, kept = step(model, batch)
    assert set(runs.values()) == {1}
    assert (loss, whole) == (again, kept)
    assert close(gradients, recomputed, 0.0)


# ---------------------------------------------------------------- no backward where nobody needs it


@pytest.mark.parametrize("option", [None, {}, {"reentrant": True}, {"offload": True}], ids=str)
def test_no_backward_below_the_first_adapted_block(option: dict[str, Any] | None) -> None:
    model, batch = build("llama")
    lp.inject(model, {"class_path": "LoRA", "init_args": {"rank": 2, "targets": {"include": "all-linear", "layers": [1]}}})
    if option is not None:
        enable(model, **option)
    wanted: dict[str, bool] = {}
    for path in ("model.embed_tokens", "model.layers.0", "model.layers.1"):
        module = model.get_submodule(path)
        module.register_forward_hook(lambda m, a, out, path=path: wanted.__setitem__(path, out.requires_grad))
    with runs_of(model, "mlp") as runs:
        _, gradients, _ = step(model, batch)
    assert wanted == {"model.embed_tokens": False, "model.layers.0": False, "model.layers.1": True}
    assert runs == {"model.layers.0": 1, "model.layers.1": 1 if option is None else 2}
    assert all(g is not None for g in gradients)


def test_embeddings_that_train_get_their_gradient() -> None:
    model, batch = build("llama")
    enable(model)
    step(model, batch)
    assert model.model.embed_tokens.weight.grad is not None  # type: ignore[union-attr]


# ---------------------------------------------------------------- putting on, taking off


def state(model: nn.Module) -> dict[str, Any]:
    return {p: (type(m), sorted(vars(m)), list(m._modules), vars(m).get("forward")) for p, m in model.named_modules()}


@pytest.mark.parametrize("order", ["icur", "ciru", "icru", "ciur"])
def test_any_order_of_adapters_and_checkpointing(order: str) -> None:
    """i: inject, on the blocks themselves; c: checkpoint; r: remove the adapter; u: undo the checkpointing."""
    model, batch = build("llama")
    before = state(model)
    handle: Any = None
    undo: Any = None
    done = ""
    for act in order:
        if act == "i":
            handle = lp.inject(model, "ladder_side_tuning")
        elif act == "c":
            undo = enable(model)
        elif act == "r":
            handle.remove()
        else:
            undo()
        model(**batch)
        done += act
        assert len(recomputed_blocks(model)) == (2 if "c" in done and "u" not in done else 0)
    assert state(model) == before
    undo()
    assert state(model) == before


def test_checkpointing_outlives_the_adapter_on_a_block() -> None:
    model, batch = build("llama")
    handle = lp.inject(model, "ladder_side_tuning")
    enable(model)
    handle.remove()
    with runs_of(model, "mlp") as runs:
        step(model, batch)
    assert set(runs.values()) == {2}


def test_names_and_state_stay_as_they_are() -> None:
    model, _, _ = adapted("llama", "lora")
    keys, names = list(model.state_dict()), [n for n, _ in model.named_modules()]
    enable(model)
    assert list(model.state_dict()) == keys
    assert [n for n, _ in model.named_modules()] == names


def test_a_forward_of_somebody_else_stays_inside_and_comes_back() -> None:
    model, batch = build("list")
    calls: list[int] = []
    block = model.get_submodule("layers.0")
    original = block.forward

    def foreign(**kwargs: Any) -> Any:
        calls.append(1)
        return original(**kwargs)

    block.forward = foreign  # type: ignore[method-assign]
    undo = enable(model)
    step(model, batch)
    assert len(calls) == 2
    undo()
    assert block.forward is foreign


def test_a_forward_that_somebody_else_puts_around_stays() -> None:
    model, batch = build("list")
    undo = enable(model)
    block = model.get_submodule("layers.0")
    ours = block.forward
    block.forward = lambda **kwargs: ours(**kwargs)  # type: ignore[method-assign]
    around = block.forward
    undo()
    assert block.forward is around
    with runs_of(model, "up") as runs:
        step(model, batch)
    assert set(runs.values()) == {1}


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("method", ["lora", "ladder"])
def test_copies_recompute_on_their_own(duplicate: Callable[[nn.Module], nn.Module], method: str) -> None:
    model, batch = build("llama")
    lp.inject(model, "ladder_side_tuning" if method == "ladder" else METHODS["lora"])
    undo = enable(model)
    twin = duplicate(model)
    loss, gradients, kept = step(model, batch)
    undo()
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    again, recomputed, kept_again = step(twin, batch)
    assert torch.equal(loss, again)
    assert close(gradients, recomputed, 0.0)
    assert kept == kept_again


# ---------------------------------------------------------------- caches


def test_a_cache_that_goes_through_keywords() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
            seen.append((kwargs["past_key_values"], kwargs["use_cache"], kwargs["flag"]))
            return self.inner(x)

    seen: list[Any] = []
    model = nn.ModuleList(Block() for _ in range(2))
    enable(model)
    cache = DynamicCache()
    x = torch.ones(2, 4)
    for block in model:
        x = block(x, past_key_values=cache, use_cache=True, flag=True)
    x.sum().backward()
    assert seen == [(None, False, True)] * 4
    with torch.no_grad():
        model[0](x, past_key_values=cache, use_cache=True, flag=True)
    assert seen[-1] == (cache, True, True)


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bloom", "falcon-new"])
@pytest.mark.parametrize("every", [1, 2])
def test_the_cache_that_a_model_makes_in_training_stays_empty(name: str, every: int) -> None:
    model, batch = build(name)
    lp.inject(model, METHODS["lora"])
    _, gradients, _ = step(model, {**batch, "use_cache": False})  # type: ignore[dict-item]
    enable(model, every=every)
    assert close(gradients, step(model, batch)[1], 0.0)
    cache = model(**batch, use_cache=True).past_key_values
    assert cache is None or cache.get_seq_length() == 0


def test_a_filled_cache_is_refused() -> None:
    model, _, batch = adapted("llama", "lora")
    enable(model)
    with torch.no_grad():
        cache = model(**batch, use_cache=True).past_key_values
        assert cache.get_seq_length() == batch["input_ids"].shape[1]
        model(input_ids=batch["input_ids"][:, -1:], past_key_values=cache)  # without gradients it works as ever
    with pytest.raises(ConflictError, match="holds earlier positions.*generate under torch.no_grad"):
        model(input_ids=batch["input_ids"][:, -1:], past_key_values=cache)


def test_a_cache_that_was_left_empty_is_refused() -> None:
    """A decoding loop that forgot no_grad would go on without what came before."""
    model, _, batch = adapted("llama", "lora")
    model.eval()
    enable(model)
    cache = model(**batch, use_cache=True).past_key_values
    with pytest.raises(ConflictError, match="should hold earlier positions"):
        model(input_ids=batch["input_ids"][:, -1:], past_key_values=cache)


def test_generation_is_untouched() -> None:
    model, _, batch = adapted("llama", "lora")
    model.eval()
    ask = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    before = model.generate(batch["input_ids"], **ask)  # type: ignore[operator]
    enable(model)
    assert torch.equal(model.generate(batch["input_ids"], **ask), before)  # type: ignore[operator]


# ---------------------------------------------------------------- which blocks


@pytest.mark.parametrize(
    ("blocks", "found"),
    [
        ("layers", ["layers.0", "layers.1", "layers.2", "layers.3"]),
        ("layers.*", ["layers.0", "layers.1", "layers.2", "layers.3"]),
        (["layers.1", "head"], ["layers.1", "head"]),
        ("re:layers\\.[02]", ["layers.0", "layers.2"]),
        ("net.layers.3", ["layers.3"]),
        (["layers.0.up", "layers.0"], ["layers.0"]),
        ("up", ["layers.0.up", "layers.1.up", "layers.2.up", "layers.3.up"]),
    ],
)
def test_blocks_by_name(blocks: Any, found: list[str]) -> None:
    model, _, batch = adapted("list", "lora")
    _, gradients, _ = step(model, batch)
    checkpoint_blocks(model, lp.anatomy_of(model), GradientCheckpointing(blocks=blocks), prefix="net")
    assert recomputed_blocks(model) == found
    assert close(gradients, step(model, batch)[1], 0.0)


def test_blocks_by_role() -> None:
    model, _ = build("t5")
    enable(model, blocks="decoder.block")
    assert recomputed_blocks(model) == ["decoder.block.0", "decoder.block.1"]


def test_one_block_of_a_model_with_a_cache() -> None:
    model, _, batch = adapted("llama", "lora")
    _, gradients, _ = step(model, batch)
    enable(model, blocks="layers.1")
    assert close(gradients, step(model, batch)[1], 0.0)
    assert recomputed_blocks(model) == ["model.layers.1"]


def test_sequential_of_equal_parts() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3))).double()
    enable(model)
    assert recomputed_blocks(model) == ["0", "1", "2"]


def test_no_blocks() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    with pytest.raises(TargetError, match=r"no blocks are known of Sequential.*'blocks': \[...\].*it has 0, 1, 2"):
        enable(model)
    assert "forward" not in vars(model[0])
    enable(model, blocks=["0", "2"])
    assert recomputed_blocks(model) == ["0", "2"]
    with pytest.raises(TargetError, match="'transformer.h' matches no role and no module"):
        enable(model, blocks="transformer.h")


def test_asked_twice() -> None:
    model, _, batch = adapted("llama", "lora")
    undo = enable(model)
    again = enable(model)
    again()
    assert len(recomputed_blocks(model)) == 2  # the second request found it done, and has nothing to take back
    before = state(model)
    with pytest.raises(ConflictError, match="under gradient checkpointing already"):
        enable(model, every=2)
    assert state(model) == before
    undo()
    assert not recomputed_blocks(model)
    step(model, batch)


def test_transformers_own_switch_is_not_doubled() -> None:
    model, _ = build("llama")
    model.activation_checkpointing_enable()  # type: ignore[operator]
    with pytest.raises(ConflictError, match="gradient_checkpointing_disable"):
        enable(model)


# ---------------------------------------------------------------- the option


def test_parse() -> None:
    parse = GradientCheckpointing.parse
    assert parse(False) is None
    assert parse(None) is None
    assert parse(True) == GradientCheckpointing()
    option = GradientCheckpointing(every=2, offload=True, blocks=("a",))
    assert parse({"every": 2, "offload": True, "blocks": ["a"]}) == option == parse(option) == parse(option.to_dict())
    assert parse({"blocks": "a"}) == GradientCheckpointing(blocks=("a",))
    assert hash(parse({"blocks": ["a", "b"]}))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"evry": 2}, "no option 'evry'.*Did you mean 'every'"),
        ({"use_reentrant": False}, "no option 'use_reentrant'.*Did you mean 'reentrant'"),
        ({"every": 0}, "every=0, but it counts blocks"),
        ({"every": True}, "every=True"),
        ({"every": "2"}, "every='2'"),
        ({"offload": 1}, "offload=1 is neither true nor false"),
        ({"offload": True, "reentrant": True}, "offload=True needs reentrant=False"),
        ({"blocks": []}, "neither a path nor a list"),
        ({"blocks": 3}, "neither a path nor a list"),
        ("yes", "gradient_checkpointing='yes' is neither true, false nor a mapping"),
    ],
)
def test_refused(value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        GradientCheckpointing.parse(value)
    assert isinstance(error.value, PEFTError)


@pytest.mark.gpu
def test_offload_frees_the_accelerator() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(512, 512), nn.GELU(), nn.Linear(512, 512)) for _ in range(16))).cuda()
    lp.inject(model, {"class_path": "LoRA", "init_args": {"targets": "all-linear"}})
    x = torch.randn(4096, 512, device="cuda")  # 8 MiB

    def kept() -> int:
        before = torch.cuda.memory_allocated()
        out = model(x)
        after = torch.cuda.memory_allocated() - before
        out.sum().backward()
        return after

    plain = kept()
    undo = enable(model)
    recomputed = kept()
    undo()
    enable(model, offload=True)
    assert recomputed <= 17 * x.nbytes < plain
    assert kept() <= 2 * x.nbytes
