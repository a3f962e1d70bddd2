"""Scores of a batch: the loss and gradients of the model's own logits, whatever the model does with them."""

from __future__ import annotations

import copy
import functools
import pickle

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F
from transformers import BertForMaskedLM, GPT2LMHeadModel, LlamaForCausalLM, T5ForConditionalGeneration

import lightning_peft as lp
from lightning_peft.nn.chunked_loss import IGNORE
from lightning_peft.training import scoring
from lightning_peft.training.scoring import Scorer
from lightning_peft.training.tasks import TASKS
from tests.training import tiny
from tests.training.tiny import VOCABULARY, ragged

SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def gemma2():
    # A small cap, so that it matters for logits of a random model.
    more = {"final_logit_softcapping": 0.05, "attention_dropout": 0.1, "attn_implementation": "eager"}
    return transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**SMALL, head_dim=8, **more))


def granite():
    return transformers.GraniteForCausalLM(transformers.GraniteConfig(**SMALL, logits_scaling=8.0))


def cohere():
    return transformers.CohereForCausalLM(transformers.CohereConfig(**SMALL, logit_scale=0.0625))


MODELS = {
    "llama": ("causal_lm", lambda: LlamaForCausalLM(tiny.llama(tied=False))),
    "tied llama": ("causal_lm", lambda: LlamaForCausalLM(tiny.llama())),
    "gpt2": ("causal_lm", lambda: GPT2LMHeadModel(tiny.gpt2())),
    "bert": ("masked_lm", lambda: BertForMaskedLM(tiny.bert())),
    "t5": ("seq2seq_lm", lambda: T5ForConditionalGeneration(tiny.t5())),
    "gemma2": ("causal_lm", gemma2),
    "granite": ("causal_lm", granite),
    "cohere": ("causal_lm", cohere),
}
CHANGED = {"gemma2", "granite", "cohere"}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr("lightning_peft.nn.chunked_loss.CHUNK_ROWS", 3)
    monkeypatch.setattr("lightning_peft.nn.chunked_loss.CHUNK_LOGITS", 0)


def _model(name, *, dtype=torch.float64):
    torch.manual_seed(0)
    task, make = MODELS[name]
    return TASKS[task], make().to(dtype).train()


def _batch(seed=0):
    return ragged([9, 4, 6], generator=torch.Generator().manual_seed(seed))


def _plain(task, model, batch, smoothing=0.0):
    targets = task.targets(batch)
    where = targets != IGNORE
    logits = task.logits(model, batch)[where]
    return F.cross_entropy(logits, targets[where], reduction="sum", label_smoothing=smoothing), logits


def _compare(task, model, batch, scorer, smoothing=0.0):
    """Loss, gradients and predictions of a scorer are those of the model's whole logits. Returns the scores."""
    model.zero_grad()
    torch.manual_seed(1)
    plain, logits = _plain(task, model, batch, smoothing)
    plain.backward()
    random = torch.get_rng_state()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    torch.manual_seed(1)
    scores = scorer(model, batch)
    assert torch.equal(torch.get_rng_state(), random)  # the same draws, also where the model ran twice
    loss = scores.loss(smoothing)
    loss.backward()
    assert abs(loss - plain) < 1e-10
    got = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert (got[name] - value).abs().max() < 1e-10, name
    total, best = scores.evaluate()
    assert abs(total - F.cross_entropy(logits, scores.targets, reduction="sum")) < 1e-10
    assert torch.equal(best, logits.argmax(-1))
    return scores


