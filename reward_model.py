"""Train a reward model from human preferences: which of two responses to one prompt is better?

    P(chosen > rejected) = sigmoid(score(chosen) - score(rejected))    Bradley & Terry 1952;
                                                                       InstructGPT 2203.02155, eq. 1

The score is one linear layer on the hidden state of the last token of prompt and response, which
the chat template of the model writes, if it has one; else they are one text. After training, this
form is saved in the model's config, with the mean and the standard deviation of the scores of the
training responses: `--reward 'model("PATH")'` reads in this form and gives scores of mean 0 and
deviation 1. The folder is a plain AutoModelForSequenceClassification(num_labels=1) that others can
load.
Left out on purpose: ensembles, margins. One epoch is the default: a reward model soon overfits.

    python reward_model.py --data examples/prefs.jsonl --model gpt2 --out reward
    python train.py --reward 'model("reward")'
"""

import copy
import sys

import torch
import transformers
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import survey
from classifiers import HOW, Scorer, input_form, prepare_tokenizer, sequence_logits
from cli import bar_pace
from data import BatchStream, Pair, load_pairs, split_pairs
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
from lm import UNLOADABLE, WITH_REPORT, build_tiny, check_no_adapter, check_weights, disable_dropout


def reward_model_loss(chosen_scores: torch.Tensor, rejected_scores: torch.Tensor) -> torch.Tensor:
    """-log sigmoid(chosen - rejected), (B,) each -> mean over pairs (2203.02155, eq. 1, K = 2)."""
    return -torch.nn.functional.logsigmoid(chosen_scores - rejected_scores).mean()


def reward_model_step(
    model, batch: dict[str, torch.Tensor], optimizer, *, max_grad_norm: float = 1.0
) -> dict[str, float]:
    """One update on a tokenised batch: all chosen texts, then all rejected ones in that order."""
    chosen, rejected = sequence_logits(model, **batch)[:, 0].chunk(2)  # (B,) each
    loss = reward_model_loss(chosen, rejected)
    loss.backward()
    stats = {"loss": loss.item(), "accuracy": float((chosen > rejected).float().mean())}
    return stats | apply_gradients(Backend(model), optimizer, max_grad_norm)


def load_backbone(name: str, pairs: list[Pair], seed: int):
    """`tiny`, a folder or a hub id -> a sequence classifier with one score, and its tokenizer."""
    torch.manual_seed(seed)
    if name == "tiny":
        model, tokenizer = tiny_classifier(pairs, seed)
    else:
        check_no_adapter(f"--model {name}", name)
        load = AutoModelForSequenceClassification.from_pretrained
        try:
            model, report = load(name, num_labels=1, **WITH_REPORT)
            tokenizer = AutoTokenizer.from_pretrained(name)
        except UNLOADABLE as problem:
            raise UserError(
                f"--model {name} cannot be loaded as a classifier ({first_line(problem)}); "
                "give a folder, a hub id, or tiny"
            ) from None
        check_weights(f"--model {name}", model, report, other_head=True, new_head=True)
    if hasattr(model, "score"):
        # The initialisation of a decoder's head (Stiennon et al. 2009.01325; N+ 2403.17031).
        torch.nn.init.normal_(model.score.weight, std=(model.score.weight.shape[1] + 1) ** -0.5)
    prepare_tokenizer(tokenizer)
    model.config.pad_token_id = tokenizer.pad_token_id
    disable_dropout(model)
    return model, tokenizer


def tiny_classifier(pairs: list[Pair], seed: int):
    """The `tiny` model of train.py, its vocabulary from these pairs, with one score as output."""
    texts = [text for pair in pairs for text in (pair.prompt + pair.chosen, pair.rejected)]
    lm, tokenizer = build_tiny(texts, seed)
    config = copy.deepcopy(lm.config)
    config.num_labels = 1
    model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    model.base_model.load_state_dict(lm.base_model.state_dict())
    return model, tokenizer


def sides_of(scorer: Scorer, pairs: list[Pair]) -> tuple[list, list]:
    """-> prompts and responses, as `scorer.batch` wants them: all chosen, then all rejected."""
    sides = zip(*[pair.sides() for pair in pairs])
    parts = [scorer.parts(example) for side in sides for example in side]
    return [prompt for prompt, _ in parts], [response for _, response in parts]


