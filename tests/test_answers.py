"""Right answers: tables of what is equal and what is not, many scripts, and texts that attack."""

import sys
import threading
import types
from fractions import Fraction

import pytest

import answers
import formulas
from answers import (
    ANSWERS,
    boxed,
    exact_match,
    final_answer,
    math_equal,
    normalize_answer,
    numeric,
    overlong_penalty,
)
from engine import UserError
from formulas import last_number, read
from rewards import build_reward

# ---- exact_match

SAME_TEXT = [
    ("The Eiffel Tower!", "eiffel tower"),
    ("an Apple", "apple"),
    ("in the park", "in park"),
    ("see a dog", "see dog"),
    ("  two\twords\n", "two words"),
    ("A", "a"),
    ("A)", "A"),
    ("(A)", "A"),
    ("[A]", "A"),
    ("A.", "A"),
    ("**(A).**", "a"),
    ("**Paris**", "Paris"),
    ("the **Seine** river", "Seine river"),
    ("`x`", "x"),
    ('"New York"', "New York"),
    ("the 'Who' band", "Who band"),
    ("“Paris”", "Paris"),
    ("「東京」", "東京"),
    ("東京。", "東京"),
    ("¿Qué?", "qué"),
    ("STRASSE", "straße"),
    ("caf\u00e9", "cafe\u0301"),
    ("İstanbul", "i\u0307stanbul"),
    ("Ａ", "a"),
    ("４２", "42"),
    ("Paris\u200b", "Paris"),
    ("co\u00adop", "coop"),
    ("क्या?", "क्या"),
    ("काम।", "काम"),
    ("هل؟", "هل"),
    ("1,234", "1234"),
    ("$12,345,678.5", "$12345678.5"),
    ("5.", "5"),
    ("42?", "42"),
    ("−5", "-5"),
    ("1939–1945", "1939-1945"),
    ("it’s", "it's"),
    ("Washington, D.C.", "washington D.C"),
    ("?", "?"),
    ("👍", "👍"),
    ("the", "The"),
    ("Vitamin A", "vitamin a."),
    ("(Paris)", "Paris"),
]
OTHER_TEXT = [
    ("", ""),
    ("", " "),
    ("A", ""),
    ("", "A"),
    ("the", "A"),
    ("the", ""),
    ("a", "an"),
    ("!", "?"),
    ("...", ""),
    (":)", ":("),
    ("👎", "👍"),
    ("<", ">"),
    ("-1.5", "15"),
    ("-1.5", "1.5"),
    ("1,5", "15"),
    ("1,23", "123"),
    ("0,123", "0123"),
    ("(1,234)", "(1234)"),
    (".5", "5"),
    ("5!", "5"),
    ("5'", '5"'),
    ("f'", "f"),
    ("C++", "C"),
    ("C#", "C"),
    ("f()", "f"),
    (".net", "net"),
    ("__init__", "init"),
    ("a*b*c", "abc"),
    ("2**3**4", "234"),
    ("A*", "A"),
    ("a*b*", "ab"),
    ("*a*b", "ab"),
    ("5'3'", "53"),
    ("'a'b", "ab"),
    ("ab)", "ab"),
    ("f(1,234)", "f(1234)"),
    ("1,2345", "12345"),
    ("x%", "x"),
    ("a 15", "15"),
    ("A 1st", "1st"),
    ("$5", "5"),
    ("50%", "50"),
    ("-x", "x"),
    ("Na+", "Na"),
    ("Cl-", "Cl"),
    ("x²", "x2"),
    ("①", "1"),
    ("(0, 1)", "[0, 1]"),
    ("[0,1)", "(0,1]"),
    ("Vitamin A", "vitamin"),
    ("type A error", "type error"),
    ("A B", "B"),
    ("A, B", "B"),
    ("A B.", "B"),
    ("a + b", "+ b"),
    ("a 5", "5"),
    ("काम", "कम"),
    ("किताब", "कताब"),
    ("กำ", "ก"),
    ("كِ", "ك"),
    ("می‌خواهم", "می خواهم"),
    ("B", "A"),
]


