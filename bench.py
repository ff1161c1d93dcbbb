"""How fast is it? Measured beside peers where they are installed, in one call on one machine.

    python bench.py ppo                        # a whole PPO step: rollout, both scorings, 4 epochs
    python bench.py ppo --ragged --against trl --peer-python other-venv/bin/python
    python bench.py rollout --against generate # sampling alone, beside Hugging Face's generate
    python bench.py sft --amp bf16 --json      # one SFT step; for programs
    python bench.py rewards                    # texts per second, beside sacrebleu and rouge_score

All candidates take one round after another, after a warm-up; the median counts. On a shared
machine only ratios within one call mean anything. For sft, rollout and ppo each candidate is a
process, `bench.py --worker SIDE JSON`. So each has its own peak memory, and a peer may live in
another Python with its own torch and transformers; imports of this project are inside functions,
since that Python may not be able to run it. All sides build their workload by the same lines: a
GPT-2 of random weights (or --model), random prompts, and a bias on EOS that sets the lengths of
responses. The protocol: a worker prints a line of JSON when it is ready; then each line on its
stdin starts a round, which ends in another line of JSON.
Left out on purpose: a stored history of numbers.
"""

import copy
import itertools
import json
import math
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from types import SimpleNamespace

import torch
import transformers.generation  # noqa: F401  (loaded now: no round counts its memory)
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

EOS, PPO_EPOCHS, LR = 0, 4, 1e-6  # a small rate: lengths must not drift while we measure
TOKENS_TO_EOS = 30  # of a ragged workload, on average
DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def median_and_spread(seconds: list[float]) -> dict[str, float]:
    """The spread is (max - min) / median."""
    median = statistics.median(seconds)
    return {"seconds": median, "spread": (max(seconds) - min(seconds)) / median}


# ---------------------------------------------------------------------------------------- rewards


def short_texts(n: int, seed: int = 0) -> tuple[list[str], list[str]]:
    """n different sentences of about 15 words, and a copy of each with some words replaced."""
    from data import make_reviews

    rng = random.Random(seed)
    reviews = make_reviews(n, seed)
    references = [f"{review.prompt}{review.target} {i:,}" for i, review in enumerate(reviews)]
    words = sorted({word for text in references for word in text.split()})
    hypotheses = []
    for text in references:
        kept = [word if rng.random() < 0.7 else rng.choice(words) for word in text.split()]
        hypotheses.append(" ".join(kept))
    return references, hypotheses


def reward_peers() -> dict[str, tuple[str, Callable[[str, str], object]]]:
    """reward -> the name of an installed peer, and its function (reference, hypothesis)."""
    peers = {}
    try:
        import sacrebleu

        peers["bleu"] = "sacrebleu bleu", lambda r, h: sacrebleu.sentence_bleu(h, [r])
        peers["chrf"] = "sacrebleu chrf", lambda r, h: sacrebleu.sentence_chrf(h, [r])
    except ImportError:
        print("sacrebleu is not installed; pip install sacrebleu to compare", file=sys.stderr)
    try:
        from rouge_score.rouge_scorer import RougeScorer

        for name in ("rouge_1", "rouge_2", "rouge_l", "rouge_lsum"):
            peer = {"rouge_l": "rougeL", "rouge_lsum": "rougeLsum"}.get(name, name.replace("_", ""))
            peers[name] = f"rouge_score {peer}", RougeScorer([peer]).score
    except ImportError:
        print("rouge-score is not installed; pip install rouge-score to compare", file=sys.stderr)
    return peers


