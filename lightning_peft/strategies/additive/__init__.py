"""Methods that add modules or tokens."""

from lightning_peft.strategies.additive.houlsby import HoulsbyAdapter as HoulsbyAdapter