@pytest.mark.parametrize("completion, target", SAME_TEXT)
def test_exact_match_finds_the_same_answer(completion, target):
    assert exact_match(completion, target) == exact_match(target, completion) == 1


@pytest.mark.parametrize("completion, target", OTHER_TEXT)
def test_exact_match_keeps_different_answers_apart(completion, target):
    assert exact_match(completion, target) == exact_match(target, completion) == 0


def test_no_answer_disappears():
    for code in [*range(0x21, 0x3000), *range(0x1F300, 0x1F700)]:
        char = chr(code)
        if char.isprintable():
            assert normalize_answer(char) or char in "\u200e\u200f", hex(code)
            assert exact_match(char, "") == exact_match("", char) == 0


# ---- numeric

NUMBERS = [
    ("so 3 + 4 = 7", 7),
    ("$1,234.50", "1234.5"),
    ("-5", -5),
    ("3-5", 5),
    ("(-5)", -5),
    ("x=-5", -5),
    ("−5", -5),
    ("–5", -5),
    ("pages 10–20", 20),
    ("- 5", 5),
    ("-$5", -5),
    ("$-5", -5),
    ("−£5", -5),
    ("-\\$1,000", -1000),
    ("-€ 2.5", "-2.5"),
    ("from $3$-$5$", 5),
    ("a-$5", 5),
    ("-US$5", -5),
    ("7.0", 7),
    ("at 10:30", None),
    ("a ratio of 2:3", None),
    ("8, on 2020-05-06", 8),
    ("8, on 2020-05-06 and", 8),
    ("Answer:8", 8),
    ("from 3-5", 5),
    ("42.", 42),
    ("...42", 42),
    ("_42_", 42),
    ("**42**", 42),
    ("__42__", 42),
    ("done.42", 42),
    (".5", "1/2"),
    ("No.5", 5),
    ("42%", 42),
    ("42km", 42),
    ("共42个", 42),
    ("ב5", 5),
    ("1,23", 23),
    ("1,234", 1234),
    ("1,2345", 2345),
    ("12,345,678", 12345678),
    ("$9{,}500", 9500),
    ("1{,}234{,}567.25", "1234567.25"),
    ("10,\\!000", 10000),
    ("10\\,000", 10000),
    ("1'000", 1000),
    ("1’000’000", 1000000),
    ("12,34,567", 1234567),
    ("1,00,000", 100000),
    ("12,34,5678", 5678),
    ("9 500", 9500),
    ("9\u00a0500", 9500),
    ("9\u202f500", 9500),
    ("1\u2009234\u2009567", 1234567),
    ("1 234 567", 1234567),
    ("3 4", 4),
    ("in 2023 500", 500),
    ("1 234 5", 5),
    ("3 4 500", 500),
    ("1 2345", 2345),
    ("7/2", "7/2"),
    ("-7/2", "-7/2"),
    ("1 / 2", "1/2"),
    ("1⁄2", "1/2"),
    ("½", "1/2"),
    ("2½", "5/2"),
    ("-2½", "-5/2"),
    ("3 1/2", "7/2"),
    ("-3 1/2", "-7/2"),
    ("3 7/2", "7/2"),
    ("3 1/2/4", 3),
    ("1,000/3", "1000/3"),
    ("5/0", None),
    ("3 or 5/0", 3),
    ("2024/05/06", None),
    ("12 on 2024/05/06", 12),
    ("24.12.2024", None),
    ("v1.2.3", None),
    ("\\frac{2}{3}", "2/3"),
    ("\\dfrac{2}{3}", "2/3"),
    ("\\tfrac{-2}{3}", "-2/3"),
    ("-\\frac{2}{3}", "-2/3"),
    ("-\\frac{-2}{3}", "2/3"),
    ("\\frac12", "1/2"),
    ("\\frac1{72}", "1/72"),
    ("\\frac{7}2", "7/2"),
    ("3\\frac{1}{2}", "7/2"),
    ("\\frac{1}{0}", None),
    ("\\frac{x}{2}", None),
    ("\\frac{\\frac12}{3}", "1/6"),
    ("3\\frac{7}{2}", "7/2"),
    ("2 \\frac{1}{2}", "5/2"),
    ("\\frac{1.5}{2{,}000}", "3/4000"),
    ("1e3", 1000),
    ("1.5E-3", "3/2000"),
    ("2e+2", 200),
    ("2\\times10^{3}", 2000),
    ("2 x 10^3", 2000),
    ("2.5×10³", 2500),
    ("2·10⁻³", "1/500"),
    ("2 \\cdot 10^{-3}", "1/500"),
    ("10^3", 1000),
    ("2^{10}", 1024),
    ("-2^2", -4),
    ("0^-1", None),
    ("0^0", None),
    ("0^2", 0),
    ("5²", 25),
    ("3 m^2", 3),
    ("3 m²", 3),
    ("x^{-2}", None),
    ("x^2", None),
    ("x_2", None),
    ("a_{12}", None),
    ("H2O", None),
    ("v2", None),
    ("α2", None),
    ("5x3", 5),
    ("７／２", "7/2"),
    ("－１，２３４．５", "-1234.5"),
    ("٣", 3),
    ("٣٫٥", "3.5"),
    ("१२", 12),
    ("๑๒๓", 123),
    ("none", None),
    ("", None),
    ("1e999999999", None),
    ("1e-999999999", None),
    ("9^999999999", None),
    ("9^" + "9" * 5000, None),
    ("9e" + "9" * 5000, None),
    ("9" * 1001, None),
    ("9" * 10_000 + " 5", 5),
]


