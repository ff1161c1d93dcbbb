"""Train a reward model from human preferences: which of two responses to one prompt is better?

    P(chosen > rejected) = sigmoid(score(chosen) - score(rejected))                    (Bradley & Terry 1952; InstructGPT 2203.02155, eq. 1)

The score is one linear layer on the hidden state of the last real token of prompt + response. After one epoch it is calibrated to
mean 0 and standard deviation 1 over the training responses; the two numbers are saved in the model's config, and
`--reward 'model("PATH")'` reads them. The folder is a plain AutoModelForSequenceClassification(num_labels=1) that others can load.
Left out on purpose: ensembles, margins. One epoch is the default, since a reward model soon overfits.

    python reward_model.py --data prefs.jsonl --model gpt2 --out reward
    python train.py --reward 'model("reward")'
"""

import copy
import sys

import torch
import transformers
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from data import BatchStream, Example, Pair, load_pairs, split_examples
from engine import (
    Backend,
    Parser,
    UserError,
    apply_gradients,
    check_new_folder,
    first_line,
    number,
    one_line_errors,
    pick_device,
)
from judges import batched_logits, sequence_logits, tokenize
from lm import build_tiny, disable_dropout


def reward_model_loss(chosen_scores: torch.Tensor, rejected_scores: torch.Tensor) -> torch.Tensor:
    """-log sigmoid(chosen - rejected), averaged over the pairs (2203.02155, eq. 1 with K = 2). (B,), (B,) -> scalar, log 2 at equal scores."""
    return -torch.nn.functional.logsigmoid(chosen_scores - rejected_scores).mean()


def reward_model_step(
    model, batch: dict[str, torch.Tensor], optimizer, *, max_grad_norm: float = 1.0
) -> dict[str, float]:
    """One optimiser step on a tokenised batch whose first half is chosen and whose second half, in the same order, is rejected."""
    chosen, rejected = sequence_logits(model, **batch)[:, 0].chunk(2)  # (B,) each
    loss = reward_model_loss(chosen, rejected)
    loss.backward()
    stats = {"loss": float(loss), "accuracy": float((chosen > rejected).float().mean())}
    return stats | apply_gradients(Backend(model), optimizer, max_grad_norm)


def load_backbone(name: str, pairs: list[Pair], seed: int):
    """(sequence classifier with one score, tokenizer): `tiny` is built here, anything else is a folder or hub id."""
    torch.manual_seed(seed)
    if name == "tiny":
        lm, tokenizer = build_tiny(
            [text for pair in pairs for text in (pair.prompt + pair.chosen, pair.rejected)], seed
        )
        config = copy.deepcopy(lm.config)
        config.num_labels = 1
        model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
        model.base_model.load_state_dict(lm.base_model.state_dict())
    else:
        try:
            model = AutoModelForSequenceClassification.from_pretrained(
                name, num_labels=1, dtype=torch.float32, ignore_mismatched_sizes=True
            )
            tokenizer = AutoTokenizer.from_pretrained(name)
        except (
            OSError,
            ValueError,
            KeyError,
            TypeError,
            RuntimeError,
            ImportError,
            SafetensorError,
        ) as problem:
            raise UserError(
                f"--model {name} cannot be loaded as a classifier ({first_line(problem)}); give a folder, a hub id, or tiny"
            ) from None
    if hasattr(
        model, "score"
    ):  # decoders: the published initialisation of the head (Stiennon et al.; N+ details)
        torch.nn.init.normal_(model.score.weight, std=(model.score.weight.shape[1] + 1) ** -0.5)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    tokenizer.truncation_side, tokenizer.padding_side = "left", "right"
    disable_dropout(model)
    return model, tokenizer


