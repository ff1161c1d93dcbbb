"""Metrics: published values and the reference packages, where installed. Rewards by hand."""

import json
import math
import random

import pytest
import torch
from conftest import ROOT, build_lm

from engine import UserError
from judges import JUDGES
from rewards import (
    DEFAULT_LEXICON,
    REWARDS,
    bleu,
    build_reward,
    corpus_bleu,
    cosine,
    lexicon_sentiment,
    main,
    rouge_l,
    rouge_lsum,
    rouge_n,
    tokenize_13a,
)

# ---- published values, always checked


def test_bleu_by_hand():
    """Seven words against six: precisions 5/7, 3/6, 2/5, 1/4 and no brevity penalty; then two
    orders without a match, smoothed."""
    score = bleu("the the cat sat on a mat", ["the cat sat on the rug"])
    # the (2) cat sat on; "the cat" "cat sat" "sat on"; "the cat sat" "cat sat on"; "the cat sat on"
    matches = (5, 3, 2, 1)
    assert score == pytest.approx(
        math.prod(m / t for m, t in zip(matches, (7, 6, 5, 4))) ** 0.25, abs=1e-12
    )
    smoothed = bleu("a b x y", ["a b c d e"])
    assert smoothed == pytest.approx(
        math.exp(1 - 5 / 4) * (2 / 4 * 1 / 3 * 1 / (2 * 2) * 1 / (4 * 1)) ** 0.25, abs=1e-12
    )


def test_bleu_effective_order_brevity_and_closest_reference():
    assert bleu("the cat", ["the cat"]) == 1.0, "two words have no trigram, and need none"
    assert corpus_bleu(["the cat"], [["the cat"]]) == 0.0, "a corpus needs all four orders"
    assert bleu("a b c d", ["a b c d e f", "a b c x"]) == 1.0, (
        "closest length 4: no penalty; clipped counts join the references"
    )
    assert bleu("", ["a"]) == bleu("a", [""]) == bleu("", [""]) == 0.0


def test_tokenizer_13a():
    assert tokenize_13a('Hello, "world"! 3,000.5 U.S. it\'s 10-20 &amp; &lt;b&gt; end.') == (
        'Hello , " world " ! 3,000.5 U . S . it\'s 10 - 20 & < b > end .'.split()
    )


def test_corpus_bleu_published_example():
    """The example of sacrebleu's documentation and tests: 48.530827."""
    hypotheses = ["The dog bit the man.", "It wasn't surprising.", "The man had just bitten him."]
    references = [
        ["The dog bit the man.", "The dog had bit the man."],
        ["It was not unexpected.", "No one was surprised."],
        ["The man bit him first.", "The man had bitten the dog."],
    ]
    assert corpus_bleu(hypotheses, references) == pytest.approx(0.48530827, abs=1e-8)


def test_rouge_published_examples():
    """The inline cases of Google's rouge_scorer tests."""
    assert rouge_n("testing", "testing one two", 1) == pytest.approx((1, 1 / 3, 0.5))
    assert rouge_n("testing one", "testing one two", 2) == pytest.approx((1, 0.5, 2 / 3))
    assert rouge_l("testing two", "testing one two") == pytest.approx((1, 2 / 3, 0.8))
    assert rouge_lsum("w1 w2 w6 w7 w8\nw1 w3 w8 w9 w5", "w1 w2 w3 w4 w5") == pytest.approx(
        (0.4, 0.8, 8 / 15)
    )
    for empty in (
        rouge_n("", "testing one two", 1),
        rouge_l("", "a"),
        rouge_lsum("a", ""),
        rouge_l("", ""),
        rouge_n("a", "b", 2),
    ):
        assert empty == (0, 0, 0)


