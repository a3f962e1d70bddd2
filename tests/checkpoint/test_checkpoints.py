"""Adapters in Lightning checkpoints: the keys of a live state dict, and reading them back without the module."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lightning_peft as lp
from lightning_peft.checkpoint import (
    adapter_of,
    check_base,
    check_manifest,
    file_keys,
    live_keys,
    manifest_of,
    manifests_of,
    read_adapter,
    stamp,
    strip_wrappers,
)
from lightning_peft.errors import CompatibilityError, ConflictError, FormatError
from tests.checkpoint.toys import LORA, STRATEGIES, Net, Whole, adapted, x


def checkpoint(whole: nn.Module, *handles: lp.Handle, root: str = "net", keep_base: bool = True) -> dict[str, Any]:
    """What the callback writes."""
    state = whole.state_dict()
    keys = {live for handle in handles for live in live_keys(handle, root).values()}
    head = {k: v for k, v in state.items() if k.startswith("head.")}
    found: dict[str, Any] = {"state_dict": dict(state) if keep_base else {k: state[k] for k in keys} | head, "epoch": 3}
    stamp(found, {h.name: manifest_of(h, root=root, extra_state=head) for h in handles})
    return found


@pytest.mark.parametrize("keep_base", [False, True], ids=["adapter only", "full"])
@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)
def test_checkpoint_loads_into_the_whole_and_into_the_base(strategy: Any, keep_base: bool, tmp_path: Path) -> None:
    whole = Whole(head_seed=1)
    path = tmp_path / "last.ckpt"
    torch.save(checkpoint(whole, adapted(whole.net, strategy), keep_base=keep_base), path)
    other = Whole(head_seed=2)
    lp.load_adapter(other, path)
    assert torch.equal(other(x()), whole(x()))
    net = Net()
    with pytest.warns(UserWarning, match="'head.weight', 'head.bias', for which this model has no place"):
        lp.load_adapter(net, path, "another_name")
    assert torch.equal(net(x()), whole.net(x()))


def test_several_adapters_in_one_checkpoint(tmp_path: Path) -> None:
    whole = Whole()
    handles = [adapted(whole.net, LORA, "a", seed=1), adapted(whole.net, LORA, "b", seed=2)]
    path = tmp_path / "last.ckpt"
    torch.save(checkpoint(whole, *handles), path)
    with pytest.raises(FormatError, match=r"2 adapters \(a, b\)"):
        read_adapter(path)
    with pytest.raises(FormatError, match="no adapter 'aa'. Did you mean 'a'"):
        read_adapter(path, "aa")
    with pytest.raises(FormatError, match="no adapter 'default'"):
        lp.load_adapter(Whole(), path)
    for handle in handles:
        state = read_adapter(path, handle.name).state
        assert all(torch.equal(state[k], v) for k, v in handle.state_dict().items())
        lp.load_adapter(Whole(), path, handle.name)
    assert lp.inspect_adapter(path).count("LoRA(targets={include: ['up', 'down']}, rank=2)") == 2


def test_read_tensors_do_not_hold_the_checkpoint(tmp_path: Path) -> None:
    whole = Whole()
    found = checkpoint(whole, adapted(whole.net))
    adapter = adapter_of(found)
    found["state_dict"]["net.up.peft.default.lora_A"].zero_()
    assert adapter.state["up.lora_A"].abs().sum() > 0


def test_stamp_survives_weights_only_loading_and_json(tmp_path: Path) -> None:
    whole = Whole()
    found = checkpoint(whole, adapted(whole.net, STRATEGIES["composed"]))
    torch.save(found, tmp_path / "a.ckpt")
    again = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert again["peft"] == found["peft"]
    assert manifests_of(again) == found["peft"]["adapters"]


def test_inspect_says_what_is_there(tmp_path: Path) -> None:
    whole = Whole()
    head = {f"head.{k}": v for k, v in whole.head.state_dict().items()}
    lp.save_adapter(adapted(whole.net, STRATEGIES["composed"]), tmp_path, root="net", extra_state=head)
    text = lp.inspect_adapter(tmp_path)
    assert "Compose(parts=[LoRA(targets={include: ['up', 'down']}, rank=2), BitFit()])" in text
    assert "compose (version 1), lora (version 1), bitfit (version 1)" in text
    assert f"6, {2 * (8 + 12) + 2 * (12 + 4) + 16} numbers" in text
    assert "extra      head.weight, head.bias" in text
    assert "root       net" in text
    assert lp.inspect_adapter(tmp_path / "adapter.safetensors").splitlines()[1:] == text.splitlines()[1:]


# ---------------------------------------------------------------- keys


@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)
@pytest.mark.parametrize("root", ["", "net"])
def test_live_keys_are_keys_of_the_state_dict_and_back(strategy: Any, root: str) -> None:
    whole = Whole()
    handle = adapted(whole.net, strategy)
    other = lp.inject(whole.net, lp.LoRA(rank=1, targets=["up"]), "default2")
    live = (whole if root else whole.net).state_dict()
    keys = live_keys(handle, root)
    assert list(keys) == list(handle.state_dict())
    assert all(torch.equal(live[key], handle.state_dict()[file]) for file, key in keys.items())
    back = file_keys(live, "default", root)
    assert {file: back[file] for file in keys} == keys
    assert not set(live_keys(other, root).values()) & set(back.values())
    assert not any(key.startswith("head.") for key in back.values())


def test_wrappers_leave_no_trace_in_files() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = Net()
    handle = adapted(model, STRATEGIES["composed"])
    keys, state = live_keys(handle), handle.state_dict()
    model.up = checkpoint_wrapper(model.up)
    model.down = torch.compile(model.down)  # type: ignore[assignment]
    assert "down._orig_mod.weight" in model.state_dict()
    assert live_keys(handle) == keys
    back = file_keys(model.state_dict(), "default")
    assert all(torch.equal(model.state_dict()[back[key]], value) for key, value in state.items())
    assert check_base(model, manifest_of(handle)) is None
    assert strip_wrappers("a._fsdp_wrapped_module.b._checkpoint_wrapped_module._orig_mod.weight") == "a.b.weight"


def test_an_adapter_tensor_goes_before_a_base_tensor_of_its_name() -> None:
    live = ["net.a.peft.x.weight", "net.a.weight", "net.a.peft.y.weight", "net.a.bias", "other.weight"]
    assert file_keys(live, "x", "net") == {"a.weight": "net.a.peft.x.weight", "a.bias": "net.a.bias"}
    assert file_keys(reversed(live), "x", "net")["a.weight"] == "net.a.peft.x.weight"


def test_two_tensors_with_one_key_are_refused_before_one_is_lost() -> None:
    """A file key holds no adapter name, so an adapter's tensor and a trained base tensor could meet in one."""
    handle = adapted(Net(), lp.BitFit())
    handle.slots.append(handle.slots[0])
    with pytest.raises(ConflictError, match="two of its tensors would be 'up.bias'"):
        live_keys(handle)


