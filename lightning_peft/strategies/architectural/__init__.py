"""Methods that change how the model runs."""

from lightning_peft.strategies.architectural.ladder_side_tuning import LadderSideTuning as LadderSideTuning
from lightning_peft.strategies.architectural.meft import MEFT as MEFT
