"""Plain text with real statistics: a small invented English with topics, agreement and recall.

Content words are invented (syllables, seeded), function words and grammar are English. A
paragraph has a topic (which words are common), a tense, and a cast of named characters whose
pronouns and possessions stay theirs; verbs choose their objects; words follow Zipf's law.
So there is something to learn at every range, from spelling to who owns what.
"""

from dataclasses import dataclass
from typing import TypeVar

import numpy as np

T = TypeVar("T")

_SYLLABLES = (
    "b br c cl d dr f fl g gr h k l m n p pl r s sh sl st t th tr v w",  # onsets
    "a e i o u ai ea oo",  # vowels
    "b d g k l m n nd p r rk rn sk st t",  # codas
)
_LEXICON_SEED = 20_240_229
_TOPICS = 8
_NOUNS, _VERBS, _ADJECTIVES, _ADVERBS, _NAMES = 220, 110, 90, 30, 48
_PLACES = ("under", "near", "behind", "beside", "inside", "above", "beyond", "around")
_PRONOUNS = (("he", "him", "his"), ("she", "her", "her"))
_NUMBERS = ("two", "three", "four", "five", "six", "seven")


@dataclass(frozen=True)
class Verb:
    """A verb with the nouns that it takes as objects."""

    stem: str
    objects: tuple[str, ...]

    def inflect(self, past: bool, plural: bool) -> str:
        """Past tense, or present in agreement with the subject."""
        if past:
            return self.stem + "ed"
        return self.stem if plural else self.stem + "s"


@dataclass(frozen=True)
class Lexicon:
    """The words of the language; the order inside each topic is the order of frequency."""

    nouns: tuple[tuple[str, ...], ...]
    verbs: tuple[tuple[Verb, ...], ...]
    adjectives: tuple[tuple[str, ...], ...]
    adverbs: tuple[str, ...]
    names: tuple[str, ...]


def _stems(rng: np.random.Generator, count: int, taken: set[str]) -> list[str]:
    """Invent `count` words of one or two syllables that nobody took before."""
    onsets, vowels, codas = (part.split() for part in _SYLLABLES)
    words: list[str] = []
    while len(words) < count:
        word = ""
        for _ in range(1 + int(rng.random() < 0.45)):
            word += onsets[rng.integers(len(onsets))] + vowels[rng.integers(len(vowels))]
        word += codas[rng.integers(len(codas))]
        if len(word) > 3 and word not in taken:
            taken.add(word)
            words.append(word)
    return words


def make_lexicon() -> Lexicon:
    """The lexicon of the language: always the same one."""
    rng = np.random.default_rng(_LEXICON_SEED)
    taken: set[str] = set()
    nouns = _stems(rng, _NOUNS, taken)
    verbs = [
        Verb(stem, tuple(str(n) for n in rng.permutation(nouns)[:8]))
        for stem in _stems(rng, _VERBS, taken)
    ]
    adjectives = [word + "y" for word in _stems(rng, _ADJECTIVES, taken)]
    adverbs = tuple(word + "ly" for word in _stems(rng, _ADVERBS, taken))
    names = tuple(word.capitalize() for word in _stems(rng, _NAMES, taken))

    def by_topic(words: list[T]) -> tuple[tuple[T, ...], ...]:
        orders = [rng.permutation(len(words)) for _ in range(_TOPICS)]
        return tuple(tuple(words[i] for i in order) for order in orders)

    return Lexicon(by_topic(nouns), by_topic(verbs), by_topic(adjectives), adverbs, names)


