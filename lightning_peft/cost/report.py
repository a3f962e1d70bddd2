"""What an estimate says: plain numbers, as a table and as a dict."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from rich.table import Table

UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


@dataclass(frozen=True, kw_only=True)
class DeviceShare:
    """Bytes on one device; the batch size is per device too.

    Args:
        devices: How many there are.
        sharding: ``none``, ``ddp`` (every device holds everything, and gradients twice: DDP's buckets) or ``fsdp`` (FSDP2: a share of
            weights, gradients and optimizer state, the outermost unit whole, and two blocks gathered).
        weights: Of base and adapter.
        gradients: With DDP's buckets.
        optimizer: Its state.
        gathered: Whole units under FSDP.
        peak: At the worst moment.
    """

    devices: int
    sharding: str
    weights: int
    gradients: int
    optimizer: int
    gathered: int
    peak: int


@dataclass(frozen=True, kw_only=True)
class GenerationCost:
    """FLOPs and bytes of generating for the whole batch. FLOPs count a multiply-add as two.

    Args:
        prompt: Tokens of the prompt.
        prefill_flops: Of reading the prompt, with the logits of its last position.
        decode_flops: Of one more token with the KV cache.
        decode_flops_without_cache: Of one more token without it.
        kv_cache: Bytes of the cache after the prompt.
        adapter_prefill_flops: Those of ``prefill_flops`` that the base alone would not have: virtual tokens and branches.
        adapter_decode_flops: Those of ``decode_flops``.
        adapter_kv_cache: Bytes of the cache that hold virtual tokens.
    """

    prompt: int
    prefill_flops: int
    decode_flops: int
    decode_flops_without_cache: int
    kv_cache: int
    adapter_prefill_flops: int
    adapter_decode_flops: int
    adapter_kv_cache: int


@dataclass(frozen=True, kw_only=True)
class CostReport:
    """What training a model with a strategy costs. Memory in bytes, work in FLOPs (a multiply-add is two); no fixed cost of Python.

    Args:
        model: Class of the model.
        method: The strategy, by name; ``as it is`` without one.
        batch_size: Rows per device and step.
        sequence_length: Tokens per row, None for a model that reads no text.
        settings: The other arguments that the numbers depend on.
        parameters: Entries of the base; quantized ones by what they stand for.
        quantized_parameters: Those of them that are stored in few bits.
        trainable: Entries that train.
        weights: Bytes of the base as stored, with buffers and the statistics of quantized weights.
        quantized_weights: Those of them that hold quantized weights.
        adapter: Bytes of what the adapter adds: its tensors, and copies of base tensors that it trains, kept for ``remove()``.
        gradients: Bytes, all of them at once.
        optimizer: Bytes of the optimizer's state.
        activations: Bytes kept from the forward for the backward pass, up to the output head.
        loss_buffers: Bytes that output head and loss add to that at their worst moment.
        phases: Bytes alive at the worst moment of each phase of a step.
        peak: The largest of them, on one device.
        peak_phase: Its phase.
        adapter_file: Bytes of the adapter's tensors in its file.
        checkpoint: Bytes of a ``.ckpt`` with adapter and optimizer.
        forward_flops: Of a step's forward pass on one device, loss included.
        backward_flops: Of its backward pass: what really runs, recomputed operations included.
        device: What one device holds.
        generation: What generating costs; None for models that generate no text, or where it was not asked for.
    """

    model: str
    method: str
    batch_size: int
    sequence_length: int | None
    settings: dict[str, Any]
    parameters: int
    quantized_parameters: int
    trainable: int
    weights: int
    quantized_weights: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    loss_buffers: int
    phases: dict[str, int]
    peak: int
    peak_phase: str
    adapter_file: int
    checkpoint: int
    forward_flops: int
    backward_flops: int
    device: DeviceShare
    generation: GenerationCost | None = None

    @property
    def bits_per_weight(self) -> float:
        """Bits of one quantized weight, statistics included; 0 without any."""
        return 8 * self.quantized_weights / max(self.quantized_parameters, 1)

    @property
    def step_flops(self) -> int:
        """FLOPs of forward and backward pass."""
        return self.forward_flops + self.backward_flops

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON."""
        return {**dataclasses.asdict(self), "bits_per_weight": self.bits_per_weight, "step_flops": self.step_flops}

    def table(self) -> Table:
        """Return the report as a table for :class:`rich.console.Console`."""
        length = "" if self.sequence_length is None else f" × {self.sequence_length} tokens"
        table = Table(title=f"{self.model}, {self.method}: {self.batch_size} rows{length}", title_justify="left")
        table.add_column("what")
        table.add_column("estimate", justify="right")
        table.add_column("note")
        bits = f", {self.quantized_parameters:,} of them in {self.bits_per_weight:.3f} bits" if self.quantized_parameters else ""
        rows = [
            ("parameters", f"{self.parameters:,}", bits.removeprefix(", ")),
            ("trainable", f"{self.trainable:,}", f"{self.trainable / max(self.parameters, 1):.3%}"),
            None,
            ("base weights", size(self.weights), ""),
            ("adapter", size(self.adapter), ""),
            ("gradients", size(self.gradients), ""),
            ("optimizer state", size(self.optimizer), ""),
            ("activations", size(self.activations), "kept for the backward pass"),
            ("head and loss", size(self.loss_buffers), "on top, at their worst moment"),
            ("peak", size(self.peak), f"in the {self.peak_phase}"),
            ("checkpoint", size(self.checkpoint), f"adapter file {size(self.adapter_file)}"),
            None,
            ("forward", flops(self.forward_flops), ""),
            ("backward", flops(self.backward_flops), f"{self.backward_flops / max(self.forward_flops, 1):.2f} × forward"),
        ]
        share = self.device
        if share.devices > 1:
            held = f"weights {size(share.weights)}, gradients {size(share.gradients)}, optimizer {size(share.optimizer)}"
            more = f", gathered {size(share.gathered)}" if share.gathered else ""
            rows += [None, (f"each of {share.devices}, {share.sharding}", size(share.peak), held + more)]
        made = self.generation
        if made is not None:
            own = f"{size(made.adapter_kv_cache)} of it virtual tokens" if made.adapter_kv_cache else ""
            rows += [
                None,
                (
                    "prompt",
                    flops(made.prefill_flops),
                    f"{made.prompt} tokens; {flops(made.adapter_prefill_flops)} by the adapter",
                ),
                ("one token", flops(made.decode_flops), f"without cache {flops(made.decode_flops_without_cache)}"),
                ("KV cache", size(made.kv_cache), own),
            ]
        for row in rows:
            table.add_section() if row is None else table.add_row(*row)
        return table


def size(nbytes: float) -> str:
    """Return bytes in words: ``1.50 GiB``."""
    value = float(nbytes)
    for unit in UNITS:
        if abs(value) < 1024 or unit == UNITS[-1]:
            break
        value /= 1024
    return f"{value:.0f} B" if unit == "B" else f"{value:.2f} {unit}"


def flops(count: float) -> str:
    """Return operations in words: ``1.50 TFLOP``."""
    value = float(count)
    for unit in ("", "k", "M", "G", "T", "P"):
        if abs(value) < 1000 or unit == "P":
            break
        value /= 1000
    return f"{value:.2f} {unit}FLOP"
