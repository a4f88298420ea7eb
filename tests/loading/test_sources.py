"""Where rows come from: files of every kind, folders, the hub, memory, standard input."""

import gzip
import io
import json
import logging
import random
import warnings
from collections import Counter
from contextlib import suppress
from pathlib import Path

import datasets
import pandas
import pytest
import torch
from datasets import Dataset

from lora_init import LoraInitError, load_batches
from lora_init.loading import sources
from lora_init.loading.sources import _first_line_of, check_data, columns_of, read_rows
from tests.conftest import refused
from tests.loading.made import texts


def test_every_kind_of_file_gives_the_same_batches(write, tokenizer, tmp_path):
    rows = [{"text": f"example {'x' * i}, with a comma"} for i in range(5)]
    write(rows)
    (tmp_path / "data.json").write_text(json.dumps(rows))
    (tmp_path / "data.txt").write_text("\n\n".join(row["text"] for row in rows))  # a blank line is no example
    Dataset.from_list(rows).to_csv(tmp_path / "data.csv", index=False)
    Dataset.from_list(rows).to_csv(tmp_path / "data.tsv", index=False, sep="\t")
    Dataset.from_list(rows).to_parquet(tmp_path / "DATA.PARQUET")
    for name in ("data.jsonl", "data.json", "data.txt", "data.csv", "data.tsv", "DATA.PARQUET"):
        batches = load_batches(str(tmp_path / name), tokenizer)
        assert sorted(texts(batches, tokenizer)) == sorted(row["text"] + "<eos>" for row in rows), name
        assert {value.dtype for batch in batches for value in batch.values()} == {torch.int64}


ZIPPED = gzip.compress(b'{"text": "a"}\n' * 9, mtime=0)
BEGIN = {
    "a.jsonl": b'{"text": "a", "more": 1}\n{', "a.csv": b"text,more\na,1\n", "a.txt": b"text,more\n",
    "empty.jsonl": b"", "cut off.jsonl": b'{"text"', "number.jsonl": b"3\n", "list.jsonl": b"[1, 2]\n",
    "text.jsonl": b'"text"\n', "null.jsonl": b"null\n", "latin.jsonl": b'{"caf\xe9": 1}\n',
    "latin.csv": b"caf\xe9,b\n", "long.csv": b"a" * 200_000, "plain.jsonl.gz": b'{"text": "a"}\n',
    "cut off.jsonl.gz": ZIPPED[:18], "spoiled.jsonl.gz": ZIPPED[:10] + bytes(range(99, 140)),
}  # fmt: skip


@pytest.mark.parametrize("name", BEGIN)
def test_a_quick_look_at_the_columns_leaves_what_is_wrong_to_the_reading(name, tmp_path):
    (tmp_path / name).write_bytes(BEGIN[name])
    assert columns_of(str(tmp_path / name)) == (["text", "more"] if name in ("a.jsonl", "a.csv") else [])


@pytest.mark.parametrize("shown", [True, False])
@pytest.mark.parametrize("content", ['{"text": "a"}\n', '{"text": "a"}\n{broken\n'], ids=["sound", "damaged"])
def test_what_datasets_prints_is_as_the_caller_has_set_it(content, shown, tmp_path, monkeypatch):
    monkeypatch.setattr(logging.getLogger("datasets"), "level", logging.INFO)
    (datasets.enable_progress_bars if shown else datasets.disable_progress_bars)()
    try:
        (tmp_path / "rows.jsonl").write_text(content)
        with suppress(LoraInitError):
            read_rows(str(tmp_path / "rows.jsonl"))
        assert logging.getLogger("datasets").level == logging.INFO
        assert datasets.are_progress_bars_disabled() != shown
    finally:
        datasets.enable_progress_bars()


