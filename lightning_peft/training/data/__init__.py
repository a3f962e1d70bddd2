"""Data for fine-tuning: :class:`PEFTDataModule` and the parts it is made of.

``sources``, ``rows``: the rows of every split. ``templates``: what columns mean. ``tokenization``, ``encoders``: rows to
examples. ``collators``: examples to batches. ``choices``: both for multiple choice. ``splits``: all rows of a split. ``loader``:
order, shards, state. ``datamodule``: what Lightning sees.
"""

from __future__ import annotations

from lightning_peft.training.data.collators import Batch
from lightning_peft.training.data.datamodule import PEFTDataModule
from lightning_peft.training.data.loader import EpochSampler, StatefulLoader
from lightning_peft.training.data.splits import SplitReport

__all__ = ["Batch", "EpochSampler", "PEFTDataModule", "SplitReport", "StatefulLoader"]
