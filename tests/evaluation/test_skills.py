"""Tests of skill sets: values against plain transformers, division of texts into tokens, and refused items."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from helpers.chat_templates import tokenizer_for
from helpers.classes import subclasses
from helpers.messages import mentions
from helpers.models import EOS, SECOND_EOS, perturb
from helpers.skills import Digits, Rows, skill_sets, sum_logprob, token_logprobs
from helpers.training import parts, trainer
from opsd_lightning.data.skill_sources import CommonFacts
from opsd_lightning.data.sources import WordProblems
from opsd_lightning.data.task_sources import CategoryQuestions
from opsd_lightning.evaluation.skill_sets import BaseDivergence, ChoicesByLikelihood, GradedCompletions
from opsd_lightning.evaluation.skills import ItemScore, SkillResult, SkillSet, measure_skill
from opsd_lightning.grading.choice_grader import ChoiceGrader
from opsd_lightning.grading.no_grader import NoGrader
from opsd_lightning.models.policy import Policy
from opsd_lightning.prompts.templates import Prompts
from opsd_lightning.types import ConfigError, Example
from opsd_lightning.utils.statistics import paired_change, ratio_and_error

MakePolicy = Callable[..., Policy]
FOUR = Example("Which is a fruit?", "", "C", {"options": ["a horse", "red", "a fig", "fig trees"]})


class _Measure(Callback):
    """Callback that runs a function in a test, where a trainer is there."""

    def __init__(self, work: Callable[[Any], Any]) -> None:
        self.work = work
        self.found: Any = None

    def on_test_start(self, trainer: Any, pl_module: Any) -> None:
        perturb(pl_module.model)
        self.found = self.work(pl_module)


def in_a_test(policy: Policy, folder: Path, work: Callable[[Any], Any], **settings: Any) -> Any:
    """Run a function on a module whose adapter is not at its start, inside a test."""
    torch.manual_seed(0)
    callback = _Measure(work)
    module, data = parts(policy, **settings)
    trainer(folder, callback, logger=False).test(module, data, verbose=False)
    return callback.found


def measured(policy: Policy, folder: Path, skills: SkillSet, base: bool = False, **settings: Any) -> tuple[SkillResult, Any]:
    skills.setup(policy)
    return in_a_test(policy, folder, lambda module: (measure_skill(module, skills, base), module), **settings)


@contextmanager
def weights(module: Any, base: bool) -> Iterator[Any]:
    if base:
        with module.model.disable_adapter():
            yield module.model
    else:
        yield module.model


def test_every_set_is_in_the_helpers() -> None:
    own = {cls for cls in subclasses(SkillSet) if cls.__module__.startswith("opsd_lightning.")}
    assert own == {type(skills) for skills in skill_sets().values()}


@pytest.mark.parametrize("normalization", ["none", "tokens", "characters", "bytes"])
@pytest.mark.parametrize("base", [False, True])
def test_choices_have_the_highest_log_probability(
    normalization: Any, base: bool, make_policy: MakePolicy, tmp_path: Path
) -> None:
    policy = make_policy()
    rows = [*CategoryQuestions(size=5, seed=7).examples(), FOUR, FOUR._replace(columns={"options": ["é" * 9, "ab", "abc"]})]
    skills = ChoicesByLikelihood(Rows(rows), normalization=normalization, batch_size=3)
    result, module = measured(policy, tmp_path, skills, base, token_budget=400)
    prompts = Prompts("{question}")
    for example, item in zip(rows, result.items, strict=True):
        options = item.details["options"]
        with weights(module, base) as model:
            sums = {
                label: sum_logprob(
                    model,
                    prompts.student(module.tokenizer, example),
                    module.tokenizer.encode(text, add_special_tokens=False),
                )
                for label, text in options.items()
            }
        assert item.details["logprobs"] == pytest.approx(sums, rel=1e-4)
        length = {"none": lambda text: 1, "bytes": lambda text: len(text.encode())}.get(normalization, len)  # type: ignore[arg-type]
        chosen = max(options, key=lambda label: sums[label] / length(options[label]))
        assert item.details["choice"] == chosen
        assert item.score == float(chosen == example.answer)
    assert result.value == sum(item.score for item in result.items) / len(rows)


def test_labels_can_be_scored(make_policy: MakePolicy, tmp_path: Path) -> None:
    skills = ChoicesByLikelihood(CategoryQuestions(size=2, seed=7), scored="label")
    result, module = measured(make_policy(), tmp_path, skills)
    prompt = Prompts("{question}").student(module.tokenizer, skills.examples[0])
    expected = {label: sum_logprob(module.model, prompt, module.tokenizer.encode(label)) for label in "ABCD"}
    assert result.items[0].details["logprobs"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("base", [False, True])
def test_completions_are_greedy_and_graded(base: bool, make_policy: MakePolicy, tmp_path: Path) -> None:
    skills = GradedCompletions(WordProblems(size=5, seed=8), Digits(), max_new_tokens=6, batch_size=2)
    result, module = measured(make_policy(), tmp_path, skills, base)
    for example, item in zip(skills.examples, result.items, strict=True):
        prompt = list(Prompts("{question}").student(module.tokenizer, example))
        completion: list[int] = []
        with weights(module, base) as model:
            while len(completion) < 6 and not {EOS, SECOND_EOS} & set(completion):
                completion.append(int(model(torch.tensor([[*prompt, *completion]])).logits[0, -1].argmax()))
        text = module.tokenizer.decode(completion, skip_special_tokens=True)
        assert item.details["completion"] == text
        assert item.score == Digits().grade(text, example).score


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_divergence_is_that_of_base_from_run(architecture: str, make_policy: MakePolicy, tmp_path: Path) -> None:
    skills = BaseDivergence(WordProblems(size=5, seed=9), max_new_tokens=6, batch_size=2)
    answers = GradedCompletions(WordProblems(size=5, seed=9), Digits(), max_new_tokens=6)
    policy = make_policy(architecture)
    skills.setup(policy)
    answers.setup(policy)
    (result, again, of_base), module = in_a_test(
        policy,
        tmp_path,
        lambda module: (
            (measure_skill(module, skills), measure_skill(module, skills), measure_skill(module, answers, base=True)),
            module,
        ),
    )
    assert result == again
    texts = [[item.details["completion"] for item in each.items] for each in (result, of_base)]
    assert texts[0] == texts[1]
    expected = 0.0
    for place, example in enumerate(skills.examples):
        prompt = Prompts("{question}").student(module.tokenizer, example)
        completion = skills._answers[place][0]
        ours = token_logprobs(module.model, prompt, completion)
        with weights(module, base=True) as model:
            theirs = token_logprobs(model, prompt, completion)
        kl = float((theirs.exp() * (theirs - ours)).sum())
        assert result.items[place].score == pytest.approx(kl, rel=1e-3)
        expected += kl
    tokens = sum(len(answer) for answer, _ in skills._answers.values())
    assert result.units == tokens
    assert result.value == pytest.approx(expected / tokens, rel=1e-3)
    assert result.value > 1e-3


# -- texts to tokens ---------------------------------------------------------------------------------------------------


def merging_tokenizer(text: str, begins: bool = False) -> PreTrainedTokenizerFast:
    """Return a BPE tokenizer that merges across words, because it does not divide texts into words first."""
    inner = Tokenizer(models.BPE())
    inner.decoder = decoders.Fuse()
    inner.train_from_iterator([text] * 9, trainers.BpeTrainer(special_tokens=["<s>", "</s>"], vocab_size=200))
    if begins:
        inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="</s>")


def choice_of(policy: Policy, tokenizer: Any, skills: ChoicesByLikelihood) -> Any:
    skills.examples = skills.source.examples()
    skills.prepare(policy, tokenizer)
    (choice,) = skills._choices
    return choice


@pytest.mark.parametrize("question", ["The cat sat on", "The cat sat on ", "The cat sat on\n"])
@pytest.mark.parametrize("delimiter", [" ", ""])
def test_prompt_and_option_are_the_whole_text(question: str, delimiter: str, make_policy: MakePolicy) -> None:
    """No token has characters of both, whatever the tokenizer would merge."""
    tokenizer = merging_tokenizer("The cat sat on the mat.\nThe cat sat on a hat.\nThe cat sat on\nthe mat.")
    example = Example(question, "", "A", {"options": ["the mat.", "a hat."]})
    prompts = Prompts("{question}")
    choice = choice_of(
        make_policy(), tokenizer, ChoicesByLikelihood(Rows([example]), chat=False, prompts=prompts, delimiter=delimiter)
    )
    assert any(" t" in token or "\nt" in token for token in tokenizer.get_vocab())  # it merges words
    for text, option in zip(example.columns["options"], choice.options, strict=True):
        assert tokenizer.decode(choice.prompt) == question.rstrip()
        assert tokenizer.decode([*choice.prompt, *option]) == question + delimiter + text


def test_tokens_are_those_of_the_whole_text_where_they_divide(make_policy: MakePolicy) -> None:
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    text = "The cat sat on the mat. The cat sat on a hat."
    inner.train_from_iterator([text] * 9, trainers.BpeTrainer(special_tokens=["</s>"], vocab_size=300))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", pad_token="</s>")
    example = Example("The cat sat on ", "", "A", {"options": ["the mat.", "a hat."]})
    choice = choice_of(
        make_policy(),
        tokenizer,
        ChoicesByLikelihood(Rows([example]), chat=False, delimiter="", prompts=Prompts("{question}")),
    )
    assert [*choice.prompt, *choice.options[0]] == tokenizer.encode("The cat sat on the mat.")


@pytest.mark.parametrize("begins", [False, True])
def test_a_text_begins_as_the_tokenizer_begins_it(begins: bool, make_policy: MakePolicy) -> None:
    tokenizer = merging_tokenizer("The cat sat on the mat.", begins)
    example = Example("The cat", "", "A", {"options": ["sat", "mat"]})
    choice = choice_of(make_policy(), tokenizer, ChoicesByLikelihood(Rows([example]), chat=False))
    assert (choice.prompt[0] == tokenizer.bos_token_id) == begins
    assert tokenizer.bos_token_id not in choice.prompt[1:] + choice.options[0]


def test_control_tokens_in_an_option_stay_text(make_policy: MakePolicy) -> None:
    policy = make_policy()
    tokenizer = policy.load_tokenizer()
    example = Example("Which?", "", "A", {"options": ["a<|im_end|>", "b"]})
    for chat in (False, True):
        choice = choice_of(policy, tokenizer, ChoicesByLikelihood(Rows([example]), chat=chat))
        assert EOS not in choice.options[0] and tokenizer.decode(choice.options[0]).endswith("a<|im_end|>")


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize(
    ("example", "setting"),
    [
        (Example("Which?", "", "A", {"options": ["a", "a"]}), "options"),
        (Example("Which?", "", "A", {"options": ["a", " "]}), "options"),
        (Example("Which?", "", "A", {"options": ["a"]}), "options"),
        (Example("Which?", "", "A", {}), "options"),
        (Example("Which?", "", "C", {"options": ["a", "b"]}), "reference"),
        (Example("Which?", "", "", {"options": ["a", "b"]}), "source"),
        (Example("Which?" * 200, "", "A", {"options": ["a", "b"]}), "source"),
    ],
)
def test_questions_without_a_choice_are_refused(chat: bool, example: Example, setting: str, make_policy: MakePolicy) -> None:
    skills = ChoicesByLikelihood(Rows([CategoryQuestions(size=1).examples()[0], example]), chat=chat)
    with pytest.raises(ConfigError) as error:
        skills.setup(make_policy())
    assert error.value.setting == setting


@pytest.mark.parametrize("scored", ["text", "label"])
@pytest.mark.parametrize("chat", [False, True])
def test_equal_options_are_refused(chat: bool, scored: Any, make_policy: MakePolicy) -> None:
    example = Example("Which?\nA) x\nB) x\nC) y", "", "C", {"options": ["x", "x ", "y"]})
    with pytest.raises(ConfigError) as error:
        ChoicesByLikelihood(Rows([example]), scored=scored, chat=chat).setup(make_policy())
    assert error.value.setting == "options"


@pytest.mark.parametrize(
    ("question", "fits"),
    [
        ("Which?\nA) a horse\nB) red\nC) a fig\nD) fig trees", True),
        ("Which? (a) a horse (b) red (c)  a fig (d) fig trees", True),
        ("Which? A: a horse, B: red, C: a\nfig, D: fig trees", True),
        ("Which is a fruit?", False),
        ("Which is a fruit: a horse, red, a fig or fig trees?", False),
        ("Which?\nA) a horse\nB) red\nC) a fig", False),
    ],
)
def test_labels_mean_something_in_the_prompt(question: str, fits: bool, make_policy: MakePolicy) -> None:
    turns = [{"role": "user", "content": question}]
    for example in (FOUR._replace(question=question), FOUR._replace(question=question, messages=turns)):
        skills = ChoicesByLikelihood(Rows([example]), scored="label")
        if fits:
            skills.setup(make_policy())
        else:
            with pytest.raises(ConfigError) as error:
                skills.setup(make_policy())
            assert error.value.setting == "scored"
        ChoicesByLikelihood(Rows([example])).setup(make_policy())


@pytest.mark.parametrize("shown", [False, True])
def test_labels_of_facts_need_their_options(shown: bool, make_policy: MakePolicy) -> None:
    skills = ChoicesByLikelihood(CommonFacts(size=40, show_options=shown), scored="label")
    with nullcontext() if shown else pytest.raises(ConfigError, match=mentions("show_options")):
        skills.setup(make_policy())


def test_texts_without_a_template_are_no_conversations(make_policy: MakePolicy) -> None:
    example = FOUR._replace(messages=[{"role": "user", "content": FOUR.question}])
    ChoicesByLikelihood(Rows([example])).setup(make_policy())
    with pytest.raises(ConfigError) as error:
        ChoicesByLikelihood(Rows([example]), chat=False).setup(make_policy())
    assert error.value.setting == "chat"


def test_an_option_in_an_open_thinking_block_is_refused(make_policy: MakePolicy) -> None:
    """Its probability would be that of a thought."""
    policy = make_policy()
    tokenizer = policy.load_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("assistant\n'", "assistant\n<think>'")  # type: ignore[union-attr, arg-type]
    skills = ChoicesByLikelihood(Rows([FOUR]))
    skills.examples = [FOUR]
    with pytest.raises(ConfigError, match=mentions("enable_thinking")):
        skills.prepare(policy, tokenizer)


@pytest.mark.parametrize("scored", ["text", "label"])
@pytest.mark.parametrize("kwargs", [{}, {"enable_thinking": False}])
def test_a_block_before_every_answer_belongs_to_the_prompt(kwargs: Any, scored: Any, make_policy: MakePolicy) -> None:
    """Qwen3's template writes an empty thinking block before an answer, and with thinking off before the completion."""
    example = FOUR._replace(question="Which is a fruit?\nA) a horse\nB) red\nC) a fig\nD) fig trees")
    skills = ChoicesByLikelihood(
        Rows([example]), scored=scored, prompts=Prompts("{question}", student_chat_template_kwargs=kwargs)
    )
    tokenizer = tokenizer_for("qwen3")
    choice = choice_of(make_policy(), tokenizer, skills)
    assert tokenizer.decode(choice.prompt).endswith("assistant\n<think>\n\n</think>\n\n")
    assert [tokenizer.decode(option) for option in choice.options] == choice.texts


