"""Train a small causal LM to draft for a target of the same vocabulary, by distillation on what the target wrote.

    python -m dspark.train.draft_lm --target DIR --texts DIR --recipe recipes/tiny/draft.toml --out DIR

The loss is the drafters': mostly L1 between the two laws, because what counts is how often a draw survives.
"""

from __future__ import annotations

import argparse
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from dspark.losses import l1_and_cross_entropy
from dspark.train.optim import RunningMean, make_optimizers, set_learning_rate, trapezoid
from dspark.train.settings import read_recipe
from dspark.train.target_lm import small_qwen3
from dspark.train.texts import batches, pad, read_texts


@dataclass(frozen=True)
class DraftSettings:
    """Shape and training of the draft LM; steps count batches; start_from: folder of one of this shape to go on from."""

    start_from: str | None = None
    hidden_size: int = 192
    num_hidden_layers: int = 2
    num_attention_heads: int = 3
    num_key_value_heads: int = 1
    head_dim: int = 64
    intermediate_size: int = 512
    steps: int = 3000
    tokens_per_batch: int = 2048
    lr_matrices: float = 0.02
    lr_rest: float = 0.004
    weight_decay: float = 0.05
    warmup: float = 0.02
    decay: float = 0.4
    mean_decay: float = 0.998
    cross_entropy: float = 0.1
    total_variation: float = 0.9
    save_seconds: float = 180.0
    max_length: int = 512
    seed: int = 0


def make_draft(target: Qwen3Config, settings: DraftSettings) -> Qwen3ForCausalLM:
    """A Qwen3 with the target's vocabulary, rotation and end tokens."""
    return small_qwen3(
        settings,
        vocab_size=target.vocab_size,
        max_position_embeddings=target.max_position_embeddings,
        rope_parameters=target.rope_parameters,
        bos_token_id=target.bos_token_id,
        eos_token_id=target.eos_token_id,
        pad_token_id=target.pad_token_id,
    )


def save_draft(model: Qwen3ForCausalLM, mean: RunningMean, target: Path, out: Path) -> None:
    """The averaged weights in bf16, with the target's tokenizer."""
    half = Qwen3ForCausalLM(model.config).to(torch.bfloat16)
    half.load_state_dict({**{k: v.to(torch.bfloat16) for k, v in mean.mean.items()}}, strict=False)
    half.tie_weights()
    half.generation_config = model.generation_config
    half.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)  # written for the owner only
    AutoTokenizer.from_pretrained(target).save_pretrained(out)


def train_draft(target: Path, texts_folder: Path, out: Path, settings: DraftSettings) -> None:
    """Train a draft LM on texts of the target and write it to `out`, and every few minutes on the way."""
    torch.manual_seed(settings.seed)
    teacher = AutoModelForCausalLM.from_pretrained(target, dtype=torch.bfloat16).eval().requires_grad_(False)
    model = make_draft(teacher.config, settings)
    if settings.start_from:
        model.load_state_dict(Qwen3ForCausalLM.from_pretrained(settings.start_from, dtype=torch.float32).state_dict())
    mean = RunningMean(model, settings.mean_decay)
    optimizers = make_optimizers(model, settings.lr_matrices, settings.lr_rest, settings.weight_decay)
    texts = read_texts(texts_folder, max_length=settings.max_length)
    out.mkdir(parents=True, exist_ok=True)
    step = num_tokens = epoch = 0
    started = last_save = time.time()
    smooth: float | None = None
    while step < settings.steps:
        for chosen in batches(texts, settings.tokens_per_batch, random.Random(settings.seed + epoch)):
            if step >= settings.steps:
                break
            token_ids, loss_mask = pad(chosen)
            asked = loss_mask[:, 1:]  # positions before an answer token
            with torch.no_grad():
                states = teacher.model(input_ids=token_ids[:, :-1], use_cache=False).last_hidden_state[asked]
                law = torch.softmax(teacher.lm_head(states).float(), -1)
            set_learning_rate(optimizers, trapezoid(step, settings.steps, settings.warmup, settings.decay))
            with torch.autocast("cpu", torch.bfloat16):
                states = model.model(input_ids=token_ids[:, :-1], use_cache=False).last_hidden_state[asked]
                logits = model.lm_head(states).float()
            l1, cross_entropy = l1_and_cross_entropy(logits, law, token_ids[:, 1:][asked])
            loss = settings.cross_entropy * cross_entropy.mean() + settings.total_variation * l1.mean()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            mean.update(model)
            step += 1
            num_tokens += sum(len(text.token_ids) for text in chosen)
            accepted = 1 - 0.5 * float(l1.detach().mean())
            smooth = accepted if smooth is None else 0.95 * smooth + 0.05 * accepted
            if step % 50 == 0:
                print(
                    f"step={step} seconds={time.time() - started:.0f} tokens={num_tokens} acceptance={smooth:.4f} "
                    f"cross_entropy={float(cross_entropy.detach().mean()):.3f}",
                    flush=True,
                )
            if time.time() - last_save > settings.save_seconds:
                save_draft(model, mean, target, out)
                last_save = time.time()
        epoch += 1
    save_draft(model, mean, target, out)


def main() -> None:
    """Train the draft LM that the recipe describes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, required=True)
    parser.add_argument("--texts", type=Path, required=True, help="folder written by dspark.train.regenerate")
    parser.add_argument("--recipe", type=Path, required=True, help="TOML with the table [draft]")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    settings = read_recipe(arguments.recipe, "draft", DraftSettings, {"steps": arguments.steps})
    train_draft(arguments.target, arguments.texts, arguments.out, settings)


if __name__ == "__main__":
    main()
