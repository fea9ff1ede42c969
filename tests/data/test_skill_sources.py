"""Tests of the sources that measure other skills: distinct items, right answers among the options, and wrong ones that are wrong."""

from __future__ import annotations

import re

import pytest

from helpers.classes import subclasses
from helpers.messages import mentions
from opsd_lightning.data.fact_items import KINDS
from opsd_lightning.data.skill_sources import CommonFacts, FormatInstructions, SkillSource, StoryContinuations
from opsd_lightning.data.story_items import situations
from opsd_lightning.grading.choice_grader import ChoiceGrader
from opsd_lightning.grading.format_grader import FormatGrader
from opsd_lightning.types import ConfigError, Example

SOURCES = sorted(subclasses(SkillSource), key=lambda source: source.__name__)
CHOICES = [CommonFacts, StoryContinuations]


def size_of(source: type[SkillSource]) -> int:
    return len(source().items())


@pytest.mark.parametrize("source", SOURCES)
def test_all_items_are_distinct_and_repeatable(source: type[SkillSource]) -> None:
    examples = source(size_of(source), seed=1).examples()
    assert len({example.question for example in examples}) == len(examples) >= 320
    assert examples == source(size_of(source), seed=1).examples()
    assert all(example.question.strip() and example.trace.strip() for example in examples)


@pytest.mark.parametrize("source", SOURCES)
def test_seeds_choose_items(source: type[SkillSource]) -> None:
    first, second = ({example.question for example in source(100, seed=seed).examples()} for seed in (1, 2))
    assert len(first) == len(second) == 100 and first != second
    assert len(source().examples()) == 320


@pytest.mark.parametrize("source", SOURCES)
def test_more_items_than_there_are_are_refused(source: type[SkillSource]) -> None:
    most = size_of(source)
    with pytest.raises(ConfigError, match=mentions("size", most, most + 1)):
        source(most + 1).examples()


@pytest.mark.parametrize("source", SOURCES)
def test_items_are_of_many_kinds(source: type[SkillSource]) -> None:
    kinds = [example.columns["kind"] for example in source().examples()]
    assert len(set(kinds)) >= 8 and max(map(kinds.count, set(kinds))) < 80


@pytest.mark.parametrize("source", CHOICES)
def test_one_of_four_options_is_right_at_any_place(source: type[SkillSource]) -> None:
    examples = source(400).examples()
    for example in examples:
        options = example.columns["options"]
        assert len(options) == len({option.casefold() for option in options}) == 4
        assert options.count(example.answer) == 1 and example.trace == example.answer
        grades = [ChoiceGrader().grade(option, example).score for option in options]
        assert grades == [float(option == example.answer) for option in options]
    places = [example.columns["options"].index(example.answer) for example in examples]
    assert all(60 < places.count(place) < 140 for place in range(4))


def test_wrong_facts_answer_other_questions_of_the_kind() -> None:
    answers = {kind.question.format(key): answer for kind in KINDS.values() for key, answer in kind.pairs()}
    for example in CommonFacts(400, seed=3).examples():
        kind = KINDS[example.columns["kind"]]
        assert answers[example.question] == example.answer
        assert {*example.columns["options"]} <= {answer for _, answer in kind.pairs()}


def test_answers_that_clash_are_answers_of_their_kind() -> None:
    """A misspelled one would be no protection."""
    for kind in KINDS.values():
        words = {" ".join(word.split()) for word in re.split("[,;]", kind.clashes) if word.strip()}
        assert words <= {answer for _, answer in kind.pairs()}
        for _, right in kind.pairs():
            assert right not in kind.wrong_answers(right) and len(kind.wrong_answers(right)) >= 3


def test_options_that_clash_do_not_meet() -> None:
    assert not {"the nose", "the ears"} & {*KINDS["body"].wrong_answers("the finger")}
    assert "at a post office" not in KINDS["place"].wrong_answers("at a bank")
    assert "a duckling" not in KINDS["young animal"].wrong_answers("a chick")
    assert "a camera" in KINDS["tool"].wrong_answers("a kettle") and "a match" not in KINDS["tool"].wrong_answers("a kettle")