@pytest.mark.parametrize(
    ("own", "thinks"),
    [
        (Prompts("{question}"), False),
        (Prompts("{question}", student_chat_template_kwargs={"enable_thinking": True}), True),
        (Prompts("{question}", evaluation_chat_template_kwargs={}), True),
    ],
)
def test_a_set_takes_the_chat_template_arguments_of_the_run(own: Prompts, thinks: bool, make_policy: MakePolicy) -> None:
    tokenizer = tokenizer_for("qwen3")
    sets: list[Any] = [
        GradedCompletions(Rows([FOUR]), ChoiceGrader(), max_new_tokens=4, prompts=own),
        BaseDivergence(Rows([FOUR]), max_new_tokens=4, prompts=own),
    ]
    for skills in sets:
        skills.setup(make_policy(), {"enable_thinking": False})
        skills.prepare(make_policy(), tokenizer)
        (prompt,) = skills._prompts
        assert ("</think>" in tokenizer.decode(prompt)) != thinks


def test_a_grader_that_grades_nothing_is_refused(make_policy: MakePolicy) -> None:
    with pytest.raises(ConfigError) as error:
        GradedCompletions(WordProblems(size=2), NoGrader()).setup(make_policy())
    assert error.value.setting == "grader"
    with pytest.raises(ConfigError) as error:
        GradedCompletions(WordProblems(size=2), ChoiceGrader()).setup(make_policy())
    assert error.value.setting == "grader.init_args.options"


