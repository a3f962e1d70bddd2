"""What a checkpoint costs two processes that train a sharded model: bytes sent, peak memory, bytes on the disk.

    python tests/benchmarks/sharded_save.py

LoRA on a llama of 110 M parameters, under DDP, FSDP1 and FSDP2. ``adapter`` is what PEFTCallback writes: what trains is gathered, the
frozen base stays in its pieces. ``full`` is Lightning's own way, as ``checkpoint="full"`` leaves it: the whole model is gathered.
Sent: what the kernel counted on the loopback device, both processes together. Memory: RssAnon of each process above its value
before, sampled every millisecond.
"""

from __future__ import annotations

import re
import sys
import threading
import time
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # `tests`, wherever the script is started

import lightning.pytorch as pl  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

import lightning_peft as lp  # noqa: E402
from tests.distributed import cases, ranks  # noqa: E402

CONFIG = LlamaConfig(
    vocab_size=16_000,
    hidden_size=768,
    intermediate_size=2048,
    num_hidden_layers=12,
    num_attention_heads=12,
    tie_word_embeddings=True,
)
# Gathering everything under FSDP1 on the CPU ends in a segmentation fault of torch 2.13.
CONTENDERS = [(k, holds) for k in cases.GROUPS for holds in ("adapter", "full") if (k, holds) != ("fsdp1", "full")]
Figures = dict[str, float]


def sent() -> int:
    """Return the bytes that the loopback device has sent since the system started."""
    line = next(line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[8])


def anonymous() -> int:
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


class Peak(threading.Thread):
    """The highest RssAnon above that at the start, while it runs."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.start_bytes = self.highest = anonymous()
        self.ends = threading.Event()

    def run(self) -> None:
        while not self.ends.is_set():
            self.highest = max(self.highest, anonymous())
            time.sleep(0.001)

    def stop(self) -> int:
        self.ends.set()
        self.join()
        return self.highest - self.start_bytes


class Save(pl.Callback):
    """Writes a checkpoint after the second step and notes what it took."""

    figures: Figures

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: pl.Trainer, *args: object) -> None:
        if trainer.global_step != 2:
            return
        trainer.strategy.barrier()
        before, peak = sent(), Peak()
        peak.start()
        trainer.save_checkpoint(self.path)
        held = peak.stop()
        trainer.strategy.barrier()
        size = self.path.stat().st_size
        self.figures = {"sent": sent() - before, "memory": held, "file": size}


def measure(kind: str, holds: str, folder: Path, config: LlamaConfig) -> Figures:
    """Run in one rank."""
    warnings.simplefilter("ignore")
    pl.seed_everything(1, verbose=False)
    save = Save(folder / "saved.ckpt")
    callback = {"verbose": False, "checkpoint": holds, "export": False}
    module = lp.PEFTLightningModule(lp.LoRA(rank=8, targets="all-linear"), LlamaForCausalLM(config), callback=callback, lr=1e-4)
    cases.trainer(kind, folder, save, max_steps=3).fit(module, cases.loader(kind))
    return save.figures


def main() -> None:
    weights = sum(p.numel() * p.element_size() for p in LlamaForCausalLM(CONFIG).parameters())
    print(f"base {weights / 1e6:.0f} MB in fp32; MB:")
    print(f"{'strategy':9s} {'holds':8s} {'sent':>8s} {'memory rank 0':>14s} {'rank 1':>8s} {'file':>8s}")
    for kind, holds in CONTENDERS:
        with TemporaryDirectory() as folder:
            first, second = ranks.run(measure, kind, holds, Path(folder), CONFIG, timeout=600)
        cells = (first["sent"], first["memory"], second["memory"], first["file"])
        a, b, c, d = (value / 1e6 for value in cells)
        print(f"{kind:9s} {holds:8s} {a:8.1f} {b:14.1f} {c:8.1f} {d:8.1f}", flush=True)


if __name__ == "__main__":
    main()
