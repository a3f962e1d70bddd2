"""Adapters in the formats of others: Hugging Face peft both ways, and what servers take."""

from lightning_peft.interop.files import is_hf_folder as is_hf_folder
from lightning_peft.interop.loading import load_hf as load_hf
from lightning_peft.interop.saving import HFExport as HFExport
from lightning_peft.interop.saving import push as push
from lightning_peft.interop.saving import save_hf as save_hf
from lightning_peft.interop.servers import Verdict as Verdict
from lightning_peft.interop.servers import suitability as suitability
