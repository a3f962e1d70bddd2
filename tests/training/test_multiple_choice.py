"""The multiple-choice tasks: their losses are those of every choice scored alone, on decoders and encoder-decoders, under any method."""

from __future__ import annotations

import json
import math

import pytest
import torch
import transformers
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.nn import functional as F

import lightning_peft as lp
from lightning_peft.errors import ConfigError, DataError
from lightning_peft.nn.chunked_loss import IGNORE
from lightning_peft.training.data import PEFTDataModule
from lightning_peft.training.module import PEFTLightningModule
from lightning_peft.training.tasks import TASKS
from tests.training import faults, tiny
from tests.training.test_scoring import gemma2
from tests.training.tiny import loader, trained, trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
]


def t5():
    config = tiny.t5()
    config.dropout_rate = 0.0
    return transformers.T5ForConditionalGeneration(config)


MODELS = {
    "llama": lambda: transformers.LlamaForCausalLM(tiny.llama(tied=False)),
    "gpt2": lambda: transformers.GPT2LMHeadModel(tiny.gpt2()),
    "gemma2": gemma2,  # caps its logits, so it computes them itself
    "t5": t5,
}
# (prompt, choices, answer)
EXAMPLES = [
    ([5, 6, 7, 8], [[30, 2], [31, 32, 2]], 1),
    ([9, 10], [[33, 2], [34, 2], [35, 36, 37, 2]], 0),
    ([11, 12, 13, 14, 15, 16], [[38, 39, 2]], 0),
    ([20, 21, 22], [[40, 2], [41, 42, 2], [43, 2], [44, 45, 2]], 3),
]
CLOSE = {"t5": 1e-7}  # its norms compute in fp32 whatever the weights are
WEIGHTS = {"mc_loss": 0.5, "unlikely_loss": 2.0, "length_norm": 0.8}


def task_of(name):
    return "seq2seq_multiple_choice" if name == "t5" else "multiple_choice"


def padded(rows, value, more=0):
    wide = max(map(len, rows)) + more
    return torch.tensor([[*row, *[value] * (wide - len(row))] for row in rows])


def batch_of(name, examples=EXAMPLES, *, more=0):
    """What PEFTDataModule makes of the examples; ``more`` columns of padding."""
    inputs = [p for p, _, _ in examples] if name == "t5" else [[*p, *c] for p, choices, _ in examples for c in choices]
    labels = [c if name == "t5" else [*[IGNORE] * len(p), *c] for p, choices, _ in examples for c in choices]
    return {
        "input_ids": padded(inputs, 0, more),
        "attention_mask": padded([[1] * len(row) for row in inputs], 0, more),
        "choice_labels": padded(labels, IGNORE, more),
        "choice_counts": torch.tensor([len(choices) for _, choices, _ in examples]),
        "answer_labels": torch.tensor([answer for _, _, answer in examples]),
    }


