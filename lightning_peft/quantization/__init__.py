"""How a stored weight becomes a matrix and back. Knows layers, and neither adapters nor models."""

from lightning_peft.quantization.backend import QuantBackend as QuantBackend
from lightning_peft.quantization.backend import backend_for as backend_for
from lightning_peft.quantization.backend import backend_of as backend_of
from lightning_peft.quantization.backend import backends as backends
from lightning_peft.quantization.backend import prepare as prepare
from lightning_peft.quantization.config import Quantization as Quantization
