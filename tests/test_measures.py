"""Measures of text: against definitions, hand-made cases and, where installed, sacrebleu."""

import math
import random

import pytest
import torch
from test_rewards import perturbed, random_text

from data import read_records
from engine import UserError
from measures import chrf
from rewards import build_reward, rouge_n


def test_chrf_equals_sacrebleu():
    sacrebleu = pytest.importorskip("sacrebleu", reason="optional: pip install sacrebleu")
    rng = random.Random(2)
    for _ in range(2000):
        references = [random_text(rng) for _ in range(rng.randint(1, 3))]
        hypothesis = perturbed(rng, references[0])
        expected = sacrebleu.sentence_chrf(hypothesis, references).score / 100
        assert chrf(hypothesis, references) == pytest.approx(expected, abs=1e-9), (
            hypothesis,
            references,
        )


def test_chrf_by_hand():
    """abc against abd, orders 1 to 3: precision = recall = (2/3 + 1/2 + 0) / 3, and so is F."""
    assert chrf("abc", ["abd"]) == pytest.approx((2 / 3 + 1 / 2) / 3)
    assert (
        chrf("a b c", ["abc"]) == 1 and chrf("", ["a"]) == chrf("a", [""]) == chrf("x", ["y"]) == 0
    )
    long, short = chrf("abcd", ["ab"]), chrf("ab", ["abcd"])
    precision, recall = (2 / 4 + 1 / 3) / 2, 1.0
    assert (
        long == pytest.approx(5 * precision * recall / (4 * precision + recall)) and long > short
    ), "recall counts twice"


def test_coverage():
    scores = build_reward("coverage")(
        ["p"] * 3, ["a fast red car", "the car", ""], target=["The car was red and fast"] * 3
    )
    assert scores.tolist() == pytest.approx([1, 1 / 3, 0])
    scores = build_reward("coverage")(
        ["p"] * 2,
        ["Rome and Paris"] * 2,
        keywords=["Rome, Oslo", ["paris", "rome"]],
        target=["x", "x"],
    )
    assert scores.tolist() == [0.5, 1]


def test_relevance_equals_the_formula(tmp_path):
    """Words in many documents count less: idf = ln((1 + n) / (1 + df)) + 1."""
    documents = ["the cat sat", "the dog sat", "the sun"]
    reward = build_reward("relevance", documents=documents)
    the, cat = math.log(4 / 4) + 1, math.log(4 / 2) + 1
    scores = reward(["the cat"] * 3, ["the", "cat", "nothing"])
    norm = math.hypot(the, cat)
    assert scores.tolist() == pytest.approx([the / norm, cat / norm, 0])
    (tmp_path / "law.txt").write_text("the court heard the appeal\nthe judge ruled\n")
    legal, other = build_reward(f'relevance(corpus="{tmp_path}/law.txt")')(
        ["p"] * 2, ["the judge heard the appeal", "a cat sat"]
    )
    assert 0.5 < legal <= 1 and other == 0


def test_style_and_its_three_parts():
    # 5 and 4 words; 9 different of 9; 2 formal, 1 informal
    text = "Furthermore the plan is sound. We gonna obtain it!"
    parts = [1 - abs(4.5 - 6) / 6, 1.0, 2 / 3]
    names = ["sentence_length", "type_token_ratio", "formality"]
    for name, expected in zip(names, parts):
        assert build_reward(f'style("{name}", sentence_length=6)')(
            ["p"], [text]
        ).item() == pytest.approx(expected)
    assert build_reward("style(sentence_length=6)")(["p"], [text]).item() == pytest.approx(
        sum(parts) / 3
    )
    with pytest.raises(UserError, match="known aspects are all, sentence_length"):
        build_reward('style("rhyme")')


def test_repetition_is_distinct_n():
    scores = build_reward("repetition")(["p"] * 4, ["a b a b a b", "a b c d", "word", ""])
    assert scores.tolist() == pytest.approx([2 / 5, 1, 1, 0])
    assert build_reward("repetition(n=1)")(["p"], ["a b a b"]).item() == 0.5


def test_toxicity_counts_listed_words(tmp_path):
    scores = build_reward("toxicity")(
        ["p"] * 3, ["you idiot, you stupid fool", "a nice day " * 50 + "idiot", "a nice day"]
    )
    assert scores.tolist() == [3 / 4, 1 / 2, 0], "length does not dilute"
    (tmp_path / "words.txt").write_text("; a comment\nfoo\nbar\n", encoding="utf-8")
    assert build_reward(f'toxicity(lexicon="{tmp_path}/words.txt")')(
        ["p"], ["foo bar idiot"]
    ).item() == pytest.approx(2 / 3)


def test_toxicity_finds_labelled_comments(shared):
    rows = list(read_records(str(shared / "toxicity" / "surge_toxicity_en.csv")))
    scores = build_reward("toxicity")([""] * len(rows), [row["text"] for row in rows])
    toxic = torch.tensor([row["is_toxic"] == "Toxic" for row in rows])
    assert (
        400 < toxic.sum() < 600
        and scores[toxic].gt(0).float().mean() > 2 * scores[~toxic].gt(0).float().mean()
    )


def test_truthful_is_nearer_to_the_right_answers():
    columns = dict(
        correct_answers=[["nothing happens", "you digest them"]] * 2,
        incorrect_answers=["you die; you grow melons"] * 2,
    )
    scores = build_reward("truthful")(["q"] * 2, ["Nothing happens.", "you die"], **columns)
    assert scores[0] == pytest.approx(1 - 0) and scores[1] == pytest.approx(
        rouge_n("you die", "you digest them", 1).f1 - 1
    )
    with pytest.raises(UserError, match="incorrect_answers is missing"):
        build_reward("truthful")(["q"], ["c"], correct_answers=[["a"]])
    with pytest.raises(UserError, match="known metrics are rouge_1, rouge_l, bleu"):
        build_reward('truthful("bleurt")')


def test_truthful_on_truthfulqa(shared):
    rows = list(read_records(str(shared / "truthfulness" / "TruthfulQA.csv")))
    columns = {
        name: [row[name] for row in rows] for name in ("Correct Answers", "Incorrect Answers")
    }
    best = build_reward("truthful")(
        [""] * len(rows), [row["Best Answer"] for row in rows], **columns
    )
    wrong = build_reward("truthful")(
        [""] * len(rows), [row["Incorrect Answers"].split(";")[0] for row in rows], **columns
    )
    assert (best > 0).float().mean() > 0.9 and (wrong < 0).float().mean() > 0.9


def test_exact_match_and_numeric():
    exact = build_reward("exact_match")(
        ["q"] * 4, ["The Eiffel Tower!", "eiffel tower", "tower", ""], target=["Eiffel Tower"] * 4
    )
    assert exact.tolist() == [1, 1, 0, 0]
    cases = [
        ("so 3 + 4 = 7", "#### 7", 1),
        ("$1,234.50", "1234.5", 1),
        ("-5", "5", 0),
        ("7.0", "7", 1),
        ("none", "7", 0),
        ("7", "no number", 0),
    ]
    cases += [
        ("there are 12, then 13.", "13", 1),
        ("v2", "2", 0),
        ("No.5", "0.5", 0),
        ("\u22125", "-5", 1),
        ("1,23", "23", 1),
        ("", "", 0),
        (".5", "0.50", 1),
        ("٣", "3", 0),
    ]
    for completion, target, expected in cases:
        assert build_reward("numeric")(["q"], [completion], target=[target]).item() == expected, (
            completion,
            target,
        )
