"""What the backward pass keeps of each block: plain autograd, MEFT's three variants, LST, LoRA, and LoRA with gradient checkpointing.

    python tests/benchmarks/reversible_memory.py [--batch 4] [--length 256] [--accuracy] [--models SMOLLM2 MINILM]

Bytes of the storages that autograd saves in one forward pass (torch.autograd.graph.saved_tensors_hooks), weights left out, for models of
6, 12 and 24 blocks with the widths of SmolLM2-135M and MiniLM; and what one more block adds. ``--accuracy`` adds how far the
gradients are from those of plain autograd, in fp32, at 12 blocks with random weights and the default anchors. ``--models`` loads two
pretrained models and says how far MEFT's function is from theirs at the start.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # `tests`, wherever the script is started

import torch  # noqa: E402
import transformers as hf  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import lightning_peft as lp  # noqa: E402
from lightning_peft.strategies.architectural.meft import ANCHORS  # noqa: E402
from lightning_peft.surgery.recompute import GradientCheckpointing, checkpoint_blocks  # noqa: E402

LAYERS = (6, 12, 24)
Make = Callable[[int], nn.Module]


def saved_bytes(model: nn.Module, batch: dict[str, Any]) -> int:
    """Return the bytes of the storages that one forward pass saves for the backward pass, parameters and buffers left out."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    held: dict[int, Tensor] = {}  # so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            held[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**batch)
    return sum(t.untyped_storage().nbytes() for t in held.values())


def decoder(layers: int) -> nn.Module:
    """A stack of SmolLM2-135M's blocks, without the output head, whose logits are the same for all methods."""
    config = hf.LlamaConfig(
        vocab_size=512,
        hidden_size=576,
        intermediate_size=1536,
        num_attention_heads=9,
        num_key_value_heads=3,
        num_hidden_layers=layers,
    )
    return hf.LlamaModel(config)


