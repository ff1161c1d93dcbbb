"""Files, records, dialogues, pairs: what people's data say is read, or said to be left out."""

import argparse
import bz2
import gzip
import json
import lzma
import sys

import datasets
import pytest

import parallel
from data import encode_prompt
from engine import Parser, UserError
from files import placed_records, read_records, unwrapped
from flags import json_object
from messages import from_transcript, render_dialogue, to_messages
from records import to_prompts
from sources import (
    Example,
    Pair,
    add_data_flags,
    data_options,
    load_examples,
    load_pairs,
    load_prompts,
    to_examples,
    to_pair,
)

CHAT = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "See you."},
]


def says(role, content, **more):
    return {"role": role, "content": content, **more}


# ---- records


@pytest.mark.parametrize(
    "record, expected",
    [
        ({"prompt": "p", "target": "t", "level": 3}, Example("p", "t", {"level": 3})),
        ({"prompt": "p", "completion": "t"}, Example("p", "t")),
        ({"prompt": "p", "response": "t", "absent": None}, Example("p", "t")),
        ({"question": "p", "answer": "t"}, Example("p", "t")),
        ({"instruction": "i", "input": "", "output": "t"}, Example("i", "t", {"input": ""})),
        ({"instruction": "i", "input": "x", "output": "t"}, Example("i\n\nx", "t", {"input": "x"})),
        ({"text": "one two"}, Example("one", " two")),
        ({"text": "one two three four"}, Example("one two", " three four")),
        (
            {"text": "one  two\nthree four five six seven ", "id": 7},
            Example("one  two\nthree", " four five six seven", {"id": 7}),
        ),
    ],
)
def test_a_record_becomes_an_example(record, expected):
    assert to_examples(record, prompt_words=3) == [expected]


def test_named_fields_win():
    record = {"prompt": "no", "target": "no", "title": "p", "body": "t"}
    assert to_examples(record, "title", "body") == [
        Example("p", "t", {"prompt": "no", "target": "no"})
    ]


def test_every_assistant_turn_is_an_example_with_its_true_history(tokenizer):
    first, second = to_examples({"messages": CHAT, "topic": "x"})
    assert (first.target, second.target) == ("Hello!", "See you.")
    assert (first.messages, first.columns) == (
        CHAT[:2],
        {"topic": "x"},
    ) and second.messages == CHAT[:4]
    assert (
        second.prompt
        == render_dialogue(CHAT[:4])
        == "System:\nBe kind.\n\nUser:\nHi\n\nAssistant:\nHello!\n\nUser:\nBye\n\nAssistant:\n"
    )
    assert encode_prompt(tokenizer, second) == tokenizer(second.prompt).input_ids, (
        "no template: the plain rendering"
    )


@pytest.mark.parametrize(
    "record, message",
    [
        ({"prompt": "p", "compeltion": "t"}, "did you mean --target-field compeltion?"),
        ({"prompt": "p", "Outputs": "t"}, "did you mean --target-field Outputs?"),
        ({"promt": "p", "target": "t"}, "did you mean --prompt-field promt?"),
        ({"target": "t"}, "no prompt field"),
        ({}, "the record has nothing"),
        ({"prompt": 3, "target": "t"}, "field 'prompt' must be a string, found int"),
        ({"prompt": "p", "target": ["t"]}, "field 'target' must be a string, found list"),
        ({"prompt": "p", "target": " \n"}, "field 'target' is empty"),
        ({"messages": "hello"}, "must be a list of {role, content} objects"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "unknown role 'robot'"),
        ({"messages": [*CHAT[:2], says("assistant", " ")]}, "no assistant turn"),
        ({"messages": CHAT[:1]}, "'messages' has no user turn"),
        ({"text": "word"}, "the text has fewer than two words"),
        ({"messages": [{"role": "assistant", "content": 5}]}, "field 'content' must be a string"),
    ],
)
def test_a_record_that_cannot_be_used_says_why(record, message):
    with pytest.raises(UserError) as caught:
        to_examples(record)
    assert message in str(caught.value)


# ---- files

RECORDS = [{"prompt": f"p{i} é", "target": f"t{i} \u2028 x"} for i in range(5)]


def write(path, records):
    """The records in the format of the file's ending."""
    if path.suffix == ".jsonl":
        path.write_text(
            "\n".join(json.dumps(r, ensure_ascii=False) for r in records) + "\n\n", encoding="utf-8"
        )
    elif path.suffix == ".json":
        path.write_text(json.dumps(records, indent=1), encoding="utf-8")
    elif path.suffix == ".csv":
        datasets.Dataset.from_list(records).to_csv(path, index=False)
    elif path.suffix == ".parquet":
        datasets.Dataset.from_list(records).to_parquet(path)
    return str(path)


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "parquet"])
def test_every_file_format_gives_the_same_examples(tmp_path, ending):
    source = write(tmp_path / f"data.{ending}", RECORDS)
    expected = [Example(r["prompt"], r["target"]) for r in RECORDS]
    assert load_examples(source) == expected and load_examples(source, limit=2) == expected[:2]


def test_text_that_looks_like_something_else_stays_text(tmp_path):
    (tmp_path / "a.csv").write_text(
        "prompt,target,code\nsix times seven,42,007\nis it,True,N/A\nwhat,None,\n"
    )
    examples = load_examples(str(tmp_path / "a.csv"))
    assert [e.target for e in examples] == ["42", "True", "None"] and [
        e.columns["code"] for e in examples
    ] == ["007", "N/A", None]
    (tmp_path / "b.jsonl").write_text(
        '{"prompt": "When?", "target": "2020-01-01", "id": 123456789012345678901234567890}\n'
    )
    assert load_examples(str(tmp_path / "b.jsonl")) == [
        Example("When?", "2020-01-01", {"id": 123456789012345678901234567890})
    ]
    (tmp_path / "c.txt").write_bytes(b"\xef\xbb\xbfone two\n")
    assert load_examples(str(tmp_path / "c.txt")) == [Example("one", " two")]


