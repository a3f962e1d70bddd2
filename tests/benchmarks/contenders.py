"""The contenders of ``step_cost.py``: what each of them builds, and the process in which it steps when told to.

    limit   the frozen base alone, backward down to the embeddings, loss of the model: nothing that trains below a frozen
            base can be cheaper
    ours    lightning_peft
    hf      Hugging Face peft
    full    every parameter trains

A process of its own, started by ``step_cost.py`` as ``contenders.py DESCRIPTOR CONTENDER``: it answers one command after the
other over a pipe and computes nothing in between.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # `lightning_peft` and `tests`, wherever the script is started

if TYPE_CHECKING:  # torch and the peers are imported by `imports`, whose memory is not counted
    import torch
    from torch import nn

Side = Literal["limit", "ours", "hf", "full"]
Step = Callable[[], float]
RANK, ALPHA, LR = 8, 16, 1e-4


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One thing to measure.

    Args:
        side: Who computes.
        base: Folder of a causal language model; empty: a 7-B llama on the meta device, into which LoRA is injected.
        dtype: dtype of the base.
        dora: DoRA instead of LoRA.
        dropout: Dropout of the low-rank branch.
        quantized: NF4 with double quantization, products in ``dtype``.
        chunked: Our chunked loss instead of the model's own.
        batch: Sequences of a step.
        length: Tokens of a sequence, all of them labelled.
        threads: Threads of torch.
    """

    side: Side
    base: str = ""
    dtype: str = "float32"
    dora: bool = False
    dropout: float = 0.0
    quantized: bool = False
    chunked: bool = False
    batch: int = 4
    length: int = 256
    threads: int = 2

    def dumps(self) -> str:
        return json.dumps(asdict(self))


def imports(contender: Contender) -> None:
    """Import what the contender will use, so that none of it is imported while memory is counted."""
    import torch
    import torch._dynamo  # the first step of an optimizer imports it
    import transformers

    import lightning_peft  # noqa: F401

    torch.set_num_threads(contender.threads)
    if contender.base:
        _architecture(contender.base)
    else:
        _ = transformers.LlamaForCausalLM
    if contender.side == "hf":
        import peft.tuners.lora  # noqa: F401
    if contender.quantized:
        import bitsandbytes  # noqa: F401


def prepare(contender: Contender) -> Callable[[], Step]:
    """Build the contender and return a function that makes the next step ready and returns it.

    A step returns its loss, an injection the number of adapted layers.
    """
    return _injection(contender) if not contender.base else _training(contender)


def _training(contender: Contender) -> Callable[[], Step]:
    import torch

    model = _load(contender)
    loss_of = _chunked_loss(model) if contender.chunked else lambda ids: model(input_ids=ids, labels=ids).loss
    if contender.side == "limit":
        model.requires_grad_(False)
        model.enable_input_require_grads()
    elif contender.side != "full":
        model, _ = _adapt(model, contender)
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LR) if trained else None
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (contender.batch, contender.length), generator=generator)

    def step() -> float:
        loss = loss_of(ids)
        loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
        return float(loss.detach())

    return lambda: step


def _injection(contender: Contender) -> Callable[[], Step]:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    def ready() -> Step:
        with torch.device("meta"):
            model = LlamaForCausalLM(LlamaConfig())  # its defaults are the 7-B model: 32 blocks of 4096, 224 linear layers

        def inject() -> float:
            return _adapt(model, contender)[1]

        return inject

    return ready


def _load(contender: Contender) -> Any:
    import torch

    dtype = getattr(torch, contender.dtype)
    options: dict[str, Any] = {}
    if contender.quantized and contender.side == "hf":
        from transformers import BitsAndBytesConfig

        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
    # Without disable_mmap a weight in the dtype of its file stays a page of that file, which is not anonymous memory.
    model = _architecture(contender.base).from_pretrained(contender.base, dtype=dtype, disable_mmap=True, **options)
    model.config.use_cache = False
    if contender.quantized and contender.side == "ours":
        import lightning_peft as lp

        model = lp.quantize(model, {"scheme": "nf4", "double_quant": True, "compute_dtype": contender.dtype})
    return model


def _architecture(folder: str) -> Any:
    import transformers

    (name,) = transformers.AutoConfig.from_pretrained(folder).architectures
    return getattr(transformers, name)


def _adapt(model: nn.Module, contender: Contender) -> tuple[Any, int]:
    """Return the model with LoRA or DoRA on all linear layers, and the number of these."""
    if contender.side == "ours":
        import lightning_peft as lp

        method = lp.DoRA if contender.dora else lp.LoRA
        handle = lp.inject(model, method(rank=RANK, alpha=ALPHA, dropout=contender.dropout, targets="all-linear"))
        return model, len(handle.entries)
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        lora_dropout=contender.dropout,
        use_dora=contender.dora,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(model, config)  # type: ignore[arg-type]
    return adapted, len(adapted.base_model.targeted_module_names)  # type: ignore[arg-type]


def _chunked_loss(model: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return our loss of next tokens: the head runs on a chunk of positions at a time."""
    from lightning_peft.nn.chunked_loss import chunk_rows, chunked_cross_entropy

    head, chunk = model.get_output_embeddings(), chunk_rows(model.config.vocab_size)

    def loss_of(ids: torch.Tensor) -> torch.Tensor:
        hidden = model.get_decoder()(input_ids=ids).last_hidden_state[:, :-1]
        return chunked_cross_entropy(hidden.flatten(0, 1), ids[:, 1:].flatten(), head, chunk=chunk, reduction="mean")

    return loss_of


def serve(pipe: Connection, contender: Contender) -> None:
    """Answer commands until the other end hangs up: ``build``, then ``step`` any number of times."""
    imports(contender)
    pipe.send({})
    ready: Callable[[], Step] | None = None
    for _ in itertools.count():
        try:
            command = pipe.recv()
        except EOFError:
            return
        if command == "build":
            ready = prepare(contender)
            pipe.send({})
            continue
        assert command == "step"
        assert ready is not None
        step = ready()
        wall, cpu = time.perf_counter(), time.process_time()
        value = step()
        pipe.send({"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu, "value": value})


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])), Contender(**json.loads(sys.argv[2])))
