"""Nothing reaches for the network at import, at inject, at save or at load: shown in a process that cannot open a socket."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = """
import socket

class Refused(socket.socket):
    def connect(self, *args):
        raise AssertionError(f"network: {args}")
    connect_ex = sendto = connect

socket.socket = Refused
socket.getaddrinfo = socket.create_connection = Refused.connect

import sys
import torch
import lightning_peft as lp
from transformers import LlamaConfig, LlamaForCausalLM

def base():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2))

model = base()
model.config._name_or_path = "somebody/some-model"  # HF peft asks the hub about the vocabulary of such a name while it saves
handle = lp.inject(model, lp.LoRA(rank=2, targets=["embedding", "attention"]))
lp.save_adapter(handle, sys.argv[1])
lp.load_adapter(base(), sys.argv[1])
try:
    socket.create_connection(("127.0.0.1", 9))
except AssertionError:
    print("guarded")
"""


def test_no_network(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path / "adapter")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["guarded"]
