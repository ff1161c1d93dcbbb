"""One candidate of `bench.py`, in a process of its own: it builds a workload, then does one round each time it is told to.

`bench.py` starts one of these per candidate and lets them take turns, so that each has its own peak memory, and a peer may live in
another Python (`--peer-python`) with the versions of torch and transformers that it wants. The workload is made here, by the same lines for all
sides: a GPT-2 of random weights (or `--model`), random prompts, and a bias on EOS that sets how long responses become.

    protocol: a line on stdin starts a round; one JSON line on stdout ends it: {"seconds", "peak_bytes", "tokens", "episodes", "flops"}
"""

import copy
import json
import math
import os
import resource
import sys
import time

import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

EOS, PPO_EPOCHS, LR = 0, 4, 1e-6  # a small rate: lengths must not drift while we measure


def build_lm(load: dict) -> torch.nn.Module:
    """The workload's LM: random GPT-2 or a folder, with a bias on EOS: 1 in 30 tokens of a ragged workload, none otherwise."""
    torch.manual_seed(0)
    if load["model"]:
        lm = AutoModelForCausalLM.from_pretrained(load["model"], torch_dtype=torch.float32)
    else:
        sizes = dict(n_layer=load["layers"], n_embd=load["width"], n_head=max(1, load["width"] // 64), vocab_size=load["vocab"])
        positions = max(1024, load["prompt_len"] + load["response_len"])
        config = GPT2Config(**sizes, n_positions=positions, bos_token_id=EOS, eos_token_id=EOS, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)
        lm = GPT2LMHeadModel(config)
    head = lm.get_output_embeddings()
    bias = torch.zeros(head.weight.shape[0])
    bias[EOS] = math.log(len(bias) / 29) if load["ragged"] else -1e4
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
    import ppo
    from data import make_batch
    from engine import AMP_DTYPES, OPTIMIZERS, compile_lm
    from generate import generate
    from hybrid import HybridModel
    from sft import sft_step

    model = HybridModel(build_lm(load))
    model.amp_dtype = AMP_DTYPES[load["amp"]]
    if load["compile"]:
        compile_lm(model)
    reference = model.frozen_copy()
    optimizer = OPTIMIZERS["adamw"](model.train(), LR)
    lengths = dict(max_length=load["prompt_len"] + load["response_len"], max_new_tokens=load["response_len"])
    generator = torch.Generator(load["device"]).manual_seed(0)
    update = dict(micro_batch_size=load["micro_batch"])
    # Prompts and responses are ids from end to end; what lies between them and text is not what is measured.
    ppo.encode_prompt, ppo.decode = lambda tokenizer, example: example.prompt, lambda tokenizer, ids: ""

    def sft(prompts):
        g = torch.Generator().manual_seed(1)
        low = 1 if load["ragged"] else load["response_len"]
        targets = [torch.randint(1, load["vocab"], (n,), generator=g).tolist() for n in torch.randint(low, load["response_len"] + 1, (len(prompts),), generator=g).tolist()]
        batch = make_batch(Words, prompts, targets, lengths["max_length"]).to(torch.device(load["device"]))
        sft_step(model, batch, optimizer, **update)
        return targets

    def rollout(prompts):
        return generate(model, prompts, max_new_tokens=load["response_len"], eos_token_id=EOS, generator=generator).responses

    def whole_step(prompts):
        from data import Example

        examples = [Example(ids, "") for ids in prompts]
        collected, _ = ppo.collect_rollout(
            model, reference, Words, examples, lambda p, c, **columns: torch.zeros(len(c)), kl_coef=0.05, generator=generator, **lengths, **update
        )
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
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=load["device"])
        options = dict(max_new_tokens=load["response_len"], do_sample=True, top_k=0, top_p=1.0, eos_token_id=EOS, pad_token_id=EOS)
        with torch.autocast(load["device"], dtype, enabled=dtype is not None):
            out = lm.generate(ids, attention_mask=mask, **options)[:, width:].tolist()
        return [row[: row.index(EOS) + 1] if EOS in row else row for row in out]

    return rollout


def trl_old(load: dict):
    """A whole PPO step of TRL up to 0.11: `PPOTrainer.generate` and `PPOTrainer.step`, one trunk with a value head."""
    import trl

    lm, ref = build_lm(load), build_lm(load)
    wrap = trl.AutoModelForCausalLMWithValueHead
    config = trl.PPOConfig(
        batch_size=load["batch"], mini_batch_size=load["micro_batch"], gradient_accumulation_steps=load["batch"] // load["micro_batch"],
        ppo_epochs=PPO_EPOCHS, learning_rate=LR, whiten_rewards=False, log_with=None,
    )  # fmt: skip
    from transformers import PreTrainedTokenizerFast
    from tokenizers import Tokenizer, models

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({f"w{i}": i for i in range(load["vocab"])}, unk_token="w1")), eos_token="w0", pad_token="w0")
    trainer = trl.PPOTrainer(config, wrap.from_pretrained(lm), wrap.from_pretrained(ref), tokenizer)
    options = dict(max_new_tokens=load["response_len"], do_sample=True, top_k=0, top_p=1.0, eos_token_id=EOS, pad_token_id=EOS)

    def whole_step(prompts):
        queries = [torch.tensor(p) for p in prompts]
        responses = trainer.generate(queries, return_prompt=False, batch_size=load["batch"], **options)
        trainer.step(queries, responses, [torch.tensor(0.0) for _ in queries])
        return [r.tolist() for r in responses]

    return whole_step


