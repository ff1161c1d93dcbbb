"""How fast is it? Measured side by side with peers where they are installed, in one call on one machine.

    python bench.py ppo                                          # a whole PPO step: rollout, both scorings, four epochs
    python bench.py ppo --ragged --prompt-len 64 --response-len 64 --against trl --peer-python other-venv/bin/python
    python bench.py rollout --against generate                   # sampling alone, against Hugging Face's generate
    python bench.py sft --amp bf16 --json                        # one SFT step; for programs
    python bench.py rewards                                      # texts per second of each text reward, against sacrebleu and rouge_score

Every candidate runs in turn, several rounds after a warm-up, and the median counts: on a shared machine only ratios within one run mean
anything. Steps are measured in a process for each candidate (`bench_worker.py`). Left out on purpose: a stored history of numbers.
"""

import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from bench_worker import PPO_EPOCHS
from cost import sizes_of
from data import make_reviews
from engine import Parser, UserError, number, one_line_errors
from judges import JUDGES
from rewards import REWARDS, build_reward


def interleaved(
    candidates: dict[str, Callable[[int], object]], rounds: int
) -> dict[str, dict[str, float]]:
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
    return {
        name: {"seconds": medians[name], "spread": (max(v) - min(v)) / medians[name]}
        for name, v in seconds.items()
    }


def short_texts(n: int, seed: int = 0) -> tuple[list[str], list[str]]:
    """n pairs of sentences of about fifteen words, all different, the second a disturbed copy of the first."""
    rng = random.Random(seed)
    references = [
        f"{example.prompt}{example.target} {i:,}" for i, example in enumerate(make_reviews(n, seed))
    ]
    words = sorted({word for text in references for word in text.split()})
    return references, [
        " ".join(w if rng.random() < 0.7 else rng.choice(words) for w in text.split())
        for text in references
    ]


def bench_rewards(n: int, rounds: int) -> list[dict]:
    """Texts per second of every reward that reads text alone, and of the peer that computes the same number."""
    texts = [
        short_texts(n, seed) for seed in range(rounds + 1)
    ]  # new ones every round: sampled responses are new, too
    names = [
        name for name in REWARDS if name not in JUDGES and name not in ("perplexity", "rouge_n")
    ]

    def ours(name: str) -> Callable[[int], object]:
        reward = build_reward(name, documents=texts[0][0][:200])

        def call(i: int):
            references, hypotheses = texts[i]
            answers = dict(
                correct_answers=[[r] for r in references],
                incorrect_answers=[[h] for h in hypotheses],
            )
            return reward(references, hypotheses, target=references, **answers)

        return call

    candidates = {name: ours(name) for name in names}
    peers: dict[str, str] = {}
    try:
        import sacrebleu

        candidates["sacrebleu bleu"] = lambda i: [
            sacrebleu.sentence_bleu(h, [r]).score for r, h in zip(*texts[i])
        ]
        candidates["sacrebleu chrf"] = lambda i: [
            sacrebleu.sentence_chrf(h, [r]).score for r, h in zip(*texts[i])
        ]
        peers |= {"bleu": "sacrebleu bleu", "chrf": "sacrebleu chrf"}
    except ImportError:
        print("sacrebleu is not installed; pip install sacrebleu to compare", file=sys.stderr)
    try:
        from rouge_score.rouge_scorer import RougeScorer

        for name, theirs in (
            ("rouge_1", "rouge1"),
            ("rouge_2", "rouge2"),
            ("rouge_l", "rougeL"),
            ("rouge_lsum", "rougeLsum"),
        ):
            scorer = RougeScorer([theirs])
            candidates[f"rouge_score {theirs}"] = lambda i, scorer=scorer: [
                scorer.score(r, h) for r, h in zip(*texts[i])
            ]
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
            "times_faster": measured[peers[name]]["seconds"] / measured[name]["seconds"]
            if name in peers
            else None,
        }
        for name in names
    ]


