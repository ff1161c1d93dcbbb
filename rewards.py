"""Rewards: text in, one float per completion out, higher is better.

A reward is any callable  f(prompts, completions, **columns) -> list[float]; every column of the data arrives as a keyword
list, the reference text as `target` (the convention of TRL's GRPO reward functions, so existing ones run unchanged).
`--reward` takes an expression over the names at the end of this file, read with `ast` and never evaluated as Python:

    rouge_l                                 0.7*rouge_l + 0.3*bleu - 0.1*length(target=40)
    sentiment(lexicon="vader.txt")          my_rewards.py:politeness

The metrics are written out by hand and equal the reference implementations (sacrebleu; Google's rouge_score without stemming)
to 1e-9. Left out on purpose: stemming, rewards that need a second model of their own, anything that looks at token ids.

    python rewards.py "0.7*rouge_l + 0.3*bleu" "the cat sat" "the cat sat down"      # completion, target
"""

import ast
import importlib.util
import inspect
import math
import numbers
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch

from engine import UserError

# ------------------------------------------------------------------------------------------------ BLEU


def tokenize_13a(text: str) -> list[str]:
    """The `mteval-v13a` tokeniser, sacrebleu's default: split punctuation off, but not inside numbers."""
    text = text.rstrip().replace("<skipped>", "").replace("-\n", "").replace("\n", " ")
    for entity, char in (("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">")):
        text = text.replace(entity, char)
    text = f" {text} "
    text = re.sub(r"([{-~\[-` -&(-+:-@/])", r" \1 ", text)  # ASCII punctuation but , - . and '
    text = re.sub(r"([^0-9])([.,])", r"\1 \2 ", text)  # . and , unless a digit stands before ...
    text = re.sub(r"([.,])([^0-9])", r" \1 \2", text)  # ... or after
    text = re.sub(r"([0-9])(-)", r"\1 \2 ", text)  # a dash after a digit
    return text.split()


def _ngrams(tokens: list[str], max_order: int) -> Counter:
    return Counter(tuple(tokens[i : i + n]) for n in range(1, max_order + 1) for i in range(len(tokens) - n + 1))


def _bleu_counts(hypothesis: str, references: list[str], max_order: int) -> tuple[list[int], list[int], int, int]:
    """(matches per order, n-grams per order, hypothesis length, length of the closest reference) of one sentence."""
    tokens, reference_tokens = tokenize_13a(hypothesis), [tokenize_13a(reference) for reference in references]
    most = Counter()  # how often each n-gram may count: its maximum over the references ("clipping")
    for reference in reference_tokens:
        most |= _ngrams(reference, max_order)
    matches = [0] * max_order
    for ngram, count in _ngrams(tokens, max_order).items():
        matches[len(ngram) - 1] += min(count, most[ngram])
    totals = [max(len(tokens) - n, 0) for n in range(max_order)]
    closest = min((len(reference) for reference in reference_tokens), key=lambda n: (abs(n - len(tokens)), n))  # ties: the shorter
    return matches, totals, len(tokens), closest


def _bleu_score(matches: list[int], totals: list[int], length: int, reference_length: int, effective_order: bool) -> float:
    """Papineni et al. 2002, section 2.3: brevity penalty times the geometric mean of the n-gram precisions.

    An order without a match gets 1 / (2^k n-grams) instead of 0, k counting such orders ("exp" smoothing of mteval-v13a).
    `effective_order` leaves out the orders that the hypothesis is too short to have.
    """
    if not any(matches):
        return 0.0
    log_precisions, halvings = [], 0
    for match, total in zip(matches, totals):
        if total == 0:
            break
        if match == 0:
            halvings += 1
        log_precisions.append(math.log(match / total if match else 1 / (2**halvings * total)))
    if len(log_precisions) < len(matches) and not effective_order:
        return 0.0
    brevity_penalty = min(1.0, math.exp(1 - reference_length / length))
    return brevity_penalty * math.exp(sum(log_precisions) / len(log_precisions))


def bleu(hypothesis: str, references: list[str], max_order: int = 4) -> float:
    """Sentence BLEU in 0..1; equals sacrebleu's `sentence_bleu(...) / 100` (13a tokens, exp smoothing, effective order).

    >>> round(bleu("the cat sat on the mat", ["the cat sat on a mat"]), 4)
    0.5373
    """
    return _bleu_score(*_bleu_counts(hypothesis, _as_list(references), max_order), effective_order=True)


def corpus_bleu(hypotheses: list[str], references: list[list[str]], max_order: int = 4) -> float:
    """Corpus BLEU in 0..1: counts are summed before dividing, so it is no mean of sentence scores.

    `references` holds one list of strings per hypothesis. Equals sacrebleu's `corpus_bleu(...) / 100` with its defaults.
    """
    counts = [_bleu_counts(hyp, _as_list(refs), max_order) for hyp, refs in zip(hypotheses, references, strict=True)]
    matches, totals = ([sum(column) for column in zip(*(c[k] for c in counts))] for k in (0, 1))
    return _bleu_score(matches, totals, sum(c[2] for c in counts), sum(c[3] for c in counts), effective_order=False)


def _as_list(references: str | list[str]) -> list[str]:
    return [references] if isinstance(references, str) else list(references)


# ------------------------------------------------------------------------------------------------ ROUGE


class Score(NamedTuple):
    """Each 0..1. f1 is the harmonic mean of precision (over the hypothesis) and recall (over the reference)."""

    precision: float
    recall: float
    f1: float


def tokenize_rouge(text: str) -> list[str]:
    """Lower-case runs of a-z and 0-9, as rouge_score does without a stemmer: everything else, accents too, separates."""
    return re.findall(r"[a-z0-9]+", text.lower())


def _score(matches: int, hypothesis_size: int, reference_size: int) -> Score:
    precision, recall = matches / max(hypothesis_size, 1), matches / max(reference_size, 1)
    return Score(precision, recall, 2 * precision * recall / (precision + recall) if matches else 0.0)


def rouge_n(hypothesis: str, reference: str, n: int) -> Score:
    """Overlap of n-grams (Lin 2004, section 2); each n-gram counts at most as often as the other side has it.

    >>> rouge_n("testing one", "testing one two", 2)
    Score(precision=1.0, recall=0.5, f1=0.6666666666666666)
    """
    ours, theirs = ([*zip(*(tokens[i:] for i in range(n)))] for tokens in (tokenize_rouge(hypothesis), tokenize_rouge(reference)))
    return _score((Counter(ours) & Counter(theirs)).total(), len(ours), len(theirs))


def rouge_l(hypothesis: str, reference: str) -> Score:
    """Longest common subsequence of the two token lists (Lin 2004, section 3.1)."""
    ours, theirs = tokenize_rouge(hypothesis), tokenize_rouge(reference)
    return _score(_lcs_length(ours, theirs), len(ours), len(theirs))


def rouge_lsum(hypothesis: str, reference: str) -> Score:
    """Summary-level ROUGE-L (Lin 2004, section 3.2): sentences are lines; a reference sentence is covered by the UNION of its
    common subsequences with all hypothesis sentences, and no token is counted more often than either side has it."""
    ours, theirs = ([tokenize_rouge(line) for line in text.split("\n") if line] for text in (hypothesis, reference))
    left, right = (Counter(token for line in lines for token in line) for lines in (ours, theirs))
    sizes = left.total(), right.total()
    hits = 0
    for line in theirs:
        covered = set().union(*(_lcs_positions(line, other) for other in ours))
        for token in (line[i] for i in sorted(covered)):
            if left[token] > 0 and right[token] > 0:
                hits += 1
                left[token] -= 1
                right[token] -= 1
    return _score(hits, *sizes)


def _lcs_length(a: list[str], b: list[str]) -> int:
    """Length of the longest common subsequence, one table row in one big integer (Hyyro 2004; Crochemore et al. 2001).

    Bit i of `row` is 0 where the table grows by one at a[i]; an addition carries the growth along the row. Twenty times
    faster than the table for sentences, and ROUGE-L is computed once per sampled response.
    """
    where: dict[str, int] = {}
    for i, token in enumerate(a):
        where[token] = where.get(token, 0) | 1 << i
    full = (1 << len(a)) - 1
    row = full
    for token in b:
        match = row & where.get(token, 0)
        row = (row + match | row - match) & full
    return len(a) - row.bit_count()


def _lcs_positions(a: list[str], b: list[str]) -> set[int]:
    """Positions in a of one longest common subsequence: the one that walking back from the end finds, as ROUGE-1.5.5 does."""
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, token in enumerate(a):
        for j, other in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if token == other else max(table[i][j + 1], table[i + 1][j])
    positions, i, j = set(), len(a), len(b)
    while i and j:
        if a[i - 1] == b[j - 1]:
            positions.add(i - 1)
            i, j = i - 1, j - 1
        elif table[i][j - 1] > table[i - 1][j]:
            j -= 1
        else:
            i -= 1
    return positions


# ------------------------------------------------------------------------------------------------ perplexity, cosine, words


@torch.no_grad()
def perplexity(model, tokenizer, texts: list[str], contexts: list[str] | None = None, batch_size: int = 16) -> list[float]:
    """exp(mean negative log-likelihood per token) of each text, given its context if there are contexts.

    `model` is a Hugging Face causal LM, used as it stands. Context and text are tokenised apart; without a context the text
    follows BOS (EOS where there is none). A text without tokens has no perplexity: it gets infinity, never a good score.
    """
    device = next(model.parameters()).device
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    rows = []
    for text, context in zip(texts, contexts or [""] * len(texts), strict=True):
        context_ids = tokenizer(context).input_ids if context else []
        rows.append((context_ids or [start], tokenizer(text, add_special_tokens=False).input_ids))
    result = []
    for begin in range(0, len(rows), batch_size):
        part = rows[begin : begin + batch_size]
        width = max(len(context) + len(ids) for context, ids in part)
        input_ids = torch.tensor([c + t + [start] * (width - len(c) - len(t)) for c, t in part], device=device)  # (b, T)
        column = torch.arange(width)[None]  # (1, T)
        n_context, n_all = torch.tensor([[len(c), len(c) + len(t)] for c, t in part]).T[:, :, None]  # (b, 1) each
        attention_mask = (column < n_all).to(device)  # (b, T)
        scored = ((column >= n_context) & (column < n_all)).to(device)[:, 1:]  # (b, T-1) text tokens, by their own column
        logits = model(input_ids=input_ids, attention_mask=attention_mask.long()).logits[:, :-1].float()  # (b, T-1, V)
        logprobs = torch.log_softmax(logits, dim=-1).gather(2, input_ids[:, 1:, None]).squeeze(2)  # (b, T-1)
        for row, mask in zip(logprobs, scored):
            result.append(math.exp(min(-float(row[mask].mean()), 700.0)) if mask.any() else math.inf)
    return result


def cosine(a: str, b: str) -> float:
    """Cosine of the term-frequency vectors of two texts (lower-cased words, order ignored), 0..1; 0 when either has no word.

    >>> round(cosine("good good plot", "good plot plot"), 4)
    0.8
    """
    left, right = (Counter(re.findall(r"\w+", text.lower())) for text in (a, b))
    dot = sum(count * right[word] for word, count in left.items())
    norm = math.sqrt(sum(c * c for c in left.values()) * sum(c * c for c in right.values()))
    return dot / norm if dot else 0.0


POSITIVE_WORDS = """amazing awesome beautiful beloved best bright brilliant captivating charming clever compelling delightful elegant
engaging enjoy enjoyed enjoyable excellent exciting fantastic fresh friend fun funny gentle glad good gorgeous great gripping happy
heartfelt hilarious hope impressive inspired joy kind laughed lively love loved lovely magic masterful memorable moving nice original
perfect pleasant powerful pretty proud remarkable rich safe satisfying smart smile smiled special stunning superb sweet tender thrilling
touching warm witty wonderful""".split()
NEGATIVE_WORDS = """afraid angry annoying awful bad bland bleak boring broken clumsy confusing cried cruel dead dreadful dreary dull
empty fail failed fake flat forgettable hate hated hollow horrible hurt lame lazy lifeless lost mean mediocre mess messy miserable
painful pathetic pointless poor predictable sad scared scary shallow silly sloppy slow sorry stale stupid terrible tedious tired tiresome
tragic ugly unfunny upset weak worse worst wrong""".split()
DEFAULT_LEXICON = {word: 2.0 for word in POSITIVE_WORDS} | {word: -2.0 for word in NEGATIVE_WORDS}


def read_lexicon(path: str) -> dict[str, float]:
    """Words and valences from a file: `word TAB valence ...` a line (VADER's format). Raises UserError naming the line."""
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as problem:
        raise UserError(f"lexicon {path} cannot be read: {problem}") from None
    lexicon = {}
    for number, line in enumerate(lines, start=1):
        if line.strip():
            word, _, rest = line.partition("\t")
            try:
                lexicon[word.strip().lower()] = float(rest.split("\t")[0])
            except ValueError:
                raise UserError(f"{path}:{number}: expected 'word TAB valence', found {line[:40]!r}") from None
    if not lexicon:
        raise UserError(f"lexicon {path} is empty")
    return lexicon


def lexicon_sentiment(text: str, lexicon: dict[str, float] = DEFAULT_LEXICON) -> float:
    """s / sqrt(s^2 + 15), s the summed valence of the words (the normalisation of VADER, Hutto & Gilbert 2014); -1..1.

    No grammar at all: "not good" is good here. That makes it easy to please, which is what the built-in task is about.

    >>> round(lexicon_sentiment("a brilliant, funny plot and a dull ending"), 4)
    0.4588
    """
    total = sum(lexicon.get(word, 0.0) for word in re.findall(r"[\w'-]+", text.lower()))
    return total / math.sqrt(total * total + 15)


# ------------------------------------------------------------------------------------------------ the names in --reward


def _references(columns: dict, name: str) -> list[list[str]]:
    """One list of reference texts per completion: the column `references` if the data has one, else `target`."""
    for column in ("references", "target"):
        if column in columns:
            return [_as_list(value) for value in columns[column]]
    raise UserError(f"reward '{name}' compares with a reference text, but the data has no target")


def _best(metric: Callable[[str, str], float], name: str) -> Callable:
    """A reward from a metric of (hypothesis, reference): the best over the references, as multi-reference ROUGE is defined."""
    return lambda prompts, completions, **columns: [
        max(metric(completion, reference) for reference in references)
        for completion, references in zip(completions, _references(columns, name), strict=True)
    ]


def _bleu_reward(context, max_order: int = 4):
    return lambda prompts, completions, **columns: [
        bleu(completion, references, max_order) for completion, references in zip(completions, _references(columns, "bleu"), strict=True)
    ]


def _perplexity_reward(context, model: str | None = None):
    if model is not None:
        from hybrid import load_lm  # only this reward needs a model, so only it imports one

        lm, tokenizer = load_lm(model)
    elif "model" in context and "tokenizer" in context:
        lm, tokenizer = context["model"], context["tokenizer"]
    else:
        raise UserError('reward \'perplexity\' needs a model to ask: name one, perplexity(model="gpt2")')
    lm = lm.to(context.get("device", "cpu")).eval()
    return lambda prompts, completions, **columns: [1 / value for value in perplexity(lm, tokenizer, completions, prompts)]


def _sentiment_reward(context, lexicon: str | None = None):
    words = read_lexicon(lexicon) if lexicon else DEFAULT_LEXICON
    return lambda prompts, completions, **columns: [lexicon_sentiment(completion, words) for completion in completions]


def _length_reward(context, target: int = 20):
    if not target > 0:
        raise UserError(f"length(target={target}): the target is a number of words, above 0")
    return lambda prompts, completions, **columns: [max(0.0, 1 - abs(len(text.split()) - target) / target) for text in completions]


# name -> (make(context, **arguments) -> reward function, range and meaning in one line)
REWARDS: dict[str, tuple[Callable, str]] = {
    "bleu": (_bleu_reward, "0..1, sentence BLEU against the target"),
    "rouge_1": (lambda context: _best(lambda h, r: rouge_n(h, r, 1).f1, "rouge_1"), "0..1, shared words with the target, F1"),
    "rouge_2": (lambda context: _best(lambda h, r: rouge_n(h, r, 2).f1, "rouge_2"), "0..1, shared word pairs with the target, F1"),
    "rouge_n": (lambda context, n=1: _best(lambda h, r: rouge_n(h, r, n).f1, "rouge_n"), "0..1, shared n-grams with the target, F1"),
    "rouge_l": (lambda context: _best(lambda h, r: rouge_l(h, r).f1, "rouge_l"), "0..1, longest common subsequence with the target, F1"),
    "rouge_lsum": (lambda context: _best(lambda h, r: rouge_lsum(h, r).f1, "rouge_lsum"), "0..1, the same over lines of a summary, F1"),
    "cosine": (lambda context: _best(cosine, "cosine"), "0..1, bag-of-words cosine with the target"),
    "perplexity": (_perplexity_reward, "0..1, 1 / perplexity under the frozen starting model (or model=); 0 for empty text"),
    "sentiment": (_sentiment_reward, "-1..1, praise minus blame by a word list (or lexicon=)"),
    "length": (_length_reward, "0..1, 1 at `target` words, falling linearly to 0 at none and at twice as many"),
}

# ------------------------------------------------------------------------------------------------ the expression


class Reward:
    """A parsed expression. Calling it gives a (B,) float32 tensor; `parts` then holds every leaf's raw values by name."""

    def __init__(self, evaluate: Callable[[Callable], torch.Tensor], leaves: dict[str, Callable]):
        self._evaluate, self._leaves = evaluate, leaves
        self.parts: dict[str, torch.Tensor] = {}

    def __call__(self, prompts: list[str], completions: list[str], **columns) -> torch.Tensor:
        """One float per completion. Raises UserError naming reward and text where a leaf raises, miscounts or gives no number."""
        self.parts = {name: _call_leaf(name, f, prompts, completions, columns) for name, f in self._leaves.items()}  # (B,) each
        return self._evaluate(self.parts) + torch.zeros(len(completions))  # (B,) also where the expression is only a number


def _call_leaf(name: str, function: Callable, prompts: list[str], completions: list[str], columns: dict) -> torch.Tensor:
    try:
        values = function(prompts=prompts, completions=completions, **_accepted(function, columns))
    except UserError:
        raise
    except Exception as problem:  # the user's own code may raise anything; it is named, not hidden
        raise UserError(f"reward '{name}' raised {type(problem).__name__}: {problem}; first completion: {completions[0][:80]!r}") from problem
    if isinstance(values, (torch.Tensor, np.ndarray)):
        values = values.tolist()
    if not isinstance(values, (list, tuple)) or len(values) != len(completions):
        found = f"{len(values)} values" if isinstance(values, (list, tuple)) else type(values).__name__
        raise UserError(f"reward '{name}' must return a list of {len(completions)} floats, one per completion; it returned {found}")
    for value, text in zip(values, completions):
        if not isinstance(value, numbers.Real) or not math.isfinite(value):
            raise UserError(f"reward '{name}' gave {value!r}, not a finite number, for the completion {text[:80]!r}")
    return torch.tensor(values, dtype=torch.float32)


def _accepted(function: Callable, columns: dict) -> dict:
    """The columns that the function takes: all with **kwargs, else those it names."""
    parameters = inspect.signature(function).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return columns
    return {name: values for name, values in columns.items() if name in parameters}


_FILE_FUNCTION = re.compile(r"""(?<![\w./~"'-])([\w./~-]+\.py):(\w+)""")


def build_reward(expression: str, **context) -> Reward:
    """Parse a reward expression: names, numbers, + - *, calls with literal arguments, `file.py:function`.

    `context` is what some rewards need: `model` (a Hugging Face causal LM) and `tokenizer` for `perplexity`, `device`.
    Raises UserError that quotes the part it does not understand and lists the known names.
    """
    functions: dict[str, tuple[str, str]] = {}  # placeholder name -> (file, function): a path is no Python expression

    def stand_in(match: re.Match) -> str:
        functions[f"_file{len(functions)}_"] = match.groups()
        return list(functions)[-1]

    source = _FILE_FUNCTION.sub(stand_in, expression.strip())
    try:
        tree = ast.parse(source, mode="eval").body
    except (SyntaxError, ValueError) as problem:
        raise UserError(f"--reward {expression!r} is not an expression: {getattr(problem, 'msg', problem)}; {_known()}") from None
    leaves: dict[str, Callable] = {}

    def add_leaf(name: str, function: Callable):
        leaves[name] = function
        return lambda parts: parts[name]

    def build(node: ast.expr):  # -> function from the leaves' values to this node's value
        if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Add, ast.Sub, ast.Mult)):
            left, right = build(node.left), build(node.right)
            if isinstance(node.op, ast.Add):
                return lambda parts: left(parts) + right(parts)
            if isinstance(node.op, ast.Sub):
                return lambda parts: left(parts) - right(parts)
            return lambda parts: left(parts) * right(parts)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
            operand, sign = build(node.operand), -1 if isinstance(node.op, ast.USub) else 1
            return lambda parts: sign * operand(parts)
        if isinstance(node, ast.Constant) and type(node.value) in (int, float) and math.isfinite(node.value):
            return lambda parts: node.value
        if isinstance(node, ast.Name) and node.id in functions:
            return add_leaf(functions[node.id][1], load_function(*functions[node.id]))
        if isinstance(node, ast.Name) and node.id in REWARDS:
            return add_leaf(node.id, REWARDS[node.id][0](context))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in REWARDS:
            return add_leaf(ast.unparse(node).replace("'", '"'), _call_factory(node, context))
        unknown = ast.unparse(node)
        for placeholder, (file, function) in functions.items():
            unknown = unknown.replace(placeholder, f"{file}:{function}")
        raise UserError(f"--reward {expression!r}: cannot read {unknown!r}; {_known()}")

    return Reward(build(tree), leaves)


