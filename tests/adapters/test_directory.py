"""What an adapter directory says of itself."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from lora_init import build_adapter
from lora_init.adapters.directory import (
    AdapterDirectory,
    card_header,
    carried,
    carrying,
    form_of,
    hub_id,
    is_zero_update,
    start_digest,
    write_files,
    write_start,
)
from lora_init.starts.weights import LoraWeights
from tests.adapters.made import made_up_statistics
from tests.conftest import refused, tiny_llama


def test_the_digest_of_a_start_is_of_all_its_numbers_in_bfloat16():
    a, b = torch.randn(4, 8), torch.zeros(6, 4)
    one = start_digest({"q": LoraWeights(a, b)})
    assert start_digest({"q": LoraWeights(a.bfloat16().float(), b)}) == one
    a[3, 7] += 1.0
    assert len({one, start_digest({"q": LoraWeights(a, b)}), start_digest({"k": LoraWeights(a, b)})}) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_update_is_zero_to_the_rounding_that_its_numbers_have(dtype):
    """Columns of one orthogonal matrix, as in PEFT's "orthogonal", made in a type and saved in float32."""
    q = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))[0]
    full = q[:, :4] @ torch.randn(4, 16, dtype=torch.float64), torch.randn(16, 4, dtype=torch.float64) @ q[:, 4:].T
    a, b = (part.to(dtype).float() for part in full)
    small = 1.0 if dtype == torch.float16 else 2.0**-40  # which float16 has not
    assert is_zero_update(a, b) and is_zero_update(a * small, b)
    assert not is_zero_update(a, b + 0.01 * a.T)
    assert is_zero_update(a, b + 1e-4 * a.T) == (dtype != torch.float32)
    assert not is_zero_update(torch.randn(8, 16), torch.randn(16, 8))


def test_the_digest_of_a_start_is_the_one_that_records_have():
    """It stands in records: another way to compute it would recognize none of the starts that there are."""
    weights = {"q": LoraWeights(torch.eye(2), torch.zeros(3, 2)), "k": LoraWeights(torch.ones(1, 2), torch.ones(2, 1))}
    expected = "37d26c2faa7f9d42674c3d9905158c9c1f79461aa4d92e457d79b0c044e11500"
    assert start_digest(weights) == start_digest(dict(reversed(weights.items()))) == expected


P = "base_model.model."
A, B = (f"{P}q.lora_{letter}.weight" for letter in "AB")
ZERO, ONES = torch.zeros(3, 2), torch.ones(3, 2)


def adapter(folder, tensors=None, **config):
    """Write an adapter directory as PEFT does, of one layer without more words."""
    folder.mkdir(exist_ok=True)
    tensors = {A: torch.ones(2, 4), B: ONES} if tensors is None else tensors
    # Copies, since safetensors refuses tensors that share memory.
    write_files(
        folder,
        {name: one.contiguous().clone() for name, one in tensors.items()},
        {"peft_type": "LORA", "r": 2} | config,
    )
    return AdapterDirectory(folder)


@pytest.mark.parametrize(("config", "words"), [
    (dict(r=0), "r is 0, and a rank of at least 1 is expected."),
    (dict(r="2"), "r is '2', and a rank of at least 1 is expected."),
    (dict(rank_pattern=["q"]), r"rank_pattern is \['q'\], and a mapping is expected, to numbers."),
    (dict(rank_pattern={"q": "2"}), "rank_pattern is {'q': '2'}, and a mapping is expected, to numbers."),
    (dict(alpha_pattern={"q": 2, "k": None}), "alpha_pattern is {'q': 2, 'k': None}, and a mapping is expected, to nu"),
    (dict(auto_mapping="x"), "auto_mapping is 'x', and a mapping is expected, to numbers."),
])  # fmt: skip
def test_a_config_of_no_numbers_is_damaged(config, words, tmp_path):
    refused(f"adapter/adapter_config.json is damaged: {words}", adapter, tmp_path / "adapter", **config)


def test_a_config_may_leave_out_what_it_has_no_word_for(tmp_path):
    found = adapter(tmp_path, r=1, rank_pattern=None, alpha_pattern={"q": 1.5}, auto_mapping={"a": "b"})
    assert (found.base, found.ranks, found.origin) == ("", {"q": 2}, {})
    assert adapter(tmp_path, base_model_name_or_path="org/name").base == "org/name"
    write_files(tmp_path, EXPERTS, {"peft_type": "LORA", "target_parameters": ["down_proj"]})
    assert AdapterDirectory(tmp_path).ranks["0.experts.down_proj"] == 8  # PEFT's default


