"""Every task: it trains, its loss is the Hugging Face model's own, its metrics are exact over batches of different length."""

from __future__ import annotations

import math

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F

from lightning_peft.errors import ConfigError, DataError
from lightning_peft.strategies import get_method, list_methods
from lightning_peft.strategies.reparameterized.lora import LoRA
from lightning_peft.training.generation import answer_scores, left_padded
from lightning_peft.training.metrics import F1
from lightning_peft.training.module import PEFTLightningModule
from lightning_peft.training.tasks import TASKS, ChoiceTask
from tests.training import tiny
from tests.training.tiny import VOCABULARY, loader, ragged, tokenizer, trained, trainer

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
LABELS = ["no", "yes", "maybe"]
IDS = {"id2label": dict(enumerate(LABELS)), "label2id": {n: i for i, n in enumerate(LABELS)}}


def _case(task):
    """(model, batches of ragged lengths) of a task."""
    generator = torch.Generator().manual_seed(3)
    texts = [ragged(lengths, generator=generator) for lengths in ([7, 4], [12, 9, 5], [6])]
    rows = [len(b["labels"]) for b in texts]
    classes = [torch.randint(0, 3, (n,), generator=generator) for n in rows]
    if task == "causal_lm":
        return transformers.LlamaForCausalLM(tiny.llama()), texts
    if task == "masked_lm":
        return transformers.BertForMaskedLM(tiny.bert()), texts
    if task == "seq2seq_lm":
        targets = [ragged([5] * n, generator=generator, prompt=0)["labels"] for n in rows]
        return transformers.T5ForConditionalGeneration(tiny.t5()), [
            {**b, "labels": t} for b, t in zip(texts, targets, strict=True)
        ]
    if task == "sequence_classification":
        model = transformers.BertForSequenceClassification(tiny.bert(**IDS))
        return model, [{**b, "labels": c} for b, c in zip(texts, classes, strict=True)]
    if task == "token_classification":
        model = transformers.BertForTokenClassification(tiny.bert(**IDS))
        return model, [{**b, "labels": torch.where(b["labels"] < 0, -100, b["labels"] % 3)} for b in texts]
    images = [
        {"pixel_values": torch.randn(n, 3, 8, 8, generator=generator), "labels": c} for n, c in zip(rows, classes, strict=True)
    ]
    return transformers.ViTForImageClassification(tiny.vit(**IDS)), images


@pytest.mark.parametrize("task", [t for t in TASKS if not isinstance(TASKS[t], ChoiceTask)])  # see test_multiple_choice.py
def test_a_task_trains_and_scores_as_the_model_itself(task):
    base, batches = _case(task)
    module = PEFTLightningModule(LoRA(rank=2), base, task, lr=1e-3)
    before = trained(module)
    # the same sums from the HF model: its mean loss times the number of labels
    base.eval()
    total = count = 0.0
    for batch in batches:
        labels = batch["labels"][:, 1:] if task == "causal_lm" else batch["labels"]
        n = int((labels != -100).sum())
        total, count = total + base(**batch).loss.item() * n, count + n
    base.train()
    (scores,) = trainer().validate(module, loader(batches), verbose=False)
    assert scores["val_loss"] == pytest.approx(total / count, rel=1e-5)
    if "val_perplexity" in scores:
        assert scores["val_perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)
    assert ("val_f1" in scores) == TASKS[task].needs_labels
    assert "val_accuracy" not in scores or 0 <= scores["val_accuracy"] <= 1
    trainer(max_epochs=2).fit(module, loader(batches))
    after = trained(module)
    assert all((after[n] != before[n]).any() for n in before)


@pytest.mark.parametrize("task", [t for t in TASKS if TASKS[t].needs_labels])
def test_the_head_is_an_extra_module_that_trains(task):
    base, batches = _case(task)
    module = PEFTLightningModule("lora", base, task)
    assert module.extra_modules == ["base.classifier"]
    assert module.labels == LABELS
    before = base.classifier.weight.detach().clone()
    trainer().fit(module, loader(batches))
    assert (base.classifier.weight != before).any()


def test_a_new_head_on_a_16_bit_base_trains_in_fp32(tmp_path):
    transformers.BertModel(tiny.bert()).to(torch.bfloat16).save_pretrained(tmp_path)
    module = PEFTLightningModule("lora", str(tmp_path), "sequence_classification", labels=LABELS, tokenizer=tokenizer())
    module.configure_model()
    assert module.base.bert.encoder.layer[0].output.dense.weight.dtype == torch.bfloat16
    assert module.base.classifier.weight.dtype == torch.float32
    before = module.base.classifier.weight.detach().clone()
    trainer().fit(module, loader(_case("sequence_classification")[1]))
    assert (module.base.classifier.weight != before).any()


# Not: those that need biases, parts, an untied head, patches.
METHODS = [i.name for i in list_methods() if i.name not in ("bitfit", "compose", "head", "visual_prompt_tuning")]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_is_scored_as_the_model_itself(method):
    base, batches = _case("causal_lm")
    info = get_method(method)
    module = PEFTLightningModule(info.cls(**info.example), base, lr=info.lr)
    run = trainer(max_epochs=4)
    run.fit(module, loader(batches), loader(batches))
    module.eval()
    with torch.no_grad():
        sums = [(base(**b).loss.item(), TASKS["causal_lm"].labelled(b)) for b in batches]
    expected = sum(loss * n for loss, n in sums) / sum(n for _, n in sums)
    assert run.callback_metrics["val_loss"].item() == pytest.approx(expected, rel=1e-5)


def test_a_plain_torch_model_classifies_images_given_as_pairs():
    base = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 2))
    module = PEFTLightningModule(
        LoRA(rank=2, targets=["1"]), base, "image_classification", labels=["a", "b"], extra_modules=["base.3"]
    )
    data = [(torch.randn(4, 3, 2, 2), torch.tensor([0, 1, 1, 0])) for _ in range(3)]
    trainer().fit(module, loader(data))
    (scores,) = trainer().validate(module, loader(data), verbose=False)
    logits = torch.cat([base.eval()(x) for x, _ in data])
    target = torch.cat([y for _, y in data])
    assert scores["val_loss"] == pytest.approx(F.cross_entropy(logits, target).item(), rel=1e-5)
    assert scores["val_accuracy"] == pytest.approx((logits.argmax(-1) == target).float().mean().item())


