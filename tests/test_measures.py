"""Measures of text: against definitions, hand-made cases and, where installed, sacrebleu."""

import math
import random
import re

import pytest
import torch
from test_rewards import perturbed, random_text

from data import read_records
from engine import UserError
from measures import chrf
from rewards import DEFAULT_LEXICON, build_reward, cosine, lexicon_sentiment, rouge_n
from words import quoted_words_of, words_of


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


def test_words_of_many_scripts():
    """A sign that stands on a letter belongs to the word, so no other word equals a piece of it."""
    cases = [
        ("काम कम", ["काम", "कम"]),
        ("हिन्दी।", ["हिन्दी"]),
        ("நான் வந்தேன்", ["நான்", "வந்தேன்"]),
        ("กำลัง ไป", ["กำลัง", "ไป"]),
        ("كِتَاب", ["كِتَاب"]),
        ("می\u200cخواهم", ["می\u200cخواهم"]),  # one word with a joiner that is not drawn
        ("क्\u200dष", ["क्\u200dष"]),
        ("Cafe\u0301 CAFÉ", ["café", "café"]),
        ("İ i\u0307", ["i\u0307", "i\u0307"]),
        ("Ｐａｒｉｓ１", ["paris1"]),
        ("co\u00adop a\u200bb", ["coop", "a", "b"]),
        ("é it's well-known 'x' y- don’t", ["é", "it's", "well-known", "x", "y", "don", "t"]),
        ("it's well-known 'x' y-", ["it's", "well-known", "x", "y"]),
        ("snake_case 3,000 -- '", ["snake_case", "3", "000"]),
        ("❤\ufe0f 5\ufe0f\u20e3 \u0301 👩\u200d💻", ["5"]),
        ("", []),
    ]
    for text, expected in cases:
        assert words_of(text) == expected, text
    assert quoted_words_of("'x' y- काम-") == ["'x'", "y-", "काम-"]
    assert quoted_words_of("'x' y--z -") == ["'x'", "y--z", "-"]


def test_all_measures_of_words_know_a_word_of_hindi():
    assert cosine("काम", "कम") == 0 and cosine("cafe\u0301", "café") == 1
    assert cosine("it's", "it is") == 0
    assert build_reward("coverage")(["p"], ["कम"], target=["काम"]).item() == 0
    assert build_reward("relevance")(["काम"] * 2, ["कम", "काम"]).tolist() == [0, 1]
    assert build_reward("repetition(n=1)")(["p"], ["काम कम"]).item() == 1
    assert build_reward('style("type_token_ratio")')(["p"], ["काम कम काम"]).item() == pytest.approx(
        2 / 3
    )


def test_word_lists_of_other_scripts(tmp_path):
    (tmp_path / "words.txt").write_text("काम\t3\n", encoding="utf-8")
    texts = ["काम", "कम"]
    scores = build_reward(f'sentiment(lexicon="{tmp_path}/words.txt")')(["p"] * 2, texts)
    assert scores.tolist() == pytest.approx([3 / math.sqrt(9 + 15), 0])
    scores = build_reward(f'toxicity(lexicon="{tmp_path}/words.txt")')(["p"] * 2, texts)
    assert scores.tolist() == [0.5, 0]


def test_sentiment_counts_words_as_it_always_did():
    """Runs depend on its numbers: in ASCII it counts runs of letters, apostrophes and hyphens."""
    rng = random.Random(3)
    pieces = [*DEFAULT_LEXICON, "'", "-", '"', ".", ", ", " ", " ", "--", "_", "it's", "1", "X"]
    for _ in range(500):
        text = "".join(rng.choice(pieces) for _ in range(30))
        words = re.findall(r"[\w'-]+", text.lower())
        total = sum(DEFAULT_LEXICON.get(word, 0) for word in words)
        assert lexicon_sentiment(text) == total / math.sqrt(total**2 + 15)
    assert lexicon_sentiment("'good'") == 0 < lexicon_sentiment('"good"')


def test_the_words_of_a_lexicon_are_looked_up_as_the_text_is_written(tmp_path):
    (tmp_path / "words.txt").write_text("cafe\u0301\t1\n", encoding="utf-8")
    reward = build_reward(f'sentiment(lexicon="{tmp_path}/words.txt")')
    assert reward(["p"] * 2, ["caf\u00e9", "Cafe\u0301"]).tolist() == [0.25, 0.25]