def test_full_fine_tuning_has_no_base_afterwards(make_policy: MakePolicy, tmp_path: Path) -> None:
    policy = make_policy(lora=None)
    with pytest.raises(ConfigError) as error:
        BaseDivergence(WordProblems(size=2)).setup(policy)
    assert error.value.setting == "model.policy.lora"
    skills = skill_sets(2)["digits"]
    skills.setup(policy)
    with pytest.raises(ConfigError) as error:
        in_a_test(policy, tmp_path, lambda module: measure_skill(module, skills, base=True))
    assert error.value.setting == "model.policy.lora"


def in_groups(scores: list[float], groups: list[str] | None, weight: float = 1.0) -> SkillResult:
    names: list[Any] = [None] * len(scores) if groups is None else groups
    return SkillResult([ItemScore(score, weight, group=name) for score, name in zip(scores, names, strict=True)])


@pytest.mark.parametrize("scores", [[0.0, 1.0, 1.0, 1.0, 0.0], [1.0] * 5, [0.25, 0.5, 0.5, 0.0, 1.0]])
@pytest.mark.parametrize("copies", [1, 3])
def test_copies_of_an_item_in_one_group_tell_nothing_more(scores: list[float], copies: int) -> None:
    once, before = in_groups(scores, None), in_groups([1.0, 0.0, 1.0, 1.0, 0.0], None)
    names = [letter for letter in "abcde" for _ in range(copies)]
    many = in_groups([score for score in scores for _ in range(copies)], names)
    earlier = in_groups([item.score for item in before.items for _ in range(copies)], names)
    assert many.value == pytest.approx(once.value)
    assert many.error == pytest.approx(once.error)
    assert many.change(earlier) == pytest.approx(once.change(before))
    if copies > 1 and once.error:
        assert many.error > 1.5 * in_groups([item.score for item in many.items], None).error
    low, high = in_groups([item.score for item in many.items], None).interval
    assert copies == 1 or many.interval[1] - many.interval[0] > high - low


