"""The statistics file: what comes back, and what is refused."""

import hashlib
import math
import os
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from lora_init import LoraInitError, Statistics, collect
from lora_init.layers.rows import expert_group
from lora_init.layers.targets import Target
from lora_init.statistics.spectrum import Spectrum
from lora_init.statistics.statistics import FORMAT, FORMAT_VERSION, Provenance, notes_on_experts
from lora_init.statistics.tensorfile import TensorFile, write_tensors
from tests.adapters.made import made_up_statistics
from tests.conftest import batches_for, refused, tiny_llama
from tests.statistics.made import spectrum_of


@pytest.fixture(scope="module")
def stats():
    torch.manual_seed(0)
    return collect(
        tiny_llama(), batches_for("llama"), ["q_proj", "k_proj", "down_proj", "embed_tokens"], rank=2, data="d"
    )


@pytest.fixture
def path(stats, tmp_path):
    return stats.save(tmp_path / "sub" / "stats.safetensors")


def test_everything_comes_back(stats, path):
    back = Statistics.load(path)
    assert list(back) == list(stats)
    assert back.provenance == stats.provenance
    assert back.targets == stats.targets
    assert back.group_of == stats.group_of
    assert back.held_out == stats.held_out
    assert back.unsupported == stats.unsupported == {"model.embed_tokens": "Embedding"}
    for name in stats:
        for part in ("components", "explained_variance", "mean", "explained_variance_ratio"):
            assert torch.equal(getattr(back[name], part), getattr(stats[name], part))
        assert (back[name].total_variance, back[name].n_samples) == (stats[name].total_variance, stats[name].n_samples)
        assert torch.equal(back.explained_variance(name), stats[name].explained_variance)
        assert torch.equal(back.explained_variance_ratio(name), stats[name].explained_variance_ratio)


def test_a_size_of_zero_is_one(path):
    """Of a layer that reads zeros, or writes them."""
    down = "model.layers.0.mlp.down_proj"
    found = Statistics.load(rewritten(path, lambda header: header["sizes"].update({down: [0.0, 0.0]})))
    assert found.sizes[down] == (0.0, 0.0)


def test_rows_without_variance_come_back(tmp_path):
    stats = made_by_hand()
    still = Spectrum(torch.eye(4)[:2], torch.tensor([0.0, 0.0]).double(), 0.0, torch.ones(4), 9)
    found = Statistics.load(replace(stats, groups={"q": still}).save(tmp_path / "stats.st"))
    assert found.total_variance("k") == 0.0 and found["q"].explained_variance.tolist() == [0.0, 0.0]


def test_a_file_from_before_sizes_were_measured_is_read(path):
    found = Statistics.load(rewritten(path, lambda header: header.pop("sizes")))
    assert found.sizes == {} and [*found] == [*Statistics.load(path)]


def test_convolutions_and_experts_come_back_as_they_were(tmp_path):
    for model, options in (
        (nn.Sequential(nn.Conv2d(4, 8, (3, 5), groups=2), nn.Conv1d(8, 6, 3)), dict(target_modules=["0", "1"])),
        (nn.Sequential(nn.Linear(4, 8)), dict(target_modules=["0"])),
    ):
        stats = made_up_statistics(model, **options)
        stats.targets["experts"] = Target("experts", "Parameter", 8, 6, experts=4)
        stats.groups["experts"], stats.group_of["experts"] = spectrum_of(8), "experts"
        assert Statistics.load(stats.save(tmp_path / "stats.safetensors")).targets == stats.targets


def test_no_gradient_of_a_layer_that_is_none_and_of_one_without(stats):
    """As any mapping says that it has no such key; that a layer has none is another thing."""
    for read in (stats.gradient, stats.__getitem__):
        with pytest.raises(KeyError, match="nowhere"):
            read("nowhere")
    refused("^these statistics have no gradients. Collect them with gradients=True", stats.gradient, next(iter(stats)))