def scores_of(model, tokenizer, pairs: list[Pair]) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores of the chosen and of the rejected responses, (N,) each: the same path that `--reward model(...)` takes."""
    model.eval()
    sides = (
        [pair.prompt + pair.chosen for pair in pairs],
        [pair.prompt + pair.rejected for pair in pairs],
    )
    chosen, rejected = (batched_logits(model, tokenizer, texts)[:, 0] for texts in sides)
    model.train()
    return chosen, rejected


@one_line_errors
def main(argv: list[str] | None = None) -> dict[str, float]:
    """Train, measure, calibrate, save. Returns the held-out numbers."""
    parser = Parser(__doc__.splitlines()[0])
    parser.add_argument(
        "--data",
        required=True,
        help="pairs: prompt, chosen, rejected, or chosen and rejected transcripts (Anthropic's format)",
    )
    parser.add_argument(
        "--model", default="tiny", help="backbone: 'tiny' (built here), a folder or a hub id"
    )
    parser.add_argument(
        "--out", default="reward", help="folder for the trained model; must not exist"
    )
    parser.add_argument("--epochs", type=number(int, 1), default=1, help="passes over the pairs")
    parser.add_argument(
        "--batch-size", type=number(int, 1), default=16, help="pairs per optimiser step"
    )
    parser.add_argument(
        "--lr",
        type=number(float, 0, above=True),
        help="peak learning rate, falling to 0 (default: 1e-3 for 'tiny', else 2e-5)",
    )
    parser.add_argument("--limit", type=number(int, 1), help="read at most N pairs")
    parser.add_argument("--encoding", default="utf-8", help="encoding of a local file")
    parser.add_argument(
        "--seed", type=number(int, 0, 2**32 - 2), default=0, help="of initialisation and order"
    )
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    args = parser.parse_args(argv)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()  # "newly initialized: score" is what we want here
    check_new_folder(args.out)
    device = pick_device(args.device)
    pairs = load_pairs(args.data, limit=args.limit, encoding=args.encoding)
    # Split by prompt, through the same hash as everything else: no prompt is on both sides. By the texts where that holds out too much: few prompts, or none.
    for key in (lambda pair: pair.prompt, lambda pair: f"{pair.chosen}\0{pair.rejected}"):
        train, held_out = (
            [e.columns["pair"] for e in side]
            for side in split_examples([Example(key(pair), "", {"pair": pair}) for pair in pairs])
        )
        if len(held_out) <= len(pairs) / 2:
            break
    model, tokenizer = load_backbone(args.model, train, args.seed)
    model.to(device).train()

    steps = max(1, args.epochs * len(train) // args.batch_size)
    lr = args.lr if args.lr is not None else 1e-3 if args.model == "tiny" else 2e-5
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, eps=1e-5, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    stream = BatchStream(train, min(args.batch_size, len(train)), args.seed)
    bar = tqdm(range(steps), desc="reward model", dynamic_ncols=True)
    for _ in bar:
        drawn = stream.next()
        texts = [pair.prompt + pair.chosen for pair in drawn] + [
            pair.prompt + pair.rejected for pair in drawn
        ]
        stats = reward_model_step(model, tokenize(tokenizer, model, texts), optimizer)
        scheduler.step()
        bar.set_postfix(
            loss=f"{stats['loss']:.3f}", accuracy=f"{stats['accuracy']:.2f}", refresh=False
        )

    calibration = torch.cat(scores_of(model, tokenizer, train))  # (2N,)
    model.config.reward_mean, model.config.reward_std = (
        float(calibration.mean()),
        float(calibration.std(unbiased=False).clamp(min=1e-6)),
    )
    chosen, rejected = scores_of(model, tokenizer, held_out)
    metrics = {
        "accuracy": float((chosen > rejected).float().mean()),
        "loss": float(reward_model_loss(chosen, rejected)),
        "margin": float((chosen - rejected).mean() / model.config.reward_std),
        "pairs": float(len(held_out)),
    }
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    print(
        f"held-out pairs {len(held_out)}: accuracy {metrics['accuracy']:.3f}, loss {metrics['loss']:.3f} (0.693 is guessing); model in {args.out}"
    )
    return metrics


if __name__ == "__main__":
    main(sys.argv[1:])
