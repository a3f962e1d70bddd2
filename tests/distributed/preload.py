"""What the server of ``ranks`` imports once, before it forks; nothing here may start a thread."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import bitsandbytes  # noqa: F401
import lightning.pytorch  # noqa: F401
import torch
import torch.distributed.checkpoint
import torch.distributed.fsdp
import transformers.models.llama.modeling_llama  # noqa: F401

import lightning_peft.training.module  # noqa: F401
import tests.distributed.cases  # noqa: F401

torch.set_num_threads(1)