@pytest.mark.parametrize(("n_few", "shown"), [(8, "0, 1, 2, 3, 4, 5, 6, 7."), (9, "0, 1, 2, 3, 4, 5, 6, 7, ....")])
def test_at_most_eight_experts_are_named(n_few, shown):
    names = [expert_group("x", i) for i in range(12)]
    groups = {"x": spectrum_of(8)} | {name: spectrum_of(8, n=7 + (i >= n_few)) for i, name in enumerate(names)}
    target = Target("x", "Parameter", 8, 6, experts=12)
    of_x = Statistics(groups, {"x": "x"}, {"x": target}, Provenance("", "", "", [], rank=4))
    (note,) = notes_on_experts(of_x)
    assert note == f"x: {n_few} of 12 experts read fewer than 8 rows and start from the rows of all experts: {shown}"


def test_a_group_is_stored_once(stats, path):
    with safe_open(path, framework="pt") as file:
        names = [name for name in file.keys() if name.endswith("/components")]  # noqa: SIM118 - not a dict
    assert len(names) == len(set(stats.group_of.values())) == 4 < len(stats) == 6


READ = {
    "components": lambda stats, name: stats[name].components,
    "variances of a spectrum": lambda stats, name: stats[name].explained_variance,
    "mean": lambda stats, name: stats[name].mean,
    "variances": lambda stats, name: stats.explained_variance(name),
    "shares": lambda stats, name: stats.explained_variance_ratio(name),
}


@pytest.mark.parametrize("what", READ)
def test_what_a_caller_does_to_a_tensor_reaches_no_layer(stats, what):
    """Not the layers that share its input, nor the same layer when it is asked for again."""
    before = {(name, part): read(stats, name).clone() for name in stats for part, read in READ.items()}
    for name in stats:
        READ[what](stats, name).fill_(7.0)
    assert all(torch.equal(READ[part](stats, name), value) for (name, part), value in before.items())


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_truncated_files_are_refused(path, keep):
    content = path.read_bytes()
    path.write_bytes(content[:keep])
    refused("not a whole safetensors file", Statistics.load, path)


def changed(path, tensors=None, metadata=None):
    with safe_open(path, framework="pt") as file:
        old = dict(file.metadata())
    save_file({**load_file(path), **(tensors or {})}, path, {**old, **(metadata or {})})


def test_changed_files_are_refused(path):
    name = "model.layers.0.self_attn.q_proj"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(LoraInitError, match="is not what was written"):
        back = Statistics.load(path)
        [back[layer] for layer in back]

    changed(path, {f"{name}/components": torch.zeros(4, 32)})
    with pytest.raises(LoraInitError, match="is not what was written"):
        Statistics.load(path)[name]
    changed(path, {f"{name}/explained_variance": torch.ones(4, dtype=torch.float64)})
    refused("is not what was written", Statistics.load, path)
    changed(path, metadata={"header": "{}"})
    refused("its header is not what was written", Statistics.load, path)


def test_other_formats_and_versions_are_refused(path, tmp_path):
    for version in (FORMAT_VERSION - 1, FORMAT_VERSION + 1):
        changed(path, metadata={"version": str(version)})
        refused(f"version '{version}' of its format, this lora_init reads 2. Update", Statistics.load, path)
    save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors")
    refused(r"of format None, expected 'lora_init.statistics'", Statistics.load, tmp_path / "other.safetensors")
    refused("is not a file", Statistics.load, tmp_path)


def test_a_write_that_fails_leaves_the_old_file_and_no_other(stats, path, monkeypatch):
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    refused("cannot be written: No space left on device", stats.save, path)
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def rewritten(path, change, tensors=None):
    """The file with another header or other tensors, its digests right."""
    file = TensorFile(path, FORMAT, FORMAT_VERSION)
    header = {key: value for key, value in file.header.items() if key != "digests"}
    change(header)
    tensors = {n: file.tensor(n) for n in file.header["digests"]} | (tensors or {})
    return write_tensors(path, FORMAT, FORMAT_VERSION, header, tensors)


