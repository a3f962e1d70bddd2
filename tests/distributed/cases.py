"""What the ranks of a group run: a small language model under every strategy, and what comes of it."""

from __future__ import annotations

import functools
import os
import signal
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard
from torch.utils.data import DataLoader, DistributedSampler
from transformers import LlamaForCausalLM

import lightning_peft as lp
import lightning_peft.errors
from lightning_peft.training.cli import main
from lightning_peft.training.shards import Shards
from tests.training import tiny

STEPS, BATCH, LENGTH = 20, 4, 9
GROUPS = ("ddp", "fsdp1", "fsdp2")
ALL_LINEAR: dict[str, Any] = {"targets": "all-linear"}
METHODS: dict[str, Any] = {
    "LoRA": lp.LoRA(rank=2, **ALL_LINEAR),
    "QLoRA": lp.LoRA(rank=2, **ALL_LINEAR),
    "DoRA": lp.DoRA(rank=2, **ALL_LINEAR),
    "AdaLoRA": lp.AdaLoRA(initial_rank=4, target_rank=2, warmup=2, final=6, **ALL_LINEAR),
    "VeRA": lp.VeRA(rank=4, **ALL_LINEAR),
    "PrefixTuning": lp.PrefixTuning(num_virtual_tokens=3),
    "PromptTuning": lp.PromptTuning(num_virtual_tokens=3),
    "HoulsbyAdapter": lp.HoulsbyAdapter(width=4),
    "LadderSideTuning": lp.LadderSideTuning(reduction=4, heads=2),
    "BitFit": lp.BitFit(),
    "Full": lp.Full(),
}
RANDOM: dict[str, Any] = {"AdaMix": lp.AdaMix(part=lp.LoRA(rank=2, **ALL_LINEAR), sharing_up=False)}
MERGES = {"LoRA", "QLoRA", "DoRA", "AdaLoRA", "VeRA"}


class OnCPU(FSDPStrategy):
    """FSDP1 where there is no GPU: a subclass passes Lightning's check, and torch asks for a device."""

    def _setup_model(self, model: Any) -> Any:
        return FullyShardedDataParallel(
            module=model,
            cpu_offload=self.cpu_offload,
            mixed_precision=self.mixed_precision_config,
            sharding_strategy=self.sharding_strategy,
            device_id=torch.device("cpu"),
            **self.kwargs,
        )


