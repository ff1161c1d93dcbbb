"""Splits, token ids, the layout: a batch holds what the record says, masks included."""

import json
import random
import re

import pytest
import torch
from transformers import AutoTokenizer, GPT2Tokenizer

import data
from data import (
    BatchStream,
    columns_of,
    decode,
    demonstration_batch,
    encode_prompt,
    encode_target,
    main,
    make_batch,
    split_examples,
    split_pairs,
)
from engine import UserError
from reviews import is_fluent_review, review_metrics
from sources import Example, Pair, make_reviews, to_examples

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
    filler = eos if pad is None else pad
    assert batch.input_ids.tolist() == [[11, 13, 13, 2], [21, 2, filler, filler]]


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
        ([[1]], [[1], [2]], 8, "zip"),
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
    assert batch.lengths().tolist() == [10, 3, 2] and len(batch) == 3
    assert int(batch.weight(torch.tensor([2, 1]))) == 1 + 2
    assert torch.equal(batch.to(torch.device("cpu")).input_ids, batch.input_ids)


def test_the_shortest_rows_that_can_be_scored():
    batch = make_batch(None, [[1, 2], [3]], [[4, 5], [6, 7, 8]], max_length=2)
    assert batch.input_ids.tolist() == [[2, 4], [3, 6]]


def test_a_prompt_gives_way_to_its_answer_up_to_half_of_the_row(tokenizer):
    """Tokens of prompt and answer (EOS included), then what is kept of them in 10 columns."""
    prompt, answer = "the plot was and the cast was", " dull and flat and boring and weak ."
    ids, target = tokenizer(prompt).input_ids, tokenizer(answer).input_ids
    assert len(ids) > 6 and len(target) > 6
    short = tokenizer(" warm .").input_ids + [tokenizer.eos_token_id]
    examples = [Example(prompt, answer), Example(prompt, " warm .")]
    batch = demonstration_batch(tokenizer, examples, max_length=10)
    assert batch.input_ids[0].tolist() == ids[-5:] + target[:5]
    kept = min(len(ids), 10 - len(short))
    assert batch.input_ids[1, : kept + len(short)].tolist() == ids[-kept:] + short
    batch = demonstration_batch(tokenizer, examples, max_length=10, max_prompt_length=3)
    assert batch.input_ids[0].tolist() == ids[-3:] + target[:7]
    assert batch.response_mask[0].int().tolist() == [0] * 3 + [1] * 7
    assert batch.input_ids[1, : 3 + len(short)].tolist() == ids[-3:] + short


def test_rewards_get_every_field_but_those_with_a_name_of_their_own():
    examples = [
        Example("p", "t", {"prompts": 1, "level": 3}),
        Example("q", "", {"completions": 2, "target": "gold"}),
        Example("r", "", {"level": 0}),
    ]
    assert columns_of(examples) == {"level": [3, None, 0], "target": ["t", "gold", ""]}


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


def test_a_hash_is_that_of_the_published_example():
    """SHA-256 of "abc" begins with ba7816bf 8f01cfea (FIPS 180-4, the first example of NIST)."""
    assert data._hash("abc") == 0xBA7816BF8F01CFEA / 2**64


@pytest.mark.parametrize(
    "hashes, holdout, held_out",
    [
        ([0.3, 0.1, 0.07, 0.9], 0.1, [2]),  # the limit itself is on the side of training
        ([0.3, 0.1, 0.07, 0.9], 0.5, [0, 1, 2]),
        ([0.3, 0.1, 0.9], 0.1, [1]),  # nobody below the limit: the smallest
        ([0.3, 0.2, 0.9, 0.2], 0.1, [1, 3]),
        ([0.03, 0.02, 0.09], 0.1, [1]),  # nobody above it
        ([0.03, 0.05, 0.1], 0.1, [0, 1]),
    ],
)
def test_the_side_of_a_prompt_by_its_hash(hashes, holdout, held_out, monkeypatch):
    by_key = {f'["p{i}"]': value for i, value in enumerate(hashes)}
    monkeypatch.setattr(data, "_hash", by_key.get)
    examples = [Example(f"p{i}", "t") for i in range(len(hashes))]
    sides = split_examples(examples, holdout)
    expected = [[e for i, e in enumerate(examples) if (i in held_out) == side] for side in (0, 1)]
    assert list(sides) == expected


