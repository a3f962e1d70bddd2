"""FISH mask: Sung et al. 2021, "Training Neural Networks with Fixed Sparse Masks", arXiv 2111.09839.

The entries with the highest empirical Fisher information train: ``F = 1/N Σ_i (∂ log p(y_i|x_i) / ∂θ)²``, equation 3 with the label of
the data in place of the expectation. Squares of the gradients of single examples; the square of a batch's gradient is something else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, distributed

from lightning_peft.errors import ConfigError, DataError
from lightning_peft.nn.masking import MaskedEntries
from lightning_peft.strategies.examples import examples_of
from lightning_peft.strategies.registry import register
from lightning_peft.strategies.selective.masks import MaskStrategy
from lightning_peft.strategies.strategy import ALL_KINDS, Calibration, require
from lightning_peft.surgery.anatomy import Anatomy
from lightning_peft.surgery.handle import Handle
from lightning_peft.surgery.sites import Site
from lightning_peft.surgery.squared_gradients import SquaredGradients
from lightning_peft.surgery.stack import AttachEntry, ReparametrizeEntry


@register(
    name="fish",
    family="selective",
    summary="Trains the share of all weights with the highest Fisher information on the training data, and nothing else.",
    paper="Training Neural Networks with Fixed Sparse Masks, arXiv 2111.09839",
    lr=1e-3,
    mergeable=True,
    from_data=True,
    layer_kinds=ALL_KINDS,
    example={"share": 0.1, "samples": 2},
)
@dataclass(frozen=True, kw_only=True)
class FISHMask(MaskStrategy):
    """Train a share of the weights, chosen by what the training data says about them.

    Args:
        samples: Examples whose gradients are squared, all ranks together; fewer if there are no more. With ``per="batch"``: batches.
        per: ``example``, as the paper has it: a batch is cut along the first dimension of its tensors. ``batch`` squares the gradients
            of whole batches, which is faster, but no Fisher information: gradients of examples that disagree cancel.
    """

    samples: int = 1024
    per: Literal["example", "batch"] = "example"

    def validate(self) -> None:
        super().validate()
        require(self.samples >= 1, self, "samples", "at least one example is needed")

    def scores(self, anatomy: Anatomy, sites: tuple[Site, ...], sizes: tuple[int, ...]) -> None:
        return None

    def calibrate(self, handle: Handle, batches: Iterable[Any], loss: Callable[[Any], Tensor]) -> Calibration:
        entries = [e for e in handle.entries if isinstance(e, AttachEntry | ReparametrizeEntry)]
        adapters = [e.adapter for e in entries if isinstance(e.adapter, MaskedEntries)]
        world = distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1
        count = 0
        with SquaredGradients(handle.root, [e.site for e in entries]) as squares:
            for example in self._pieces(batches, -(-self.samples // world)):
                squares.add(loss(example))
                count += 1
            if not squares.agree(count):
                raise DataError(
                    "FISHMask found no training batch to calibrate on. Attach a train dataloader with data, or pass batches to lp.calibrate."
                )

            def fisher() -> Iterator[Tensor]:
                for entry, adapter in zip(entries, adapters, strict=True):
                    weight, bias = squares.of(handle.root, entry.site)
                    yield weight
                    if adapter.biases:
                        assert bias is not None
                        yield bias

            wrong = next(
                (
                    e.site.key
                    for e in entries
                    for s in squares.of(handle.root, e.site)
                    if s is not None and not s.isfinite().all()
                ),
                None,
            )
            if wrong is not None:
                raise ConfigError(
                    f"FISHMask: gradients at '{wrong}' are not finite. Calibrate in fp32 or bf16, and check the data."
                )
            (slot,) = (s for s in handle.slots if s.owner is adapters[0].mask and s.attribute == "indices")
            return {slot.key: adapters[0].mask.choose(fisher)}

    def _pieces(self, batches: Iterable[Any], most: int) -> Iterator[Any]:
        left = most
        for batch in batches:
            for piece in [batch] if self.per == "batch" else examples_of(batch):
                yield piece
                left -= 1
                if not left:
                    return