def test_a_field_may_appear_late_and_every_example_has_every_column(tmp_path):
    lines = [
        json.dumps(
            {"prompt": "p", "target": "t", "id": i}
            if i < 30_000
            else {"prompt": "p", "target": "t", "id": "x", "late": 1}
        )
        for i in range(30_001)
    ]
    (tmp_path / "late.jsonl").write_text("\n".join(lines))
    examples = load_examples(str(tmp_path / "late.jsonl"))
    assert examples[0].columns == {"id": 0, "late": None} and examples[-1].columns == {
        "id": "x",
        "late": 1,
    }


def test_texts_of_one_word_are_left_out_and_counted(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("one two three\nobvious\nfour five\n")
    assert len(load_examples(str(tmp_path / "a.txt"))) == 2
    assert "1 of 3 records of" in capsys.readouterr().err


def test_a_column_called_messages_is_no_dialogue_when_fields_are_named(tokenizer):
    record = {
        "prompt": "p",
        "answer": "a",
        "messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "SECRET"}],
    }
    (example,) = to_examples(record, "prompt", "answer")
    assert example.messages is None and "SECRET" not in tokenizer.decode(
        encode_prompt(tokenizer, example)
    )


def test_dialogues_from_a_file(tmp_path):
    source = write(tmp_path / "chat.jsonl", [{"messages": CHAT}, {"messages": CHAT[1:3]}])
    assert [e.target for e in load_examples(source)] == ["Hello!", "See you.", "Hello!"]


def test_text_files_are_cut_at_lines_or_at_endoftext(tmp_path):
    (tmp_path / "lines.txt").write_text("one two three\n\n  four five six  \n")
    assert [e.prompt + e.target for e in load_examples(str(tmp_path / "lines.txt"))] == [
        "one two three",
        "four five six",
    ]
    (tmp_path / "stories.txt").write_text(
        "one two\nthree<|endoftext|>\nfour five\nsix\n<|endoftext|>\n"
    )
    assert [
        e.prompt + e.target for e in load_examples(str(tmp_path / "stories.txt"), prompt_words=1)
    ] == ["one two\nthree", "four five\nsix"]


def test_other_encodings_are_named_not_guessed(tmp_path):
    path = tmp_path / "latin.txt"
    path.write_bytes("first line here\nun café noir\n".encode("latin-1"))
    with pytest.raises(
        UserError, match=r"latin.txt:2: byte 0xe9 at offset 22 is not utf-8; .* --encoding latin-1"
    ):
        load_examples(str(path))
    assert load_examples(str(path), encoding="latin-1")[1] == Example("un", " café noir")
    with pytest.raises(UserError, match="--encoding klingon is not an encoding"):
        load_examples(str(path), encoding="klingon")


@pytest.mark.parametrize(
    "name, content, message",
    [
        (
            "a.jsonl",
            b'{"prompt": "p", "target": "t"}\n\n{"prompt": "p", }\n',
            "a.jsonl:3: not valid JSON",
        ),
        (
            "b.jsonl",
            b'{"prompt": "p", "target": "t"}\n[1, 2]\n',
            "b.jsonl:2: expected a JSON object, found list",
        ),
        (
            "c.jsonl",
            b'{"prompt": "p", "target": "t"}\n\n{"prompt": "p", "target": ""}\n',
            "c.jsonl:3: field 'target' is empty",
        ),
        ("d.json", b'[{"prompt": "p"},\n {"prompt": }]', "d.json:2: not valid JSON"),
        ("e.csv", b'prompt,target\n"two\nlines",t\n,t\n', "e.csv:4: no prompt field"),
        ("f.txt", b"", "f.txt is empty"),
        ("g.jsonl", b"\xff\xfe\x00\x01", "g.jsonl:1: byte 0xff at offset 0 is not utf-8"),
        ("h.parquet", b"not parquet", "h.parquet cannot be read"),
        (
            "j.jsonl",
            b'{"prompt": "p", "target": "\\ud83d"}',
            "j.jsonl:1: field 'target' has half of a surrogate pair",
        ),
        ("k.jsonl", b"[" * 5000, "k.jsonl:1: not"),
        ("l.csv", b"prompt,target\np,t\n\n\n,t\n", "l.csv:5: no prompt field"),
        ("i.xlsx", b"x", "unknown ending; known are .jsonl, .ndjson, .json, .csv,"),
    ],
)
def test_a_broken_file_is_named_with_its_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_examples(str(tmp_path / name), strict=True)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_missing_files_folders_and_an_unreachable_hub(tmp_path):
    for source, message in [
        ("nowhere.jsonl", "nowhere.jsonl does not exist"),
        (str(tmp_path), "is a folder"),
        ("no/such-dataset", "could not be fetched from the Hugging Face hub"),
    ]:
        with pytest.raises(UserError) as caught:
            load_examples(source)
        assert message in str(caught.value) and "\n" not in str(caught.value)


# ---- files of other kinds

TWO = [{"prompt": "p 1", "target": " a, b"}, {"prompt": "p 2", "target": " c"}]


def lines_of(records):
    return "".join(json.dumps(record) + "\n" for record in records)


@pytest.mark.parametrize(
    "name, text",
    [
        ("a.NDJSON", lines_of(TWO)),
        ("b.jsonl", json.dumps(TWO, indent=1)),
        ("c.jsonl", json.dumps(TWO)),
        ("d.json", lines_of(TWO)),
        ("e.json", "\n".join(json.dumps(record, indent=2) for record in TWO)),
        ("f.jsonl", "\n".join(json.dumps(record, indent=2) for record in TWO)),
        ("g.json", json.dumps({"version": "1", "data": TWO}, indent=1)),
        ("h.json", json.dumps({"train": TWO, "test": TWO[:1]})),
        ("i.json", json.dumps({name: [r[name] for r in TWO] for name in TWO[0]})),
        ("j.json", json.dumps({n: {str(i): TWO[i][n] for i in range(2)} for n in TWO[0]})),
        ("k.json", json.dumps({"x1": TWO[0], "x2": TWO[1]})),
        ("l.json", json.dumps({"columns": [*TWO[0]], "data": [[*r.values()] for r in TWO]})),
        ("x.json", '{"data": [\n' + json.dumps(TWO[0]) + "\n,\n" + json.dumps(TWO[1]) + "\n]}"),
        ("m.csv", 'prompt,target\np 1," a, b"\n\np 2, c\n'),
        ("n.csv", ',prompt,target\n0,p 1," a, b"\n1,p 2, c\n'),
        ("o.csv", 'Unnamed: 0,prompt , target,\r\n0,p 1," a, b",\r\n1,p 2, c,\r\n,,,\r\n'),
        ("p.csv", "prompt;target\np 1; a, b\np 2; c\n"),
        ("q.csv", "prompt\ttarget\np 1\t a, b\np 2\t c\n"),
        ("r.TSV", "\ufeffprompt\ttarget\np 1\t a, b\np 2\t c\n"),
    ],
)
def test_records_are_found_in_many_shapes(tmp_path, name, text):
    (tmp_path / name).write_text(text, newline="")
    assert list(read_records(str(tmp_path / name))) == TWO
    assert list(read_records(str(tmp_path / name), limit=1)) == TWO[:1]


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": [says("user", "u")], "completion": [says("assistant", "a")]},
        {"turns": ["a", "b"], "reference": ["c", "d"]},
        {"messages": CHAT},
        {"prompt": "p", "data": [{"x": 1}], "target": "t"},
        {"prompt": ["a", "b"], "target": ["c"]},
    ],
)
def test_one_record_stays_one(tmp_path, record):
    assert unwrapped(record) == [record]
    (tmp_path / "a.json").write_text(json.dumps(record, indent=1))
    assert list(read_records(str(tmp_path / "a.json"))) == [record]


