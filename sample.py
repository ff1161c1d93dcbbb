"""Sample completions from a checkpoint, or from any causal LM.

    python sample.py out/final "the movie was"
    python sample.py out/final              # one prompt a line from the keyboard, until Ctrl-D

The sampler is that of training: a temperature and nothing else. Left out on purpose: chat history,
top-p.
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
    add, count = parser.add_argument, number(int, 1)
    add("model", help="a checkpoint of train.py, any Hugging Face folder, or a hub id")
    add("prompt", nargs="?", help="text to continue (default: lines from the keyboard)")
    add("-n", "--num-samples", type=count, default=3, help="completions per prompt")
    what = "divides the logits; 0 takes the most likely token"
    add("--temperature", type=number(float, 0), default=1.0, help=what)
    add("--max-new-tokens", type=count, default=64, help="length limit of a completion")
    what = "the same seed gives the same completions"
    add("--seed", type=number(int, 0, 2**63 - 1), default=0, help=what)
    add("--device", default="auto", help="auto, cuda, mps or cpu")
    args = parser.parse_args(argv)
    transformers.utils.logging.disable_progress_bar()
    device = pick_device(args.device)
    model, tokenizer = HybridModel.load(args.model)
    model.to(device)
    max_new_tokens = min(args.max_new_tokens, model.max_positions - 1)
    longest_prompt = model.max_positions - max_new_tokens
    temperature = args.temperature
    if temperature > 0:
        temperature = max(temperature, 1e-3)  # below that, rounding errors decide
    generator = torch.Generator(device).manual_seed(args.seed)
    sys.stdin.reconfigure(errors="replace")
    prompts = [args.prompt]
    if args.prompt is None:
        prompts = (line.rstrip("\n") for line in sys.stdin)
        if sys.stdin.isatty():
            print("one prompt a line, Ctrl-D ends")
    for prompt in prompts:
        ids = encode_prompt(tokenizer, Example(prompt, ""))[-longest_prompt:]
        generation = generate(
            model,
            [ids] * args.num_samples,
            max_new_tokens=max_new_tokens,
            eos_token_id=tokenizer.eos_token_id,
            temperature=temperature,
            generator=generator,
        )
        for response in generation.responses:
            print(decode(tokenizer, ids + response).strip(), flush=True)


if __name__ == "__main__":
    main()