def bench_rewards(n: int, rounds: int) -> list[dict]:
    """Texts per second of every reward that reads text alone, and of the peer that has it too."""
    from judges import JUDGES
    from rewards import REWARDS, build_reward

    # New texts for every round, as in training, so that no cache holds them.
    texts = [short_texts(n, seed) for seed in range(rounds + 1)]
    peers = reward_peers()

    def ask_reward(reward, references, hypotheses) -> None:
        right, wrong = [[text] for text in references], [[text] for text in hypotheses]
        answers = dict(correct_answers=right, incorrect_answers=wrong)
        reward(references, hypotheses, target=references, **answers)

    def ask_peer(function, references, hypotheses) -> None:
        for reference, hypothesis in zip(references, hypotheses):
            function(reference, hypothesis)

    left_out = {*JUDGES, "perplexity", "rouge_n", "overlong"}
    names = [name for name in REWARDS if name not in left_out]
    documents = texts[0][0][:200]
    calls = {name: (ask_reward, build_reward(name, documents=documents)) for name in names}
    calls |= {peer: (ask_peer, function) for peer, function in peers.values()}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for round_number in range(rounds + 1):
        for name, (ask, subject) in calls.items():
            started = time.perf_counter()
            ask(subject, *texts[round_number])
            if round_number > 0:  # round 0 warms up
                seconds[name].append(time.perf_counter() - started)
    rows = []
    for name in names:
        own = median_and_spread(seconds[name])
        row = {"reward": name, "texts_per_second": n / own["seconds"], "spread": own["spread"]}
        row |= {"peer": None, "times_faster": None}
        if name in peers:
            row["peer"] = peers[name][0]
            row["times_faster"] = statistics.median(seconds[row["peer"]]) / own["seconds"]
        rows.append(row)
    return rows


def print_rewards(rows: list[dict]) -> None:
    for row in rows:
        against = f"{row['times_faster']:5.1f} x {row['peer']}" if row["peer"] else ""
        speed = f"{row['texts_per_second']:9,.0f} texts/s  (spread {row['spread']:4.0%})"
        print(f"{row['reward']:13} {speed}  {against}")


# ------------------------------------------------------------------------------------------ steps


def step_flops(
    what: str, layers: int, width: int, vocab: int, prompts: list[int], responses: list[int]
) -> float:
    """Multiplications and additions that a GPT-2 needs for these lengths (tokens), without padding.

    Forward, per token: 2 x 12 LW^2 for the matrices, 4 LW for each token that it attends to; 2 VW
    for each response token through lm_head. A training step costs three forwards. A PPO step is a
    rollout, two scorings and PPO_EPOCHS training steps.
    """
    forward = 0.0
    for p, r in zip(prompts, responses):
        tokens = p + r - 1  # the last one predicts nothing
        forward += 24 * layers * width**2 * tokens
        forward += 4 * layers * width * tokens * (tokens + 1) / 2
        forward += 2 * vocab * width * r
    return forward * {"rollout": 1, "sft": 3, "ppo": 3 + 3 * PPO_EPOCHS}[what]


