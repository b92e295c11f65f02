import json

import pytest

from benchmarks import prompts
from benchmarks.prompts import EncodedPrompt, Prompt


class WordTokenizer:
    """One id per word; the template adds a marker word on either side."""

    chat_template = "there is one"

    def apply_chat_template(self, messages, add_generation_prompt, tokenize):
        assert add_generation_prompt and not tokenize
        return f"<user> {messages[0]['content']} <assistant>"

    def __call__(self, text, add_special_tokens, verbose):
        assert not add_special_tokens
        return {"input_ids": [len(word) for word in text.split()]}


def test_built_in_prompts_are_enough_of_three_domains_and_all_different():
    built_in = prompts.built_in()
    assert len({p.text for p in built_in}) == len(built_in) == 24
    assert [p.domain for p in prompts.by_turns(built_in)[:4]] == ["math", "code", "chat", "math"]


@pytest.mark.parametrize(
    "row",
    [
        {"turns": ["first", "second"]},
        {"conversations": [{"role": "system", "content": "rules"}, {"role": "user", "content": "first"}]},
        {"messages": [{"role": "user", "content": "first"}, {"role": "assistant", "content": "answer"}]},
        {"prompt": "first"},
        {"question": "first"},
    ],
)
def test_every_kind_of_row_gives_its_first_user_turn(tmp_path, row):
    file = tmp_path / "gsm8k.jsonl"
    file.write_text(json.dumps(row) + "\n\n" + json.dumps(row | {"domain": "own"}) + "\n")
    assert prompts.load(file) == [Prompt("math", "first"), Prompt("own", "first")]


def test_a_folder_is_read_file_by_file_and_unknown_files_name_their_domain(tmp_path):
    (tmp_path / "humaneval.jsonl").write_text('{"prompt": "a"}\n')
    (tmp_path / "poems.jsonl").write_text('{"prompt": "b"}\n')
    (tmp_path / "notes.txt").write_text("not read")
    assert prompts.load(tmp_path) == [Prompt("code", "a"), Prompt("poems", "b")]


def test_a_row_without_a_prompt_says_where_it_is_and_what_it_holds(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"prompt": "a"}\n{"answer": "b"}\n')
    with pytest.raises(ValueError, match=r"x\.jsonl:2.*got \['answer'\]"):
        prompts.load(tmp_path / "x.jsonl")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="found none"):
        prompts.load(tmp_path / "empty")


def test_prompts_go_through_the_chat_template_and_long_ones_are_left_out():
    read = prompts.encode([Prompt("a", "x yy zzz"), Prompt("a", "much too long a text")], WordTokenizer(), 5)
    assert read == [EncodedPrompt("a", (6, 1, 2, 3, 11))]


def test_groups_go_through_all_prompts_before_they_repeat_one():
    read = [EncodedPrompt("a", (i,)) for i in range(5)]
    groups = prompts.groups_of(read, size=2, count=3)
    assert [[p.token_ids[0] for p in g] for g in groups] == [[0, 1], [2, 3], [4, 0]]


def test_the_fingerprint_depends_on_every_token():
    one, other = [EncodedPrompt("a", (1, 2))], [EncodedPrompt("a", (1, 3))]
    assert prompts.fingerprint(one) != prompts.fingerprint(other)
    assert prompts.fingerprint(one) == prompts.fingerprint([EncodedPrompt("b", (1, 2))])