def print_rewards(rows: list[dict]) -> None:
    for row in rows:
        against = f"{row['times_faster']:5.1f} x {row['peer']}" if row["peer"] else ""
        print(
            f"{row['reward']:13} {row['texts_per_second']:9,.0f} texts/s  (spread {row['spread']:4.0%})  {against}"
        )


# ------------------------------------------------------------------------------------------------ steps


def step_flops(
    what: str, layers: int, width: int, vocab: int, prompts: list[int], responses: list[int]
) -> float:
    """Multiplications and additions that a GPT-2 needs for these lengths (tokens), padding and recomputation not counted.

    Forward, per token: 2 x 12 LW^2 for the matrices, 4 LW for each token that it attends to; 2 VW for each response token through
    lm_head. A training step costs three forwards. A PPO step is a rollout, two scorings and PPO_EPOCHS training steps.
    """
    forward = 0.0
    for p, r in zip(prompts, responses):
        tokens = p + r - 1  # the last one predicts nothing
        forward += (
            24 * layers * width**2 * tokens
            + 4 * layers * width * tokens * (tokens + 1) / 2
            + 2 * vocab * width * r
        )
    return forward * {"rollout": 1, "sft": 3, "ppo": 3 + 3 * PPO_EPOCHS}[what]


class Candidate:
    """One side of a comparison: a process that does a round when told to."""

    def __init__(self, python: str, side: str, load: dict):
        self.log = tempfile.TemporaryFile("w+")
        command = [python, str(Path(__file__).with_name("bench_worker.py")), side, json.dumps(load)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True
        )
        hello = self.read(f"{python} {side}")
        self.name, self.ceiling = hello["name"], hello["matmul_flops"]
        self.rounds: list[dict] = []

    def read(self, name: str) -> dict:
        line = self.process.stdout.readline()
        if not line:
            self.log.seek(0)
            last = self.log.read().strip().splitlines()[-1:] or ["no word of why"]
            raise UserError(f"{name} died: {last[0]}")
        return json.loads(line)

    def round(self, counts: bool) -> None:
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        report = self.read(self.name)
        if counts:
            self.rounds.append(report)


def bench_steps(load: dict, peers: list[tuple[str, str]], rounds: int) -> list[dict]:
    """One row per candidate, this project first. `peers`: (python, side)."""
    candidates = []
    try:
        for python, side in [(sys.executable, "hybrid"), *peers]:
            candidates.append(Candidate(python, side, load))
        for number in range(rounds + 1):
            for candidate in candidates:
                candidate.round(counts=number > 0)  # round 0 warms up
    finally:
        for candidate in candidates:
            candidate.process.kill()
    rows = []
    for candidate in candidates:
        seconds = [report["seconds"] for report in candidate.rounds]
        median = statistics.median(seconds)
        row = {
            "candidate": candidate.name,
            "seconds": median,
            "spread": (max(seconds) - min(seconds)) / median,
        }
        row |= {
            "episodes_per_second": load["batch"] / median,
            "peak_mib": candidate.rounds[-1]["peak_bytes"] / 2**20,
        }
        if "prompts" in candidate.rounds[0]:
            tokens = statistics.mean(
                sum(r["prompts"]) + sum(r["responses"]) for r in candidate.rounds
            )
            row["tokens_per_second"] = tokens / median
        if candidate.ceiling and not load["model"]:
            sizes = [load[name] for name in ("what", "layers", "width", "vocab")]
            flops = statistics.mean(
                step_flops(*sizes, r["prompts"], r["responses"]) for r in candidate.rounds
            )
            row["flop_utilisation"] = flops / median / candidate.ceiling
        rows.append(row | {"times_faster": median / rows[0]["seconds"] if rows else 1.0})
    return rows


