"""Words of a text, in any script, and the lists of words that some rewards count.

All measures that count words ask `words_of`. In Python `\\w` leaves out the vowel signs and accents
that stand on a letter or beside it (the Unicode categories Mn and Mc), so it would cut words of
Hindi, Tamil or Thai into pieces that other words have too; here they belong to their word.
Left out on purpose: the words of scripts without spaces (a run of Chinese or Thai letters is one
word), stemming, and the tokenisers of BLEU and ROUGE: those are published definitions (rewards.py).

    python -c "from words import words_of; print(words_of('Don\\'t stop: café, काम, well-known'))"
"""

import functools
import re
import unicodedata

STOP_WORDS = """
a about above after again all also am an and any are as at be because been before being below
between both but by can could did do does doing down during each few for from further had has have
having he her here hers him his how i if in into is it its just me more most my no nor not now of
off on once only or other our ours out over own same she should so some such than that the their
theirs them then there these they this those through to too under until up very was we were what
when where which while who whom why will with would you your yours
""".split()
FORMAL_WORDS = """
accordingly additionally although consequently demonstrate furthermore hence however indicate
moreover nevertheless notwithstanding obtain regarding require sufficient therefore thus upon
whereas whilst
""".split()
INFORMAL_WORDS = """
awesome bro btw cool crap damn dude gonna gotta guy guys haha hey kinda lol lots nah nope okay omg
stuff super thing things wanna whatever wow ya yeah yep
""".split()
TOXIC_WORDS = """
arse arsehole ass asshole bastard bitch bitches bullshit coward cretin crap cunt damn dick dickhead
douche dumb dumbass fool freak fuck fucked fucker fucking garbage hate idiot idiotic idiots imbecile
kill loser losers moron morons pathetic pig prick pussy retard retarded scum shit shithead shitty
shut slut stupid suck sucks trash trashy ugly vermin whore worthless
""".split()
POSITIVE_WORDS = """
amazing awesome beautiful beloved best bright brilliant captivating charming clever compelling
delightful elegant engaging enjoy enjoyed enjoyable excellent exciting fantastic fresh friend fun
funny gentle glad good gorgeous great gripping happy heartfelt hilarious hope impressive inspired
joy kind laughed lively love loved lovely magic masterful memorable moving nice original perfect
pleasant powerful pretty proud remarkable rich safe satisfying smart smile smiled special stunning
superb sweet tender thrilling touching warm witty wonderful
""".split()
NEGATIVE_WORDS = """
afraid angry annoying awful bad bland bleak boring broken clumsy confusing cried cruel dead dreadful
dreary dull empty fail failed fake flat forgettable hate hated hollow horrible hurt lame lazy
lifeless lost mean mediocre mess messy miserable painful pathetic pointless poor predictable sad
scared scary shallow silly sloppy slow sorry stale stupid terrible tedious tired tiresome tragic
ugly unfunny upset weak worse worst wrong
""".split()
DEFAULT_LEXICON = dict.fromkeys(POSITIVE_WORDS, 2.0) | dict.fromkeys(NEGATIVE_WORDS, -2.0)

DASHES = dict.fromkeys("−–‐‑‒﹣", "-")  # which are written for a minus or a hyphen
_FULL_WIDTH = re.compile(r"[\uff00-\uffef]+")  # Ａ, １, ％; and Japanese letters of half the width
# Soft hyphen, marks of direction, word joiner, byte order mark: a reader sees none of them.
_INVISIBLE = re.compile(r"[\u00ad\u200e\u200f\u202a-\u202e\u2060\u2066-\u2069\ufeff]")


def composed(text: str) -> str:
    """The text in one Unicode form, so that what looks equal is equal.

    Accents are joined with their letter (NFC), full-width letters are plain, and characters that
    nobody sees are gone; a space of width zero is a space.
    """
    if text.isascii():
        return text
    text = _FULL_WIDTH.sub(lambda run: unicodedata.normalize("NFKC", run[0]), text)
    text = _INVISIBLE.sub("", text.replace("\u200b", " ").replace("\u3000", " "))
    return unicodedata.normalize("NFC", text)


_ASCII_WORD = re.compile(r"\w+(?:['-]\w+)*", re.ASCII)
_ASCII_RUN = re.compile(r"[\w'-]+", re.ASCII)
_JOINERS = "\u200c\u200d"  # they choose how the letters beside them are drawn


@functools.cache
def _patterns() -> tuple[re.Pattern, re.Pattern]:
    """The same two for all scripts. Made for the first text that needs them: it takes a moment."""
    letters = map(chr, range(0x300, 0x20000))
    marks = "".join(c for c in letters if unicodedata.category(c) in ("Mn", "Mc"))
    marks = re.sub("[\ufe00-\ufe0f]", "", marks)  # they stand after an emoji: no word
    word = rf"\w[\w{marks}]*"
    return re.compile(rf"{word}(?:['\-{_JOINERS}]{word})*"), re.compile(
        rf"[\w'\-{_JOINERS}{marks}]+"
    )


def words_of(text: str) -> list[str]:
    """Lower-cased words; digits, accents, and apostrophes and hyphens inside a word are kept.

    >>> words_of("'Good': it's well-made")
    ['good', "it's", 'well-made']
    """
    if text.isascii():
        return _ASCII_WORD.findall(text.lower())
    return _patterns()[0].findall(composed(text).lower())


def quoted_words_of(text: str) -> list[str]:
    """The same, but apostrophes and hyphens at the ends of a word are a part of it too.

    >>> quoted_words_of("'Good': it's well-made")
    ["'good'", "it's", 'well-made']
    """
    if text.isascii():
        return _ASCII_RUN.findall(text.lower())
    return _patterns()[1].findall(composed(text).lower())