@pytest.mark.parametrize("text, value", NUMBERS)
def test_last_number(text, value):
    expected = None if value is None else Fraction(value)
    assert last_number(text) == expected
    assert value is None or last_number(f"12; {text}") == expected


def test_numbers_are_exact():
    assert numeric("1/3", "\\frac{2}{6}") == 1
    assert numeric("0.1", "0.1000000000000000055511151231257827") == 0
    assert numeric("100000000000000000001", "100000000000000000002") == 0
    assert numeric("9" * 1000, "9" * 1000) == 1 and numeric("1e1000", "10^1000") == 1
    assert numeric("50%", "50") == 1 and numeric("50%", "0.5") == 0
    assert numeric("none", "none") == numeric("5", "") == numeric("", "5") == 0


# ---- the final answer of a text

FINAL = [
    ("so \\boxed{42}.", "42"),
    ("\\boxed{1}, no: \\boxed{2}", "2"),
    ("\\fbox{7}", "7"),
    ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
    ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
    ("\\boxed{\\{}", "\\{"),
    ("\\boxed{x = \\boxed{5}}", "5"),
    ("$\\boxed 5$", "5"),
    ("\\boxed 5.", "5"),
    ("\\boxed {5}", "5"),
    ("\\boxedx{5}", None),
    ("\\boxed{}", None),
    ("\\boxed{ }", None),
    ("\\boxed", None),
    ("\\boxed{5", None),
    ("\\boxed{5}, then \\boxed{6", None),
    ("#### 5 \\boxed{}", None),
    ("\\boxed{3} #### 5", "3"),
    ("1+1\n#### 2\n", "2"),
    ("#### 1\n#### 2", "2"),
    ("####", None),
    ("##### 5", None),
    ("#### 3\nThe answer is 4.", "3"),
    ("The answer is 42.", "42"),
    ("the answer is 3.5. So", "3.5"),
    ("Final answer: $x$", "$x$"),
    ("**Answer:** B", "B"),
    ("**Answer**: B", "B"),
    ("**Answer: B**", "B"),
    ("The answer is: (B)", "(B)"),
    ("The answer is **42.** Good", "42"),
    ("Answer:\n\n42\nbecause", "42"),
    ("ANSWER : 7", "7"),
    ("The answers are 2 and 3.", "2 and 3"),
    ("The answer is $3.$", "$3"),
    ("The answer is 1. The answer is 2. 3", "2"),
    ("answer is ", None),
    ("the answering is 5", None),
    ("42", None),
    ("<think>\\boxed{1}</think> 2", None),
    ("<think>\\boxed{1}</think>\\boxed{2}", "2"),
    ("\\boxed{1}</think>\\boxed{2}", "2"),
    ("<think>\\boxed{1}", None),
    ("<think>a</think><think>\\boxed{1}", None),
    ("\\boxed{1}<think>", None),
    ("<think>x</think>\n<answer>\n42\n</answer>", "42"),
    ("<answer>so \\boxed{3}</answer> \\boxed{4}", "3"),
    ("<answer>The answer is 42.</answer>", "42"),
    ("<answer>1</answer><answer>2</answer>", "2"),
    ("<answer></answer>", None),
    ("</answer> 5", None),
    ("5</answer>", None),
    ("answer: 5</answer>. The answer is 6", "5"),
    ("<answer>4 answer: 5", "5"),
    ("answer: 東京。はい", "東京"),
    ("answer: 5 apples। x", "5 apples"),
    ("<answer> 5", None),
    ("#### Step 1\nsomething. The answer is 42.", "42"),
    ("#### Final answer\nIt is 42", None),
    ("#### The answer is 42", "42"),
    ("#### Paris", "Paris"),
    ("#### -$5 each\n\nQuestion: 7", "-$5 each"),
    ("Answer: 42<|im_end|>", "42"),
    ("Answer：42</s>", "42"),
    ("(The answer is 42)", "42"),
    ("The answer is (1, 2)", "(1, 2)"),
    ("The answer is **42** apples", "42 apples"),
    ("The answer is Paris! Good.", "Paris"),
    ("The answer is 42 because 41 is odd", "42"),
    ("The answer is Dr. Smith.", "Dr. Smith"),
    ("The answer is 5!", "5!"),
]


