"""What a row says: which columns are read, what becomes of each form, and which stretches have labels."""

import json

import pytest

from lora_init.errors import LoraInitError
from lora_init.loading.examples import FORMATS, Example, Wanted, count_common, is_missing, recipe
from tests.conftest import refused
from tests.loading.made import CHAT, byte_tokenizer


def read(row, tokenizer=None, **wanted):
    """Read a row as its columns say."""
    return recipe([*row], "rows", tokenizer, Wanted(**wanted)).to_example(row)


@pytest.fixture(scope="module")
def chatty():
    tools = "{% if tools %}{{ 'tools: ' + tools | map(attribute='name') | join(',') + '\n' }}{% endif %}"
    return byte_tokenizer(chat_template=tools + "{% if brief is defined %}{{ brief }}{% endif %}" + CHAT)


@pytest.mark.parametrize(("names", "wanted", "name", "columns"), [
    ("messages tools x text", {}, "messages", "messages tools"),
    ("chat_template_kwargs conversations", {}, "sharegpt", "conversations chat_template_kwargs"),
    ("text completion prompt", {}, "prompt and completion", "prompt completion"),
    ("prompt completion tools", {}, "prompt and completion", "prompt completion tools"),
    ("output instruction", {}, "alpaca", "instruction output"),
    ("input output instruction text", {}, "alpaca", "instruction output input"),
    ("prompt text", {}, "text", "text"),
    ("messages prompt completion text", {"format": "text"}, "text", "text"),
    ("a b text", {"template": "{b}: {a} {b}"}, "template '{b}: {a} {b}'", "b a"),
    ("a b text", {"template": "{b}", "completion": " {a} {b}"}, "template '{b}' and completion ' {a} {b}'", "b a"),
])  # fmt: skip
def test_columns_are_read_by_the_first_form_that_they_fit(names, wanted, name, columns, chatty):
    found = recipe(names.split(), "rows", chatty, Wanted(**wanted))
    assert (found.name, found.columns) == (name, columns.split())


@pytest.mark.parametrize(("names", "texts", "wanted", "proposal"), [
    ("a b", "b a", {}, "template='{a}' with completion=' {b}'."), ("a b", "b", {}, "template='{b}'."),
    ("a b c", "c a", {}, "template='{c}'."), ("a b", "", {}, "template='{a}'."), ("", "", {}, "template='{column}'."),
])  # fmt: skip
def test_a_template_is_proposed_of_the_columns_that_hold_text(names, texts, wanted, proposal):
    with pytest.raises(LoraInitError) as caught:
        recipe(names.split(), "rows", None, Wanted(**wanted), texts.split())
    expected = "messages, or conversations, or prompt and completion, or instruction and output, or text"
    there = ", ".join(names.split())
    assert str(caught.value) == " ".join(
        f"rows has the columns {there}. Expected {expected}; name others, such as {proposal}".split()
    )


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_that_was_asked_for_is_the_only_one_that_is_expected(name):
    line = refused(r"rows has the columns x\. Expected ", recipe, ["x"], "rows", None, Wanted(format=name))
    assert f"Expected {' and '.join(FORMATS[name].columns)}; name others" in line


EMPTY = {"instruction": None, "output": "4"}


@pytest.mark.parametrize(("row", "wanted", "expected"), [
    ({"text": " a "}, {}, Example(" a ", [("", " a ")], " a ")),
    ({"text": 7}, {}, Example("7", [("", "7")], "7")),
    ({"text": " "}, {}, None),
    ({"prompt": " a ", "completion": " b"}, {}, Example(" a  b", [(" a ", " a  b")], "a")),
    ({"prompt": None, "completion": "b"}, {}, None), ({"prompt": "a", "completion": ""}, {}, None),
    ({"a": "x", "b": 0.5}, {"template": "{a} {{b}} {b}!"}, Example("x {b} 0.5!", [("", "x {b} 0.5!")], "x {b} 0.5!")),
    ({"a": "x", "b": "y"}, {"template": "{a}\n", "completion": "{b}"}, Example("x\ny", [("x\n", "x\ny")], "x")),
    ({"a": "x", "b": float("nan")}, {"template": "{a}", "completion": "{b}"}, None),
    ({"a": None, "b": "y"}, {"template": "{a}{b}"}, None), (EMPTY, {}, None), (EMPTY | {"input": "x"}, {}, None),
    ({"instruction": "Add.", "output": " "}, {}, None),
])  # fmt: skip
def test_a_row_of_texts_is_joined_as_it_is_with_labels_on_the_answer(row, wanted, expected):
    assert read(row, **wanted) == expected


