"""What a model reads of the data is said before training: refused, cut, unwritten, shown."""

import json

import pytest
from conftest import FAST
from transformers import AutoTokenizer

import sample
import survey
from chat import encode_demonstration, encode_prompt
from checkpoints import append_rows, read_rows
from data import main as data_main
from data import split_examples, split_pairs
from engine import UserError
from prepare import Data, add_prompts
from sources import Example, Pair
from train import main as train_main

STRICT = """{% for m in messages %}{% if loop.index0 % 2 != (0 if m.role == 'user' else 1) %}\
{{ raise_exception('roles must alternate') }}{% endif %}<|{{ m.role }}|>{{ m.content }}\
<|endoftext|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"""


@pytest.fixture
def chat_tokenizer(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    copy = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    copy.chat_template = STRICT
    return copy


@pytest.fixture
def chat_folder(tiny_folder, tmp_path):
    """A model whose tokenizer has a chat template."""
    import shutil

    folder = tmp_path / "chat-model"
    shutil.copytree(tiny_folder, folder)
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    tokenizer.chat_template = STRICT
    tokenizer.save_pretrained(folder)
    return str(folder)


def dialogue(*said, place="", target="Yes."):
    messages = [
        {"role": "user" if i % 2 == 0 else "assistant", "content": s} for i, s in enumerate(said)
    ]
    return Example("prompt", target, messages=messages, place=place)


def twice(words, place):
    """A dialogue in which the user speaks twice, which the template refuses."""
    messages = [{"role": "user", "content": words}] * 2
    return Example(words, "Yes.", messages=messages, place=place)


# ---- left out


def test_a_dialogue_that_the_template_refuses_is_left_out_and_counted(chat_tokenizer):
    examples = [dialogue("a"), twice("b", "f.jsonl:2"), dialogue("c"), twice("d", "f.jsonl:9")]
    said = []
    assert survey.writable(chat_tokenizer, examples, False, said.append) == examples[::2]
    (line,) = said
    assert line == ("note: 2 of 4 examples are left out: roles must alternate (first: f.jsonl:2)")
    with pytest.raises(UserError, match="f.jsonl:2: .*roles must alternate"):
        survey.writable(chat_tokenizer, examples, True, said.append)
    with pytest.raises(UserError, match="f.jsonl:9: .*roles must alternate"):
        survey.writable(chat_tokenizer, examples[3:], False, said.append)
    assert len(said) == 1
    chat_tokenizer.chat_template = None
    assert survey.writable(chat_tokenizer, examples, True, said.append) == examples


def test_pairs_that_are_the_same_once_cut_are_left_out_and_counted(tokenizer):
    same = "the plot was dull and " * 9
    pairs = [
        Pair("the plot", " was warm", " was dull", place="p.jsonl:1"),
        Pair("the plot", same + "warm .", same + "dull .", place="p.jsonl:2"),
    ]
    limits, said = dict(max_length=30, max_prompt_length=21), []
    assert survey.comparable(tokenizer, pairs, limits, False, said.append) == pairs[:1]
    assert "1 of 2" in said[0] and "the same once cut to --max-length 30" in said[0]
    with pytest.raises(UserError, match="p.jsonl:2: both responses are the same once cut"):
        survey.comparable(tokenizer, pairs, limits, True, said.append)
    limits = dict(max_length=300, max_prompt_length=21)
    assert survey.comparable(tokenizer, pairs, limits, True, said.append) == pairs


# ---- cut


def test_cuts_are_said_when_they_are_more_than_one_in_a_hundred():
    said = []
    # (prompt, answer): fits; prompt too long; answer too long; both
    lengths = [(9, 5)] * 297 + [(31, 3), (7, 60), (44, 55)]
    survey.say_cuts(lengths, max_length=40, max_prompt_length=30, say=said.append)
    assert said == [], "2 of 300 are fewer than one in a hundred"
    survey.say_cuts(lengths[290:], max_length=40, max_prompt_length=30, say=said.append)
    assert said[0].startswith("note: 2 of 10 prompts are cut on their left to 30 tokens")
    assert "the longest has 44" in said[0]
    assert said[1].startswith("note: 2 of 10 answers are cut on their right and get no EOS")
    assert "--max-length 99 would keep the longest, 40 is set" in said[1]


def test_a_pair_has_one_prompt_and_two_answers():
    said = []
    pairs = [[(31, 4), (31, 60)], [(9, 5), (9, 6)], [(8, 77), (8, 1)]]
    survey.say_cuts([(9, 5)], max_length=40, max_prompt_length=30, say=said.append, pairs=pairs)
    assert said[0].startswith("note: 1 of 4 prompts are cut on their left to 30 tokens")
    assert said[1].startswith("note: 2 of 7 answers are cut on their right")
    assert said[2].startswith("note: 2 of 7 answers are longer than any response")


def test_answers_longer_than_any_response_are_said():
    said = []
    limits = dict(max_length=100, max_prompt_length=93, say=said.append)
    survey.say_cuts([(9, 7)] * 9 + [(9, 8)], **limits)
    assert said == [], "one in ten is not more than one in ten"
    prompts_alone = [(9, 0)] * 5
    survey.say_cuts([(9, 7)] * 8 + [(9, 8), (9, 31)] + prompts_alone, **limits)
    assert said == [
        "note: 2 of 10 answers are longer than any response that is sampled: --max-new-tokens "
        "leaves 7 tokens, the longest answer has 31"
    ]


@pytest.mark.parametrize(
    "before, words",
    [("<|system|>You are the helper.<|endoftext|>", "<|system|>You are the helper."), ("", "")],
)
def test_a_system_turn_that_the_template_adds_is_said(chat_tokenizer, before, words):
    test = "{% if messages[0].role != 'system' %}" + before + "{% endif %}"
    turns = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|endoftext|>{% endfor %}"
    chat_tokenizer.chat_template = (
        test + turns + "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    with_system = [{"role": "system", "content": "Be kind."}, *dialogue("b").messages]
    examples = [dialogue("a"), Example("b", "Yes.", messages=with_system), dialogue("c", "d", "e")]
    said = []
    survey.say_unwritten(chat_tokenizer, examples, said.append)
    expected = (
        "note: 2 of 3 examples have no system turn, and the model's chat template writes its own "
        f"before them: {words!r}"
    )
    assert said == ([expected] if words else [])


def test_what_is_shown_is_the_row_that_is_trained(chat_tokenizer):
    example = dialogue("one two\nthree", place="f.jsonl:3", target="four\x1b five")
    prompt, answer = encode_demonstration(chat_tokenizer, example)
    lines = survey.show(chat_tokenizer, example, 1024, 900).split("\n")
    assert lines == [
        f"f.jsonl:3: prompt {len(prompt)} tokens, answer {len(answer)} tokens",
        "    <|user|>one two",
        "    three<|endoftext|><|assistant|>",
        "  > four\\x1b five<|endoftext|>",
    ]
    cut = survey.show(chat_tokenizer, example, len(prompt) + 1, len(prompt) - 2)
    assert cut.startswith(
        f"f.jsonl:3: prompt {len(prompt) - 2} tokens, 2 cut, answer 3 tokens, {len(answer) - 3} cut"
    )


def test_data_py_shows_three_records_as_the_model_reads_them(chat_folder, tmp_path, capsys):
    path = tmp_path / "chat.jsonl"
    records = []
    for i in range(5):
        turns = [
            {"role": "user", "content": f"Say {i}."},
            {"role": "assistant", "content": f"{i}."},
        ]
        records.append({"messages": turns})
    records[1]["messages"].insert(0, {"role": "user", "content": "twice"})
    path.write_text("\n".join(map(json.dumps, records)))
    data_main([str(path), "--model", chat_folder])
    out = capsys.readouterr().out
    assert out.count("  > ") == 3 and "    <|user|>Say 0.<|endoftext|><|assistant|>" in out
    assert "  > 0.<|endoftext|>" in out and "1 of 5 examples are left out" in out
    assert f"(first: {path}:2)" in out and "4 examples" in out
    path.write_text('{"prompt": "Name a tree.", "target": " An oak."}\n' * 3)
    data_main([str(path), "--model", chat_folder])
    out = capsys.readouterr().out
    assert "    <|user|>Name a tree.<|endoftext|><|assistant|>\n  > An oak.<|endoftext|>" in out
    assert "3 of 3 examples are plain prompts: the model's chat template writes each" in out
    data_main([str(path), "--model", chat_folder, "--raw"])
    assert "    Name a tree.\n  >  An oak.<|endoftext|>" in capsys.readouterr().out


def test_control_characters_of_a_sample_reach_no_terminal(tmp_path):
    rows = [{"prompt": "a\nb", "response": "\x1b[2J\x9b\u202e é \U0001f600"}]
    append_rows(tmp_path / "samples.jsonl", rows)
    text = (tmp_path / "samples.jsonl").read_text(encoding="utf-8")
    assert "é \U0001f600" in text
    assert all(char.isprintable() for char in text.rstrip("\n"))
    assert read_rows(tmp_path / "samples.jsonl") == rows


# ---- held out


def test_no_prompt_is_on_both_sides():
    examples = [Example(f"p{i // 4}", f"t{i}") for i in range(400)]
    train, held_out = split_examples(examples)
    assert len(train) + len(held_out) == 400 and 20 <= len(held_out) <= 60
    assert not {e.prompt for e in train} & {e.prompt for e in held_out}
    assert split_examples(examples[::-1])[1] == held_out[::-1]


def test_dialogues_that_begin_alike_still_give_a_tenth():
    examples = []
    for i in range(300):
        said = ["Hi", "Hello! What do you need?", f"Tell me about {i}."]
        messages = dialogue(*said).messages
        examples.append(Example("Hi", said[1], messages=messages[:1], user_turns=(said[2],)))
        examples.append(Example(f"all of {i}", f"{i}!", messages=messages))
    train, held_out = split_examples(examples)
    assert not {e.prompt for e in train} & {e.prompt for e in held_out}
    assert 15 <= len(held_out) <= 45, "a tenth of the 300 second turns"
    assert len([e for e in train if e.prompt == "Hi"]) > 200


def test_one_prompt_is_split_by_its_answers():
    examples = [Example("Write a poem.", f"poem {i}") for i in range(200)]
    train, held_out = split_examples(examples)
    assert 8 <= len(held_out) <= 35 and not {e.target for e in train} & {e.target for e in held_out}
    pairs = [Pair(f"p{i // 3}", f"c{i}", f"r{i}") for i in range(300)]
    train, held_out = split_pairs(pairs)
    assert len(train) + len(held_out) == 300 and 12 <= len(held_out) <= 60
    assert not {p.prompt for p in train} & {p.prompt for p in held_out}


# ---- in a run


def prepared(monkeypatch, argv):
    """The Run of these flags, before its first step."""
    import train

    args = train.parse_args([*argv, *FAST, "--max-length", "48"], train.ALGORITHMS)
    return train.prepare(args, train.ALGORITHMS[args.algorithm])


def write(path, records):
    path.write_text("\n".join(json.dumps(record) for record in records), encoding="utf-8")
    return str(path)


def test_prompts_of_their_own_serve_the_reward_steps_alone(tmp_path, monkeypatch):
    data = write(
        tmp_path / "data.jsonl",
        [{"prompt": f"say {i}", "target": f" {i} ."} for i in range(40)] + [{"prompt": "alone"}],
    )
    prompts = write(
        tmp_path / "prompts.jsonl",
        [{"prompt": f"ask {i}", "answer": f"gold {i}"} for i in range(40)],
    )
    run = prepared(monkeypatch, ["--data", data, "--prompts", prompts, "--reward", "rouge_l"])
    assert all(e.prompt.startswith("say") for e in run.sft_stream.items + run.held_out[:0])
    asked = run.prompt_stream.items + run.held_out_prompts
    assert all(e.prompt.startswith("ask") or e.prompt == "alone" for e in asked)
    assert all(not e.target for e in asked)
    from data import columns_of

    (example,) = [e for e in asked if e.prompt == "ask 7"] or [
        Example("ask 7", "", {"target": "gold 7"})
    ]
    assert columns_of([example])["target"] == ["gold 7"], "rewards still see the answer"


def test_prompts_and_data_are_held_out_apart_and_never_trained_where_they_are_measured(tmp_path):
    data = Data(*split_examples([Example(f"p{i}", f"t{i}", {"a": i}) for i in range(300)]))
    shared = data.train[7].prompt, data.held_out[3].prompt
    prompts = [Example(prompt, "", {"b": 1}) for prompt in (*shared, *(f"q{i}" for i in range(5)))]
    add_prompts(data, prompts)
    asked, measured = data.prompts(True)
    assert asked and measured, "five prompts are enough, whatever the data hold out"
    assert not {e.prompt for e in data.train} & {e.prompt for e in data.held_out}
    assert len([e for e in data.held_out if e.target]) > 10, "and the NLL is still measured"
    assert all(set(e.columns) == {"a", "b"} for e in data.train), "rewards find every column"


def test_prompts_have_no_target_to_demonstrate(tmp_path, capsys):
    prompts = write(tmp_path / "p.jsonl", [{"prompt": "p"}, {"prompt": "q"}])
    for schedule in ("gate", "buffer"):
        with pytest.raises(SystemExit):
            train_main(["--prompts", prompts, "--schedule", schedule, *FAST])
        assert "those of --prompts have no target" in capsys.readouterr().err


def test_cuts_of_pairs_are_said(tmp_path, monkeypatch, capsys):
    long = "the plot was dull and " * 12
    pairs = [{"prompt": f"p {i}", "chosen": " a", "rejected": f" {i} {long}"} for i in range(40)]
    prefs = write(tmp_path / "prefs.jsonl", pairs)
    prepared(monkeypatch, ["--algorithm", "dpo", "--preference-data", prefs])
    assert "answers are cut on their right" in capsys.readouterr().out


def test_dpo_on_preferences_alone_never_sees_the_built_in_reviews(tmp_path, monkeypatch, capsys):
    pairs = [
        {"prompt": f"story {i}", "chosen": f" it was {i} .", "rejected": " no ."} for i in range(40)
    ]
    prefs = write(tmp_path / "prefs.jsonl", pairs)
    flags = ["--algorithm", "dpo", "--preference-data", prefs]
    run = prepared(monkeypatch, flags)
    examples = run.sft_stream.items + run.held_out
    assert all(e.prompt.startswith("story") and e.target.startswith(" it was") for e in examples)
    trained = {pair.prompt for pair in run.pair_stream.items}
    assert trained == {e.prompt for e in run.sft_stream.items}
    assert run.held_out_pairs and not trained & {pair.prompt for pair in run.held_out_pairs}
    assert "SFT learns from the chosen responses" in capsys.readouterr().out
    metrics = train_main([*flags, *FAST, "--max-length", "48", "--out", str(tmp_path / "out")])
    assert 0 <= metrics["eval/preference_accuracy"] <= 1 and "eval/preference_margin" in metrics


def test_a_refused_dialogue_and_a_long_answer_are_said_before_training(
    chat_folder, tmp_path, capsys
):
    records = []
    for i in range(30):
        turns = [
            {"role": "user", "content": f"Say {i}."},
            {"role": "assistant", "content": "so " * 50},
        ]
        records.append({"messages": turns})
    records[4]["messages"].insert(0, {"role": "user", "content": "twice"})
    data = write(tmp_path / "chat.jsonl", records)
    flags = [*FAST, "--data", data, "--model", chat_folder, "--reward", "length"]
    train_main([*flags, "--max-length", "60", "--out", str(tmp_path / "out")])
    out = capsys.readouterr().out
    assert "1 of " in out and "roles must alternate" in out and f"{data}:5" in out
    assert "answers are cut on their right" in out
    samples = read_rows(tmp_path / "out" / "samples.jsonl")
    assert samples[0]["prompt"].startswith("<|user|>Say")
    assert samples[0]["prompt"].endswith("<|endoftext|><|assistant|>")
    with pytest.raises(SystemExit):
        train_main([*flags, "--strict", "--out", str(tmp_path / "strict")])
    assert f"error: {data}:5: " in capsys.readouterr().err


# ---- sample.py


def asked_of(monkeypatch, lines, argv):
    """What sample.py puts before the model, prompt by prompt."""
    import io
    import sys

    prompts = []
    generate = sample.generate

    def spy(model, ids, **options):
        prompts.append(ids[0])
        return generate(model, ids, **options)

    monkeypatch.setattr(sample, "generate", spy)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\n".join(lines).encode())))
    sample.main([*argv, "--device", "cpu", "--max-new-tokens", "5"])
    return prompts


def test_a_conversation_has_a_history_until_it_is_reset(chat_folder, monkeypatch, capsys):
    tokenizer = AutoTokenizer.from_pretrained(chat_folder)
    prompts = asked_of(monkeypatch, ["Hi", "More?", "/reset", "Bye"], [chat_folder])
    first, second, third = [tokenizer.decode(ids) for ids in prompts]
    assert first == "<|user|>Hi<|endoftext|><|assistant|>"
    assert second.startswith(first) and second.endswith("<|user|>More?<|endoftext|><|assistant|>")
    assert third == "<|user|>Bye<|endoftext|><|assistant|>"


def test_raw_and_beside(chat_folder, tiny_folder, monkeypatch, capsys):
    tokenizer = AutoTokenizer.from_pretrained(chat_folder)
    (ids,) = asked_of(monkeypatch, [], [chat_folder, "the plot", "--raw"])
    assert tokenizer.decode(ids) == "the plot"
    assert len(capsys.readouterr().out.strip().split("\n")) >= 3, "three texts of a model"
    argv = [chat_folder, "the plot", "--beside", str(tiny_folder), "-n", "1"]
    prompts = asked_of(monkeypatch, [], argv)
    assert [tokenizer.decode(ids) for ids in prompts] == [
        "<|user|>the plot<|endoftext|><|assistant|>",
        "the plot",
    ]
    out = capsys.readouterr().out
    assert f"[{chat_folder}] " in out and f"[{tiny_folder}] the plot" in out
    with pytest.raises(SystemExit):
        sample.main([str(tiny_folder), "Hi", "--system", "Be kind."])
    assert "needs a chat template" in capsys.readouterr().err


def test_the_prompt_of_a_conversation_is_that_of_training(chat_folder, monkeypatch):
    tokenizer = AutoTokenizer.from_pretrained(chat_folder)
    (ids,) = asked_of(monkeypatch, [], [chat_folder, "Name a tree."])
    assert ids == encode_prompt(tokenizer, Example("Name a tree.", " An oak.", is_chat=True))