def test_the_head_of_a_language_model_runs_at_labelled_positions_only():
    base, batches = _case("causal_lm")
    module = PEFTLightningModule("lora", base)
    shapes = []
    hook = base.lm_head.register_forward_hook(lambda m, args, out: shapes.append(tuple(out.shape)))
    trainer().validate(module, loader(batches), verbose=False)
    hook.remove()
    assert shapes == [(TASKS["causal_lm"].labelled(b), VOCABULARY) for b in batches]
    assert not base.lm_head._forward_pre_hooks


@pytest.mark.parametrize(("classes", "average"), [(2, "binary"), (4, "macro")])
def test_f1_is_scikit_learns(classes, average):
    sklearn = pytest.importorskip("sklearn.metrics")
    metric = F1(classes)
    generator = torch.Generator().manual_seed(0)
    preds, target = (torch.randint(0, classes, (37,), generator=generator) for _ in range(2))
    for part in range(0, 37, 10):
        metric.update(preds[part : part + 10], target[part : part + 10])
    assert metric.compute().item() == pytest.approx(sklearn.f1_score(target, preds, average=average))


# ---- fixed answers


def _answers(prompts, answers):
    """A batch as PEFTDataModule makes it for evaluation: left-padded prompts, right-padded answers."""
    longest, wide = max(map(len, prompts)), max(map(len, answers))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    answer = torch.tensor([a + [0] * (wide - len(a)) for a in answers])
    real = torch.tensor([[1] * len(a) + [0] * (wide - len(a)) for a in answers])
    rows = len(prompts)
    return {
        "prompt_input_ids": ids,
        "prompt_attention_mask": mask,
        "answer_input_ids": answer.expand(rows, *answer.shape),
        "answer_attention_mask": real.expand(rows, *real.shape),
        "answer_labels": torch.tensor([i % len(answers) for i in range(rows)]),
        "example_ids": torch.arange(rows),
    }


PROMPTS = [[5, 6, 7, 8], [9, 10], [11, 12, 13], [20]]