def test_a_line_of_jsonl_is_never_taken_apart(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"data": [{"prompt": "p", "target": "t"}]}\n')
    (record,) = read_records(str(tmp_path / "a.jsonl"))
    assert record == {"data": [{"prompt": "p", "target": "t"}]}
    columns = {"prompt": ["a", "b"], "target": ["c", "d"]}
    (tmp_path / "b.jsonl").write_text(lines_of([columns, columns]))
    assert list(read_records(str(tmp_path / "b.jsonl"))) == [columns, columns]


def test_a_split_of_a_document_is_the_one_that_is_named(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"train": TWO[:1], "test": TWO[1:]}))
    assert list(read_records(str(tmp_path / "a.json"), split="test")) == TWO[1:]


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.json", '{"data": [\n {"prompt": "p"},\n {"prompt" "q"}]}', "a.json:3: .*column 12"),
        ("b.jsonl", '{"prompt": "p", "target": \n{"prompt": "q"}\n', "b.jsonl:1: not valid JSON"),
        ("c.jsonl", '{"prompt": "p"}\n\n{"prompt" "q"}\n', "c.jsonl:3: .*column 11"),
        ("d.json", "[1, 2]", "d.json:1: expected a JSON object, found int"),
        ("e.csv", 'prompt,target\np,"t\nq,u\n', "e.csv:2: unexpected end of data"),
        ("f.csv", "prompt,x, x\np,1,2\n", "f.csv:1: the header names the column 'x' twice"),
        ("g.csv", "prompt,target\np,a, b\n", "g.csv:2: 3 cells, but the header names 2"),
        ("h.jsonl.gz", "no gzip", "h.jsonl.gz cannot be read: Not a gzipped file"),
        ("i.jsonl.xz", "no xz", "i.jsonl.xz cannot be read"),
        ("j.jsonl.bz2", "no bz2", "j.jsonl.bz2 cannot be read"),
        ("k.tar.gz", "x", "k.tar.gz has an unknown ending"),
    ],
)
def test_a_file_with_a_mistake_names_the_place(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        list(read_records(str(tmp_path / name)))


@pytest.mark.parametrize("ending, pack", [("gz", gzip), ("BZ2", bz2), ("xz", lzma)])
def test_packed_files(tmp_path, ending, pack):
    path = tmp_path / f"a.csv.{ending}"
    path.write_bytes(pack.compress(b'prompt,target\np 1," a, b"\np 2, c\n'))
    assert list(placed_records(str(path))) == [(f"{path}:2", TWO[0]), (f"{path}:3", TWO[1])]
    path.write_bytes(path.read_bytes()[:-5])  # cut, as by a download that broke off
    with pytest.raises(UserError, match="cannot be read: "):
        list(placed_records(str(path)))


def test_zstandard_reads_all_frames(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    path = tmp_path / "a.jsonl.zst"
    frames = [zstandard.compress(lines_of([record]).encode()) for record in TWO]
    path.write_bytes(b"".join(frames))
    assert list(read_records(str(path))) == TWO
    for cut in (path.read_bytes()[:-4], b"no zstd"):
        path.write_bytes(cut)
        with pytest.raises(UserError, match="a.jsonl.zst cannot be read: "):
            list(read_records(str(path)))


def test_zstandard_is_optional(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl.zst").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(UserError, match="a.jsonl.zst needs a package: pip install zstandard"):
        list(read_records(str(tmp_path / "a.jsonl.zst")))


@pytest.mark.parametrize(
    "raw, encoding",
    [
        ('{"prompt": "é", "target": "t"}\r\n'.encode("utf-16"), "utf-16"),
        ('{"prompt": "é", "target": "t"}\n'.encode("utf-16-le"), "utf-16-le"),
        ('{"prompt": "e", "target": "t"}\n'.encode("utf-16-be"), "utf-16-be"),
        ('{"prompt": "\u201cé\u201d", "target": "t"}\n'.encode("cp1252"), "cp1252"),
        ('{"prompt": "é", "target": "t"}\n'.encode("latin-1"), "latin-1"),
    ],
)
def test_the_probable_encoding_is_named_and_works(tmp_path, raw, encoding):
    path = tmp_path / "a.jsonl"
    path.write_bytes(raw)
    with pytest.raises(UserError, match=f"a.jsonl:1: byte 0x.* probably --encoding {encoding}$"):
        load_examples(str(path))
    (example,) = load_examples(str(path), encoding=encoding)
    assert example.prompt == json.loads(raw.decode(encoding))["prompt"]
    path.write_text('{"prompt": "é", "target": "t"}', encoding="utf-8")
    with pytest.raises(UserError, match="is not ascii; .*probably --encoding utf-8"):
        load_examples(str(path), encoding="ascii")


def test_places_limits_and_several_files(tmp_path):
    (tmp_path / "b.jsonl").write_text("\n" + lines_of(TWO))
    (tmp_path / "a.csv").write_text('prompt,target\n"p\n1",x\n\np2,y\n')
    (tmp_path / "c.json").write_text(json.dumps(TWO))
    (tmp_path / "t.txt").write_text("one two\n\nthree four\n")
    a, b, c, t = (str(tmp_path / name) for name in ("a.csv", "b.jsonl", "c.json", "t.txt"))
    sources = [f"{tmp_path}/[ab].*", c, t]
    expected = [f"{a}:3", f"{a}:5", f"{b}:2", f"{b}:3"]
    expected += [f"{c}, record 1", f"{c}, record 2", f"{t}:1", f"{t}:3"]
    assert [place for place, _ in placed_records(sources)] == expected
    assert [place for place, _ in placed_records(sources, limit=5)] == expected[:5]
    assert [example.place for example in load_examples(sources)] == expected
    with pytest.raises(UserError, match=r"--prompts .*/\*.parquet matches no file"):
        list(read_records(f"{tmp_path}/*.parquet", what="--prompts"))
    with pytest.raises(UserError, match=r"is a folder; .*, or all of them as '.*/\*.jsonl'"):
        list(read_records(str(tmp_path)))


def test_folders_of_save_to_disk(tmp_path):
    train, test = datasets.Dataset.from_list(TWO), datasets.Dataset.from_list(TWO[1:])
    train.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": train, "test": test}).save_to_disk(tmp_path / "dict")
    one, both = str(tmp_path / "one"), str(tmp_path / "dict")
    assert list(placed_records(one, limit=1)) == [(f"{one}, record 1", TWO[0])]
    assert list(read_records(both)) == TWO and list(read_records(both, split="test")) == TWO[1:]
    with pytest.raises(UserError, match="no split 'dev'; give --data-split one of test, train"):
        list(read_records(both, split="dev"))


class Arrows:
    """What `datasets` gives for a dataset of the hub, without a hub."""

    def __init__(self, dataset):
        self.dataset, self.asked = dataset, []

    def load(self, *args, **options):
        self.asked.append((*args, options))
        return self.dataset.to_iterable_dataset() if options["streaming"] else self.dataset


def test_a_hub_dataset_is_streamed_if_few_records_are_asked_for(monkeypatch):
    hub = Arrows(datasets.Dataset.from_list([*TWO, {"prompt": None, "target": "t"}]))
    monkeypatch.setattr(datasets, "load_dataset", hub.load)
    assert list(placed_records("a/b", limit=1)) == [("a/b, record 1", TWO[0])]
    assert list(read_records("a/b", config="c", split="dev"))[:2] == TWO
    asked = [{"split": "train", "streaming": True}, {"split": "dev", "streaming": False}]
    assert hub.asked == [("a/b", None, asked[0]), ("a/b", "c", asked[1])]
    with pytest.raises(UserError, match="a/b, record 3: no prompt field"):
        load_examples("a/b", strict=True)


def test_pictures_need_no_package_and_nulls_of_messages_go(tmp_path, monkeypatch):
    call = {"type": "function", "function": {"name": "w", "arguments": {"c": "Oslo"}}}
    other = {"type": "function", "function": {"name": "v", "arguments": {"d": 4}}}
    rows = [
        {"messages": [says("user", "u"), says("assistant", "a", tool_calls=[call])]},
        {
            "messages": [says("user", "u"), says("assistant", "b", tool_calls=[other])],
            "image": None,
        },
    ]
    image = {"bytes": b"no picture", "path": "a.png"}
    table = datasets.Dataset.from_list([row | {"image": image} for row in rows])
    table = table.cast_column("image", datasets.Image())
    table.to_parquet(tmp_path / "a.parquet")
    table.save_to_disk(tmp_path / "saved")
    monkeypatch.setitem(sys.modules, "PIL", None)
    for source in (tmp_path / "a.parquet", tmp_path / "saved"):
        first, second = load_examples(str(source))
        assert first.reply == says("assistant", "a", tool_calls=[call]), "no argument d: null"
        assert second.target == 'b\n{"name": "v", "arguments": {"d": 4}}'
        assert first.messages == [says("user", "u")] and first.columns == {"image": image}


# ---- what is left out, and what is said


def test_records_that_cannot_be_used_are_left_out_and_counted(tmp_path, capsys, monkeypatch):
    records = [{"prompt": "p", "output": "t"}] * 5 + [{"prompt": "p", "output": " "}] * 2
    records += [{"prompt": 3, "output": "t"}, {"prompt": "p"}]
    source = write(tmp_path / "a.jsonl", records)
    examples = load_examples(source)
    assert [e.target for e in examples] == ["t"] * 5 + [""] and examples[5].place == f"{source}:9"
    left_out, no_target, repeats = capsys.readouterr().err.splitlines()
    assert left_out == (
        f"note: 3 of 9 records of {source} are left out: 2 x field 'output' is empty, so there is "
        f"nothing to learn from it (first: {source}:6); 1 x field 'prompt' must be a string, "
        f"found int (a number needs quotes) (first: {source}:8)"
    )
    assert no_target == "note: 1 of 6 examples have no target: they serve the reward steps only"
    assert repeats == (
        "note: 4 of 6 examples repeat an earlier one, prompt and target: they are trained again"
    )
    with pytest.raises(UserError, match="a.jsonl:6: field 'output' is empty"):
        load_examples(source, strict=True)
    with pytest.raises(UserError, match="a.jsonl:1: field 'output' is empty"):
        load_examples(write(tmp_path / "other_a.jsonl", records[5:8]))
    monkeypatch.setattr(parallel, "rank", lambda: 1)
    capsys.readouterr()
    load_examples(source)
    assert capsys.readouterr().err == ""


def test_what_a_dialogue_says_and_nobody_learns_is_counted(tmp_path, capsys):
    greeting, empty = says("assistant", "Welcome!"), says("assistant", " \n")
    turns = [greeting, says("user", "u"), empty, says("user", "v"), says("assistant", "g")]
    records = [{"messages": [*turns[:-1], says("assistant", reply)]} for reply in "ghi"]
    source = write(tmp_path / "a.jsonl", [*records, {"messages": turns[1:]}])
    assert [e.target for e in load_examples(source)] == ["g", "h", "i", "g"]
    assert capsys.readouterr().err.splitlines() == [
        f"note: 4 assistant turns of {source} are empty: they are read, but not trained",
        f"note: 3 assistant turns of {source} stand before any user turn: they are read, but not "
        "trained",
    ]


def test_a_choice_between_fields_is_said_unless_the_user_made_it(tmp_path, capsys):
    both = {"question": "q", "response": "long", "answer": "4"}
    records = [both, {**both, "question": "another"}]
    records += [{"prompt": "p", "instruction": "i", "output": "o", "input": "more"}]
    records += [{"prompt": "p", "input": "more", "response": "r", "answer": " "}]
    source = write(tmp_path / "a.jsonl", records)
    assert [e.target for e in load_examples(source)] == ["long", "long", "o", "r"]
    where = f"records of {source}"
    assert capsys.readouterr().err.splitlines() == [
        f"note: in 2 {where} 'response' is the target, and not 'answer' (--target-field chooses)",
        f"note: in 1 {where} 'prompt' is the prompt, and not 'instruction' (--prompt-field "
        "chooses)",
    ]
    source = write(tmp_path / "b.jsonl", [both])
    assert load_examples(source, target_field="answer")[0].target == "4"
    assert capsys.readouterr().err == ""


def test_empty_prompts_and_pairs_that_are_read_as_prompts_are_counted(tmp_path, capsys):
    blank = {"messages": [says("user", " "), says("assistant", "a")]}
    records = [{"prompt": "\n", "target": "t"}, blank, {"prompt": "p", "target": "t"}]
    load_examples(write(tmp_path / "a.jsonl", records))
    assert capsys.readouterr().err == "note: 2 of 3 examples have an empty prompt\n"
    pair = {"prompt": "p", "chosen": "c", "rejected": "r"}
    load_examples(write(tmp_path / "b.jsonl", [pair] * 3 + records[2:]))
    assert "note: 3 of 4 examples are preference pairs" in capsys.readouterr().err


def test_a_record_without_both_sides_is_no_pair(tmp_path):
    source = write(tmp_path / "a.jsonl", [{"prompt": "p", "chosen": "c", "rejected": None}])
    with pytest.raises(UserError) as caught:
        load_pairs(source)
    expected = "a preference pair has 'chosen' and 'rejected', the record has prompt, chosen"
    assert str(caught.value) == f"{source}:1: {expected}"


@pytest.mark.parametrize("name", ["chosen", "rejected"])
def test_an_empty_side_is_left_out_of_the_pairs_as_text_and_as_messages(tmp_path, capsys, name):
    pair = {"prompt": "p", "chosen": "c", "rejected": "r"}
    source = write(tmp_path / "a.jsonl", [pair, pair | {name: " "}])
    assert [(p.chosen, p.rejected) for p in load_pairs(source)] == [("c", "r")]
    assert f"1 of 2 records of {source} are left out: 1 x '{name}' is empty" in (
        capsys.readouterr().err
    )


def test_turns_of_weight_0_and_unwanted_completions_are_counted(tmp_path, capsys):
    turns = [says("user", "u"), says("assistant", "BAD", weight=0), says("user", "v")]
    source = write(tmp_path / "a.jsonl", [{"messages": [*turns, says("assistant", "g", weight=1)]}])
    (example,) = load_examples(source)
    history = [says("user", "u"), says("assistant", "BAD"), says("user", "v")]
    assert (example.target, example.messages) == ("g", history)
    assert f"note: 1 assistant turns of {source} have weight 0" in capsys.readouterr().err
    with pytest.raises(UserError, match="has only turns of weight 0"):
        to_examples({"messages": turns[:2]})
    kto = [{"prompt": "p", "completion": c, "label": c == "good"} for c in ("good", "bad")]
    good, bad = load_examples(write(tmp_path / "b.jsonl", kto))
    assert (good.target, bad.target, bad.prompt) == ("good", "", "p") and not bad.columns["label"]
    assert "1 completions of" in capsys.readouterr().err


def test_the_flags_reach_the_reader(tmp_path):
    parser = Parser("")
    add_data_flags(parser)
    words = ["--strict", "--raw", "--template-args", '{"enable_thinking": false}', "--limit", "2"]
    options = data_options(parser.parse_args(words))
    own = {"prompt": "q", "target": "t", "tools": [{"name": "f"}]}
    source = write(tmp_path / "a.jsonl", [{"prompt": "p", "target": "t"}, own, {"prompt": 1}])
    plain, with_tools = load_examples(source, **options)
    assert not plain.is_chat and plain.template_args == {"enable_thinking": False}
    assert with_tools.template_args == {"enable_thinking": False, "tools": [{"name": "f"}]}
    assert not with_tools.is_chat and with_tools.messages is None
    del options["limit"]
    with pytest.raises(UserError, match="a.jsonl:3: field 'prompt' must be a string, found int"):
        load_examples(source, **options)
    for text in ("{", "[]"):
        with pytest.raises(UserError, match="--template-args"):
            parser.parse_args(["--template-args", text])


# ---- what belongs to a prompt


@pytest.mark.parametrize(
    "record, prompt, messages",
    [
        ({"question": "q", "context": "c", "input": "i", "answer": "t"}, "q\n\nc\n\ni", None),
        ({"input": "i", "context": "c", "output": "t"}, "i\n\nc", None),
        ({"inputs": "i", "targets": "t"}, "i", None),
        ({"prompt": "p", "text": "t"}, "p", None),
        (
            {"instruction": "q", "output": "t", "system": "S", "history": [["a", "b"]]},
            "System:\nS\n\nUser:\na\n\nAssistant:\nb\n\nUser:\nq\n\nAssistant:\n",
            [says("system", "S"), says("user", "a"), says("assistant", "b"), says("user", "q")],
        ),
        (
            {"prompt": "q", "target": "t", "history": ["a", "b"], "context": "c"},
            "User:\na\n\nAssistant:\nb\n\nUser:\nq\n\nc\n\nAssistant:\n",
            [says("user", "a"), says("assistant", "b"), says("user", "q\n\nc")],
        ),
        (
            {"prompt": "q", "target": "t", "history": '[{"from": "human", "value": "a"}]'},
            "User:\na\n\nUser:\nq\n\nAssistant:\n",
            [says("user", "a"), says("user", "q")],
        ),
        (
            {"prompt": "q", "target": "t", "tools": '[{"name": "f"}]'},
            'Tools:\n[{"name": "f"}]\n\nUser:\nq\n\nAssistant:\n',
            [says("user", "q")],
        ),
        ({"prompt": "q", "target": "t", "system": " ", "history": [], "tools": []}, "q", None),
        ({"prompt": "q", "target": "t", "tools": "hammer, saw"}, "q", None),
    ],
)
def test_nothing_that_belongs_to_a_prompt_is_dropped(record, prompt, messages):
    (example,) = to_examples(record)
    assert (example.prompt, example.target, example.messages) == (prompt, "t", messages)
    assert example.is_chat


@pytest.mark.parametrize(
    "record, message",
    [
        ({"prompt": "p", "target": "t", "context": ["c"]}, "'context' belongs to the prompt and"),
        ({"prompt": "p", "target": "t", "system": 5}, "'system' must be a string, found int"),
        ({"prompt": "p", "target": "t", "history": "old"}, "'history' must be a list of"),
        ({"prompt": "p", "target": "t", "history": ["a", "b", "c"]}, "'history' must be a list of"),
        ({"system": "a", "system_prompt": "b", "prompt": "p", "target": "t"}, "differ"),
        ({"system": "No.", "messages": CHAT}, "two system prompts"),
        ({"prompt": {"text": "x", "replies": []}}, "a tree of messages"),
        ({"message_id": "t", "parent_id": None, "text": "a b"}, "one message of a tree"),
        ({"prompt": "p", "completion": [says("user", "u")]}, "not begin with an assistant turn"),
        ({"messages": [says("user", "u"), says("assistant", None)]}, "found NoneType"),
        (
            {"messages": [says("user", [{"type": "image_url", "image_url": "x"}])]},
            "content of type 'image_url'",
        ),
        ({"conversations": [{"from": "function_call", "value": "{}"}]}, "role 'function_call'"),
        ({"messages": [says("user", "u", weight=0.5)]}, "a weight in 'messages' is not 0 or 1"),
        ({"messages": '[{"role": '}, "field 'messages' is not valid JSON"),
    ],
)
def test_what_cannot_be_read_is_never_guessed(record, message):
    with pytest.raises(UserError) as caught:
        to_examples(record)
    assert message in str(caught.value)


# ---- dialogues


@pytest.mark.parametrize(
    "record",
    [
        {"messages": CHAT},
        {"messages": CHAT[1:], "system": "Be kind."},
        {"conversation": CHAT, "system_prompt": "Be kind."},
        {"messages": json.dumps(CHAT)},
        {
            "conversations": [
                {"from": who, "value": m["content"], "weight": None}
                for who, m in zip(("system", "human", "gpt", "Human", "GPT"), CHAT)
            ]
        },
        {"messages": [{**CHAT[0], "role": "developer"}, *CHAT[1:]]},
        {"messages": [says(m["role"], [{"type": "text", "text": m["content"]}]) for m in CHAT]},
        {"text": "Be kind.### Human: Hi### Assistant: Hello!### Human: Bye### Assistant: See you."},
        {"prompt": CHAT[:2], "completion": CHAT[2:]},
    ],
)
def test_dialogues_of_every_shape_are_the_same(record):
    first, second = to_examples(record)
    assert (first.messages, first.target, first.user_turns) == (CHAT[:2], "Hello!", ("Bye",))
    assert (second.messages, second.target, second.user_turns) == (CHAT[:4], "See you.", ())
    assert first.prompt == render_dialogue(CHAT[:2]) and first.reply is None


def test_prompt_and_completion_may_be_messages():
    said, answer = [says("user", "u")], says("assistant", "a")
    for record in (
        {"prompt": said, "completion": [answer], "id": 1},
        {"prompt": "u", "completion": answer, "id": 1},
        {"prompt": said, "answer": "a", "id": 1},
    ):
        assert to_examples(record) == [Example(render_dialogue(said), "a", {"id": 1}, said)]
    assert to_examples({"prompt": said}) == [Example(render_dialogue(said), "", {}, said)]
    assert to_examples({"prompt": "p", "target": None}) == [Example("p", "")]


def test_a_dialogue_without_answers_is_a_prompt():
    said = [CHAT[0], says("user", "a"), says("user", "b")]
    (example,) = to_examples({"messages": said})
    assert example == Example(render_dialogue(said[:2]), "", {}, said[:2], ("b",))


def test_a_reference_of_turns_is_text_as_it_is():
    (example,) = to_examples({"turns": ["q"], "reference": "[see note"})
    assert example.target == "[see note" and example.user_turns == ()
    (example,) = to_examples({"turns": '["q", "r"]', "reference": '["a", "b"]', "system": "S"})
    said = [says("system", "S"), says("user", "q")]
    assert example == Example(render_dialogue(said), "a", {"system": "S"}, said, ("r",))


def test_an_assistant_turn_that_opens_a_dialogue_is_history():
    opened = [says("assistant", "Welcome."), *CHAT[1:3]]
    (example,) = to_examples({"messages": opened})
    assert (example.target, example.messages) == ("Hello!", opened[:2])


CALL = {"id": "c1", "type": "function", "function": {"name": "w", "arguments": '{"city": "Å"}'}}
PARSED = {"id": "c1", "type": "function", "function": {"name": "w", "arguments": {"city": "Å"}}}


def test_tool_calls_and_reasoning_are_a_reply():
    answer = says("assistant", "4.", reasoning_content="hm")
    turns = [
        says("user", "u"),
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        says("function", "4 degrees", name="w", tool_call_id="c1"),
        answer,
    ]
    tools = [{"type": "function", "function": {"name": "w"}}]
    first, second = to_examples({"messages": turns, "tools": json.dumps(tools)})
    said = '{"name": "w", "arguments": {"city": "Å"}}'
    assert first.target == said and first.reply == says("assistant", "", tool_calls=[PARSED])
    assert second.target == "4." and second.reply == answer
    assert second.messages[2] == says("tool", "4 degrees", name="w", tool_call_id="c1")
    assert first.template_args == second.template_args == {"tools": tools}
    assert second.prompt == (
        f"Tools:\n{json.dumps(tools)}\n\nUser:\nu\n\nAssistant:\n{said}\n\n"
        "Tool:\n4 degrees\n\nAssistant:\n"
    )


@pytest.mark.parametrize(
    "more",
    [
        {"tool_calls": [{"name": "w", "arguments": {"city": "Å"}}]},
        {"function_call": {"name": "w", "arguments": '{"city": "Å"}'}},
        {"tool_calls": '[{"name": "w", "arguments": {"city": "Å"}}]'},
    ],
)
def test_other_shapes_of_tool_calls(more):
    messages, _ = to_messages([says("assistant", "x", **more)])
    call = {"type": "function", "function": {"name": "w", "arguments": {"city": "Å"}}}
    assert messages == [says("assistant", "x", tool_calls=[call])]


def test_an_argument_that_is_null_stays():
    call = {"name": "w", "arguments": {"city": None}}
    messages, _ = to_messages([says("assistant", "x", tool_calls=[call])])
    assert messages[0]["tool_calls"][0]["function"]["arguments"] == {"city": None}


# ---- prompts alone


@pytest.mark.parametrize(
    "record, expected",
    [
        ({"prompt": "p", "answer": "t"}, Example("p", "", {"target": "t"})),
        ({"prompt": "p", "answer": 7}, Example("p", "", {"answer": 7})),
        ({"prompt": "p", "output": ""}, Example("p", "", {"output": ""})),
        ({"prompt": "p", "chosen": "a", "rejected": "b"}, None),
        (
            {"messages": CHAT},
            Example(render_dialogue(CHAT[:2]), "", {"target": "Hello!"}, CHAT[:2], ("Bye",)),
        ),
        ({"messages": CHAT[:4]}, Example(render_dialogue(CHAT[:4]), "", {}, CHAT[:4])),
        (
            {"prompt": CHAT[:2], "completion": CHAT[2:3]},
            Example(render_dialogue(CHAT[:2]), "", {"target": "Hello!"}, CHAT[:2]),
        ),
        ({"chosen": CHAT[:3], "rejected": [*CHAT[:2], says("assistant", "Go.")]}, None),
    ],
)
def test_every_record_serves_as_one_prompt(tmp_path, record, expected):
    (example,) = to_prompts(record)
    assert example.target == "" and example.reply is None
    if expected is None:
        assert example.prompt in ("p", render_dialogue(CHAT[:2]))
        assert set(example.columns) == {"chosen", "rejected"}
    else:
        assert example == expected
        (loaded,) = load_prompts(write(tmp_path / "a.jsonl", [record]), what="--prompts")
        assert loaded == expected and loaded.place.endswith("a.jsonl:1")


def test_the_reviews_serve_as_prompts():
    examples, prompts = load_examples("reviews", limit=3), load_prompts("reviews", limit=3)
    assert [(p.prompt, p.target, p.columns["target"]) for p in prompts] == [
        (e.prompt, "", e.target) for e in examples
    ]
    assert not examples[0].is_chat and not to_examples({"text": "one two"})[0].is_chat


# ---- pairs


GOOD, BAD = says("assistant", "A pear."), says("assistant", "No.")
ASKED = [says("user", "A fruit?")]


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "A fruit?", "chosen": [*ASKED, GOOD], "rejected": [*ASKED, BAD]},
        {"chosen": [*ASKED, GOOD], "rejected": [*ASKED, BAD]},
        {"prompt": ASKED, "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": ASKED, "chosen": GOOD, "rejected": BAD},
        {"prompt": ASKED, "chosen": [*ASKED, GOOD], "rejected": [*ASKED, BAD]},
        {"prompt": ASKED, "chosen": "A pear.", "rejected": "No."},
        {"question": "A fruit?", "chosen": json.dumps([GOOD]), "rejected": json.dumps([BAD])},
    ],
)
def test_pairs_of_messages(record):
    pair = to_pair({**record, "score": 8})
    assert pair == Pair(render_dialogue(ASKED), "A pear.", "No.", {"score": 8}, ASKED)
    assert pair.chosen_reply is None


