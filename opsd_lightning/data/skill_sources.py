"""Sources that measure skills beside the one that is trained: facts, forms of answers, and everyday stories."""

from __future__ import annotations

import json
import random
from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

from opsd_lightning.data import fact_items, format_items
from opsd_lightning.data.sources import ExampleSource
from opsd_lightning.data.story_items import PEOPLE, situations
from opsd_lightning.types import ConfigError, Example, PositiveInt, checked

_OPTIONS = 4


@checked
class SkillSource(ExampleSource):
    """Base class of sources with a fixed number of items, in an order that the seed gives.

    Args:
        size: Number of examples, at least 1.
        seed: Seed of the choice and the order of items, and of all that varies within an item.
    """

    def __init__(self, size: PositiveInt = 320, seed: int = 0) -> None:
        self.size, self.seed = size, seed

    @abstractmethod
    def items(self) -> list[Callable[[random.Random], Example]]:
        """Return a function for each item that makes its example from random numbers."""

    def examples(self) -> list[Example]:
        items = self.items()
        if self.size > len(items):
            name = type(self).__name__
            raise ConfigError(
                f"{name} has {len(items)} examples, not {self.size}", "size", f"Set it to {len(items)} or less"
            )
        numbers = random.Random(f"{type(self).__name__} {self.seed}")
        return [make(numbers) for make in numbers.sample(items, self.size)]


class CommonFacts(SkillSource):
    """Questions about facts that everybody knows, with four options, such as capitals, opposites and jobs.

    The question does not name the options, so that they can be scored as answers to it. The columns are ``options`` (four
    texts) and ``kind``. The answer is the text of the right option, which `ChoiceGrader` reads too.

    Args:
        size: Number of distinct questions, from 1 to 491.
        seed: Seed of the choice and the order of questions, and of their wrong options.
        show_options: If True, the question ends with the options, for answers by generation.

    Example::

        >>> from opsd_lightning import CommonFacts
        >>> (example,) = CommonFacts(size=1).examples()
        >>> example.question, example.columns["options"], example.answer
        ('What color is a raven?', ['pink', 'black', 'purple', 'yellow'], 'black')
    """

    def __init__(self, size: PositiveInt = 320, seed: int = 0, show_options: bool = False) -> None:
        super().__init__(size, seed)
        self.show_options = show_options

    def items(self) -> list[Callable[[random.Random], Example]]:
        def item(name: str, kind: fact_items.FactKind, key: str, right: str) -> Callable[[random.Random], Example]:
            def make(numbers: random.Random) -> Example:
                options = [right, *numbers.sample(kind.wrong_answers(right), _OPTIONS - 1)]
                numbers.shuffle(options)
                question = kind.question.format(key)
                if self.show_options:
                    question += "".join(f"\n{letter}) {option}" for letter, option in zip("ABCD", options, strict=True))
                return Example(question, right, right, {"options": options, "kind": name})

            return make

        return [item(name, kind, *pair) for name, kind in fact_items.KINDS.items() for pair in kind.pairs()]


class StoryContinuations(SkillSource):
    """Beginnings of everyday stories with four endings, of which one fits, in the manner of HellaSwag.

    The question is the beginning, two sentences. The columns are ``options`` (four endings of one sentence), ``kind`` (the
    first topic of the situation) and ``situation`` (its number). The answer is the right ending. Wrong endings come from
    situations of other topics, with the same person, the same kind of subject and about the same length. There are 139
    situations with three words to fill in each, so that up to three examples share a situation and its ending.

    Args:
        size: Number of distinct beginnings, from 1 to 417.
        seed: Seed of the choice and the order of beginnings, of names and of wrong endings.

    Example::

        >>> from opsd_lightning import StoryContinuations
        >>> (example,) = StoryContinuations(size=1).examples()
        >>> print(example.question, example.answer)
        Adam dropped a plate on the kitchen floor. It broke into many pieces. He swept up the pieces with a broom.
    """

    def items(self) -> list[Callable[[random.Random], Example]]:
        every = situations()

        def item(place: int, word: str) -> Callable[[random.Random], Example]:
            def make(numbers: random.Random) -> Example:
                situation, person = every[place], numbers.choice(PEOPLE)._asdict()
                right = situation.ending.format(**person)
                others = [each for each in every if each.alike(situation) and not each.topics & situation.topics]
                endings = [each.ending.format(**person) for each in numbers.sample(others, 12)]
                endings.sort(key=lambda ending: abs(len(ending) - len(right)))
                options = [right, *endings[: _OPTIONS - 1]]
                numbers.shuffle(options)
                beginning = situation.beginning.format(x=word, **person)
                kind = situation.kind
                columns = {"options": options, "kind": kind, "situation": place}
                return Example(beginning, right, right, columns)

            return make

        return [item(place, word) for place, situation in enumerate(every) for word in situation.words]


