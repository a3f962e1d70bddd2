"""Visual prompt tuning, arXiv 2203.12119: virtual patches at the first block, or at every block."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import lightning_peft as lp
from lightning_peft.errors import ConfigError, MergeError, PortError, TargetError
from lightning_peft.surgery.ports import PatchesPort
from tests.backbones import BACKBONES, DIM, HEADS, bert, clip, llama, run, t5, torch_encoder, vit

N = 3
D = torch.float64
DEPTHS = pytest.mark.parametrize("deep", [True, False], ids=["deep", "shallow"])
X = BACKBONES["vit"].batch(D)


def adapted(deep: bool, **options: Any) -> tuple[nn.Module, lp.Handle, list[Tensor]]:
    model = BACKBONES["vit"].fresh(D)
    handle = lp.inject(model, lp.VisualPromptTuning(num_virtual_tokens=N, deep=deep, **options))
    return model, handle, list(handle.trainable_parameters())


@DEPTHS
def test_count(deep: bool) -> None:
    _, handle, prompts = adapted(deep)
    assert handle.num_trainable() == N * DIM * (2 if deep else 1)
    assert len(prompts) == (2 if deep else 1)
    with pytest.raises(MergeError, match="not a change of a weight"):
        handle.merge()


@DEPTHS
def test_equals_the_paper_with_the_prompt_behind_cls(deep: bool) -> None:
    """The paper's order [x, P, E]: where the prompt stands among the patches makes no difference."""
    model, _, prompts = adapted(deep)
    plain = BACKBONES["vit"].fresh(D)
    h = plain.vit.embeddings(X["pixel_values"])
    cls, patches = h[:, :1], h[:, 1:]
    middle = prompts[0].expand(2, -1, -1)
    for i, block in enumerate(plain.vit.layers):
        if deep:
            middle = prompts[i].expand(2, -1, -1)
        h = block(torch.cat([cls, middle, patches], 1))
        cls, middle, patches = h[:, :1], h[:, 1 : 1 + N], h[:, 1 + N :]
    out = model(**X, output_hidden_states=True)
    torch.testing.assert_close(out.logits, plain.classifier(plain.vit.layernorm(cls)[:, 0]))
    last = model.vit(**X).last_hidden_state
    torch.testing.assert_close(last, plain.vit.layernorm(torch.cat([cls, patches], 1)))
    assert [h.shape[1] for h in out.hidden_states][-1] == 5


def prompted(plain: nn.Module, prompts: list[tuple[bool, list[Tensor]]]) -> Tensor:
    """The reference: the last hidden state with several methods' prompts, (deep, P of each block or of the first one)."""
    h = plain.vit.embeddings(X["pixel_values"])
    flowing = [own[0].expand(2, -1, -1) for deep, own in prompts if not deep]
    for i, block in enumerate(plain.vit.layers):
        fixed = [own[i].expand(2, -1, -1) for deep, own in prompts if deep]
        h, *flowing = block(torch.cat([h, *flowing, *fixed], 1)).split([5, *(len(p[0]) for p in [*flowing, *fixed])], 1)
        flowing = flowing[: len(flowing) - len(fixed)]
    return plain.vit.layernorm(h)


@pytest.mark.parametrize("composed", [False, True], ids=["two", "composed"])
@pytest.mark.parametrize("second", [True, False], ids=["then-deep", "then-shallow"])
@pytest.mark.parametrize("first", [True, False], ids=["deep", "shallow"])
def test_two_on_one_model_each_keep_to_their_own_positions(first: bool, second: bool, composed: bool) -> None:
    torch.manual_seed(0)
    model = vit(num_hidden_layers=3, initializer_range=0.3).to(D).eval()
    plain = copy.deepcopy(model)
    depths, parts = (first, second), [lp.VisualPromptTuning(num_virtual_tokens=n, deep=d) for n, d in ((3, first), (2, second))]
    if composed:
        handles = [lp.inject(model, lp.Compose(parts=tuple(parts)))]
    else:
        handles = [lp.inject(model, part, name) for part, name in zip(parts, "ab", strict=True)]
    given = iter([p for handle in handles for p in handle.trainable_parameters()])
    prompts = [(deep, [next(given) for _ in range(3 if deep else 1)]) for deep in depths]
    found = model.vit(**X).last_hidden_state
    torch.testing.assert_close(found, prompted(plain, prompts))
    assert (found - prompted(plain, prompts[:1])).abs().max() > 1e-3
    if not composed:
        handles[0].remove()
        torch.testing.assert_close(model.vit(**X).last_hidden_state, prompted(plain, prompts[1:]))


