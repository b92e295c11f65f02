"""Measure tau of a drafter on held-out prompts, by domain, without decoding step by step.

    python -m dspark.train.acceptance --target DIR --drafter DIR DIR --data DIR --recipe recipes/tiny/text.toml

Under the coupled rule the output is fixed by the noise: it is what plain decoding writes with the same noise. A draft
token can only be accepted if all drafted before it were, so what was drafted before it is the output itself. One pass
over the finished text therefore tells for every possible anchor how many draft tokens a round starting there would
get accepted, and walking from round to round gives exactly what decoding would have done.

With `--rule rejection`, the paper's rule, the output depends on the drafts, and the prompts are decoded. It accepts more.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from dspark.checkpoints.dialects import MODELS
from dspark.drafters.block_model import TraceBatch
from dspark.drafters.eagle3_model import Eagle3Model
from dspark.drafters.loading import load_drafter
from dspark.engine.engine import Engine
from dspark.target.loading import load_target
from dspark.train.data import Source, load_prompts
from dspark.train.regenerate import RegenerateSettings, end_tokens_of, write_answers
from dspark.train.settings import read_recipe
from dspark.train.texts import Text, pad
from dspark.train.traces import TargetStates
from dspark.types import SamplingParams
from dspark.verify import RULES


class Guesser(Protocol):
    """A drafter, seen from finished text."""

    block_size: int

    def matches(self, texts: Sequence[Text], noise: Tensor) -> Tensor:
        """[B, A, K] of anchors 0 .. A-1 of each answer: is draft token k the text's own, given that those before it are?

        noise [B, A + K, V]: Gumbel noise of the answer's tokens, the first of them at 0.
        """
        ...


class BlockGuesser:
    """DSpark and DFlash."""

    def __init__(self, model: Any, target: Any) -> None:
        self.model, self.block_size = model.eval(), model.config.block_size
        self.embed, self.lm_head = target.get_input_embeddings(), target.get_output_embeddings()
        self.states = TargetStates(target, model.config.target_layer_ids)

    @torch.no_grad()
    def matches(self, texts: Sequence[Text], noise: Tensor) -> Tensor:
        token_ids, loss_mask = pad(texts)
        features, last_hidden = self.states(token_ids)
        num_anchors = max(len(text.token_ids) - text.prompt_length for text in texts)
        starts = torch.tensor([text.prompt_length for text in texts])
        anchors = (starts[:, None] + torch.arange(num_anchors)).clamp(max=token_ids.shape[1] - 1)
        batch = TraceBatch(
            token_ids, loss_mask, features.float(), last_hidden.float(), anchors, torch.ones_like(anchors).bool()
        )
        hidden = self.model.teacher_forced_hidden(batch, self.embed)
        found = torch.zeros(hidden.shape[:3], dtype=torch.bool)
        padded = torch.nn.functional.pad(token_ids, (0, self.block_size + 1), value=-1)
        for k in range(self.block_size):  # a position at a time, for memory
            previous = torch.stack([padded.gather(1, anchors + j).clamp(min=0) for j in range(k + 1)], -1)
            drawn = self.logits(hidden[:, :, : k + 1], previous).log_softmax(-1) + noise[:, k + 1 : k + 1 + num_anchors]
            found[:, :, k] = drawn.argmax(-1) == padded.gather(1, anchors + k + 1)
        return found

    def logits(self, hidden: Tensor, previous: Tensor) -> Tensor:
        """[B, A, V] at the last of the positions in hidden [B, A, k, H], of which each follows previous [B, A, k]."""
        base: Tensor = self.model.base_logits(hidden[:, :, -1].to(self.lm_head.weight.dtype), self.lm_head).float()
        latent, _ = self.model.head.latents(previous.flatten(0, 1), hidden.flatten(0, 1))
        if latent is None:
            return base
        return base + self.model.head.markov_w2(latent[:, -1]).view_as(base)


class ChainGuesser(BlockGuesser):
    """EAGLE-3: its hidden states follow the text by themselves."""

    def logits(self, hidden: Tensor, previous: Tensor) -> Tensor:
        logits: Tensor = self.lm_head(hidden[:, :, -1].to(self.lm_head.weight.dtype)).float()
        if self.model.target_ids is None:
            return logits
        return logits.masked_fill(~self.model.t2d, float("-inf"))


class LanguageModelGuesser:
    """A small causal LM that drafts one token after the other."""

    def __init__(self, model: Any, block_size: int) -> None:
        self.model, self.block_size = model.eval(), block_size

    @torch.no_grad()
    def matches(self, texts: Sequence[Text], noise: Tensor) -> Tensor:
        token_ids, _ = pad(texts)
        logits = self.model(input_ids=token_ids, use_cache=False).logits.float()
        num_anchors = max(len(text.token_ids) - text.prompt_length for text in texts)
        found = torch.zeros(len(texts), num_anchors, self.block_size, dtype=torch.bool)
        for row, text in enumerate(texts):
            answer = text.token_ids[text.prompt_length :].long()
            drawn = (
                logits[row, text.prompt_length : len(text.token_ids) - 1].log_softmax(-1) + noise[row, 1 : len(answer)]
            ).argmax(-1)
            right = torch.nn.functional.pad(drawn == answer[1:], (0, self.block_size))
            found[row, : len(answer)] = right.unfold(0, self.block_size, 1)[: len(answer)]
        return found


@dataclass(frozen=True)
class Outcome:
    """All rounds of all prompts of one domain.

    accepted[i]  accepted draft tokens of each round of prompt i
    """

    accepted: list[list[int]]
    block_size: int

    @property
    def tau(self) -> float:
        """Tokens per round, the bonus token included, over all rounds."""
        rounds = [a for prompt in self.accepted for a in prompt]
        return 1 + sum(rounds) / len(rounds)

    @property
    def standard_error(self) -> float:
        """Of tau, prompts being the independent unit (ratio estimator)."""
        n, tau = len(self.accepted), self.tau
        mean_rounds = sum(map(len, self.accepted)) / n
        spread = sum((sum(a + 1 for a in prompt) - tau * len(prompt)) ** 2 for prompt in self.accepted) / max(1, n - 1)
        return math.sqrt(spread / n) / mean_rounds

    @property
    def acceptance(self) -> list[float]:
        """P(position k is accepted | those before it are), k = 1 .. K."""
        rounds = [a for prompt in self.accepted for a in prompt]
        reached = [sum(a >= k for a in rounds) for k in range(self.block_size + 1)]
        return [reached[k + 1] / reached[k] if reached[k] else 0.0 for k in range(self.block_size)]


def walk(matched: Tensor, num_written: int) -> list[int]:
    """Accepted draft tokens of each round over an answer: matched [A, K] by anchor. The last round may be cut by the end.

    A round cut by max_new counts one token more than decoding, which leaves room for the bonus token.
    """
    accepted = matched.long().cumprod(-1).sum(-1).tolist()
    rounds, anchor = [], 0
    while anchor < num_written - 1:
        rounds.append(min(accepted[anchor], num_written - 1 - anchor))
        anchor += rounds[-1] + 1
    return rounds


def gumbel(prompt: int, length: int, vocab_size: int, seed: int) -> Tensor:
    """Noise [length, V] that belongs to a prompt, whichever batch it comes in."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + prompt)
    return -torch.empty(length, vocab_size).exponential_(generator=generator).clamp_(min=1e-20).log()