class FormatInstructions(SkillSource):
    """Instructions about the form of a short answer, such as the number of words. Grade them with `FormatGrader`.

    The columns are ``form`` (the form and its arguments, for the grader) and ``kind``. The trace is an
    answer of that form. There is no reference answer, since many are right. 32 new tokens are enough.

    Args:
        size: Number of distinct instructions, from 1 to 396.
        seed: Seed of the choice and the order of instructions.

    Example::

        >>> from opsd_lightning import FormatInstructions
        >>> (example,) = FormatInstructions(size=1).examples()
        >>> example.question, example.trace, example.columns["form"]
        ('Write a short sentence that begins with the word "Finally".', 'Finally the rain stopped.',
        {'kind': 'begins', 'texts': ['Finally']})
    """

    def items(self) -> list[Callable[[random.Random], Example]]:
        def item(kind: str, question: str, trace: str, form: dict[str, Any]) -> Callable[[random.Random], Example]:
            return lambda numbers: Example(question, trace, "", {"form": form, "kind": kind})

        return [item(*each) for each in _instructions()]


def _instructions() -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    """Yield instructions, each with its kind, an answer and its form."""
    counts = {2: "two", 3: "three"}
    for sentence, topic, words in format_items.SENTENCES:
        yield "repetition", f"Repeat this sentence exactly: {sentence}", sentence, {"kind": "repeats", "text": sentence}
        question = f'Write a short sentence that ends with the word "{words[1]}".'
        yield "last word", question, sentence, {"kind": "ends", "word": words[1]}
        question = f'Write a short sentence about {topic} with the word "{words[1]}".'
        yield "a word", question, sentence, {"kind": "contains", "words": words[1:]}
    for word, sentence in format_items.BEGINNINGS.items():
        question = f'Write a short sentence that begins with the word "{word}".'
        yield "first word", question, sentence, {"kind": "begins", "texts": [word]}
    for question, answer in format_items.YES_OR_NO.items():
        form = {"kind": "begins", "texts": ["Yes", "No"]}
        trace = {"Yes": "Yes, of course.", "No": "No, of course not."}[answer]
        yield "yes or no", f'{question}? Begin your answer with "Yes" or "No".', trace, form
    for person, sentence in format_items.LETTERS.items():
        question = f'Write the first sentence of a letter. Begin with "Dear {person}".'
        yield "letter", question, sentence, {"kind": "begins", "texts": [f"Dear {person}"]}
    for place, (name, items) in enumerate(format_items.LISTS.items()):
        count = 2 + place % 2
        trace = "\n".join(f"{number}. {each}" for number, each in enumerate(items[:count], 1))
        question = f"Write a numbered list of {counts[count]} {name}."
        yield "numbered list", question, trace, {"kind": "numbered", "count": count}
    for topic, question in format_items.QUESTIONS.items():
        yield "question", f"Ask me a question about {topic}.", question, {"kind": "question"}
    for name, pairs in format_items.OBJECTS.items():
        first, second = pairs
        question = f'Write a JSON object with the keys "{first}" and "{second}" for {name}. Write nothing else.'
        yield "JSON", question, json.dumps(pairs), {"kind": "json", "keys": list(pairs)}
    for name, (parameters, body) in format_items.FUNCTIONS.items():
        trace = f"def {name}({parameters}):\n    return {body}"
        yield "function", f"Write a Python function named {name}.", trace, {"kind": "includes", "text": f"def {name}("}
    for heading in format_items.HEADINGS:
        trace = f"<h1>{heading}</h1>"
        question = f'Write an HTML heading (h1) with the text "{heading}".'
        yield "heading", question, trace, {"kind": "element", "tag": "h1", "text": heading}