@pytest.mark.parametrize(("row", "wanted", "said"), [
    ({"a": None, "b": ["x"]}, {"template": "{a}{b}"}, "column 'b' holds a list, and text is needed"),
    ({"prompt": ["x"], "completion": "b"}, {}, "column 'prompt' holds a list"),
    ({"prompt": "a", "completion": [{"role": "assistant"}]}, {}, "column 'completion' holds a list"),
    ({"text": {"a": 1}}, {}, "column 'text' holds a mapping"),
])  # fmt: skip
def test_what_is_no_text_is_refused_also_beside_an_empty_field(row, wanted, said):
    refused(said, read, row, **wanted)


@pytest.mark.parametrize(("value", "missing"), [
    (None, True), (float("nan"), True), ("", True), (" \n", True), ("a", False), (0, False), (False, False),
    ("nan", False), ([], False),
])  # fmt: skip
def test_a_field_is_missing_if_it_is_null_nan_or_blank(value, missing):
    assert is_missing(value) is missing


@pytest.mark.parametrize(("first", "second", "n"), [
    ("", "", 0), ("abc", "abc", 3), ("abc", "abd", 2), ("abc", "ab", 2), ("xbc", "abc", 0), ("abcx", "abdx", 2),
])  # fmt: skip
def test_two_texts_are_alike_up_to_the_first_difference(first, second, n):
    assert count_common(first, second) == count_common([*second], [*first]) == n


USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}
ASKED = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
WHOLE = f"{ASKED}yes<|im_end|>\n"


@pytest.mark.parametrize("tools", [[{"name": "add", "x": None}, {"name": "sub"}], '[{"name": "add"}, {"name": "sub"}]'])
@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_a_chat_is_rendered_with_the_tools_and_the_settings_of_its_row(tools, column, chatty):
    row = {column: [USER, ANSWER], "tools": tools, "chat_template_kwargs": {"brief": "brief ", "none": None}}
    head = "tools: add,sub\nbrief "
    expected = Example(head + WHOLE, [(head + ASKED, head + WHOLE)], str([USER]), rendered=True)
    assert read(row, chatty) == expected
    alone = Example(WHOLE, [(ASKED, WHOLE)], str([USER]), rendered=True)
    for nothing in (None, "", []):
        assert read({column: [USER, ANSWER], "tools": nothing, "chat_template_kwargs": nothing}, chatty) == alone


def test_without_tools_a_template_is_told_that_there_are_none():
    tokenizer = byte_tokenizer(chat_template="{{ 'none' if tools is none else tools | length }}")
    for tools, text in ((None, "none"), ([], "none"), ("", "none"), ([{"name": "add"}], "1")):
        assert read({"messages": [USER], "tools": tools}, tokenizer).text == text


def test_a_prompt_as_messages_has_no_labels_and_is_what_is_answered(chatty):
    prompt = [ANSWER, USER]
    found = read({"prompt": prompt, "completion": [ANSWER], "tools": [{"name": "add"}]}, chatty)
    before = f"tools: add\n<|im_start|>assistant\nyes<|im_end|>\n{ASKED}"
    whole = f"{before}yes<|im_end|>\n"
    assert found == Example(whole, [(before, whole)], str(prompt), rendered=True)


@pytest.mark.parametrize(("turns", "n_before", "n_labelled"), [
    ([USER, ANSWER, USER, ANSWER], 1, 2),
    ([ANSWER, USER, ANSWER], 2, 2),  # a greeting answers nothing
    ([ANSWER, ANSWER], 0, 2),  # nobody asks, so the first one counts
    ([{"role": "system", "content": "x"}, ANSWER], 1, 1),
    ([USER, USER], 2, 0), ([USER, ANSWER | {"content": " "}, ANSWER], 1, 2),
])  # fmt: skip
def test_what_is_answered_is_what_comes_before_the_first_answer(turns, n_before, n_labelled, chatty):
    found = read({"messages": turns}, chatty)
    assert found.prompt == str(turns[:n_before]) and len(found.labelled) == n_labelled


BLANK = ANSWER | {"content": " "}


@pytest.mark.parametrize(("turns", "empty"), [
    ([], True), (None, True), ([USER, BLANK], True), ([USER, BLANK, USER, BLANK], True), ([USER, BLANK, ANSWER], False),
    ([USER, BLANK | {"tool_calls": [{"name": "add"}]}], False), ([USER, BLANK | {"name": "bob"}], True),
    ([USER, BLANK | {"content": []}], True),
    ([USER], False),
])  # fmt: skip
def test_a_chat_is_empty_if_all_answers_are_and_call_no_tool(turns, empty, chatty):
    assert (read({"messages": turns}, chatty) is None) is empty


