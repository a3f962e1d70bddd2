"""What a method of your own is made of; these names are stable, like those of `import lightning_peft as lp`.

A method is a :class:`PEFTStrategy` whose ``plan(anatomy)`` returns edits, and an adapter module with its mathematics.
`examples/own_method.py` is a whole one.
"""

from lightning_peft.nn.adapter import AdapterModule as AdapterModule
from lightning_peft.nn.adapter import BaseLayer as BaseLayer
from lightning_peft.nn.adapter import BuildContext as BuildContext
from lightning_peft.nn.adapter import DeltaModule as DeltaModule
from lightning_peft.nn.adapter import LayerSpec as LayerSpec
from lightning_peft.nn.adapter import MergeableModule as MergeableModule
from lightning_peft.nn.adapter import fill_kaiming as fill_kaiming
from lightning_peft.nn.adapter import fill_normal as fill_normal
from lightning_peft.strategies.registry import register as register
from lightning_peft.strategies.schedule import Schedule as Schedule
from lightning_peft.strategies.schedule import SecondPass as SecondPass
from lightning_peft.strategies.strategy import ALL_KINDS as ALL_KINDS
from lightning_peft.strategies.strategy import Calibration as Calibration
from lightning_peft.strategies.strategy import PEFTStrategy as PEFTStrategy
from lightning_peft.strategies.strategy import require as require
from lightning_peft.surgery.anatomy import Anatomy as Anatomy
from lightning_peft.surgery.edits import Attach as Attach
from lightning_peft.surgery.edits import Edit as Edit
from lightning_peft.surgery.edits import Plan as Plan
from lightning_peft.surgery.edits import Reparametrize as Reparametrize
from lightning_peft.surgery.edits import Replace as Replace
from lightning_peft.surgery.edits import Tap as Tap
from lightning_peft.surgery.edits import Train as Train
from lightning_peft.surgery.edits import adapt as adapt
from lightning_peft.surgery.handle import Handle as Handle
from lightning_peft.surgery.handle import Slot as Slot
from lightning_peft.surgery.sites import Site as Site
from lightning_peft.surgery.stack import CallAdapter as CallAdapter