class Texts(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Rows with very different numbers of labels."""

    def __init__(self, size: int = 2 * BATCH) -> None:
        generator = torch.Generator().manual_seed(7)
        self.ids = torch.randint(4, tiny.VOCABULARY, (size, LENGTH), generator=generator)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        labels = self.ids[i].clone()
        labels[: i % (LENGTH - 1)] = -100
        return {"input_ids": self.ids[i], "labels": labels}


def base(dropout: float = 0.0) -> LlamaForCausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return LlamaForCausalLM(tiny.llama(attention_bias=True, attention_dropout=dropout))


def module(method: str, *, dropout: float = 0.0, **options: Any) -> lp.PEFTLightningModule:
    if method == "QLoRA":  # FSDP1 flattens codes together with the rest, so they lie in floats
        options.setdefault("quantization", {"scheme": "nf4", "storage_dtype": "float32"})
    # A large eps: Adam would make whole steps of gradients that are rounding errors. VeRA's own are small.
    optimizer = functools.partial(torch.optim.AdamW, eps=1e-3 if method == "VeRA" else 1e-2)
    options = {"lr": 0.01, "lr_scheduler": None, "optimizer": optimizer, "callback": {"verbose": False}, **options}
    return lp.PEFTLightningModule({**METHODS, **RANDOM}[method], base(dropout), **options)


def strategy(kind: str, *, pieces: bool = False) -> Any:
    """Return a Lightning strategy; with ``pieces`` FSDP writes its checkpoints as folders of them."""
    if kind == "fsdp1":
        return OnCPU(state_dict_type="sharded" if pieces else "full")
    if kind == "fsdp2":
        return ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=pieces)
    return "auto" if kind == "single" else kind


def trainer(kind: str, folder: Path, *callbacks: Any, pieces: bool = False, **options: Any) -> pl.Trainer:
    warnings.simplefilter("ignore")
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    return pl.Trainer(
        strategy=strategy(kind, pieces=pieces),
        devices=1 if kind == "single" else 2,
        accelerator="cpu",
        default_root_dir=folder,
        callbacks=list(callbacks),
        use_distributed_sampler=False,
        **{"max_steps": STEPS, **quiet, **options},
    )


def loader(kind: str, texts: Texts | None = None) -> DataLoader[Any]:
    """Step s of two ranks sees the rows that step s of one process sees."""
    texts = texts or Texts()
    if kind == "single":
        return DataLoader(texts, batch_size=BATCH)
    sampler = DistributedSampler(texts, num_replicas=2, rank=int(os.environ["RANK"]), shuffle=False)
    return DataLoader(texts, batch_size=BATCH // 2, sampler=sampler)


def fit(
    kind: str, method: str, folder: Path, *, start: Path | None = None, steps: int = STEPS, pieces: bool = False, **options: Any
) -> None:
    """Train; leaves the adapter in ``folder/adapter/last`` and checkpoints of every eighth step in ``folder``."""
    pl.seed_everything(1, verbose=False)
    keep = ModelCheckpoint(dirpath=folder, filename="{step}", every_n_train_steps=8, save_top_k=-1)
    run = trainer(kind, folder, keep, pieces=pieces, max_steps=steps, enable_checkpointing=True)
    run.fit(module(method, **options), loader(kind), ckpt_path=start)


def resume(kind: str, method: str, folder: Path, start: Path) -> None:
    """Go on from a checkpoint to the end."""
    fit(kind, method, folder, start=start)


def write(kind: str, folder: Path, steps: int, pieces: bool) -> None:
    """Train LoRA for some steps."""
    fit(kind, "LoRA", folder, steps=steps, pieces=pieces)


class Foreign(pl.LightningModule):
    """A project of its own, which builds and shards its network in ``configure_model``."""

    def __init__(self, peft: lp.PEFTCallback, how: str) -> None:
        super().__init__()
        self.net: Any = None
        self.peft, self.how = peft, how

    def configure_model(self) -> None:
        if self.net is not None:
            return
        self.net = base()
        if self.how != "forgotten":
            self.peft.apply(self)
        if self.device_mesh is None:
            return
        mesh = self.device_mesh["data_parallel"]
        if self.how == "lp.shard":
            lp.shard(self.net, mesh)
        else:
            for block in self.net.model.layers:
                fully_shard(block, mesh=mesh)
            fully_shard(self.net, mesh=mesh)

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        return self.net(**batch).loss  # type: ignore[no-any-return]

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01, eps=1e-2)


def fit_foreign(kind: str, how: str, folder: Path, **options: Any) -> dict[str, Any]:
    """Train a project that only adds the callback; returns what the test looks at."""
    pl.seed_everything(1, verbose=False)
    peft = lp.PEFTCallback(METHODS["LoRA"], **{"verbose": False, **options})
    model = Foreign(peft, how)
    trainer(kind, folder, peft, max_steps=6).fit(model, loader(kind))
    units = sum(isinstance(m, FSDPModule | FullyShardedDataParallel) for m in model.modules())
    return {"units": units, "dtypes": {str(s.tensor().dtype) for s in lp.handles(model)["default"].slots}}


def fit_wide(kind: str, folder: Path, dtype: str, quantization: dict[str, Any] | None) -> set[str]:
    """Train a base in another dtype and return that of the adapter."""
    model = lp.PEFTLightningModule(
        METHODS["LoRA"], base().to(getattr(torch, dtype)), quantization=quantization, callback={"verbose": False}
    )
    trainer(kind, folder, max_steps=2, precision="bf16-true" if dtype == "bfloat16" else "32-true").fit(model, loader(kind))
    return {str(s.tensor().dtype) for s in model.handle.slots}


def handle_errors(folder: Path) -> dict[str, str]:
    """What a handle on a sharded model says of things that need whole weights."""
    model = module("BitFit")
    trainer("fsdp2", folder, max_steps=1).fit(model, loader("fsdp2"))

    def disable() -> None:
        with model.handle.disabled():
            pass

    errors = {}
    for name, action in {
        "merge": model.handle.merge,
        "remove": model.handle.remove,
        "disabled": disable,
        "save": lambda: lp.save_adapter(model.handle, folder / "by-hand"),
        "inject": lambda: lp.inject(model.base, "lora", "second"),
        "shard": lambda: lp.shard(model.base, model.device_mesh["data_parallel"]),
    }.items():
        try:
            action()
        except lp.errors.PEFTError as error:
            errors[name] = f"{type(error).__name__}: {error}"
    return errors


def command_line(*arguments: str) -> None:
    """Run ``lightning-peft``."""
    warnings.simplefilter("ignore")
    main(list(arguments))


class Interrupt(pl.Callback):
    """Ends one process or all in the middle of a batch."""

    def __init__(self, step: int, how: str) -> None:
        self.step, self.how = step, how

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            if self.how == "error":
                raise RuntimeError("pulled the plug")
            os.kill(os.getpid(), signal.SIGKILL)


def fit_text(
    kind: str, method: str, folder: Path, *, start: Path | None = None, interrupt: tuple[int, str] | None = None
) -> None:
    """Train on shuffled texts of our own data module, with dropout, and save after every step."""
    pl.seed_everything(1, verbose=False)
    texts = folder.parent / f"{os.getpid()}.csv"
    texts.write_text("text\n" + "\n".join(" ".join(tiny.WORDS[(7 * i + j) % 40] for j in range(3 + i % 5)) for i in range(28)))
    data = lp.PEFTDataModule(
        data_path=str(texts), tokenizer=tiny.tokenizer(), batch_size=2, max_length=16, val_fraction=0.0, seed=5
    )
    keep = ModelCheckpoint(dirpath=folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    callbacks = [keep] if interrupt is None else [keep, Interrupt(*interrupt)]
    run = trainer(kind, folder, *callbacks, enable_checkpointing=True)
    run.fit(module(method, dropout=0.1), data, ckpt_path=start)


def validate_few(kind: str, folder: Path) -> dict[str, float]:
    """Return the validation loss of one row, which leaves the second rank without a label."""
    texts = Texts(2)
    texts.ids[1] = texts.ids[0]
    rows = [texts[0], {**texts[1], "labels": torch.full_like(texts.ids[1], -100)}]
    own = rows if kind == "single" else rows[int(os.environ["RANK"]) :][:1]
    run = trainer(kind, folder)
    (found,) = run.validate(module("LoRA"), DataLoader(own, batch_size=len(own)), verbose=False)
    return dict(found)


def start_unseeded(kind: str, folder: Path) -> list[Any]:
    """Return the A of the first layer of a model without a seed, before the run and at its start."""
    torch.seed()
    found = []

    class Look(pl.Callback):
        def on_fit_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
            shards = Shards(trainer.strategy.model)
            found.append(shards.whole(slot.tensor(), slot.tensor()))

    model = module("LoRA")
    slot = next(s for s in model.handle.slots if s.key.endswith("q_proj.lora_A"))
    before = slot.tensor().detach().clone()
    trainer(kind, folder, Look(), max_steps=1).fit(model, loader(kind))
    return [before.tolist(), found[0].tolist()]


class Draws(pl.Callback):
    """Notes what every step draws."""

    def __init__(self) -> None:
        self.draws: list[list[int]] = []

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, *args: Any) -> None:
        for handle in lp.handles(module).values():
            routing = [e.adapter.routing for e in handle.entries]
            self.draws.append([i for clock, place in routing for i in clock.draw(4, place, 0)])


def draws_unseeded(kind: str, folder: Path) -> dict[str, Any]:
    """Return the seeds of all adapters, and what they draw, where each process has a seed of its own."""
    torch.seed()
    model, draws = module("AdaMix"), Draws()
    trainer(kind, folder, draws, max_steps=4).fit(model, loader(kind))
    return {"seeds": [e.adapter.seed for e in model.handle.entries], "draws": draws.draws}


def fit_foreign_mixture(kind: str, folder: Path) -> list[float]:
    """Train a project that only adds the callback; its rows all have as many labels. Return all trained numbers."""
    pl.seed_everything(1, verbose=False)

    class Even(Texts):
        def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
            return {"input_ids": self.ids[i], "labels": self.ids[i]}

    model = Foreign(lp.PEFTCallback(RANDOM["AdaMix"], verbose=False), "lp.shard")
    trainer(kind, folder, model.peft, max_steps=6).fit(model, loader(kind, Even()))
    return [float(x) for tensor in lp.handles(model)["default"].state_dict().values() for x in tensor.flatten()]


class Whole(pl.LightningModule):
    """A project that is its own network."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = torch.nn.Embedding(tiny.VOCABULARY, 8), torch.nn.Linear(8, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed(ids).mean(1))  # type: ignore[no-any-return]

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(self(batch["input_ids"]), batch["input_ids"][:, 0] % 3)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01, eps=1e-2)