def test_what_is_not_there_is_said_as_it_is(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    refused(
        f"link is a link to {tmp_path}/gone, which does not exist. Set it anew.$", AdapterDirectory, tmp_path / "link"
    )
    refused("^/nowhere: no such adapter directory.$", AdapterDirectory, "/nowhere")
    found = adapter(tmp_path / "adapter")
    (tmp_path / "adapter/adapter_model.safetensors").unlink()
    refused("adapter has no adapter_model.safetensors. Only adapters in safetensors files", lambda: found.shapes)
    (tmp_path / "adapter/adapter_model.safetensors").symlink_to("gone")
    refused("safetensors is a link to gone, which does not exist. Download it again.$", lambda: found.shapes)
    adapter(tmp_path / "blobs")
    (tmp_path / "adapter/adapter_model.safetensors").unlink()
    (tmp_path / "adapter/adapter_model.safetensors").symlink_to(tmp_path / "blobs/adapter_model.safetensors")
    assert AdapterDirectory(tmp_path / "adapter").layers == ["q"]  # as in the cache of the hub
    (tmp_path / "link").unlink()
    (tmp_path / "link").symlink_to(tmp_path / "adapter")
    assert AdapterDirectory(tmp_path / "link").config == found.config
    refused("holds an adapter of type IA3; only LORA is read.$", adapter, tmp_path / "other", peft_type="IA3")


EXPERTS = {
    f"{P}0.experts.lora_A.weight": torch.ones(12, 4), f"{P}0.experts.lora_B.weight": torch.ones(5, 12),
    f"{P}0.experts.base_layer.lora_A.weight": torch.ones(8, 4),
    f"{P}0.experts.base_layer.lora_B.weight": torch.ones(5, 8),
}  # fmt: skip


@pytest.mark.parametrize(("tensors", "config", "layers", "ranks"), [
    ({A: torch.ones(3, 4), B: torch.ones(5, 3), f"{P}head.weight": ONES, "k.lora_A.weight": ONES}, {}, ["q"], {"q": 3}),
    ({f"{P}e.lora_embedding_A": ONES, f"{P}e.lora_embedding_B": ONES}, {}, [], {}),
    (EXPERTS, dict(target_parameters=["experts.gate_up_proj", "experts.down_proj"], rank_pattern={".*down_proj": 3}),
     ["0.experts", "0.experts.base_layer"], {"0.experts.gate_up_proj": 2, "0.experts.down_proj": 3}),
    ({key: one for key, one in EXPERTS.items() if "base_layer" not in key},
     dict(target_parameters=["experts.gate_up_proj", "experts.down_proj"], rank_pattern={".*down_proj": 3}),
     ["0.experts"], {"0.experts.down_proj": 3}),
    (EXPERTS, dict(target_parameters=["down_proj", "gate_up_proj"], r=4),
     ["0.experts", "0.experts.base_layer"], {"0.experts.gate_up_proj": 4, "0.experts.down_proj": 4}),
    (EXPERTS, dict(target_parameters=["1.experts.down_proj", "0.experts.down_proj"]),
     ["0.experts", "0.experts.base_layer"], {"0.experts.down_proj": 2, "0.experts.base_layer": 8}),
    ({A: torch.ones(3, 4), B: torch.ones(5, 3)}, dict(target_parameters=["weight", "k.weight"]), ["q"], {"q": 3}),
    ({A: torch.ones(6, 4), B: torch.ones(5, 6)}, dict(target_parameters=["q.weight"]), ["q"], {"q.weight": 2}),
    (EXPERTS, dict(target_parameters=None), ["0.experts", "0.experts.base_layer"],
     {"0.experts": 12, "0.experts.base_layer": 8}),
])  # fmt: skip
def test_layers_and_ranks_are_read_from_the_names_and_shapes_in_the_file(tensors, config, layers, ranks, tmp_path):
    found = adapter(tmp_path, tensors, **config)
    assert (sorted(found.layers), found.ranks) == (layers, ranks)
    assert found.shapes == {name: list(tensor.shape) for name, tensor in tensors.items()}
    assert found.header == {name: (list(tensor.shape), "F32") for name, tensor in tensors.items()}
    read = found.tensors()
    assert read.keys() == tensors.keys() and all(torch.equal(read[name], one) for name, one in tensors.items())


# Of two factors with no zeros the product is zero: the columns of B meet no row of A.
CROSSED = {A: torch.tensor([[1.0, 2.0], [1.0, 2.0]]), B: torch.tensor([[1.0, -1.0], [2.0, -2.0]])}


@pytest.mark.parametrize(("tensors", "config", "adds_nothing", "has_zeros"), [
    ({A: ONES.T, B: ZERO}, {}, True, True),
    ({A: ZERO.T, B: ONES}, {}, True, True),
    ({A: ONES.T, B: ONES}, {}, False, False),
    ({A: torch.eye(2, 4), B: torch.eye(3, 2)}, {}, False, False),
    (CROSSED, {}, True, False),
    (CROSSED, dict(target_parameters=["q.weight"]), False, False),
    ({A: ONES.T, B: ZERO, f"{P}k.lora_A.weight": ONES.T, f"{P}k.lora_B.weight": ONES}, {}, False, False),
    ({f"{P}e.lora_embedding_A": ZERO, f"{P}e.lora_embedding_B": ONES}, {}, True, True),
    ({f"{P}e.lora_embedding_A": ONES, f"{P}e.lora_embedding_B": ONES}, {}, False, False),
    ({B: ZERO}, {}, True, True),
    ({B: ONES}, {}, False, False),
    ({A: ZERO.T}, {}, False, False),  # nothing is known without a B
    ({}, {}, False, False),
])  # fmt: skip
def test_an_adapter_adds_nothing_where_the_product_of_each_layer_is_zero(
    tensors, config, adds_nothing, has_zeros, tmp_path
):
    found = adapter(tmp_path, tensors, **config)
    assert (found.adds_nothing, found.has_zeros) == (adds_nothing, has_zeros)
    assert (found.is_start, found.is_untrained) == (False, adds_nothing)


def test_factors_that_cannot_be_multiplied_are_no_update_of_zero():
    for a, b in ((None, ONES), (ONES, ONES), (ONES[0], ONES), (ONES.T, ONES[:, 0]), (ONES.T[None], ONES)):
        assert not is_zero_update(a, b)
    assert is_zero_update(None, ZERO) and is_zero_update(ZERO[0], ONES)


def test_values_that_are_none_are_refused_by_their_name(tmp_path):
    found = adapter(tmp_path, {A: ONES.T, B: torch.tensor([[1.0, torch.inf]])})
    refused(f"adapter_model.safetensors: {B} has NaN or infinite numbers, as after a training", found.check_values)
    refused("adapter_model.safetensors holds no tensors. Save the adapter again.$", adapter(tmp_path, {}).check_values)
    assert AdapterDirectory(tmp_path).tensors() == {} and adapter(tmp_path).check_values() is None


ORIGIN = {"method": "lora-ga", "rank": 2, "error_size": 1.5}


@pytest.mark.parametrize(("origin", "config", "changed_by", "error_size"), [
    ({}, {}, "", 0.0),
    (ORIGIN, {}, "lora-ga", 1.5),
    (ORIGIN, dict(r=4), "", 0.0),  # converted
    (ORIGIN | {"method": "eva"}, {}, "", 1.5),
    (ORIGIN | {"method": "theirs", "corrects_base": True}, {}, "theirs", 1.5),
    (ORIGIN, dict(init_lora_weights="gaussian"), "", 1.5),
    (ORIGIN | {"method": "eva"}, dict(init_lora_weights="pissa_niter_4"), "pissa_niter_4", 1.5),
    ({"method": "lora-ga"}, dict(init_lora_weights=True), "lora-ga", 0.0),
])  # fmt: skip
@pytest.mark.parametrize("task_type", ["CAUSAL_LM", None])
def test_what_changed_the_base_is_known_from_the_config_alone(
    origin, config, changed_by, error_size, task_type, tmp_path
):
    found = adapter(tmp_path, **(carrying(origin, task_type) if origin else {}), **config)
    assert (found.origin, found.base_change, found.error_size) == (origin, changed_by, error_size)
    if changed_by:
        words = f"began as {changed_by}, which changes the base weights, so it does not fit the plain base. `lora"
        refused(words, found.check_fits_plain_base)
    else:
        found.check_fits_plain_base()


@pytest.mark.parametrize(("config", "origin"), [
    ({}, {}),
    (dict(auto_mapping=None, megatron_core="megatron.core"), {}),
    (dict(auto_mapping={"base_model_class": "Net"}, megatron_core='{"lora_init": {"seed": 3}}'), {"seed": 3}),
    (dict(auto_mapping={"lora_init": {"seed": 1}}, megatron_core='{"lora_init": {"seed": 3}}'), {"seed": 1}),
    (dict(auto_mapping={"lora_init": "text"}), {}),
    (dict(megatron_core='["lora_init"]'), {}),
    (dict(auto_mapping={"lora_init": {"provenance": "text"}}), {}),
    (dict(auto_mapping={"lora_init": {"provenance": {"seed": 2}}}), {"provenance": {"seed": 2}}),
])  # fmt: skip
def test_an_origin_is_read_from_where_it_was_put_and_nowhere_else(config, origin):
    assert carried(config) == origin


@pytest.mark.parametrize(("tensors", "config", "changes"), [
    ({A: ONES.T, B: ONES}, {}, False),
    ({f"{P}e.lora_embedding_A": ONES, f"{P}q.lora_magnitude_vector": ONES}, dict(init_lora_weights=True), False),
    ({A: ONES.T, f"{P}head.weight": ONES}, {}, True),
    ({A: ONES.T, B: ONES}, dict(init_lora_weights="gaussian"), True),
])  # fmt: skip
def test_loading_changes_weights_by_its_start_or_by_whole_modules(tensors, config, changes, tmp_path):
    assert adapter(tmp_path, tensors, **config).changes_weights is changes


@pytest.mark.parametrize(("keys", "form"), [
    (["lora_unet_down_0.lora_down.weight"], "holds an adapter in kohya's form"),
    (["down.lora_down.weight"], "holds an adapter in kohya's form"),
    (["lora_unet_0.alpha"], "holds an adapter in kohya's form"),
    (["lora_te_0.alpha", "x.weight"], "holds an adapter in kohya's form"),
    (["unet.down.0.lora_A.weight"], "holds an adapter in diffusers' form"),
    (["text_encoder.0.lora_B.weight"], "holds an adapter in diffusers' form"),
    (["single_transformer_blocks.0.lora_A.weight"], "holds an adapter in diffusers' form"),
    (["unet.down.0.weight"], "holds no lora_A, but weights of a whole model"),
    ([A, f"{P}unet.down.weight", f"{P}transformer_blocks.0.lora_A.weight"], ""),
    (["q.lora_A.weight"], ""),
])  # fmt: skip
def test_whose_names_these_are_is_known_by_their_beginnings(keys, form):
    assert form_of(keys) == form


@pytest.mark.parametrize(("files", "form"), [
    (["adapter_model.safetensors.incomplete", "config.json"], " and is half a download"),
    (["x.part"], " and is half a download"),
    (["x.crdownload"], " and is half a download"),
    (["config.json"], " and is a checkpoint of a whole model"),
    (["pytorch_model.bin"], " and is a checkpoint of a whole model"),
    (["notes.txt"], ""),
])  # fmt: skip
def test_a_directory_that_is_no_adapter_is_told_by_its_files(files, form, tmp_path):
    for file in files:
        (tmp_path / file).touch()
    words = f"{tmp_path} has no adapter_config.json{form}, so it is not an adapter directory. PEFT's save_pretrained"
    refused(f"^{words}.. writes one.$", AdapterDirectory, tmp_path)


@pytest.mark.parametrize(("given", "header"), [
    (("org/name", "CAUSAL_LM"),
     "base_model: org/name\nlibrary_name: peft\npipeline_tag: text-generation\ntags:\n- base_model:adapter:org/name\n"),
    (("org/name", "SEQ_CLS", False), "base_model: org/name\nlibrary_name: transformers\ntags:\n"),
    ((None, None), "library_name: peft\ntags:\n"),
    (("/", "SEQ_CLS"), "library_name: peft\ntags:\n"),
])  # fmt: skip
def test_a_card_begins_with_what_the_hub_reads(given, header):
    assert card_header(*given) == f"---\n{header}- lora\n- lora_init\n---\n"


def test_a_path_is_no_id_of_the_hub(tmp_path):
    assert [hub_id(name) for name in ("org/name", str(tmp_path), "", None)] == ["org/name", None, None, None]


def test_a_start_is_written_with_its_record_and_known_by_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = {"peft_type": "LORA", "r": 2} | carrying({"method": "short"}, None)
    path = write_start("start", {A: torch.ones(2, 4), B: ONES}, config, {"method": "eva"}, "a card", False)
    assert path == tmp_path / "start" and (path / "README.md").read_text() == "a card"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert write_start("~/home", {B: ONES}, config, {}, "a card", False) == tmp_path / "home"
    files = {"README.md", "adapter_config.json", "adapter_model.safetensors", "lora_init.json"}
    assert {file.name for file in path.iterdir()} == files
    found = AdapterDirectory(path)
    assert found.is_start and found.is_untrained and not found.adds_nothing
    with safe_open(path / "adapter_model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}  # without which transformers reads no file
    record = json.loads((path / "lora_init.json").read_text())
    assert found.origin == record and record.pop("sha256").keys() == {"adapter_model.safetensors"}
    assert record == {"method": "eva"}
    save_file({A: torch.ones(2, 4), B: 2 * ONES}, path / "adapter_model.safetensors")  # as training does
    trained = AdapterDirectory(path)
    assert (trained.is_start, trained.is_untrained, trained.origin) == (False, False, {"method": "short"})


def test_what_is_no_adapter_is_named_by_the_first_file_that_tells(tmp_path):
    """A file without tensors tells nothing, so the next one is read."""
    (tmp_path / "notes.txt").write_text("a text")
    refused("notes.txt has no adapter_config.json and is a file, so it", AdapterDirectory, tmp_path / "notes.txt")
    save_file({}, tmp_path / "a.safetensors")
    refused("adapter_config.json and is a file, so it", AdapterDirectory, tmp_path / "a.safetensors")
    refused("has no adapter_config.json, so it is not", AdapterDirectory, tmp_path)
    save_file({"lora_te_0.lora_down.weight": torch.ones(2)}, tmp_path / "b.safetensors")
    save_file({"model.layers.0.weight": torch.ones(2)}, tmp_path / "c.safetensors")
    refused("and holds an adapter in kohya's form", AdapterDirectory, tmp_path)


def test_a_converted_adapter_corrects_no_error_any_more(tmp_path):
    """Converting doubles the rank, by which it is known: the record of the start tells the rank of the start."""
    init = replace(
        build_adapter(made_up_statistics(tiny_llama(), ["q_proj"]), 2), errors={"q": (3.0, 1.0)}, error_size=2.5
    )
    init.save_pretrained(tmp_path / "start")
    assert AdapterDirectory(tmp_path / "start").error_size == 2.5
    path = tmp_path / "start" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"r": 4}))
    assert AdapterDirectory(tmp_path / "start").error_size == 0.0


