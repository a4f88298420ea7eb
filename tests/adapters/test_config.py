"""A LoraConfig and the keywords that say the same give the same adapter; what it cannot say is refused by its name."""

from dataclasses import fields, replace

import pytest
import torch
from peft import LoHaConfig, LoraConfig, get_peft_model

from lora_init import allocate_ranks, build_adapter, collect, initialize
from lora_init.adapters.config import _DROPPED, _SELECTION, check_agreement, read_adapter, read_config, read_config_for
from lora_init.adapters.init_config import InitConfig, Shape
from lora_init.adapters.peft_model import adapter_layers
from lora_init.layers.targets import find_targets
from tests.conftest import batches_for, refused, tiny_llama
from tests.layers.made import BOTH, mixtral
from tests.versions import needs_experts_by_peft

SHAPE = dict(lora_alpha=9, lora_dropout=0.1, use_rslora=True, modules_to_save=["lm_head"])
# What selects layers in PEFT's words, and a list of names that selects the same ones.
SELECTIONS = {
    "names": (dict(target_modules=["q_proj", "up_proj"]), ["q_proj", "up_proj"]),
    "all but": (dict(target_modules="all-linear", exclude_modules=["k_proj"]), None),
    "a block": (
        dict(target_modules=["q_proj", "up_proj"], layers_to_transform=[1]),
        ["1.self_attn.q_proj", "1.mlp.up_proj"],
    ),
    "a pattern": (dict(target_modules=r".*\.0\..*_proj", exclude_modules=r".*down_proj"), None),
    "PEFT's own": ({}, ["q_proj", "v_proj"]),
}


def configured(**selection):
    return LoraConfig(r=3, task_type="CAUSAL_LM", **SHAPE | selection)


def llama():
    torch.manual_seed(0)
    return tiny_llama()


def settings(config):
    # The origin names the layers as they were asked for.
    return {name: value for name, value in vars(config).items() if name not in ("auto_mapping", "runtime_config")}


@pytest.fixture(scope="module")
def stats():
    return collect(tiny_llama(), batches_for("llama", 4), rank=3, rho=2.0, task_type="CAUSAL_LM")


def selected_by_peft(selection):
    return list(adapter_layers(get_peft_model(tiny_llama(), configured(**selection))))


@pytest.mark.parametrize("selection", [chosen for chosen, _ in SELECTIONS.values()][:4], ids=[*SELECTIONS][:4])
def test_build_adapter_takes_a_config_for_the_keywords(selection, stats):
    config, names = configured(**selection), selected_by_peft(selection)
    before = {**vars(config)}
    others = [name for name in stats if name not in names]
    for ranks, spelled in ((None, allocate_ranks(stats, rank=3, rho=1, exclude=others)), (3, dict.fromkeys(names, 3))):
        wanted = build_adapter(stats, spelled, seed=1, **SHAPE)
        for given in ({}, SHAPE):
            got = build_adapter(stats, ranks, seed=1, config=config, **given)
            assert got.ranks == wanted.ranks and set(got.weights) <= set(names)
            assert all(torch.equal(x, y) for n in names for x, y in zip(got.weights[n], wanted.weights[n], strict=True))
            assert settings(got.to_peft_config()) == settings(wanted.to_peft_config())
    assert vars(config) == before


def test_rank_0_may_be_given_to_layers_that_a_config_does_not_select(stats):
    ranks = {"model.layers.0.self_attn.q_proj": 3, "model.layers.0.mlp.up_proj": 0}
    found = build_adapter(stats, ranks, config=LoraConfig(r=2, lora_alpha=9, target_modules=["q_proj"]))
    assert [*found.weights] == ["model.layers.0.self_attn.q_proj"]


def test_a_config_that_names_no_layers_selects_those_of_the_statistics(stats):
    config = LoraConfig(r=3, lora_alpha=16)
    assert build_adapter(stats, config=config).ranks == build_adapter(stats, 3).ranks


@needs_experts_by_peft
def test_a_config_selects_fused_experts_by_the_names_of_parameters():
    stats = collect(mixtral(), batches_for("llama", 2), ["q_proj"], rank=2, target_parameters=BOTH)
    experts = [name for name in stats if ".experts." in name]
    assert len(experts) == 4 and len(stats) == 6
    first = ["layers.0.mlp.experts.gate_up_proj"]
    for config, expected in (
        (LoraConfig(r=2, target_parameters=BOTH), set(experts)),
        (LoraConfig(r=2, target_parameters=["experts.down_proj"]), {name for name in experts if "down" in name}),
        (LoraConfig(r=2, target_modules=["q_proj"], target_parameters=first), {*stats} - {*experts} | {experts[0]}),
        (LoraConfig(r=2, target_modules=["q_proj"]), {*stats} - {*experts}),
        (LoraConfig(r=2), {*stats}),
    ):
        assert {*build_adapter(stats, 2, config=config).weights} == expected