def matched_answers(
    target: Any,
    guessers: dict[str, Guesser],
    prompts: Sequence[list[int]],
    max_new: int,
    seed: int = 0,
    batch: int = 16,
) -> Iterator[tuple[str, Tensor, int]]:
    """(drafter, matches [A, K], tokens written) of each prompt in turn: all drafters on the same answers, temperature 1."""
    for first in range(0, len(prompts), batch):
        chosen = prompts[first : first + batch]
        room = max_new + max(guesser.block_size for guesser in guessers.values()) + 1
        noise = torch.stack([gumbel(first + i, room, target.config.vocab_size, seed) for i in range(len(chosen))])

        def draw(logits: Tensor, owners: Tensor, num_written: int, noise: Tensor = noise) -> Tensor:
            return (logits.float().log_softmax(-1) + noise[owners, num_written]).argmax(-1)

        answers = write_answers(target, chosen, draw, max_new, end_tokens_of(target))
        texts = [
            Text.after_prompt(torch.tensor(p + a, dtype=torch.int32), len(p))
            for p, a in zip(chosen, answers, strict=True)
        ]
        for name, guesser in guessers.items():
            for matched, answer in zip(guesser.matches(texts, noise), answers, strict=True):
                yield name, matched, len(answer)


def measure(
    target: Any, guessers: dict[str, Guesser], prompts: Sequence[list[int]], max_new: int, seed: int = 0
) -> dict[str, Outcome]:
    """tau of each drafter on the same answers, temperature 1."""
    accepted: dict[str, list[list[int]]] = {name: [] for name in guessers}
    for name, matched, num_written in matched_answers(target, guessers, prompts, max_new, seed):
        if rounds := walk(matched, num_written):
            accepted[name].append(rounds)
    return {name: Outcome(rounds, guessers[name].block_size) for name, rounds in accepted.items()}


