"""Generated questions of other tasks than mathematics, for the recipes in ``configs/tasks``."""

from __future__ import annotations

import json
import random
from abc import abstractmethod
from typing import Any, ClassVar

from opsd_lightning.data.generation import distinct_examples
from opsd_lightning.data.sources import ExampleSource
from opsd_lightning.types import Example, PositiveInt, checked


@checked
class TaskSource(ExampleSource):
    """Base class of generated tasks: distinct questions from seeded random numbers.

    Splits with different seeds can share questions. The data module drops these from training.

    Args:
        size: Number of distinct questions, at least 1.
        seed: Seed for generating the questions. Give each split its own.
    """

    def __init__(self, size: PositiveInt = 1000, seed: int = 0) -> None:
        self.size, self.seed = size, seed

    @abstractmethod
    def draw(self, numbers: random.Random) -> Example:
        """Return one example.

        Args:
            numbers: Source of random numbers.
        """

    def examples(self) -> list[Example]:
        return distinct_examples(self.draw, self.size, f"{type(self).__name__} {self.seed}")


class CategoryQuestions(TaskSource):
    """Multiple-choice questions about the one of four words that belongs to a category.

    The answer is the letter. The column ``options`` has the four words.

    Args:
        size: Number of distinct questions, at least 1.
        seed: Seed for generating the questions. Give each split its own.

    Example::

        >>> from opsd_lightning import CategoryQuestions
        >>> (example,) = CategoryQuestions(size=1).examples()
        >>> example.question, example.answer
        ('Which of these is a fruit? (A) dresser, (B) water, (C) fig, (D) pink', 'C')
    """

    _WORDS: ClassVar = {
        "an animal": "horse rabbit spider camel goat whale eagle tiger frog donkey sheep wolf",
        "a fruit": "apple banana cherry grape lemon mango melon orange peach pear plum fig",
        "a tool": "hammer saw drill wrench shovel rake axe ladder chisel pliers spade broom",
        "a color": "red green blue yellow purple pink brown black white gray violet beige",
        "a piece of clothing": "shirt coat scarf skirt sock glove jacket hat sweater belt shoe dress",
        "a vehicle": "car truck bus train bicycle boat tram taxi tractor van ferry scooter",
        "a drink": "tea coffee milk juice water lemonade cocoa soda cider beer wine cola",
        "a piece of furniture": "chair table sofa desk bed shelf bench wardrobe stool cupboard dresser couch",
        "a musical instrument": "piano violin guitar drum flute trumpet harp cello clarinet banjo tuba organ",
        "a part of the body": "arm leg knee nose ear finger elbow shoulder toe chin neck thumb",
    }

    def draw(self, numbers: random.Random) -> Example:
        categories = numbers.sample(list(self._WORDS), 4)
        words = [numbers.choice(self._WORDS[category].split()) for category in categories]
        right = words[0]
        numbers.shuffle(words)
        letter = "ABCD"[words.index(right)]
        options = ", ".join(f"({label}) {word}" for label, word in zip("ABCD", words, strict=True))
        return Example(
            question=f"Which of these is {categories[0]}? {options}",
            trace=f"The answer is ({letter}) {right}.",
            answer=letter,
            columns={"options": words, "category": categories[0]},
        )


