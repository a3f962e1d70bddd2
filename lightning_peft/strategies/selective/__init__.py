"""Methods that train a part of the base's own parameters."""

from lightning_peft.strategies.selective.bitfit import BitFit as BitFit
from lightning_peft.strategies.selective.diff_pruning import DiffPruning as DiffPruning
from lightning_peft.strategies.selective.fish_mask import FISHMask as FISHMask
from lightning_peft.strategies.selective.layer_selection import LayerSelection as LayerSelection
from lightning_peft.strategies.selective.ln_tuning import LNTuning as LNTuning
from lightning_peft.strategies.selective.masks import MagnitudeMask as MagnitudeMask
from lightning_peft.strategies.selective.masks import RandomMask as RandomMask
from lightning_peft.strategies.selective.token_rows import TokenRows as TokenRows
