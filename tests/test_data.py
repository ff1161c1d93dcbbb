"""Sources, splits, token ids, the layout: a batch holds what the record says, masks included."""

import json
import random
import re

import datasets
import pytest
import torch
from transformers import AutoTokenizer, GPT2Tokenizer

from data import BatchStream, decode, encode_prompt, encode_target, main, make_batch, split_examples
from engine import UserError
from reviews import is_fluent_review, review_metrics
from sources import Example, load_examples, make_reviews, render_dialogue, to_examples

CHAT = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "See you."},
]

# ---- the layout


def test_the_picture_of_the_layout():
    batch = make_batch(None, [[11, 12, 13], [21]], [[14, 15, 2], [22, 2]], max_length=16)
    assert batch.input_ids.tolist() == [[11, 12, 13, 14, 15, 2], [21, 22, 2, 0, 0, 0]]
    assert batch.attention_mask.int().tolist() == [[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]]
    assert batch.response_mask.int().tolist() == [[0, 0, 0, 1, 1, 1], [0, 1, 1, 0, 0, 0]]
    assert (
        batch.input_ids.dtype == torch.long
        and batch.attention_mask.dtype == batch.response_mask.dtype == torch.bool
    )


@pytest.mark.parametrize("pad, eos", [(0, 2), (2, 2), (None, 2), (13, 2)])
def test_masks_come_from_lengths_whatever_the_pad_token_is(pad, eos):
    class Tokenizer:
        pad_token_id, eos_token_id = pad, eos

    batch = make_batch(Tokenizer, [[11, 13], [21]], [[13, 2], [2]], max_length=16)
    assert batch.response_mask.int().tolist() == [[0, 0, 1, 1], [0, 1, 0, 0]], (
        "an EOS that looks like padding is still trained"
    )
    assert batch.attention_mask.int().tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]


def test_truncation_takes_the_prompts_left_then_the_targets_right():
    batch = make_batch(None, [[1, 2, 3, 4], [1, 2]], [[5, 6, 2], [5, 6, 7, 8, 2]], max_length=4)
    assert batch.input_ids.tolist() == [[4, 5, 6, 2], [2, 5, 6, 7]], (
        "the second target loses its end and gets no EOS in its place"
    )
    assert batch.response_mask.int().tolist() == [[0, 1, 1, 1], [0, 1, 1, 1]]


@pytest.mark.parametrize(
    "prompts, responses, length, message",
    [
        ([[]], [[1]], 8, "row 0 has an empty prompt"),
        ([[1]], [[]], 8, "empty response"),
        ([[1]], [[1]], 1, "max_length is 1"),
    ],
)
def test_rows_that_cannot_be_scored_are_refused(prompts, responses, length, message):
    with pytest.raises(ValueError, match=message):
        make_batch(None, prompts, responses, length)


def test_rows_are_trimmed_to_the_longest_of_them():
    batch = make_batch(None, [[1], [1], [1]], [[3] * 9, [4, 5], [6]], max_length=16)
    part = batch.rows(torch.tensor([2, 1]))
    assert part.input_ids.tolist() == [
        [1, 6, 0],
        [1, 4, 5],
    ] and part.response_mask.int().tolist() == [[0, 1, 0], [0, 1, 1]]


# ---- text to ids


def test_prompt_and_target_are_tokenised_apart(tokenizer):
    for prompt, target in [
        ("the plot was ", "dull ."),
        ("the plot", "\nwas dull ."),
        ("the plo", "t was dull ."),
        ("the plot", " was dull ."),
    ]:
        example = Example(prompt, target)
        assert encode_prompt(tokenizer, example) == tokenizer(prompt).input_ids
        ids = encode_target(tokenizer, target)
        assert ids == tokenizer(target).input_ids + [tokenizer.eos_token_id]
        assert decode(tokenizer, encode_prompt(tokenizer, example) + ids) == prompt + target
    assert encode_target(tokenizer, "x<|endoftext|>") == encode_target(tokenizer, "x"), (
        "one EOS, not two"
    )


