"""What commands print of a result: each line in full, and what each fact of it adds to or takes from the others.

Where a sentence depends on something, it is printed here with and without it.
"""

import pytest

from lora_init.cli.views import show
from lora_init.keep.dialed import Dial
from tests.printed import changed, printed


def layer(shares, held_out, width=8):
    return dict(explained_variance_ratio=shares, held_out=held_out, in_features=width)


STATISTICS = dict(
    what="statistics", path="my s.safetensors", model_class="LlamaForCausalLM", model_id="tiny", fingerprint="abc",
    target_modules="all-linear", exclude_modules=None, data="chat", token_mask="attention", n_samples=1234, n_batches=5,
    stop_reason="converged", keeps=None, center=True, rank=4, seed=3, versions={"torch": "2.1", "peft": "0.19"},
    unsupported={}, notes=[], layers={
        "h.0.up": layer([0.5, 0.2, 0.1, 0.05, 0.05], 0.6), "h.1.up": layer([0.3, 0.2, 0.1, 0.05, 0.05], 0.4, 16),
        "h.0.down": layer([0.9], None),
    },
)  # fmt: skip
PLAN = dict(
    what="plan", path="plan.json", layers=dict.fromkeys(range(4)), provenance=None, policy="eva", asked="rank 8",
    totals=dict(layers=3, total_rank=24, parameters=12345, explained_variance=0.4567), budget={"unit": "rank"},
    ranks={"h.0.up": 8, "h.1.up": 16, "h.0.down": 0}, notes=[],
)  # fmt: skip
ADAPTER = dict(
    what="adapter", path="my adapter", base_model=None, task_type=None, rank=8, lora_alpha=16, use_rslora=False,
    use_dora=False, parameters=12345, ranks={"h.0.up": 8, "h.1.up": 4}, exported={}, origin=None, train=None, dial=None,
    serving="vLLM takes it.", base_change="", untrained=False, export="--engine vllm",
)  # fmt: skip
RUNS = dict(
    what="comparison", path="runs", facts="siqa, 60 steps", headline="1 compared.", answer="Take eva.",
    headroom="Some.", verdicts=[{"sentence": "eva is better."}], as_recommended=["As said."], equal_time=["In time."],
    forgetting=["Less."], data_needed=["More data."], caveats=["a caveat"], notes=["a note"],
    command="lora-init init 'my model' d", settings={"command": "lora-init compare m d"},
)  # fmt: skip
WHOLE = {
    "statistics": (STATISTICS, """
        file my s.safetensors: statistics of 3 layers
        model LlamaForCausalLM tiny
        fingerprint abc
        targets all-linear
        data chat
        tokens all but padding
        rows 1,234 in 5 batches, stopped: converged
        decomposition centered (PCA)
        made for rank 4 with seed 3
        made with torch 2.1, peft 0.19

        layers count d_in top 1 top 4 top 5 held out
        up 2 8/16 40.0% 75.0% 80.0% 50.0%
        down 1 8 90.0% 90.0% 90.0% -
        Next: lora-init init MODEL --statistics 'my s.safetensors' -o adapter"""),
    "plan": (PLAN, """
        file plan.json: plan for 3 of 4 layers
        policy eva, asked for rank 8
        rank 8 on average, 24 in all
        parameters 12,345
        explained 45.7% of a layer's variance on average
        model any
        data not described

        0 1
        up 8 16
        down ·
        Next: lora-init init MODEL --ranks plan.json -o adapter"""),
    "adapter": (ADAPTER, """
        directory my adapter: LoRA adapter of 2 layers
        base model not named
        task type none
        rank 6 on average, 4 to 8; r=8
        lora_alpha 16
        parameters 12,345
        start unknown: lora_init did not make it

        0 1
        up 8 4

        vLLM takes it.
        Next: lora-init export 'my adapter' --engine vllm -o 'my adapter-served'"""),
    "comparison": (RUNS, """
        directory runs: comparison of starts
        from siqa, 60 steps
        found 1 compared.
        answer Take eva.
        note: a caveat
        note: a note

        Some.
        eva is better.
        As said.
        In time.
        Less.
        More data.
        Next: lora-init init 'my model' d"""),
}  # fmt: skip


@pytest.mark.parametrize("kind", WHOLE)
def test_inspect_prints_each_line_in_its_place(kind):
    about, expected = WHOLE[kind]
    assert printed(show, about) == [line.strip() for line in expected.strip().splitlines()]


