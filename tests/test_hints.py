"""Hints: who gets one, how long it is, what it is compared with, what a checkpoint keeps."""

import copy
import json
import shutil
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from conftest import FAST

from data import Example
from engine import UserError
from hints import Hints, check_prompts, with_hint
from train import main

TEXTS = [("a?", " one two three four five"), ("b?", " six"), ("c?", "\nseven eight"), ("d?", "")]
EXAMPLES = [Example(prompt, target) for prompt, target in TEXTS]


def hints(share=0.8, steps=40, warmup=10) -> Hints:
    options = dict(ppo_ratio=0.5, steps=steps, sft_warmup=warmup, threshold=0.5, batch_size=4)
    return Hints(EXAMPLES, hints=share, **options)


@pytest.mark.parametrize(
    "share, prompt, target",
    [
        (0.19, "a?", " one two three four five"),
        (0.4, "a? one two", " three four five"),
        (0.79, "a? one two three", " four five"),
        (1.0, "a? one two three four", " five"),
    ],
)
def test_a_hint_is_whole_words_and_leaves_one(share, prompt, target):
    hinted = with_hint(EXAMPLES[0], share)
    assert (hinted.prompt, hinted.target) == (prompt, target)


def test_a_target_without_two_words_has_no_hint_to_give():
    assert with_hint(EXAMPLES[1], 1.0) is EXAMPLES[1] and with_hint(EXAMPLES[3], 1.0) is EXAMPLES[3]
    assert with_hint(EXAMPLES[2], 0.5).prompt == "c?\nseven"


def test_the_fields_of_the_data_follow():
    named = {"question": "a?", "answer": " one two three four five", "level": ["hard"]}
    hinted = with_hint(replace(EXAMPLES[0], named=named), 0.4)
    assert hinted.named == {
        "question": "a? one two", "answer": " three four five", "level": ["hard"],
    }  # fmt: skip


def test_a_prompt_gets_a_hint_where_every_answer_was_bad_last_time():
    schedule = hints()
    first = schedule.prompts(EXAMPLES[:3], 10)
    assert first == EXAMPLES[:3] and schedule.metrics() == {"schedule/hinted": 0.0}
    drawn = [example for example in first for _ in range(2)]  # a group of two
    schedule.after_rollout(drawn, torch.tensor([0.1, 0.3, 0.2, 0.9, 0.49, float("nan")]))
    # at step 15: 0.8 * (1 - 5 / 20) = 0.6 of five words is three
    second = schedule.prompts(EXAMPLES[:3], 15)
    assert [e.prompt for e in second] == ["a? one two three", "b?", "c?"]
    assert schedule.metrics() == {"schedule/hinted": 1 / 3}
    # right with the hint: it is no longer hard; c is now
    schedule.after_rollout(second, torch.tensor([0.7, 0.8, 0.1]))
    assert schedule.hard == {2}
    # not drawn: it stays hard
    schedule.prompts(EXAMPLES[:2], 16)
    schedule.after_rollout(EXAMPLES[:2], torch.tensor([0.2, 0.2]))
    assert schedule.hard == {0, 1, 2}


def test_hints_fall_to_nothing_over_two_thirds_of_the_run():
    schedule = hints(share=1.0)
    schedule.hard = {0}
    words = []
    for step in range(10, 40):
        [asked] = schedule.prompts(EXAMPLES[:1], step)
        words.append(len(asked.prompt.split()) - 1)
    exact = [max(Fraction(0), 1 - Fraction(i, 20)) * 5 for i in range(30)]
    for i, n in enumerate(words):
        assert abs(n - min(4, exact[i] - Fraction(1, 2))) <= Fraction(1, 2) or exact[i] < 1
    assert words[0] == 4 and words[15] == 1 and not any(words[17:])
    assert words == sorted(words, reverse=True)


def test_a_checkpoint_keeps_what_is_hard():
    schedule, other = hints(), hints()
    schedule.hard = {0, 2}
    other.load_state_dict(json.loads(json.dumps(schedule.state_dict())))
    assert other.prompts(EXAMPLES, 12) == schedule.prompts(EXAMPLES, 12) != EXAMPLES


def test_a_run_with_hints_resumes_bit_by_bit(tmp_path):
    flags = [*FAST, "--data", "sort", "--limit", "12", "--steps", "16", "--hints", "0.9"]
    flags += ["--threshold", "0.5", "--batch-size", "4", "--demonstrations", "99"]
    main([*flags, "--sft-warmup", "1", "--out", str(tmp_path / "whole")])
    whole = (tmp_path / "whole" / "metrics.jsonl").read_text()
    rows = [json.loads(line) for line in whole.splitlines()]
    hinted = [row["schedule/hinted"] for row in rows if row["phase"] == "ppo"]
    assert hinted[0] == 0 and max(hinted) > 0 and hinted[-1] == 0

    main([*flags, "--sft-warmup", "1", "--save-every", "7", "--out", str(tmp_path / "cut")])
    shutil.rmtree(tmp_path / "cut" / "final")
    shutil.rmtree(tmp_path / "cut" / "checkpoint-000014")
    main(["--resume", str(tmp_path / "cut")])
    again = [json.loads(line) for line in (tmp_path / "cut" / "metrics.jsonl").open()]
    for one, other in zip(rows, again, strict=True):
        assert {**one, "seconds": 0} == {**other, "seconds": 0}


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--hints 0", "expected a number above 0 and at most 1"),
        ("--hints 0.5 --schedule gate", "--hints is for rollouts of --schedule ratio"),
        ("--hints 0.5 --ppo-ratio 0", "--hints is for rollouts of --schedule ratio"),
        ("--hints 0.5 --algorithm dpo", "--algorithm dpo samples nothing"),
        ("--hints 0.5 --turns 2", "--turns above 1 goes with --schedule ratio or mix, and without"),
        ("--threshold 0.3", "--threshold belongs to gate and buffer"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit):
        main([*FAST, *flags.split(), "--out", str(tmp_path / "run")])
    assert message in capsys.readouterr().err


def test_a_template_that_ends_the_prompt_leaves_no_place_for_a_hint(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = "{{ messages[0].content }}\n"
    assert check_prompts(tokenizer, EXAMPLES) == 2  # plain texts; two have two words
    assert check_prompts(tokenizer, [*EXAMPLES, replace(EXAMPLES[0], target="")]) == 2
    with pytest.raises(UserError, match="the chat template of this model ends it"):
        check_prompts(tokenizer, [*EXAMPLES, replace(EXAMPLES[0], is_chat=True)])


def test_data_that_give_no_hint_are_refused(tmp_path, capsys):
    data = tmp_path / "words.jsonl"
    rows = [{"prompt": f"say {i}", "target": f" {i}"} for i in range(20)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(SystemExit):
        main([*FAST, "--data", str(data), "--hints", "0.5", "--out", str(tmp_path / "run")])
    assert "no target has two words" in capsys.readouterr().err