def test_pairs_keep_system_tools_and_whole_replies():
    record = {"system": "S", "question": "q", "chosen": "a", "rejected": "b"}
    said = [says("system", "S"), says("user", "q")]
    assert to_pair(record) == Pair(render_dialogue(said), "a", "b", {"system": "S"}, said)
    calls = says("assistant", None, tool_calls=[CALL])
    tools = [{"name": "w"}]
    pair = to_pair({"chosen": [*ASKED, calls], "rejected": [*ASKED, BAD], "tools": tools})
    assert pair.chosen_reply == says("assistant", "", tool_calls=[PARSED])
    assert pair.rejected_reply is None and pair.template_args == {"tools": tools}
    assert pair.prompt.startswith('Tools:\n[{"name": "w"}]\n\nUser:')


def test_transcripts_are_text_and_messages():
    text = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c: d\n\nAssistant:"
    messages = [says("user", "a"), says("assistant", "b"), says("user", "c: d")]
    assert from_transcript(text) == messages and from_transcript("Hi" + text) is None
    for record in (
        {"chosen": text + " yes", "rejected": text + " no"},
        {"prompt": text, "chosen": " yes", "rejected": " no"},
    ):
        assert to_pair(record) == Pair(text, " yes", " no", {}, messages)
        assert to_pair(record, raw=True) == Pair(text, " yes", " no")