@pytest.mark.parametrize("text, answer", FINAL)
def test_final_answer(text, answer):
    assert final_answer(text) == answer


# ---- equal in value

SAME_VALUE = [
    ("0.5", "1/2"),
    ("\\frac{1}{2}", "0.50"),
    ("\\dfrac12", ".5"),
    ("50%", "0.5"),
    ("50\\%", "1/2"),
    ("50%", "50"),
    ("50 %", "50\\%"),
    ("1,234", "1234"),
    ("9 500", "9500"),
    ("1{,}234.5", "1234.5"),
    ("$\\$18$", "18"),
    ("-\\$18", "-18"),
    ("2^{10}", "1024"),
    ("2 \\times 10^{3}", "2000"),
    ("3 \\cdot 4", "12"),
    ("3 1/2", "7/2"),
    ("3\\frac{1}{2}", "3.5"),
    ("-3\\frac{1}{2}", "-3.5"),
    ("\\frac{\\frac12}{3}", "1/6"),
    ("\\sqrt{4}", "2"),
    ("\\sqrt{12}", "2\\sqrt{3}"),
    ("\\frac{1}{\\sqrt{2}}", "\\frac{\\sqrt{2}}{2}"),
    ("\\sqrt{\\frac{1}{2}}", "\\sqrt2/2"),
    ("\\sqrt2 \\cdot \\sqrt3", "√6"),
    ("\\sqrt{0}", "0"),
    ("2\\pi", "π*2"),
    ("\\frac{\\pi}{2}", "0.5\\pi"),
    ("\\pi r^2", "r^2 \\cdot \\pi"),
    ("x+1", "1 + x"),
    ("(x+1)(x-1)", "x^2 - 1"),
    ("(x+1)^2", "x²+2x+1"),
    ("x^{-1}", "1/x"),
    ("x - x", "0"),
    ("2--3", "5"),
    ("2*-3", "-6"),
    ("-2^2", "-4"),
    ("(-2)^2", "4"),
    ("1e-3", "0.001"),
    ("\\left(1, 2\\right)", "(1,2)"),
    ("(\\frac12, 0.5)", "(0.5, \\frac{1}{2})"),
    ("[0, 1)", "[0,1.0)"),
    ("\\{1, 2\\}", "\\{2, 1\\}"),
    ("(1,2), (3,4)", "(1, 2), (3, 4)"),
    ("1, 234", "1, 234.0"),
    ("(-\\infty, 3]", "(-∞, 3]"),
    ("x = 5", "5"),
    ("x=5", "x = 5.0"),
    ("f(x) = 2x", "2x"),
    ("3 + 4 = 7", "7"),
    ("x = 3 + 4 = 7", "7"),
    ("5\\text{ cm}", "5"),
    ("5\\text{ cm}^2", "5"),
    ("5\\ \\mathrm{cm}", "5\\text{cm}"),
    ("5 cm", "5"),
    ("42 apples", "42"),
    ("$18 per day", "18"),
    ("x = 42 apples.", "42"),
    ("90^\\circ", "90"),
    ("90^{\\circ}", "90°"),
    ("\\( 5 \\)", "\\[5\\]"),
    ("\\text{Paris}", "paris"),
    ("\\textbf{(B)}", "B"),
    ("\\sin(2x)", "\\sin( 2x )"),
    ("\\dfrac{x}{2}", "x/2"),
    ("5\\!\\sqrt{2}", "5\\sqrt2"),
    ("x_{1}", "x_1"),
    ("a=1, b=2", "a = 1,b = 2"),
    ("(5\\text{ cm}, 6\\text{ cm})", "(5, 6)"),
    ("25 percent", "25 percent"),
    ("25 percent", "25%"),
    ("5\\text{ square feet}", "5"),
    ("5 green apples", "5"),
    ("\\$5", "5 dollars"),
    ("€5", "5 euros"),
    ("(B) Paris", "B"),
    ("B) Paris", "B"),
    ("B: Paris", "(B)"),
    ("option B", "B"),
    ("√16", "4"),
    ("５", "5"),
    ("٥", "5"),
    ("**5**", "5"),
    ("5.", "5"),
    ("1 \\div 4", "0.25"),
    ("2**3", "8"),
]
OTHER_VALUE = [
    ("", ""),
    ("", "0"),
    ("0.333", "1/3"),
    ("0.5", "50"),
    ("5%", "50%"),
    ("50%", "5"),
    ("1 2", "12"),
    ("1/0", "2/0"),
    ("0^0", "1"),
    ("(1, 2)", "(2, 1)"),
    ("(1, 2)", "[1, 2]"),
    ("(1, 2)", "1, 2"),
    ("(1, 2)", "(1, 2, 3)"),
    ("1, 2", "2, 1"),
    ("1, 234", "1234"),
    ("(1,234)", "1234"),
    ("1,5", "1.5"),
    ("\\{1, 2\\}", "\\{1, 3\\}"),
    ("x = 5", "y = 5"),
    ("x = 5", "6"),
    ("x >= 5", "5"),
    ("x \\ne 5", "5"),
    ("2x + 1 = 5", "5"),
    ("3 + 4 = 8", "8"),
    ("\\pi", "3.14"),
    ("x", "y"),
    ("xy", "yx"),
    ("tea", "eat"),
    ("A B", "B A"),
    ("f(2x)", "2f(x)"),
    ("\\sin(2x)", "2\\sin(x)"),
    ("\\sqrt{2}", "2"),
    ("\\sqrt{2}", "\\sqrt{3}"),
    ("\\sqrt[3]{8}", "\\sqrt[2]{8}"),
    ("5!", "5"),
    ("\\pm 5", "5"),
    ("|5|", "5"),
    ("5\\text{ cm}", "5\\text{ m}"),
    ("5 cm", "6"),
    ("5 million", "5"),
    ("5 or more", "5"),
    ("5 or 6", "5"),
    ("5\\text{ or }600", "5600"),
    ("5xy", "5"),
    ("x^2yz", "x^2"),
    ("\\frac{1}{2}bh", "\\frac12"),
    ("5 pi", "5"),
    ("5 log x", "5"),
    ("2cos theta", "2"),
    ("3 \\text{ or } 1/2", "3.5"),
    ("5\\text{ or }-5", "0"),
    ("5 \\text{ and } (3)", "15"),
    ("3\\text{ or }x", "3x"),
    ("5 \\text{ million}", "5"),
    ("2\\text{ million dollars}", "2"),
    ("2\\mbox{ hundred}", "2"),
    ("5 \\text{ or more}", "5"),
    ("5 halves", "5"),
    ("3 point five", "3"),
    ("5 less than", "5"),
    ("3 below zero", "3"),
    ("5 if x even", "5"),
    ("5 is wrong", "5"),
    ("5 minutes to ten", "5"),
    ("5 cents", "\\$5"),
    ("€5", "\\$5"),
    ("5\\text{ am}", "5\\text{ pm}"),
    ("\\sqrt16", "4"),
    ("1/2\\frac12", "0.4"),
    ("\\not=5", "5"),
    ("(B) Paris", "A"),
    ("A dog", "A"),
    ("5\\text{ or }6", "5"),
    ("5x", "5"),
    ("1/2x", "\\frac{x}{2}"),
    ("2^{0.5}", "2"),
    ("2^{0.5}", "1"),
    ("2x + 1 = 5", "2x + 1"),
    ("3 + 4 = 8", "7"),
    ("$", ""),
    ("$", "\\$"),
    ("5(( apples", "5(("),
    ("\\log 4 apples", "\\log 4"),
    ("काम", "कम"),
    ("(0,1) \\cup (2,3)", "(0,1) \\cup (2,4)"),
]


