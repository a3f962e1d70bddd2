"""Added special tokens: the embeddings grow, only the new rows train, and only they are saved."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch import nn

from lightning_peft.errors import ConfigError, MergeError, TargetError
from lightning_peft.strategies.install import inject
from lightning_peft.strategies.reparameterized.lora import LoRA
from lightning_peft.strategies.selective.token_rows import TokenRows
from lightning_peft.training.module import PEFTLightningModule
from tests.training import tiny
from tests.training.tiny import VOCABULARY, loader, tokenizer, trainer

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
NEW = ["<|user|>", "<|bot|>"]
IDS = [VOCABULARY, VOCABULARY + 1]


def _module(tmp_path, *, tied=True, strategy="lora", **options):
    torch.manual_seed(0)
    folder = tmp_path / f"base{tied}"
    if not folder.exists():
        transformers.LlamaForCausalLM(tiny.llama(tied=tied)).save_pretrained(folder)
        tokenizer().save_pretrained(folder)
    return PEFTLightningModule(strategy, str(folder), special_tokens=NEW, **options), folder


def _data(module):
    ids = module.tokenizer("<|user|> w1 w2 <|bot|> w3 </s>", return_tensors="pt")["input_ids"]
    assert ids[0].tolist()[0] == IDS[0]
    labels = torch.where(ids == IDS[0], -100, ids)
    return loader([{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}] * 3)


@pytest.mark.parametrize("tied", [True, False])
def test_only_the_new_rows_move(tmp_path, tied):
    module, folder = _module(tmp_path, tied=tied)
    trainer(max_epochs=2).fit(module, _data(module))
    plain = transformers.LlamaForCausalLM.from_pretrained(folder)
    old = plain.model.embed_tokens.weight
    assert torch.equal(module.base.model.embed_tokens.weight[:VOCABULARY], old)
    assert torch.equal(module.base.model.embed_tokens.weight[VOCABULARY:], old.mean(0).expand(2, -1))
    rows = {s.key: s.tensor() for s in module.handle.slots if s.attribute == "rows"}
    assert len(rows) == (1 if tied else 2)  # a tied head has no rows of its own
    for table in rows.values():
        assert table.shape == (2, 16)
        assert all((row != old.mean(0)).any() for row in table)
    # what the model computes: looked up and scored with the trained rows, and nothing else changed
    ids = torch.tensor([[5, IDS[0], IDS[1], 6]])
    module.eval()
    embedded = module.base.model.embed_tokens(ids)[0]
    first = next(iter(rows.values()))
    assert torch.allclose(embedded[1:3], first, atol=1e-7)
    assert torch.equal(embedded[[0, 3]], old[[5, 6]])
    hidden = torch.randn(3, 16)
    head = first if tied else list(rows.values())[1]
    scores = module.base.lm_head(hidden)
    assert torch.allclose(scores[:, IDS], hidden @ head.T, atol=1e-6)
    assert torch.equal(scores[:, :VOCABULARY], nn.functional.linear(hidden, module.base.lm_head.weight)[:, :VOCABULARY])


def test_the_rows_are_saved_and_only_they(tmp_path):
    module, _ = _module(tmp_path)
    run = trainer(max_epochs=2, enable_checkpointing=True)
    run.fit(module, _data(module))
    path = run.checkpoint_callback.best_model_path
    state = torch.load(path, weights_only=True)["state_dict"]
    assert max(t.numel() for t in state.values()) <= 16 * 8  # no table of the vocabulary
    again = PEFTLightningModule.load_from_checkpoint(path)
    assert len(again.tokenizer) == VOCABULARY + 2
    ids = torch.tensor([[5, IDS[0], IDS[1], 6]])
    assert torch.equal(again.eval()(input_ids=ids).logits, module.eval()(input_ids=ids).logits)


def test_the_start_is_the_base_bit_for_bit(tmp_path):
    module, folder = _module(tmp_path)
    module.configure_model()
    ids = torch.tensor([[5, IDS[0], 6]])
    base = transformers.LlamaForCausalLM.from_pretrained(folder)
    base.resize_token_embeddings(VOCABULARY + 2, mean_resizing=False)
    with torch.no_grad():
        base.model.embed_tokens.weight[VOCABULARY:] = base.model.embed_tokens.weight[:VOCABULARY].mean(0)
    assert torch.equal(module.eval()(input_ids=ids).logits, base.eval()(input_ids=ids).logits)


def test_a_tokenizer_without_the_tokens_stays_usable_and_full_trains_all_rows(tmp_path):
    module, _ = _module(tmp_path, strategy="full", lr=1e-4)
    trainer().fit(module, _data(module))
    assert module.peft.strategy.info.name == "full"
    assert module.base.model.embed_tokens.weight.shape[0] == VOCABULARY + 2


# ---- the strategy by itself


def _llama(tied=True):
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(tiny.llama(tied=tied)).double().eval()


@pytest.mark.parametrize("tied", [True, False])
def test_gradients_are_those_of_a_dense_table(tied):
    base = _llama(tied)
    dense = copy.deepcopy(base)
    handle = inject(base, TokenRows(ids=[9, 4]))
    ids = torch.tensor([[4, 9, 3, 4, 7, 9]])
    base(input_ids=ids, labels=ids).logits.square().mean().backward()
    dense(input_ids=ids, labels=ids).logits.square().mean().backward()
    tables = [s.tensor() for s in handle.slots if s.trainable]
    assert (tables[0].grad - dense.model.embed_tokens.weight.grad[[4, 9]]).abs().max() < 1e-12
    if not tied:
        assert (tables[1].grad - dense.lm_head.weight.grad[[4, 9]]).abs().max() < 1e-12


def test_an_embedding_that_does_more_than_look_up_still_sees_the_rows():
    class Scaled(nn.Embedding):
        def forward(self, input):
            return super().forward(input) * 3.0

    base = _llama(tied=False)
    scaled = Scaled(VOCABULARY, 16).double()
    base.model.embed_tokens = scaled
    handle = inject(base, TokenRows(ids=[4]))
    with torch.no_grad():
        handle.slots[0].tensor().fill_(2.0)
    out = base.model.embed_tokens(torch.tensor([4, 5]))
    assert torch.equal(out[0], torch.full((16,), 6.0, dtype=torch.float64))
    assert torch.equal(out[1], scaled.weight[5] * 3.0)


@pytest.mark.parametrize("tied", [True, False])
def test_merging_writes_the_rows(tied):
    base = _llama(tied)
    handle = inject(base, TokenRows(ids=[4, 9]))
    with torch.no_grad():
        for slot in handle.slots:
            slot.tensor().add_(1.0)
    ids = torch.tensor([[4, 9, 3]])
    before = base(input_ids=ids).logits
    handle.merge(exact=True)
    assert (base(input_ids=ids).logits - before).abs().max() < 1e-10
    handle.unmerge()
    assert (base(input_ids=ids).logits - before).abs().max() < 1e-12
    assert (base.lm_head.weight is base.model.embed_tokens.weight) is tied


def test_one_of_two_tied_layers_is_not_merged():
    base = _llama()
    handle = inject(base, TokenRows(ids=[4, 9], targets=["embed_tokens"]))
    with torch.no_grad():
        handle.slots[0].tensor().add_(1.0)
    with pytest.raises(MergeError, match="tied"):
        handle.merge()


def test_a_tied_model_with_new_tokens_is_merged_at_the_end(tmp_path):
    module, folder = _module(tmp_path, callback={"merge_on_end": True, "export": False})
    trainer(max_epochs=2).fit(module, _data(module))
    assert module.handle.merged
    weight = module.base.model.embed_tokens.weight
    assert weight is module.base.lm_head.weight
    old = transformers.LlamaForCausalLM.from_pretrained(folder).model.embed_tokens.weight
    assert torch.equal(weight[:VOCABULARY], old)
    assert (weight[VOCABULARY:] != old.mean(0)).any(1).all()


def test_bad_ids_are_refused():
    with pytest.raises(ConfigError, match="at least one token"):
        TokenRows()
    with pytest.raises(ConfigError, match="not negative"):
        TokenRows(ids=[-1])
    with pytest.raises(ConfigError, match="may stand there once"):
        TokenRows(ids=[3, 3])
    with pytest.raises(ConfigError, match="resize_token_embeddings\\(49\\)"):
        inject(_llama(), TokenRows(ids=[48]))
    with pytest.raises(TargetError):
        inject(transformers.ViTForImageClassification(tiny.vit()), TokenRows(ids=[1]))


def test_special_tokens_need_a_tokenizer_and_a_model_that_grows():
    with pytest.raises(ConfigError, match="need a tokenizer"):
        PEFTLightningModule("lora", _llama(), special_tokens=NEW)
    with pytest.raises(ConfigError, match="no resize_token_embeddings"):
        PEFTLightningModule(
            LoRA(rank=1, targets=["0"]), nn.Sequential(nn.Linear(2, 2)), special_tokens=NEW, tokenizer=tokenizer()
        )