@pytest.mark.parametrize(("collected", "tops"), [
    (1, [1]), (4, [1, 4]), (17, [1, 4, 16, 17]), (300, [1, 4, 16, 64, 256, 300]),
])  # fmt: skip
def test_spectra_are_summed_up_at_powers_of_four_and_at_all_that_was_collected(collected, tops):
    heads = next(line for line in printed(show, STATISTICS | dict(layers={"h.0.up": layer([0.001] * collected, None)}))
                 if line.startswith("layers count"))  # fmt: skip
    assert heads == f"layers count d_in {' '.join(f'top {n}' for n in tops)} held out"


START = "start unknown: lora_init did not make it"
SAVE = "Next: name the base that it was trained on by --base, or save it again from the model that it was trained on"
NEXT = "Next: lora-init export 'my adapter' --engine vllm -o 'my adapter-served'"
BASED = NEXT.replace(" -o", " --base tiny -o")  # which the adapter does not name
TRAIN = "Next: train it as said above; then lora-init export TRAINED"
ORIGIN = dict(method="eva", seed=3, explained={"h.0.up": 0.5, "h.1.up": 0.2}, provenance=dict(data="chat", n_samples=10,
              n_batches=2, stop_reason="exhausted"))  # fmt: skip
OF_ORIGIN = ["data chat", "rows 10 in 2 batches, stopped: exhausted"]
CAPTURED = "captured median 35.0%, least 20.0% of a layer's variance"
INT4 = dict(quant_method="gptq", bits=4)
NF4 = dict(quant_method="bitsandbytes", load_in_4bit=True, bnb_4bit_quant_type="nf4")
INT8 = dict(quant_method="bitsandbytes", load_in_8bit=True)
CORRECTION = dict(
    errors={"a": (1.0, 0.5), "b": (2.0, 0.2), "c": (0.0, 0.0)},
    losses=dict(float=2.0, quantised=2.5, corrected=2.1), share_closed=0.8,
)  # fmt: skip
LOSSES = "loss 2 in float, 2.5 quantised, 2.1 corrected: 80% of the difference is closed"
ERRORS = (
    "error of layers 50% of the error of the quantized weights is left (median), 10% at least (b), 100% at most (c)"
)
FIT = dict(model_class="LlamaForCausalLM", base="tiny", engine=None, misfits=[], fits=True, tensors=8, lines=[],
           notes=["a note"], renames={})  # fmt: skip
DIALED = Dial.unmeasured("one strength, 0.8", {"h.0.up": 0.8, "h.1.up": 0.8}).to_dict()
DIALED |= {"picture": "my adapter/dial.png"}
NOISES = dict(a=0.1, b=0.4, c=0.3, d=0.2)
MERGE = dict(base="tiny", type="int8", statistics=False, divergence=None, arrives=0.987, noise=0.123,
             advice="Merge: all.", layers={name: {"noise": one} for name, one in NOISES.items()})  # fmt: skip
ARRIVES = "arrives 98.7% of the change, under 0.12 times as much noise, over all weights"
OF_MERGE = ["merge into tiny, rounded to int8", ARRIVES, "noisiest b 0.4, c 0.3, d 0.2", "advice Merge: all."]
DIVERGENCE = dict(merged=0.0123, base=0.456, tokens=44, computed_in="float32")
MEASURED = (
    "measured 0.012 nats a token from the adapter on its base, on 44 tokens; the base without it is 0.46 away; "
    "computed in float32, whatever is served"
)
INTRUDERS = dict(count=1234, of=5678, k=10, threshold=0.5, model="tiny", energy_share=0.25, skipped={"e": "Embedding"},
                 layers={"h.0.up": {"count": 3}, "h.1.up": {"count": 0}})  # fmt: skip
OF_INTRUDERS = [
    "intruders 1,234 of 5,678, the first 10 directions of each weight",
    "criterion |cosine| below 0.5 with every direction of the same weight of tiny",
    "energy 25.0% of the energy of these directions",
    "e (Embedding) has no singular vectors to compare.",
    "up 3 ·",
]


def misfit(kind, *lines, **more):
    misfits = [{"kind": kind, "where": "x"}, {"kind": kind, "where": "x"}, {"kind": kind, "where": "y"}]
    return {"fit": FIT | dict(fits=False, misfits=misfits, lines=[*lines]) | more}