def fit_whole_mixture(kind: str, folder: Path) -> list[float]:
    """Train a project whose adapted root is the LightningModule itself. Return all trained numbers."""
    pl.seed_everything(1, verbose=False)
    peft = lp.PEFTCallback(lp.AdaMix(part=lp.LoRA(rank=2, targets="head"), outputs="."), verbose=False)
    model = Whole()
    trainer(kind, folder, peft, max_steps=6).fit(model, loader(kind))
    return [float(x) for tensor in lp.handles(model)["default"].state_dict().values() for x in tensor.flatten()]


def fit_smollm2(kind: str, base: str, folder: Path) -> None:
    """Train the real model for a few steps on ragged rows."""

    class Rows(Texts):
        def __init__(self) -> None:
            super().__init__(2 * BATCH)
            self.ids = torch.randint(100, 40_000, (2 * BATCH, LENGTH), generator=torch.Generator().manual_seed(7))

    model = lp.PEFTLightningModule(
        lp.LoRA(rank=8, targets="all-linear"),
        base,
        dtype="float32",
        lr=1e-3,
        lr_scheduler=None,
        optimizer=functools.partial(torch.optim.AdamW, eps=1e-3),
        callback={"verbose": False},
    )
    pl.seed_everything(1, verbose=False)
    trainer(kind, folder, max_steps=4).fit(model, loader(kind, Rows()))
