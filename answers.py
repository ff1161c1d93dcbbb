"""Rewards for tasks with a right answer: is it right, is it where it should be, is it short enough?

`exact_match` compares texts, `numeric` the last numbers, `math_equal` values (1/2 is 50%), `boxed`
the same for a final answer that is marked. `format` looks at the shape of a text, `overlong` at its
length. Formulas are read in formulas.py and never evaluated as code. Where the optional package
math-verify is installed, it is asked too about the formulas that are not read there. Left out on
purpose: answers of several sentences, and code that has to be run.

    python rewards.py "math_equal + 0.1*format" examples/answers.jsonl
"""

import functools
import re
import threading
import unicodedata
from collections.abc import Callable, Iterable

import formulas
import parallel
from engine import UserError
from formulas import last_number
from leaves import best_of, check_above_0, completion_reward
from words import DASHES, composed

# ------------------------------------------------------------------ equal as texts

_SAME = str.maketrans(dict.fromkeys("‘’‚‹›", "'") | dict.fromkeys("“”„«»「」『』", '"') | DASHES)
_QUOTED = re.compile(r"""(?<!\w)(["'])([^"']+)\1(?!\w)""")
_EMPHASIS = re.compile(r"(?<![\w*])(\*{1,3}|`)(?=\S)([^*`]+)(?<=\S)\1(?![\w*])")  # of Markdown
_THOUSANDS = re.compile(r"(?<![\w.,(\[{])[1-9][0-9]{0,2}(?:,[0-9]{3})+(?![\w,])")
_ARTICLES = {"a", "A", "an", "An", "AN", "the", "The", "THE"}
_STOPS = ".,:;?。।"
_SYMBOLS = "\"'#%&@*/\\§†‡‰′″"  # Unicode calls them punctuation, but C# is not C


def _ends_sentence(char: str) -> bool:
    return unicodedata.category(char) == "Po" and char not in _SYMBOLS


def _bare_word(word: str) -> str:
    """A word without the punctuation of its sentence. In one with a digit, as 5!, less is that."""
    if word.isalnum():
        return word
    has_digit = any(map(str.isdigit, word))
    end = len(word)
    while end and (word[end - 1] in _STOPS if has_digit else _ends_sentence(word[end - 1])):
        end -= 1
    return word[:end].lstrip("¿¡")


def _bare_answer(text: str) -> str:
    """An answer without what stands around all of it: brackets, bold marks, a full stop."""
    for _ in range(4):  # layers, as in **(A).**
        before, text = text, _EMPHASIS.sub(r"\2", text.strip().rstrip(_STOPS))
        if text and unicodedata.category(text[-1]) == "Pe" and "," not in text:
            places = [i for i, c in enumerate(text) if unicodedata.category(c) in ("Ps", "Pe")]
            if places == [0, len(text) - 1] and unicodedata.category(text[0]) == "Ps":
                text = text[1:-1]  # (A); but (0, 1) and [0, 1] are two intervals
            elif len(places) == 1 and len(text) == 2:
                text = text[:-1]  # A)
        if text == before:
            break
    return text


def normalize_answer(text: str) -> str:
    """An answer without what does not count, for `exact_match`; "" only if it has no character.

    Case does not count, nor Unicode's form and width, punctuation at the end of a word, quotation
    marks around words, brackets and bold marks around the whole, nor an article directly before a
    word. All else does. SQuAD (Rajpurkar et al. 2016) drops all punctuation and articles: there
    "-1.5" is 15, "C++" is C, and "A" is nothing. Here symbols (+ < $ % #) count, and so does
    punctuation before a word or inside it; in a word with a digit only . , : ; ? at the end is
    dropped. 1,234 is 1234, but $5 and 50% are not 5 and 50. A capital A is an article only at the
    beginning: there are vitamins, and choices. What has punctuation alone stays as it is.

    >>> [normalize_answer(text) for text in ("The Eiffel Tower!", "(A)", "-1.5", "?", "C++")]
    ['eiffel tower', 'a', '-1.5', '?', 'c++']
    """
    text = composed(text).translate(_SAME)
    bare = _QUOTED.sub(r"\2", _bare_answer(text))
    bare = _THOUSANDS.sub(lambda number: number[0].replace(",", ""), bare)
    written, kept = bare.split(), []
    words = [_bare_word(word) for word in written]
    for i, (word, following) in enumerate(zip(words, [*words[1:], ""])):
        is_article = written[i] in _ARTICLES and (word != "A" or i == 0)
        if not (is_article and len(following) > 1 and following[0].isalpha()):
            kept.append(word)
    normal = " ".join(filter(None, kept)) or " ".join(text.split())
    return normal.casefold()