@pytest.fixture
def without_math_verify(monkeypatch):
    monkeypatch.setattr(answers, "_math_verify", lambda: None)


@pytest.mark.parametrize("one, other", SAME_VALUE)
def test_equal_values(without_math_verify, one, other):
    for completion, target in ((one, other), (other, one)):
        assert math_equal(completion, target) == 1
        assert boxed(f"so \\boxed{{{completion}}}", f"#### {target}") == 1
        assert math_equal(f"Answer: {completion}", target) == 1


@pytest.mark.parametrize("one, other", OTHER_VALUE)
def test_different_values(without_math_verify, one, other):
    for completion, target in ((one, other), (other, one)):
        assert boxed(f"so \\boxed{{{completion}}}", target) == 0
        assert boxed(f"#### {completion}", target) == 0
        assert math_equal(f"Answer: {completion}", target) == 0


def test_a_completion_without_a_mark(without_math_verify):
    assert boxed("42", "42") == boxed("so it is 42", "42") == 0
    assert math_equal("42", "42") == math_equal("1/2", "0.5") == math_equal("(1, 2)", "(1,2)") == 1
    assert math_equal("I add 40 and 2, which gives 42 apples.", "#### 42") == 1
    assert math_equal("I add 40 and 2", "42") == 0
    assert math_equal("at last 2", "(1, 2)") == math_equal("at last 3", "2 + 3") == 0
    assert math_equal("so 5", "2 + 3") == math_equal("so 50", "50\\%") == 1
    assert math_equal("<think>it is 42", "42") == math_equal("\\boxed{} 42", "42") == 0
    assert math_equal("<think>it is 41</think>it is 42", "42") == 1
    assert math_equal("<think>it is 42</think>it is 41", "42") == 0