def test_unequal_groups_have_the_error_of_a_ratio() -> None:
    result = in_groups([1.0, 0.0, 1.0, 1.0, 0.0], ["a", "b", "a", "c", "b"])
    assert (result.value, result.error) == pytest.approx(ratio_and_error([2.0, 0.0, 1.0], [2.0, 2.0, 1.0]))


def test_a_set_groups_its_items(make_policy: MakePolicy, tmp_path: Path) -> None:
    rows = [FOUR._replace(columns=FOUR.columns | {"passage": passage}) for passage in (1, 1, 2, None, None)]
    result, _ = measured(make_policy(), tmp_path, ChoicesByLikelihood(Rows(rows), group="passage"))
    assert [item.group for item in result.items] == ["1", "1", "2", None, None]


@pytest.mark.parametrize("columns", [{}, {"passage": "one"}])
def test_a_column_without_groups_is_refused(columns: dict[str, Any], make_policy: MakePolicy) -> None:
    rows = [FOUR._replace(columns=FOUR.columns | columns)] * 3
    with pytest.raises(ConfigError) as error:
        ChoicesByLikelihood(Rows(rows), group="passage").setup(make_policy())
    assert error.value.setting == "group"


# -- intervals ---------------------------------------------------------------------------------------------------------


def test_ratio_and_error_of_equal_weights_are_mean_and_standard_error() -> None:
    values = [0.0, 1.0, 1.0, 0.5, 0.25]
    mean, error = ratio_and_error(values, [1.0] * 5)
    tensor = torch.tensor(values, dtype=torch.float64)
    assert mean == pytest.approx(float(tensor.mean()))
    assert error == pytest.approx(float(tensor.std() / math.sqrt(5)))