@dataclass
class Paragraph:
    """A paragraph in the making: what its next sentence may refer to."""

    lexicon: Lexicon
    rng: np.random.Generator
    topic: int
    past: bool
    cast: list[tuple[str, tuple[str, str, str]]]
    owned: dict[str, str]
    focus: str = ""

    def zipf(self, words: tuple[T, ...]) -> T:
        """Draw a word by rank: p(rank) ~ 1 / (rank + 1.5)."""
        span = np.log((len(words) + 1.5) / 1.5)
        rank = int(1.5 * np.exp(self.rng.random() * span) - 1.5)
        return words[min(rank, len(words) - 1)]

    def noun(self) -> str:
        return self.zipf(self.lexicon.nouns[self.topic])

    def noun_phrase(self, head: str | None = None) -> tuple[str, bool]:
        """A noun phrase and whether it is plural."""
        head = head or self.noun()
        described = self.rng.random() < 0.4
        adjective = self.zipf(self.lexicon.adjectives[self.topic]) + " " if described else ""
        draw = self.rng.random()
        if draw < 0.5:
            return f"the {adjective}{head}", False
        if draw < 0.75:
            return f"a {adjective}{head}", False
        many = "some" if draw < 0.85 else _NUMBERS[self.rng.integers(len(_NUMBERS))]
        return f"{many} {adjective}{head}s", True

    def place(self) -> str:
        return f"{_PLACES[self.rng.integers(len(_PLACES))]} {self.noun_phrase()[0]}"

    def character(self) -> tuple[str, str]:
        """A character as a subject (a pronoun when it acts again) and its possessive."""
        name, (subject, _, possessive) = self.cast[self.rng.integers(len(self.cast))]
        again, self.focus = name == self.focus, name
        return (subject if again else name), possessive

    def object_of(self, verb: Verb, possessive: str) -> str:
        """What a verb acts on: mostly one of its own nouns, sometimes a possession."""
        draw = self.rng.random()
        if draw < 0.3:
            return f"{possessive} {self.owned[self.focus]}"
        if draw < 0.4:
            others = [p for p in self.cast if p[0] != self.focus]
            return others[self.rng.integers(len(others))][0]
        return self.noun_phrase(self.zipf(verb.objects))[0]

    def sentence(self) -> str:
        """The next sentence, capitalised and with its full stop."""
        rng, verb = self.rng, self.zipf(self.lexicon.verbs[self.topic])
        tail = f" {self.place()}" if rng.random() < 0.25 else ""
        adverb = f" {self.zipf(self.lexicon.adverbs)}" if rng.random() < 0.2 else ""
        draw = rng.random()
        if draw < 0.55:
            subject, possessive = self.character()
            act = verb.inflect(self.past, plural=False)
            text = f"{subject}{adverb} {act} {self.object_of(verb, possessive)}{tail}"
        elif draw < 0.75:
            subject, plural = self.noun_phrase()
            be = ("were" if plural else "was") if self.past else ("are" if plural else "is")
            text = f"{subject} {be} {self.zipf(self.lexicon.adjectives[self.topic])}{tail}"
        elif draw < 0.9:
            subject, plural = self.noun_phrase()
            text = f"{subject} {verb.inflect(self.past, plural)}{adverb} {self.place()}"
        else:
            there = "there " + ("was" if self.past else "is")
            text = f"{there} a {self.noun()} {self.place()}"
        return text[0].upper() + text[1:] + "."


def _paragraph(lexicon: Lexicon, rng: np.random.Generator) -> str:
    """A paragraph of 5 to 12 sentences: the cast and its possessions, then what happens."""
    names = [str(n) for n in rng.permutation(lexicon.names)[:2]]
    cast = [(name, _PRONOUNS[lexicon.names.index(name) % 2]) for name in names]
    story = Paragraph(lexicon, rng, int(rng.integers(_TOPICS)), bool(rng.random() < 0.5), cast, {})
    sentences = []
    for name in names:
        story.owned[name] = story.noun()
        had = "had" if story.past else "has"
        sentences.append(f"{name} {had} a {story.owned[name]}.")
    sentences += [story.sentence() for _ in range(int(rng.integers(5, 13)))]
    return " ".join(sentences)


def write_text(seed: int, characters: int) -> str:
    """Paragraphs, one to a line, until at least `characters` are written."""
    lexicon, rng = make_lexicon(), np.random.default_rng(seed)
    lines: list[str] = []
    length = 0
    while length < characters:
        lines.append(_paragraph(lexicon, rng))
        length += len(lines[-1]) + 1
    return "\n".join(lines) + "\n"
