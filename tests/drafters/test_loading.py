"""From a name to a drafter, and what is said when the name or its options mean nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from dspark.checkpoints import check_fit, save_drafter
from dspark.drafters import loading
from dspark.drafters.block import BlockDrafter
from dspark.drafters.block_model import BlockConfig, BlockModel
from dspark.drafters.draft_model import DraftModelDrafter, SelfDrafter
from dspark.drafters.loading import load_drafter
from dspark.drafters.ngram import NGramDrafter
from dspark.drafters.none import NoDrafter
from dspark.engine.engine import Engine
from dspark.errors import CheckpointError, InvalidConfiguration
from dspark.target.plan import View
from dspark.target.target import Target
from dspark.types import SamplingParams
from engine.models import VOCAB_SIZE, random_target

CONFIG = BlockConfig(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    vocab_size=VOCAB_SIZE,
    target_layer_ids=(0, 1),
    block_size=4,
    mask_token_id=1,
    num_target_layers=3,
    markov_rank=8,
)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    return random_target(tmp_path_factory.mktemp("target"))


@pytest.mark.parametrize(
    ("name", "kind"),
    [("none", NoDrafter), ("ngram", NGramDrafter), ("self", SelfDrafter), ("sparse", SelfDrafter)],
)
def test_built_in(name: str, kind: type, target: Target) -> None:
    assert isinstance(load_drafter(name, target), kind)


def test_options_reach_the_drafter(target: Target) -> None:
    assert load_drafter("ngram", target, length=3).length == 3
    assert load_drafter("self", target, length=2, num_layers=1).model.num_layers == 1
    assert load_drafter("self", target, window=8, num_layers=1).model.view == View(4, 8)


def test_sparse_is_the_target_itself_seeing_less(target: Target) -> None:
    model = load_drafter("sparse", target).model
    assert (model.num_layers, model.view) == (target.num_layers, View(4, 512))
    assert model.model is target.model and model.cache is target.cache and target.view is None
    assert load_drafter("sparse", target, num_layers=2, sinks=0).model.num_layers == 2


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("ngram", {"lenght": 3}, r"no option 'lenght'; did you mean 'length'\? It takes length, longest, shortest"),
        ("none", {"length": 3}, "no option 'length'. It takes no options"),
        ("ngram", {"length": 0}, "length >= 1"),
        ("sparse", {"window": 0}, "1 or more; got 0"),
        ("sparse", {"sinks": -1}, "0 or more; got -1"),
        ("self", {"sinks": 4}, "give window as well"),
        ("ngarm", {}, r"no drafter is called 'ngarm'; did you mean 'ngram'\? There are none, ngram, self, sparse"),
        ("zzz", {}, "no drafter is called 'zzz'. There are"),
        ("dspark", {}, "comes with the embedded target tiny"),
        ("nowhere.py:make", {}, "nowhere.py does not exist"),
        ("nowhere.py", {}, "expected file.py:function"),
    ],
)
def test_names_and_options_that_mean_nothing(name: str, options: dict[str, Any], message: str, target: Target) -> None:
    with pytest.raises(InvalidConfiguration, match=message):
        load_drafter(name, target, **options)


def test_a_function_that_gives_no_drafter(tmp_path: Path, target: Target) -> None:
    (tmp_path / "three.py").write_text("def make(target):\n    return 3\n")
    with pytest.raises(InvalidConfiguration, match="gave 3, which has no propose, release, length, feature_layers"):
        load_drafter(f"{tmp_path}/three.py:make", target)


def test_block_drafter_from_a_folder(tmp_path: Path, target: Target) -> None:
    save_drafter(BlockModel(CONFIG), tmp_path / "d")
    drafter = load_drafter(tmp_path / "d", target, length=2, window=5)
    assert isinstance(drafter, BlockDrafter) and drafter.length == 2 and drafter.rows.window == 5
    assert drafter.feature_layers == (0, 1)
    assert drafter.embed_tokens is target.model.get_input_embeddings()
    assert load_drafter(tmp_path / "d", target, dtype="bfloat16").dtype == torch.bfloat16
    with pytest.raises(
        InvalidConfiguration, match=r"'windows'; did you mean 'window'\? It takes length, window, own_embeddings, dtype"
    ):
        load_drafter(tmp_path / "d", target, windows=3)
    with pytest.raises(InvalidConfiguration, match="dtype must be"):
        load_drafter(tmp_path / "d", target, dtype="int8")


def test_drafters_of_the_embedded_pair(tmp_path: Path, target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target, "name", "tiny")
    monkeypatch.setattr(loading, "embedded_pair_folder", lambda name: tmp_path / name)
    save_drafter(BlockModel(CONFIG), tmp_path / "tiny" / "dspark")
    assert isinstance(load_drafter("dspark", target), BlockDrafter)
    with pytest.raises(CheckpointError, match="'dflash' is not in this installation"):
        load_drafter("dflash", target)
    with pytest.raises(
        InvalidConfiguration,
        match=r"did you mean 'dspark'\? There are none, ngram, self, sparse, dspark, dflash, eagle3, draft",
    ):
        load_drafter("dspork", target)


def test_a_causal_lm_becomes_a_draft_model(tmp_path: Path, target: Target) -> None:
    random_target(tmp_path / "small", num_layers=1)
    drafter = load_drafter(str(tmp_path / "small"), target, length=3)
    assert isinstance(drafter, DraftModelDrafter) and drafter.length == 3
    assert check_fit(str(tmp_path / "small"), target) == []
    random_target(tmp_path / "other", num_layers=1, vocab_size=VOCAB_SIZE + 3)
    with pytest.raises(CheckpointError, match=f"vocabulary of {VOCAB_SIZE} tokens; it has {VOCAB_SIZE + 3}"):
        load_drafter(str(tmp_path / "other"), target)
    assert check_fit(str(tmp_path / "other"), target) != []


def words(*, shift: int = 0) -> PreTrainedTokenizerFast:
    vocabulary = {f"t{(i + shift) % 50}": i for i in range(50)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(vocabulary, unk_token="t0")))


@pytest.mark.parametrize("padding", [-3, 0, 5])
def test_a_draft_model_may_be_padded_otherwise(
    padding: int, tmp_path: Path, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Qwen2.5's and Gemma 3's small models are, whose tokens are those of the large ones."""
    monkeypatch.setattr(target, "tokenizer", words())
    folder, prompt = str(tmp_path / "small"), list(range(9))
    random_target(tmp_path / "small", num_layers=1, vocab_size=VOCAB_SIZE + padding)
    words().save_pretrained(folder)
    drafter = load_drafter(folder, target, length=3)
    assert check_fit(folder, target) == []
    params = SamplingParams(temperature=0, max_tokens=12)
    [drafted] = Engine(target, drafter, "fixed:3").generate([prompt], params)
    assert drafted.token_ids == Engine(target).generate([prompt], params)[0].token_ids
    assert any(r.drafted for r in drafted.rounds)
    words(shift=1).save_pretrained(folder)
    with pytest.raises(CheckpointError, match="0% of the tokens have the same id"):
        load_drafter(folder, target)
    assert check_fit(folder, target) != []


