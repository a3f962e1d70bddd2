"""The estimated peak of training beside the measured one: SmolLM2-135M, several methods, batches, with and without checkpointing.

    python tests/benchmarks/estimate_vs_measured.py                    # all, about 10 minutes on two cores
    python tests/benchmarks/estimate_vs_measured.py --json out.json lora/4x256 qlora/4x256/recompute

Each combination trains in a process of its own, by ``PEFTLightningModule`` and ``Trainer.fit`` as a user would, on random tokens of
which every one has a label. Measured is the highest resident set of the process during ``fit`` (``VmHWM`` of ``/proc/self/status``)
above its resident set after imports: Linux keeps the highest value by itself, so no short peak is missed, as it would be by reading
RssAnon now and then. Before that value is taken a tiny model has trained once with the same method, since torch and Lightning import
and allocate a lot at their first step, which is no memory of the model. The estimate is ``lp.estimate`` of the model's configuration,
in the parent, which never loads a weight.

Measured twice. ``live``: glibc gives every freed block above 64 KiB back at once (``mmap_threshold``), so the resident set is what is
alive, which is what is estimated. ``default``: glibc keeps freed blocks up to 32 MiB in a heap and may not find a place in it for the
next one, so a process takes more than is alive, by how much depends on the order of things. ``--live`` leaves the second out.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # `examples.assets`, wherever the script is started

STRATEGIES: dict[str, Any] = {
    "lora": {"class_path": "LoRA", "init_args": {"rank": 8, "targets": "all-linear"}},
    "qlora": {"class_path": "QLoRA", "init_args": {"rank": 8, "dropout": 0.0}},
    "dora": {"class_path": "DoRA", "init_args": {"rank": 8, "targets": "all-linear"}},
    "prompt": {"class_path": "PromptTuning", "init_args": {"num_virtual_tokens": 20}},
    "bitfit": {"class_path": "BitFit"},
    "norms": {"class_path": "Head", "init_args": {"targets": ["norm"]}},
    "full": {"class_path": "Full"},
}


ALLOCATORS = {"live": "glibc.malloc.mmap_threshold=65536", "default": ""}


@dataclass(frozen=True)
class Combination:
    """One run: ``method/rows×tokens[/recompute][/bf16]``."""

    method: str
    batch: int
    length: int
    recompute: bool = False
    bf16: bool = False

    @classmethod
    def parse(cls, text: str) -> Combination:
        method, shape, *flags = text.split("/")
        batch, length = shape.split("x")
        return cls(method, int(batch), int(length), "recompute" in flags, "bf16" in flags)

    def __str__(self) -> str:
        flags = "/recompute" * self.recompute + "/bf16" * self.bf16
        return f"{self.method}/{self.batch}x{self.length}{flags}"


ALL = [
    "lora/4x256",
    "lora/1x256",
    "lora/4x256/recompute",
    "lora/4x256/bf16",
    "qlora/4x256/bf16",
    "qlora/4x256/recompute/bf16",
    "dora/4x256",
    "prompt/4x256",
    "prompt/4x256/recompute",
    "bitfit/4x256",
    "full/1x256",
    "full/4x256",
    "full/4x256/recompute",
]


def configured(c: Combination, base: str) -> Any:
    """Return the configuration of the model; BitFit's gets biases, since llama-like models have none."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(base, **({"attention_bias": True, "mlp_bias": True} if c.method == "bitfit" else {}))


def expected(c: Combination, config: Any) -> dict[str, Any]:
    """Return the estimate of one combination."""
    import lightning_peft as lp

    report = lp.estimate(
        config,
        STRATEGIES[c.method],
        batch_size=c.batch,
        sequence_length=c.length,
        dtype="bfloat16" if c.bf16 else "float32",
        gradient_checkpointing=c.recompute,
        device="cpu",
        generate=False,
    )
    return report.to_dict()


