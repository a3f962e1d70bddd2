"""Branches that are finished several times and begin anew, so that their changes add up to a higher rank.

ReLoRA: Lialin et al. 2023, "High-Rank Training Through Low-Rank Updates", arXiv 2307.05695, section 3: ``ΔW = Σ_k c·B_k A_k``.
ReMoRA: Jiang et al. 2024, arXiv 2405.12130, section 3.3: the maps around M change from round to round.

The authors merge what is finished into W. Here it is kept beside W, as factors that train no more: nothing is rounded, a quantized
W stays what it is, the file holds all that was learnt, and the base comes back when the adapter is disabled or removed.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from lightning_peft.nn.adapter import AdapterModule, BuildContext
from lightning_peft.nn.low_rank import LoRAInit, LowRankAdapter
from lightning_peft.nn.square_matrix import MoRAType, SquareMatrixAdapter
from lightning_peft.types import stable_seed


class Restartable(AdapterModule):
    """An adapter whose training falls into rounds."""

    @abstractmethod
    def restart(self, finished: int) -> None:
        """Set what the present round has learnt aside and begin the next; the function of the layer stays.

        Args:
            finished: How many rounds are finished with this one, from 1 on.
        """


class RestartedLowRankAdapter(LowRankAdapter, Restartable):
    """ΔW = c·(BA + Σ_k B_k A_k) with trained ``lora_A``, ``lora_B`` and the finished rounds in ``finished_A``, ``finished_B``.

    Args:
        context: Place, dtype and seed.
        rank: r of one round.
        scaling: c.
        dropout: Probability on the branch's input, in training.
        init: Start of every round, ``default`` or ``gaussian``.
        rounds: How many rounds there will be; zeros are kept in place of those to come.
    """

    finished_A: Tensor
    finished_B: Tensor
    _round = 0

    def __init__(self, context: BuildContext, *, rank: int, scaling: float, dropout: float, init: LoRAInit, rounds: int) -> None:
        super().__init__(context, rank=rank, scaling=scaling, dropout=dropout, init=init)
        spec, kept = self.spec, (rounds - 1) * rank
        self.register_buffer("finished_A", self.lora_A.new_zeros(*spec.batch, kept, spec.in_features))
        self.register_buffer("finished_B", self.lora_B.new_zeros(*spec.batch, spec.out_features, kept))

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(stable_seed(self.seed, self._round))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        for finished in self.buffers():
            finished.zero_()

    @torch.no_grad()
    def restart(self, finished: int) -> None:
        rows = slice((finished - 1) * self.rank, finished * self.rank)
        self.finished_A[..., rows, :] = self.lora_A
        self.finished_B[..., rows] = self.lora_B
        self._round = finished
        super().reset_parameters()

    def factors(self) -> tuple[Tensor, Tensor]:
        return torch.cat([self.lora_A, self.finished_A], dim=-2), torch.cat([self.lora_B, self.finished_B], dim=-1)


class RestartedSquareMatrixAdapter(SquareMatrixAdapter, Restartable):
    """MoRA whose maps change from round to round; ``finished`` (types, r̂, r̂) adds up the rounds of each type.

    Args:
        context: Place, dtype and seed.
        side: r̂.
        types: Types of the rounds, in turn.
        dropout: Probability on the branch's input, in training.
    """

    finished: Tensor
    active: Tensor

    def __init__(self, context: BuildContext, *, side: int, types: tuple[MoRAType, ...], dropout: float) -> None:
        super().__init__(context, side=side, mora_type=types[0], dropout=dropout)
        self.types = types
        self.register_buffer("finished", self.mora_M.new_zeros(len(types), *self.mora_M.shape))
        # Which type M has now: 1 there and 0 elsewhere. A number would be asked of the device in every forward.
        self.register_buffer("active", self.mora_M.new_zeros(len(types)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        for name, buffer in self.named_buffers():
            buffer.zero_()
            if name == "active":
                buffer[0] = 1

    @torch.no_grad()
    def restart(self, finished: int) -> None:
        self.finished.copy_(self._matrices())
        torch.nn.init.zeros_(self.mora_M)
        self.active.zero_()
        self.active[finished % len(self.types)] = 1

    def _matrices(self) -> Tensor:
        """Return M of every type, (types, *batch, r̂, r̂)."""
        return self.finished + self.active.view(-1, *(1,) * self.mora_M.dim()) * self.mora_M

    def branches(self) -> list[tuple[MoRAType, Tensor]]:
        return list(zip(self.types, self._matrices(), strict=True))