class Candidate:
    """One side of a comparison: a worker process that does a round when it is told to."""

    def __init__(self, python: str, side: str, load):
        self.name = f"{python} {side}"
        self.log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")
        command = [python, __file__, "--worker", side, json.dumps(vars(load))]
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log)
        self.process = subprocess.Popen(command, text=True, encoding="utf-8", **pipes)
        ready = self.read()
        self.name, self.ceiling = ready["name"], ready["matmul_flops"]
        self.rounds: list[dict] = []

    def read(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            from engine import UserError

            self.log.seek(0)
            lines = self.log.read().strip().splitlines() or ["no error message"]
            raise UserError(f"{self.name} died: {lines[-1]}")
        return json.loads(line)

    def round(self, counts: bool) -> None:
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        report = self.read()
        if counts:
            self.rounds.append(report)

    def result(self, load) -> dict:
        """Seconds, speed and peak memory; tokens and FLOPs only where a side reports lengths."""
        row = {"candidate": self.name} | median_and_spread([r["seconds"] for r in self.rounds])
        row["episodes_per_second"] = load.batch / row["seconds"]
        row["peak_mib"] = self.rounds[-1]["peak_bytes"] / 2**20
        if "prompts" not in self.rounds[0]:
            return row
        tokens = [sum(r["prompts"]) + sum(r["responses"]) for r in self.rounds]
        row["tokens_per_second"] = statistics.mean(tokens) / row["seconds"]
        if self.ceiling and not load.model and load.lora is None:
            sizes = (load.what, load.layers, load.width, load.vocab)
            flops = [step_flops(*sizes, r["prompts"], r["responses"]) for r in self.rounds]
            row["flop_utilisation"] = statistics.mean(flops) / row["seconds"] / self.ceiling
        return row


def bench_steps(load, peers: list[tuple[str, str]], rounds: int) -> list[dict]:
    """One row per candidate, this project first. `peers`: (python, side)."""
    candidates = []
    try:
        for python, side in [(sys.executable, "hybrid"), *peers]:
            candidates.append(Candidate(python, side, load))
        for round_number in range(rounds + 1):
            for candidate in candidates:
                candidate.round(counts=round_number > 0)  # round 0 warms up
    finally:
        for candidate in candidates:
            candidate.process.kill()
    rows = [candidate.result(load) for candidate in candidates]
    for row in rows:
        row["times_faster"] = row["seconds"] / rows[0]["seconds"]
    return rows


def print_steps(rows: list[dict]) -> None:
    for row in rows:
        line = f"{row['candidate']:22} {row['seconds']:8.3f} s (spread {row['spread']:4.0%})"
        line += f"  {row['episodes_per_second']:7.1f} episodes/s"
        tokens = (
            f"  {row['tokens_per_second']:9,.0f} tokens/s" if "tokens_per_second" in row else ""
        )
        line += f"{tokens:20}  peak {row['peak_mib']:6,.0f} MiB"
        if "flop_utilisation" in row:
            line += f"  {row['flop_utilisation']:.0%} of a large matmul's FLOP/s"
        if row is not rows[0]:
            line += f"  this project is {row['times_faster']:.2f} x as fast"
        print(line)


# --------------------------------------------------------------------------------- the workload


def build_lm(load) -> torch.nn.Module:
    """A random GPT-2 or the LM of a folder, with a bias on EOS.

    Of a ragged workload every TOKENS_TO_EOS-th token is EOS, on average; of the other none is.
    """
    torch.manual_seed(0)
    if load.model:
        lm = AutoModelForCausalLM.from_pretrained(load.model, torch_dtype=torch.float32)
    else:
        sizes = dict(n_layer=load.layers, n_embd=load.width, n_head=max(1, load.width // 64))
        sizes |= dict(
            vocab_size=load.vocab, n_positions=max(1024, load.prompt_len + load.response_len)
        )
        dropout = dict(attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)
        lm = GPT2LMHeadModel(GPT2Config(**sizes, **dropout, bos_token_id=EOS, eos_token_id=EOS))
    head = lm.get_output_embeddings()
    bias = torch.zeros(head.weight.shape[0])
    bias[EOS] = math.log(len(bias) / (TOKENS_TO_EOS - 1)) if load.ragged else -1e4
    head.bias = torch.nn.Parameter(bias, requires_grad=False)
    return lm.to(load.device)


def make_ids(load, longest: int, round_number: int) -> list[list[int]]:
    """Random rows of ids; those of a ragged workload have an eighth of `longest` tokens or more."""
    g = torch.Generator().manual_seed(round_number)
    shortest = max(1, longest // 8) if load.ragged else longest
    lengths = torch.randint(shortest, longest + 1, (load.batch,), generator=g).tolist()
    return [torch.randint(1, load.vocab, (n,), generator=g).tolist() for n in lengths]


class NoText:
    """The tokenizer of a workload without text."""

    eos_token_id = pad_token_id = EOS
    all_special_ids = (EOS,)
    bos_token_id = bos_token = chat_template = None
    padding_side = "left"


def hybrid(load) -> Callable:
    """This project: sft, rollout (sampling alone) or ppo (a whole step)."""
    import dialogue
    import ppo
    from data import Example, make_batch
    from engine import AMP_DTYPES, OPTIMIZERS, compile_lm
    from generate import generate
    from hybrid import HybridModel
    from lora import LoraModel
    from sft import sft_step

    if load.lora is None:
        model = HybridModel(build_lm(load))
    else:
        model = LoraModel(build_lm(load), load.lora, alpha=2 * load.lora)
    model.amp_dtype = AMP_DTYPES[load.amp]
    reference = model.frozen_copy()
    if load.compile:
        compile_lm(model)
        compile_lm(reference)
    optimizer = OPTIMIZERS["adamw"](model.train(), LR)
    generator = torch.Generator(load.device).manual_seed(0)
    sampling = dict(max_new_tokens=load.response_len, generator=generator)
    max_length = load.prompt_len + load.response_len
    update = dict(micro_batch_size=load.micro_batch_size)
    # Prompts and responses are ids from end to end: what turns them into text is not measured.
    dialogue.encode_prompt = lambda tokenizer, example: example.prompt
    dialogue.decode = lambda tokenizer, ids: ""

    def no_reward(prompts, completions, **columns):
        return torch.zeros(len(completions))

    def sft(prompts):
        targets = make_ids(load, load.response_len, round_number=1)
        batch = make_batch(NoText, prompts, targets, max_length).to(load.device)
        sft_step(model, batch, optimizer, **update)
        return targets

    def rollout(prompts):
        return generate(model, prompts, eos_token_id=EOS, **sampling).responses

    def whole_step(prompts):
        examples = [Example(ids, "") for ids in prompts]
        options = dict(kl_coef=0.05, max_length=max_length, **sampling, **update)
        collected, _ = ppo.collect_rollout(model, reference, NoText, examples, no_reward, **options)
        ppo.ppo_step(model, collected, optimizer, ppo_epochs=PPO_EPOCHS, minibatches=1, **update)
        return [[0] * n for n in collected.response_mask.sum(1).tolist()]

    return {"sft": sft, "rollout": rollout, "ppo": whole_step}[load.what]


# ------------------------------------------------------------------------------------------ peers


def plain_sampling(load) -> dict:
    """Arguments of Hugging Face's `generate`: temperature 1 and nothing else, as here."""
    options = dict(max_new_tokens=load.response_len, do_sample=True, top_k=0, top_p=1.0)
    return options | dict(eos_token_id=EOS, pad_token_id=EOS)


def generate_hf(load) -> Callable:
    """Hugging Face's `generate` on the same prompts."""
    lm = build_lm(load).eval()

    @torch.no_grad()
    def rollout(prompts):
        width = max(map(len, prompts))
        ids = [[EOS] * (width - len(p)) + p for p in prompts]
        mask = [[0] * (width - len(p)) + [1] * len(p) for p in prompts]
        ids, mask = (torch.tensor(rows, device=load.device) for rows in (ids, mask))
        with torch.autocast(load.device, DTYPES[load.amp], enabled=load.amp != "no"):
            out = lm.generate(ids, attention_mask=mask, **plain_sampling(load))[:, width:].tolist()
        return [row[: row.index(EOS) + 1] if EOS in row else row for row in out]

    return rollout


def numbered_words(n: int):
    """A tokenizer for peers that want one; they only ask it for its EOS and pad tokens."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(n)}, unk_token="w1"))
    special = dict(eos_token=f"w{EOS}", pad_token=f"w{n - 1}", padding_side="left")
    return PreTrainedTokenizerFast(tokenizer_object=words, **special)


def trl_old(load) -> Callable:
    """A PPO step of TRL up to 0.11: PPOTrainer.generate and .step, an LM with a value head."""
    import trl

    if load.lora is not None:
        sys.exit("--lora is not measured with TRL 0.11")
    batch, micro_batch = load.batch, load.micro_batch_size
    sizes = dict(batch_size=batch, mini_batch_size=micro_batch, ppo_epochs=PPO_EPOCHS)
    sizes |= dict(gradient_accumulation_steps=batch // micro_batch, learning_rate=LR)
    precision = dict(mixed_precision=load.amp)
    config = trl.PPOConfig(
        whiten_rewards=False, log_with=None, accelerator_kwargs=precision, **sizes
    )
    head = trl.AutoModelForCausalLMWithValueHead
    model, reference = (head.from_pretrained(build_lm(load)) for _ in range(2))
    trainer = trl.PPOTrainer(config, model, reference, numbered_words(load.vocab))
    options = dict(return_prompt=False, batch_size=batch, **plain_sampling(load))

    def whole_step(prompts):
        queries = [torch.tensor(p) for p in prompts]
        responses = trainer.generate(queries, **options)
        trainer.step(queries, responses, [torch.tensor(0.0) for _ in queries])
        return [r.tolist() for r in responses]

    return whole_step


class NoReward(torch.nn.Module):
    """A reward model for TRL 1.x that takes no time: every score is 0."""

    base_model_prefix = "body"

    def body(self, input_ids, **inputs):
        zeros = torch.zeros(*input_ids.shape, 1, device=input_ids.device)
        return SimpleNamespace(hidden_states=[zeros])

    def score(self, hidden):
        return hidden


def trl_last(load, rounds: "Rounds") -> None:
    """TRL 1.x up to 1.12: PPOTrainer.train with a separate critic.

    TRL runs the loop itself, so its collator waits for the next round.
    """
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    lm, reference, adapter = build_lm(load), None, None
    if load.lora is None:
        reference = build_lm(load)
    else:  # of the layers that lora.py takes; TRL's reference is then the model without it
        from peft import LoraConfig

        adapter = LoraConfig(r=load.lora, lora_alpha=2 * load.lora, target_modules="all-linear")
    critic_config = copy.deepcopy(lm.config)
    critic_config.num_labels, critic_config.pad_token_id = 1, EOS
    critic = AutoModelForSequenceClassification.from_config(critic_config)
    torch.nn.init.zeros_(critic.score.weight)
    numbers = itertools.count()
    pad = load.vocab  # an id that no text has; it is masked and clamped before the model sees it

    def collate(rows):
        number = next(numbers)
        if number > 0:  # the loader reads one batch ahead: batch 0 belongs to no update
            rounds.end()
            rounds.begin()
        prompts = make_ids(load, load.prompt_len, number)
        ids = [[pad] * (load.prompt_len - len(p)) + p for p in prompts]
        return {"input_ids": torch.tensor(ids)}

    n_rows, micro_batch = load.batch * 1000, load.micro_batch_size
    sizes = dict(per_device_train_batch_size=micro_batch, num_mini_batches=1, total_episodes=n_rows)
    sizes |= dict(gradient_accumulation_steps=load.batch // micro_batch, num_ppo_epochs=PPO_EPOCHS)
    sizes |= dict(response_length=load.response_len, local_rollout_forward_batch_size=load.batch)
    how = dict(learning_rate=LR, temperature=1.0, stop_token="eos", gradient_checkpointing=False)
    how |= dict(bf16=load.amp == "bf16", fp16=load.amp == "fp16", use_cpu=load.device == "cpu")
    quiet = dict(report_to="none", save_strategy="no", disable_tqdm=True, logging_steps=10**9)
    quiet |= dict(num_sample_generations=0, output_dir=tempfile.mkdtemp())
    config = PPOConfig(**sizes, **how, **quiet)
    data = Dataset.from_dict({"input_ids": [[1]] * n_rows})
    models = (lm, reference, NoReward(), data, critic)
    options = dict(data_collator=collate, eval_dataset=data.select(range(8)), peft_config=adapter)
    PPOTrainer(config, numbered_words(pad + 1), *models, **options).train()


# --------------------------------------------------------------------------------------- a worker


class Rounds:
    """begin() waits for a line on stdin and starts the clock; end() stops it and reports."""

    def __init__(self, device: str):
        self.out = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)  # whatever a peer prints is not part of the protocol
        self.is_cuda, self.started, self.imports = device == "cuda", None, 0

    def say(self, **report) -> None:
        print(json.dumps(report), file=self.out, flush=True)

    def begin(self) -> None:
        if not sys.stdin.readline():
            os._exit(0)  # not sys.exit: a peer's loop may catch it
        self.started = time.perf_counter()

    def end(self, **lengths) -> None:
        """Reports nothing before the first begin()."""
        if self.is_cuda:
            torch.cuda.synchronize()
        if self.started is None:
            return
        seconds = time.perf_counter() - self.started
        peak = torch.cuda.max_memory_allocated() if self.is_cuda else max_rss() - self.imports
        self.say(seconds=seconds, peak_bytes=peak, **lengths)


def max_rss() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts it in KiB


def matmul_flops(load) -> float:
    """FLOP/s of a large matrix product: the ceiling for the utilisation.

    The matrices grow until they are large or slow: a CPU without bf16 takes 20 s for 2,048 rows.
    """
    from engine import seconds_of_product

    n, largest = 256, 8192 if load.device == "cuda" else 2048
    while True:
        best = seconds_of_product(n, DTYPES[load.amp], load.device, rounds=5)
        if n == largest or best > 0.05:
            return 2 * n**3 / best
        n *= 2


def worker(side: str, load) -> None:
    """Build the workload of one side, then do a round for each line on stdin, until it closes."""
    torch.set_num_threads(load.threads)
    rounds = Rounds(load.device)
    name = {"hybrid": "this project", "generate": "transformers generate", "trl": "trl"}[side]
    if side == "trl":
        import trl

        name += f" {trl.__version__}"
    rounds.imports = max_rss()  # before there is any model
    rounds.say(name=name, matmul_flops=matmul_flops(load) if side == "hybrid" else None)
    if side == "trl" and not hasattr(trl, "AutoModelForCausalLMWithValueHead"):
        return trl_last(load, rounds)
    work = {"hybrid": hybrid, "generate": generate_hf, "trl": trl_old}[side](load)
    for round_number in itertools.count(1):
        prompts = make_ids(load, load.prompt_len, round_number)
        rounds.begin()
        responses = work(prompts)
        rounds.end(prompts=[len(p) for p in prompts], responses=[len(r) for r in responses])


# ------------------------------------------------------------------------------------ the command


def parse_args(argv: list[str]):
    from engine import Parser, number

    parser = Parser(__doc__.splitlines()[0])
    add, count, choices = parser.add_argument, number(int, 1), ("sft", "rollout", "ppo", "rewards")
    add("what", choices=choices, help="an SFT step, sampling alone, a PPO step, all text rewards")
    add("--rounds", type=count, default=5, help="rounds; the median counts")
    add("--json", action="store_true", help="print JSON instead of a table")
    add("--texts", type=count, default=2000, help="rewards: texts per round")
    group = parser.add_argument_group("sft, rollout, ppo: a GPT-2 of random weights, or --model")
    add, wide = group.add_argument, number(int, 64)
    add("--layers", type=count, default=6)
    add("--width", type=wide, default=384, help="an attention head for every 64")
    add("--vocab", type=wide, default=8192, help="of random weights; a --model has its own")
    add("--model", help="a local folder instead of random weights")
    add("--batch", type=count, default=32, help="rows")
    add("--micro-batch-size", type=count, help="rows per forward and backward (default: the batch)")
    add("--prompt-len", type=count, default=32, help="tokens")
    add("--response-len", type=count, default=32, help="tokens")
    what = "prompts from an eighth of --prompt-len up; responses end by themselves"
    add("--ragged", action="store_true", help=f"{what}, after 30 tokens on average")
    add("--amp", choices=list(DTYPES), default="no", help="precision of all sides")
    add("--compile", action="store_true", help="torch.compile, this project only")
    what = "train adapters of this rank; TRL 1.x (with peft) has a critic without one"
    add("--lora", type=count, metavar="RANK", help=what)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", choices=("cpu", "cuda"), default=device)
    repeated = dict(action="append", default=[])
    add("--against", choices=("trl", "generate"), help="a peer; may be repeated", **repeated)
    add("--peer-python", help="a Python that has TRL, if not this; may be repeated", **repeated)
    return parser.parse_args(argv)


def measure(argv: list[str] | None) -> list[dict]:
    """Measure what the flags ask for, print it, return the rows."""
    from cost import sizes_of
    from engine import UserError

    args = parse_args(argv)
    if args.what == "rewards":
        torch.set_num_threads(1)  # the metrics are plain Python
        rows = bench_rewards(args.texts, args.rounds)
        print_rows = print_rewards
    else:
        for peer in args.against:
            if args.what != {"trl": "ppo", "generate": "rollout"}[peer]:
                raise UserError(
                    f"--against {peer}: trl is measured by ppo, generate by rollout, "
                    f"not by {args.what}"
                )
        if args.lora is not None and "generate" in args.against:
            raise UserError("--lora is measured in whole steps, beside trl")
        if args.model:
            args.vocab = sizes_of(args.model).vocab
        args.micro_batch_size = args.micro_batch_size or args.batch
        args.threads = torch.get_num_threads()
        pythons = {"trl": args.peer_python or [sys.executable], "generate": [sys.executable]}
        peers = [(python, peer) for peer in args.against for python in pythons[peer]]
        rows = bench_steps(args, peers, args.rounds)
        print_rows = print_steps
    if args.json:
        print(json.dumps(rows, indent=1))
    else:
        print_rows(rows)
    return rows


def main(argv: list[str] | None = None) -> list[dict]:
    from engine import one_line_errors

    return one_line_errors(measure)(argv)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(sys.argv[2], SimpleNamespace(**json.loads(sys.argv[3])))
    else:
        main(sys.argv[1:])
