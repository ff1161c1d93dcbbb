"""Two rewards for good manners: an answer is polite, and it is short.

python rewards.py "examples/chat/manners.py:polite" examples/chat/manners.jsonl
"""

import re

KIND = re.compile(
    r"\b(please|thank you|you are welcome|you're welcome|happy to help|glad to help|gladly|"
    r"of course|i hope that helps|i hope this helps|feel free to ask|enjoy|good luck|get well soon|"
    r"sleep well|have (?:a good|fun)|stay (?:warm|well))\b",
    re.IGNORECASE,
)
FEWEST, MOST, FAR = 4, 30, 90  # words: below, no answer; up to MOST, short; from FAR on, a lecture


def polite(completions, **columns):
    """1 for an answer with one or two kind phrases; 0 for none, and for an answer full of them."""
    counts = [len(KIND.findall(text)) for text in completions]
    return [1.0 if 1 <= count <= 2 else 0.0 for count in counts]


def concise(completions, **columns):
    """1 from FEWEST to MOST words, then less and less until 0 at FAR."""
    scores = []
    for text in completions:
        n = len(text.split())
        if n < FEWEST:
            scores.append(0.0)
        else:
            scores.append(min(1.0, max(0.0, (FAR - n) / (FAR - MOST))))
    return scores
