"""Combinations of methods."""

from lightning_peft.strategies.hybrid.compose import Compose as Compose