@needs_experts_by_peft
def test_a_config_of_experts_alone_selects_no_layer_by_name():
    found = read_config(mixtral(), LoraConfig(r=2, target_modules=[], target_parameters=BOTH), InitConfig())
    assert found.layers.target_modules == [] and set(found.layers.target_parameters or ()) == set(BOTH)


REFUSED = [
    (configured(), dict(lora_alpha=16), "^lora_alpha=16: config decides that and says 9"),
    (configured(), dict(use_dora=True), "^use_dora=True: config decides that and says False"),
    (configured(), dict(ranks=4), r"^ranks are 4 on average, and config says r=3\. "),
    (configured(target_modules=["q_proj"]), dict(ranks={"model.layers.0.mlp.up_proj": 3}), "config does not select it"),
    (
        configured(target_modules=["q_proj", "nowhere"]),
        {},
        "^config selects 'nowhere', of which the statistics have no",
    ),
    (configured(target_modules=r"model\.nowhere"), {}, "^config selects none of the 14 layers"),
    (configured(bias="lora_only"), {}, r"^config sets bias, which build_adapter\(\) decides itself or cannot keep"),
    (configured(lora_bias=True), {}, "^config sets lora_bias, which"),
    (configured(alpha_pattern={"q_proj": 2}), {}, "^config sets alpha_pattern, which"),
    (configured(init_lora_weights="pissa"), {}, "^config sets init_lora_weights='pissa': method= decides that"),
    (LoraConfig(task_type="SEQ_CLS"), {}, "^config says task_type='SEQ_CLS', and the statistics were collected for"),
    ({"r": 3}, {}, "^config=dict: a LoraConfig of PEFT is expected"),
]


@pytest.mark.parametrize(("config", "options", "words"), REFUSED)
def test_what_a_config_cannot_say_to_build_adapter_is_one_line(config, options, words, stats):
    refused(words, build_adapter, stats, config=config, **options)


# A value of each field that is neither kept nor dropped.
SET = {
    "bias": "all", "revision": "v2", "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 2},
    "megatron_config": {"tensor_model_parallel_size": 1},
    "trainable_token_indices": [1], "lora_bias": True, "alora_invocation_tokens": [1], "use_qalora": True,
    "qalora_group_size": 8, "layer_replication": [(0, 2)], "ensure_weight_tying": True, "use_bdlora": object(),
    **dict.fromkeys(
        ["eva_config", "corda_config", "lora_ga_config", "velora_config", "monteclora_config", "arrow_config",
         "kasa_config"], object()),
    "loftq_config": {"loftq_bits": 4},
}  # fmt: skip


def test_each_field_of_a_config_is_kept_or_refused_or_known_to_be_dropped():
    """A field that PEFT adds is refused if it is set, until someone decides here."""
    kept = {*Shape.of_peft, *_SELECTION, *_DROPPED, "init_lora_weights"}
    assert {field.name for field in fields(LoraConfig)} <= kept | SET.keys() and not kept & SET.keys()


@pytest.mark.parametrize("name", [field.name for field in fields(LoraConfig) if field.name in SET])
def test_what_cannot_be_kept_is_refused_by_its_name_at_both_entrances(name, stats):
    config = configured()
    setattr(config, name, SET[name])  # some would be refused by PEFT without others beside them
    refused(
        rf"^config sets {name}, which initialize\(\) decides",
        initialize,
        llama(),
        batches_for("llama", 4),
        config=config,
    )
    refused(f"^config sets {name}, which build_adapter", build_adapter, stats, config=config)


@pytest.mark.parametrize(("given", "configured", "agree"), [
    (["q_proj", "k_proj"], {"k_proj", "q_proj"}, True),
    (("lm_head",), ["lm_head", "embed_tokens"], False),
    (None, [], True),
    ((), None, True),
    (16, 16.0, True),
    (16, 8, False),
    (0, None, False),
    ("", None, False),
    ("q", ["q"], False),
])  # fmt: skip
def test_an_argument_agrees_with_a_config_that_means_the_same(given, configured, agree):
    if agree:
        check_agreement({"name": given}, {"name": configured, "other": 1}, "config")
    else:
        said = refused(".", check_agreement, {"name": given}, {"name": configured}, "whose")
        assert said == f"name={given!r}: whose decides that and says {configured!r}. Leave it out here."


