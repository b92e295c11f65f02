"""Train a small chat model: its tokenizer, then a Qwen3, from scratch in less than an hour on a CPU, or a deeper one on from there.

    python -m dspark.train.target_lm --data DIR --recipe recipes/tiny/target.toml --out DIR

So that there is a real target to develop against wherever this project is. For results that matter, take a published
one. Steps are counted and not minutes: the same recipe sees the same tokens on every machine.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from dspark.errors import DSparkError, InvalidConfiguration
from dspark.train.data import Source, read_rows, split_held_out
from dspark.train.optim import make_optimizers, set_learning_rate, trapezoid
from dspark.train.settings import read_recipe

DOCUMENT_END, TURN_START, TURN_END, MASK = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|mask|>"
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN2_SPLIT = (  # one token per digit
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SHORTEST_PIECE = 9  # tokens; less teaches little but where documents end


_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)


@dataclass(frozen=True)
class TargetSettings:
    """Shape and training of the target.

    start_from            folder of a target to go on from, with its tokenizer; where it has fewer layers than
                          num_hidden_layers, the others start as the identity between its own
    tokenizer_characters  of text, by the sources' shares, from which the tokenizer is learned
    batch, row_length     rows per step and tokens per row
    warmup                share of the steps in which the learning rate rises; it falls to 0 over all the others
    stop_after            of the steps, for a run that another goes on from before the rate is 0
    num_validation        rows per source for the losses at the end, at most
    """

    sources: tuple[Source, ...]
    start_from: str | None = None
    vocab_size: int = 4096
    tokenizer_characters: int = 24_000_000
    hidden_size: int = 256
    intermediate_size: int = 768
    num_hidden_layers: int = 8
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 64
    max_position_embeddings: int = 2048
    steps: int = 1986
    stop_after: int | None = None
    batch: int = 16
    row_length: int = 512
    lr_matrices: float = 0.02
    lr_rest: float = 0.004
    weight_decay: float = 0.1
    warmup: float = 0.02
    clip: float = 1.0
    num_validation: int = 128
    save_seconds: float = 300.0
    log_every: int = 25
    seed: int = 0


def document(row: Mapping[str, Any]) -> str:
    """A row as the model reads it: ChatML for conversations, else the text itself; then the document's end."""
    if "conversations" not in row:
        return str(row["text"]) + DOCUMENT_END
    turns = [f"{TURN_START}{turn['role']}\n{turn['content']}{TURN_END}\n" for turn in row["conversations"]]
    return "".join(turns) + DOCUMENT_END


