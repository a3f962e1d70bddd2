"""Any value in any field of a config: it loads, or a typed error says why, and the model is as it was."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_peft.errors import PEFTError
from lightning_peft.interop import load_hf
from tests.interop.peers import Case, change, config_of, fresh, hf_model, hf_save

JUNK: list[Any] = [None, True, 5, -1, 1.5, "x", "(", [], [1], ["x"], {}, {"x": 1}, {"x": [1]}, {"x": "("}, 10**12]
CASES = {
    "lora": Case("llama", "LoraConfig", {"r": 3, "trainable_token_indices": [2], "modules_to_save": ["lm_head"]}),
    "adalora": Case("llama", "AdaLoraConfig", {"init_r": 4, "target_r": 2, "total_step": 10}),
    "vera": Case("llama", "VeraConfig", {"r": 5, "save_projection": False}),
    "lokr": Case("llama", "LoKrConfig", {"r": 2}),
    "oft": Case("llama", "OFTConfig", {"oft_block_size": 4}),
    "ia3": Case("llama", "IA3Config", {"feedforward_modules": ["down_proj"]}),
    "prefix": Case("llama", "PrefixTuningConfig", {"num_virtual_tokens": 3}),
    "prompt": Case("llama", "PromptTuningConfig", {"num_virtual_tokens": 3}),
    "tokens": Case("llama", "TrainableTokensConfig", {"token_indices": [3, 1], "target_modules": ["embed_tokens"]}),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_any_value_in_any_field(case: Case, tmp_path: Path) -> None:
    hf_save(hf_model(case), tmp_path)
    config = config_of(tmp_path)
    config["use_mora"] = None
    model = fresh(case.backbone)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for name, value in config.items():
        for junk in JUNK:
            change(tmp_path, **{name: junk})
            with contextlib.suppress(PEFTError):
                load_hf(model, tmp_path).remove()
            assert model.state_dict().keys() == before.keys(), (name, junk)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()), name
        change(tmp_path, **{name: value})
