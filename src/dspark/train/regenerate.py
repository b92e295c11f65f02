"""Let the target write its drafters' training text.

    python -m dspark.train.regenerate --target DIR --data DIR --recipe recipes/tiny/text.toml --out DIR

A drafter is scored on what the target writes, so it learns from that and not from human text (paper 5.1). Token ids
are stored as they were drawn: decoding and encoding them again would give other tokens. Domains get equal shares of
the written tokens. Rows are sampled with a few temperatures; top-k and top-p stay off.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.cache_utils import Cache, DynamicLayer

from dspark.errors import InvalidConfiguration
from dspark.train.data import Prompt, Source, in_random_order, load_prompts
from dspark.train.settings import read_recipe


@dataclass(frozen=True)
class RegenerateSettings:
    """How the target's text is sampled.

    temperatures   one is drawn per row; repeat a value to give it more weight
    max_prompt     longest prompt in tokens; longer ones are skipped
    max_new        tokens written per prompt at most
    batch          rows decoded side by side
    chunk          prompts sorted by length together, and rows per shard
    num_tokens     stop once this many tokens are written
    """

    sources: tuple[Source, ...]
    temperatures: tuple[float, ...] = (0.7, 0.85, 1.0, 1.0, 1.0)
    max_prompt: int = 288
    max_new: int = 256
    batch: int = 256
    chunk: int = 1024
    num_tokens: int = 3_000_000
    seed: int = 0


@dataclass(frozen=True)
class Row:
    """One prompt with the answer written to it, an end token included if there was one."""

    token_ids: list[int]
    prompt_length: int


class RoomyLayer(DynamicLayer):
    """A cache layer that writes into room reserved beforehand: growing by concatenation copies everything every step."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.is_initialized = False
        self.room = room
        self.length = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
            batch, heads, _, _ = key_states.shape
            self.keys = key_states.new_empty(batch, heads, self.room, key_states.shape[-1])
            self.values = value_states.new_empty(batch, heads, self.room, value_states.shape[-1])
        end = self.length + key_states.shape[2]
        self.keys[:, :, self.length : end] = key_states
        self.values[:, :, self.length : end] = value_states
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_seq_length(self) -> int:
        return self.length


Draw = Callable[[Tensor, Tensor, int], Tensor]
"""(logits [B, V], which prompt each row belongs to [B], how many tokens it has written) -> tokens [B]."""


def sample(temperatures: Sequence[float]) -> Draw:
    """Draw at a temperature per prompt by inverting the cumulative law: one random number per row, not per token."""
    heat = torch.tensor(list(temperatures))

    def draw(logits: Tensor, owners: Tensor, num_written: int) -> Tensor:
        cumulative = torch.softmax(logits.float() / heat[owners, None], -1).cumsum(-1)
        uniform = torch.rand(len(logits), 1) * cumulative[:, -1:]
        return torch.searchsorted(cumulative, uniform, right=True).squeeze(1).clamp_(max=logits.shape[1] - 1)

    return draw


