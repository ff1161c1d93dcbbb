"""Talk to a checkpoint, or to any causal LM.

    python sample.py out/final "the movie was"
    python sample.py out/final              # one prompt a line from the keyboard, until Ctrl-D

Samples with our own sampler: temperature and nothing else. Left out on purpose: chat history, top-p.
"""

import sys

import torch
import transformers

from data import Example, decode, encode_prompt
from engine import Parser, number, one_line_errors, pick_device
from generate import generate
from hybrid import HybridModel


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__.splitlines()[0])
    parser.add_argument(
        "model", help="a checkpoint folder of ours, any Hugging Face folder, or a hub id"
    )
    parser.add_argument(
        "prompt", nargs="?", help="text to continue; without it, lines are read from the keyboard"
    )
    parser.add_argument(
        "-n", "--num-samples", type=number(int, 1), default=3, help="completions per prompt"
    )
    parser.add_argument(
        "--temperature",
        type=number(float, 0),
        default=1.0,
        help="divides the logits; 0 takes the most likely token",
    )
    parser.add_argument(
        "--max-new-tokens", type=number(int, 1), default=64, help="length limit of a completion"
    )
    parser.add_argument(
        "--seed",
        type=number(int, 0, 2**63 - 1),
        default=0,
        help="the same seed gives the same completions",
    )
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    args = parser.parse_args(argv)
    transformers.utils.logging.disable_progress_bar()
    device = pick_device(args.device)
    model, tokenizer = HybridModel.load(args.model)
    model.to(device)
    max_new_tokens = min(args.max_new_tokens, model.max_positions - 1)
    generator = torch.Generator(device).manual_seed(args.seed)
    sys.stdin.reconfigure(errors="replace")
    if args.prompt is None and sys.stdin.isatty():
        print("one prompt a line, Ctrl-D ends")
    for prompt in (
        [args.prompt] if args.prompt is not None else (line.rstrip("\n") for line in sys.stdin)
    ):
        ids = encode_prompt(tokenizer, Example(prompt, ""))[
            -(model.max_positions - max_new_tokens) :
        ]
        generation = generate(
            model,
            [ids] * args.num_samples,
            max_new_tokens=max_new_tokens,
            eos_token_id=tokenizer.eos_token_id,
            temperature=max(args.temperature, 1e-3)
            if args.temperature
            else 0,  # below that, rounding decides anyway
            generator=generator,
        )
        for response in generation.responses:
            print(decode(tokenizer, ids + response).strip(), flush=True)


if __name__ == "__main__":
    main()