def test_metric_oracles(shared):
    folder = shared / "metric_oracles"
    cases = json.loads((folder / "sacrebleu/expected_bleu_cases.json").read_text(encoding="utf-8"))
    checked = 0
    for case in cases["corpus"]:
        if not case["kwargs"]:
            assert 100 * corpus_bleu(
                case["hyps"], [list(refs) for refs in zip(*case["refs"])]
            ) == pytest.approx(case["bleu"], abs=1e-6)
            checked += 1
    for case in cases["sentence"]:
        if (case["smooth"], case["lowercase"], case["tok"], case["effective_order"]) == (
            "exp",
            False,
            "13a",
            True,
        ):
            assert 100 * bleu(case["hyp"], [case["ref"]]) == pytest.approx(case["bleu"], abs=1e-3)
            checked += 1
    hyps, refs = cases["corpus"][0]["hyps"], [list(r) for r in zip(*cases["corpus"][0]["refs"])]
    for order, expected in cases["max_order"].items():
        assert 100 * corpus_bleu(hyps, refs, int(order)) == pytest.approx(expected, abs=0.01)
    assert checked >= 4

    rouge = json.loads((folder / "google_rouge/expected_rouge155.json").read_text())
    targets = (folder / "google_rouge/target.txt").read_text().split("\n")
    predictions = (folder / "google_rouge/prediction.txt").read_text().split("\n")
    for i, name in enumerate(["pair0", "pair1"]):
        for key, score in (
            ("rouge1", rouge_n(predictions[i], targets[i], 1)),
            ("rouge2", rouge_n(predictions[i], targets[i], 2)),
        ):
            assert score == pytest.approx(
                tuple(rouge[name][key][k] for k in ("precision", "recall", "fmeasure")), abs=1e-5
            )
    expected = rouge["pair0"]["rougeL"]
    assert rouge_l(predictions[0], targets[0]) == pytest.approx(
        (expected["precision"], expected["recall"], expected["fmeasure"]), abs=1e-5
    )

    nlg = json.loads((folder / "nlg_eval/expected.json").read_text())
    lines = [
        (folder / f"nlg_eval/{name}.txt").read_text().splitlines()
        for name in ("hyp", "ref1", "ref2")
    ]
    for order in (1, 2, 3, 4):
        score = corpus_bleu(lines[0], [list(refs) for refs in zip(*lines[1:])], order)
        assert score == pytest.approx(nlg[f"Bleu_{order}"], abs=1e-6)


# ---- parity with the reference packages, where they are installed

PIECES = (
    """the cat sat on a mat The CAT dog. dog, "dog" 3,000 3.14 -5 10-20 U.S. it's e.g. """
    """&amp; &quot;x&quot; &lt; <skipped> co-op A/B\nnaïve café Ünïcode 中文 日本語 emoji😀 """
    """( ) [ ] { } ! ? ; : @ # $ % ^ & * ~ ` | \\ _ a_b 's ' '' . , - -- — … """
    """1. .5 x-\n \n \t İ ß ﬁ"""
).split(" ")


def random_text(rng: random.Random) -> str:
    return " ".join(rng.choice(PIECES) for _ in range(rng.choice([0, 1, 2, 3, 5, 8, 13, 21])))


def perturbed(rng: random.Random, text: str) -> str:
    """A text that shares much with `text`, so that the scores are neither 0 nor 1."""
    words = text.split(" ")
    return " ".join(
        rng.choice(PIECES) if rng.random() < 0.25 else word for word in words if rng.random() < 0.9
    )


def test_bleu_equals_sacrebleu():
    sacrebleu = pytest.importorskip("sacrebleu", reason="optional: pip install sacrebleu")
    rng = random.Random(0)
    between = 0
    for _ in range(2000):
        references = [random_text(rng) for _ in range(rng.randint(1, 3))]
        hypothesis = perturbed(rng, references[0]) if rng.random() < 0.9 else random_text(rng)
        expected = sacrebleu.sentence_bleu(hypothesis, references).score / 100
        assert bleu(hypothesis, references) == pytest.approx(expected, abs=1e-9), (
            hypothesis,
            references,
        )
        between += 0.01 < expected < 0.99
    assert between > 1000
    for _ in range(200):
        n = rng.randint(1, 6)
        references = [[random_text(rng) for _ in range(2)] for _ in range(n)]
        hypotheses = [perturbed(rng, refs[0]) for refs in references]
        expected = (
            sacrebleu.corpus_bleu(hypotheses, [list(column) for column in zip(*references)]).score
            / 100
        )
        assert corpus_bleu(hypotheses, references) == pytest.approx(expected, abs=1e-9)