class HomeRequests(TaskSource):
    """Requests to a smart home, each answered by one tool call as JSON.

    The answer is the call, an object with ``name`` and ``arguments``. The trace is the same in a fenced block. Tools are
    ``switch(device, room, state)``, ``set_temperature(room, degrees)`` and ``set_timer(minutes, label)``.

    Args:
        size: Number of distinct questions, at least 1.
        seed: Seed for generating the questions. Give each split its own.

    Example::

        >>> from opsd_lightning import HomeRequests
        >>> (example,) = HomeRequests(size=1).examples()
        >>> print(example.question, example.answer, sep="\\n")
        Remind me of the coffee in 50 minutes.
        {"name": "set_timer", "arguments": {"minutes": 50, "label": "coffee"}}
    """

    _ROOMS = "kitchen bedroom bathroom garage hall office garden cellar attic nursery library studio pantry lounge"
    _DEVICES = "light fan heater radio television lamp speaker camera kettle oven printer toaster"
    _MEALS = "tea eggs rice bread pizza cake pasta soup beans potatoes coffee pie fish corn stew noodles cookies porridge"

    def draw(self, numbers: random.Random) -> Example:
        room, device, meal = (numbers.choice(words.split()) for words in (self._ROOMS, self._DEVICES, self._MEALS))
        state = numbers.choice(["on", "off"])
        degrees, minutes = numbers.randint(15, 28), numbers.randint(2, 59)
        kind = numbers.randrange(3)
        arguments: dict[str, Any]
        if kind == 0:
            name, arguments = "switch", {"device": device, "room": room, "state": state}
            forms = ["Turn {state} the {device} in the {room}.", "Please switch {state} the {room} {device}."]
            forms += ["Could you turn the {device} in the {room} {state}?"]
        elif kind == 1:
            name, arguments = "set_temperature", {"room": room, "degrees": degrees}
            forms = ["Set the {room} to {degrees} degrees.", "Make it {degrees} degrees in the {room}, please."]
            forms += ["I want {degrees} degrees in the {room}."]
        else:
            name, arguments = "set_timer", {"minutes": minutes, "label": meal}
            forms = ["Start a timer of {minutes} minutes for the {label}.", "Remind me of the {label} in {minutes} minutes."]
            forms += ["Set a timer for the {label}, {minutes} minutes."]
        call = {"name": name, "arguments": arguments}
        return Example(
            question=numbers.choice(forms).format(**arguments),
            trace=f"```json\n{json.dumps(call, indent=2)}\n```",
            answer=json.dumps(call),
        )


class NumberFunctions(TaskSource):
    """Requests for a Python function of one number, each with the function and its tests.

    The trace is the function in a fenced block. The column ``tests`` has a text of assertions. There is no reference answer.

    Args:
        size: Number of distinct questions, at least 1.
        seed: Seed for generating the questions. Give each split its own.

    Example::

        >>> from opsd_lightning import NumberFunctions
        >>> (example,) = NumberFunctions(size=1).examples()
        >>> print(example.question, example.trace, sep="\\n")
        Write a Python function compute(x) that squares x and adds 34.
        ```python
        def compute(x):
            return x ** 2 + 34
        ```
    """

    #: Request and body of each kind of function, with the numbers that it takes.
    _KINDS: ClassVar = (
        ("adds {a} to x", "x + {a}", lambda x, a, b: x + a),
        ("subtracts {a} from x", "x - {a}", lambda x, a, b: x - a),
        ("multiplies x by {a}", "x * {a}", lambda x, a, b: x * a),
        ("multiplies x by {a} and adds {b}", "x * {a} + {b}", lambda x, a, b: x * a + b),
        ("squares x and adds {a}", "x ** 2 + {a}", lambda x, a, b: x**2 + a),
        ("returns the remainder of x divided by {a}", "x % {a}", lambda x, a, b: x % a),
        ("returns True if x is greater than {a}", "x > {a}", lambda x, a, b: x > a),
        ("returns True if x is less than {a}", "x < {a}", lambda x, a, b: x < a),
        ("returns the larger of x and {a}", "max(x, {a})", lambda x, a, b: max(x, a)),
        ("returns the smaller of x and {a}", "min(x, {a})", lambda x, a, b: min(x, a)),
    )
    _NAMES = ("f", "g", "h", "compute", "apply", "convert")

    def draw(self, numbers: random.Random) -> Example:
        request, body, value = numbers.choice(self._KINDS)
        a, b = numbers.sample(range(2, 100), 2)
        name = numbers.choice(self._NAMES)
        arguments = [0, a, a + 1, numbers.randint(101, 199)]
        return Example(
            question=f"Write a Python function {name}(x) that {request.format(a=a, b=b)}.",
            trace=f"```python\ndef {name}(x):\n    return {body.format(a=a, b=b)}\n```",
            answer="",
            columns={"tests": "\n".join(f"assert {name}({x}) == {value(x, a, b)}" for x in arguments)},
        )


