"""Where rows come from: files of every kind, folders, the hub, memory, standard input."""

import gzip
import io
import json

import datasets
import pytest
import torch
from datasets import Dataset

from lora_init import LoraInitError, load_batches
from lora_init.loading.sources import _first_line_of, read_rows
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
        "wide.txt": "byte 0xff is not valid UTF-8, .* iconv -f UTF-16",
        "missing.jsonl": "missing.jsonl': no such file or folder",
        "empty.jsonl": "the data is empty",
        "blank.csv": "the data is empty",
        "broken.jsonl": r"broken.jsonl, line 2 is not JSON: .* Is it cut off\?",
        "image.png": r"files of this kind \(.png\). Expected one of .json, .jsonl, .csv, .tsv, .parquet, .txt",
        "nothing": "doesn't contain any data files",
        "hollow.jsonl": r"no usable example among 2 rows read as text \(2 left out with an empty field\)",
    }.items():
        refused(message, load_batches, tmp_path / name, tokenizer)
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
    import pandas

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
    lines = [separator.join(fields) for fields in (["text", "note"], ['"two\nlines"', "a"], [], ["one", "b"], ["", ""])]
    file = tmp_path / f"data.{'csv' if separator == ',' else 'tsv'}.gz"
    file.write_bytes(gzip.compress("\n".join(lines).encode()))
    rows = read_rows(file)
    assert [rows.place(i).rpartition(", ")[2] for i in range(2)] == ["line 2", "line 5"]
    assert read_rows([{"text": "one"}]).place(0) == "data in memory, row 1"


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