@pytest.mark.parametrize("order", [("prefix", "prompt"), ("prompt", "prefix")], ids="-then-".join)
@DEPTHS
def test_beside_a_prefix(deep: bool, order: tuple[str, str]) -> None:
    model, plain = BACKBONES["vit"].fresh(D), BACKBONES["vit"].fresh(D)
    parts = {"prefix": lp.PrefixTuning(num_virtual_tokens=2), "prompt": lp.VisualPromptTuning(num_virtual_tokens=N, deep=deep)}
    handles = {name: lp.inject(model, parts[name], name) for name in order}
    lp.inject(plain, parts["prefix"]).load_state_dict(handles["prefix"].state_dict())
    found = model.vit(**X).last_hidden_state
    torch.testing.assert_close(found, prompted(plain, [(deep, handles["prompt"].trainable_parameters())]))


@DEPTHS
def test_it_learns_what_other_prompts_do(deep: bool) -> None:
    """It is no method of the sweep, which has texts: here it has to find what a model with hidden prompts answers."""
    teacher, _, hidden = adapted(deep)
    student, handle, prompts = adapted(deep)
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(16, *X["pixel_values"].shape[1:], generator=generator, dtype=D)
    with torch.no_grad():
        for p in hidden:
            p.copy_(torch.randn(p.shape, generator=generator, dtype=D))
        wanted = teacher(images).logits
    optimizer, losses = torch.optim.Adam(prompts, lr=0.05), []
    for _ in range(60):
        losses.append(loss := nn.functional.mse_loss(student(images).logits, wanted))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.1 * losses[0]
    with handle.disabled():
        assert nn.functional.mse_loss(student(images).logits, wanted) > 5 * losses[-1]


@DEPTHS
def test_gradients_equal_plain_autograd(deep: bool) -> None:
    model, _, prompts = adapted(deep)
    model(**X).logits.square().sum().backward()
    found = [p.grad.clone() for p in prompts]
    plain = BACKBONES["vit"].fresh(D)
    copies = [p.detach().clone().requires_grad_() for p in prompts]
    h = plain.vit.embeddings(X["pixel_values"])
    for i, block in enumerate(plain.vit.layers):
        if deep or i == 0:
            h = torch.cat([h[:, :5], copies[i].expand(2, -1, -1)], 1)
        h = block(h)
    plain.classifier(plain.vit.layernorm(h)[:, 0]).square().sum().backward()
    for one, other in zip(found, copies, strict=True):
        torch.testing.assert_close(one, other.grad)


@DEPTHS
def test_checkpointing_gives_the_same_gradients(deep: bool) -> None:
    model, _, prompts = adapted(deep, dropout=0.3)
    model.train()

    def gradients() -> list[Tensor]:
        model.zero_grad()
        torch.manual_seed(3)
        model(**X).logits.square().sum().backward()
        return [p.grad.clone() for p in prompts]

    plain = gradients()
    model.activation_checkpointing_enable()
    for a, b in zip(plain, gradients(), strict=True):
        torch.testing.assert_close(a, b)


def test_initialisation_is_the_patch_embeddings() -> None:
    torch.manual_seed(0)
    handle = lp.inject(BACKBONES["vit"].fresh(), lp.VisualPromptTuning(num_virtual_tokens=100))
    bound = math.sqrt(6 / (3 * 4 * 4 + DIM))
    values = torch.cat([p.flatten() for p in handle.trainable_parameters()])
    assert 0.97 * bound < values.abs().max() <= bound


def test_dropout_acts_in_training_only() -> None:
    model, _, _ = adapted(True, dropout=0.5)
    assert torch.equal(model(**X).logits, model(**X).logits)
    model.train()
    assert not torch.equal(model(**X).logits, model(**X).logits)


@DEPTHS
def test_a_model_with_one_block_and_one_of_torchs_own(deep: bool) -> None:
    one = vit(num_hidden_layers=1)
    handle = lp.inject(one, lp.VisualPromptTuning(num_virtual_tokens=N, deep=deep))
    assert one(pixel_values=torch.randn(2, 3, 8, 8)).logits.shape == (2, 3)
    assert len(handle.entries) == 1

    model = torch_encoder().eval()
    plain = copy.deepcopy(model)
    handle = lp.inject(model, lp.VisualPromptTuning(num_virtual_tokens=N, deep=deep))
    x, h = torch.randn(2, 4, DIM), None
    h = x
    for i, block in enumerate(plain.layers):
        prompt = [p.expand(2, -1, -1) for p in handle.trainable_parameters()]
        h = torch.cat([h[:, :4], prompt[i]], 1) if deep or i == 0 else h
        h = block(h)
    torch.testing.assert_close(model(x), h[:, :4], rtol=1e-5, atol=1e-5)


