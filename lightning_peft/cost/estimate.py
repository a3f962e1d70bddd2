"""``estimate``: the bill before the run."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import nn

from lightning_peft.cost.generation import can_generate, trace_generation, without_adapters
from lightning_peft.cost.optimizers import MakeOptimizer, optimizer_bytes, optimizer_named
from lightning_peft.cost.planned import GiveInputs, Inputs, Planned, plan_model, precision_of
from lightning_peft.cost.report import CostReport, DeviceShare, GenerationCost, size
from lightning_peft.cost.step import Loss, Step, trace_step
from lightning_peft.errors import ConfigError, PEFTError, did_you_mean
from lightning_peft.strategies.strategy import PEFTStrategy
from lightning_peft.surgery.families import Family
from lightning_peft.surgery.handle import Slot
from lightning_peft.surgery.recompute import GradientCheckpointing
from lightning_peft.types import AdapterDtype

Device: TypeAlias = Literal["auto", "cpu", "cuda"]
Sharding: TypeAlias = Literal["none", "ddp", "fsdp"]
Vary: TypeAlias = Literal["batch_size", "sequence_length"]
MOST = 2**22  # rows or tokens beyond which nobody looks


def estimate(
    model: Any,
    strategy: PEFTStrategy | str | Mapping[str, Any] | list[Any] | None,
    *,
    batch_size: int = 1,
    sequence_length: int | None = None,
    inputs: Inputs | GiveInputs | None = None,
    dtype: torch.dtype | str | None = None,
    precision: str | int = "32-true",
    quantization: Any = "auto",
    gradient_checkpointing: GradientCheckpointing | Mapping[str, Any] | bool | None = False,
    optimizer: str | MakeOptimizer = "adamw",
    loss: Loss = "chunked",
    labelled: float = 1.0,
    padded: bool = False,
    device: Device = "auto",
    devices: int = 1,
    sharding: Sharding = "none",
    generate: int | bool = True,
    adapter_dtype: AdapterDtype = "auto",
    anatomy: Family | Mapping[str, Any] | str | None = None,
    extra_modules: Sequence[str] = (),
    fit: str | int | None = None,
    vary: Vary = "batch_size",
) -> CostReport:
    """Return what training ``model`` with ``strategy`` costs, before anything runs and without its weights.

    One step of the model, with the adapters installed, is run on tensors that have a shape and no memory: forward, loss, backward and
    optimizer, in Lightning's order. So any module and any method is covered, and what is counted is what the code does. Of equal
    blocks one is run.

    Memory is that of tensors. What the process has before (Python, libraries; on CUDA the context), buffers inside kernels and what
    the allocator wastes come on top.

    Args:
        model: A module (live or on meta; it is not touched), or a configuration of transformers.
        strategy: As :func:`lightning_peft.inject` takes it; None for the model as it is, with what of it requires gradients.
        batch_size: Rows per device and step.
        sequence_length: Tokens per row; needed for models that read texts.
        inputs: What the model reads, where that is not known: the arguments of its forward for one batch as a tensor, a tuple or a
            mapping, whose first dimension becomes the batch size; or a function of (batch_size, sequence_length) that returns them.
        dtype: dtype of the base's weights; None leaves them.
        precision: Lightning's: ``32-true``, ``bf16-true``, ``bf16-mixed`` ...
        quantization: As :func:`lightning_peft.quantize` takes it; ``auto`` is what the strategy asks for (``qlora``: NF4), None leaves
            the model as it is.
        gradient_checkpointing: As :class:`lightning_peft.PEFTCallback` takes it.
        optimizer: A class of torch.optim by name, or a function that makes it from parameters.
        loss: Of a language model: ``full`` makes all logits at once, ``chunked`` a part at a time.
        labelled: Share of the positions that have a label.
        padded: Rows are of different lengths, so that the model gets an attention mask. Without one transformers leaves keys and values
            of grouped-query attention as they are.
        device: ``cpu`` or ``cuda``; ``auto`` is what this machine has. CUDA's optimizers step through all parameters at once, and
            offloaded activations leave the device.
        devices: How many devices.
        sharding: ``ddp`` or ``fsdp`` where there are several.
        generate: Estimate generation too, where model and method can; a number is the length of the prompt, else it is
            ``sequence_length``.
        adapter_dtype: As of :func:`lightning_peft.inject`.
        anatomy: Roles of an architecture that the package does not know.
        extra_modules: Paths of further modules that train whole, such as a new task head.
        fit: Memory of one device (``24GiB``, or bytes): find the largest batch or length that needs no more.
        vary: What ``fit`` changes.

    Raises:
        ConfigError: An argument is unknown or out of range, what the model reads is not known, its forward depends on values, or not
            even one row or token fits.
        PEFTError: As :func:`lightning_peft.inject` and :func:`lightning_peft.quantize` would raise.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2))
        >>> lora = {"class_path": "LoRA", "init_args": {"rank": 2, "targets": "all-linear"}}
        >>> report = estimate(model, lora, inputs=torch.empty(1, 8), batch_size=4, optimizer="sgd")
        >>> report.trainable, report.optimizer
        (148, 0)
    """
    for name, value, kind in (
        ("device", device, Device),
        ("sharding", sharding, Sharding),
        ("loss", loss, Loss),
        ("vary", vary, Vary),
    ):
        if value not in get_args(kind):
            hint = did_you_mean(str(value), get_args(kind))
            raise ConfigError(f"estimate: {name}={value!r} is not one of {', '.join(get_args(kind))}.{hint}")
    for name, number in (("batch_size", batch_size), ("devices", devices), ("sequence_length", sequence_length or 1)):
        if type(number) is not int or number < 1:
            raise ConfigError(f"estimate: {name}={number!r}, but it counts: 1 or more.")
    if not 0 < labelled <= 1:
        raise ConfigError(f"estimate: labelled={labelled!r}, but it is a share: above 0, at most 1.")
    if devices > 1 and sharding == "none":
        raise ConfigError(f"estimate: {devices} devices need sharding='ddp' or 'fsdp'.")
    where = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    recompute = GradientCheckpointing.parse(gradient_checkpointing)
    if recompute is not None and where == "cpu":
        recompute = dataclasses.replace(recompute, offload=False)  # there the activations are where they would be sent
    make, name = optimizer_named(optimizer), precision_of(precision)
    planned = plan_model(
        model,
        strategy,
        dtype=_dtype(dtype),
        precision=name,
        quantization=quantization,
        gradient_checkpointing=recompute,
        adapter_dtype=adapter_dtype,
        on_cuda=where == "cuda",
        extra_modules=extra_modules,
        anatomy=anatomy,
    )
    state, rise = optimizer_bytes(planned.tracer, planned.trainable(), make, together=where == "cuda")
    settings = {
        "precision": name,
        "quantization": planned.quantized.scheme,
        "gradient_checkpointing": None if recompute is None else recompute.to_dict(),
        "optimizer": optimizer if isinstance(optimizer, str) else getattr(optimizer, "__name__", "given"),
        "loss": loss if planned.head is not None else None,
        "labelled": labelled,
        "padded": padded,
        "device": where,
    }
    bill = _Bill(planned, state, rise, inputs, padded, loss, labelled, devices, sharding, settings)
    if fit is not None:
        room = memory(fit)
        batch_size, sequence_length = _largest(bill, room, batch_size, sequence_length, vary)
    report = bill.report(batch_size, sequence_length)
    if generate is False:
        return report
    try:
        generation = bill.generation(batch_size, sequence_length if generate is True else generate)
    except PEFTError:
        if generate is not True:
            raise
        generation = None  # nobody asked, and a method may forbid it
    return dataclasses.replace(report, generation=generation)


@dataclass(frozen=True)
class _Bill:
    """A planned model and what its reports have in common.

    Args:
        planned: The model.
        state: Bytes of the optimizer's state.
        rise: Bytes that a step of the optimizer takes besides.
        settings: The arguments to report; the others as of :func:`estimate`.
    """

    planned: Planned
    state: int
    rise: int
    inputs: Inputs | GiveInputs | None
    padded: bool
    loss: Loss
    labelled: float
    devices: int
    sharding: Sharding
    settings: dict[str, Any]

    @property
    def _owned(self) -> int:
        return sum(t.nbytes for t in {id(s.tensor()): s.tensor() for s in self._slots if not s.claimed}.values())

    @property
    def _originals(self) -> int:
        return sum(t.nbytes for handle in self.planned.handles for t in handle._originals.values())

    @property
    def _slots(self) -> list[Slot]:
        return [slot for handle in self.planned.handles for slot in handle.slots]

    @property
    def gradients(self) -> int:
        """Bytes of all gradients."""
        return sum(p.nbytes for p in self.planned.trainable())

    def step(self, batch: int, length: int | None) -> Step:
        """Trace one step."""
        share = 1 / self.devices if self.sharding == "fsdp" else 1.0  # of gradients, and so of what the optimizer steps through
        return trace_step(
            self.planned,
            batch=batch,
            length=length,
            given=self.inputs,
            padded=self.padded,
            loss=self.loss,
            labelled=self.labelled,
            optimizer_rise=int(self.rise * share),
            gradient_share=share,
        )

    def device_share(self, step: Step) -> DeviceShare:
        """Return what one device holds, and the most that is alive on it."""
        base, owned, gradients = self.planned.weights, self._owned, self.gradients
        state, share, gathered = self.state, 1.0, 0
        if self.sharding == "ddp":
            gradients *= 2  # once more in the buckets that are reduced
        elif self.sharding == "fsdp":
            share = 1 / self.devices
            blocks = [_nbytes(block) for block in self.planned.blocks] or [0]
            # The outermost unit stays whole from forward to backward; of the blocks one computes while the next is gathered.
            gathered = _nbytes(self.planned.model) - sum(blocks) + 2 * max(blocks)
        # Copies of trained base tensors are no parameters, so nothing shards them.
        held = int(share * (base + owned + state)) + self._originals
        peaks = self.phases(step, held, gathered)
        return DeviceShare(
            devices=self.devices,
            sharding=self.sharding,
            weights=int(share * (base + owned)) + self._originals,
            gradients=int(share * gradients),
            optimizer=int(share * state),
            gathered=gathered,
            peak=max(peaks.values()),
        )

    def phases(self, step: Step, held: int, gathered: int = 0) -> dict[str, int]:
        """Return the bytes of one device at the worst moment of each phase."""
        buckets = self.gradients if self.sharding == "ddp" else 0
        return {name: held + rise + buckets + (0 if name == "optimizer step" else gathered) for name, rise in step.rises.items()}

    def peak(self, batch: int, length: int | None) -> int:
        """Return the most that is alive on one device."""
        return self.device_share(self.step(batch, length)).peak

    def report(self, batch: int, length: int | None) -> CostReport:
        """Return the report for one size of batch."""
        planned, step = self.planned, self.step(batch, length)
        device = self.device_share(step)
        held = device.weights + device.optimizer
        phases = self.phases(step, held, device.gathered)
        tensors = {id(s.tensor()): s.tensor().nbytes for s in self._slots}
        strategy = None if planned.handle is None else planned.handle.strategy
        return CostReport(
            model=type(planned.model).__name__,
            method="as it is" if strategy is None else strategy.info.name,
            batch_size=batch,
            sequence_length=length,
            settings=self.settings,
            parameters=planned.parameters,
            quantized_parameters=planned.quantized.entries,
            trainable=sum(p.numel() for p in planned.trainable()),
            weights=planned.weights,
            quantized_weights=planned.quantized.nbytes,
            adapter=self._owned + self._originals,
            gradients=self.gradients,
            optimizer=self.state,
            activations=step.activations,
            loss_buffers=step.loss,
            phases=phases,
            peak=device.peak,
            peak_phase=max(phases, key=phases.__getitem__),
            adapter_file=sum(tensors.values()),
            checkpoint=sum(tensors.values()) + self.state,
            forward_flops=step.forward_flops,
            backward_flops=step.backward_flops,
            device=device,
        )

    def generation(self, batch: int, prompt: int | None) -> GenerationCost | None:
        """Return what generating costs, and how much of it is the adapter's; None for a model that generates no text."""
        planned = self.planned
        if prompt is None or not can_generate(planned):
            return None
        made = trace_generation(planned, batch=batch, prompt=prompt)
        with without_adapters(planned):
            base = trace_generation(planned, batch=batch, prompt=prompt, again=False)
        return GenerationCost(
            prompt=prompt,
            prefill_flops=made.prefill_flops,
            decode_flops=made.decode_flops,
            decode_flops_without_cache=made.decode_flops_without_cache,
            kv_cache=made.kv_cache,
            adapter_prefill_flops=made.prefill_flops - base.prefill_flops,
            adapter_decode_flops=made.decode_flops - base.decode_flops,
            adapter_kv_cache=made.kv_cache - base.kv_cache,
        )