def test_a_template_that_refuses_a_dialogue_is_one_line(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    strict = AutoTokenizer.from_pretrained(tmp_path)
    strict.chat_template = "{{ raise_exception('no system turns') }}"
    with pytest.raises(UserError, match="chat template refuses the dialogue .* no system turns"):
        encode_prompt(strict, to_examples({"messages": CHAT})[0])


def test_an_empty_prompt_still_has_a_first_token(tokenizer):
    assert encode_prompt(tokenizer, Example("", "x")) == [tokenizer.eos_token_id]


def with_bos(tokenizer, tmp_path, eos_too=False):
    """A copy of the tokenizer that puts BOS before (and EOS after) every text, as Llama's does."""
    from tokenizers.processors import TemplateProcessing

    tokenizer.save_pretrained(tmp_path)
    copy = AutoTokenizer.from_pretrained(tmp_path)
    copy.add_special_tokens({"bos_token": "<|bos|>"})
    pieces = [("<|bos|>", copy.bos_token_id), ("<|endoftext|>", copy.eos_token_id)]
    copy.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|bos|> $A" + " <|endoftext|>" * eos_too, special_tokens=pieces
    )
    return copy


@pytest.mark.parametrize("eos_too", [False, True])
def test_bos_comes_exactly_once(tokenizer, tmp_path, eos_too):
    bos_adding = with_bos(tokenizer, tmp_path, eos_too)
    plain = tokenizer("the plot").input_ids
    assert encode_prompt(bos_adding, Example("the plot", "x")) == [bos_adding.bos_token_id, *plain]
    assert encode_prompt(bos_adding, Example("<|bos|>the plot", "x")) == [
        bos_adding.bos_token_id,
        *plain,
    ]
    assert encode_prompt(bos_adding, Example("", "x"))[0] == bos_adding.bos_token_id
    assert encode_target(bos_adding, " dull")[
        -1
    ] == bos_adding.eos_token_id and bos_adding.bos_token_id not in encode_target(
        bos_adding, " dull"
    )

    bos_adding.chat_template = (
        "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    ids = encode_prompt(bos_adding, to_examples({"messages": CHAT})[1])
    assert ids.count(bos_adding.bos_token_id) == 1
    assert (
        bos_adding.decode(ids)
        == "<|bos|>[system]Be kind.[user]Hi[assistant]Hello![user]Bye[assistant]"
    )


def test_sentencepiece_like_tokenizers_get_one_space_not_two(shared):
    tokenizer = AutoTokenizer.from_pretrained(shared / "stories260K")
    example = Example("Once upon", " a time")
    ids = encode_prompt(tokenizer, example) + encode_target(tokenizer, example.target)
    assert ids == tokenizer("Once upon a time").input_ids + [tokenizer.eos_token_id]
    assert ids[0] == tokenizer.bos_token_id == tokenizer.eos_token_id
    assert decode(tokenizer, encode_target(tokenizer, " a time")) == " a time", (
        "and decoding gives the space back"
    )


def test_the_real_gpt2_tokenizer_has_no_pad_token_and_needs_none(shared):
    tokenizer = GPT2Tokenizer.from_pretrained(shared / "gpt2_tokenizer")
    assert tokenizer.pad_token_id is None
    example = Example("The film was", " a delight.")
    ids = encode_prompt(tokenizer, example), encode_target(tokenizer, example.target)
    assert ids == (
        tokenizer("The film was").input_ids,
        tokenizer(" a delight.").input_ids + [50256],
    )
    batch = make_batch(tokenizer, [ids[0]] * 2, [ids[1], ids[1][-1:]], max_length=32)
    assert (
        batch.response_mask.sum(1).tolist() == [len(ids[1]), 1] and batch.input_ids[1, -1] == 50256
    )


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
        (
            {"prompt": "p"},
            "no target field: looked for target, completion, response, output, answer; "
            "the record has prompt",
        ),
        ({"target": "t"}, "no prompt field"),
        ({}, "the record has nothing"),
        ({"prompt": 3, "target": "t"}, "field 'prompt' must be a string, found int"),
        ({"prompt": "p", "target": ["t"]}, "field 'target' must be a string, found list"),
        ({"prompt": "p", "target": " \n"}, "field 'target' is empty"),
        ({"messages": "hello"}, "must be a list of {role, content} objects"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "unknown role 'robot'"),
        ({"messages": CHAT[:2]}, "no assistant turn"),
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
    assert "note: 1 texts of" in capsys.readouterr().err


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
        ("e.csv", b'prompt,target\n"two\nlines",t\np,\n', "e.csv:4: no target field"),
        ("f.txt", b"", "f.txt is empty"),
        ("g.jsonl", b"\xff\xfe\x00\x01", "g.jsonl:1: byte 0xff at offset 0 is not utf-8"),
        ("h.parquet", b"not parquet", "h.parquet cannot be read"),
        (
            "j.jsonl",
            b'{"prompt": "p", "target": "\\ud83d"}',
            "j.jsonl:1: field 'target' has half of a surrogate pair",
        ),
        ("k.jsonl", b"[" * 5000, "k.jsonl:1: not"),
        ("l.csv", b"prompt,target\np,t\n\n\np,\n", "l.csv:5: no target field"),
        ("i.xlsx", b"x", "unknown ending; known are .jsonl, .json, .csv, .parquet, .txt"),
    ],
)
def test_a_broken_file_is_named_with_its_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_examples(str(tmp_path / name))
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