def module_of(name, strategy="ia3", *, dtype=torch.float64, **options):
    torch.manual_seed(0)
    base = MODELS[name]().to(dtype)
    module = PEFTLightningModule(strategy, base, task_of(name), **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.handle.trainable_parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return module.to(dtype).eval()


def alone(module, name, prompt, choice):
    """Log-likelihoods of the tokens of one choice, from a call of the model with nothing else in it."""
    ids, wanted = torch.tensor([prompt]), torch.tensor([choice])
    if name == "t5":
        logits = module.base(input_ids=ids, labels=wanted).logits[0]
    else:
        logits = module.base(input_ids=torch.cat([ids, wanted], 1)).logits[0, len(prompt) - 1 : -1]
    return torch.log_softmax(logits, -1)[range(len(choice)), choice]


def reference(module, name, examples=EXAMPLES, *, mc_loss=1.0, unlikely_loss=1.0, length_norm=1.0):
    """The formula of the paper over choices that are scored one by one: loss, and β of every example."""
    right, wrong, normalized, scores = [], [], [], []
    for prompt, choices, answer in examples:
        logp = [alone(module, name, prompt, choice) for choice in choices]
        beta = torch.stack([-row.sum() / len(row) ** length_norm for row in logp])
        normalized.append(F.cross_entropy(-beta[None], torch.tensor([answer])))
        right.append(-logp[answer])
        wrong += [-torch.log(1 - row.exp() + 0.01) for c, row in enumerate(logp) if c != answer]
        scores.append(beta.detach())
    loss = torch.cat(right).mean() + mc_loss * torch.stack(normalized).mean()
    return loss + (unlikely_loss * torch.cat(wrong).mean() if wrong else 0.0), scores


def loss_of(module, batch):
    terms, counts = module.task.losses(module._score(module.base, batch), batch), module.task.counts(batch)
    return sum(term / max(count, 1) for term, count in zip(terms, counts, strict=True))


def gradients(module, loss):
    return torch.autograd.grad(loss, module.handle.trainable_parameters())


@pytest.mark.parametrize("weights", [{}, WEIGHTS], ids=["paper", "weights"])
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_those_of_choices_scored_alone(name, weights):
    module = module_of(name, choice_losses=weights)
    expected, _ = reference(module, name, **weights)
    batch = batch_of(name)
    for _ in range(2):  # the first call finds out what the model does with its logits
        loss = loss_of(module, batch)
        assert abs(loss - expected) < CLOSE.get(name, 1e-12)
    for a, b in zip(gradients(module, loss), gradients(module, expected), strict=True):
        assert (a - b).abs().max() < CLOSE.get(name, 1e-12)


# T5's adapters in encoder and decoder; what they add to positions, masks and attention must survive the encoder's single run.
METHODS = ["lora", "dora", "prompt_tuning", "p_tuning", "prefix_tuning", "pfeiffer"]
EACH = [(name, method) for name in ("gpt2", "t5") for method in METHODS] + [("gpt2", "ladder_side_tuning")]


@pytest.mark.parametrize(("name", "method"), EACH)
def test_any_method(name, method):
    info = lp.get_method(method)
    module = module_of(name, info.cls(**info.example))
    expected, _ = reference(module, name)
    loss = loss_of(module, batch_of(name))
    assert abs(loss - expected) < CLOSE.get(name, 1e-10)
    for a, b in zip(gradients(module, loss), gradients(module, expected), strict=True):
        assert (a - b).abs().max() < CLOSE.get(name, 1e-10)


@pytest.mark.parametrize("name", MODELS)
def test_padding_and_company_change_nothing(name):
    module = module_of(name)
    with torch.no_grad():
        plain = loss_of(module, batch_of(name))
        assert abs(loss_of(module, batch_of(name, more=5)) - plain) < CLOSE.get(name, 1e-12)
        each = [module.task.losses(module._score(module.base, b), b) for e in EXAMPLES for b in [batch_of(name, [e])]]
        counts = module.task.counts(batch_of(name))
    summed = sum(sum(term) / count for term, count in zip(zip(*each, strict=True), counts, strict=True))
    assert abs(summed - plain) < CLOSE.get(name, 1e-12)


class Rows:
    """Counts the rows of all calls of a module, inside whatever stands in for its forward."""

    def __init__(self, module, monkeypatch):
        self.rows = []
        forward = type(module).forward

        def counted(this, *args, **kwargs):
            if this is module:
                given = args[0] if args else kwargs["input_ids"]
                self.rows.append(given.shape[:-1].numel() if given.is_floating_point() else len(given))
            return forward(this, *args, **kwargs)

        monkeypatch.setattr(type(module), "forward", counted)


def test_the_encoder_runs_once_per_example(monkeypatch):
    module = module_of("t5")
    encoder = module.base.encoder
    before = encoder.__dict__.get("forward")
    seen = Rows(encoder, monkeypatch)
    loss_of(module, batch_of("t5"))
    assert seen.rows == [len(EXAMPLES)]
    assert encoder.__dict__.get("forward") is before
    with pytest.raises(IndexError):
        loss_of(module, {**batch_of("t5"), "input_ids": batch_of("t5")["input_ids"] + tiny.VOCABULARY})
    assert encoder.__dict__.get("forward") is before


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_the_head_sees_the_tokens_of_choices_only(name, monkeypatch):
    monkeypatch.setattr("lightning_peft.nn.chunked_loss.CHUNK_ROWS", 4)
    monkeypatch.setattr("lightning_peft.nn.chunked_loss.CHUNK_LOGITS", 0)
    module = module_of(name)
    expected = gradients(module, reference(module, name)[0])
    seen = Rows(module.base.lm_head, monkeypatch)
    loss = loss_of(module, batch_of(name))
    tokens = sum(len(choice) for _, choices, _ in EXAMPLES for choice in choices)
    assert sum(seen.rows) == 1 + tokens  # one row shows what the model does with logits
    assert max(seen.rows) <= 4
    for a, b in zip(gradients(module, loss), expected, strict=True):
        assert (a - b).abs().max() < CLOSE.get(name, 1e-12)
    assert max(seen.rows) <= 4


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_recomputed_blocks_and_dropout(name):
    """The same random numbers with and without gradient checkpointing."""

    def run(**options):
        module = module_of(name, lp.LoRA(rank=2, dropout=0.2), lr=1e-3, lr_scheduler=None, **options).train()
        torch.manual_seed(3)
        trainer().fit(module, loader([batch_of(name)] * 2))
        return trained(module)

    plain, recomputed = run(), run(gradient_checkpointing=True)
    for parameter, value in plain.items():
        assert (recomputed[parameter] - value).abs().max() < CLOSE.get(name, 1e-12), parameter


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_accumulated_small_batches_equal_one_large_batch(name):
    def run(batches, **options):
        module = module_of(name, optimizer=lambda groups: torch.optim.SGD(groups, lr=0.5), lr_scheduler=None).train()
        trainer(**options).fit(module, loader(batches))
        return trained(module)

    large = run([batch_of(name)])
    small = run([batch_of(name, part) for part in (EXAMPLES[:1], EXAMPLES[1:3], EXAMPLES[3:])], accumulate_grad_batches=3)
    assert all((small[n] - value).abs().max() < CLOSE.get(name, 1e-12) for n, value in large.items())


@pytest.mark.parametrize("name", MODELS)
def test_validation_and_prediction(name):
    module = module_of(name, choice_losses=WEIGHTS)
    with torch.no_grad():
        expected, scores = reference(module, name, **WEIGHTS)
    best = [int(beta.argmin()) for beta in scores]
    accuracy = sum(b == answer for b, (_, _, answer) in zip(best, EXAMPLES, strict=True)) / len(EXAMPLES)
    batches = [batch_of(name, EXAMPLES[:3]), batch_of(name, EXAMPLES[3:])]
    (found,) = trainer().validate(module, loader(batches), verbose=False)
    assert found == {"val_loss": pytest.approx(float(expected), rel=1e-6), "val_accuracy": pytest.approx(accuracy)}
    for batch, part in zip(batches, (EXAMPLES[:3], EXAMPLES[3:]), strict=True):
        del batch["answer_labels"]
        batch["choices"] = [[f"choice {c[0]}" for c in choices] for _, choices, _ in part]
    rows = [row for batch in trainer().predict(module, loader(batches)) for row in batch]
    for row, beta, right, (_, choices, _) in zip(rows, scores, best, EXAMPLES, strict=True):
        share = float(torch.softmax(-beta, -1)[right])
        assert row == {"choice": f"choice {choices[right][0]}", "index": right, "score": pytest.approx(share)}
    json.dumps(rows)


def test_examples_without_answer_and_without_alternatives():
    module = module_of("llama")
    batch = batch_of("llama")
    batch["answer_labels"][:2] = IGNORE
    with torch.no_grad():
        expected = loss_of(module, batch_of("llama", EXAMPLES[2:]))
        assert abs(loss_of(module, batch) - expected) < 1e-12
        only = batch_of("llama", EXAMPLES[2:3])
        terms = module.task.losses(module._score(module.base, only), only)
    assert [float(t) for t in terms[1:]] == [0.0, 0.0]
    (found,) = trainer().validate(module, loader([only]), verbose=False)
    assert found == {"val_loss": pytest.approx(float(terms[0]) / 3, rel=1e-6), "val_accuracy": 1.0}
    only["answer_labels"][:] = IGNORE
    (found,) = trainer().validate(module, loader([only]), verbose=False)
    assert math.isnan(found["val_loss"])


def test_f1_where_the_choices_are_classes():
    module = module_of("llama", labels=["ham", "spam"])
    examples = [(prompt, EXAMPLES[0][1], i % 2) for i, (prompt, _, _) in enumerate(EXAMPLES)]
    (found,) = trainer().validate(module, loader([batch_of("llama", examples)]), verbose=False)
    assert set(found) == {"val_loss", "val_accuracy", "val_f1"}


# ---- whole runs with PEFTDataModule


@pytest.fixture
def rows(tmp_path):
    """Two to four choices, of which the right one is a word of the question."""
    lines = []
    for i in range(30):
        options = [f"w{20 + (i + 3 * k) % 12}" for k in range(2 + i % 3)]
        lines.append({"text": f"w{i % 7} {options[i % len(options)]}", "options": options, "label": i % len(options)})
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return str(path)


@pytest.fixture(params=["llama", "t5"])
def folder(request, tmp_path):
    torch.manual_seed(0)
    MODELS[request.param]().save_pretrained(tmp_path / request.param)
    tiny.tokenizer().save_pretrained(tmp_path / request.param)
    return tmp_path / request.param


def data_of(rows, folder, **options):
    given = {"val_fraction": 0.2, "batch_size": 4, "choices": "options", **options}
    return PEFTDataModule(data_path=rows, task=task_of(folder.name), prompt="{text}", **given)


@pytest.mark.filterwarnings("ignore:lr=.*what full usually trains with")  # nothing here was trained before
def test_a_model_learns_to_choose(folder, rows):
    module = PEFTLightningModule("full", str(folder), task_of(folder.name), lr=2e-2, lr_scheduler="constant")
    run = trainer(max_epochs=12, limit_val_batches=0)
    run.fit(module, data_of(rows, folder, val_fraction=0.0))
    assert run.callback_metrics["train_loss"] < 0.5
    (found,) = run.test(module, data_of(None, folder, test_path=rows), verbose=False)
    assert found["test_accuracy"] > 0.9
    predicted = run.predict(module, data_of(None, folder, predict_path=rows, batch_size=30))[0]
    right = [row["index"] == i % (2 + i % 3) for i, row in enumerate(predicted)]
    assert sum(right) / 30 == pytest.approx(found["test_accuracy"])
    assert all(row["choice"] == f"w{20 + (i + 3 * row['index']) % 12}" for i, row in enumerate(predicted))


def test_a_resumed_run_is_the_uninterrupted_one(folder, rows, tmp_path):
    def fit(name, start=None):
        faults.seed()
        options = {"optimizer": torch.optim.Adafactor, "lr": 3e-3, "lr_scheduler": "linear"}
        module = PEFTLightningModule(lp.LoRA(rank=2, dropout=0.1), str(folder), task_of(folder.name), **options)
        keep = ModelCheckpoint(tmp_path / name, every_n_train_steps=4, save_top_k=-1, filename="{step}")
        run = trainer(callbacks=[keep], enable_checkpointing=True, max_epochs=2, gradient_clip_val=1.0, limit_val_batches=0)
        run.fit(module, data_of(rows, folder), ckpt_path=start)
        return module, run

    whole = fit("whole")
    assert whole[1].global_step == 12
    resumed = fit("resumed", tmp_path / "whole" / "step=8.ckpt")  # in the second epoch
    assert faults.differing(faults.state(*whole), faults.state(*resumed)) == []
    again = PEFTLightningModule.load_from_checkpoint(tmp_path / "whole" / "step=12.ckpt")
    data = data_of(rows, folder, predict_path=rows)
    assert trainer().predict(again, data) == trainer().predict(whole[0], data)


def test_an_adapter_folder_is_loaded(folder, rows, tmp_path):
    module = PEFTLightningModule("ia3", str(folder), task_of(folder.name), lr=0.05, callback={"export": str(tmp_path / "a")})
    trainer().fit(module, data_of(rows, folder))
    model = type(module.base).from_pretrained(folder)
    handle = lp.load_adapter(model, tmp_path / "a" / "last")
    assert handle.usage["task"] == task_of(folder.name)
    scores = []
    for base in (module.base.eval(), model.eval()):
        batch = batch_of(folder.name)
        task = TASKS[task_of(folder.name)]
        with torch.no_grad():
            scores.append(task.logits(base, batch))
    assert torch.equal(*scores)


# ---- what is refused


def test_mistakes():
    module = PEFTLightningModule("ia3", MODELS["t5"](), "multiple_choice")
    with pytest.raises(ConfigError, match="has an encoder: use seq2seq_multiple_choice"):
        trainer().validate(module, loader([batch_of("llama")]), verbose=False)
    module = PEFTLightningModule("ia3", MODELS["llama"](), "seq2seq_multiple_choice")
    with pytest.raises(ConfigError, match="cannot make decoder inputs"):
        trainer().validate(module, loader([batch_of("t5")]), verbose=False)
    with pytest.raises(ConfigError, match="label_smoothing=0.1 is not for multiple_choice"):
        module_of("llama", label_smoothing=0.1)
    with pytest.raises(ConfigError, match="not for causal_lm"):
        PEFTLightningModule("ia3", MODELS["llama"](), choice_losses={"mc_loss": 1.0})
    with pytest.raises(ConfigError, match="'mcloss' is unknown.*Did you mean 'mc_loss'"):
        module_of("llama", choice_losses={"mcloss": 1.0})
    for value in (-1.0, math.nan, math.inf, "1", True):
        with pytest.raises(ConfigError, match="length_norm=.* is no number of at least 0"):
            module_of("llama", choice_losses={"length_norm": value})
    module = module_of("llama")
    batch = batch_of("llama")
    for broken in ({**batch, "choice_counts": torch.tensor([2, 3])}, {k: v for k, v in batch.items() if k != "choice_counts"}):
        with pytest.raises(DataError, match="'choice_counts' must tell how many of the 10 choices"):
            trainer().validate(module, loader([broken]), verbose=False)
    with pytest.raises(DataError, match="no 'choice_labels'"):
        trainer().validate(module, loader([{"input_ids": batch["input_ids"]}]), verbose=False)
