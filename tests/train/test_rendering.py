"""What is masked as the assistant's is what the assistant wrote: checked character by character, template by template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from dspark.checkpoints.prompt_format import template_fingerprint
from dspark.errors import InvalidConfiguration
from dspark.train.records import Record
from dspark.train.rendering import Renderer, Unusable
from dspark.train.texts import Text

PAIR = Path(__file__).parents[2] / "pairs" / "tiny"
TURNS = (
    {"role": "user", "content": "Say: It is 4."},
    {"role": "assistant", "content": "It is 4."},
    {"role": "user", "content": "It is 4. Sure?"},
    {"role": "assistant", "content": "Yes, it is.\n"},
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TRIMMED = CHATML.replace("m['content']", "m['content'] | trim")
MARKED = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}<|im_start|>assistant\n"
    "{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}\n{% else %}<|im_start|>{{ m['role'] }}\n"
    "{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN_ENDS = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
THINKING = (  # like Qwen3: thoughts of all but the last answer are dropped, and the last gets an empty one
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
    "{% if loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m['content'].split('</think>')[-1].lstrip() }}"
    "{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def renderer(template: str | None, **options: Any) -> Renderer:
    tokenizer = AutoTokenizer.from_pretrained(PAIR / "target")
    tokenizer.chat_template = template
    return Renderer(tokenizer, **options)


def learned(own: Renderer, turns: tuple[dict[str, str], ...]) -> list[str]:
    """The runs of masked tokens, as text."""
    text = own.render(Record("a", "here", turns))
    assert isinstance(text, Text), text
    runs: list[list[int]] = [[]]
    for token, is_learned in zip(text.token_ids.tolist(), text.loss_mask.tolist(), strict=True):
        if is_learned:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    return [own.tokenizer.decode(run) for run in runs if run]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHATML, ["It is 4.<|im_end|>", "Yes, it is.\n<|im_end|>"]),
        (TRIMMED, ["It is 4.<|im_end|>", "Yes, it is.<|im_end|>"]),
        (MARKED, ["It is 4.<|im_end|>", "Yes, it is.\n<|im_end|>"]),
        (THINKING, ["It is 4.<|im_end|>", "<think>\n\n</think>\n\nYes, it is.\n<|im_end|>"]),
    ],
)
def test_the_answers_and_what_ends_them_and_nothing_else(template: str, expected: list[str]) -> None:
    """The user says the same words first, and later: only the assistant's own are learned."""
    assert learned(renderer(template), TURNS) == expected


def test_of_an_answer_that_comes_first_nothing_before_it() -> None:
    first = ({"role": "assistant", "content": "Hello."}, *TURNS)
    assert learned(renderer(CHATML), first)[0] == "Hello.<|im_end|>"


def test_no_token_that_reaches_into_the_answer_from_before_it() -> None:
    own = renderer(PLAIN_ENDS)
    first, second = learned(own, TURNS)
    assert "It is 4.".endswith(first.strip()) and "Yes" not in first
    assert second.strip() in "Yes, it is."


def test_thoughts_that_the_template_drops_are_not_looked_for() -> None:
    turns = ({**TURNS[0]}, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nFour."}, *TURNS[2:])
    assert learned(renderer(THINKING), turns)[0] == "Four.<|im_end|>"


def test_token_ids_are_those_of_the_template_as_served() -> None:
    own = renderer(CHATML)
    text = own.render(Record("a", "here", TURNS))
    assert isinstance(text, Text)
    served = own.tokenizer.apply_chat_template(list(TURNS), tokenize=True, return_dict=True)["input_ids"]
    assert text.token_ids.tolist() == served
    asked = own.tokenizer.apply_chat_template(list(TURNS[:1]), add_generation_prompt=True, return_dict=True)[
        "input_ids"
    ]
    assert text.prompt_length == len(asked) and served[: len(asked)] == asked


def test_records_that_teach_nothing_say_why() -> None:
    own = renderer(CHATML)

    def reason(*turns: dict[str, str]) -> str:
        text = own.render(Record("a", "here", turns))
        assert isinstance(text, Unusable)
        return text.reason

    unanswered = "no assistant turn; `dspark data regenerate` has the target answer"
    assert reason(TURNS[0]) == reason(TURNS[0], {"role": "assistant", "content": "  "}) == unanswered
    own = renderer("{% for m in messages %}{{ m['role'] }} spoke. {% endfor %}")
    assert "leaves every answer out" in reason(*TURNS)
    own = renderer("{{ raise_exception('roles must alternate') }}")
    assert "the chat template refuses it: roles must alternate" in reason(*TURNS)


def test_plain_text_is_learned_from_its_second_token_on() -> None:
    text = renderer(None).render(Record("a", "here", text="It is four."))
    assert isinstance(text, Text) and text.loss_mask.tolist() == [False] + [True] * (len(text) - 1)


def test_a_system_prompt_is_put_where_none_is() -> None:
    own = renderer(CHATML, system="Be brief.")
    assert own.with_system(TURNS[:1]) == [{"role": "system", "content": "Be brief."}, TURNS[0]]
    other = ({"role": "system", "content": "Be long."}, TURNS[0])
    assert own.with_system(other) == list(other)


def test_what_cannot_be_rendered_is_refused() -> None:
    with pytest.raises(InvalidConfiguration, match="no chat template"):
        renderer(None).render(Record("a", "here", TURNS))
    with pytest.raises(InvalidConfiguration, match="only fast tokenizers"):
        Renderer(object())


def test_templates_are_told_apart() -> None:
    prints = {template_fingerprint(renderer(t).tokenizer) for t in (None, CHATML, TRIMMED, CHATML)}
    assert len(prints) == 3