# ---- split and stream


def test_the_split_depends_on_the_record_alone():
    examples = make_reviews(500)
    train, held_out = split_examples(examples)
    assert len(train) + len(held_out) == 500 and 25 < len(held_out) < 80
    shuffled = random.Random(0).sample(examples, 300)
    _, fewer = split_examples(shuffled)
    assert {(e.prompt, e.target) for e in fewer} == {(e.prompt, e.target) for e in held_out} & {
        (e.prompt, e.target) for e in shuffled
    }


def test_the_turns_of_a_dialogue_share_a_side():
    examples = [
        e
        for i in range(200)
        for e in to_examples(
            {"messages": [CHAT[0], {"role": "user", "content": f"hi {i}"}, *CHAT[2:]]}
        )
    ]
    train, held_out = split_examples(examples)
    sides = [{e.messages[1]["content"] for e in side} for side in (train, held_out)]
    assert 5 < len(sides[1]) < 50 and not sides[0] & sides[1], (
        "a system prompt that all share does not put them on one side"
    )


@pytest.mark.parametrize("n", [1, 2, 3])
def test_small_data_still_has_two_sides(n):
    train, held_out = split_examples(make_reviews(n))
    assert len(held_out) == 1 and len(train) == max(n - 1, 1)


def test_the_stream_draws_each_item_once_an_epoch_and_resumes_anywhere():
    stream = BatchStream(list(range(10)), batch_size=4, seed=1)
    drawn = [stream.next() for _ in range(3)]
    state = stream.state_dict()
    drawn += [stream.next() for _ in range(7)]
    flat = sum(drawn, [])
    epochs = [flat[i : i + 10] for i in range(0, 40, 10)]
    assert (
        all(sorted(epoch) == list(range(10)) for epoch in epochs)
        and len({tuple(epoch) for epoch in epochs}) == 4
    )
    resumed = BatchStream(list(range(10)), batch_size=4, seed=1)
    resumed.load_state_dict(state)
    assert [resumed.next() for _ in range(7)] == drawn[3:]


def test_a_source_smaller_than_a_batch_repeats():
    assert sorted(BatchStream([1, 2, 3], batch_size=7, seed=0).next()) in (
        [1, 1, 1, 2, 2, 3, 3],
        [1, 1, 2, 2, 2, 3, 3],
        [1, 1, 2, 2, 3, 3, 3],
    )


# ---- the built-in task


def test_reviews_are_deterministic_parse_and_are_mixed():
    examples = make_reviews(1000, seed=3)
    assert examples == make_reviews(1000, seed=3) != make_reviews(1000, seed=4)
    assert all(is_fluent_review(e.prompt + e.target) for e in examples)
    metrics = review_metrics([e.prompt for e in examples], [e.target for e in examples])
    assert (
        metrics["fluent"] == 1
        and 0.25 < metrics["positive"] == metrics["fluent_and_positive"] < 0.45
    )


def test_the_command_says_what_a_file_becomes(tmp_path, capsys):
    (tmp_path / "d.csv").write_text(
        "id,Frage,Antwort\n" + "".join(f"{i},Was ist {i}?,Eine Zahl\n" for i in range(30))
    )
    main([str(tmp_path / "d.csv"), "--prompt-field", "Frage", "--target-field", "Antwort"])
    *records, counts, note = capsys.readouterr().out.splitlines()
    assert len(records) == 3 and '"prompt": "Was ist 0?"' in records[0]
    assert (
        re.fullmatch(r"30 examples, \d of them held out, 0 without a target", counts)
        and "touch, as in 'Was ist 0?Eine Zahl'" in note
    )


@pytest.mark.parametrize(
    "text",
    [
        "",
        "the plot was dull .",
        "the plot was really clever and the music was dull",
        "the plot was really really clever and the music was dull .",
    ]
    + [
        "the plot was clever and and the music was dull .",
        "the plot clever and the music was dull .",
        "plot was clever and the music was dull .",
    ]
    + [
        "the plot was clever and the music was dull . .",
        " the plot was clever and the music was dull .",
        "the plot was clever and the music was dull ! ",
    ]
    + ["the plot was clever " + "and the music was dull " * 4 + "."],
)
def test_what_is_no_review_does_not_parse(text):
    assert not is_fluent_review(text)