def train_tokenizer(documents: Mapping[Source, Sequence[str]], settings: TargetSettings) -> PreTrainedTokenizerFast:
    """Byte-level BPE from a sample of the documents; mask is a token that no text contains."""
    rng = random.Random(settings.seed)
    total = sum(source.share for source in documents)

    def sampled() -> Iterator[str]:
        for source, texts in documents.items():
            left = settings.tokenizer_characters * source.share / total
            while left > 0:
                text = rng.choice(texts)
                left -= len(text)
                yield text

    tokenizer = Tokenizer(models.BPE())
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words = pre_tokenizers.Split(Regex(QWEN2_SPLIT), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, bytes_only])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocab_size,
        special_tokens=[DOCUMENT_END, TURN_START, TURN_END, MASK],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sampled(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=CHAT_TEMPLATE,
        eos_token=TURN_END,
        pad_token=DOCUMENT_END,
        mask_token=MASK,
        additional_special_tokens=[TURN_START],
        model_max_length=settings.max_position_embeddings,
        clean_up_tokenization_spaces=False,
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """With only those keys in tokenizer_config.json that transformers 4 and 5 both understand."""
    tokenizer.save_pretrained(out)
    path = out / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config["additional_special_tokens"] = config.pop("extra_special_tokens", [TURN_START])
    for key in ("backend", "is_local", "local_files_only"):
        config.pop(key, None)
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def packed(documents: Sequence[list[int]], length: int, rng: random.Random) -> Iterator[list[int]]:
    """One pass in random order: rows of length tokens and the one after, each of which begins where a document (or a
    piece of a long one) does; what overhangs is dropped."""
    pieces = [ids[i : i + length + 1] for ids in documents for i in range(0, len(ids), length + 1)]
    pieces = [piece for piece in pieces if len(piece) >= SHORTEST_PIECE]
    rng.shuffle(pieces)
    row: list[int] = []
    for piece in pieces:
        row = row + piece
        if len(row) > length:
            yield row[: length + 1]
            row = []


def endless_rows(
    source: Source, documents: Sequence[list[int]], length: int, rng: random.Random
) -> Iterator[list[int]]:
    """Passes over one source without end."""
    if next(packed(documents, length, random.Random(0)), None) is None:
        raise InvalidConfiguration(
            f"expected enough text for a row of {length} tokens in {source.path!r}; it has {sum(map(len, documents))} "
            "tokens: take it out of the recipe, or lower row_length"
        )
    while True:
        yield from packed(documents, length, rng)


def make_target(tokenizer: PreTrainedTokenizerFast, settings: TargetSettings) -> Qwen3ForCausalLM:
    """A Qwen3 with tied embeddings whose blocks start as the identity."""
    return small_qwen3(
        settings,
        vocab_size=len(tokenizer),
        max_position_embeddings=settings.max_position_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation="eager",  # compiled, the faster one to train on a CPU
    )


def small_qwen3(shape: Any, **others: Any) -> Qwen3ForCausalLM:
    """A Qwen3 with the sizes that `shape` has, tied embeddings and blocks that start as the identity."""
    sizes = {name: getattr(shape, name) for name in _SIZES}
    model = Qwen3ForCausalLM(Qwen3Config(**sizes, tie_word_embeddings=True, **others))
    for layer in model.model.layers:
        nn.init.zeros_(layer.self_attn.o_proj.weight)
        nn.init.zeros_(layer.mlp.down_proj.weight)
    ends = {name: others[name] for name in ("eos_token_id", "pad_token_id")}
    model.generation_config = GenerationConfig(**ends)
    return model


def grow_from(model: Qwen3ForCausalLM, smaller: Qwen3ForCausalLM) -> None:
    """Give the model the weights of one that differs in depth alone, so that both compute the same function: its layers
    spread over the model's, and copies between them that add nothing yet (LLaMA Pro, arXiv:2401.02415, section 3.2)."""
    theirs = {name: getattr(smaller.config, name) for name in (*_SIZES, "vocab_size") if name != "num_hidden_layers"}
    ours = {name: getattr(model.config, name) for name in theirs}
    few, many = len(smaller.model.layers), len(model.model.layers)
    if ours != theirs or few > many:
        raise InvalidConfiguration(
            f"start_from has {few} layers and {theirs}, which cannot grow into {many} layers and {ours}: sizes must be "
            "equal, and layers no fewer"
        )
    origins = [index * few // many for index in range(many)]
    weights = {name: tensor for name, tensor in smaller.state_dict().items() if ".layers." not in name}
    model.load_state_dict(weights, strict=False)
    for index, (layer, origin) in enumerate(zip(model.model.layers, origins, strict=True)):
        layer.load_state_dict(smaller.model.layers[origin].state_dict())
        if index and origins[index - 1] == origin:
            nn.init.zeros_(layer.self_attn.o_proj.weight)
            nn.init.zeros_(layer.mlp.down_proj.weight)


def next_token_loss(model: Qwen3ForCausalLM, rows: Tensor) -> Tensor:
    """rows [B, S + 1] -> mean cross entropy of all tokens but the first."""
    hidden = model.model(input_ids=rows[:, :-1], use_cache=False).last_hidden_state
    return F.cross_entropy(model.lm_head(hidden).flatten(0, 1).float(), rows[:, 1:].flatten())


@torch.no_grad()
def held_out_losses(
    model: Qwen3ForCausalLM, held_out: Mapping[Source, Sequence[list[int]]], settings: TargetSettings
) -> dict[str, float]:
    """Nats per token of every source and, weighted by the sources' shares, of every domain; tiny sources may have none."""
    losses: dict[Source, float] = {}
    for source, documents in held_out.items():
        rows = list(packed(documents, settings.row_length, random.Random(0)))[: settings.num_validation]
        batches = [rows[first : first + settings.batch] for first in range(0, len(rows), settings.batch)]
        with torch.autocast("cpu", torch.bfloat16):
            total = sum(float(next_token_loss(model, torch.tensor(batch))) * len(batch) for batch in batches)
        if rows:
            losses[source] = total / len(rows)
    report = {source.path: loss for source, loss in losses.items()}
    for domain in dict.fromkeys(source.domain for source in losses):
        part = {source: loss for source, loss in losses.items() if source.domain == domain}
        shares = sum(source.share for source in part)
        report[domain] = sum(source.share * loss for source, loss in part.items()) / shares
    return {name: round(loss, 4) for name, loss in report.items()}


def save_target(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """In bf16, as AutoModelForCausalLM and AutoTokenizer load it."""
    half = Qwen3ForCausalLM(model.config).to(torch.bfloat16)
    half.load_state_dict({name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()})
    half.generation_config = model.generation_config
    half.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)  # written for the owner only
    save_tokenizer(tokenizer, out)


def train_target(data: Path, out: Path, settings: TargetSettings, compiled: bool = False) -> dict[str, float]:
    """Tokenizer and model into `out`; returns the losses on held-out text."""
    torch.manual_seed(settings.seed)
    train_text, held_text = {}, {}
    for source in settings.sources:
        train_rows, held_rows = split_held_out(read_rows(data, source))
        train_text[source], held_text[source] = [*map(document, train_rows)], [*map(document, held_rows)]
    if settings.start_from:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(settings.start_from)
    else:
        tokenizer = train_tokenizer(train_text, settings)
    encode: Callable[[list[str]], list[list[int]]] = lambda texts: [  # noqa: E731
        encoded.ids for encoded in tokenizer.backend_tokenizer.encode_batch_fast(texts)
    ]
    held_out = {source: encode(texts) for source, texts in held_text.items()}
    streams = [
        endless_rows(source, encode(texts), settings.row_length, random.Random(settings.seed + index))
        for index, (source, texts) in enumerate(train_text.items())
    ]
    model = make_target(tokenizer, settings)
    if settings.start_from:
        grow_from(model, Qwen3ForCausalLM.from_pretrained(settings.start_from, dtype=torch.float32))
    optimizers = make_optimizers(model, settings.lr_matrices, settings.lr_rest, settings.weight_decay)
    rest = [parameter for group in optimizers[0].param_groups for parameter in group["params"]]
    loss_of = torch.compile(next_token_loss) if compiled else next_token_loss
    rng, shares = random.Random(settings.seed), [source.share for source in settings.sources]
    started = last_save = time.time()
    smooth: float | None = None
    for step in range(settings.stop_after or settings.steps):
        set_learning_rate(optimizers, trapezoid(step, settings.steps, settings.warmup, 1 - settings.warmup))
        rows = torch.tensor([next(stream) for stream in rng.choices(streams, shares, k=settings.batch)])
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, rows)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise DSparkError(
                f"the loss became {value} in step {step + 1}; lower lr_matrices and lr_rest in the recipe"
            )
        loss.backward()
        nn.utils.clip_grad_norm_(rest, settings.clip)  # Muon's steps have one size whatever the gradient's
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        smooth = value if smooth is None else 0.95 * smooth + 0.05 * value
        if (step + 1) % settings.log_every == 0 or step < 3:
            tokens = (step + 1) * settings.batch * settings.row_length
            print(f"step={step + 1} seconds={time.time() - started:.0f} tokens={tokens} loss={smooth:.4f}", flush=True)
        if time.time() - last_save > settings.save_seconds:
            save_target(model, tokenizer, out)
            last_save = time.time()
    save_target(model, tokenizer, out)
    return held_out_losses(model.eval(), held_out, settings)


def main() -> None:
    """Train the target that the recipe describes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--recipe", type=Path, required=True, help="TOML with [[sources]] and the table [target]")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, help="overrides the recipe")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--compile", action="store_true", help="torch.compile; needs a C++ compiler")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    settings = read_recipe(arguments.recipe, "target", TargetSettings, {"steps": arguments.steps})
    print(json.dumps({"held out": train_target(arguments.data, arguments.out, settings, arguments.compile)}))


if __name__ == "__main__":
    main()
