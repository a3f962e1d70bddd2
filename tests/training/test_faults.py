"""Disks that are full, folders that cannot be written, files that are damaged, processes that die."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_peft import files
from lightning_peft.checkpoint import durable
from lightning_peft.errors import FormatError
from tests.training import faults
from tests.training.toys import Plain, callback, loader, trainer

MAIN = Path(__file__).with_name("dying.py")
pytestmark = pytest.mark.filterwarnings("ignore:The dirpath has changed", "ignore:Be aware that when using `ckpt_path`")


def trained(folder: Path, **keep: Any) -> tuple[Any, list[Path]]:
    """Fit two epochs of four steps with a checkpoint every second one; return the Trainer and the files, oldest first."""
    keep = {"save_top_k": -1, "every_n_train_steps": 2, "filename": "{step}", **keep}
    run = trainer(folder, callback(), ModelCheckpoint(folder, **keep), enable_checkpointing=True, max_epochs=2)
    run.fit(Plain(), loader())
    return run, sorted(folder.glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)


# ---------------------------------------------------------------------- writing


class Full:
    """A disk without room, after so many bytes."""

    def __init__(self, file: Any, room: int) -> None:
        self.file, self.room = file, room

    def write(self, data: Any) -> int:
        if len(data) > self.room:
            self.file.write(data[: self.room])
            raise OSError(errno.ENOSPC, "No space left on device")
        return int(self.file.write(data))


@pytest.mark.parametrize("room", [0, 1000])
def test_a_full_disk_leaves_the_file_before(room: int, tmp_path: Path, monkeypatch: Any) -> None:
    run, made = trained(tmp_path)
    before = made[-1].read_bytes()
    replacing = files.replacing

    class Replacing:
        def __init__(self, path: Path) -> None:
            self.inner = replacing(path)

        def __enter__(self) -> Any:
            return Full(self.inner.__enter__(), room)

        def __exit__(self, *error: Any) -> Any:
            return self.inner.__exit__(*error)

    monkeypatch.setattr(durable, "replacing", Replacing)
    with pytest.raises(OSError, match="No space left on device: cannot write the checkpoint.*as it was; make room") as caught:
        run.save_checkpoint(made[-1])
    assert caught.value.errno == errno.ENOSPC
    assert made[-1].read_bytes() == before
    assert sorted(tmp_path.glob(".*")) == []
    with pytest.raises(OSError, match="Nothing was written"):
        run.save_checkpoint(tmp_path / "new.ckpt")


def test_a_limit_of_the_file_system_is_met_in_a_real_process(tmp_path: Path) -> None:
    """RLIMIT_FSIZE: the kernel itself refuses to write on."""
    script = (
        "import resource, signal, sys, torch\n"
        "from pathlib import Path\n"
        "from lightning_peft.checkpoint.durable import save_file\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "path = Path(sys.argv[1])\n"
        "save_file({'step': 1}, path)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "try:\n"
        "    save_file({'step': torch.zeros(100000)}, path)\n"
        "except OSError as error:\n"
        "    print(error)\n"
        "print(torch.load(path)['step'], [p.name for p in path.parent.iterdir()])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "last.ckpt")], capture_output=True, text=True, timeout=120, check=True
    )
    assert "File too large: cannot write the checkpoint of 40" in done.stdout
    assert "1 ['last.ckpt']" in done.stdout


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    run, _ = trained(tmp_path / "good")
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(OSError, match="cannot write the checkpoint"):
        run.save_checkpoint(tmp_path / "file" / "last.ckpt")
    if os.getuid():
        (tmp_path / "locked").mkdir(mode=0o500)
        with pytest.raises(PermissionError, match="cannot write the checkpoint.*give another folder"):
            run.save_checkpoint(tmp_path / "locked" / "last.ckpt")


def test_what_a_kill_left_is_removed_after_an_hour(tmp_path: Path) -> None:
    old, new = tmp_path / ".saving-old", tmp_path / ".saving-new"
    old.write_bytes(b"half"), new.write_bytes(b"half")
    os.utime(old, (time.time() - 4000, time.time() - 4000))
    durable.save_file({"step": 1}, tmp_path / "a.ckpt")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".saving-new", "a.ckpt"]


def test_a_file_has_the_permissions_of_any_other(tmp_path: Path) -> None:
    durable.save_file({}, tmp_path / "a.ckpt")
    (tmp_path / "b").touch()
    assert (tmp_path / "a.ckpt").stat().st_mode == (tmp_path / "b").stat().st_mode


def test_remote_paths_and_other_writers_stay_with_lightning(tmp_path: Path) -> None:
    import fsspec

    run, _ = trained(tmp_path)
    run.save_checkpoint("memory://remote/last.ckpt")
    with fsspec.open("memory://remote/last.ckpt") as file:
        assert torch.load(file, weights_only=True)["global_step"] == 8
    run.save_checkpoint(f"file://{tmp_path}/local.ckpt")
    assert durable.damage(tmp_path / "local.ckpt") is None
    with pytest.raises(TypeError, match="storage_options"):
        run.save_checkpoint(tmp_path / "x.ckpt", storage_options={"a": 1})


# ---------------------------------------------------------------------- damaged files


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def flip(data: bytes) -> bytes:
    """One bit of a tensor: torch reads it without a word."""
    at = data.index(b"data/0") + 200
    return data[:at] + bytes([data[at] ^ 64]) + data[at + 1 :]


@pytest.mark.parametrize(
    "damage", [lambda data: b"", cut, flip, lambda data: b"\0" * len(data)], ids=["empty", "cut", "bit", "zeros"]
)
@pytest.mark.parametrize("which", ["path", "last"])
def test_a_damaged_checkpoint_names_the_one_before(damage: Any, which: str, tmp_path: Path) -> None:
    _, made = trained(tmp_path)
    damaged = made[-1].rename(tmp_path / "last.ckpt")
    damaged.write_bytes(damage(damaged.read_bytes()))
    made[-2].write_bytes(cut(made[-2].read_bytes()))  # the one before is damaged as well
    weights = torch.load(made[0], weights_only=True)
    torch.save({k: v for k, v in weights.items() if k != "optimizer_states"}, tmp_path / "weights.ckpt")
    keep = ModelCheckpoint(tmp_path, save_last=True)
    run = trainer(tmp_path, callback(), keep, enable_checkpointing=True, max_epochs=3)
    module = Plain()
    with (
        pytest.warns(UserWarning, match="is not empty"),
        pytest.raises(FormatError, match=rf"last\.ckpt' is damaged.*'{made[-3]}' \(step 4\): resume with that ckpt_path"),
    ):
        run.fit(module, loader(), ckpt_path=damaged if which == "path" else "last")
    trainer(tmp_path, callback(), max_epochs=3).fit(module, loader(), ckpt_path=made[-3])


def test_a_damaged_checkpoint_without_another_says_so(tmp_path: Path) -> None:
    _, made = trained(tmp_path / "a")
    alone = tmp_path / "alone.ckpt"
    alone.write_bytes(cut(made[0].read_bytes()))
    shutil.copy(alone, tmp_path / "other.ckpt")
    with pytest.raises(FormatError, match="No other checkpoint to resume from"):
        trainer(tmp_path, callback()).test(Plain(), loader(shuffle=False), ckpt_path=alone)


def test_a_file_without_checksums_is_taken(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        durable.save_file({"tensor": torch.ones(9)}, tmp_path / "a.ckpt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert durable.damage(tmp_path / "a.ckpt") is None


# ---------------------------------------------------------------------- processes that are told to stop, or die


def kill_and_resume(*options: str) -> dict[str, int]:
    """Run the benchmark in a process of its own, since it forks; return the sums of its table."""
    script = Path(__file__).parents[1] / "benchmarks" / "kill_and_resume.py"
    done = subprocess.run([sys.executable, str(script), *options], capture_output=True, text=True, timeout=500)
    assert done.returncode in (0, 1), done.stderr
    head, *_, sums = done.stdout.splitlines()
    return {name: int(value) for name, value in zip(head.split()[:-1], sums.split()[:-1], strict=True)}


def test_a_kill_at_any_moment_of_a_save_leaves_one_whole_file(tmp_path: Path) -> None:
    """Where temporary files lie on another file system, Lightning's own writer copies over the file that is there."""
    if not Path("/dev/shm").is_dir() or os.stat("/dev/shm").st_dev == tmp_path.stat().st_dev:
        pytest.skip("no second file system")
    script = MAIN.with_name("killed_in_a_save.py")
    environment = {**os.environ, "PYTHONPATH": str(MAIN.parents[2])}
    command = [sys.executable, str(script), str(tmp_path / "last.ckpt")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.splitlines() == ["lightning, copying: damaged", "ours, written: 1", "ours, synced: 1", "ours, moved: 2"]


@pytest.mark.dist
@pytest.mark.slow
def test_kills_lose_nothing(tmp_path: Path) -> None:
    sums = kill_and_resume("--kills", "3", "--folder", str(tmp_path))
    assert sums["kills"] == 3
    assert sums["files"] > 0
    assert sums["unreadable"] == sums["none_left"] == sums["lost"] == sums["different"] == 0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(folder: Path, what: str, *, ranks: int = 1) -> list[subprocess.Popen[str]]:
    """Start the processes of ``dying.py`` as torchrun would."""
    port = free_port()
    common = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "GROUP_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = []
    for rank in range(ranks):
        group = {"RANK": rank, "LOCAL_RANK": rank, "TORCHELASTIC_RUN_ID": "tests", **common} if ranks > 1 else {}
        environment = {**os.environ, **{k: str(v) for k, v in group.items()}, "PYTHONPATH": str(Path(__file__).parents[2])}
        processes.append(
            subprocess.Popen(
                [sys.executable, str(MAIN), str(folder), what],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        )
    return processes


def end(processes: list[subprocess.Popen[str]], timeout: float = 120.0) -> list[tuple[int, str]]:
    """Wait for all; kill what does not end."""
    limit = time.monotonic() + timeout
    try:
        said = [process.communicate(timeout=max(0.1, limit - time.monotonic()))[0] for process in processes]
        return [(process.returncode, text) for process, text in zip(processes, said, strict=True)]
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()


@pytest.mark.dist
def test_sigterm_writes_a_checkpoint_and_exits_cleanly(tmp_path: Path) -> None:
    (process,) = start(tmp_path, "sigterm")
    ((code, said),) = end([process])
    assert code == 0, said
    (path,) = tmp_path.glob("*.ckpt")
    whole = faults.fit(tmp_path / "whole")
    resumed = faults.fit(tmp_path / "resumed", start=path)
    assert faults.differing(faults.state(*whole), faults.state(*resumed)) == []


@pytest.mark.dist
@pytest.mark.slow
def test_sigterm_to_all_ranks_keeps_the_random_states_of_all(tmp_path: Path) -> None:
    done = end(start(tmp_path, "all stop", ranks=2))
    assert [code for code, _ in done] == [0, 0], done
    checkpoint = torch.load(tmp_path / "stopped.ckpt", weights_only=True)
    record = checkpoint["callbacks"]["lightning_peft.PEFTCallback[default]"]
    assert checkpoint["global_step"] == 4
    assert len(record["rng"]) == 2
    assert not record["torn"]


@pytest.mark.dist
def test_the_other_rank_stops_when_one_dies(tmp_path: Path) -> None:
    processes = start(tmp_path, "dies", ranks=2)
    (code, said), (died, _) = end(processes)
    assert died == -signal.SIGKILL
    assert code not in (0, -signal.SIGKILL), said  # by itself, with an error
    assert "rank 0 stopped after" in said
    seconds = float(said.partition("rank 0 stopped after ")[2].split()[0])
    assert seconds < 30