def readable(scorer: Scorer, pairs: list[Pair]) -> list[Pair]:
    """The pairs that the chat template writes; a note counts the others. UserError if none is."""

    def check(pair: Pair) -> None:
        try:
            for prompt, response in zip(*sides_of(scorer, [pair])):
                scorer.text(prompt, response)
        except UserError as problem:
            raise UserError(f"{pair.place}: {problem}") from None

    def say(text: str) -> None:
        print(text, file=sys.stderr)

    return survey.kept(pairs, check, False, say)


def scores_of(scorer: Scorer, pairs: list[Pair]) -> tuple[torch.Tensor, torch.Tensor]:
    """Raw scores of the chosen and rejected responses, (N,) each, as `--reward model(...)`."""
    scorer.model.eval()
    scores = scorer.scores(*sides_of(scorer, pairs))  # (2N,)
    scorer.model.train()
    return scores.chunk(2)


def fit(scorer: Scorer, pairs: list[Pair], args) -> None:
    """`--epochs` passes over the pairs with AdamW; the learning rate falls to 0."""
    model = scorer.model
    steps = max(1, args.epochs * len(pairs) // args.batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, eps=1e-5, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    stream = BatchStream(pairs, min(args.batch_size, len(pairs)), args.seed)
    bar = tqdm(range(steps), desc="reward model", dynamic_ncols=True, mininterval=bar_pace())
    for _ in bar:
        batch = scorer.batch(*sides_of(scorer, stream.next()))
        stats = reward_model_step(model, batch, optimizer)
        scheduler.step()
        loss, accuracy = f"{stats['loss']:.3f}", f"{stats['accuracy']:.2f}"
        bar.set_postfix(loss=loss, accuracy=accuracy, refresh=False)


@one_line_errors
def main(argv: list[str] | None = None) -> dict[str, float]:
    """Train, calibrate, measure, save. Returns the held-out numbers."""
    parser = Parser(__doc__.splitlines()[0])
    add, count, positive = parser.add_argument, number(int, 1), number(float, 0, above=True)
    what = "prompt, chosen, rejected; or chosen and rejected transcripts (Anthropic's format)"
    add("--data", required=True, help=f"pairs: {what}")
    add("--model", default="tiny", help="'tiny' (built here), a folder or a hub id")
    add("--out", default="reward", help="folder for the trained model; must not exist")
    add("--epochs", type=count, default=1, help="passes over the pairs")
    add("--batch-size", type=count, default=16, help="pairs of one update")
    add("--lr", type=positive, help="peak learning rate (default: 1e-3 for 'tiny', else 2e-5)")
    add("--limit", type=count, help="read at most N pairs")
    add("--encoding", default="utf-8", help="encoding of a local file")
    add("--seed", type=number(int, 0, 2**32 - 2), default=0, help="of initial weights and order")
    add("--device", default="auto", help="auto, cuda, mps or cpu")
    args = parser.parse_args(argv)
    if args.lr is None:
        args.lr = 1e-3 if args.model == "tiny" else 2e-5
    transformers.utils.logging.disable_progress_bar()
    # No warning "newly initialized: score": that is intended.
    transformers.utils.logging.set_verbosity_error()
    check_new_folder(args.out)
    device = pick_device(args.device)
    pairs = load_pairs(args.data, limit=args.limit, encoding=args.encoding)
    model, tokenizer = load_backbone(args.model, split_pairs(pairs)[0], args.seed)
    name = f"--model {args.model}"
    # An encoder learns to read one text here.
    scorer = Scorer(name, model, tokenizer, input_form(name, model, tokenizer, pair=False))
    print(f"{name} reads prompts and responses {HOW[scorer.form]}")
    train, held_out = split_pairs(readable(scorer, pairs))
    model.to(device).train()
    fit(scorer, train, args)

    scores = torch.cat(scores_of(scorer, train)).double()  # (2N,)
    model.config.reward_input = scorer.form
    model.config.reward_mean = float(scores.mean())
    # However small, a spread is one: only scores that are all the same have none.
    model.config.reward_std = float(scores.std(unbiased=False)) or 1.0
    chosen, rejected = scores_of(scorer, held_out)
    metrics = {
        "accuracy": float((chosen > rejected).float().mean()),
        "loss": float(reward_model_loss(chosen, rejected)),
        "margin": float((chosen - rejected).mean() / model.config.reward_std),
        "pairs": float(len(held_out)),
    }
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    print(
        f"held-out pairs {len(held_out)}: accuracy {metrics['accuracy']:.3f}, "
        f"loss {metrics['loss']:.3f} (0.693 is guessing); model in {args.out}"
    )
    return metrics


if __name__ == "__main__":
    main(sys.argv[1:])