@pytest.mark.parametrize("theirs", [None, 3, "", "GPT", "{", "[]", "{}", '{"lora_init": 3}', "null"])
def test_what_others_have_put_where_an_origin_travels_is_none(theirs):
    assert carried({"megatron_core": theirs}) == carried({"auto_mapping": theirs}) == carried({}) == {}


@pytest.mark.parametrize(
    ("task_type", "shapes", "n_labels"),
    [
        ("SEQ_CLS", {"score.weight": (3, 32)}, 3),
        ("SEQ_CLS", {"classifier.dense.weight": (32, 32), "classifier.out_proj.weight": (5, 32)}, 5),
        ("SEQ_CLS", {"classifier.weight": (50, 32), "pre_classifier.weight": (32, 32)}, 50),
        ("SEQ_CLS", {"score.weight": (32, 32)}, 32),
        ("TOKEN_CLS", {"classifier.weight": (7, 32), "classifier.bias": (7,)}, 7),
        ("SEQ_CLS", {"classifier.lora_A.weight": (2, 32)}, None),
        ("CAUSAL_LM", {"score.weight": (3, 32)}, None),
        (None, {}, None),
    ],
)
def test_the_classes_of_a_classifier_are_counted_by_its_head(task_type, shapes, n_labels, tmp_path):
    tensors = {f"base_model.model.{name}": torch.zeros(shape) for name, shape in shapes.items()}
    tensors["base_model.model.q.lora_A.weight"] = torch.zeros(2, 32)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "task_type": task_type}))
    assert AdapterDirectory(tmp_path).n_labels == n_labels