def test_a_held_out_prompt_that_train_has_too_is_dropped_unless_nothing_is_left(monkeypatch):
    """Dialogues that begin alike have one prompt and different keys."""
    hashes = {"a": 0.05, "b": 0.1, "c": 0.06}  # "b" is at the limit: in train
    monkeypatch.setattr(data, "_hash", lambda key: hashes[key[-3]])

    def turn(prompt: str, later: str) -> Example:
        return Example(prompt, "t", {}, [{"role": "user", "content": prompt}], (later,))

    first, second, third = turn("Hi", "a"), turn("Hi", "b"), turn("Ho", "c")
    assert split_examples([first, second, third]) == ([second], [third])
    assert split_examples([first, second]) == ([second], [first])


def test_pairs_are_split_by_their_prompt_and_come_back_as_they_were(monkeypatch):
    hashes = {'["p"]': 0.02, '["q"]': 0.7}
    monkeypatch.setattr(data, "_hash", hashes.get)
    pairs = [Pair("q", "a", "b"), Pair("p", "c", "d"), Pair("q", "e", "f")]
    assert split_pairs(pairs) == ([pairs[0], pairs[2]], [pairs[1]])
    monkeypatch.undo()
    train, held_out = split_pairs([Pair("p", str(i), "x") for i in range(40)])
    assert train and held_out and not {p.chosen for p in train} & {p.chosen for p in held_out}


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
    assert state == {"epoch": 1, "index": 2}
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
        "id,Frage,Antwort\n" + "".join(f"{i},Wofür ist {i}?,Eine Zahl\n" for i in range(30)),
        encoding="utf-8",
    )
    main([str(tmp_path / "d.csv"), "--prompt-field", "Frage", "--target-field", "Antwort"])
    *records, counts, note = capsys.readouterr().out.splitlines()
    assert len(records) == 3 and '"prompt": "Wofür ist 0?"' in records[0]
    assert (
        re.fullmatch(r"30 examples, \d of them held out, 0 without a target", counts)
        and "touch, as in 'Wofür ist 0?Eine Zahl'" in note
    )


def test_the_command_reads_the_reviews_or_a_source_of_several_words(capsys, tmp_path):
    main(["--limit", "30"])
    assert "30 examples, " in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([str(tmp_path / "nowhere"), "a", "b", "c"])
    assert "nowhere" in capsys.readouterr().err


def test_the_command_fits_rows_into_the_context_of_a_model(tmp_path, capsys, tiny_folder):
    """A context of 64 tokens, of which 32 are for the response unless a flag says otherwise."""
    path = tmp_path / "d.jsonl"
    prompt, answer = "the plot was dull and " * 11 + "the", "cast was warm ." + " and clever" * 40
    rows = [{"prompt": f"{i} {prompt}", "target": answer} for i in range(2)]
    rows = [rows[0], {"prompt": "q"}, rows[1], {"prompt": "r"}, {"prompt": "s"}]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    argv = [str(path), "--model", str(tiny_folder)]
    main(argv)
    out = capsys.readouterr().out
    assert out.count("prompt 32 tokens, ") == 2 and out.count("answer 32 tokens, ") == 2
    assert "2 of 5 prompts are cut on their left to 32 tokens" in out and "64 is set" in out
    assert re.search(r"\n5 examples, [12] of them held out, 3 without a target\n", out)
    assert out.count("touch, as in") == 1, "said once"
    main([*argv, "--max-length", "20", "--max-new-tokens", "19"])
    out = capsys.readouterr().out
    assert "prompt 1 tokens, " in out and "answer 19 tokens, " in out
    main([*argv, "--max-length", "3", "--max-new-tokens", "2"])
    assert "prompt 1 tokens, " in capsys.readouterr().out
    for flags in ("--max-length 20 --max-new-tokens 20", "--max-new-tokens 64", "--max-length 1"):
        with pytest.raises(SystemExit) as caught:
            main([*argv, *flags.split()])
        assert caught.value.code == 2
    assert "leaves no room for a prompt" in capsys.readouterr().err


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