def test_rouge_equals_rouge_score():
    scorer_module = pytest.importorskip(
        "rouge_score.rouge_scorer", reason="optional: pip install rouge-score"
    )
    scorer = scorer_module.RougeScorer(
        ["rouge1", "rouge2", "rouge3", "rougeL", "rougeLsum"], use_stemmer=False
    )
    rng = random.Random(1)
    for _ in range(2000):
        reference = random_text(rng)
        hypothesis = perturbed(rng, reference)
        theirs = scorer.score(reference, hypothesis)
        ours = {f"rouge{n}": rouge_n(hypothesis, reference, n) for n in (1, 2, 3)}
        ours |= {
            "rougeL": rouge_l(hypothesis, reference),
            "rougeLsum": rouge_lsum(hypothesis, reference),
        }
        for name, score in ours.items():
            expected = theirs[name]
            assert score == pytest.approx(
                (expected.precision, expected.recall, expected.fmeasure), abs=1e-9
            ), (name, hypothesis, reference)


# ---- the other metrics


def test_cosine():
    assert cosine("good good plot", "Good, plot plot!") == pytest.approx(4 / 5)
    assert (
        cosine("a b", "b a") == pytest.approx(1)
        and cosine("a", "b") == cosine("", "a") == cosine("...", "...") == 0
    )


def test_sentiment():
    assert lexicon_sentiment("Great, GREAT!") == pytest.approx(4 / math.sqrt(16 + 15))
    assert (
        lexicon_sentiment("great but dull")
        == lexicon_sentiment("")
        == lexicon_sentiment("table")
        == 0
    )
    assert -1 < lexicon_sentiment("awful " * 1000) < -0.99
    from data import BLAME, PRAISE

    assert all(DEFAULT_LEXICON[word] > 0 for word in PRAISE) and all(
        DEFAULT_LEXICON[word] < 0 for word in BLAME
    )


def test_sentiment_reads_vaders_file(shared, tmp_path):
    reward = build_reward(f'sentiment(lexicon="{shared}/lexicons/vader_lexicon.txt")')
    good, bad = reward(
        ["", ""], ["a great and lovely film", "a horrible, disgusting film"]
    ).tolist()
    assert good > 0.5 and bad < -0.5
    (tmp_path / "broken.txt").write_text("good\t1.5\nbad minus one\n")
    with pytest.raises(UserError, match="broken.txt:2: expected 'word TAB valence'"):
        build_reward(f'sentiment(lexicon="{tmp_path}/broken.txt")')


def test_length():
    scores = build_reward("length(target=4)")([""] * 4, ["", "a b", "a b c d", "a " * 50])
    assert scores.tolist() == [0.0, 0.5, 1.0, 0.0]


# ---- the command line and the README's table


def test_list_names_every_reward(capsys):
    main(["--list"])
    printed = capsys.readouterr().out
    assert all(f"{name} " in printed for name in [*REWARDS, "clip(x,", "ema(x,", "mixture(a,"])


def test_an_expression_may_begin_with_a_minus(tmp_path, capsys):
    (tmp_path / "s.jsonl").write_text(
        json.dumps({"completion": "good \ud83d", "target": "good"}) + "\n"
    )
    main(["-1*sentiment", str(tmp_path / "s.jsonl")])
    assert "mean  total -0.4588" in capsys.readouterr().err


