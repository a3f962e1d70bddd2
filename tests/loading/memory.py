"""Peak memory of quantizing a sharded folder, in a process of its own: ``python tests/loading/memory.py FOLDER SCHEME [DTYPE]``.

Prints JSON: bytes, anonymous memory (RssAnon: what cannot be dropped, unlike pages of mapped files) above its value after the imports.
"""

from __future__ import annotations

import json
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

# About 1.1e9 parameters: TinyLlama's shape.
BIG = dict(
    vocab_size=32000,
    hidden_size=2048,
    intermediate_size=5632,
    num_hidden_layers=22,
    num_attention_heads=32,
    num_key_value_heads=4,
)


def rss_anon() -> int:
    """Return the anonymous resident memory of this process in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


class Peak(threading.Thread):
    """The largest RssAnon while it runs, sampled every 2 ms."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.value, self.running = rss_anon(), True
        self.start()

    def run(self) -> None:
        while self.running:
            self.value = max(self.value, rss_anon())
            time.sleep(0.002)

    def stop(self) -> int:
        self.running = False
        self.join()
        return max(self.value, rss_anon())


def make_folder(folder: Path, dtype: torch.dtype = torch.bfloat16, **sizes: int) -> None:
    """Write a llama of random weights as shards, one block each, without ever holding the model."""
    import transformers

    config = transformers.LlamaConfig(**{**BIG, **sizes}, tie_word_embeddings=False, dtype=str(dtype).removeprefix("torch."))
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in transformers.LlamaForCausalLM(config).named_parameters()}
    groups: dict[str, list[str]] = {}
    for name in shapes:
        parts = name.split(".")
        groups.setdefault(f"block-{parts[2]}" if parts[1] == "layers" else "rest", []).append(name)
    index: dict[str, str] = {}
    generator = torch.Generator().manual_seed(0)
    for number, names in enumerate(groups.values(), start=1):
        file = f"model-{number:05}-of-{len(groups):05}.safetensors"
        tensors = {name: (torch.randn(shapes[name], generator=generator) * 0.02).to(dtype) for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(names, file)
    text = json.dumps({"metadata": {"total_size": 0}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text)


def measure(folder: str, scheme: str, dtype: str = "auto") -> dict[str, float]:
    """Load the folder quantized and return bytes."""
    import lightning_peft as lp
    from lightning_peft.loading.base import BaseSource, load_model

    with tempfile.TemporaryDirectory() as small:  # what the libraries import and set up once, at their first load
        make_folder(Path(small), hidden_size=64, intermediate_size=64, num_hidden_layers=2, vocab_size=16, num_attention_heads=4)
        load_model(BaseSource(name=small, dtype=dtype, quantization=scheme), "causal_lm")
    started = rss_anon()
    peak = Peak()
    began = time.perf_counter()
    model = load_model(BaseSource(name=folder, dtype=dtype, quantization=scheme), "causal_lm").model
    seconds = time.perf_counter() - began
    top = peak.stop() - started
    report = lp.quantization_report(model)
    assert report is not None
    config = model.config
    largest = config.vocab_size * config.hidden_size * next(model.lm_head.parameters()).element_size()
    return {
        "before": report.before,
        "quantized": report.quantized,
        "dense": report.dense,
        "largest": largest,
        "peak": top,
        "after": rss_anon() - started,
        "ratio": (top - largest) / report.after,
        "seconds": seconds,
    }


if __name__ == "__main__":
    print(json.dumps(measure(*sys.argv[1:])))