def _call_factory(node: ast.Call, context: dict) -> Callable:
    """`name(literals)` -> reward function. Raises UserError for arguments that are no literals or do not fit."""
    name, text = node.func.id, ast.unparse(node)
    try:
        arguments = [ast.literal_eval(argument) for argument in node.args]
        keywords = {keyword.arg: ast.literal_eval(keyword.value) for keyword in node.keywords}
        inspect.signature(REWARDS[name][0]).bind(context, *arguments, **keywords)
    except (ValueError, TypeError) as problem:
        raise UserError(f"--reward: cannot read {text!r}: {problem}") from None
    return REWARDS[name][0](context, *arguments, **keywords)


def load_function(file: str, name: str) -> Callable:
    """The callable `name` of a Python file; a class is instantiated without arguments."""
    path = Path(file).expanduser()
    if not path.is_file():
        raise UserError(f"--reward {file}:{name}: there is no file {file} (write spaces around a minus sign)")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as problem:  # the user's own file may raise anything while it is imported
        raise UserError(f"--reward {file}:{name}: importing the file raised {type(problem).__name__}: {problem}") from problem
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(f"--reward {file}:{name}: the file has no function of that name; expected def {name}(prompts, completions, **columns) -> list[float]")
    return function() if isinstance(function, type) else function


def _known() -> str:
    return f"known rewards are {', '.join(REWARDS)}, and file.py:function"


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit("usage: python rewards.py EXPRESSION COMPLETION TARGET\n" + "\n".join(f"  {n:12} {doc}" for n, (_, doc) in REWARDS.items()))
    try:
        shown = build_reward(sys.argv[1])
        print(f"{shown([''], [sys.argv[2]], target=[sys.argv[3]]).item():.6f}", {k: round(v.item(), 6) for k, v in shown.parts.items()})
    except UserError as problem:
        sys.exit(f"error: {problem}")