def print_steps(rows: list[dict]) -> None:
    for row in rows:
        line = f"{row['candidate']:22} {row['seconds']:8.3f} s (spread {row['spread']:4.0%})  {row['episodes_per_second']:7.1f} episodes/s"
        line += (
            f"  {row['tokens_per_second']:9,.0f} tokens/s"
            if "tokens_per_second" in row
            else " " * 20
        )
        line += f"  peak {row['peak_mib']:6,.0f} MiB"
        line += (
            f"  {row['flop_utilisation']:.0%} of a large matmul's FLOP/s"
            if "flop_utilisation" in row
            else ""
        )
        line += (
            f"  this project is {row['times_faster']:.2f} x as fast" if row is not rows[0] else ""
        )
        print(line)


@one_line_errors
def main(argv: list[str] | None = None) -> list[dict]:
    parser = Parser(__doc__.splitlines()[0])
    count = number(int, 1)
    parser.add_argument(
        "what",
        choices=("sft", "rollout", "ppo", "rewards"),
        help="an SFT step, sampling alone, a whole PPO step, or every text reward",
    )
    parser.add_argument("--rounds", type=count, default=5, help="rounds; the median counts")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    group = parser.add_argument_group("sft, rollout, ppo: a GPT-2 of random weights, or --model")
    group.add_argument("--layers", type=count, default=6)
    group.add_argument("--width", type=number(int, 64), default=384, help="a head for every 64")
    group.add_argument(
        "--vocab",
        type=number(int, 64),
        default=8192,
        help="of random weights; a --model has its own",
    )
    group.add_argument("--model", help="a local folder instead of random weights")
    group.add_argument("--batch", type=count, default=32, help="rows")
    group.add_argument(
        "--micro-batch-size", type=count, help="rows per forward and backward (default: the batch)"
    )
    group.add_argument("--prompt-len", type=count, default=32, help="tokens")
    group.add_argument("--response-len", type=count, default=32, help="tokens")
    group.add_argument(
        "--ragged",
        action="store_true",
        help="prompts from an eighth of --prompt-len up; responses end by themselves, after 30 tokens on average",
    )
    group.add_argument(
        "--amp", choices=("no", "bf16", "fp16"), default="no", help="precision of all sides"
    )
    group.add_argument("--compile", action="store_true", help="torch.compile, this project only")
    group.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    group.add_argument(
        "--against",
        choices=("trl", "generate"),
        action="append",
        default=[],
        help="a peer to measure in the same call; may be repeated",
    )
    group.add_argument(
        "--peer-python",
        action="append",
        default=[],
        help="a Python that has TRL, if it is not this one; may be repeated, for several versions",
    )
    group = parser.add_argument_group("rewards")
    group.add_argument("--texts", type=count, default=2000, help="texts per round")
    args = parser.parse_args(argv)
    if args.what == "rewards":
        torch.set_num_threads(1)  # the metrics are plain Python
        rows = bench_rewards(args.texts, args.rounds)
    else:
        if ("trl" in args.against and args.what != "ppo") or (
            "generate" in args.against and args.what != "rollout"
        ):
            raise UserError(
                f"--against {args.against[0]}: trl is measured by ppo, generate by rollout, not by {args.what}"
            )
        if args.model:
            args.vocab = sizes_of(args.model).vocab
        load = {
            name: getattr(args, name)
            for name in (
                "what",
                "layers",
                "width",
                "vocab",
                "model",
                "batch",
                "prompt_len",
                "response_len",
                "ragged",
                "amp",
                "compile",
                "device",
            )
        }
        load |= {
            "micro_batch": args.micro_batch_size or args.batch,
            "threads": torch.get_num_threads(),
        }
        pythons = {"trl": args.peer_python or [sys.executable], "generate": [sys.executable]}
        rows = bench_steps(
            load, [(python, peer) for peer in args.against for python in pythons[peer]], args.rounds
        )
    if args.json:
        print(json.dumps(rows, indent=1))
    elif args.what == "rewards":
        print_rewards(rows)
    else:
        print_steps(rows)
    return rows


if __name__ == "__main__":
    main(sys.argv[1:])