@pytest.mark.parametrize("change", [
    lambda header: header["provenance"].update(seconds=3),
    lambda header: header["provenance"].update(notes=[1]),
    lambda header: header["unsupported"].update(a=None),
    lambda header: header.update(layers=[]),
    lambda header: header["layers"]["model.layers.0.mlp.down_proj"].__setitem__(2, 32),
    lambda header: header["groups"]["model.layers.0.mlp.down_proj"].update(total_variance="x"),
    lambda header: header["groups"]["model.layers.0.mlp.down_proj"].update(total_variance=-1.0),
    lambda header: header["groups"]["model.layers.0.mlp.down_proj"].update(total_variance=math.inf),
    lambda header: header["groups"]["model.layers.0.mlp.down_proj"].update(n_samples=-5),
    lambda header: header["layers"]["model.layers.0.mlp.down_proj"].append({"experts": 20_000_000}),
    lambda header: header["layers"]["model.layers.0.mlp.down_proj"].append({"kernel": [3, 3]}),
    lambda header: header["layers"]["model.layers.0.mlp.down_proj"].__setitem__(3, 2**31 - 1),
    lambda header: header["sizes"]["model.layers.0.mlp.down_proj"].__setitem__(0, -1.0),
    lambda header: header["sizes"]["model.layers.0.mlp.down_proj"].__setitem__(1, math.inf),
    lambda header: header["sizes"].update(elsewhere=[1.0, 1.0]),
])  # fmt: skip
def test_parts_that_do_not_fit_are_refused(path, change):
    refused("is not what was written", Statistics.load, rewritten(path, change))


@pytest.mark.parametrize(("part", "change"), [
    ("mean", lambda mean: mean * math.nan),
    ("explained_variance", lambda along: -along),
    ("components", lambda rows: rows * 1e30),
    ("components", lambda rows: rows.int()),
    ("components", lambda rows: rows[1:].clone()),
    ("components", lambda rows: rows[:, 1:].contiguous()),
    ("components", lambda rows: rows * 1.01),
    ("explained_variance", lambda along: along[:, None].clone()),
    ("explained_variance", lambda along: along[1:].clone()),
])  # fmt: skip
def test_numbers_that_no_pass_can_have_found_are_refused(path, part, change):
    name = f"model.layers.0.self_attn.q_proj/{part}"
    with pytest.raises(LoraInitError, match=r"q_proj.* is not what was written"):
        Statistics.load(rewritten(path, lambda header: None, {name: change(load_file(path)[name])}))


@pytest.mark.parametrize("header", ["no JSON", "[" * 100_000])
def test_a_header_that_is_no_json_is_refused(path, header):
    changed(path, metadata={"header": header, "sha256": hashlib.sha256(header.encode()).hexdigest()})
    refused("header", Statistics.load, path)


def test_a_notebook_shows_the_table_in_four_digits():
    stats = collect(tiny_llama(), batches_for("llama"), rank=2, progress=False)
    shown, table = stats._repr_html_(), stats.to_pandas()
    assert "&lt;" not in shown and shown.startswith(f"<p>{stats!r}</p>")
    for value in table["total_variance"]:
        assert f"<td>{value:.4g}</td>" in shown
    assert 'border="1"' not in shown


def test_a_notebook_shows_the_first_and_the_last_of_many_layers():
    names, one = [f"layer{i}" for i in range(30)], made_by_hand()
    many = replace(one, group_of=dict.fromkeys(names, "q"), targets=dict.fromkeys(names, one.targets["q"]))
    found = [name for name in names if f"<th>{name}</th>" in many._repr_html_()]
    assert found == [*names[:10], *names[-10:]]