def test_ratio_does_not_depend_on_the_unit_of_weights() -> None:
    totals, weights = [3.0, 1.0, 4.0], [2.0, 1.0, 5.0]
    ratio, error = ratio_and_error(totals, weights)
    assert ratio_and_error(totals, [10 * weight for weight in weights]) == pytest.approx((ratio / 10, error / 10))
    assert ratio_and_error([2.0 * weight for weight in weights], weights) == pytest.approx((2.0, 0.0))


@pytest.mark.parametrize("gain", [0.0, 0.05, 0.3])
@pytest.mark.parametrize("loss", [0.0, 0.05, 0.3])
def test_interval_of_a_change_covers_it(gain: float, loss: float) -> None:
    """Counted over all outcomes of 30 items, of which each is gained or lost with these probabilities."""
    size, covered = 30, 0.0
    for up in range(size + 1):
        for down in range(size + 1 - up):
            same = size - up - down
            chance = math.comb(size, up) * math.comb(size - up, down) * gain**up * loss**down * (1 - gain - loss) ** same
            change, half = paired_change([0.0] * up + [1.0] * down + [1.0] * same, [1.0] * up + [0.0] * down + [1.0] * same)
            covered += chance * (abs(change - (gain - loss)) <= half)
    assert covered >= 0.92
