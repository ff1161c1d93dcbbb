"""Talk to a checkpoint, or to any causal LM; or let it continue a text.

    python sample.py out/final "the movie was"
    python sample.py out/final --beside gpt2   # lines from the keyboard, two models, until Ctrl-D

A model with a chat template is asked through it and remembers the conversation (`/reset` forgets
it); any other, and every one with --raw, continues the text. The sampler is that of training: a
temperature and nothing else. Left out on purpose: top-p, penalties.
"""

import sys

import torch
import transformers

from chat import cut_prompt, decode, encode_prompt, end_ids
from engine import Parser, UserError, number, one_line_errors, pick_device
from flags import json_object
from generate import generate
from hybrid import HybridModel
from sources import Example

RESET = "/reset"


class Speaker:
    """A model, how it is sampled, and the conversation with it so far."""

    def __init__(self, name: str, args):
        self.name, self.args = name, args
        self.model, self.tokenizer = HybridModel.load(name)
        self.device = pick_device(args.device)
        self.model.to(self.device)
        self.generator = torch.Generator(self.device).manual_seed(args.seed)
        self.is_chat = bool(self.tokenizer.chat_template) and not args.raw
        if args.system and not self.is_chat:
            raise UserError(f"--system needs a chat template, and {name} is asked without one")
        self.reset()

    def reset(self) -> None:
        """Forget what was said."""
        self.messages = []
        if self.args.system:
            self.messages.append({"role": "system", "content": self.args.system})

    def answer(self, prompt: str) -> list[str]:
        """Responses to the prompt; the conversation goes on with the first of them.

        Raises UserError where the chat template refuses the conversation.
        """
        example = Example(prompt, "")
        if self.is_chat:
            messages = [*self.messages, {"role": "user", "content": prompt}]
            arguments = self.args.template_args or {}
            example = Example(prompt, "", messages=messages, template_args=arguments)
        context, asked = self.model.max_positions, self.args.max_new_tokens
        ids = encode_prompt(self.tokenizer, example)
        ids = cut_prompt(self.tokenizer, example, ids, max(context - asked, context // 2))
        max_new_tokens = min(asked, context - len(ids))
        temperature = self.args.temperature
        if temperature > 0:
            temperature = max(temperature, 1e-3)  # below that, rounding errors decide
        n_samples = self.args.num_samples or (1 if self.is_chat else 3)
        generation = generate(
            self.model,
            [ids] * n_samples,
            max_new_tokens=max_new_tokens,
            eos_token_id=end_ids(self.tokenizer, self.model.lm),
            temperature=temperature,
            generator=self.generator,
        )
        if not self.is_chat:
            return [decode(self.tokenizer, ids + r).strip() for r in generation.responses]
        answers = [decode(self.tokenizer, response) for response in generation.responses]
        self.messages = [*messages, {"role": "assistant", "content": answers[0]}]
        return [answer.strip() for answer in answers]


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__.splitlines()[0])
    add, count = parser.add_argument, number(int, 1)
    add("model", help="a checkpoint of train.py, any Hugging Face folder, or a hub id")
    add("prompt", nargs="?", help="what to say, or to continue (default: lines from the keyboard)")
    add("--beside", metavar="OTHER", help="a second model, which answers the same")
    add("--raw", action="store_true", help="continue the text, without the chat template")
    add("--system", help="system turn of the conversation")
    what = 'a JSON object for the chat template, such as {"enable_thinking": false}'
    add("--template-args", type=json_object, metavar="JSON", help=what)
    what = "responses to each prompt (default: 1 in a conversation, else 3)"
    add("-n", "--num-samples", type=count, help=what)
    what = "divides the logits; 0 takes the most likely token"
    add("--temperature", type=number(float, 0), default=1.0, help=what)
    add("--max-new-tokens", type=count, help="length limit (default: 256 in a conversation, or 64)")
    what = "the same seed gives the same responses"
    add("--seed", type=number(int, 0, 2**63 - 1), default=0, help=what)
    add("--device", default="auto", help="auto, cuda, mps or cpu")
    args = parser.parse_args(argv)
    transformers.utils.logging.disable_progress_bar()
    speakers = [Speaker(args.model, args)]
    if args.beside is not None:
        speakers.append(Speaker(args.beside, args))
    if args.max_new_tokens is None:
        args.max_new_tokens = 256 if speakers[0].is_chat else 64
    sys.stdin.reconfigure(errors="replace")
    prompts = [args.prompt]
    if args.prompt is None:
        prompts = (line.rstrip("\n") for line in sys.stdin)
        if sys.stdin.isatty():
            print(f"one prompt a line, {RESET} forgets what was said, Ctrl-D ends")
    for prompt in prompts:
        for speaker in speakers:
            if prompt.strip() == RESET:
                speaker.reset()
                continue
            label = f"[{speaker.name}] " if len(speakers) > 1 else ""
            for answer in speaker.answer(prompt):
                print(f"{label}{answer}", flush=True)


if __name__ == "__main__":
    main()