@pytest.mark.parametrize("answers", [[[30, 2], [31, 32, 2]], [[30], [31]]])
@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_answers_are_scored_by_their_mean_log_likelihood(family, answers):
    if family == "t5":
        base = transformers.T5ForConditionalGeneration(tiny.t5())
    elif family == "gpt2":  # absolute positions: padding must not shift them
        base = transformers.GPT2LMHeadModel(tiny.gpt2())
    else:
        base = transformers.LlamaForCausalLM(tiny.llama())
    base.eval()
    batch = _answers(PROMPTS, answers)
    if family == "t5":
        batch["prompt_input_ids"], _order = batch["prompt_input_ids"].flip(1), None
        batch["prompt_attention_mask"] = batch["prompt_attention_mask"].flip(1)
    scores = answer_scores(base, batch)
    for row, prompt in enumerate(PROMPTS):
        for column, answer in enumerate(answers):
            if family == "t5":
                logits = base(input_ids=torch.tensor([prompt[::-1]]), labels=torch.tensor([answer])).logits[0]
            else:
                logits = base(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
            expected = torch.log_softmax(logits, -1)[range(len(answer)), answer].mean()
            assert scores[row, column].item() == pytest.approx(expected.item(), abs=1e-5)


def test_a_model_without_a_cache_scores_the_same():
    base = transformers.LlamaForCausalLM(tiny.llama()).eval()
    batch = _answers(PROMPTS, [[30, 2], [31, 32, 2]])
    expected = answer_scores(base, batch)

    class NoCache(nn.Module):
        config = None

        def __init__(self):
            super().__init__()
            self.inner = base

        def get_output_embeddings(self):
            return base.lm_head

        def forward(self, input_ids, attention_mask, position_ids, use_cache=False):
            out = base(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False)
            return transformers.modeling_outputs.CausalLMOutput(logits=out.logits)

    assert (answer_scores(NoCache(), batch) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("mode", ["score", "generate"])
def test_accuracy_and_f1_of_the_chosen_answer(mode, monkeypatch):
    base, _texts = _case("causal_lm")
    module = PEFTLightningModule("lora", base, tokenizer=tokenizer(), answers=mode)
    answers = [[30, 2], [31, 2]]
    batch = {**ragged([4, 4, 4, 4], generator=torch.Generator().manual_seed(0)), **_answers(PROMPTS, answers)}
    batch["answer_labels"] = torch.tensor([0, 1, 1, -100])  # the last row only fills up the batch
    chosen = [0, 1, 0, 1]
    if mode == "score":
        monkeypatch.setattr(
            "lightning_peft.training.evaluating.answer_scores", lambda m, b: F.one_hot(torch.tensor(chosen), 2).float()
        )
    else:
        out = torch.tensor([[30, 2], [31, 2], [40, 2], [31, 2]])  # the third is none of the answers
        monkeypatch.setattr(base, "generate", lambda input_ids, **k: torch.cat([input_ids, out], 1))
    (scores,) = trainer().validate(module, loader([batch]), verbose=False)
    assert scores["val_accuracy"] == pytest.approx(2 / 3)
    assert scores["val_f1"] == pytest.approx(2 / 3)  # 1 hit of 2, nothing else called the second answer


# ---- prediction


def test_generation_needs_no_left_padding_from_the_data_and_strips_the_prompt():
    base = transformers.GPT2LMHeadModel(tiny.gpt2())
    module = PEFTLightningModule("lora", base, tokenizer=tokenizer(), generation={"max_new_tokens": 5})
    rows = [[5, 6, 7, 8], [9, 10]]
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0]])  # padded on the right
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    ((texts),) = trainer().predict(module, loader([{"input_ids": ids, "attention_mask": mask}]))
    base.eval()
    alone = [
        base.generate(
            torch.tensor([row]), attention_mask=torch.ones(1, len(row)), max_new_tokens=5, do_sample=False, pad_token_id=0
        )
        for row in rows
    ]
    assert texts == [
        tokenizer().decode(out[0, len(row) :], skip_special_tokens=True) for row, out in zip(rows, alone, strict=True)
    ]


def test_padding_moves_to_the_left_and_keeps_the_order():
    ids, mask = left_padded(torch.tensor([[4, 5, 0], [0, 6, 7]]), torch.tensor([[1, 1, 0], [0, 1, 1]]))
    assert ids.tolist() == [[0, 4, 5], [0, 6, 7]]
    assert mask.tolist() == [[0, 1, 1], [0, 1, 1]]


@pytest.mark.parametrize("task", ["sequence_classification", "token_classification", "masked_lm"])
def test_predictions_are_readable(task):
    base, batches = _case(task)
    module = PEFTLightningModule("lora", base, task, tokenizer=tokenizer())
    batch = {k: v for k, v in batches[0].items() if k != "labels"}
    batch["input_ids"][0, 1] = 3  # [MASK]
    ((rows),) = trainer().predict(module, loader([batch]))
    assert len(rows) == 2
    if task == "sequence_classification":
        assert {r["label"] for r in rows} <= set(LABELS)
        assert all(1 / 3 <= r["score"] <= 1 for r in rows)
    elif task == "token_classification":
        assert [len(r) for r in rows] == [7, 4]  # the row's real tokens
    else:
        assert [len(r) for r in rows] == [1, 0]
        assert rows[0][0] in tokenizer().get_vocab()


def test_bad_batches_and_models_are_typed_errors():
    base, batches = _case("causal_lm")
    module = PEFTLightningModule("lora", base)
    with pytest.raises(DataError, match="no 'labels'"):
        trainer().validate(module, loader([{"input_ids": batches[0]["input_ids"]}]), verbose=False)
    with pytest.raises(ConfigError, match="Did you mean 'causal_lm'"):
        PEFTLightningModule("lora", base, "causal_ml")
    with pytest.raises(ConfigError, match="needs labels"):
        PEFTLightningModule(LoRA(targets=["0"]), nn.Sequential(nn.Linear(2, 2)), "image_classification")