def train(c: Combination, base: Any, folder: str) -> None:
    """Make two steps with a model."""
    import lightning.pytorch as pl
    import torch
    from transformers import AutoModelForCausalLM

    from lightning_peft import PEFTLightningModule

    class Steps(pl.LightningDataModule):
        def train_dataloader(self) -> Any:
            ids = torch.randint(5, 100, (2 * c.batch, c.length), generator=torch.Generator().manual_seed(0))
            rows = [{"input_ids": row, "labels": row} for row in ids]
            return torch.utils.data.DataLoader(rows, batch_size=c.batch)  # type: ignore[arg-type]

    if c.method == "bitfit":
        base = AutoModelForCausalLM.from_pretrained(
            base, config=configured(c, base), dtype=torch.bfloat16 if c.bf16 else torch.float32
        )
    quantization = "auto" if c.method.startswith("q") else None
    module = PEFTLightningModule(
        STRATEGIES[c.method],
        base=base,
        dtype="bfloat16" if c.bf16 else "float32",
        quantization=quantization,
        gradient_checkpointing=c.recompute,
        lr_scheduler=None,
        callback={"export": False, "verbose": False, "gradient_sentinel": "off"},
    )
    trainer = pl.Trainer(
        max_steps=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[Reset()],
    )
    trainer.fit(module, Steps())


def Reset() -> Any:
    """Return a callback that starts the measurement: weights are there, nothing has trained.

    Weights that are read in their own dtype stay pages of the file, all of which is resident as long as one tensor is. They become
    memory of the process, as those that are cast or quantized are.
    """
    import lightning.pytorch as pl

    class ResetAtStart(pl.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            for tensor in (*pl_module.parameters(), *pl_module.buffers()):
                if tensor.is_floating_point():
                    tensor.data = tensor.data.clone()
            Path("/proc/self/clear_refs").write_text("5")  # forgets the highest resident set so far

    return ResetAtStart()


def measure(c: Combination, base: str) -> dict[str, int]:
    """Return the bytes that one combination took; runs in a process of its own."""
    import ctypes
    import gc
    import logging
    import warnings

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from lightning_peft.training.peak import highest, resident, status

    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.manual_seed(0)
    sizes = dict(vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    with tempfile.TemporaryDirectory() as folder:
        small = dataclasses.replace(c, batch=1, length=16)
        tiny = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2)).to(torch.bfloat16 if c.bf16 else torch.float32)
        tiny.save_pretrained(Path(folder) / "tiny")
        del tiny
        train(small, str(Path(folder) / "tiny"), folder)
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        before, anonymous = resident(), status("RssAnon") or 0
        train(c, base, folder)
    return {"peak": highest() - before, "before": before, "anonymous_before": anonymous}


def main() -> None:
    """Run combinations one after the other and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("combinations", nargs="*", default=ALL)
    parser.add_argument("--json")
    parser.add_argument("--live", action="store_true", help="leave glibc's default out")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    from examples.assets import smollm2

    base = str(smollm2())
    if options.child:
        print(json.dumps(measure(Combination.parse(options.child), base)))
        return
    rows = []
    print(f"{'combination':<28} {'estimate':>10} {'live':>10} {'ratio':>7} {'default':>10} {'ratio':>7}  worst phase", flush=True)
    for text in options.combinations:
        report = expected(Combination.parse(text), configured(Combination.parse(text), base))
        seen = {name: child(text, tunables) for name, tunables in ALLOCATORS.items() if name == "live" or not options.live}
        shown = "".join(f" {mib(s['peak'])} {report['peak'] / s['peak']:>7.3f}" for s in seen.values())
        print(f"{text:<28} {mib(report['peak'])}{shown}{' ' * 19 * options.live}  {report['peak_phase']}", flush=True)
        rows.append({"combination": text, "measured": seen, "estimate": report})
        if options.json:
            Path(options.json).write_text(json.dumps(rows, indent=1))


def child(text: str, tunables: str) -> dict[str, int]:
    """Measure a combination in a process of its own."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    environment |= {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2"), "GLIBC_TUNABLES": tunables}
    result = subprocess.run(
        [sys.executable, __file__, "--child", text], capture_output=True, text=True, check=False, env=environment
    )
    if result.returncode:
        raise SystemExit(f"{text} failed:\n{result.stderr}")
    found: dict[str, int] = json.loads(result.stdout.strip().splitlines()[-1])
    return found


def mib(nbytes: int) -> str:
    """Return bytes as MiB."""
    return f"{nbytes / 2**20:>6.0f} MiB"


if __name__ == "__main__":
    main()