# ---------------------------------------------------------------- manifest and base


def test_state_given_must_be_complete() -> None:
    handle = adapted(Net())
    state = handle.state_dict()
    manifest = manifest_of(handle, state={k: v * 2 for k, v in state.items()})
    assert manifest["tensors"]["up.lora_A"]["crc32"] != manifest_of(handle)["tensors"]["up.lora_A"]["crc32"]
    state.pop("up.lora_A")
    with pytest.raises(ConflictError, match="up.lora_A"):
        manifest_of(handle, state=state)


def test_check_manifest_returns_the_strategy() -> None:
    assert check_manifest(manifest_of(adapted(Net(), STRATEGIES["composed"]))) == STRATEGIES["composed"]


def test_base_check_of_a_handle_is_of_the_base_before_training() -> None:
    strategy = lp.BitFit()
    manifest = manifest_of(adapted(Net(), strategy))
    assert check_base(adapted(Net(), strategy, seed=3), manifest) is None
    assert check_base(Net(), manifest) is None
    with pytest.raises(CompatibilityError, match="weights are other ones"):
        check_base(adapted(Net(seed=1), strategy), manifest)


def test_base_check_on_meta_is_deferred() -> None:
    manifest = manifest_of(adapted(Net(), lp.BitFit()))
    for seed in (0, 1):
        with torch.device("meta"):
            model = Net()
        handle = lp.inject(model, lp.BitFit())
        assert check_base(handle, manifest) == "unchecked"
        model.to_empty(device="cpu")
        model.load_state_dict(Net(seed).state_dict())
        with torch.no_grad():
            model.up.bias.add_(1)  # what a resumed BitFit run has trained
        assert manifest_of(handle)["base"]["values"] is not None  # a file saved from here on can be checked
        if seed == 0:
            assert check_base(handle, manifest) is None
        else:
            with pytest.raises(CompatibilityError, match="weights are other ones"):
                check_base(handle, manifest)