def test_only_the_vision_tower_of_clip_has_them() -> None:
    model = clip().eval()
    handle = lp.inject(model, lp.VisualPromptTuning(num_virtual_tokens=N))
    assert [e.path for e in handle.entries] == ["vision_model.encoder.layers.0"]
    (port,) = lp.anatomy_of(model).port(PatchesPort)
    assert (port.hidden, port.patch) == (DIM, 3 * 4 * 4)
    batch = BACKBONES["clip"].batch()
    with handle.disabled():
        text = model.get_text_features(batch["input_ids"])
    assert torch.equal(*(t if isinstance(t, Tensor) else t[0] for t in (model.get_text_features(batch["input_ids"]), text)))


class OwnLanguageModel(nn.Module):
    """Two tables, so that nothing says which one embeds tokens; but patches need none."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.positions, self.body = nn.Embedding(20, DIM), nn.Embedding(9, DIM), torch_encoder()

    def forward(self, ids: Tensor) -> Tensor:
        return self.body(self.words(ids) + self.positions.weight[: ids.shape[1]])


@pytest.mark.parametrize("make", [llama, bert, t5, OwnLanguageModel])
def test_models_that_read_tokens_are_refused(make: Any) -> None:
    with pytest.raises(PortError, match="has no port 'patches'"):
        lp.inject(make(), "visual_prompt_tuning")


def test_what_has_no_place_for_the_prompt_is_refused() -> None:
    model = torch_encoder().eval()
    lp.inject(model, lp.VisualPromptTuning(num_virtual_tokens=N))
    with pytest.raises(PortError, match="mask.*no place for the prompt"):
        model(torch.randn(2, 4, DIM), mask=torch.zeros(4, 4))
    first = nn.TransformerEncoder(nn.TransformerEncoderLayer(DIM, HEADS, 24), 2, enable_nested_tensor=False)
    with pytest.raises(PortError, match="batch_first=True"):
        lp.inject(first, "visual_prompt_tuning")

    class Blocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.Sequential(*(nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU()) for _ in range(3)))

        def forward(self, x: Tensor) -> Tensor:
            return self.blocks(x)

    with pytest.raises(ConfigError, match="Set hidden"):
        lp.inject(Blocks(), "visual_prompt_tuning")
    images = Blocks()
    lp.inject(images, lp.VisualPromptTuning(hidden=4))
    with pytest.raises(PortError, match="4 dimensions"):
        images(torch.randn(2, 4, 5, 5))


def test_bad_values() -> None:
    for field, value in {"num_virtual_tokens": 0, "dropout": 1.0, "hidden": 0}.items():
        with pytest.raises(ConfigError, match=f"{field}="):
            lp.VisualPromptTuning(**{field: value})
    with pytest.raises(TargetError, match="no meaning"):
        lp.VisualPromptTuning(targets="block")


def test_a_vision_model_of_a_users_own() -> None:
    """Blocks that nothing is known of: what reads (batch, length, width) can have prompts."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.attention = nn.LayerNorm(8), nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            n = self.norm(x)
            return x + self.attention(n, n, n, need_weights=False)[0]

    class Vision(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches = nn.Conv2d(3, 8, 4, 4)
            self.blocks = nn.Sequential(*(Block() for _ in range(3)))
            self.head = nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.blocks(self.patches(x).flatten(2).mT).mean(1))

    model = Vision().eval().requires_grad_(False)
    images = torch.randn(2, 3, 8, 8)
    before = model(images)
    handle = lp.inject(model, lp.VisualPromptTuning(num_virtual_tokens=N))
    assert handle.num_trainable() == 3 * N * 8
    assert not torch.equal(model(images), before)
    with handle.disabled():
        assert torch.equal(model(images), before)
    assert run(model, {"x": images}).shape == (4,)


def test_huggingface_dinov2() -> None:
    config = hf.Dinov2Config(
        hidden_size=DIM, num_hidden_layers=2, num_attention_heads=4, image_size=8, patch_size=4, mlp_ratio=2, num_labels=3
    )
    model = hf.Dinov2ForImageClassification(config).eval()
    handle = lp.inject(model, lp.VisualPromptTuning(num_virtual_tokens=N))
    model(pixel_values=torch.randn(2, 3, 8, 8)).logits.sum().backward()
    assert all(p.grad.abs().max() > 0 for p in handle.trainable_parameters())