@pytest.mark.parametrize(("messages", "said"), [
    (["hi"], r"^messages must be a list of \{'role': \.\.\., 'content': \.\.\.\}\.$"),
    ([USER, {"content": "x"}], "^messages must be a list of"),
    ({"role": "user", "content": "x"}, "^messages must be a list of"), (3, "^messages must be a list of"),
    ([USER, 3], "^messages must be a list of"), ([USER, ["role", "from"]], "^messages must be a list of"),
    ([USER, {"role": "assistant", "name": "bob"}], "^message 2, of 'assistant', has no content. Leave out the row.$"),
    ([USER, {"role": "assistant", "content": None}], "^message 2, of 'assistant', has no content"),
    ([{"from": "narrator", "value": "x"}], "^a message is from 'narrator', and expected is one of human, gpt, "),
    ([{"role": "tool", "content": "x"}], "^the chat template refuses the messages: no tools here.$"),
])  # fmt: skip
def test_messages_that_are_none_are_refused(messages, said, chatty):
    refused(said, read, {"messages": messages}, chatty)


def test_tools_that_are_no_json_are_refused_as_the_messages_are(chatty):
    refused("^the chat template refuses the messages: Expecting", read, {"messages": [USER], "tools": "{"}, chatty)


def test_a_tokenizer_without_a_chat_template_reads_no_chat():
    for row, said in (
        ({"messages": [USER]}, "^rows has a column 'messages', but this tokenizer has no chat template"),
        ({"conversations": [USER]}, "^rows has a column 'conversations', but this tokenizer has"),
        ({"prompt": [USER], "completion": [ANSWER]}, "^the row has messages, but this tokenizer has no chat template"),
    ):
        refused(said, read, row, byte_tokenizer())


@pytest.mark.parametrize("quoted", ["'critic'", '"critic"'])
def test_a_role_that_the_template_compares_with_is_known(quoted):
    template = f"{{% if messages[0]['role'] == {quoted} %}}!{{% endif %}}{CHAT}"
    critic = [{"role": "critic", "content": "bad"}, ANSWER]
    assert read({"messages": critic}, byte_tokenizer(chat_template=template)).text.startswith("!")
    with pytest.warns(UserWarning, match="does not know the role 'critic'. Rename it"):
        read({"messages": critic}, byte_tokenizer(chat_template=CHAT))


@pytest.mark.parametrize(("role", "kept", "said"), [
    ("system", False, "the chat template leaves out the turns of the role 'system'. Rename it."),
    ("user", False, "the chat template leaves out the turns of the role 'user'. Rename it."),
    ("critic", False, "the chat template leaves out the turns of the role 'critic'. Rename it."),
    ("critic", True, "the chat template does not know the role 'critic'. Rename it."),
    *((role, True, None) for role in ("system", "user", "developer", "assistant", "tool")),
    ("assistant", False, None), ("tool", False, None),  # whose words a template may write in another way
])  # fmt: skip
def test_roles_are_warned_of_whose_words_are_lost_or_whom_no_template_knows(role, kept, said, recwarn):
    words = "m['content']" if kept else "'...'"
    tokenizer = byte_tokenizer(chat_template=f"{{% for m in messages %}}{{{{ m['role'] + {words} }}}}{{% endfor %}}")
    read({"messages": [{"role": role, "content": " a word "}]}, tokenizer)
    assert [str(one.message) for one in recwarn] == [said] * (said is not None)


def test_a_chat_of_parts_is_labelled_as_one_of_texts_is(recwarn):
    template = (
        "{% for m in messages %}<{{ m['role'] }}>{% for part in m['content'] %}{{ part['text'] }}{% endfor %}"
        "{{ last if m['role'] == 'assistant' and loop.last }}</>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    turns = [{"role": role, "content": [{"text": role}]} for role in ("user", "assistant", "user")]
    asked, row = "<user>user</><assistant>", {"messages": turns}
    for last in ("", "!"):  # also where an answer that is the last turn is written otherwise than with others after it
        found = read(row, byte_tokenizer(chat_template=template.replace("last if", f"'{last}' if")))
        assert found.text == f"{asked}assistant</><user>user</>"
        assert found.labelled == [(asked, f"{asked}assistant{last}</>")]
    assert not recwarn


def test_a_message_of_json_text_is_read_as_its_mapping(chatty):
    """As other libraries write it: null where a message lacks a key, at every depth."""
    call = {"name": "add", "arguments": {"a": 1, "b": None}, "id": None}
    turns = [USER | {"name": None}, {"role": "assistant", "content": "yes", "calls": [call, None], "x": None}]
    with_nulls = read({"messages": json.loads(json.dumps(turns))}, chatty)
    assert with_nulls.text == WHOLE and with_nulls.prompt == str([USER])