def test_scoring_a_file(tmp_path, capsys):
    rows = [
        {"prompt": "p", "completion": "the cat sat", "target": "the cat sat down"},
        {"prompt": "q", "completion": "a dog", "target": "the dog"},
    ]
    (tmp_path / "scored.jsonl").write_text("\n".join(map(json.dumps, rows)))
    main(["0.7*rouge_l + 0.3*bleu", str(tmp_path / "scored.jsonl")])
    said = capsys.readouterr()
    lines = said.out.splitlines()
    first = json.loads(lines[0])
    assert first["rouge_l"] == pytest.approx(6 / 7, abs=1e-6) and first["total"] == pytest.approx(
        0.7 * first["rouge_l"] + 0.3 * first["bleu"], abs=1e-6
    )
    assert len(lines) == 2 and said.err.startswith("mean  total ")
    (tmp_path / "wrong.jsonl").write_text(json.dumps({"prompt": "p"}))
    for argv in ([], ["bleu"], ["bleu", str(tmp_path / "wrong.jsonl")], ["bleu", "nowhere.jsonl"]):
        with pytest.raises(SystemExit) as caught:
            main(argv)
        assert caught.value.code == 2 and capsys.readouterr().err.startswith("error: ")


PROMPT, TARGET = (
    "Tell me about the weather in Rome.",
    "It is warm and sunny in Rome, about 25 degrees.",
)
DEGENERATE = {
    "empty": "",
    "one word x 50": "good " * 50,
    "the prompt": PROMPT,
    "the target": TARGET,
    "10,000 letters": "x" * 10_000,
    "emoji": "😀" * 20,
    "mixed scripts": "Wetter 天気 погода καιρός",
}


def degenerate_table() -> list[str]:
    """The rows of the README's table, as they must stand there."""
    texts = list(DEGENERATE.values())
    columns = dict(
        target=[TARGET] * 7, correct_answers=[[TARGET]] * 7, incorrect_answers=[["It is cold."]] * 7
    )
    rows = []
    for name in REWARDS:
        if name not in JUDGES and name not in ("perplexity", "rouge_n", "overlong"):
            scores = build_reward(name, documents=[PROMPT])([PROMPT] * 7, texts, **columns)
            assert torch.isfinite(scores).all()
            rows.append(
                f"| `{name}` | "
                + " | ".join(f"{value + 0.0:.2f}" for value in scores.tolist())
                + " |"
            )
    return rows


def test_the_readme_says_what_degenerate_texts_get():
    readme = (ROOT / "docs/rewards.md").read_text(encoding="utf-8")
    for row in degenerate_table():
        assert row in readme, row


# ---- expressions

TEXTS = dict(completions=["the cat sat", "a dog"], target=["the cat sat down", "the dog"])


def test_an_expression_is_the_sum_it_says_and_logs_its_leaves_raw():
    reward = build_reward("0.7*rouge_l + 0.3*bleu - 2*(length(target=4) - 1) * -0.5")
    total = reward(["p", "q"], TEXTS["completions"], target=TEXTS["target"])
    assert total.shape == (2,) and total.dtype == torch.float32
    for i, (completion, target) in enumerate(zip(TEXTS["completions"], TEXTS["target"])):
        r, b, n = rouge_l(completion, target).f1, bleu(completion, [target]), (0.75, 0.5)[i]
        assert total[i] == pytest.approx(0.7 * r + 0.3 * b + (n - 1), abs=1e-6)
        assert [
            reward.parts[name][i] for name in ("rouge_l", "bleu", "length(target=4)")
        ] == pytest.approx([r, b, n], abs=1e-6)
    assert list(reward.parts) == ["rouge_l", "bleu", "length(target=4)"]


# overlong needs arguments.
@pytest.mark.parametrize(
    "name", [n for n in REWARDS if (n not in JUDGES or n == "perplexity") and n != "overlong"]
)
def test_every_reward_survives_degenerate_texts(name, tokenizer):
    lm = build_lm("llama", vocab_size=len(tokenizer), max_position_embeddings=64)
    reward = build_reward(name, model=lm, tokenizer=tokenizer)
    texts = [
        "",
        " ",
        "good " * 50,
        "\n\n",
        "😀" * 20,
        "混合 mixed текст",
        "x" * 10_000,
        ".",
        "\u0000",
    ]
    answers = dict(
        correct_answers=[["a good text"]] * len(texts), incorrect_answers=["x; y"] * len(texts)
    )
    scores = reward(
        ["p " * 100] * len(texts), texts, target=["a good text"] * len(texts), **answers
    )
    assert torch.isfinite(scores).all() and scores.abs().max() <= 1