class Calls:
    """Counts the calls of a module and the rows of its inputs."""

    def __init__(self, module, monkeypatch):
        self.rows = []
        forward = type(module).forward

        def counted(this, *args, **kwargs):
            if this is module:
                self.rows.append(args[0].numel() // args[0].shape[-1] if args else 0)
            return forward(this, *args, **kwargs)

        monkeypatch.setattr(type(module), "forward", counted)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_those_of_the_models_logits(name, smoothing):
    task, model = _model(name)
    scorer = Scorer(task)
    for seed in range(2):
        scores = _compare(task, model, _batch(seed), scorer, smoothing)
        assert scorer.stand_in.separable is (name not in CHANGED)
        assert (scores.head is scoring.identity) is (name in CHANGED)
    assert "forward" not in task.head(model).__dict__


@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_the_head_runs_at_labelled_positions_chunk_by_chunk(name, monkeypatch):
    task, model = _model(name)
    batch = _batch()
    scorer = Scorer(task)
    head, body = Calls(task.head(model), monkeypatch), Calls(model, monkeypatch)
    count = task.labelled(batch)
    scores = scorer(model, batch)
    assert head.rows == [1]  # in the model: the row that shows what it does with logits
    scores.loss()
    assert max(head.rows) <= 3
    assert sum(head.rows) == 1 + 1 + count  # and one row to find the head's parameters
    head.rows.clear()
    scores.evaluate()
    assert sum(head.rows) == count
    assert len(body.rows) == 1


def test_a_model_that_changes_its_logits_runs_twice_once(monkeypatch):
    task, model = _model("gemma2")
    scorer, batch = Scorer(task), _batch()
    body, head = Calls(model, monkeypatch), Calls(model.lm_head, monkeypatch)
    scorer(model, batch)
    assert len(body.rows) == 2
    for _ in range(2):
        body.rows.clear()
        head.rows.clear()
        scorer(model, batch)
        assert len(body.rows) == 1
        assert head.rows == [task.labelled(batch)]


@pytest.mark.parametrize("how", ["in place", "one token", "dtype"])
def test_what_a_model_does_after_its_head_is_seen(how):
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(VOCABULARY, 8), nn.Linear(8, VOCABULARY)

        def get_output_embeddings(self):
            return self.head

        def forward(self, input_ids, attention_mask):
            logits = self.head(self.embed(input_ids))
            if how == "in place":
                return logits.mul_(0.5)
            if how == "one token":
                return torch.cat([logits[..., :-1], logits[..., -1:] - 1], -1)
            return logits.double()

    torch.manual_seed(0)
    task, model = TASKS["causal_lm"], Own().double() if how != "dtype" else Own()
    scorer = Scorer(task)
    if how != "dtype":
        _compare(task, model, _batch(), scorer)
    else:
        loss, plain = scorer(model, _batch()).loss(), _plain(task, model, _batch())[0]
        assert abs(loss - plain) < 1e-4
    assert scorer.stand_in.separable is (how == "dtype")


def test_numbers_that_overflow_once_decide_nothing():
    for name in ("llama", "gemma2"):
        task, model = _model(name)
        scorer = Scorer(task)
        weight = model.model.norm.weight.data.clone()
        model.model.norm.weight.data.fill_(float("nan"))
        assert scorer(model, _batch()).loss().isnan()
        model.model.norm.weight.data.copy_(weight)
        _compare(task, model, _batch(), Scorer(task))
        assert abs(scorer(model.eval(), _batch()).loss() - _plain(task, model, _batch())[0]) < 1e-10
        assert scorer.stand_in.separable is (name == "llama")


def test_a_head_that_sees_other_positions_is_left_to_the_model():
    class Trimmed(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(VOCABULARY, 8), nn.Linear(8, VOCABULARY)

        def get_output_embeddings(self):
            return self.head

        def forward(self, input_ids, attention_mask):
            hidden = self.embed(input_ids)
            logits = self.head(torch.cat([hidden[:, :2], hidden], 1))
            return logits[:, 2:] if logits.shape[1] > 2 else logits

    torch.manual_seed(0)
    task, model, scorer = TASKS["causal_lm"], Trimmed().double(), Scorer(TASKS["causal_lm"])
    _compare(task, model, _batch(), scorer)
    assert scorer.stand_in.separable is False


@pytest.mark.parametrize("name", ["llama", "gemma2", "t5"])
def test_without_labels_the_loss_is_zero_and_every_gradient_is_there(name):
    task, model = _model(name)
    batch = _batch()
    scorer = Scorer(task)
    _plain(task, model, batch)[0].backward()
    reached = {n for n, p in model.named_parameters() if p.grad is not None}
    batch = {**batch, "labels": torch.full_like(batch["labels"], IGNORE)}
    for _ in range(2):
        model.zero_grad()
        loss = scorer(model, batch).loss()
        loss.backward()
        assert loss == 0
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        assert grads.keys() == reached
        assert all(g.abs().max() == 0 for g in grads.values())


ON_THE_HEAD = {
    "lora": (lp.LoRA(rank=2, targets=["lm_head"]), False),
    "lora everywhere": (lp.LoRA(rank=2, targets=["lm_head", "q_proj"]), False),
    "dora": (lp.DoRA(rank=2, targets=["lm_head"]), False),
    "token rows": (lp.TokenRows(ids=(4, 5, 6)), False),
    "tied token rows": (lp.TokenRows(ids=(4, 5, 6)), True),
    "tied, full": (lp.Full(), True),
    "full": (lp.Full(), False),
}


@pytest.mark.parametrize("case", ON_THE_HEAD)
def test_what_trains_in_the_head_learns(case):
    strategy, tied = ON_THE_HEAD[case]
    torch.manual_seed(0)
    task, model = TASKS["causal_lm"], LlamaForCausalLM(tiny.llama(tied=tied)).double()
    handle = lp.inject(model, strategy)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in handle.trainable_parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * 0.3)
    model.double()
    own = model.lm_head.__dict__.get("forward")
    scorer = Scorer(task)
    _compare(task, model, _batch(), scorer)
    assert scorer.stand_in.separable
    assert model.lm_head.__dict__.get("forward") is own
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in handle.trainable_parameters())


def test_a_forward_that_the_head_has_already_is_kept_and_comes_back():
    task, model = _model("llama")
    own = functools.partial(_doubled, model.lm_head)
    model.lm_head.forward = own  # as accelerate does
    scorer = Scorer(task)
    _compare(task, model, _batch(), scorer)
    assert scorer.stand_in.separable
    assert model.lm_head.forward is own
    with pytest.raises(IndexError):
        scorer(model, {**_batch(), "input_ids": _batch()["input_ids"] + VOCABULARY})
    assert model.lm_head.forward is own