def test_a_prompt_that_both_responses_repeat_is_taken_off_and_counted(tmp_path, capsys):
    """Pairs of whole transcripts beside their prompt, which would be read twice."""
    transcript = "\n\nHuman: hi\n\nAssistant: yes?\n\nHuman: a riddle\n\nAssistant:"
    question = "Which fruit is green?"
    repeated = [
        (transcript, transcript, " A pear.", " No."),
        (question, question, " A pear.", "\nNo. " + question),
        ("\u54ea\u79cd\u6c34\u679c\uff1f", "\u54ea\u79cd\u6c34\u679c\uff1f", "\u68a8", "\u4e0d"),
    ]
    as_they_are = [
        ("I am", "", "I am fine", "I ambled off"),  # inside a word
        ("Hello there", "", "Hello there", "Hello there friend"),  # nothing would be left
        ("\u043f\u0440\u0438", "", "\u043f\u0440\u0438! \u0434", "\u043f\u0440\u0438 \u044f"),
        (question, "", question + " A pear.", "No."),  # one side quotes the question
        ("Hello", "", "Hello there!", "Hello."),
        (transcript, "", transcript[1:] + " A pear.", transcript[1:] + " No."),
    ]
    rows = [
        {"prompt": prompt, "chosen": before + chosen, "rejected": before + rejected}
        for prompt, before, chosen, rejected in [*repeated, *as_they_are]
    ]
    same = {"prompt": question, "chosen": question + " Yes.", "rejected": question + " Yes."}
    source = write(tmp_path / "a.jsonl", [*rows, same])
    for raw in (False, True):
        pairs = load_pairs(source, raw=raw)
        expected = [(p, chosen, rejected) for p, _, chosen, rejected in [*repeated, *as_they_are]]
        assert [(p.prompt, p.chosen, p.rejected) for p in pairs] == expected
        said = "3 of 9 pairs of {} both responses repeat the prompt: it is taken off them"
        assert said.format(source) in capsys.readouterr().err
    assert load_pairs(source)[0].messages[-1] == says("user", "a riddle")
    # A system turn is in front of the question, so the prompt is not what the record repeats.
    pair = to_pair({"system": "S", **rows[1]})
    assert (pair.chosen, pair.rejected) == (" A pear.", "\nNo. " + question)
    capsys.readouterr()
    assert len(load_pairs(write(tmp_path / "b.jsonl", rows[3:]))) == 6
    assert "repeat" not in capsys.readouterr().err