def test_the_best_reference_counts_when_there_are_several():
    reward = build_reward("rouge_l")
    assert reward(["p"], ["the cat"], target=["x"], references=[["a dog", "the cat"]]).item() == 1


@pytest.mark.parametrize(
    "expression, part",
    [
        ("rouge_z", "rouge_z"),
        ("0.5*bleu + foo(1)", "foo(1)"),
        ("bleu / 2", "bleu / 2"),
        ("bleu ** 2", "bleu ** 2"),
        ("__import__('os')", "__import__"),
        ("bleu.real", "bleu.real"),
        ("'text'", "'text'"),
        ("bleu +", "is not an expression"),
        ("", "is not an expression"),
        ("length(target=print)", "length(target=print)"),
        ("length(goal=3)", "goal"),
        ("length(target=0)", "above 0"),
        ("length(target='a')", "above 0"),
        ("length(target=1e999)", "above 0"),
        ("rouge_n(n=0)", "above 0"),
        ("sentiment(lexicon=5)", "sentiment(lexicon=5)"),
        ("perplexity(model=3)", "perplexity(model=3)"),
        ("1e999*bleu", "inf"),
        ("nowhere.py:f", "there is no file nowhere.py"),
        ("perplexity", "needs a model"),
        ("sentiment(lexicon='missing.txt')", "missing.txt"),
    ],
)
def test_a_wrong_expression_is_one_line_that_names_the_part(expression, part):
    with pytest.raises(UserError) as caught:
        build_reward(expression)
    assert part in str(caught.value) or part in str(caught.value).replace("1e309", "inf")
    assert "\n" not in str(caught.value)


def test_a_row_without_references_falls_back_on_its_target():
    assert build_reward("rouge_l")(
        ["p"] * 3, ["a b"] * 3, target=["a b"] * 3, references=[None, [], ["x"]]
    ).tolist() == [1, 1, 0]


@pytest.mark.parametrize(
    "expression, text, is_read",
    [
        ("rouge_l", "今天天气很好", False),
        ("rouge_n(n=2)", "मौसम", False),
        ("rouge_lsum", "Ünïcödé", True),
        ("cosine", "今天天气很好", True),
        ("cosine", "👍 !", False),
        ("coverage", "of the", False),
        ("truthful", "погода", False),
        ("numeric", "seven", False),
        ("numeric", "I say 7", True),
        ('truthful("bleu")', "погода", True),
        ("bleu", "погода", True),
        ("rouge_1", "  ", True),
    ],
)
def test_a_target_that_a_reward_cannot_read_is_said_once(capsys, expression, text, is_read):
    columns = dict(target=["good 1", text, text], correct_answers=[["good"], [text], [text]])
    reward = build_reward(expression)
    for _ in range(2):
        reward(["p"] * 3, ["good"] * 3, incorrect_answers=[["x"]] * 3, **columns)
    notes = capsys.readouterr().err.splitlines()
    name = expression.partition("(")[0]
    said = f"note: {name} finds nothing that it can read in the target {text!r}: such rows score 0"
    assert notes == ([] if is_read else [said])


def test_a_reward_beyond_float32_is_refused(tmp_path):
    (tmp_path / "f.py").write_text(
        "def f(completions, **columns): return [1e300] * len(completions)\n"
    )
    with pytest.raises(UserError, match="gave 1e.300, not a finite number"):
        build_reward(f"{tmp_path}/f.py:f")(["p"], ["c"])
    with pytest.raises(UserError, match="too large for a float32"):
        build_reward("1e39*rouge_l")(["p"], ["c"], target=["c"])


def test_a_reward_that_needs_a_target_says_so():
    with pytest.raises(UserError, match="reward 'bleu' compares with a reference text"):
        build_reward("bleu")(["p"], ["c"])
