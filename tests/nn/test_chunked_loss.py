"""Chunked cross-entropy: the plain loss and gradients, with the logits of one chunk alive at a time."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_peft.errors import ConfigError
from lightning_peft.nn.chunked_loss import (
    CHUNK_LOGITS,
    CHUNK_ROWS,
    IGNORE,
    chunk_rows,
    chunked_cross_entropy,
    chunked_evaluation,
    head_parameters,
)

DIM, CLASSES = 6, 11


def _case(n: int, dtype: torch.dtype = torch.float64, *, bias: bool = True):
    generator = torch.Generator().manual_seed(n)
    head = nn.Linear(DIM, CLASSES, bias=bias, dtype=dtype)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    hidden = torch.randn(n, DIM, generator=generator).to(dtype).requires_grad_()
    return hidden, torch.randint(CLASSES, (n,), generator=generator), head


def _gradients(loss, hidden, head):
    tensors = [hidden, *(p for p in head.parameters() if p.requires_grad)]
    return torch.autograd.grad(loss * 0.3, tensors)


def _largest(a, b):
    return max((x.double() - y.double()).abs().max().item() if x.numel() else 0.0 for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize(("n", "chunk"), [(1, 1), (7, 3), (8, 4), (9, 1), (5, 100)])
def test_loss_and_gradients_are_the_plain_ones(n, chunk, smoothing, reduction):
    hidden, targets, head = _case(n)
    options = {"label_smoothing": smoothing, "reduction": reduction}
    loss = chunked_cross_entropy(hidden, targets, head, head_parameters(head, hidden), chunk=chunk, **options)
    plain = F.cross_entropy(head(hidden), targets, **options)
    assert loss.dtype == plain.dtype
    assert abs(loss - plain) < 1e-12
    assert _largest(_gradients(loss, hidden, head), _gradients(plain, hidden, head)) < 1e-12
    with torch.no_grad():
        assert torch.equal(chunked_cross_entropy(hidden, targets, head, chunk=chunk, **options), loss)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("kept", [0, 1, 4])
def test_positions_without_label_cost_and_count_nothing(kept, smoothing):
    hidden, targets, head = _case(9)
    targets[torch.randperm(9, generator=torch.Generator().manual_seed(0))[kept:]] = IGNORE
    rows = []

    def recording(x):
        rows.append(len(x))
        return head(x)

    parameters = head_parameters(head, hidden)
    loss = chunked_cross_entropy(hidden, targets, recording, parameters, chunk=3, label_smoothing=smoothing)
    plain = F.cross_entropy(head(hidden), targets, reduction="sum", label_smoothing=smoothing)
    assert sum(rows) == kept
    assert abs(loss - plain) < 1e-12
    # With nothing to learn every gradient is there and zero: DDP waits for all of them.
    assert _largest(_gradients(loss, hidden, head), _gradients(plain, hidden, head)) < 1e-12


def test_another_label_can_be_the_ignored_one():
    hidden, targets, head = _case(6)
    targets[2] = 5
    loss = chunked_cross_entropy(hidden, targets, head, chunk=4, ignore_index=5)
    assert abs(loss - F.cross_entropy(head(hidden), targets, reduction="sum", ignore_index=5)) < 1e-12
    nothing = chunked_cross_entropy(hidden, torch.full_like(targets, IGNORE), head, chunk=4, reduction="mean")
    assert torch.isnan(nothing)


@pytest.mark.parametrize("frozen", ["head", "hidden", "weight"])
def test_only_what_trains_gets_a_gradient(frozen):
    hidden, targets, head = _case(7)
    if frozen == "head":
        head.requires_grad_(False)
    elif frozen == "weight":
        head.weight.requires_grad_(False)
    else:
        hidden.requires_grad_(False)
    parameters = head_parameters(head, hidden)
    assert {id(p) for p in parameters} == {id(p) for p in head.parameters() if p.requires_grad}
    loss = chunked_cross_entropy(hidden, targets, head, parameters, chunk=3)
    plain = F.cross_entropy(head(hidden), targets, reduction="sum")
    tensors = [t for t in (hidden, *head.parameters()) if t.requires_grad]
    assert _largest(torch.autograd.grad(loss, tensors), torch.autograd.grad(plain, tensors)) < 1e-12


def test_parameters_are_found_wherever_they_are_held():
    hidden, targets, head = _case(7)
    scale = nn.Parameter(torch.full((1,), 1.5, dtype=torch.float64))  # no module has it
    unused = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    head.register_parameter("unused", unused)
    nn.utils.parametrizations.weight_norm(head)

    def call(x):
        return head(x) * scale

    parameters = head_parameters(call, hidden)
    originals = [head.parametrizations.weight.original0, head.parametrizations.weight.original1, head.bias, scale]
    assert {id(p) for p in parameters} == {id(p) for p in originals}
    loss = chunked_cross_entropy(hidden, targets, call, parameters, chunk=2)
    plain = F.cross_entropy(call(hidden), targets, reduction="sum")
    assert _largest(torch.autograd.grad(loss, originals), torch.autograd.grad(plain, originals)) < 1e-12
    assert head_parameters(lambda x: x, hidden) == ()


def test_a_weight_that_the_body_uses_too_gets_both_gradients():
    hidden, targets, head = _case(7, bias=False)

    def body():
        return hidden + F.embedding(targets, head.weight)  # tied

    loss = chunked_cross_entropy(body(), targets, head, (head.weight,), chunk=3)
    plain = F.cross_entropy(head(body()), targets, reduction="sum")
    assert _largest(_gradients(loss, hidden, head), _gradients(plain, hidden, head)) < 1e-12


def test_gradients_accumulate_and_scale_as_usual():
    hidden, targets, head = _case(8)
    for part in (slice(0, 5), slice(5, 8)):
        (chunked_cross_entropy(hidden[part], targets[part], head, tuple(head.parameters()), chunk=2) / 8).backward()
    got = [hidden.grad, head.weight.grad, head.bias.grad]
    plain = torch.autograd.grad(F.cross_entropy(head(hidden), targets), [hidden, *head.parameters()])
    assert _largest(got, plain) < 1e-12


def test_a_second_backward_needs_the_graph_kept():
    hidden, targets, head = _case(4)
    loss = chunked_cross_entropy(hidden, targets, head, chunk=2)
    (first,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    (second,) = torch.autograd.grad(2 * loss, hidden)
    assert torch.equal(2 * first, second)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, hidden)


def test_hooks_on_parameters_see_the_whole_gradient_once():
    hidden, targets, head = _case(8)
    seen = []
    head.weight.register_hook(lambda gradient: seen.append(gradient) or gradient * 2)
    loss = chunked_cross_entropy(hidden, targets, head, tuple(head.parameters()), chunk=3)
    assert not seen
    loss.backward()
    (plain,) = torch.autograd.grad(F.cross_entropy(F.linear(hidden, head.weight, head.bias), targets, reduction="sum"), head.bias)
    assert len(seen) == 1
    assert torch.equal(head.weight.grad, 2 * seen[0])
    assert (head.bias.grad - plain).abs().max() < 1e-12


@pytest.mark.parametrize("training", [True, False])
def test_logits_of_one_chunk_live_at_a_time(training):
    hidden, targets, head = _case(20, torch.float32)
    alive: list[weakref.ref] = []
    most = 0

    def recording(x):
        nonlocal most
        gc.collect()
        logits = head(x)
        alive.append(weakref.ref(logits))
        most = max(most, sum(t.numel() * t.element_size() for r in alive if (t := r()) is not None))
        return logits

    if training:
        loss = chunked_cross_entropy(hidden, targets, recording, tuple(head.parameters()), chunk=3)
        assert loss.requires_grad
    else:
        chunked_evaluation(hidden, targets, recording, chunk=3)
    assert len(alive) == 7
    assert most <= 3 * CLASSES * 4
    assert all(r() is None for r in alive)


def test_the_largest_tensor_is_a_chunk():
    """Every tensor that torch makes, forward and backward, is at most as large as a chunk's logits or the head's weight."""
    n, classes, chunk = 64, 512, 8
    head = nn.Linear(DIM, classes, bias=False).requires_grad_(False)
    hidden, targets = torch.randn(n, DIM, requires_grad=True), torch.randint(classes, (n,))
    sizes: list[int] = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(t, torch.Tensor))
            return out

    with Sizes():
        chunked_cross_entropy(hidden, targets, head, chunk=chunk).backward()
    assert max(sizes) == chunk * classes
    sizes.clear()
    with Sizes():
        F.cross_entropy(head(hidden), targets).backward()
    assert max(sizes) == n * classes  # the test can tell


def test_16_bit_heads_lose_no_more_than_the_plain_loss():
    for dtype in (torch.bfloat16, torch.float16):
        hidden, targets, head = _case(33, dtype)
        exact_hidden = hidden.detach().double().requires_grad_()
        exact = [p.detach().double().requires_grad_() for p in head.parameters()]
        reference = F.cross_entropy(F.linear(exact_hidden, *exact), targets, reduction="sum")
        truth = torch.autograd.grad(reference, [exact_hidden, *exact])
        loss = chunked_cross_entropy(hidden, targets, head, tuple(head.parameters()), chunk=8)
        plain = F.cross_entropy(head(hidden).float(), targets, reduction="sum")
        assert loss.dtype == torch.float32
        assert abs(loss - plain) < 1e-5 * plain
        ours = torch.autograd.grad(loss, [hidden, *head.parameters()])
        theirs = torch.autograd.grad(plain, [hidden, *head.parameters()])
        assert all(g.dtype == dtype for g in ours)
        for mine, other, right in zip(ours, theirs, truth, strict=True):
            assert (mine.double() - right).norm() <= 1.05 * (other.double() - right).norm() + 1e-3 * right.norm()


def test_probabilities_that_fp16_cannot_hold_reach_the_gradient():
    classes, n = 40_000, 4
    # Rows of one sign: what is rounded away does not average out.
    weight = torch.rand(classes, DIM, generator=torch.Generator().manual_seed(0)) * 0.1 + 0.5
    weight[0] = 3.5
    hidden, targets = torch.ones(n, DIM, requires_grad=True), torch.zeros(n, dtype=torch.long)

    def head(x):
        return F.linear(x, weight).half()  # products in fp32: the CPU rounds those of fp16 more than we look at here

    def gradient(loss):
        return torch.autograd.grad(loss, hidden)[0]

    logits = head(hidden)
    right = (F.log_softmax(logits.float(), -1).exp() - F.one_hot(targets, classes)) @ weight
    mine = gradient(chunked_cross_entropy(hidden, targets, head, chunk=2))
    plain = gradient(F.cross_entropy(logits.float(), targets, reduction="sum"))
    assert (mine / right - 1).abs().max() < 0.01
    assert (plain / right - 1).abs().min() > 0.05


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_inside_autocast(dtype):
    hidden, targets, head = _case(33, torch.float32)
    tied = head.weight

    def run(loss_of):
        with torch.autocast("cpu", dtype):
            body = hidden + F.linear(F.embedding(targets, tied), torch.eye(DIM))
            loss = loss_of(body)
        return [loss.detach(), *torch.autograd.grad(loss, [hidden, *head.parameters()])]

    mine = run(lambda x: chunked_cross_entropy(x, targets, head, head_parameters(head, x), chunk=5))
    plain = run(lambda x: F.cross_entropy(head(x).float(), targets, reduction="sum"))
    assert all(g.dtype == torch.float32 for g in mine)
    for a, b in zip(mine, plain, strict=True):
        assert (a - b).norm() < 2 * torch.finfo(dtype).eps * b.norm()


def test_wide_operations_of_a_head_stay_wide_in_backward():
    """A head that leaves autocast computes in fp32, and so do its gradients, though the caller is inside autocast."""
    hidden, targets, head = _case(16, torch.float32)

    def wide(x):
        with torch.autocast("cpu", enabled=False):
            return head(x.float())

    with torch.autocast("cpu", torch.bfloat16):
        loss = chunked_cross_entropy(hidden, targets, wide, tuple(head.parameters()), chunk=5)
    plain = F.cross_entropy(head(hidden), targets, reduction="sum")
    assert _largest(_gradients(loss, hidden, head), _gradients(plain, hidden, head)) < 1e-5


def test_a_quantized_head():
    bnb = pytest.importorskip("bitsandbytes")
    dense = nn.Linear(64, 256, bias=True)
    head = bnb.nn.Linear4bit(64, 256, bias=True, compute_dtype=torch.float32, quant_type="nf4")
    head.load_state_dict(dense.state_dict())
    head = head.to("cpu")
    head.bias.requires_grad_(True)
    assert head.weight.dtype == torch.uint8
    hidden, targets = torch.randn(9, 64, requires_grad=True), torch.randint(256, (9,))
    loss = chunked_cross_entropy(hidden, targets, head, head_parameters(head, hidden), chunk=4)
    plain = F.cross_entropy(head(hidden), targets, reduction="sum")
    assert abs(loss - plain) < 1e-4
    assert _largest(torch.autograd.grad(loss, [hidden, head.bias]), torch.autograd.grad(plain, [hidden, head.bias])) < 1e-5


def test_evaluation_gives_loss_and_predictions():
    hidden, targets, head = _case(10)
    total, best = chunked_evaluation(hidden, targets, head, chunk=3)
    logits = head(hidden)
    assert not total.requires_grad
    assert abs(total - F.cross_entropy(logits, targets, reduction="sum")) < 1e-12
    assert torch.equal(best, logits.argmax(-1))
    total, best = chunked_evaluation(hidden[:0], targets[:0], head, chunk=3)
    assert total == 0
    assert best.shape == (0,)


def test_the_result_repeats_bit_for_bit():
    hidden, targets, head = _case(50, torch.float32)

    def run():
        loss = chunked_cross_entropy(hidden, targets, head, tuple(head.parameters()), chunk=7)
        return [loss, *torch.autograd.grad(loss, [hidden, *head.parameters()])]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_it_runs_where_torch_compiles():
    hidden, targets, head = _case(8)

    def step(x):
        return chunked_cross_entropy(x * 2, targets, head, tuple(head.parameters()), chunk=3)

    loss, plain = torch.compile(step, backend="aot_eager")(hidden), step(hidden)
    assert torch.equal(loss, plain)
    assert _largest(_gradients(loss, hidden, head), _gradients(plain, hidden, head)) == 0


def test_chunks_grow_with_fewer_classes():
    assert chunk_rows(49_152) == CHUNK_ROWS
    assert chunk_rows(2) * 2 == CHUNK_LOGITS


@pytest.mark.parametrize(("options", "message"), [({"chunk": 0}, "chunk=0"), ({"chunk": 1, "label_smoothing": 1.5}, "1.5")])
def test_refuses(options, message):
    hidden, targets, head = _case(2)
    with pytest.raises(ConfigError, match=message):
        chunked_cross_entropy(hidden, targets, head, **options)
