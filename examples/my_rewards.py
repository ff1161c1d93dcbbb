"""Two rewards of your own.

    python rewards.py "examples/my_rewards.py:politeness" examples/scored.jsonl

docs/rewards.md says what a reward function gets and what it returns.
"""


def politeness(prompts, completions, **columns):
    return [1.0 if "please" in text.lower() else 0.0 for text in completions]


def about_acting(prompts, completions, **columns):
    """For the built-in film reviews: does the text speak about acting or the cast?"""
    return [1.0 if "acting" in text or "cast" in text else 0.0 for text in completions]