def made_by_hand(**about):
    spectrum = Spectrum(torch.eye(4)[:2], torch.tensor([3.0, 1.0]).double(), 8.0, torch.zeros(4), 9)
    targets = {name: Target(name, "Linear", 4, width) for name, width in (("q", 4), ("k", 2))}
    known = dict(model_id="m", model_class="Model", fingerprint="f", target_modules=[], n_batches=2, n_samples=1234)
    return Statistics({"q": spectrum}, {"q": "q", "k": "q"}, targets, Provenance(**known | about), {"q": 0.25})


def test_a_table_has_what_is_known_of_each_layer():
    stats = made_by_hand()
    common = dict(kind="Linear", in_features=4, group="q", n_components=2, n_samples=9, total_variance=8.0)
    common |= dict(captured=0.5, held_out=0.25)
    rows = [dict(layer="q", out_features=4, **common), dict(layer="k", out_features=2, **common)]
    assert stats.to_pandas().reset_index().to_dict("records") == rows
    assert repr(stats) == "Statistics(2 layers of Model, 1 inputs, 2 batches, 1,234 rows)"
    assert repr(replace(stats, gradients={"q": None})).endswith("1,234 rows, gradients)")
    assert math.isnan(replace(stats, held_out={}).to_pandas()["held_out"]["k"])
    assert stats.total_variance("k") == 8.0 and list(stats) == ["q", "k"] and len(stats) == 2


@pytest.mark.parametrize(("settings", "rho"), [
    ({}, None), ({"rho": None}, None), ({"rho": "2"}, None), ({"rho": 0.5}, None), ({"rho": 1}, 1.0),
    ({"rho": 2.5}, 2.5), ({"rho": 1e6}, None), ({"rho": math.nan}, None),
])  # fmt: skip
def test_the_rho_of_a_pass_is_a_number_of_at_least_one(settings, rho):
    assert made_by_hand(settings=settings).provenance.rho == rho


def test_a_model_is_named_by_class_and_id():
    assert made_by_hand().provenance.model == "Model m" and made_by_hand(model_id="").provenance.model == "Model"


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0, math.nan, None])
def test_what_new_rows_showed_comes_back(share, tmp_path):
    stats = replace(made_by_hand(), held_out={} if share is None else {"q": share})
    found = Statistics.load(stats.save(tmp_path / "stats.st"))
    assert found.held_out["q"] == share or (
        math.isnan(found.held_out["q"]) and share in (None, stats.held_out.get("q"))
    )
    assert found.path == tmp_path / "stats.st" and stats.path is None and found.sizes == found.gradients == {}


def test_experts_with_enough_rows_have_their_own():
    """Two rows for each component are enough; one that the router sent none has none."""
    groups = {"x": spectrum_of(8, 2)} | {expert_group("x", i): spectrum_of(8, 2, n=n) for i, n in enumerate((4, 3, 9))}
    target = Target("x", "Parameter", 8, 6, experts=4)
    of_x = Statistics(groups, {"x": "x"}, {"x": target}, Provenance("", "", "", []))
    assert [of_x.rows_of_expert("x", i) for i in range(4)] == [4, 3, 9, 0]
    assert of_x.experts_with_few_rows("x") == [1, 3]
    expected = [groups["x.0"], groups["x"], groups["x.2"], groups["x"]]
    for found, own in zip(of_x.of_experts("x"), expected, strict=True):
        assert torch.equal(found.components, own.components) and found.n_samples == own.n_samples
    more = Statistics(
        groups | {"y": groups["x"]}, {"x": "x", "y": "y"}, {"x": target, "y": Target("y", "P", 8, 6, experts=2)},
        of_x.provenance,
    )  # fmt: skip
    assert notes_on_experts(more) == [
        "x and 1 other layer: 2 of 2 to 4 experts read fewer than 4 rows and start from the rows of all experts: 1, 3 "
        "in the first."
    ]
    assert notes_on_experts(made_by_hand()) == []
