"""Numbers and short formulas in a text, read exactly: as fractions, never as floats.

`last_number` finds the last number of any text; `read` understands a whole answer, such as `0.5`,
`\\frac{1}{2}`, `50%`, `(1, 2)` or `x = 2\\pi`, so that answers can be compared by their value. Both
read what is written with their own rules: no text is evaluated as code.
Left out on purpose: functions (sin, log), inequalities, matrices, units (they are compared as
letters, in answers.py), and numbers in words. What is too large to be calculated is not read.

    python -c "import formulas; print(formulas.last_number(r'3 of 9, so $-\\frac{1}{3}$'))"  # -1/3
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction

from words import DASHES, composed

LIMIT = 1000  # digits of a number that is read; a larger one could take hours, or all the memory
LONGEST = 300  # characters of a formula that is read

# ------------------------------------------------------------------ one way to write digits

_VULGAR = re.compile("(?P<digit>[0-9]?)(?P<fraction>[¼-¾⅐-⅞])")  # 2½ is 2 1/2
_SUPERSCRIPT = re.compile("[⁺⁻]?[⁰¹²³⁴-⁹]+")
_OTHER_DIGIT = re.compile(r"(?![0-9])\d")  # of Arabic, Devanagari, Thai, ...
_SAME = str.maketrans(DASHES | {"⁄": "/", "∕": "/"})
_SAME |= str.maketrans("٫٬٪", ".,%")


def plain(text: str) -> str:
    """The text with digits 0 to 9 for those of all scripts, and one minus, slash and power.

    >>> plain("−２½ × 10³")
    '-2 1/2 × 10^{3}'
    """
    if text.isascii():
        return text
    text = _OTHER_DIGIT.sub(lambda digit: str(unicodedata.decimal(digit[0])), composed(text))
    text = _VULGAR.sub(_spelled_out, text)
    text = _SUPERSCRIPT.sub(lambda run: f"^{{{unicodedata.normalize('NFKC', run[0])}}}", text)
    return text.translate(_SAME)


def _spelled_out(match: re.Match) -> str:
    space = " " if match["digit"] else ""
    return match["digit"] + space + unicodedata.normalize("NFKC", match["fraction"])


# ------------------------------------------------------------------ numbers in a text

# Thousands: 1,234 1{,}234 1,\!234 1\,234 1'234, no-break and thin spaces; 12,34,567 (India); and
# plain spaces, where no other number stands beside the groups of three.
_INTEGER = r"""(?:
    [0-9]{1,3} (?: (?: ,(?:\\!)? | \{,\} | \\[,;:!\ ] | ['’\u00a0\u2007\u2009\u202f] ) [0-9]{3} )+
        (?![0-9])
    | [0-9]{1,2} (?: ,[0-9]{2} ){1,9} ,[0-9]{3} (?![0-9])
    | (?<![0-9]\ ) [0-9]{1,3} (?: \ [0-9]{3} )+ (?!\ ?[0-9])
    | [0-9]+
)"""
_DECIMAL = rf"(?: {_INTEGER} (?:\.[0-9]+)* | (?<![\w.]) \.[0-9]+ ) (?:[eE][+-]?[0-9]+)?"
_TIMES = r"\s? (?: \\times | \\cdot | [x×·⋅*] ) \s?"
_POWER = r"\s? \^ \s? (?: \{ \s? [+-]?[0-9]+ \s? \} | [+-]?[0-9]+ )"
_TERM = rf"{_DECIMAL} (?: (?:{_TIMES} 10)? {_POWER} )?"  # 2.5, 2^10, 2.5 x 10^3
_NUMBER = rf"""(?=[0-9.\\]) (?:  # the look ahead only makes the search fast
    (?: (?P<whole>{_INTEGER}) \s? )?  # 3\frac{{1}}{{2}} is 3 + 1/2
    \\[dtc]?frac \s? (?: \{{ (?P<above>(?:[^{{}}]|\{{,\}})*) \}} | (?P<above_1>[0-9]) )
    \s? (?: \{{ (?P<below>(?:[^{{}}]|\{{,\}})*) \}} | (?P<below_1>[0-9]) )
    | (?P<mixed>{_INTEGER}) \  (?P<part>[0-9]+) / (?P<of>[0-9]+) (?![0-9/])  # 3 1/2
    | (?P<terms>{_TERM} (?: \ ?/\ ? {_TERM} )*)  # 7/2; a chain such as 2024/05/06 is no number
)"""
NUMBER = re.compile(_NUMBER, re.VERBOSE)
_BEFORE_TEN = re.compile(rf"{_TIMES} 10 $", re.VERBOSE)
_SLASH = re.compile(" ?/ ?")
_CURRENCY = "[$¢£¤¥€₠-₿]"
# What stands before a number: a minus, but not that of 3-5; also -$5 and -US$5, but not the minus
# of $3$-$5$.
_MINUS = re.compile(rf"(?:(?:^|[^\w.])-|(?:^|[^\w.)\]}}$])-[A-Z]{{0,3}}\\?{_CURRENCY} ?)$")
# x_2 and x^{-1} hold no number. `_42_` is one, in italics.
_INSIDE_A_NAME = re.compile(r"(?:[^\W_]_|[)}]_|_\{|\^\{?-?)$")


# Around a number in a date (2024-05-06), a time (10:30), a ratio (2:3)
_DATE_BEFORE = re.compile("[0-9](?::|-[0-9]{1,2}-)$")
_DATE_AFTER = re.compile(":[0-9]|-[0-9]{1,2}-[0-9]")
_DASH_BEFORE, _DASH_AFTER = re.compile("[0-9]-$"), re.compile("-[0-9]")


def _decimal(text: str) -> Fraction | None:
    """The value of `1{,}234.5e3` without a sign; None for 1.2.3, which is no number."""
    digits, _, exponent = re.sub(r"[^0-9.eE+-]", "", text).lower().partition("e")
    if digits.count(".") > 1 or len(digits) > LIMIT:
        return None
    return scaled(Fraction(digits), Fraction(10), exponent) if exponent else Fraction(digits)


def scaled(factor: Fraction, base: Fraction, exponent: str) -> Fraction | None:
    """factor * base ** exponent; None where that is too large, or has no value."""
    if len(exponent) > 5:
        return None
    power = int(exponent)
    bits = max(base.numerator.bit_length(), base.denominator.bit_length())
    if bits * abs(power) > 4 * LIMIT or (base == 0 and power <= 0):
        return None
    return factor * base**power


def _term(text: str) -> Fraction | None:
    """The value of `2.5`, `2^{10}` or `2.5 \\times 10^3`."""
    base, _, exponent = text.partition("^")
    mantissa = _BEFORE_TEN.sub("", base)
    value = _decimal(mantissa)
    exponent = exponent.strip(" {}")
    if value is None or not exponent:
        return value
    if mantissa == base:
        return scaled(Fraction(1), value, exponent)
    return scaled(value, Fraction(10), exponent)


def _ratio(above: Fraction | None, below: Fraction | None) -> Fraction | None:
    return above / below if above is not None and below else None


def _unsigned(match: re.Match) -> Fraction | None:
    """The value of what `NUMBER` found; None where it is no number after all."""
    if match["terms"]:
        above, *below = _SLASH.split(match["terms"], maxsplit=2)
        if len(below) > 1:
            return None
        return _ratio(_term(above), _term(below[0])) if below else _term(above)
    if match["mixed"]:
        whole, value = match["mixed"], _ratio(_term(match["part"]), _term(match["of"]))
    else:
        above = match["above"] or match["above_1"] or ""
        below = match["below"] or match["below_1"] or ""
        whole, value = match["whole"], _ratio(whole_number(above), whole_number(below))
    if whole is None or value is None or not 0 < value < 1:
        return value
    whole = _decimal(whole)
    return None if whole is None else whole + value


def _value_in(text: str, match: re.Match) -> Fraction | None:
    """The same with its sign; None also for a number that belongs to a name: v2, H2O, x_2."""
    before = text[max(0, match.start() - 8) : match.start()]
    after = text[match.end() : match.end() + 5]
    is_between = _DASH_BEFORE.search(before) and _DASH_AFTER.match(after)
    if is_between or _DATE_BEFORE.search(before) or _DATE_AFTER.match(after):
        return None
    letter = before[-1:]
    has_case = letter.lower() != letter.upper()  # Chinese has none, and no spaces: 共42个
    if has_case or _INSIDE_A_NAME.search(before):
        return None
    value = _unsigned(match)
    return -value if value is not None and _MINUS.search(before) else value


def numbers_from_the_end(text: str) -> Iterator[Fraction]:
    """The numbers of a text, the last first. Their values are calculated one at a time."""
    text = plain(text)
    for match in reversed(list(NUMBER.finditer(text))):
        value = _value_in(text, match)
        if value is not None:
            yield value


def last_number(text: str) -> Fraction | None:
    """The last number of a text, exactly; None where there is none.

    Read are signs (-5, -$5), decimals, powers (1e3, 2 x 10^3), fractions (7/2, 3 1/2, 2½,
    \\frac{2}{3}), the digits of all scripts, and thousands: 1,234; 9{,}500; 1'000; 9 500 with a
    space of any kind, if the groups have three digits and no other number stands beside them. A
    comma before other than three digits separates two numbers, as in "1,23". A percent sign is not
    looked at. No numbers are: digits in a name (v2, x_2), exponents of letters, dates and versions
    (2024/05/06, 2024-05-06, 1.2.3), times and ratios (10:30), a division by zero, and what has more
    than 1000 digits.

    >>> last_number("it costs -$1,234.50")
    Fraction(-2469, 2)
    """
    return next(numbers_from_the_end(text), None)


def whole_number(text: str) -> Fraction | None:
    """The value of a text in `plain` digits that is one number and nothing else; None otherwise."""
    text = text.strip()
    is_signed = text.startswith(("-", "+"))
    match = NUMBER.fullmatch(text[1:].strip() if is_signed else text)
    value = _unsigned(match) if match else None
    return -value if value is not None and text.startswith("-") else value


# ------------------------------------------------------------------ formulas

# A sum: {((symbol, power), ...): coefficient}, so that x + 1 and 1 + x are equal. The root of a
# prime number is a symbol too, and its square is the number.
Formula = dict[tuple[tuple[str, int], ...], Fraction]
Value = frozenset | tuple  # the terms of a formula; or a bracket, several values, a bracket


class Unreadable(ValueError):
    """A text is no formula that this file reads."""


def _simplified(powers: dict[str, int]) -> tuple[tuple[tuple[str, int], ...], Fraction]:
    """A product of powers -> its symbols and the number that squares of roots give."""
    factor, left = Fraction(1), []
    for symbol, power in sorted(powers.items()):
        if symbol.startswith("√"):
            factor *= Fraction(int(symbol[1:])) ** (power // 2)
            power %= 2
        if power:
            left.append((symbol, power))
    return tuple(left), factor


def _plus(a: Formula, b: Formula) -> Formula:
    total = {symbols: a.get(symbols, 0) + b.get(symbols, 0) for symbols in a | b}
    total = {symbols: value for symbols, value in total.items() if value}
    bits = [max(abs(v.numerator), v.denominator).bit_length() for v in total.values()]
    if len(total) > 50 or max(bits, default=0) > 8 * LIMIT:
        raise Unreadable("too large")
    return total


def _times(a: Formula, b: Formula) -> Formula:
    total: Formula = {}
    for symbols, value in a.items():
        for others, factor in b.items():
            powers = Counter(dict(symbols))
            powers.update(dict(others))
            product, number = _simplified(powers)
            total = _plus(total, {product: value * factor * number})
    return total


def _to_the(base: Formula, power: int) -> Formula:
    """A power. Only a product has one below 0; a sum of several terms has none above 20."""
    if len(base) == 1:
        [(symbols, value)] = base.items()
        number = scaled(Fraction(1), value, str(power))
        if number is None or abs(power) > LIMIT:
            raise Unreadable("too large")
        product, factor = _simplified({symbol: n * power for symbol, n in symbols})
        return _plus({product: number * factor}, {})
    if not 0 <= power <= 20 or not (base or power):
        raise Unreadable("a power that is not calculated")
    total: Formula = {(): Fraction(1)}
    for _ in range(power):
        total = _times(total, base)
    return total


def _constant(formula: Formula) -> Fraction | None:
    """The number that a formula without symbols is; else None."""
    return formula.get((), Fraction(0)) if not set(formula) - {()} else None


def _root(formula: Formula) -> Formula:
    """The square root of a number of at most six digits: a product of roots of primes."""
    number = _constant(formula)
    if number is None or not 0 <= number.numerator * number.denominator < 10**6:
        raise Unreadable("a root that is not calculated")
    left, prime, powers = number.numerator * number.denominator, 2, Counter()
    while left > 1:
        if prime * prime > left:
            prime = left
        if left % prime:
            prime += 1
            continue
        powers[f"√{prime}"] += 1
        left //= prime
    symbols, factor = _simplified(powers)
    return _plus({symbols: factor / number.denominator}, {}) if number else {}


_GREEK = """alpha beta gamma delta epsilon varepsilon zeta eta theta kappa lambda mu nu xi pi rho
sigma tau phi varphi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi
Omega infty""".split()
_TOKEN = re.compile(
    rf"""\s* (?: (?P<number>(?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)
    | (?P<greek>\\(?:{"|".join(sorted(_GREEK, key=len, reverse=True))})(?![a-zA-Z]))
    | (?P<letter>[^\W\d_](?:_(?:\w|\{{\w+\}}))?(?![^\W\d_]))
    | (?P<other>\\frac(?![a-zA-Z])|\\sqrt(?![a-zA-Z])|[-+*/^(){{}}%]) )""",
    re.VERBOSE,
)


class _Reader:
    """Reads a formula from left to right. Its methods raise Unreadable."""

    def __init__(self, text: str):
        self.tokens: list[tuple[str | None, str]] = []
        self.depth = 0
        end, text = 0, text.rstrip()
        while end < len(text):
            match = _TOKEN.match(text, end)
            if match is None:
                raise Unreadable(text[end:])
            self.tokens.append((match.lastgroup, match[match.lastgroup]))
            end = match.end()

    @property
    def next(self) -> tuple[str | None, str]:
        return self.tokens[0] if self.tokens else (None, "")

    def take(self, *wanted: str) -> str | None:
        """The next token, where it is one of those that are wanted; else None."""
        return self.tokens.pop(0)[1] if self.next[1] in wanted and self.tokens else None

    def expect(self, wanted: str) -> None:
        if not self.take(wanted):
            raise Unreadable(f"no {wanted}")

    def whole(self) -> Formula:
        value = self.sum()
        if self.tokens:
            raise Unreadable(self.next[1])
        return value

    def sum(self) -> Formula:
        self.depth += 1
        if self.depth > 20:
            raise Unreadable("too deep")
        total: Formula = {}
        sign = self.take("+", "-") or "+"
        while sign:
            total = _plus(total, _times(self.product(), {(): Fraction(f"{sign}1")}))
            sign = self.take("+", "-")
        self.depth -= 1
        return total

    def product(self) -> Formula:
        kind, divided = self.next[0], False
        value = self.power()
        while True:
            operator = self.take("*", "/")
            before, (kind, following) = kind, self.next
            is_mixed = self.next[0] == "number" and self.tokens[1:2] == [("other", "\\frac")]
            if operator == "/" and is_mixed:
                raise Unreadable("an unclear denominator")  # 1/2\frac12
            if operator == "/":
                value, divided = _times(value, _to_the(self.power(), -1)), True
            elif operator:
                value = _times(value, self.power())
            elif kind in ("letter", "greek") or following in ("(", "\\frac", "\\sqrt"):
                # Nobody knows what 1/2x is, f(2) is no product, and "ab" may be a word.
                if divided or (before == "letter" and (kind == "letter" or following == "(")):
                    raise Unreadable("an unclear product")
                value = _times(value, self.power())
            else:
                return value

    def power(self) -> Formula:
        if self.take("-"):
            return _times(self.power(), {(): Fraction(-1)})
        value = self.base()
        if self.take("%"):
            value = _times(value, {(): Fraction(1, 100)})
        if self.take("^"):
            sign = self.take("-")
            exponent = _constant(self.base())
            if exponent is None or exponent.denominator > 1:
                raise Unreadable("an exponent that is no whole number")
            value = _to_the(value, -int(exponent) if sign else int(exponent))
        return value

    def base(self) -> Formula:
        if not self.tokens:
            raise Unreadable("an end")
        kind, token = self.tokens.pop(0)
        if kind == "number":
            value = _of_number(_decimal(token))
            if self.next[1] != "\\frac":
                return value
            part = self.base()  # 3\frac{1}{2} is 3 + 1/2; 3\frac{x}{2} is a product
            number = _constant(part)
            return _times(value, part) if number is None else _plus(value, part)
        if kind in ("letter", "greek"):
            return {((re.sub("[{}]", "", token), 1),): Fraction(1)}
        if token in ("(", "{"):
            value = self.sum()
            self.expect(")" if token == "(" else "}")
            return value
        if token == "\\frac":
            above = self.argument()
            return _times(above, _to_the(self.argument(), -1))
        if token == "\\sqrt":
            return _root(self.argument())  # of \sqrt16 LaTeX takes the 1
        raise Unreadable(token)

    def argument(self) -> Formula:
        """What LaTeX takes for an argument: braces, or one digit of 12, or a letter."""
        kind, token = self.next
        if kind == "number" and token.isdigit():
            self.tokens[0] = kind, token[1:]
            if not token[1:]:
                del self.tokens[0]
            return _of_number(Fraction(token[0]))
        return self.base()


def _of_number(value: Fraction | None) -> Formula:
    if value is None:
        raise Unreadable("no number")
    return {(): value} if value else {}


# ------------------------------------------------------------------ answers that are formulas

_LATEX = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
        (r"\\(?:left|right|[bB]igg?[lr]?|displaystyle)(?![a-zA-Z])", ""),
        (r"\^ ?(?:\{ ?\\circ ?\}|\\circ(?![a-zA-Z]))|\\degree(?![a-zA-Z])|°", ""),
        (rf"\\[\[\]()]|\\?{_CURRENCY}", ""),
        (r"\\!", ""),
        (r"\\[,;: ]|~|\\q?quad(?![a-zA-Z])|\s+", " "),
        (r"\\(?:cdot|times|ast)(?![a-zA-Z])|[×·⋅]|(?<=[0-9]) x (?=[0-9])", "*"),
        (r"\\div(?![a-zA-Z])|÷", "/"),
        (r"\\([{}%])", r"\1"),
        (r"\*\*", "^"),
        ("π", r"\\pi "),
        (r"√ ?([0-9]+)", r"\\sqrt{\1}"),
        ("√", r"\\sqrt "),
        ("∞", r"\\infty "),
        (r"(?<![\w,]) +| +(?!\w)", ""),  # 1, 234 are two numbers
    )
]


def plain_latex(text: str) -> str:
    """The text without what LaTeX only says about looks: $, \\left, \\dfrac, spaces, degrees."""
    text = plain(text)
    for pattern, replacement in _LATEX:
        text = pattern.sub(replacement, text)
    return text.strip()


def _parts(text: str) -> list[str]:
    """Split at the commas that stand in no bracket."""
    parts, depth = [""], 0
    for char in text:
        if char in "([{":
            depth += 1
        if char in ")]}":
            depth -= 1
        if depth < 0:
            raise Unreadable("brackets")
        if char == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += char
    return [part.strip() for part in parts]


def _value(text: str) -> Value:
    """The terms of a number or formula; of several with commas, the brackets and each value."""
    number = whole_number(text)
    if number is not None:
        return frozenset(_of_number(number).items())
    if "," in text and text[0] in "([{" and text[-1] in ")]}":
        try:
            parts = _parts(text[1:-1])
        except Unreadable:
            parts = []  # such as (1, 2), (3, 4)
        if len(parts) > 1:
            values = [_value(part) for part in parts]
            return ("{", frozenset(values)) if text[0] == "{" else (text[0], *values, text[-1])
    parts = _parts(text) if "," in text else []
    if len(parts) > 1:
        return ("", *(_value(part) for part in parts), "")
    return frozenset(_Reader(text).whole().items())


_NAME = re.compile(r"\\?[^\W\d_]+(?:_(?:\w|\{\w+\}))?(?:\([^\W\d_]\))?")


def read(text: str) -> tuple[str, Value] | None:
    """The name and the exact value of an answer in `plain_latex`: "x = 1/2" -> ("x", 1/2).

    The name is "" where there is none. Equal values compare equal. None: the answer is none that
    this file reads. 3 + 4 = 7 has the value 7; 3 + 4 = 8 has none.
    """
    if len(text) > LONGEST:
        return None
    name, *sides = text.split("=")
    if not sides or not _NAME.fullmatch(name.strip()) or name.strip() == "\\not":
        name, sides = "", text.split("=")
    try:
        values = [_value(side.strip()) for side in sides]
    except Unreadable:
        return None
    is_equation = any(value != values[0] for value in values)
    return None if is_equation else (name.strip(), values[0])


def number_of(value: Value) -> Fraction | None:
    """The number that a value from `read` is; None for a formula with symbols, a tuple, a set."""
    return _constant(dict(value)) if isinstance(value, frozenset) else None
