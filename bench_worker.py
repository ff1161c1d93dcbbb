"""One candidate of `bench.py`, in a process of its own: it builds a workload, then does one round each time it is told to.

`bench.py` starts one of these per candidate and lets them take turns, so that each has its own peak memory, and a peer may live in
another Python (`--peer-python`) with the versions of torch and transformers that it wants. The workload is made here, by the same lines for all
sides: a GPT-2 of random weights (or `--model`), random prompts, and a bias on EOS that sets how long responses become.

    protocol: one JSON line on stdout when ready, {"name", "matmul_flops"}; then a line on stdin starts a round, and a JSON line on stdout ends it

Left out on purpose: flags and tables (`bench.py` has them).
"""

import copy
import itertools
import json
import math
import os
import resource
import sys
import tempfile
import time

import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

EOS, PPO_EPOCHS, LR = 0, 4, 1e-6  # a small rate: lengths must not drift while we measure
TOKENS_TO_EOS = 30  # of a ragged workload, on average


def build_lm(load: dict) -> torch.nn.Module:
    """The workload's LM: random GPT-2 or a folder, with a bias on EOS: one in TOKENS_TO_EOS tokens of a ragged workload, none otherwise."""
    torch.manual_seed(0)
    if load["model"]:
        lm = AutoModelForCausalLM.from_pretrained(load["model"], torch_dtype=torch.float32)
    else:
        sizes = dict(
            n_layer=load["layers"],
            n_embd=load["width"],
            n_head=max(1, load["width"] // 64),
            vocab_size=load["vocab"],
        )
        positions = max(1024, load["prompt_len"] + load["response_len"])
        config = GPT2Config(
            **sizes,
            n_positions=positions,
            bos_token_id=EOS,
            eos_token_id=EOS,
            attn_pdrop=0.0,
            embd_pdrop=0.0,
            resid_pdrop=0.0,
        )
        lm = GPT2LMHeadModel(config)
    head = lm.get_output_embeddings()
    bias = torch.zeros(head.weight.shape[0])
    bias[EOS] = math.log(len(bias) / (TOKENS_TO_EOS - 1)) if load["ragged"] else -1e4
    head.bias = torch.nn.Parameter(bias, requires_grad=False)
    return lm.to(load["device"])


def make_prompts(load: dict, round_number: int) -> list[list[int]]:
    """Random token ids; a ragged workload has lengths from an eighth of --prompt-len up."""
    g = torch.Generator().manual_seed(round_number)
    low = max(1, load["prompt_len"] // 8) if load["ragged"] else load["prompt_len"]
    lengths = torch.randint(low, load["prompt_len"] + 1, (load["batch"],), generator=g).tolist()
    return [torch.randint(1, load["vocab"], (n,), generator=g).tolist() for n in lengths]


class Words:
    """What a tokenizer is to a workload without text."""

    eos_token_id = pad_token_id = EOS
    bos_token_id = bos_token = chat_template = None
    padding_side = "left"


# ------------------------------------------------------------------------------------------------ this project


def hybrid(load: dict):
    """sft, rollout (sampling alone) or ppo (a whole step: rollout, both scorings, PPO_EPOCHS updates) by this project."""
    import dialogue
    import ppo
    from data import Example, make_batch
    from engine import AMP_DTYPES, OPTIMIZERS, compile_lm
    from generate import generate
    from hybrid import HybridModel
    from sft import sft_step

    model = HybridModel(build_lm(load))
    model.amp_dtype = AMP_DTYPES[load["amp"]]
    reference = model.frozen_copy()
    for each in (model, reference) if load["compile"] else ():
        compile_lm(each)
    optimizer = OPTIMIZERS["adamw"](model.train(), LR)
    max_length, device = load["prompt_len"] + load["response_len"], torch.device(load["device"])
    generator = torch.Generator(device).manual_seed(0)
    update = dict(micro_batch_size=load["micro_batch"])
    # Prompts and responses are ids from end to end; what lies between them and text is not what is measured.
    dialogue.encode_prompt, dialogue.decode = (
        lambda tokenizer, example: example.prompt,
        lambda tokenizer, ids: "",
    )

    def sft(prompts):
        targets = make_prompts({**load, "prompt_len": load["response_len"]}, round_number=1)
        batch = make_batch(Words, prompts, targets, max_length).to(device)
        sft_step(model, batch, optimizer, **update)
        return targets

    def rollout(prompts):
        return generate(
            model,
            prompts,
            max_new_tokens=load["response_len"],
            eos_token_id=EOS,
            generator=generator,
        ).responses

    def whole_step(prompts):
        collected, _ = ppo.collect_rollout(
            model, reference, Words, [Example(ids, "") for ids in prompts], lambda p, c, **columns: torch.zeros(len(c)),
            kl_coef=0.05, max_length=max_length, max_new_tokens=load["response_len"], generator=generator, **update,
        )  # fmt: skip
        ppo.ppo_step(model, collected, optimizer, ppo_epochs=PPO_EPOCHS, minibatches=1, **update)
        return [[0] * n for n in collected.response_mask.sum(1).tolist()]

    return {"sft": sft, "rollout": rollout, "ppo": whole_step}[load["what"]]


# ------------------------------------------------------------------------------------------------ peers


def generate_hf(load: dict):
    """Hugging Face `generate` on the same prompts."""
    lm = build_lm(load).eval()
    dtype = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}[load["amp"]]

    @torch.no_grad()
    def rollout(prompts):
        width = max(map(len, prompts))
        ids = torch.tensor([[EOS] * (width - len(p)) + p for p in prompts], device=load["device"])
        mask = torch.tensor(
            [[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=load["device"]
        )
        options = dict(
            max_new_tokens=load["response_len"],
            do_sample=True,
            top_k=0,
            top_p=1.0,
            eos_token_id=EOS,
            pad_token_id=EOS,
        )
        with torch.autocast(load["device"], dtype, enabled=dtype is not None):
            out = lm.generate(ids, attention_mask=mask, **options)[:, width:].tolist()
        return [row[: row.index(EOS) + 1] if EOS in row else row for row in out]

    return rollout


def numbered_words(n: int):
    """A tokenizer for peers that want one; they only ask it for its EOS and pad tokens."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(n)}, unk_token="w1"))
    return PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token=f"w{EOS}", pad_token=f"w{n - 1}", padding_side="left"
    )


def trl_old(load: dict):
    """A whole PPO step of TRL up to 0.11: `PPOTrainer.generate` and `PPOTrainer.step`, one trunk with a value head."""
    import trl

    config = trl.PPOConfig(
        batch_size=load["batch"], mini_batch_size=load["micro_batch"], gradient_accumulation_steps=load["batch"] // load["micro_batch"],
        ppo_epochs=PPO_EPOCHS, learning_rate=LR, whiten_rewards=False, log_with=None,
        accelerator_kwargs={"mixed_precision": load["amp"]},
    )  # fmt: skip
    models = [
        trl.AutoModelForCausalLMWithValueHead.from_pretrained(build_lm(load)) for _ in range(2)
    ]
    trainer = trl.PPOTrainer(config, *models, numbered_words(load["vocab"]))
    options = dict(
        max_new_tokens=load["response_len"],
        do_sample=True,
        top_k=0,
        top_p=1.0,
        eos_token_id=EOS,
        pad_token_id=EOS,
    )

    def whole_step(prompts):
        queries = [torch.tensor(p) for p in prompts]
        responses = trainer.generate(
            queries, return_prompt=False, batch_size=load["batch"], **options
        )
        trainer.step(queries, responses, [torch.tensor(0.0) for _ in queries])
        return [r.tolist() for r in responses]

    return whole_step


def trl_last(load: dict, rounds: "Rounds") -> None:
    """TRL 1.x up to 1.12: `PPOTrainer.train` with a separate critic. Its loop is not ours to call, so its collator waits for the next round."""
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    lm, ref = build_lm(load), build_lm(load)
    critic_config = copy.deepcopy(lm.config)
    critic_config.num_labels, critic_config.pad_token_id = 1, EOS
    critic = AutoModelForSequenceClassification.from_config(critic_config)
    torch.nn.init.zeros_(critic.score.weight)

    class NoReward(torch.nn.Module):
        """A reward model of no cost: it answers zero."""

        base_model_prefix = "body"

        def body(self, input_ids, **rest):
            return type(
                "Output",
                (),
                {"hidden_states": [torch.zeros(*input_ids.shape, 1, device=input_ids.device)]},
            )

        def score(self, hidden):
            return hidden

    numbers = iter(range(10**9))
    pad = load["vocab"]  # an id that no text has; it is masked and clamped before the model sees it

    def collate(rows):
        number = next(numbers)
        if number:  # the loader reads one batch ahead: call 0 belongs to no update
            rounds.end()
            rounds.begin()
        prompts = make_prompts(load, number)
        return {
            "input_ids": torch.tensor([[pad] * (load["prompt_len"] - len(p)) + p for p in prompts])
        }

    config = PPOConfig(
        output_dir=tempfile.mkdtemp(), report_to="none", save_strategy="no", num_sample_generations=0, use_cpu=load["device"] == "cpu",
        per_device_train_batch_size=load["micro_batch"], gradient_accumulation_steps=load["batch"] // load["micro_batch"], num_mini_batches=1,
        num_ppo_epochs=PPO_EPOCHS, total_episodes=load["batch"] * 1000, response_length=load["response_len"], temperature=1.0, stop_token="eos",
        local_rollout_forward_batch_size=load["batch"], learning_rate=LR, disable_tqdm=True, gradient_checkpointing=False, logging_steps=10**9,
        bf16=load["amp"] == "bf16", fp16=load["amp"] == "fp16",
    )  # fmt: skip
    data = Dataset.from_dict({"input_ids": [[1]] * (load["batch"] * 1000)})
    tokenizer = numbered_words(pad + 1)
    PPOTrainer(
        config,
        tokenizer,
        lm,
        ref,
        NoReward(),
        data,
        critic,
        data_collator=collate,
        eval_dataset=data.select(range(8)),
    ).train()


# ------------------------------------------------------------------------------------------------ the protocol


class Rounds:
    """begin() waits for a line and starts the clock; end() stops it and reports."""

    def __init__(self, load: dict):
        self.cuda, self.started, self.out = (
            load["device"] == "cuda",
            None,
            os.fdopen(os.dup(1), "w"),
        )
        os.dup2(2, 1)  # whatever a peer prints is not part of the protocol
        self.imports = resource.getrusage(
            resource.RUSAGE_SELF
        ).ru_maxrss  # before there is any model

    def say(self, **report) -> None:
        print(json.dumps(report), file=self.out, flush=True)

    def begin(self) -> None:
        if not sys.stdin.readline():
            os._exit(0)  # not sys.exit: a peer's loop may hold it up
        self.started = time.perf_counter()

    def end(self, prompts: list | None = None, responses: list | None = None) -> None:
        """Nothing is reported before the first begin()."""
        if self.cuda:
            torch.cuda.synchronize()
        if self.started is None:
            return
        seconds = time.perf_counter() - self.started
        if self.cuda:
            peak = torch.cuda.max_memory_allocated()
        else:
            peak = (
                resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - self.imports
            ) * 1024  # Linux counts it in KiB
        lengths = (
            {}
            if prompts is None
            else {"prompts": [len(p) for p in prompts], "responses": [len(r) for r in responses]}
        )
        self.say(seconds=seconds, peak_bytes=peak, **lengths)


def matmul_flops(load: dict) -> float:
    """Floating-point operations per second of a large matrix product: the ceiling that utilisation is measured against."""
    dtype = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[load["amp"]]
    n = 8192 if load["device"] == "cuda" else 2048
    x, best = torch.ones(n, n, dtype=dtype, device=load["device"]), math.inf
    for _ in range(20):
        started = time.perf_counter()
        (x @ x)[0, 0].item()
        best = min(best, time.perf_counter() - started)
    return 2 * n**3 / best


def main(side: str, load: dict) -> None:
    torch.set_num_threads(load["threads"])
    if side == "trl":
        import trl

        name = f"trl {trl.__version__}"
    else:
        name = {"hybrid": "this project", "generate": "transformers generate"}[side]
        import transformers.generation  # noqa: F401  (what is imported before Rounds is not counted as memory)
    rounds = Rounds(load)
    rounds.say(name=name, matmul_flops=matmul_flops(load) if side == "hybrid" else None)
    if side == "trl" and not hasattr(trl, "AutoModelForCausalLMWithValueHead"):
        return trl_last(load, rounds)
    work = {"hybrid": hybrid, "generate": generate_hf, "trl": trl_old}[side](load)
    for round_number in itertools.count(1):
        prompts = make_prompts(load, round_number)
        rounds.begin()
        responses = work(prompts)
        rounds.end(prompts, responses)


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