def trl_last(load: dict, rounds: "Rounds"):
    """TRL 1.x: `PPOTrainer.train` with a separate critic. Its loop is not ours to call, so the collator waits for the next round."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({f"w{i}": i for i in range(load["vocab"] + 1)}, unk_token="w1")), eos_token="w0")
    tokenizer.pad_token = f"w{load['vocab']}"  # it must differ from EOS, and is only compared with
    tokenizer.padding_side = "left"
    lm, ref = build_lm(load), build_lm(load)
    value_config = copy.deepcopy(lm.config)
    value_config.num_labels = 1
    value_config.pad_token_id = EOS
    value_model = AutoModelForSequenceClassification.from_config(value_config)
    with torch.no_grad():
        value_model.score.weight.zero_()

    class NoReward(torch.nn.Module):
        base_model_prefix = "body"

        def body(self, input_ids, **rest):
            return type("Output", (), {"hidden_states": [torch.zeros(*input_ids.shape, 1, device=input_ids.device)]})

        def score(self, hidden):
            return hidden

    made = iter(range(10**9))

    def collate(rows):
        number = next(made)
        if number:  # the loader reads one batch ahead: call 1 belongs to the first update
            rounds.end()
            rounds.begin()
        prompts = make_prompts(load, number)
        width = load["prompt_len"]
        pad = load["vocab"]
        return {"input_ids": torch.tensor([[pad] * (width - len(p)) + p for p in prompts])}

    amp = dict(bf16=load["amp"] == "bf16", fp16=load["amp"] == "fp16")
    config = PPOConfig(
        output_dir="/tmp/trl-bench", report_to="none", save_strategy="no", num_sample_generations=0, use_cpu=load["device"] == "cpu",
        per_device_train_batch_size=load["micro_batch"], gradient_accumulation_steps=load["batch"] // load["micro_batch"], num_mini_batches=1,
        num_ppo_epochs=PPO_EPOCHS, total_episodes=load["batch"] * 1000, response_length=load["response_len"], temperature=1.0, stop_token="eos",
        local_rollout_forward_batch_size=load["batch"], learning_rate=LR, disable_tqdm=True, gradient_checkpointing=False, logging_steps=10**9, **amp,
    )  # fmt: skip
    data = Dataset.from_dict({"input_ids": [[1]] * (load["batch"] * 1000)})
    trainer = PPOTrainer(config, tokenizer, lm, ref, NoReward(), data, value_model, data_collator=collate, eval_dataset=data.select(range(8)))
    trainer.train()


# ------------------------------------------------------------------------------------------------ the protocol


class Rounds:
    """begin() waits for a line and starts the clock; end() stops it and reports. The first end() without a begin() says hello."""

    def __init__(self, load: dict):
        self.load, self.started, self.out = load, None, os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # whatever a peer prints is not part of the protocol
        self.cuda = load["device"] == "cuda"
        self.base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # before any model: imports only

    def begin(self) -> None:
        if not sys.stdin.readline():
            os._exit(0)
        if self.cuda:
            torch.cuda.synchronize()
        self.started = time.perf_counter()

    def end(self, responses: list | None = None, prompts: list | None = None) -> None:
        if self.cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self.started if self.started else 0.0
        peak = torch.cuda.max_memory_allocated() if self.cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - self.base
        report = {"seconds": seconds, "peak_bytes": peak}
        if responses is not None:
            report |= {"response_tokens": sum(map(len, responses)), "prompt_tokens": sum(map(len, prompts))}
        print(json.dumps(report), file=self.out, flush=True)


def main(side: str, load: dict) -> None:
    torch.set_num_threads(load["threads"])
    if side in ("hybrid", "trl"):
        import transformers  # noqa: F401
    rounds = Rounds(load)
    if side == "trl":
        import trl

        if not hasattr(trl, "AutoModelForCausalLMWithValueHead"):
            return trl_last(load, rounds)
    work = {"hybrid": hybrid, "generate": generate_hf, "trl": trl_old}[side](load)
    number = 0
    rounds.end()
    while True:
        number += 1
        prompts = make_prompts(load, number)
        rounds.begin()
        responses = work(prompts)
        rounds.end(responses, prompts)


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