class HotelReplies(TaskSource):
    """Messages of hotel guests, each with a demonstration of a reply in one style. There is no reference answer.

    Args:
        size: Number of distinct questions, at least 1.
        seed: Seed for generating the questions. Give each split its own.

    Example::

        >>> from opsd_lightning import HotelReplies
        >>> (example,) = HotelReplies(size=1).examples()
        >>> print(example.question, example.trace, sep="\\n")
        I was in room 21. The price was fair and the staff were friendly.
        Thank you for telling us. We are glad that the price was fair and the staff were friendly.
    """

    #: Praise and complaint for each subject.
    _SUBJECTS: ClassVar = {
        "the room": ("was clean", "was dirty"),
        "the hall": ("was quiet", "was loud"),
        "the staff": ("were friendly", "were rude"),
        "the bed": ("was soft", "was hard"),
        "the breakfast": ("was good", "was cold"),
        "the pool": ("was warm", "was closed"),
        "the towels": ("were fresh", "were wet"),
        "the garden": ("was lovely", "was a mess"),
        "the price": ("was fair", "was too high"),
        "the lift": ("was fast", "was broken"),
        "the shower": ("was hot", "was cold"),
        "the view": ("was wonderful", "was ugly"),
        "the coffee": ("was strong", "was weak"),
        "the curtains": ("were thick", "were torn"),
    }

    def draw(self, numbers: random.Random) -> Example:
        praise = numbers.random() < 0.5
        first, second = numbers.sample(list(self._SUBJECTS), 2)
        verdicts = [f"{subject} {self._SUBJECTS[subject][0 if praise else 1]}" for subject in (first, second)]
        said = " and ".join(verdicts)
        start = numbers.choice(
            ["Room {n}: ", "We stayed for {n} nights. ", "I was in room {n}. ", "After {n} nights with you: "]
        )
        reply = f"Thank you for telling us. We are {'glad' if praise else 'sorry'} that {said}."
        question = start.format(n=numbers.randint(2, 40)) + f"{said[0].upper()}{said[1:]}."
        return Example(question, reply, "")


class TableBookings(TaskSource):
    """Conversations in which a guest books a table, changes the booking and asks for it.

    The demonstration repeats the whole booking as it is after the change. The answer is its first sentence, without the full
    stop.

    Args:
        size: Number of distinct questions, at least 1.
        seed: Seed for generating the questions. Give each split its own.

    Example::

        >>> from opsd_lightning import TableBookings
        >>> (example,) = TableBookings(size=1).examples()
        >>> for message in (*example.messages, example.demonstration):
        ...     print(f"{message['role']}: {message['content']}")
        system: You take bookings for a restaurant.
        user: Book a table for 2 on Thursday at 7.
        assistant: A table for 2 on Thursday at 7. Anything else?
        user: Make it Saturday. Read my booking back to me.
        assistant: A table for 2 on Saturday at 7. Anything else?
    """

    _DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")

    def draw(self, numbers: random.Random) -> Example:
        old = {"people": numbers.randint(2, 9), "day": numbers.choice(self._DAYS), "hour": numbers.randint(5, 9)}
        new: dict[str, Any] = {
            "people": numbers.choice([people for people in range(2, 10) if people != old["people"]]),
            "day": numbers.choice([day for day in self._DAYS if day != old["day"]]),
            "hour": numbers.choice([hour for hour in range(5, 10) if hour != old["hour"]]),
        }
        changed = numbers.choice(["people", "day", "hour"])
        change = numbers.choice(
            {
                "people": ["We are {people} now.", "Make it {people} people."],
                "day": ["Make it {day}.", "Can we come on {day} instead?"],
                "hour": ["Make it {hour} o'clock.", "Can we come at {hour} instead?"],
            }[changed]
        )
        request = numbers.choice(["Book a table for {booking}.", "I would like a table for {booking}, please."])
        first, last = self._booking(old), self._booking({**old, changed: new[changed]})
        question = f"{change.format(**new)} Read my booking back to me."
        turns = [
            {"role": "system", "content": "You take bookings for a restaurant."},
            {"role": "user", "content": request.format(booking=first)},
            {"role": "assistant", "content": f"A table for {first}. Anything else?"},
            {"role": "user", "content": question},
        ]
        answer = f"A table for {last}"
        reply = f"{answer}. Anything else?"
        return Example(question, reply, answer, messages=turns, demonstration={"role": "assistant", "content": reply})

    def _booking(self, booking: dict[str, Any]) -> str:
        return "{people} on {day} at {hour}".format(**booking)