def test_targets_may_be_whole_solutions(without_math_verify):
    assert boxed("\\boxed{72}", "48/2 = <<48/2=24>>24\n#### 72") == 1
    assert boxed("The answer is $\\frac{1}{2}$.", "so we get $\\boxed{0.5}$.") == 1
    assert boxed("The answer is (B).", "B") == 1 and boxed("The answer is (B).", "A") == 0
    reward = build_reward("boxed + 2*math_equal")
    scores = reward(["q"] * 2, ["#### 5", "5"], target=["x"] * 2, references=[["4", "5.0"]] * 2)
    assert scores.tolist() == [3, 2], "the best reference counts"


def test_math_verify_is_asked_about_formulas_that_are_not_read(monkeypatch):
    asked = []

    def parse(text, extraction_config, parsing_timeout):
        asked.append((text, parsing_timeout))
        return [text]

    def verify(gold, found, timeout_seconds):
        asked.append((gold, found, timeout_seconds))
        return True

    package = types.SimpleNamespace(parse=parse, verify=verify, LatexExtractionConfig=object)
    monkeypatch.setitem(sys.modules, "math_verify", package)
    answers._math_verify.cache_clear()
    assert math_equal("$\\sin^2 x$", "1 - \\cos^2 x") == 1
    assert asked == [
        ("$1 - \\cos^2 x$", 5),
        ("$\\sin^2 x$", 5),
        (["$1 - \\cos^2 x$"], ["$\\sin^2 x$"], 5),
    ]
    thread = threading.Thread(target=math_equal, args=("\\sin 2", "\\cos 2"))
    thread.start()
    thread.join()
    assert asked[-1] == (["$\\cos 2$"], ["$\\sin 2$"], None), "signals belong to the main thread"
    del asked[:]
    for completion, target in (("tea", "eat"), ("1/3", "0.333"), ("\\sin " * 99, "\\cos x")):
        assert math_equal(f"Answer: {completion}", target) == 0
    assert asked == [], "words, values that are read, and long texts are not its business"
    monkeypatch.setitem(sys.modules, "math_verify", None)  # importing it fails
    answers._math_verify.cache_clear()
    assert math_equal("\\sin^2 x", "1 - \\cos^2 x") == 0
    answers._math_verify.cache_clear()