def test_pairs_that_cannot_be_used_are_left_out_and_counted(tmp_path, capsys):
    record = {"prompt": "p", "chosen": "a", "rejected": "b"}
    records = [record, {**record, "rejected": None}, {**record, "rejected": "a"}]
    records += [{"chosen": [*ASKED, GOOD], "rejected": [says("user", "Other?"), BAD]}]
    system = [says("system", "S"), *ASKED]
    records += [{"prompt": system, "chosen": [*ASKED, GOOD], "rejected": [*ASKED, BAD]}]
    records += [{**record, "chosen": [GOOD]}, {"chosen": [GOOD], "rejected": [BAD]}]
    source = write(tmp_path / "a.jsonl", records)
    (pair,) = load_pairs(source, template_args={"x": 1})
    assert pair == Pair("p", "a", "b") and pair.is_chat
    assert pair.place == f"{source}:1" and pair.template_args == {"x": 1}
    note = capsys.readouterr().err
    for words in (
        "6 of 7 records",
        "do not begin with the messages of prompt",
        "a preference pair has 'chosen' and 'rejected', the record has prompt, chosen",
        "'chosen' and 'rejected' are the same",
        "differ in more than their last turn",
        "field 'chosen' must be a string, found list",
        "; and 1 other reasons",
    ):
        assert words in note
    with pytest.raises(UserError, match="hold replies alone"):
        to_pair(records[-1])
    assert not load_pairs(source, raw=True)[0].is_chat
    with pytest.raises(UserError, match="a.jsonl:2: a preference pair has"):
        load_pairs(source, strict=True)


