"""Talk to a checkpoint, or to any causal LM.

    python sample.py out/final "the movie was"
    python sample.py out/final              # one prompt a line from the keyboard, until Ctrl-D

Samples with our own sampler: temperature and nothing else. Left out on purpose: chat history, top-p.
"""

import argparse
import sys

import torch

from data import Example, decode, encode_prompt
from engine import UserError, pick_device
from generate import generate
from hybrid import HybridModel


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a checkpoint folder of ours, any Hugging Face folder, or a hub id")
    parser.add_argument("prompt", nargs="?", help="text to continue; without it, lines are read from the keyboard")
    parser.add_argument("-n", "--num-samples", type=int, default=3, help="completions per prompt")
    parser.add_argument("--temperature", type=float, default=1.0, help="divides the logits; 0 takes the most likely token")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="length limit of a completion")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same completions")
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    args = parser.parse_args(argv)
    try:
        if args.num_samples < 1 or args.max_new_tokens < 1 or not args.temperature >= 0:
            raise UserError("--num-samples and --max-new-tokens must be at least 1, --temperature at least 0")
        device = pick_device(args.device)
        model, tokenizer = HybridModel.load(args.model)
    except UserError as problem:
        print(f"error: {problem}", file=sys.stderr)
        raise SystemExit(2) from None
    model.to(device)
    generator = torch.Generator(device).manual_seed(args.seed)
    if args.prompt is None and sys.stdin.isatty():
        print("one prompt a line, Ctrl-D ends")
    for prompt in [args.prompt] if args.prompt is not None else (line.rstrip("\n") for line in sys.stdin):
        ids = encode_prompt(tokenizer, Example(prompt, ""))
        generation = generate(
            model,
            [ids] * args.num_samples,
            max_new_tokens=args.max_new_tokens,
            eos_token_id=tokenizer.eos_token_id,
            temperature=args.temperature,
            generator=generator,
        )
        for response in generation.responses:
            print(decode(tokenizer, ids + response).strip(), flush=True)


if __name__ == "__main__":
    main()