def test_a_config_is_read_as_options_and_leaves_the_model_and_itself_as_they_were():
    model, config = llama(), configured(target_modules="all-linear", exclude_modules=["k_proj"])
    before = {name: id(module) for name, module in model.named_modules()}
    options = InitConfig().with_options(whiten=True, seed=5, task_type="SEQ_CLS")
    found = read_config(model, config, options)
    assert {name: id(module) for name, module in model.named_modules()} == before
    assert config.target_modules == "all-linear" and config.exclude_modules == {"k_proj"}
    assert [found.shape, found.ranks.rank, found.run] == [Shape(**SHAPE, whiten=True), 3, options.run]
    assert found.layers.task_type == "CAUSAL_LM" and found.layers.target_parameters is None
    names = find_targets(llama(), found.layers.target_modules).layers
    assert {name.rpartition(".")[2] for name in names} == {
        "q_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    }
    assert len(names) == 12
    config.task_type = None
    assert read_config(model, config, options).layers.task_type == "SEQ_CLS"


def test_a_config_that_does_not_fit_its_model_is_refused_in_one_line():
    config = LoraConfig(target_modules=["nowhere"])
    refused(
        "^config does not fit LlamaForCausalLM: Target modules .*nowhere.* not found",
        read_config,
        llama(),
        config,
        InitConfig(),
    )
    said = "^config does not fit LlamaForCausalLM: missing .*, unterminated subpattern"
    refused(said, read_config, llama(), LoraConfig(target_modules="("), InitConfig())
    refused("^config=str: a LoraConfig of PEFT is expected.$", read_config, llama(), "lora", InitConfig())
    config = LoraConfig(target_modules=["q_proj", "v_proj"])
    options = InitConfig.from_arguments("initialize()", None, exclude_modules=["v_proj"])
    refused("^exclude_modules=.*: config decides that and says None", read_config, llama(), config, options)


def test_the_heads_of_a_task_are_no_modules_to_save_of_ones_own(stats):
    config = LoraConfig(r=3, target_modules=["q_proj"], task_type="SEQ_CLS", modules_to_save=["lm_head", "score"])
    of_task = replace(stats, provenance=replace(stats.provenance, task_type="SEQ_CLS"))
    shape, selected = read_config_for(of_task, config, {})
    assert shape == dict(
        rank=3, lora_alpha=8, use_rslora=False, use_dora=False, lora_dropout=0.0, modules_to_save=["lm_head"]
    )
    assert selected == [name for name in stats if name.endswith("q_proj")]
    config.task_type = None  # then nobody else saves them
    assert read_config_for(of_task, config, {})[0]["modules_to_save"] == config.modules_to_save


def test_what_a_config_lists_must_be_collected_unless_it_is_left_out_again(stats):
    def selected(**settings):
        return read_config_for(stats, LoraConfig(**settings), {})[1]

    q = [name for name in stats if name.endswith("q_proj")]
    assert selected(target_modules=["q_proj", "lm_head"], exclude_modules=["lm_head"]) == q
    assert selected(target_modules=r".*q_proj|lm_head") == q  # an expression names no layer by itself
    for settings in (dict(target_modules=["q_proj", "lm_head"]), dict(target_parameters=["lm_head"])):
        words = "^config selects 'lm_head', of which the statistics have no layer. Collect with it.$"
        refused(words, read_config_for, stats, LoraConfig(**settings), {})


@pytest.mark.parametrize("kind", [LoraConfig, LoHaConfig])
def test_a_model_with_anything_but_one_lora_adapter_is_refused(kind):
    model = get_peft_model(
        llama(), LoraConfig(target_modules=["q_proj"]) if kind is LoraConfig else kind(target_modules=["q_proj"])
    )
    names = "default"
    if kind is LoraConfig:
        model.add_adapter("second", LoraConfig(target_modules=["q_proj"]))
        names = "default, second"
    kinds = {LoraConfig: "LORA", LoHaConfig: "LOHA"}
    words = (
        f"^the model has the adapters {names} .PeftType.{kinds[kind]}., and one LoRA adapter is expected. Begin with"
    )
    refused(words, read_adapter, model, InitConfig(), "it")


def test_what_an_adapter_on_a_model_decides_is_refused_beside_it():
    model = get_peft_model(llama(), LoraConfig(r=3, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    same = dict(rank=3, target_modules=["q_proj"], task_type="CAUSAL_LM", seed=4)
    found = read_adapter(model, InitConfig.from_arguments("f()", **same), "the adapter")
    assert (found.ranks.rank, found.run.seed) == (3, 4)
    for name, value in dict(rank=4, target_modules=["k_proj"], task_type=None, target_parameters=["experts"]).items():
        other = InitConfig.from_arguments("f()", **{name: value})
        refused(f"^{name}=.*: the adapter decides that and says ", read_adapter, model, other, "the adapter")


def test_arguments_that_say_what_a_config_says_are_taken_as_it_was_written():
    """PEFT writes the names of the layers in the place of "all-linear"."""
    config = configured(target_modules="all-linear", exclude_modules=["k_proj"])
    given = dict(target_modules="all-linear", exclude_modules=["k_proj"], rank=3)
    found = read_config(llama(), config, InitConfig.from_arguments("initialize()", **given))
    assert len(find_targets(llama(), found.layers.target_modules).layers) == 12
    assert found.layers.exclude_modules is None


@pytest.mark.parametrize("start", [True, "gaussian"])
def test_an_untrained_adapter_may_have_begun_by_a_start_of_peft(start):
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=start))
    assert read_adapter(model, InitConfig(), "the adapter").ranks.rank == 2
