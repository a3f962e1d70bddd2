"""Combinations of methods."""

from lightning_peft.strategies.hybrid.compose import Compose as Compose
from lightning_peft.strategies.hybrid.gated import Gated as Gated
from lightning_peft.strategies.hybrid.mam import MAM as MAM
from lightning_peft.strategies.hybrid.mixture import AdaMix as AdaMix
from lightning_peft.strategies.hybrid.mixture import Mixture as Mixture
from lightning_peft.strategies.hybrid.unipelt import UniPELT as UniPELT