@pytest.mark.parametrize("label", [False, 0, 0.0, "0", "FALSE", "false"])
def test_a_completion_that_people_did_not_want_is_no_demonstration(label):
    record = {"prompt": "p", "completion": "bad", "label": label}
    assert to_examples(record)[0].target == ""
    assert to_examples({**record, "label": True})[0].target == "bad"


def test_lists_as_python_prints_them_are_read_as_dialogues():
    messages = "[{'role': 'user', 'content': \"it's\"}, {'role': 'assistant', 'content': 'a'}]"
    (example,) = to_examples({"messages": messages})
    assert (example.messages, example.target) == ([{"role": "user", "content": "it's"}], "a")
    broken = "[{'role': 'user', 'content': 'q'} {'role': 'assistant', 'content': 'a'}]"
    with pytest.raises(UserError, match="not valid JSON"):
        to_examples({"prompt": "p", "completion": broken})


def test_the_older_names_of_tools_and_system_prompts_are_read():
    record = {"functions": [{"name": "w"}], "messages": CHAT[1:3], "system_message": "Be kind."}
    (example,) = to_examples(record)
    assert example.template_args == {"tools": [{"type": "function", "function": {"name": "w"}}]}
    assert example.messages[0] == {"role": "system", "content": "Be kind."}
    (example,) = to_examples({"tools": {"name": "w"}, "messages": CHAT[1:3]})
    assert example.template_args == {"tools": [{"name": "w"}]}


def test_a_transcript_is_a_dialogue_for_sft_too():
    prompt = "\n\nHuman: hi\n\nAssistant:"
    (example,) = to_examples({"prompt": prompt, "response": " Hello."})
    assert (example.prompt, example.target) == (prompt, " Hello.")
    assert example.messages == [{"role": "user", "content": "hi"}]
    assert to_examples({"prompt": prompt, "response": "x"}, raw=True)[0].messages is None


def test_arguments_that_are_no_arguments_of_a_template_are_refused():
    with pytest.raises(argparse.ArgumentTypeError, match="add_generation_prompt is set by"):
        json_object('{"add_generation_prompt": true}')
