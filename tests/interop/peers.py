"""HF peft as the oracle: adapters with random weights, saved and loaded there, beside the same here."""

from __future__ import annotations

import copy
import json
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.backbones import BACKBONES

TASKS = {"llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "bert": "SEQ_CLS", "t5": "SEQ_2_SEQ_LM"}
TARGETS = {
    "llama": ["q_proj", "v_proj", "down_proj"],
    "gpt2": ["c_attn", "mlp.c_proj"],
    "bert": ["query", "value", "intermediate.dense"],
    "t5": ["q", "v", "wo"],
}


@dataclass(frozen=True)
class Case:
    """One adapter of HF peft on one backbone."""

    backbone: str
    config: str
    options: dict[str, Any] = field(default_factory=dict)
    targets: Any = None

    @property
    def id(self) -> str:
        return "-".join([self.config.removesuffix("Config").lower(), *map(str, self.options), self.backbone])

    def hf_config(self) -> Any:
        import peft

        options = dict(self.options)
        kind = getattr(peft, self.config)
        if "target_modules" in kind.__dataclass_fields__ and "target_modules" not in options:
            options["target_modules"] = self.targets or TARGETS[self.backbone]
        return kind(task_type=TASKS.get(self.backbone), **copy.deepcopy(options))


def fresh(backbone: str) -> nn.Module:
    return BACKBONES[backbone].fresh()


def logits(model: nn.Module, backbone: str) -> Tensor:
    """Return the logits of the text, without those of virtual tokens."""
    batch = BACKBONES[backbone].batch()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = model(**batch)
    values: Tensor = out.logits if hasattr(out, "logits") else out if isinstance(out, Tensor) else out[0]
    return values[:, -batch["input_ids"].shape[1] :] if values.dim() == 3 else values


def shake(parameters: Any, seed: int = 3, scale: float = 0.3) -> None:
    """Move parameters by a lot, so that nothing is an identity any longer."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)


def hf_model(case: Case) -> nn.Module:
    """Return a model with an adapter of HF peft whose weights are random."""
    import peft

    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model = peft.get_peft_model(fresh(case.backbone), case.hf_config())
    shake(p for p in model.parameters() if p.requires_grad)
    return model.eval()


def hf_save(model: Any, folder: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
    return folder


def hf_load(backbone: str, folder: Path) -> nn.Module:
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(fresh(backbone), str(folder))
    return model.eval()


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


def change(folder: Path, **fields: Any) -> None:
    """Change fields of the config in a folder."""
    (folder / "adapter_config.json").write_text(json.dumps(config_of(folder) | fields))


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def assert_same_tensors(first: Path, second: Path) -> None:
    """Two folders hold the same tensors, bit for bit."""
    a, b = tensors_of(first), tensors_of(second)
    assert a.keys() == b.keys(), sorted(a.keys() ^ b.keys())
    for key in a:
        assert a[key].shape == b[key].shape, key
        assert torch.equal(a[key], b[key]), key


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