def test_the_most_frequent_answer_of_a_kind_is_right_little_more_often_than_by_chance() -> None:
    shares = []
    for seed in range(20):
        for example in CommonFacts(size_of(CommonFacts), seed=seed).examples():
            answers = [answer for _, answer in KINDS[example.columns["kind"]].pairs()]
            counts = [answers.count(option) for option in example.columns["options"]]
            usual = [o for o, count in zip(example.columns["options"], counts, strict=True) if count == max(counts)]
            shares.append((example.answer in usual) / len(usual))
    assert 0.27 < sum(shares) / len(shares) < 0.29  # quoted in the documentation


def test_no_fact_needs_arithmetic() -> None:
    assert not any(re.search(r"\d", e.question + str(e.columns["options"])) for e in CommonFacts(400).examples())


def test_facts_show_their_options_on_request() -> None:
    for shown, example in zip(CommonFacts(50, show_options=True).examples(), CommonFacts(50).examples(), strict=True):
        assert shown.question.splitlines()[0] == example.question and shown[1:] == example[1:]
        assert ChoiceGrader(options=None).grade(example.answer, shown).score == 1


def test_wrong_endings_belong_to_situations_of_other_topics() -> None:
    def pattern(ending: str) -> re.Pattern[str]:
        return re.compile(re.sub(r"\\\{\w\\\}", r"\\w+", re.escape(ending)))

    known = [(pattern(situation.ending), situation) for situation in situations()]
    for example in StoryContinuations(300, seed=5).examples():
        found = {o: next(s for p, s in known if p.fullmatch(o)) for o in example.columns["options"]}
        right = found.pop(example.answer)
        assert example.columns["kind"] == right.kind
        assert not any(situation.topics & right.topics for situation in found.values())
        assert all(situation.alike(right) for situation in found.values())


def test_stories_have_two_sentences_and_endings_of_similar_length() -> None:
    for example in StoryContinuations(300).examples():
        assert len(re.findall(r"\.(?: |$)", example.question)) == 2
        assert not re.search(r"[{}]", example.question + example.answer)
        lengths = [len(option) for option in example.columns["options"]]
        assert max(lengths) - min(lengths) < 20
    rank = [sorted(e.columns["options"], key=len).index(e.answer) for e in StoryContinuations().examples()]
    assert all(rank.count(place) < 160 for place in range(4))  # the length does not tell the right ending


def test_every_instruction_has_an_answer_of_its_form_and_others_without() -> None:
    grader = FormatGrader()
    for example in FormatInstructions(size_of(FormatInstructions)).examples():
        assert grader.can_grade(example) and grader.verify(example).score == 1, example
        for wrong in ("so the answer is 9.", "I do not know.", "9", "[[calc]] let x:=4; x -> 4 [[end]]", example.question):
            assert grader.grade(wrong, example).score == 0, (wrong, example)


def test_instructions_name_the_arguments_of_their_form() -> None:
    counts = {2: "two", 3: "three"}
    for example in FormatInstructions(size_of(FormatInstructions)).examples():
        form = example.columns["form"]
        named = [
            form.get("word", ""),
            form.get("text", ""),
            *form.get("words", ()),
            *form.get("texts", ()),
            *form.get("keys", ()),
        ]
        words = {word for name in named for word in re.findall(r"\w+", name)} - {"def"}
        assert words <= set(re.findall(r"\w+", example.question))
        assert "count" not in form or f" {counts[form['count']]} " in example.question


def test_a_completion_of_another_item_is_mostly_wrong() -> None:
    """An answer that ignores the instruction fails, except for short ones to instructions of the same kind."""
    examples = FormatInstructions(100).examples()
    others: list[Example] = [*examples[1:], examples[0]]
    shared = [FormatGrader().grade(other.trace, example).score for example, other in zip(examples, others, strict=True)]
    assert sum(shared) < 15