def _doubled(head, x):
    return F.linear(x, head.weight) * 2


def test_who_watches_the_head_sees_all_of_its_logits():
    task, model = _model("llama")
    seen = []
    model.lm_head.register_forward_hook(lambda module, args, out: seen.append(out.shape) or out * 2)
    batch, scorer = _batch(), Scorer(task)
    _compare(task, model, batch, scorer)
    assert seen[-1] == (task.labelled(batch), VOCABULARY)


@pytest.mark.parametrize("mark", ["FSDPModule", "FullyShardedDataParallel", "_fsdp_flattened", "ds_id"])
def test_a_sharded_model_keeps_its_head(mark, monkeypatch):
    task, model = _model("llama")
    if mark.startswith("F"):
        block = model.model.layers[0]
        block.__class__ = type(mark, (type(block),), {})
    else:
        setattr(model.lm_head.weight, mark, True)
    batch, scorer = _batch(), Scorer(task)
    _compare(task, model, batch, scorer)
    head = Calls(model.lm_head, monkeypatch)
    scorer(model, batch).loss()
    assert head.rows == [task.labelled(batch)]


@pytest.mark.parametrize("fullgraph", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_compiled_base(fullgraph):
    task, model = _model("tied llama", dtype=torch.float32)
    model.eval()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=fullgraph)
    batch = _batch()
    before = compiled(**{k: batch[k] for k in ("input_ids", "attention_mask")}, use_cache=False).logits
    scorer = Scorer(task)
    for seed in range(3):
        plain = _plain(task, model, _batch(seed))[0]
        expected = torch.autograd.grad(plain, list(model.parameters()))
        scores = scorer(compiled, _batch(seed))
        assert scores.head is not scoring.identity
        loss = scores.loss()
        assert abs(loss - plain) < 1e-4
        for a, b in zip(torch.autograd.grad(loss, list(model.parameters())), expected, strict=True):
            assert (a - b).abs().max() < 1e-4
    after = compiled(**{k: batch[k] for k in ("input_ids", "attention_mask")}, use_cache=False).logits
    assert torch.equal(before, after)


def test_a_compiled_base_that_changes_its_logits():
    task, model = _model("gemma2", dtype=torch.float32)
    compiled, scorer = torch.compile(model.eval(), backend="aot_eager"), Scorer(task)
    for seed in range(2):
        loss = scorer(compiled, _batch(seed)).loss()
        assert abs(loss - _plain(task, model, _batch(seed))[0]) < 1e-4
    assert scorer.stand_in.separable is False


def test_recomputed_blocks_and_autocast():
    task, model = _model("tied llama", dtype=torch.float32)
    batch = _batch()

    def run(loss_of):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of()
        loss.backward()
        return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}

    plain, expected = run(lambda: _plain(task, model, batch)[0].float())
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    loss, grads = run(lambda: Scorer(task)(model, batch).loss())
    assert abs(loss - plain) < 0.01 * plain
    for name, value in expected.items():
        assert (grads[name] - value).norm() < 0.02 * value.norm(), name


def test_logits_are_never_whole():
    """The largest tensor of a step is far below the logits of the labelled positions."""
    config = tiny.llama(tied=False)
    config.vocab_size = 4096
    torch.manual_seed(0)
    task, model = TASKS["causal_lm"], LlamaForCausalLM(config)
    lp.inject(model, lp.LoRA(rank=2, targets=["q_proj", "lm_head"]))
    ids = torch.randint(4, 4096, (4, 32), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    sizes: list[int] = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(t, torch.Tensor))
            return out

    with Sizes():
        Scorer(task)(model, batch).loss().backward()
    weight = model.lm_head.weight.numel()  # seen in views
    assert max(n for n in sizes if n != weight) <= 3 * 4096
    sizes.clear()
    with Sizes():
        _plain(task, model, batch)[0].backward()
    assert max(sizes) == 4 * 32 * 4096  # the test can tell


def test_a_scorer_is_copied_and_pickled_with_its_model():
    task, model = _model("llama")
    scorer = Scorer(task)
    scorer(model, _batch())
    for twin_model, twin in (copy.deepcopy((model, scorer)), pickle.loads(pickle.dumps((model, scorer)))):
        assert twin.stand_in.head is twin_model.lm_head
        _compare(task, twin_model, _batch(1), twin)
    _compare(task, model, _batch(1), scorer)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_classification_is_scored_from_its_logits(smoothing):
    torch.manual_seed(0)
    task = TASKS["sequence_classification"]
    model = transformers.BertForSequenceClassification(tiny.bert(num_labels=3)).double()
    batch = {**_batch(), "labels": torch.tensor([2, 0, 1])}
    _compare(task, model, batch, Scorer(task), smoothing)
