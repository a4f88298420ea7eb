"""The directory of a bank: an index, and a file for each adapter with the embeddings of its prompts."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from filelock import FileLock
from torch import Tensor

from lora_init.errors import LoraInitError
from lora_init.files import check_output, read_fields, read_json, write_whole
from lora_init.serving.trained import LINEAR, Layer, Trained
from lora_init.statistics.statistics import Statistics
from lora_init.statistics.tensorfile import TensorFile, write_tensors

INDEX = "bank.json"
GENERATOR = "generator.safetensors"
_FORMAT, _VERSION, _ENTRY = "lora_init.bank", 1, "lora_init.bank_entry"
# Names of entries become names of files, also those that stand in an index from elsewhere.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,79}")


@dataclass(frozen=True)
class Entry:
    """What the index says of an adapter; checkpoints of one training are entries of one task."""

    task: str
    data: str  # in words
    rank: int  # the highest of its layers
    n_prompts: int  # how many embeddings it came with
    sha256: str  # of the file of its weights and embeddings
    statistics_sha256: str = ""  # of the file of its statistics; empty if it came without


@dataclass(frozen=True)
class Bank:
    """Adapters of one base model."""

    path: Path  # the directory
    fingerprint: str  # of the base model, see `fingerprint`
    model: str  # class and id of the base model, in words
    encoder: str  # directory or hub id of the encoder of prompts; empty for the base model itself
    entries: Mapping[str, Entry] = field(default_factory=dict)  # by name, in the order in which they came

    @property
    def tasks(self) -> dict[str, list[str]]:
        """Names of the entries of each task."""
        tasks: dict[str, list[str]] = {}
        for name, entry in self.entries.items():
            tasks.setdefault(entry.task, []).append(name)
        return tasks

    def in_words(self) -> str:
        """Return what is in it, with a hash of all files."""
        digest = hashlib.sha256("".join(entry.sha256 for entry in self.entries.values()).encode())
        if (self.path / GENERATOR).exists():
            digest.update((self.path / GENERATOR).read_bytes())
        return f"{self.path.name}: {len(self.entries)} adapters of {', '.join(self.tasks)} ({digest.hexdigest()[:16]})"

    def check_base(self, fingerprint: str, model: str) -> None:
        """Refuse another base model than the bank's."""
        if self.fingerprint != fingerprint:
            said = f"{self.path} holds adapters of {self.model}, and {model} is another model. Name its bank."
            raise LoraInitError(said)

    def layers(self, name: str) -> dict[str, Layer]:
        """Read A, B and scaling of each layer of an entry."""
        file = self._open(name)
        with file.checking("a layer"):
            scalings = {str(layer): float(scaling) for layer, scaling in file.header["scalings"].items()}
        layers = {}
        for layer_name, scaling in scalings.items():
            a, b = file.tensor(f"A {layer_name}"), file.tensor(f"B {layer_name}")
            layers[layer_name] = Layer(a, b, scaling)
        return layers

    def embeddings(self, name: str) -> Tensor:
        """Read the embeddings of an entry's prompts, float32 [n, d]."""
        return self._open(name).tensor("embeddings")

    def statistics(self, name: str) -> Statistics | None:
        """Read the statistics of an entry's data, if it came with some."""
        digest, path = self.entries[name].statistics_sha256, self._statistics_path(name)
        if not digest:
            return None
        _check_hash(path, digest)
        return Statistics.load(path)

    def _open(self, name: str) -> TensorFile:
        path = self.path / f"{name}.safetensors"
        _check_hash(path, self.entries[name].sha256)
        return TensorFile(path, _ENTRY, _VERSION)

    def _statistics_path(self, name: str) -> Path:
        return self.path / f"{name}.statistics.safetensors"


def open_bank(path: str | Path) -> Bank:
    """Read the index of a bank, which must not be empty."""
    path = Path(path).expanduser()
    if not (path / INDEX).is_file():
        raise LoraInitError(f"{path} is no bank: it has no {INDEX}. Make one: lora-init bank add {path} ADAPTER.")
    content = read_json(path / INDEX)
    if (content.get("format"), content.get("version")) != (_FORMAT, _VERSION):
        raise LoraInitError(f"{path / INDEX} is of another format than {_FORMAT} {_VERSION}. Give another directory.")
    try:
        entries = {name: read_fields(Entry, entry) for name, entry in content["entries"].items()}
        bank = read_fields(Bank, {**content, "path": path, "entries": entries})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise LoraInitError(f"{path / INDEX} is damaged ({error}). Add the adapters to a new bank.") from error
    for name in entries:  # an index may come from elsewhere, and names become paths
        check_name(name)
    if not entries:
        raise LoraInitError(f"{path} is an empty bank. Add an adapter: lora-init bank add {path} ADAPTER.")
    return bank


