"""QLoRA: Dettmers et al. 2023, "QLoRA: Efficient Finetuning of Quantized LLMs", arXiv 2305.14314; and DoRA on the same footing.

The mathematics is LoRA's, on a base that is stored in 4 bits. What is QLoRA's own are the base that it asks for and its defaults.
"""

from __future__ import annotations

from dataclasses import dataclass

from lightning_peft.strategies.registry import register
from lightning_peft.strategies.reparameterized.dora import DoRA
from lightning_peft.strategies.reparameterized.lora import LoRA
from lightning_peft.strategies.strategy import QUANTIZED, TargetsLike, require
from lightning_peft.surgery.targets import ALL_LINEAR, Targets

EVERY_LINEAR = Targets(include=(ALL_LINEAR,))


@register(
    name="qlora",
    family="reparameterized",
    summary="LoRA on all linear layers of a base that is stored in 4 bits.",
    paper="QLoRA: Efficient Finetuning of Quantized LLMs, arXiv 2305.14314",
    lr=2e-4,
    mergeable=True,
    layer_kinds=LoRA.info.layer_kinds,
    storages=QUANTIZED,
    base_quantization="nf4",
    example={"rank": 2, "alpha": 4.0, "dropout": 0.0},
)
@dataclass(frozen=True, kw_only=True)
class QLoRA(LoRA):
    """LoRA with the defaults of the paper (appendix B.2) and for quantized bases only.

    ``quantization="auto"`` of ``PEFTLightningModule`` and ``PEFTCallback`` stores the base in NF4 with double quantization;
    ``lp.quantize`` does it for any module. The options are those of LoRA. The paper takes dropout 0.05 from 33 billion parameters up.
    """

    targets: TargetsLike = EVERY_LINEAR
    rank: int = 64
    alpha: float = 16.0
    dropout: float = 0.1

    def validate(self) -> None:
        require(self.targets is not None, self, "targets", "the layers have to be named, as by its default 'all-linear'")
        super().validate()


@register(
    name="qdora",
    family="reparameterized",
    summary="DoRA on all linear layers of a base that is stored in 4 bits.",
    paper="DoRA, arXiv 2402.09353, on the base of QLoRA, arXiv 2305.14314",
    lr=2e-4,
    mergeable=True,
    identity_at_init=False,
    layer_kinds=DoRA.info.layer_kinds,
    storages=QUANTIZED,
    base_quantization="nf4",
    example={"rank": 2, "alpha": 4.0, "dropout": 0.0},
)
@dataclass(frozen=True, kw_only=True)
class QDoRA(QLoRA, DoRA):
    """DoRA with the defaults of :class:`QLoRA`, for quantized bases only."""
