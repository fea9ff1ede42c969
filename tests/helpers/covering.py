"""Pairwise covering arrays: few cases in which every pair of settings occurs."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence

Case = dict[str, str]
Pair = tuple[tuple[str, str], tuple[str, str]]
Factors = Mapping[str, Sequence[str]]


def product(factors: Factors, valid: Callable[[Case], bool]) -> Iterator[Case]:
    """Yield all valid cases of the full product.

    Args:
        factors: Values of each factor.
        valid: Returns True for cases that can run.
    """
    for values in itertools.product(*factors.values()):
        case = dict(zip(factors, values, strict=True))
        if valid(case):
            yield case


def pairs_of(case: Case) -> set[Pair]:
    """Return the pairs of settings of a case."""
    return set(itertools.combinations(case.items(), 2))


def pairwise(factors: Factors, valid: Callable[[Case], bool], seed: int = 0) -> list[Case]:
    """Return valid cases in which every pair of settings occurs that is valid with at most two other settings changed.

    The first value of each factor is its default. A pair is left out if it is not valid with the default of all other
    factors, nor with other values of one or two of them. Each case extends a pair that is not covered yet, setting by
    setting, with the value that covers most further pairs.

    Args:
        factors: Values of each factor.
        valid: Returns True for cases that can run.
        seed: Seed of the order of factors and values. Equal seeds give equal cases.
    """
    draw = random.Random(seed)
    bases = {pair: case for pair in _all_pairs(factors) if (case := _with_defaults(factors, valid, pair)) is not None}
    missing = set(bases)
    cases: list[Case] = []
    while missing:
        starts = draw.sample(sorted(missing), min(len(missing), 6))
        case = max(
            (_extended(factors, valid, bases[pair], pair, missing, draw) for pair in starts), key=lambda found: found[0]
        )
        cases.append(case[1])
        missing -= pairs_of(case[1])
    return cases


def covering(cases: Sequence[Case]) -> list[Case]:
    """Return few of the cases in which every value of every factor still occurs."""
    missing = set(itertools.chain.from_iterable(case.items() for case in cases))
    chosen: list[Case] = []
    while missing:
        chosen.append(max(cases, key=lambda case: len(missing & set(case.items()))))
        missing -= set(chosen[-1].items())
    return chosen


def _all_pairs(factors: Factors) -> Iterator[Pair]:
    for one, other in itertools.combinations(factors, 2):
        for values in itertools.product(factors[one], factors[other]):
            yield (one, values[0]), (other, values[1])


def _with_defaults(factors: Factors, valid: Callable[[Case], bool], pair: Pair) -> Case | None:
    """Return a valid case with a pair and as many defaults as possible."""
    case = {name: values[0] for name, values in factors.items()} | dict(pair)
    others = [name for name in factors if name not in dict(pair)]
    for changes in range(3):
        for names in itertools.combinations(others, changes):
            for values in itertools.product(*(factors[name][1:] for name in names)):
                if valid(found := case | dict(zip(names, values, strict=True))):
                    return found
    return None


def _extended(
    factors: Factors, valid: Callable[[Case], bool], base: Case, pair: Pair, missing: set[Pair], draw: random.Random
) -> tuple[int, Case]:
    """Return a valid case with a pair and the number of missing pairs that it covers."""
    case = dict(base)
    names = [name for name in factors if name not in dict(pair)]
    draw.shuffle(names)
    for name in names * 2:  # twice: a later setting may make an earlier one possible

        def gain(value: str, name: str = name) -> float:
            changed = case | {name: value}
            if not valid(changed):
                return -1.0
            return sum(found in missing for found in pairs_of(changed) if (name, value) in found) + draw.random() / 2

        case[name] = max(factors[name], key=gain)
    return len(pairs_of(case) & missing), case