def check_name(name: str) -> None:
    """Refuse a name that is no plain name of a file."""
    if not _NAME.fullmatch(name) or name == "generator":
        raise LoraInitError(f"entry {name!r}: a name has letters, digits, - and _, at most 80. Pass another --name.")


def read_statistics(path: Path, fingerprint: str) -> Statistics:
    """Read statistics of the data that an entry is for; refuse those of another model."""
    stats = Statistics.load(path)
    if stats.provenance.fingerprint != fingerprint:
        raise LoraInitError(f"{path} has statistics of another model. Name statistics of the adapter's base.")
    return stats


def add_entry(
    new: Bank,
    name: str,
    trained: Trained,
    embeddings: Tensor,
    *,
    task: str,
    data: str,
    statistics: Path | None = None,
) -> Bank:
    """Add a trained adapter to a bank, which is made as `new` if there is none. Two processes may add at once.

    Nothing is ever replaced, and adapters of another base, or prompts embedded by another encoder, are refused.
    """
    path = new.path
    # What can be refused is refused before the directory is made.
    check_name(name)
    check_plain_lora(trained)
    check_output(path, "folder")
    stats = None if statistics is None else read_statistics(statistics, new.fingerprint)
    path.mkdir(parents=True, exist_ok=True)
    with FileLock(path / ".lock"):  # from reading the index to writing it
        bank = open_bank(path) if (path / INDEX).is_file() else new
        bank.check_base(new.fingerprint, new.model)
        if bank.encoder != new.encoder:
            got = new.encoder or "the base"
            raise LoraInitError(f"{path} embeds prompts by {bank.encoder or 'its base'}, got {got}.")
        if name in bank.entries:
            raise LoraInitError(f"{path} has an entry {name!r} already and replaces none. Pass another --name.")
        tensors = {"embeddings": embeddings.float().cpu()}
        for layer_name, layer in trained.layers.items():
            tensors |= {f"A {layer_name}": layer.a.float(), f"B {layer_name}": layer.b.float()}
        header = {"scalings": {n: layer.scaling for n, layer in trained.layers.items()}, "task": task}
        file = write_tensors(path / f"{name}.safetensors", _ENTRY, _VERSION, header, tensors)
        digest = ""
        if stats is not None:
            digest = _hash_of(stats.save(bank._statistics_path(name)))
        entry = Entry(task, data, trained.rank, len(embeddings), _hash_of(file), digest)
        bank = replace(bank, entries={**bank.entries, name: entry})
        _write_index(bank)  # last: an interrupted run leaves files that no entry names
    return bank


def check_plain_lora(trained: Trained) -> None:
    """Refuse DoRA, aLoRA, experts, embeddings and modules that were trained whole, which have no common form."""
    reasons = []
    if trained.dora:
        reasons.append("DoRA")
    elif trained.config.get("alora_invocation_tokens"):
        reasons.append("aLoRA")
    reasons += [name for name, layer in trained.layers.items() if layer.experts or layer.ends != LINEAR]
    reasons += trained.others
    if reasons:
        raise LoraInitError(
            f"the adapter has {reasons[0]}: a bank holds plain LoRA of linear layers. Train one of those."
        )
    if trained.adds_nothing:
        raise LoraInitError("B A is zero in every layer, so the adapter was never trained. Train it first.")


def _write_index(bank: Bank) -> None:
    entries = {name: asdict(entry) for name, entry in bank.entries.items()}
    fields = {"fingerprint": bank.fingerprint, "model": bank.model, "encoder": bank.encoder, "entries": entries}
    content = json.dumps({"format": _FORMAT, "version": _VERSION, **fields}, indent=2) + "\n"
    write_whole(bank.path / INDEX, content.encode())


def _hash_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _check_hash(path: Path, expected: str) -> None:
    if not path.is_file() or _hash_of(path) != expected:
        raise LoraInitError(f"{path} is missing or not what was added to the bank. Add the adapter anew.")