def decode(engine: Engine, prompts: Sequence[list[int]], max_new: int, seed: int = 0) -> Outcome:
    """tau of an engine that verifies whole drafts, temperature 1: decoded, for rules under which drafts decide what is written."""
    each = [SamplingParams(temperature=1.0, max_tokens=max_new, seed=seed * 1_000_003 + i) for i in range(len(prompts))]
    accepted = [[r.accepted for r in g.rounds] for g in engine.generate(prompts, each) if g.rounds]
    return Outcome(accepted, engine.drafter.length)


def held_out_prompts(
    data: Path, sources: Iterable[Source], tokenizer: Any, domain: str, num: int, max_prompt: int, seed: int = 0
) -> list[list[int]]:
    """Prompts of a domain nobody trained on: sources by their shares, each prompt once."""
    rng = random.Random(seed)
    pools = {
        s: rng.sample(p, len(p))
        for s, p in load_prompts(data, [s for s in sources if s.domain == domain], tokenizer, max_prompt, True).items()
        if p
    }
    chosen: list[list[int]] = []
    while len(chosen) < num and any(pools.values()):
        left = [source for source in pools if pools[source]]
        chosen.append(pools[rng.choices(left, [source.share for source in left])[0]].pop().token_ids)
    return chosen


def load_guesser(folder: Path, target: Any, dtype: torch.dtype, block_size: int) -> Guesser:
    """A block drafter or EAGLE-3 (by its config's architecture), or a causal LM."""
    config = json.loads((folder / "config.json").read_text())
    [architecture] = config["architectures"]
    if architecture not in MODELS:
        return LanguageModelGuesser(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype), block_size)
    config_class, model_class = MODELS[architecture]
    own: Any = config_class.from_dict(config)
    model = model_class(own)
    weights = load_file(folder / "model.safetensors")
    model.load_state_dict({n: t.float() if t.is_floating_point() else t for n, t in weights.items()})
    return ChainGuesser(model, target) if isinstance(model, Eagle3Model) else BlockGuesser(model, target)


def _ways(
    arguments: argparse.Namespace, folders: dict[str, Path]
) -> Callable[[list[list[int]]], Iterable[tuple[str, Outcome]]]:
    """What measures every drafter on some prompts."""
    length, most, seed = arguments.block_size, arguments.max_new, arguments.seed
    if arguments.rule == "coupled":
        model = AutoModelForCausalLM.from_pretrained(arguments.target, dtype=torch.float32).eval()
        guessers = {name: load_guesser(folder, model, torch.float32, length) for name, folder in folders.items()}
        return lambda prompts: measure(model, guessers, prompts, most, seed).items()
    target = load_target(str(arguments.target), dtype=torch.float32)
    engines = {
        name: Engine(target, load_drafter(str(folder), target, length=length), f"fixed:{length}", arguments.rule)
        for name, folder in folders.items()
    }
    return lambda prompts: ((name, decode(engine, prompts, most, seed)) for name, engine in engines.items())


def main() -> None:
    """Print tau by domain of every drafter named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, required=True)
    parser.add_argument("--drafter", type=Path, nargs="+", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--recipe", type=Path, required=True, help="TOML with [[sources]] and [regenerate]")
    parser.add_argument("--prompts", type=int, default=64, help="per domain")
    parser.add_argument("--max-new", type=int, default=160)
    parser.add_argument("--block-size", type=int, default=7, help="of a causal LM")
    parser.add_argument("--rule", default="coupled", choices=list(RULES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    settings = read_recipe(arguments.recipe, "regenerate", RegenerateSettings)
    tokenizer = AutoTokenizer.from_pretrained(arguments.target)
    names = [folder.name for folder in arguments.drafter]
    names = [n if names.count(n) == 1 else str(f) for n, f in zip(names, arguments.drafter, strict=True)]
    tau_of = _ways(arguments, dict(zip(names, arguments.drafter, strict=True)))
    report: dict[str, dict[str, Any]] = {name: {} for name in names}
    for domain in dict.fromkeys(source.domain for source in settings.sources):
        prompts = held_out_prompts(
            arguments.data, settings.sources, tokenizer, domain, arguments.prompts, settings.max_prompt
        )
        for name, outcome in tau_of(prompts):
            report[name][domain] = {
                "tau": round(outcome.tau, 3),
                "standard_error": round(outcome.standard_error, 3),
                "prompts": len(outcome.accepted),
                "rounds": sum(map(len, outcome.accepted)),
                "acceptance": [round(a, 3) for a in outcome.acceptance],
            }
            print(name, domain, json.dumps(report[name][domain]), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