def exact_match(hypothesis: str, reference: str) -> float:
    """1 where the two answers are equal once they are normalised, else 0. No answer equals ""."""
    answer = normalize_answer(hypothesis)
    return float(answer != "" and answer == normalize_answer(reference))


def numeric(hypothesis: str, reference: str) -> float:
    """1 where the last numbers of both texts are equal, as fractions; else 0. 50% is 50 here."""
    wanted = last_number(reference)
    return float(wanted is not None and last_number(hypothesis) == wanted)


# ------------------------------------------------------------------ the final answer of a text

_BOX = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])\s*")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_GSM8K = re.compile(r"(?<!#)####(?!#)(.*)")
_SAYS = re.compile(r"\banswers?[*_]*(?:\s+(?:is|are)\b|\s*[:：])[*_:：\s]*", re.IGNORECASE)
_END_OF_SENTENCE = re.compile(
    r"(?<!\bDr)(?<!\bMr)(?<!\bMrs)(?<!\bSt)\.(?=[*_$]*(?:\s|$))"
    r"|(?<![0-9])[!?](?=[*_]*(?:\s|$))|[\n。।]|,?\s(?:because|since)\s"
)
_END_TOKENS = re.compile(r"(?:\s*(?:<\|[^<>|]{1,30}\|>|</s>))+$")  # that a response may hold
_IS_NUMBER = re.compile(r"\s*[*_]*[-+−(\\$€£]*\s*[0-9.\\]")


def after_thinking(text: str) -> str | None:
    """What stands behind the last </think>; None where a <think> is never closed."""
    rest = text.rpartition("</think>")[2]
    return None if "<think>" in rest else rest


def final_answer(text: str) -> str | None:
    r"""The answer that a text marks as its last; None where it marks none.

    That is what the last \boxed or \fbox holds; else what follows the last `####` in its line
    (GSM8K), where that is a number or ends the text: else it is a heading of Markdown; else what
    follows the last "answer is" or "answer:", up to the end of the sentence.
    Where there is <answer>...</answer>, only the last one is looked at, and without a mark in it
    all of it is the answer. What stands in <think>...</think> does not count. An empty or
    unfinished last \boxed is no answer, whatever stands before it.

    >>> final_answer("So x is 4. The answer is **42**. Good!"), final_answer("x is 4")
    ('42', None)
    """
    text = after_thinking(text)
    if text is None:
        return None
    text = _END_TOKENS.sub("", text)
    before, closed, _ = text.rpartition("</answer>")
    opened = ""
    if closed:
        _, opened, text = before.rpartition("<answer>")
    boxes, said = list(_BOX.finditer(text)), list(_SAYS.finditer(text))
    last_line = text.rstrip().rpartition("\n")[2]
    lines = [line for line in _GSM8K.findall(text) if _IS_NUMBER.match(line) or line in last_line]
    if boxes:
        answer = _in_box(text, boxes[-1].end())
    elif lines and not _SAYS.search(lines[-1]):
        answer = lines[-1]
    elif said:
        answer = _END_OF_SENTENCE.split(text[said[-1].end() :], maxsplit=1)[0]
        answer = re.sub(r"\*\*(?=\s|$)", "", answer)  # the answer is **42** apples
        if answer.endswith((")", "]")) and not re.search(r"[(\[]", answer):
            answer = answer[:-1]  # (The answer is 42)
    else:
        answer = text if opened else ""
    return answer.strip().strip("*_").strip() or None


def _in_box(text: str, start: int) -> str:
    """What stands in the braces that open at `start`, or the word there; "" if they never close."""
    if text[start : start + 1] != "{":
        return re.split(r"[\s$]", text[start:], maxsplit=1)[0].rstrip(".,;")
    depth = 0
    for brace in _BRACE.finditer(text, start):
        if brace[0] == "{":
            depth += 1
        elif brace[0] == "}":
            depth -= 1
        if depth == 0:
            return text[start + 1 : brace.start()]
    return ""


# ------------------------------------------------------------------ equal in value

_TEXT = re.compile(r"\\(?:text|textrm|textbf|textit|mathrm|mathbf|mbox)\s?\{([^{}]*)\}")
# \text{ cm}^2 at the end of a value: its letters, its power
_UNIT = re.compile(
    r"(?<=.)\\(?:text|textrm|mathrm|mbox)\s?\{([^{}0-9]*)\}(\^\{?[0-9]\}?)?"
    r"(?=\s*(?:$|[,)\]}.$]|\\[)\]]))"
)
_NUMBER_AND_UNIT = re.compile(r"(.*[0-9}%]) ?([^\W\d_]{2}[^\d\\^*/=<>+|()\[\]{}]*)")
_UNITS = set(
    """cm mm km in ft yd mi kg mg lb lbs oz ml hr hrs min sec ms mph kph sq cu day pm am per a
    of""".split()
)
# Behind a number these are no unit: they change it, or say something else.
_NO_UNIT = set(
    """zero three four five seven eight nine eleven twelve point half halves third thirds quarter
    quarters fourth fourths fifth fifths sixth sixths seventh sevenths eighth eighths ninth ninths
    tenth tenths tens dozen dozens hundred hundreds hundredths thousand thousands thousandths lakh
    crore million millions billion billions trillion trillions mille percent factorial squared cubed
    times minus plus divided over choose modulo remainder less more than fewer least most between
    below above under negative positive unless except either wrong even from mehr oder sinh cosh
    tanh sqrt cbrt floor ceil theta alpha beta gamma delta sigma omega lambda""".split()
)
_CURRENCY = re.compile(r"\\\$|[¢£¤¥€₠-₿]")
_MONEY = {"dollar": "$", "dollars": "$", "usd": "$", "euro": "€", "euros": "€"}
_MONEY |= {"cent": "¢", "cents": "¢"}
_CHOICE = re.compile(
    r"(?:(?:option|choice)\s+)?(?:\(([A-J])\)|([A-J])[).:])(?:\s.*)?|(?:option|choice)\s+([A-J])",
    re.DOTALL,
)


def same_answer(answer: str, target: str) -> bool:
    """Whether two final answers are equal: as texts (`exact_match`), or in value.

    Values are compared exactly: 0.5 is 1/2, and 0.333 is not 1/3. Formulas are calculated, so 2 + 3
    is 5: a question that is a formula is its own answer. 50% is 0.5 and also 50, because questions
    ask for both. (1, 2) and 1, 2 are compared in order, {1, 2} in any. x = 5 is 5. A unit or a
    currency counts where both answers have one. "(B) Paris" is the choice B.
    """
    mine, theirs = _TEXT.sub(r"\1", answer).strip(), _TEXT.sub(r"\1", target).strip()
    if exact_match(mine, theirs):
        return True
    if _is_choice(mine, theirs) or _is_choice(theirs, mine):
        return True
    (mine, *my_units), (theirs, *their_units) = _value_and_units(answer), _value_and_units(target)
    if _differ(my_units, their_units):
        return False
    if not mine or not theirs:
        return False
    readings = _readings(mine, theirs)
    for (my_name, my_value), (their_name, their_value) in readings:
        is_one_name = my_name == their_name or not my_name or not their_name
        if my_value == their_value and is_one_name:
            return True
    is_one_text = mine.replace(", ", ",") == theirs.replace(", ", ",")
    return not readings and (is_one_text or math_verify_says(answer, target))


def _is_choice(answer: str, letter: str) -> bool:
    """Whether an answer such as "(B) Paris" is the choice that a letter alone names."""
    choice = _CHOICE.fullmatch(answer)
    return choice is not None and _bare_answer(letter) in (choice[1], choice[2], choice[3])


def _value_and_units(text: str) -> tuple[str, str, str]:
    r"""An answer in plain LaTeX without its unit, then its currency and its unit: of $18 a day."""
    text = re.sub(r"(?<!\.)\.$", "", text.strip().strip("*_").strip())
    if len(text) > formulas.LONGEST:
        return text, "", ""
    sign = _CURRENCY.search(text)
    currency = "$" if text.replace("\\$", "").count("$") % 2 else ""  # an even number is LaTeX's
    currency = sign[0][-1] if sign else currency
    found = _UNIT.findall(text)
    words, power = " ".join(letters for letters, _ in found), "".join(power for _, power in found)
    if _is_unit(words):
        text = _UNIT.sub(" ", text)
    else:
        words = ""
    value = formulas.plain_latex(_TEXT.sub(r"\1", text))
    value = re.sub(r"(?<=[0-9]) percent$", "%", value)
    match = _NUMBER_AND_UNIT.fullmatch(value)
    if match and _is_unit(match[2]) and formulas.read(match[1]):
        value, words = match[1], f"{words} {match[2]}"
    words = [word.strip(".,").casefold() for word in words.split()]
    currency = next((_MONEY[word] for word in words if word in _MONEY), currency)
    unit = "".join(word for word in words if word not in _MONEY)
    return value, currency, "".join(filter(str.isalnum, unit + power))


def _differ(units: Iterable[str], others: Iterable[str]) -> bool:
    """Whether two answers have another currency or another unit, where both have one."""
    return any(one and other and one != other for one, other in zip(units, others))


def _is_unit(text: str) -> bool:
    """Whether these words behind a number say of what it is, as in "5 green apples"."""
    words = [word.strip(".,").casefold() for word in text.split()]
    return 0 < len(words) <= 4 and all(
        word in _UNITS or (len(word) > 3 and word not in _NO_UNIT) for word in words
    )


def _readings(mine: str, theirs: str) -> list[tuple]:
    """The pairs of values to compare; none where one of the answers is not read.

    Of 50% and 50 both 1/2 and 50 are compared.
    """
    pairs = [(mine, theirs)]
    if mine.endswith("%") != theirs.endswith("%"):
        pairs.append((mine.rstrip("%"), theirs.rstrip("%")))
    read = [(formulas.read(one), formulas.read(other)) for one, other in pairs]
    return [(one, other) for one, other in read if one and other]


@functools.cache
def _math_verify():
    """The optional package math-verify, or None."""
    try:
        import math_verify
    except ImportError:
        return None
    return math_verify


def math_verify_says(answer: str, target: str) -> bool:
    """Whether math-verify, where it is installed, finds two formulas equal; else False.

    It is asked about short texts without words only: it takes "tea" and "eat" for one product.
    """
    package, both = _math_verify(), f"{answer} {target}"
    has_word = re.search(r"(?<![\\a-zA-Z])[^\W\d_]{2}", both)
    if package is None or has_word or len(both) > formulas.LONGEST:
        return False
    # Its time limit is a signal, which only the main thread may set. Its other reader uses eval.
    seconds = 5 if threading.current_thread() is threading.main_thread() else None
    reader = {"extraction_config": [package.LatexExtractionConfig()], "parsing_timeout": seconds}
    gold = package.parse(f"${target.replace('$', '')}$", **reader)
    found = package.parse(f"${answer.replace('$', '')}$", **reader)
    return bool(gold and found and package.verify(gold, found, timeout_seconds=seconds))


def boxed(hypothesis: str, reference: str) -> float:
    """1 where the completion marks a final answer that equals the reference's, else 0.

    The reference may mark its answer too, as a solution of GSM8K or MATH does.
    """
    answer = final_answer(hypothesis)
    return float(answer is not None and same_answer(answer, final_answer(reference) or reference))


def math_equal(hypothesis: str, reference: str) -> float:
    """1 where the final answers are mathematically equal, else 0.

    A completion that marks no answer is compared as a whole; failing that, where the reference is a
    number, the last number of the completion counts, as in `numeric`.
    """
    answer, target = final_answer(hypothesis), final_answer(reference) or reference
    if answer is not None:
        return float(same_answer(answer, target))
    rest = after_thinking(hypothesis)
    if rest is None or _BOX.search(rest):  # still thinking; or a box without an answer
        return 0.0
    if same_answer(rest, target):
        return 1.0
    wanted, *units = _value_and_units(target)
    if _differ(units, _value_and_units(rest)[1:]):
        return 0.0
    value = formulas.read(wanted.rstrip("%"))
    number = formulas.number_of(value[1]) if value else None
    return float(number is not None and last_number(rest) == number)


# ------------------------------------------------------------------ shape and length

# One block of thoughts, then the answer, without another block.
THOUGHTS = r"<think>(?:(?!</?think>).)*</think>(?:(?!</?think>).)*"


def format_reward(context: dict, pattern: str = THOUGHTS) -> Callable:
    """1 where the whole completion, without outer white space, has the shape `pattern`; else 0.

    A regular expression of Python; its dot matches line ends too. Python sets no time limit: one
    with a repeat inside a repeat, such as (a+)+, may run for ever on some completions.
    """
    try:
        shape = re.compile(pattern, re.DOTALL)
    except (re.error, TypeError, OverflowError, RecursionError) as problem:
        message = f"format({pattern!r}): expected a regular expression of Python: {problem}"
        raise UserError(message) from None
    return completion_reward(lambda text: float(shape.fullmatch(text.strip()) is not None))


def overlong_penalty(length: float, soft: float, hard: float) -> float:
    """0 up to `soft`, -1 above `hard`, a straight line between (DAPO, 2503.14476, equation 13).

    There `hard` is L_max and `soft` is L_max - L_cache.

    >>> [overlong_penalty(n, soft=80, hard=100) for n in (80, 85, 100, 101)]
    [0.0, -0.25, -1.0, -1.0]
    """
    if length <= soft:
        return 0.0
    return -1.0 if length >= hard else (soft - length) / (hard - soft)


def overlong_reward(context: dict, soft: float, hard: float) -> Callable:
    """The soft overlong punishment, in tokens of the run's tokenizer; in words without one."""
    check_above_0("overlong", "soft", soft)
    check_above_0("overlong", "hard", hard)
    if soft > hard:
        raise UserError(f"overlong(soft={soft}, hard={hard}): expected soft <= hard")
    tokenizer = context.get("tokenizer")
    if tokenizer is None:
        parallel.note("overlong counts words here, for want of a tokenizer; a run counts tokens")

    def penalty(text: str) -> float:
        if tokenizer is None:
            return overlong_penalty(len(text.split()), soft, hard)
        ids = tokenizer.encode(text, add_special_tokens=False, verbose=False)
        return overlong_penalty(len(ids), soft, hard)

    return completion_reward(penalty)


def has_number(text: str) -> bool:
    return last_number(text) is not None


# name -> (make(context, **arguments) -> reward function, "range, needs: meaning")
ANSWERS: dict[str, tuple[Callable, str]] = {
    "exact_match": (
        best_of(exact_match, "exact_match"),
        "0 or 1, target: equal but for case, articles, punctuation around words",
    ),
    "numeric": (
        best_of(numeric, "numeric", has_number),
        "0 or 1, target: the last numbers are equal (GSM8K)",
    ),
    "boxed": (
        best_of(boxed, "boxed"),
        r"0 or 1, target: the final answer is marked (\boxed, ####, answer:) and equal",
    ),
    "math_equal": (
        best_of(math_equal, "math_equal"),
        "0 or 1, target: the final answers are equal in value: 1/2, 0.5, 50%",
    ),
    "format": (
        format_reward,
        '0 or 1, nothing or format("regex"): all of the text has that shape, <think>...</think>...',
    ),
    "overlong": (
        overlong_reward,
        "-1..0, soft= and hard=: 0 up to soft tokens, falls to -1 at hard (DAPO)",
    ),
}
