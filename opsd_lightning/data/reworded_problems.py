"""Word problems of the skill that `WordProblems` trains, in other words and with larger numbers."""

from __future__ import annotations

import random
from typing import ClassVar

from opsd_lightning.data.task_sources import TaskSource
from opsd_lightning.types import ConfigError, Example, PositiveInt, checked


@checked
class RewordedProblems(TaskSource):
    """One-step additions and subtractions in other words than those of `WordProblems`, to measure transfer.

    Scenes, verbs, things, names and forms of the question are others. The largest number of a question or its answer is
    above 10, the largest one of the quick start. The trace is of one line.

    Args:
        size: Number of distinct questions, at least 1.
        seed: Seed for generating the questions.
        largest: Largest number in a question or an answer, at least 12.

    Example::

        >>> from opsd_lightning import RewordedProblems
        >>> (example,) = RewordedProblems(size=1).examples()
        >>> print(example.question, example.trace, sep="\\n")
        A bus carries 30 people. At the next stop 28 get off. How many people are on the bus?
        The bus carries 30 - 28 = 2 people, so the answer is 2.
    """

    #: Each problem, with its solution.
    _KINDS: ClassVar = (
        (
            "A bus carries {a} people. At the next stop {b} get off. How many people are on the bus?",
            "The bus carries {a} - {b} = {answer} people",
        ),
        (
            "There are {a} people on a train. {b} more get on at the station. How many people is that?",
            "The train carries {a} + {b} = {answer} people",
        ),
        (
            "In the morning a baker bakes {a} {food}. By noon {b} {food} are sold. How many are unsold?",
            "The baker keeps {a} - {b} = {answer} {food}",
        ),
        (
            "A cook fries {a} {food} and later another {b}. What is the total number of {food}?",
            "The cook fries {a} + {b} = {answer} {food}",
        ),
        (
            "{a} {birds} rest on a shore. Then {b} of the {birds} fly off. How many stay?",
            "The shore has {a} - {b} = {answer} {birds}",
        ),
        (
            "{a} {birds} swim on a lake. {b} {birds} land beside them. How many {birds} swim there in the end?",
            "The lake has {a} + {b} = {answer} {birds}",
        ),
        (
            "On Monday {name} read {a} pages. On Tuesday {name} read {b} pages. How many pages is that in total?",
            "{name} read {a} + {b} = {answer} pages",
        ),
        (
            "A rope is {a} feet long. {name} cuts off {b} feet. How long is the rope that remains?",
            "The rope is {a} - {b} = {answer} feet long",
        ),
        (
            "A tank holds {a} gallons of water. {name} pours in {b} gallons. How many gallons does it hold afterwards?",
            "The tank holds {a} + {b} = {answer} gallons",
        ),
        (
            "{name} climbs a tower of {a} steps and rests on step {b}. How many steps are still to climb?",
            "{name} must climb {a} - {b} = {answer} more steps",
        ),
        (
            "At noon it was {a} degrees. By evening it was {b} degrees colder. What was the temperature in the evening?",
            "It was {a} - {b} = {answer} degrees",
        ),
        (
            "A class has {a} girls and {b} boys. How many children are in the class?",
            "The class has {a} + {b} = {answer} children",
        ),
        (
            "Out of {a} lamps in a hall, {b} are broken. How many lamps work?",
            "The hall has {a} - {b} = {answer} working lamps",
        ),
        (
            "This year {name} planted {a} trees, and last year {b}. How many trees did {name} plant in all?",
            "{name} planted {a} + {b} = {answer} trees",
        ),
        (
            "A farmer counts {a} hens, but a fox steals {b}. How many hens does the farmer still own?",
            "The farmer owns {a} - {b} = {answer} hens",
        ),
        (
            "{name} walks {a} miles to the village and {b} miles farther to the lake. How many miles is the whole way?",
            "{name} walks {a} + {b} = {answer} miles",
        ),
    )
    _SMALLEST = 11  # of the largest numbers
    _NAMES = ("Hugo", "Olga", "Felix", "Rosa", "Ivan", "Greta", "Pablo", "Wanda", "Simon", "Elena", "Boris", "Tessa")
    _FOODS = ("rolls", "muffins", "pies", "buns", "donuts", "pancakes")
    _BIRDS = ("ducks", "gulls", "swans", "geese", "pelicans")

    def __init__(self, size: PositiveInt = 1000, seed: int = 0, largest: PositiveInt = 30) -> None:
        super().__init__(size, seed)
        if largest <= self._SMALLEST:
            fix = f"Set it to {self._SMALLEST + 1} or more"
            raise ConfigError(f"it is {largest}", "RewordedProblems.largest", fix)
        self.largest = largest

    def draw(self, numbers: random.Random) -> Example:
        problem, solution = numbers.choice(self._KINDS)
        big = numbers.randint(self._SMALLEST, self.largest)
        b = numbers.randint(2, big - 2)
        a, answer = (big - b, big) if " + " in solution else (big, big - b)
        words = {
            "a": a,
            "b": b,
            "answer": answer,
            "name": numbers.choice(self._NAMES),
            "food": numbers.choice(self._FOODS),
            "birds": numbers.choice(self._BIRDS),
        }
        trace = f"{solution.format(**words)}, so the answer is {answer}."
        return Example(problem.format(**words), trace, str(answer))
