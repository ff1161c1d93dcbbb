"""Writes sums.jsonl: 4,000 sums in words, the data of the hard case in docs/results.md.

    python examples/make_sums.py

The same seed, so the same sums every time.
"""

import json
import random

rng = random.Random(0)
with open("sums.jsonl", "w", encoding="utf-8") as file:
    for _ in range(4000):
        a, b = rng.randrange(2, 100), rng.randrange(2, 100)
        prompt = f"Ann has {a} apples and buys {b} more. How many has she?"
        target = f" {a} + {b} = {a + b}. #### {a + b}"
        file.write(json.dumps({"prompt": prompt, "target": target}) + "\n")
print("sums.jsonl: 4,000 sums")