@torch.inference_mode()
def write_answers(
    model: Any, prompts: Sequence[list[int]], draw: Draw, max_new: int, end_tokens: Sequence[int]
) -> list[list[int]]:
    """Sampled answers, in the order of the prompts. Finished rows are dropped from the batch as soon as many are."""
    width = max(map(len, prompts))
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    attended = torch.zeros(len(prompts), width + max_new, dtype=torch.long)
    attended[:, width:] = 1
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        attended[row, width - len(prompt) : width] = 1
    positions = (attended.cumsum(-1) - 1).clamp_(min=0)
    ends = torch.tensor(list(end_tokens))

    answers: list[list[int]] = [[] for _ in prompts]
    owners = torch.arange(len(prompts))
    running = torch.ones(len(prompts), dtype=torch.bool)
    cache = Cache(layers=[RoomyLayer(width + max_new) for _ in range(model.config.num_hidden_layers)])
    for step in range(max_new):
        end = width + step
        start = 0 if step == 0 else end - 1
        logits = model(
            input_ids=ids,
            attention_mask=attended[:, :end],
            position_ids=positions[:, start:end],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        tokens = draw(logits, owners, step)
        for row in running.nonzero().flatten().tolist():
            answers[int(owners[row])].append(int(tokens[row]))
        running &= ~torch.isin(tokens, ends)
        num_running = int(running.sum())
        if num_running == 0:
            break
        ids = tokens[:, None]
        if num_running <= 0.8 * len(running):
            kept = running.nonzero().flatten()
            for layer in cache.layers:
                layer.batch_select_indices(kept)
            ids, attended, positions = ids[kept], attended[kept], positions[kept]
            owners, running = owners[kept], running[kept]
    return answers


def end_tokens_of(model: Any) -> list[int]:
    """What ends an answer, by the model's own generation config."""
    ends = model.generation_config.eos_token_id
    return list(ends) if isinstance(ends, list) else [ends]


def chunks(
    prompts: dict[Source, list[Prompt]], settings: RegenerateSettings, written: dict[str, int]
) -> Iterator[list[Prompt]]:
    """Chunks of one domain each: always the domain with the fewest written tokens; within it, sources by their shares."""
    rng = random.Random(settings.seed)
    endless = {source: in_random_order(rows, rng) for source, rows in prompts.items() if rows}
    if silent := written.keys() - {source.domain for source in endless}:
        raise InvalidConfiguration(
            f"expected prompts of at most {settings.max_prompt} tokens in every domain; {', '.join(sorted(silent))} has "
            "none: raise max_prompt, or take its sources out of the recipe"
        )
    while True:
        domain = min(written, key=lambda name: written[name])
        sources = [source for source in endless if source.domain == domain]
        chosen = rng.choices(sources, [source.share for source in sources], k=settings.chunk)
        yield [next(endless[source]) for source in chosen]


def save_shard(rows: Sequence[Row], path: Path) -> None:
    """Rows end to end: token_ids [n], prompt_lengths [rows], lengths [rows]. Written aside first, so readers see whole files."""
    partial = path.with_suffix(".partial")
    save_file(
        {
            "token_ids": torch.tensor([token for row in rows for token in row.token_ids], dtype=torch.int32),
            "lengths": torch.tensor([len(row.token_ids) for row in rows], dtype=torch.int32),
            "prompt_lengths": torch.tensor([row.prompt_length for row in rows], dtype=torch.int32),
        },
        partial,
    )
    partial.rename(path)


def regenerate(target: Path, data: Path, out: Path, settings: RegenerateSettings) -> None:
    """Write shards into `out` until settings.num_tokens tokens are written; going on after a stop continues the count."""
    tokenizer = AutoTokenizer.from_pretrained(target)
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.bfloat16).eval()
    end_tokens = end_tokens_of(model)
    out.mkdir(parents=True, exist_ok=True)
    num_shards = len(list(out.glob("shard-*.safetensors")))
    torch.manual_seed(settings.seed + num_shards)  # a continued run must not repeat the noise of the first
    rng = random.Random(settings.seed + num_shards)
    prompts = load_prompts(data, settings.sources, tokenizer, settings.max_prompt)
    written = {source.domain: 0 for source in settings.sources}
    start = time.time()
    for chunk in chunks(prompts, settings, written):
        chunk.sort(key=lambda prompt: len(prompt.token_ids))
        rows = []
        for first in range(0, len(chunk), settings.batch):
            batch = chunk[first : first + settings.batch]
            heat = [rng.choice(settings.temperatures) for _ in batch]
            answers = write_answers(model, [p.token_ids for p in batch], sample(heat), settings.max_new, end_tokens)
            rows += [Row(p.token_ids + answer, len(p.token_ids)) for p, answer in zip(batch, answers, strict=True)]
            written[batch[0].domain] += sum(map(len, answers))
        rng.shuffle(rows)
        save_shard(rows, out / f"shard-{num_shards:04d}.safetensors")
        num_shards += 1
        total = sum(written.values())
        print(
            f"{num_shards} shards, {total} tokens ({written}), {total / (time.time() - start):.0f} tokens/s", flush=True
        )
        if total >= settings.num_tokens:
            return


def main() -> None:
    """Write the texts that the recipe asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--recipe", type=Path, required=True, help="TOML with the tables [[sources]] and [regenerate]")
    parser.add_argument("--tokens", type=int, help="overrides num_tokens of the recipe")
    parser.add_argument("--seed", type=int)
    arguments = parser.parse_args()
    overrides = {"num_tokens": arguments.tokens, "seed": arguments.seed}
    settings = read_recipe(arguments.recipe, "regenerate", RegenerateSettings, overrides)
    regenerate(arguments.target, arguments.data, arguments.out, settings)


if __name__ == "__main__":
    main()