def test_math_verify_itself():
    pytest.importorskip("math_verify", reason="optional: pip install math-verify[antlr4_13_2]")
    answers._math_verify.cache_clear()
    assert math_equal("\\sin^2 x + \\cos^2 x", "1") == 1
    assert math_equal("\\log 4", "2 \\log 3") == 0


def test_what_is_too_large_is_not_read():
    for text in (
        "(x+1)^{21}",
        "(a+b+c)^{20}",
        "9^{9^{9^9}}",
        "10^{9999}",
        "((" * 60 + "x" + "))" * 60,
    ):
        assert read(text) is None
    assert read("1+" * 150 + "1") is None and read("1+" * 149 + "1") is not None
    assert read("(1, 2") is None and read("1)(2") is None
    assert read("(a+b)^{20}") is not None and read("1" * 300) is not None
    assert read("\\sqrt{1000000}") is None and read("\\sqrt{999983}") is not None


# One of these again and again; what stands before a bar stands there once.
ATTACKS = [
    *"9 - { ( # ? ½ ² १ Ａ \u0301 \u200b $ \\ % ** *a `a a. x=".split(),
    *"1, 1/ 1. 1e 1^ 12,34, 123,456, 1,234 1'234".split(),
    *["1 234 ", "2 x 10^", "e\u0301", "'a ", "the ", " ", "\t", "(1, ", "[(", "x^{", "-("],
    *["\\frac{", "\\frac| ", "\\frac{1}{", "\\frac1", "\\sqrt{", "\\text{", "\\text{a}"],
    *["\\boxed{", "\\boxed", "#### ", "answer is ", "answer| ", "answer:|*", "answer: |.*"],
    *["<think>", "</think>", "<answer>", "</answer>", "<think>|</think>"],
]


