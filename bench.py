"""How fast is it? Measured side by side with peers where they are installed, in one call on one machine.

    python bench.py rewards                 # texts per second of each text reward, against sacrebleu and rouge_score
    python bench.py rewards --json          # the same for programs

Every candidate runs in turn, several rounds, and the median counts: on a shared machine only ratios within one run mean anything.
Left out on purpose: a stored history of numbers.
"""

import json
import random
import statistics
import sys
import time
from typing import Callable

import torch

from data import make_reviews
from engine import Parser, number, one_line_errors
from judges import JUDGES
from rewards import REWARDS, build_reward


def interleaved(candidates: dict[str, Callable[[int], object]], rounds: int) -> dict[str, dict[str, float]]:
    """Seconds per call of each candidate: median and spread ((max - min) / median) over `rounds`, taken in turn after a warm-up.

    A candidate is called with the number of the round, so that it can work on inputs that no cache has seen.
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for round_number in range(rounds + 1):
        for name, call in candidates.items():
            started = time.perf_counter()
            call(round_number)
            if round_number:  # round 0 warms up
                seconds[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {name: {"seconds": medians[name], "spread": (max(v) - min(v)) / medians[name]} for name, v in seconds.items()}


def short_texts(n: int, seed: int = 0) -> tuple[list[str], list[str]]:
    """n pairs of sentences of about fifteen words, all different, the second a disturbed copy of the first."""
    rng = random.Random(seed)
    references = [f"{example.prompt}{example.target} {i:,}" for i, example in enumerate(make_reviews(n, seed))]
    words = sorted({word for text in references for word in text.split()})
    return references, [" ".join(w if rng.random() < 0.7 else rng.choice(words) for w in text.split()) for text in references]


def bench_rewards(n: int, rounds: int) -> list[dict]:
    """Texts per second of every reward that reads text alone, and of the peer that computes the same number."""
    texts = [short_texts(n, seed) for seed in range(rounds + 1)]  # new ones every round: sampled responses are new, too
    names = [name for name in REWARDS if name not in JUDGES and name not in ("perplexity", "rouge_n")]

    def ours(name: str) -> Callable[[int], object]:
        reward = build_reward(name, documents=texts[0][0][:200])

        def call(i: int):
            references, hypotheses = texts[i]
            answers = dict(correct_answers=[[r] for r in references], incorrect_answers=[[h] for h in hypotheses])
            return reward(references, hypotheses, target=references, **answers)

        return call

    candidates = {name: ours(name) for name in names}
    peers: dict[str, str] = {}
    try:
        import sacrebleu

        candidates["sacrebleu bleu"] = lambda i: [sacrebleu.sentence_bleu(h, [r]).score for r, h in zip(*texts[i])]
        candidates["sacrebleu chrf"] = lambda i: [sacrebleu.sentence_chrf(h, [r]).score for r, h in zip(*texts[i])]
        peers |= {"bleu": "sacrebleu bleu", "chrf": "sacrebleu chrf"}
    except ImportError:
        print("sacrebleu is not installed; pip install sacrebleu to compare", file=sys.stderr)
    try:
        from rouge_score.rouge_scorer import RougeScorer

        for name, theirs in (("rouge_1", "rouge1"), ("rouge_2", "rouge2"), ("rouge_l", "rougeL"), ("rouge_lsum", "rougeLsum")):
            scorer = RougeScorer([theirs])
            candidates[f"rouge_score {theirs}"] = lambda i, scorer=scorer: [scorer.score(r, h) for r, h in zip(*texts[i])]
            peers[name] = f"rouge_score {theirs}"
    except ImportError:
        print("rouge-score is not installed; pip install rouge-score to compare", file=sys.stderr)
    measured = interleaved(candidates, rounds)
    return [
        {
            "reward": name,
            "texts_per_second": n / measured[name]["seconds"],
            "spread": measured[name]["spread"],
            "peer": peers.get(name),
            "times_faster": measured[peers[name]]["seconds"] / measured[name]["seconds"] if name in peers else None,
        }
        for name in names
    ]


@one_line_errors
def main(argv: list[str] | None = None) -> list[dict]:
    parser = Parser(__doc__.splitlines()[0])
    parser.add_argument("what", choices=("rewards",), help="rewards: every text reward, in texts per second")
    parser.add_argument("--texts", type=number(int, 1), default=2000, help="texts per round")
    parser.add_argument("--rounds", type=number(int, 1), default=5, help="rounds; the median counts")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # the metrics are plain Python
    rows = bench_rewards(args.texts, args.rounds)
    if args.json:
        print(json.dumps(rows, indent=1))
    else:
        for row in rows:
            against = f"{row['times_faster']:5.1f} x {row['peer']}" if row["peer"] else ""
            print(f"{row['reward']:13} {row['texts_per_second']:9,.0f} texts/s  (spread {row['spread']:4.0%})  {against}")
    return rows


if __name__ == "__main__":
    main(sys.argv[1:])