def encoder(layers: int) -> nn.Module:
    """A stack of MiniLM's blocks."""
    sizes: dict[str, Any] = {"hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 12, "vocab_size": 512}
    return hf.BertModel(hf.BertConfig(**sizes, num_hidden_layers=layers), add_pooling_layer=False)


MODELS: dict[str, Make] = {"SmolLM2-135M": decoder, "MiniLM": encoder}


def contenders() -> dict[str, tuple[lp.PEFTStrategy | str, bool]]:
    """Return strategy and gradient checkpointing by name."""
    found: dict[str, tuple[lp.PEFTStrategy | str, bool]] = {"MEFT's function, plain autograd": (lp.MEFT(anchor_every=0), False)}
    for variant in (1, 2, 3):
        found[f"MEFT{variant}, anchors every {ANCHORS[variant]} blocks"] = (lp.MEFT(variant=variant), False)  # type: ignore[arg-type]
    lora = lp.LoRA(rank=8, targets="all-linear")
    return found | {
        "LST": (lp.LadderSideTuning(), False),
        "LoRA, all linear layers": (lora, False),
        "LoRA, gradient checkpointing": (lora, True),
    }


def measure(make: Make, strategy: lp.PEFTStrategy | str, checkpointing: bool, layers: int, batch: dict[str, Tensor]) -> int:
    """Return the bytes that a model of so many blocks keeps."""
    torch.manual_seed(0)
    model = make(layers).train()
    lp.inject(model, strategy)
    if checkpointing:
        checkpoint_blocks(model, lp.anatomy_of(model), GradientCheckpointing())
    return saved_bytes(model, {**batch, **({"use_cache": False} if make is decoder else {})})


def table(batch: int, length: int, layers: tuple[int, ...] = LAYERS) -> str:
    """Return the table of all models and methods."""
    ids = {"input_ids": torch.randint(3, 99, (batch, length), generator=torch.Generator().manual_seed(1))}
    lines = [f"fp32, {batch} x {length} tokens, MiB kept for the backward pass"]
    lines.append(f"{'':<34}" + "".join(f"{n:>4} blocks" for n in layers) + f"{'per block':>11}{'of plain':>10}")
    for name, make in MODELS.items():
        lines.append(f"{name} blocks")
        plain = 0.0
        for method, (strategy, checkpointing) in contenders().items():
            found = [measure(make, strategy, checkpointing, n, ids) for n in layers]
            more = (found[-1] - found[0]) / (layers[-1] - layers[0])
            plain = plain or more
            cells = "".join(f"{nbytes / 2**20:>11.1f}" for nbytes in found)
            lines.append(f"  {method:<32}{cells}{more / 2**20:>11.2f}{more / plain:>10.1%}")
    return "\n".join(lines)


def gradients(model: nn.Module, strategy: lp.MEFT, batch: dict[str, Tensor]) -> list[Tensor]:
    """Return the gradients of a fixed function of the output, all adapters at their start."""
    torch.manual_seed(3)
    handle = lp.inject(model, strategy)
    torch.manual_seed(9)
    out = next(iter(model(**batch).values()))
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    found = list(torch.autograd.grad((out * weights).sum(), handle.trainable_parameters()))
    handle.remove()
    return found


def error(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """Return the norm of the difference of all gradients over that of the reference."""
    return float(
        torch.cat([(a - b).flatten() for a, b in zip(ours, theirs, strict=True)]).norm()
        / torch.cat([b.flatten() for b in theirs]).norm()
    )


def accuracy(
    make: Make, layers: int, spacings: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 8, 12, 24), batch: int = 2, length: int = 32
) -> str:
    """Return the gradients' error by variant and anchor spacing, against plain autograd through the same function."""
    ids = {"input_ids": torch.randint(3, 512, (batch, length), generator=torch.Generator().manual_seed(1))}
    lines = [f"{'anchors every':<16}" + "".join(f"{n:>9}" for n in spacings)]
    for variant in (1, 2, 3):
        torch.manual_seed(0)
        model = make(layers).train()
        reference = gradients(model, lp.MEFT(variant=variant, anchor_every=0), ids)  # type: ignore[arg-type]
        cells = [error(gradients(model, lp.MEFT(variant=variant, anchor_every=n), ids), reference) for n in spacings]  # type: ignore[arg-type]
        lines.append(f"  MEFT{variant:<10}" + "".join(f"{e:>9.0e}" for e in cells))
    return "\n".join(lines)


def main() -> None:
    """Print what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--accuracy", action="store_true")
    parser.add_argument("--models", nargs="*", default=[])
    options = parser.parse_args()
    print(table(options.batch, options.length))
    if options.accuracy:
        for name, make in MODELS.items():
            print(f"{name} blocks, 12 of them, fp32: relative error of all gradients\n{accuracy(make, 12)}")
    for path in options.models:
        print(start(path))


TEXTS = (
    "The capital of France is Paris, and the capital of Italy is",
    "I loved this film; the actors were wonderful and the plot was",
)


def start(path: str) -> str:
    """Return how far MEFT's function is from a pretrained model's at the start, and its gradients from plain autograd's."""
    tokenizer = hf.AutoTokenizer.from_pretrained(path)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    config = hf.AutoConfig.from_pretrained(path)
    causal = any("CausalLM" in name for name in config.architectures or ())
    model = (hf.AutoModelForCausalLM if causal else hf.AutoModel).from_pretrained(path, dtype=torch.float32).eval()
    batch = {
        k: v for k, v in tokenizer(list(TEXTS), padding=True, return_tensors="pt").items() if k in ("input_ids", "attention_mask")
    }
    real = batch["attention_mask"].bool()

    def states(output: Any) -> Tensor:
        found: Tensor = (output.logits if causal else output.last_hidden_state)[real]
        return found

    def loss(found: Tensor) -> float:
        return float(nn.functional.cross_entropy(found[:-1], batch["input_ids"][real][1:]))

    with torch.no_grad():
        base = states(model(**batch))
    lines = [f"{path}: base" + (f", loss {loss(base):.2f}" if causal else "")]
    strategies = {f"MEFT{variant}": lp.MEFT(variant=variant) for variant in (1, 2, 3)}  # type: ignore[arg-type]
    strategies["MEFT2, beta=0.01, result='block'"] = lp.MEFT(variant=2, beta=0.01, result="block")
    for name, strategy in strategies.items():
        handle = lp.inject(model, strategy)
        with torch.no_grad():
            found = states(model(**batch))
        handle.remove()
        cosine = float(nn.functional.cosine_similarity(found, base, dim=-1).mean())
        text = f"  {name}: relative distance {float((found - base).norm() / base.norm()):.2f}, mean cosine {cosine:.3f}"
        if causal:
            same = float((found.argmax(-1) == base.argmax(-1)).float().mean())
            text += f", loss {loss(found):.2f}, same next token {same:.0%}"
        reference = gradients(model, replace(strategy, anchor_every=0), batch)
        ours = gradients(model, strategy, batch)
        whole = gradients(model, replace(strategy, anchor_every=1000), batch)
        lines.append(
            text + f"; gradient error {error(ours, reference):.0e}, with every block inverted {error(whole, reference):.0e}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