NOTHING_KEPT = {"h.0.up": STATISTICS["layers"]["h.0.up"] | {"held_out": 0.0}}
MISFITS = "fits LlamaForCausalLM tiny: no: 2 names below"
CHANGES = {
    "excluded": (STATISTICS, dict(exclude_modules=["head"]), ["targets all-linear"],
                 ["targets all-linear without ['head']"]),
    "no words": (STATISTICS, dict(data=""), ["data chat"], ["data not described"]),
    "labels": (STATISTICS, dict(token_mask="labels"), ["tokens all but padding"], ["tokens those with a label"]),
    "nothing of held-out data": (STATISTICS, dict(layers=STATISTICS["layers"] | NOTHING_KEPT), [
        "up 2 8/16 40.0% 75.0% 80.0% 50.0%"], ["up 2 8/16 40.0% 75.0% 80.0% 20.0%"]),
    "halves": (STATISTICS, dict(keeps=0.87), ["rows 1,234 in 5 batches, stopped: converged"],
               ["rows 1,234 in 5 batches, stopped: converged; on other data the start would keep 87%"]),
    "not centered": (STATISTICS, dict(center=False), ["decomposition centered (PCA)"],
                     ["decomposition not centered (second moment)"]),
    "without spectrum": (STATISTICS, dict(unsupported={"embed": "Embedding"}, notes=["[b]one[/b]"]), [],
                         ["[b]one[/b]", "embed: no spectrum, Embedding."]),
    "by hand": (PLAN, dict(budget=None), ["policy eva, asked for rank 8"], ["policy by hand"]),
    "of statistics": (PLAN, dict(provenance=dict(model_class="Llama", model_id="tiny", data="chat"), notes=["a note"]),
                      ["model any", "data not described"], ["model Llama tiny", "data chat", "a note"]),
    "nothing": (PLAN, dict(totals=PLAN["totals"] | dict(layers=0, total_rank=0)),
                ["file plan.json: plan for 3 of 4 layers", "rank 8 on average, 24 in all"],
                ["file plan.json: plan for 0 of 4 layers", "rank 0 on average, 0 in all"]),
    "one layer": (PLAN, dict(totals=PLAN["totals"] | dict(layers=1, total_rank=8)),
                  ["file plan.json: plan for 3 of 4 layers", "rank 8 on average, 24 in all"],
                  ["file plan.json: plan for 1 of 4 layers", "rank 8 on average, 8 in all"]),
    "named": (ADAPTER, dict(base_model="tiny", task_type="SEQ_CLS"), ["base model not named", "task type none"],
              ["base model tiny", "task type SEQ_CLS"]),
    "rsLoRA": (ADAPTER, dict(use_rslora=True), ["lora_alpha 16"], ["lora_alpha 16 with rsLoRA"]),
    "DoRA": (ADAPTER, dict(use_dora=True), ["lora_alpha 16"], ["lora_alpha 16 with DoRA"]),
    "ours": (ADAPTER, dict(origin=ORIGIN), [START], ["start eva, seed 3", *OF_ORIGIN, CAPTURED]),
    "of no data": (ADAPTER, dict(origin=dict(method="random", seed=1)), [START],
                   ["start random, seed 1", "data not described", "rows 0 in None batches, stopped: None"]),
    "whitened": (ADAPTER, dict(origin=ORIGIN | dict(whiten=True)), [START],
                 ["start eva, whitened, seed 3", *OF_ORIGIN, CAPTURED]),
    "unit rows": (ADAPTER, dict(origin=ORIGIN | dict(unit_rows=True, explained={})), [START],
                  ["start eva, rows of length one, seed 3", *OF_ORIGIN]),
    "theirs": (ADAPTER, dict(origin=ORIGIN | dict(package="their-starts", explained={})), [START],
               ["start eva (their-starts), seed 3", *OF_ORIGIN]),
    "with a rate": (ADAPTER, dict(origin=ORIGIN | dict(explained={}), train="at 1e-3"), [START],
                    ["start eva, seed 3", "train at 1e-3", *OF_ORIGIN]),
    "nf4": (ADAPTER, dict(origin=dict(method="eva", seed=0, provenance=dict(quantisation=NF4, keeps=0.5))), [START],
            ["start eva, seed 0", "base quantized: bitsandbytes nf4", "data not described",
             "rows 0 in None batches, stopped: None; on other data the start would keep 50%"]),
    "corrected": (ADAPTER, dict(origin=ORIGIN | dict(correction=CORRECTION, explained={})), [START],
                  ["start eva, seed 3", LOSSES, ERRORS, *OF_ORIGIN]),
    "exported": (ADAPTER, dict(exported=dict(serve="vllm serve x", verify="lora-init verify x")), [START, NEXT],
                 ["start not kept by an export: see the adapter as it was trained", "Next: vllm serve x",
                  "then: lora-init verify x"]),
    "exported for no server": (ADAPTER, dict(exported=dict(serve="load it", verify="")), [START, NEXT],
                               ["start not kept by an export: see the adapter as it was trained", "Next: load it"]),
    "untrained": (ADAPTER, dict(untrained=True), [NEXT], ["Next: lora-init rate 'my adapter' DATA --steps 300"]),
    "no layers": (ADAPTER, dict(untrained=True, ranks={}),
                  ["directory my adapter: LoRA adapter of 2 layers", "rank 6 on average, 4 to 8; r=8", "0 1", "up 8 4",
                   NEXT],
                  ["directory my adapter: LoRA adapter of 0 layers", "rank 0 on average, 0 to 0; r=8",
                   "Next: train it; rates were measured for linear layers, and it has none"]),
    "to train": (ADAPTER, dict(untrained=True, train="t"), [NEXT], [f"{TRAIN} --engine vllm -o served"]),
    "to train for PEFT": (ADAPTER, dict(untrained=True, train="t", export=None), [NEXT],
                          ["Next: load it with PEFT, which alone takes it"]),
    "to train alone": (ADAPTER, dict(untrained=True, train="t", export=""), [NEXT], ["Next: train it as said above"]),
    "to train on a changed base": (ADAPTER, dict(untrained=True, train="t", base_change="lora-ga"), [NEXT],
                                   [f"{TRAIN} --start 'my adapter' --engine vllm -o served"]),
    "for PEFT": (ADAPTER, dict(export=None), [NEXT], ["Next: load it with PEFT, which alone takes it"]),
    "on a changed base": (ADAPTER, dict(export="", base_change="lora-ga"), [NEXT],
                          ["Next: lora-init export 'my adapter' --start DIRECTORY -o 'my adapter-served'"]),
    "dialed": (ADAPTER, dict(dial=DIALED), [], [
        "strength 0.8 in all layers", "chosen by one strength, 0.8", "measured on nothing: no data were given",
        "picture my adapter/dial.png"]),
    "intruders": (ADAPTER, dict(intruders=INTRUDERS), [], OF_INTRUDERS),
    "merged": (ADAPTER, dict(merge=MERGE), [], OF_MERGE),
    "merged where data are": (ADAPTER, dict(merge=MERGE | dict(statistics=True)), [], [
        OF_MERGE[0], ARRIVES.replace("over all weights", "where the data are"), *OF_MERGE[2:]]),
    "measured": (ADAPTER, dict(merge=MERGE | dict(divergence=DIVERGENCE)), [], [*OF_MERGE[:3], MEASURED, OF_MERGE[3]]),
    "fits": (ADAPTER, dict(fit=FIT), [NEXT], [
        "fits LlamaForCausalLM tiny: all 8 tensors are applied", "a note", BASED]),
    "fits the base that it names": (ADAPTER, dict(fit=FIT, base_model="tiny"), ["base model not named"], [
        "base model tiny", "fits LlamaForCausalLM tiny: all 8 tensors are applied", "a note"]),
    "fits another base": (ADAPTER, dict(fit=FIT, base_model="large"), ["base model not named", NEXT], [
        "base model large", "fits LlamaForCausalLM tiny: all 8 tensors are applied", "a note", BASED]),
    "fits an engine": (ADAPTER, dict(fit=FIT | dict(engine="ollama")), [NEXT], [
        "fits LlamaForCausalLM tiny in ollama: all 8 tensors are applied", "a note", BASED.replace("vllm", "ollama")]),
    "names": (ADAPTER, misfit("name", "x has no place", renames={"x": "y"}), [NEXT], [
        MISFITS, "misfit: x has no place", "a note", BASED.replace("--engine", "--rename --engine")]),
    "shapes": (ADAPTER, misfit("shape", "x is wide"), [NEXT], [
        MISFITS, "misfit: x is wide", "a note", SAVE]),
    "one name": (ADAPTER, misfit("shape", "x is wide", misfits=[{"kind": "shape", "where": "x"}] * 2), [NEXT], [
        MISFITS.replace("2 names", "1 name"), "misfit: x is wide", "a note", SAVE]),
    "another base": (ADAPTER, dict(base_model="my base") | misfit("shape"), ["base model not named", NEXT], [
        "base model my base", MISFITS, "a note", "Next: lora-init inspect 'my adapter' --base 'my base'"]),
    "its base": (ADAPTER, dict(base_model="tiny") | misfit("shape"), ["base model not named", NEXT], [
        "base model tiny", MISFITS, "a note", SAVE]),
    "old PEFT": (ADAPTER, misfit("shape", "PEFT 0.19.1"), [NEXT], [
        MISFITS, "misfit: PEFT 0.19.1", "a note", "Next: pip install 'peft>=0.19.1', and train it again"]),
    "only merged": (ADAPTER, misfit("export", "use --merge-into"), [NEXT], [
        MISFITS, "misfit: use --merge-into", "a note",
        "Next: lora-init export 'my adapter' --merge-into tiny -o 'my adapter-served'"]),
    "form and shapes": (ADAPTER, misfit("shape", "use --merge-into", "x is wide", misfits=[
        {"kind": kind, "where": where} for kind, where in (("export", "x"), ("shape", "y"))]), [NEXT], [
        MISFITS, "misfit: use --merge-into", "misfit: x is wide", "a note", SAVE]),
    "only PEFT": (ADAPTER, misfit("export", "no"), [NEXT], [
        MISFITS, "misfit: no", "a note", "Next: do as the misfit says, or serve it with PEFT"]),
    "engine and start": (ADAPTER, dict(base_change="lora-ga") | misfit("export", engine="vllm"), [NEXT], [
        MISFITS.replace("tiny", "tiny in vllm"), "a note",
        "Next: lora-init export 'my adapter' --start DIRECTORY --engine vllm -o 'my adapter-served'"]),
    "engine alone": (ADAPTER, misfit("engine", engine="vllm"), [NEXT], [
        MISFITS.replace("tiny", "tiny in vllm"), "a note", BASED]),
    "exported for another engine": (
        ADAPTER, dict(exported=dict(serve="vllm serve x", verify="")) | misfit("engine", engine="vllm"),
        [START, NEXT], [
        "start not kept by an export: see the adapter as it was trained", MISFITS.replace("tiny", "tiny in vllm"),
        "a note", BASED]),
    "to train for another engine": (
        ADAPTER, dict(untrained=True, train="t") | misfit("engine", engine="vllm"), [NEXT], [
        MISFITS.replace("tiny", "tiny in vllm"), "a note", BASED]),
    "no proposal": (RUNS, dict(command=""), ["Next: lora-init init 'my model' d"], ["Next: lora-init compare m d"]),
    "no command": (RUNS, dict(command="", settings={}), ["Next: lora-init init 'my model' d"],
                   ["Next: lora-init compare MODEL DATA -o runs"]),
    "another program": (RUNS, dict(command="rm -r x"), ["Next: lora-init init 'my model' d"],
                        ["Next: lora-init compare MODEL DATA -o runs"]),
    "the word of a command": (RUNS, dict(command="rm init x"), ["Next: lora-init init 'my model' d"],
                              ["Next: lora-init compare MODEL DATA -o runs"]),
    "two commands": (RUNS, dict(command="lora-init init m; rm x"), ["Next: lora-init init 'my model' d"],
                     ["Next: lora-init init 'm;' rm x"]),
    "another command": (RUNS, dict(command="lora-init export x"), ["Next: lora-init init 'my model' d"],
                        ["Next: lora-init compare MODEL DATA -o runs"]),
    "code of others": (RUNS, dict(command="lora-init init m d --trust-remote-code"),
                       ["Next: lora-init init 'my model' d"], ["Next: lora-init compare MODEL DATA -o runs"]),
    "half a quote": (RUNS, dict(command="lora-init init 'm"), ["Next: lora-init init 'my model' d"],
                     ["Next: lora-init compare MODEL DATA -o runs"]),
}  # fmt: skip