@pytest.mark.parametrize("length", [3000, pytest.param(5000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["exact_match", "numeric", "boxed", "math_equal", "format"])
def test_long_texts_end_in_time(without_math_verify, name, length):
    """Hours, if a regular expression read the rest of the text again for each of its characters."""
    reward = build_reward(name)
    for attack in ATTACKS:
        head, _, unit = attack.rpartition("|")
        text = head + unit * (length // len(unit))
        texts = [text, f"5 \\boxed{{{text}}}", f"<think>{text}</think> {text}", f"#### {text}", "5"]
        scores = reward(["p"] * 5, texts, target=["5", "5", "5", text, text])
        assert set(scores.tolist()) <= {0, 1}
    assert last_number("(" * length + "1,234" + ")" * length) == 1234


# ---- format


def test_format_looks_at_the_whole_text():
    texts = [
        "<think>a\nb</think>\nc",
        "  <think></think>\n",
        "<think>a</think>",
        "x <think>a</think> c",
        "<think>a",
        "a</think> c",
        "<think>a</think>b<think>c</think>d",
        "<think>a<think>b</think>c",
        "<think>a</think>b</think>",
        "",
    ]
    assert build_reward("format")(["p"] * 10, texts).tolist() == [1, 1, 1, 0, 0, 0, 0, 0, 0, 0]
    loose = build_reward('format("<think>.*</think>.*")')
    assert loose(["p"] * 10, texts).tolist() == [1, 1, 1, 0, 0, 0, 1, 1, 1, 0]


def test_the_patterns_of_other_trainers_work_as_they_are_written():
    pattern = r"^<think>\n.*?\n</think>\n<answer>\n.*?\n</answer>$"
    texts = [
        "<think>\na\nb\n</think>\n<answer>\n5\n</answer>",
        "<think>a</think><answer>5</answer>",
    ]
    for quoted in (f'r"{pattern}"', f'"{pattern}"', repr(pattern)):
        reward = build_reward(f"0.5*format({quoted}) + format(pattern={quoted})")
        assert reward(["p"] * 2, texts).tolist() == [1.5, 0]


@pytest.mark.parametrize(
    "argument", ['"<think>("', '"*a"', '"a{99999999999999999999}"', "5", "None"]
)
def test_a_wrong_pattern_is_said_before_training(argument):
    with pytest.raises(UserError, match=r"^format\(.*expected a regular expression of Python") as e:
        build_reward(f"format({argument})")
    assert argument.strip('"') in str(e.value) and "\n" not in str(e.value)


# ---- overlong


def test_the_soft_overlong_punishment_is_the_papers():
    """L_max 16384 + 4096 and L_cache 4096, as in section 4.1 of 2503.14476."""
    expected = {
        1: 0,
        16384: 0,
        16385: -1 / 4096,
        18432: -0.5,
        20479: -4095 / 4096,
        20480: -1,
        99999: -1,
    }
    for length, value in expected.items():
        assert overlong_penalty(length, soft=16384, hard=20480) == pytest.approx(value, abs=1e-12)
    assert [overlong_penalty(n, 3, 3) for n in (0, 3, 4)] == [0, 0, -1], "a step"


def test_overlong_counts_tokens_or_says_that_it_counts_words(tokenizer, capsys):
    text = "antidisestablishmentarianism, again"
    length = len(tokenizer(text, add_special_tokens=False)["input_ids"])
    assert length > 3
    reward = build_reward(f"overlong(soft={length - 1}, hard={length + 3})", tokenizer=tokenizer)
    assert reward(["p"] * 2, [text, "a"]).tolist() == [-0.25, 0] and capsys.readouterr().err == ""
    with_start = types.SimpleNamespace(
        encode=lambda text, add_special_tokens=True, verbose=True: (
            text.split() + [0] * add_special_tokens
        )
    )
    reward = build_reward("overlong(soft=1, hard=2)", tokenizer=with_start)
    assert reward(["p"], ["a"]).item() == 0, "a token that starts every text is not the model's"
    reward = build_reward("overlong(soft=2, hard=4.0)")
    assert capsys.readouterr().err.startswith("note: overlong counts words here")
    assert reward(["p"] * 5, ["", "a b", "a b c", "a b c d", "a " * 9]).tolist() == [
        0,
        0,
        -0.5,
        -1,
        -1,
    ]
    assert capsys.readouterr().err == "", "said once"


@pytest.mark.parametrize(
    "arguments, part",
    [
        ("", "soft"),
        ("soft=3", "hard"),
        ("hard=3", "soft"),
        ("soft=0, hard=3", "overlong(soft=0): expected a number above 0"),
        ("soft=-1, hard=3", "overlong(soft=-1)"),
        ("soft=3, hard='9'", "overlong(hard='9')"),
        ("soft=3, hard=1e999", "overlong(hard=inf)"),
        ("soft=4, hard=3", "expected soft <= hard"),
    ],
)
def test_overlong_with_wrong_arguments(arguments, part):
    with pytest.raises(UserError) as caught:
        build_reward(f"overlong({arguments})")
    assert part in str(caught.value) and "\n" not in str(caught.value)


def test_every_answer_needs_its_target():
    for name in ("exact_match", "numeric", "boxed", "math_equal"):
        with pytest.raises(UserError, match=f"reward '{name}' compares with a reference text"):
            build_reward(name)(["p"], ["c"])
    assert set(ANSWERS) >= {"exact_match", "numeric", "boxed", "math_equal", "format", "overlong"}
    assert formulas.read("5") == ("", frozenset({((), Fraction(5))}))