def test_other_folders(tmp_path: Path, target: Target) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["BertModel"]}')
    with pytest.raises(
        CheckpointError, match="neither a trained drafter nor a causal language model: its config says BertModel"
    ):
        load_drafter(str(tmp_path), target)
    with pytest.raises(CheckpointError, match="does not exist"):
        load_drafter(f"{tmp_path}/missing", target)


FILE = """
from dspark.drafters.none import NoDrafter
def make(target, depth=1):
    drafter = NoDrafter()
    drafter.made_for, drafter.depth = target, depth
    return drafter
def anything(target, **options):
    drafter = make(target)
    drafter.options = options
    return drafter
not_a_function = 3
"""


def test_a_users_file(tmp_path: Path, target: Target) -> None:
    path = tmp_path / "my_drafter.py"
    path.write_text(FILE)
    drafter = load_drafter(f"{path}:make", target, depth=4)
    assert drafter.made_for is target and drafter.depth == 4
    assert load_drafter(f"{path}:anything", target, colour="red").options == {"colour": "red"}
    with pytest.raises(InvalidConfiguration, match=r"no option 'width'; did you mean 'depth'\? It takes depth"):
        load_drafter(f"{path}:make", target, width=4)
    for missing in ("mak", "not_a_function"):
        with pytest.raises(InvalidConfiguration, match=f"no function '{missing}'; it has make, anything"):
            load_drafter(f"{path}:{missing}", target)
    path.write_text("import nothing_of_this_name")
    with pytest.raises(InvalidConfiguration, match="cannot be imported: ModuleNotFoundError"):
        load_drafter(f"{path}:make", target)