@pytest.mark.parametrize("case", CHANGES)
def test_inspect_prints_what_a_fact_changes_and_no_other_line(case):
    about, changes, gone, come = CHANGES[case]
    if not changes.get("fit", FIT)["fits"]:  # beside a misfit nobody is said to take the adapter
        place = gone.index(NEXT) if NEXT in gone else len(gone)
        gone = [*gone[:place], "vLLM takes it.", *gone[place:]]
    assert changed(show, about, changes) == (gone, come)


@pytest.mark.parametrize(("settings", "name"), [
    (NF4, "bitsandbytes nf4"), (INT8, "bitsandbytes 8 bits"), (INT4, "gptq 4"),
    (INT8 | {"bnb_4bit_quant_type": "fp4"}, "bitsandbytes 8 bits"),
    (dict(quant_method="bitsandbytes", load_in_4bit=True), "bitsandbytes 4 bits"), (dict(quant_method="hqq"), "hqq"),
    (dict(quant_method="hqq", nbits=2), "hqq 2")])  # fmt: skip
def test_a_quantization_is_named_by_its_library_and_its_kind_or_bits(settings, name):
    lines = printed(show, ADAPTER | dict(origin=dict(method="eva", seed=0, provenance=dict(quantisation=settings))))
    assert f"base quantized: {name}" in lines