def test_bad_sources_are_one_clear_line(write, tokenizer, tmp_path):
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "blank.csv").write_text("text\n")
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{broken\n')
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    (tmp_path / "nothing").mkdir()
    write([{"text": "  "}, {"text": None}], "hollow.jsonl")
    (tmp_path / "numbers.json").write_text("[1, 2, 3]")
    (tmp_path / "words.jsonl").write_text('"a"\n"b"\n')
    (tmp_path / "semicolons.csv").write_text("text;kind\na, b;c\n")
    (tmp_path / "latin.csv").write_bytes("text\nplain\ncaf\xe9\n".encode("latin-1"))
    (tmp_path / "latin.jsonl").write_bytes('{"text": "caf\xe9"}\n'.encode("latin-1"))
    (tmp_path / "wide.txt").write_bytes("a line\n".encode("utf-16"))
    for name, message in {
        "numbers.json": r"numbers.json: its rows are numbers, texts or lists. Expected objects: \{'text': ...\}",
        "words.jsonl": "its rows are numbers, texts or lists",
        "semicolons.csv": "columns are separated by a semicolon, expected a comma. Save it with commas",
        "latin.csv": "latin.csv, line 3: byte 0xe9 is not valid UTF-8, .* iconv -f LATIN1 -t UTF-8",
        "latin.jsonl": "latin.jsonl, line 1: byte 0xe9 is not valid UTF-8",
        "wide.txt": "byte 0xff is not valid UTF-8, .* iconv -f UTF-16 -t",
        "missing.jsonl": "missing.jsonl': no such file or folder",
        "empty.jsonl": "the data is empty",
        "blank.csv": "the data is empty",
        "broken.jsonl": r"broken.jsonl, line 2 is not JSON: .* Is it cut off\?",
        "image.png": r"files of this kind \(.png\). Expected one of .json, .jsonl, .csv, .tsv, .parquet, .txt",
        "nothing": "doesn't contain any data files",
        "hollow.jsonl": r"no usable example among 2 rows read as text \(2 left out with an empty field\)",
    }.items():
        refused(message, load_batches, tmp_path / name, tokenizer)
    (tmp_path / "late.txt").write_bytes(b"\ncaf\xe9\n")
    refused("late.txt, line 2: byte 0xe9", load_batches, tmp_path / "late.txt", tokenizer)
    with pytest.raises(LoraInitError, match=r"mix kinds of values in a column: .* Write all of it as text"):
        load_batches([{"text": "a"}, {"text": 1}], tokenizer)


def test_folder_reads_one_kind_and_one_split(write, tokenizer, tmp_path):
    write([{"text": "a"}], "plain/1.jsonl")
    write([{"text": "b"}], "plain/more/2.jsonl")
    write([{"text": "hidden"}], "plain/.cache/3.jsonl")
    (tmp_path / "plain/README.md").write_text("no data")
    batches = load_batches(tmp_path / "plain", tokenizer)
    assert sorted(texts(batches, tokenizer)) == ["a<eos>", "b<eos>"]
    assert batches.description.startswith("plain/: 2 of 2 examples")
    # A script beside the data is never run.
    (tmp_path / "plain/plain.py").write_text("raise SystemExit('this ran')")
    refused("scripts are no longer supported", load_batches, tmp_path / "plain", tokenizer)

    for name in ("train", "dev", "contest"):  # "test" inside a word marks no split
        write([{"text": name}], f"splits/{name}.jsonl")
    assert texts(load_batches(tmp_path / "splits", tokenizer), tokenizer) == ["train<eos>"]
    assert texts(load_batches(tmp_path / "splits", tokenizer, split="validation"), tokenizer) == ["dev<eos>"]
    with pytest.raises(LoraInitError, match=r"splits/, test: .* Unknown split .* one of \['train', 'validation'\]"):
        load_batches(tmp_path / "splits", tokenizer, split="test")

    write([{"text": "c"}], "mixed/1.jsonl")
    (tmp_path / "mixed/2.txt").write_text("d")
    assert texts(load_batches(tmp_path / "mixed", tokenizer), tokenizer) == ["c<eos>"]  # the kind there is most of
    refused(r"files of this kind \(.jsonl, .txt\)", load_batches, tmp_path / "mixed" / "*", tokenizer)


def test_hub_id_goes_to_datasets_with_subset_and_split(monkeypatch, tokenizer):
    asked = {}
    monkeypatch.setattr("lora_init.loading.sources.check_hub", lambda *_: True)

    def load_dataset(**arguments):
        asked.update(arguments)
        return Dataset.from_list([{"text": "from afar"}])

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    batches = load_batches("owner/name", tokenizer, subset="small", split="validation")
    assert asked == {"path": "owner/name", "name": "small", "split": "validation"}  # no flag that would run its code
    assert batches.description.startswith("owner/name (small), validation: 1 of 1 examples")


@pytest.mark.parametrize(("content", "message"), [
    ("text,b\n1,2,3\n4,5\n", "data.csv: datasets cannot read it: Length of header .* does not match"),
    ('text,b\n1,2\n\n"x\ny",5\n4,5,6\n', "Expected 2 fields in line 5, saw 3"),
    ("text,b\n" + "x" * 200_000 + ",2\n4,5,6\n", "Expected 2 fields in line 3, saw 3"),
])  # fmt: skip
def test_a_record_with_too_many_fields_is_refused(tmp_path, tokenizer, content, message):
    (tmp_path / "data.csv").write_text(content)
    refused(message, load_batches, tmp_path / "data.csv", tokenizer)


def test_data_in_memory_streams_patterns_and_standard_input(write, tokenizer, tmp_path, monkeypatch):
    rows = [{"text": f"example {i}"} for i in range(5)]
    expected = sorted(row["text"] + "<eos>" for row in rows)
    path = write(rows)
    (tmp_path / "data.jsonl.gz").write_bytes(gzip.compress(path.read_bytes()))
    write(rows[:2], "parts/a.jsonl"), write(rows[2:], "parts/b.jsonl")
    monkeypatch.setattr("sys.stdin", io.StringIO(path.read_text().replace("\n", "\n\n")))  # blank lines say nothing
    table = Dataset.from_list(rows)
    for source in (
        rows, table, table.to_iterable_dataset(), pandas.DataFrame(rows), datasets.DatasetDict(train=table), "-",
        tmp_path / "data.jsonl.gz", str(tmp_path / "parts" / "*.jsonl"), [tmp_path / f"parts/{n}.jsonl" for n in "ab"],
    ):  # fmt: skip
        assert sorted(texts(load_batches(source, tokenizer), tokenizer)) == expected, source
    for source, message in {
        str(tmp_path / "parts" / "*.csv"): "no such file or folder",
        (path, tmp_path / "missing.jsonl"): "2 files: datasets cannot read it: .*missing.jsonl",
        ("how are you?", "well"): r"no such files. For texts in memory, make rows of them: \[{'text': ...}, ...\]",
        3: "data of type int: expected a path",
        (1, 2): "data of type tuple: expected a path",
    }.items():
        refused(message, load_batches, source, tokenizer)
    monkeypatch.setattr("sys.stdin", io.StringIO('{"text": "a"}\n \nnot json\n'))
    refused("standard input, line 3 is not JSON", load_batches, "-", tokenizer)
    parts = datasets.DatasetDict(test=table, dev=table)
    refused("the data has no split 'train', only test, dev. Pass one of them alone", load_batches, parts, tokenizer)


def test_sample_depends_on_the_seed_and_neither_on_size_nor_batches(write, tokenizer):
    path = write([{"text": f"row {i:03d}"} for i in range(100)])

    def sample(**arguments):
        return set(texts(load_batches(path, tokenizer, **arguments), tokenizer))

    assert sample(samples=20, batch_size=1) == sample(samples=20, batch_size=7)
    assert sample(samples=20) < sample(samples=40)
    assert sample(samples=20) != sample(samples=20, seed=1)
    assert not sample(samples=20) & sample(samples=20, offset=20)
    assert sample(samples=20) | sample(samples=20, offset=20) == sample(samples=40)
    assert len(sample(samples=None)) == len(sample(samples=1000)) == 100
    first, second = (load_batches(path, tokenizer, samples=20) for _ in range(2))
    assert all(torch.equal(a[key], b[key]) for a, b in zip(first, second, strict=True) for key in a)


@pytest.mark.parametrize("separator", [",", "\t"])
def test_a_row_of_a_table_is_named_by_the_line_where_it_begins(tmp_path, separator):
    fields = ["text", "note"], ['"two\nlines"', "a"], [], ["one", '"b\nc"'], ["two", "d"], ["", ""]
    lines = [separator.join(of_row) for of_row in fields]
    file = tmp_path / f"data.{'csv' if separator == ',' else 'tsv'}.gz"
    file.write_bytes(gzip.compress("\n".join(lines).encode()))
    rows = read_rows(file)
    assert [rows.place(i).rpartition(", ")[2] for i in range(3)] == ["line 2", "line 5", "line 7"]
    assert read_rows([{"text": "one"}]).place(0) == "data in memory, row 1"


@pytest.mark.parametrize("name", ["a.txt", "a.json", "a.parquet", "."])
def test_a_row_of_what_has_no_row_a_line_is_named_by_its_number(name, tmp_path):
    (tmp_path / "a.txt").write_text("\na\nb\n")
    (tmp_path / "a.json").write_text('[{"text": "a"}, {"text": "b"}]')
    Dataset.from_list([{"text": "a"}, {"text": "b"}]).to_parquet(tmp_path / "a.parquet")
    assert sources.Rows(None, "data", tmp_path / name).place(1) == "data, row 2"


@pytest.mark.parametrize("form", ["text", "chat", "list of words"])
def test_rows_are_told_apart_in_every_form(form):
    def rows(word):
        texts = [f"{word} {i}" for i in range(9)]
        forms = {"text": texts, "chat": [[{"role": "user", "content": text}] for text in texts],
                 "list of words": [text.split() for text in texts]}  # fmt: skip
        return [{"text": one, "number": i} for i, one in enumerate(forms[form])]

    cat, other_order = rows("cat"), [dict(reversed(row.items())) for row in rows("cat")]
    assert read_rows(cat).digest == read_rows(other_order).digest != read_rows(rows("dog")).digest
    assert read_rows(cat).digest != read_rows(cat[:8]).digest


def test_a_seed_draws_the_same_rows_of_a_stream_each_time(tokenizer):
    stream = Dataset.from_list([{"text": "x" * i} for i in range(1, 60)]).to_iterable_dataset()
    drawn = [texts(load_batches(stream, tokenizer, samples=8, seed=seed), tokenizer) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_rows_of_a_stream_are_drawn_from_twice_as_many(monkeypatch):
    monkeypatch.setattr(sources, "MOST_STREAMED", 10)
    stream = Dataset.from_list([{"i": i} for i in range(40)]).to_iterable_dataset()
    drawn = [read_rows(stream, seed=seed).table["i"][:] for seed in range(4)]
    assert {len(rows) for rows in drawn} == {10} and 10 <= max(map(max, drawn)) < 20
    assert read_rows(stream).table["i"][:] == drawn[0] != drawn[1]


@pytest.mark.parametrize(("n", "rows"), [(300, 300), (10_001, None)])
def test_how_many_rows_a_long_stream_has_is_unknown(n, rows, tokenizer):
    stream = Dataset.from_dict({"text": ["xx"] * n}).to_iterable_dataset()
    with pytest.warns(UserWarning, match="duplicates"):
        assert load_batches(stream, tokenizer, samples=8).settings["rows"] == rows


@pytest.mark.parametrize("name", ["rows.jsonl", "rows[1].csv", "what?.txt", "all*.json.gz"])
def test_a_name_that_would_be_a_pattern_is_a_name(name, tmp_path, tokenizer, monkeypatch):
    folder = tmp_path / "a[bold]b"
    folder.mkdir()
    text = "text\nthe cat\n" if "csv" in name else "the cat\n" if "txt" in name else '{"text": "the cat"}\n'
    (folder / name).write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    assert load_batches(folder / name, tokenizer).n == 1
    monkeypatch.chdir(folder)
    assert load_batches(name, tokenizer).n == 1
    refused(r"a\[bold\]b: datasets takes this name for a pattern\. Rename", load_batches, folder, tokenizer)


@pytest.mark.parametrize(("name", "mark"), [("rows[1].jsonl.gz", "'['"), ("a::b.jsonl", "'::'")])
def test_a_name_that_datasets_does_not_read_is_told(name, mark, tmp_path, tokenizer, monkeypatch):
    text = b'{"text": "the cat"}\n'
    (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    monkeypatch.chdir(tmp_path)
    assert refused("datasets cannot read it", load_batches, name, tokenizer).endswith(f"leave {mark} out of its name.")


@pytest.mark.parametrize(("name", "content"), [
    ("a.csv", b"text\n\n1,2,3\n"), ("cut off.jsonl.gz", ZIPPED[:18]), ("plain.jsonl.gz", b'{"text": "a"}\n'),
    ("spoiled.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 99, mtime=0)[:-20] + b"abc"),
])  # fmt: skip
def test_what_datasets_does_not_read_is_no_fault_of_a_plain_name(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    assert "its name" not in refused(f"{name}: datasets cannot read it: ", read_rows, tmp_path / name)


def test_of_several_files_the_one_that_datasets_does_not_read_is_enough(tmp_path):
    for name in ("a.jsonl.gz", "b[1].jsonl.gz"):
        (tmp_path / name).write_bytes(gzip.compress(b'{"text": "a"}\n'))
    said = refused("2 files: datasets cannot read it", read_rows, tmp_path / "*.gz")
    assert said.endswith("leave '[' out of its name.")


def test_a_folder_whose_name_would_be_a_pattern_is_a_name_before_a_pattern(tmp_path, tokenizer):
    for folder, n in (("run[1]", 1), ("run1", 2)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "rows.txt").write_text("".join(f"the cat {i}\n" for i in range(n)))
    assert load_batches(tmp_path / "run[1]" / "*.txt", tokenizer).n == 1
    assert load_batches(tmp_path / "run?" / "*.txt", tokenizer).n == 2
    refused(r"\*\*.txt': Invalid pattern", load_batches, tmp_path / "a**.txt", tokenizer)


def test_the_line_of_a_row_counts_blank_lines(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "a"}\n\n\n{"text": "b"}\n')
    assert (_first_line_of(file, 0), _first_line_of(file, 1), _first_line_of(file, 2)) == (1, 4, None)


@pytest.mark.parametrize(("names", "label"), [
    (["a.jsonl"], "rows/a.jsonl"), (["a.jsonl", "b.jsonl"], "2 files"), (["."], "rows/"), (["*.jsonl"], "2 files"),
    (["a.*"], "rows/a.jsonl"),
])  # fmt: skip
def test_data_are_called_by_what_says_most_without_the_path_to_them(names, label, write, tmp_path):
    for name in "ab":
        write([{"text": name}], f"rows/{name}.jsonl")
    found = read_rows([tmp_path / "rows" / name for name in names] if len(names) > 1 else tmp_path / "rows" / names[0])
    assert found.label == label
    assert found.file == (
        tmp_path / "rows" / "a.jsonl" if "a.jsonl" in label else tmp_path / "rows" if names == ["."] else None
    )


def test_what_a_folder_is_asked_for_is_a_part_of_its_name(write, tmp_path):
    write([{"text": "a"}], "rows/test.jsonl")
    assert read_rows(tmp_path / "rows", split="test").label == "rows/, test"
    write([{"text": "b"}], "rows/small.jsonl")
    (tmp_path / "rows" / "README.md").write_text(
        "---\nconfigs:\n- config_name: few\n  data_files: small.jsonl\n- config_name: all\n  data_files: '*.jsonl'\n---"
    )
    found = read_rows(tmp_path / "rows", "few")
    assert (found.label, found.table.to_list()) == ("rows/ (few)", [{"text": "b"}])


@pytest.mark.parametrize(("source", "options", "line"), [
    ("a.jsonl", {"split": "test"}, "split='test' is for {0}/a.jsonl."),
    ("a.jsonl", {"subset": "x", "split": "test"}, "subset='x' is for {0}/a.jsonl."),
    ([{"text": "a"}], {"subset": "x"}, "subset='x' is for files or data in memory."),
])  # fmt: skip
def test_files_and_data_in_memory_have_neither_subset_nor_split(source, options, line, write, tmp_path):
    write([{"text": "a"}], "a.jsonl")
    with pytest.raises(LoraInitError) as caught:
        read_rows(tmp_path / source if isinstance(source, str) else source, **options)
    there = "is for a folder or a data set on the hub, not for "
    assert str(caught.value) == line.format(tmp_path).replace("is for ", there)


@pytest.mark.parametrize(("name", "content", "columns"), [
    ("a.csv", "text,b\n1,2\n", ["text", "b"]), ("a.tsv", "text\tb,c\n", ["text", "b,c"]), ("a.csv", "", []),
    ("a.CSV", "\ufefftext\n", ["text"]), ("a.jsonl", '{"text": 1, "b": 2}\n{"c": 3}\n', ["text", "b"]),
    ("a.jsonl", "[1]", []), ("a.jsonl", '["ab", "cd"]', []), ("a.jsonl", "3", []), ("a.jsonl", "no", []),
    ("a.json", '{"text": 1}', []), ("a.txt", "text,b", []), ("a.csv.gz", "text,b\n", ["text", "b"]),
    ("a.parquet", "x", []),
])  # fmt: skip
def test_columns_of_a_file_are_read_from_its_beginning(name, content, columns, tmp_path):
    raw = content.encode()
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    assert columns_of(str(tmp_path / name)) == columns
    assert columns_of(str(tmp_path)) == columns_of("owner/name") == []
    (tmp_path / f"b{Path(name).suffix}").write_bytes(raw)
    assert columns_of(str(tmp_path / "*")) == []  # of several nobody knows


@pytest.mark.parametrize(
    "name", ["x.jsonl", "./x", "~/x", "/none", "/none/x", "a/b/c", "x.CSV", "x.csv.gz", "none/x.txt"]
)
def test_a_name_that_can_be_no_hub_id_is_of_a_file(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(f"^data '{name}': no such file or folder.$", read_rows, name)


@pytest.mark.parametrize("header", ['"text","b"', '"a\r\nb",c', "a", '"one, two",b', "\ufefftext,b"])
def test_a_quick_look_finds_the_columns_that_the_reading_does(header, tmp_path):
    (tmp_path / "a.csv").write_bytes(f"{header}\r\n1,2\r\n".replace("a\r\n1,2", "a\r\n1").encode())
    assert columns_of(str(tmp_path / "a.csv")) == read_rows(tmp_path / "a.csv").table.column_names


@pytest.mark.parametrize("name", ["owner/name", "name", "owner/name.py"])
def test_a_name_that_may_be_a_hub_id_is_asked_for(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = []
    monkeypatch.setattr(sources, "check_hub", lambda *words: asked.append(words) or True)
    check_data(name)
    assert asked == [(name, "dataset")]
    monkeypatch.setattr(sources, "stay_offline", lambda: asked.append("offline"))
    monkeypatch.setattr(sources, "check_hub", lambda *words: False)
    check_data(name)
    assert asked[1:] == ["offline"]


def test_a_model_is_no_data(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").touch()
    said = "^data .*/model: this is the directory of a model. Name a file, or a folder of data.$"
    refused(said, check_data, str(tmp_path / "model"))


def test_the_text_of_an_example_is_likely_in_the_longest_column_that_is_no_list():
    row = {"id": 1, "b": "x" * 5, "a": "y" * 5, "long": "z" * 9, "many": ["w"] * 50, "map": {"k": "v" * 50}}
    rows = read_rows([row] * 3)
    assert rows.texts() == ["long", "a", "b", "id"] and rows.texts(but="long") == ["a", "b", "id"]
    assert read_rows([{"many": None, "a": "x"}, {"many": ["w" * 50], "a": "y"}]).texts() == ["a"]  # in some rows
    late = read_rows([{"a": "x", "b": ""}] * 100 + [{"a": "x", "b": "y" * 999}])
    assert late.texts() == ["a", "b"]  # a hundred rows are looked at


def test_rows_are_read_in_the_order_that_the_seed_draws_and_what_they_lack_is_counted():
    rows, left_out = read_rows([{"text": str(i), "other": "x"} for i in range(20)]), Counter()
    order = list(range(20))
    random.Random(7).shuffle(order)

    def read(row):
        assert [*row] == ["text"]
        return "odd" if int(row["text"]) % 2 else [row["text"]]

    assert [*rows.usable(["text", "text"], read, 7, left_out)] == [[str(i)] for i in order if i % 2 == 0]
    assert left_out == {"odd": 10}

    def fail(row):
        raise LoraInitError("{rank} is wrong.", rank=3)

    refused(f"^data in memory, row {order[0] + 1}: rank=3 is wrong.$", next, rows.usable(["text"], fail, 7, left_out))


def test_a_digest_is_of_sixteen_rows_from_all_over_the_data():
    def digest(changed=None, n=20):
        return read_rows([{"text": "other" if i == changed else "same", "b": 1} for i in range(n)]).digest

    same = digest()
    assert len(same) == 16 and same != digest(n=21)
    assert [i for i in (0, 3, 4, 5, 9, 18, 19) if digest(i) != same] == [0, 3, 5, 18]


def test_points_in_time_are_the_texts_that_are_in_the_file(tmp_path):
    """`datasets` would make points in time of them, which the text of an example would have in another spelling."""
    rows = [{"text": "a", "at": "2024-01-03T10:00:00"}, {"text": "b", "at": "2024-02-01T00:00:00"}]
    lines, table = tmp_path / "rows.jsonl", tmp_path / "rows.json"
    lines.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    table.write_text(f" {json.dumps(rows)} ")
    for source in (lines, table, [lines]):
        assert read_rows(source).table.to_list() == rows, source
    assert read_rows([lines, lines]).table.to_list() == rows * 2
    assert [*sources._json_rows(lines)] == [*sources._json_rows(table)] == rows
    table.write_text('[{"text": "a\tb", "at": "2024-01-03T10:00:00"}]')  # a tab as it is, which strict readers refuse
    assert read_rows(table).table.to_list() == [{"text": "a\tb", "at": "2024-01-03T10:00:00"}]


@pytest.mark.parametrize(("header", "said"), [
    ("text;kind", "a semicolon, expected a comma. Save it with commas."),
    ("text\tkind", "a tab, expected a comma. Save it with commas, or name it .tsv."), ("text", None),
    ("text;kind,more", None), ("a\tb,c", None),
])  # fmt: skip
def test_another_separator_is_told_by_the_first_line(header, said, tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text(f"{header}\nx;y\tz,w\n" if said else f"{header}\n{header.replace('text', 'x')}\n")
    if said is None:
        assert len(read_rows(file).table) == 1
    else:
        refused(f"rows.csv: its columns are separated by {said}$", read_rows, file)
    (tmp_path / "rows.tsv").write_text("text;kind\nx\n")
    assert read_rows(tmp_path / "rows.tsv").table.column_names == ["text;kind"]


def test_cells_of_a_table_are_texts_and_an_empty_one_is_missing(tmp_path):
    (tmp_path / "rows.csv").write_text("a,b\n007,None\n1.50,\n,NA\n")
    assert read_rows(tmp_path / "rows.csv").table.to_list() == [
        {"a": "007", "b": "None"}, {"a": "1.50", "b": None}, {"a": None, "b": "NA"},
    ]  # fmt: skip


@pytest.mark.parametrize(("content", "said"), [
    ("[1, 2]", "its rows are numbers"), (" [ -1]", "its rows are numbers"), ("[[1]]", "its rows are numbers"),
    ("true\n", "its rows are numbers"), ("null", "its rows are numbers"), ('"a"', "its rows are numbers"),
])  # fmt: skip
def test_json_of_no_objects_is_refused(content, said, tmp_path):
    (tmp_path / "rows.json").write_text(content)
    refused(
        f"rows.json: {said}, texts or lists. Expected objects: {{'text': ...}}.$", read_rows, tmp_path / "rows.json"
    )


@pytest.mark.parametrize("line", ["3 cats", "[[a]]", "null", '"a"'])
def test_a_text_may_begin_as_json_of_no_objects_does(line, tmp_path):
    (tmp_path / "rows.txt").write_text(f"{line}\n")
    assert read_rows(tmp_path / "rows.txt").table.to_list() == [{"text": line}]


def test_files_are_read_without_a_word_and_filters_of_warnings_stay(tmp_path, capsys):
    (tmp_path / "rows.csv").write_text("a,b\n1,2\n")
    (tmp_path / "rows.txt").write_text("a\n\nb\n")
    datasets.enable_progress_bars()
    before = [*warnings.filters]
    assert [len(read_rows(tmp_path / name).table) for name in ("rows.csv", "rows.txt")] == [1, 2]
    assert warnings.filters == before
    assert capsys.readouterr() == ("", "")


def test_what_datasets_shows_is_quiet_only_while_it_reads(monkeypatch):
    logger = logging.getLogger("datasets")
    for shown in (True, False):
        (datasets.enable_progress_bars if shown else datasets.disable_progress_bars)()
        monkeypatch.setattr(logger, "level", logging.INFO)
        with pytest.raises(KeyError), sources._quiet():
            assert datasets.are_progress_bars_disabled() and logger.level == logging.CRITICAL
            raise KeyError
        assert (datasets.are_progress_bars_disabled(), logger.level) == (not shown, logging.INFO)
    datasets.enable_progress_bars()


def test_rows_in_memory_may_have_other_columns_each_and_their_gaps_are_empty():
    rows = [{"a": 1}, {"a": None, "b": "x"}, {"b": float("nan")}]
    expected = [{"a": 1, "b": None}, {"a": None, "b": "x"}, {"a": None, "b": None}]
    assert read_rows(rows).table.to_list() == expected
    frame = pandas.DataFrame({"text": ["a", "b"]}, index=[5, 6])
    assert read_rows(frame).table.to_list() == [{"text": "a"}, {"text": "b"}]  # without its index
    parts = datasets.DatasetDict(test=Dataset.from_list([{"a": 1}]), dev=Dataset.from_list([{"a": 2}]))
    refused("^the data has no split 'train', only test, dev. Pass one of them alone.$", read_rows, parts)


@pytest.mark.parametrize(("source", "kind"), [
    ([{"text": "a"}, "b.jsonl"], "list"), (["b.jsonl", {"text": "a"}], "list"), ([{"text": "a"}, 3], "list"),
    (iter([{"text": "a"}]), "list_iterator"), ({"text": ["a"]}, "dict"),
])  # fmt: skip
def test_what_is_no_table_in_memory_is_refused_by_its_kind(source, kind):
    refused(
        f"^data of type {kind}: expected a path, a hub id, a datasets.Dataset, a pandas DataFrame", read_rows, source
    )


def test_json_lines_name_the_line_that_is_none():
    assert sources._json_lines(['{"a": 1}\n', " \n", "[2]"], "here") == [{"a": 1}, [2]]
    refused("^here, line 3 is not JSON: .*Is it cut off.$", sources._json_lines, ["1", "\n", "{"], "here")


def test_what_is_no_utf8_late_in_a_file_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_LOOKED_AT", 16)
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n' * 5 + b'{"text": "\xe9"}\n')
    refused(r"a\.jsonl: datasets cannot read it: .*UTF8 sequence at string index 5", read_rows, tmp_path / "a.jsonl")