def _nbytes(module: nn.Module) -> int:
    return sum(p.nbytes for p in module.parameters())


def _dtype(value: torch.dtype | str | None) -> torch.dtype | None:
    if value is None or isinstance(value, torch.dtype):
        return value
    found = getattr(torch, str(value), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ConfigError(f"estimate: dtype={value!r} is no floating-point dtype of torch, such as 'bfloat16'.")
    return found


_MEMORY = re.compile(r"\s*([0-9.]+)\s*([KMGT]?)(I?)B?\s*", re.IGNORECASE)


def memory(value: str | int) -> int:
    """Return bytes: ``24GiB`` is 24 · 2³⁰, ``24GB`` is 24 · 10⁹.

    Raises:
        ConfigError: It is no size.
    """
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    match = _MEMORY.fullmatch(value) if isinstance(value, str) else None
    if match is None or match[1].count(".") > 1 or match[1] == "." or not float(match[1]):
        raise ConfigError(f"fit={value!r} is no size of memory, such as '24GiB'.")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** "_KMGT".index(match[2].upper() or "_"))


def _largest(bill: _Bill, room: int, batch: int, length: int | None, vary: Vary) -> tuple[int, int | None]:
    """Return the largest batch size, or length, whose peak is at most ``room``, and the other one as it is.

    Raises:
        ConfigError: Not even one fits, or what varies makes no difference.
    """
    if vary == "sequence_length" and length is None:
        raise ConfigError("fit: vary='sequence_length' needs a model that reads texts.")
    limit = _most(bill.planned.model) if vary == "sequence_length" else MOST

    def peak(count: int) -> int:
        return bill.peak(count, length) if vary == "batch_size" else bill.peak(batch, count)

    least = peak(1)
    if least > room:
        raise ConfigError(
            f"fit: {size(room)} do not hold a step with {vary}=1, which takes {size(least)}. Quantize the base, use gradient "
            "checkpointing, a method or optimizer that keeps less, or more devices with sharding='fsdp'."
        )
    low, high = 1, limit + 1
    # Memory grows by almost the same bytes with each row, so two sizes tell nearly where the end is.
    guess = 1 + (room - least) // max(1, peak(2) - least)
    step, count = 1, min(max(guess, 2), limit)
    while high - low > 1:
        if peak(count) <= room:
            low = count
        else:
            high = count
        # On from the guess in steps that double; between two sizes by halves.
        count = min(low + step, limit) if high > limit else max(high - step, low + 1) if low == 1 else (low + high) // 2
        step *= 2
    return (low, length) if vary == "batch_size" else (batch, low)


def _most(model: nn.Module) -> int:
    """Return how many positions a model has."""
    config: Any = getattr(model, "config", None)
    found = getattr(config, "max_position_embeddings", None)
    return found if isinstance(found, int) else MOST
