"""Sequential heads: the cheap second stage that lets a block's tokens depend on each other (paper 3.1, eq. 4-6).

Every head is a bias on the backbone's logits of low rank, `W2 latent`, and differs in how latent is made from the
previous token's embedding e = W1[previous], the backbone's hidden state and, for the RNN, a state carried along.
Shapes: B rows, N blocks, K positions of a block, H hidden size, r rank, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dspark.errors import CheckpointError

TABLE_BYTES = 64 * 2**20  # the largest table of all biases that is worth its memory: a vocabulary of 5,800 in bf16


class NoHead(nn.Module):
    """DFlash: every position is drawn from the backbone's own logits, independently of the others. Methods: MarkovHead's."""

    markov_w2: None = None

    def for_drawing(self) -> NoHead:
        return self

    def initial_state(self, batch: int) -> Tensor | None:
        return None

    def step(self, previous: Tensor, hidden: Tensor, state: Tensor | None) -> tuple[None, None, None]:
        return None, None, None

    def latents(self, previous: Tensor, hidden: Tensor) -> tuple[None, None]:
        return None, None

    def teacher_forced(self, previous: Tensor, hidden: Tensor) -> tuple[None, None]:
        return None, None


class MarkovHead(nn.Module):
    """Vanilla: the bias of a token depends on the token before it and nothing else (eq. 5)."""

    def __init__(self, vocab_size: int, hidden_size: int, rank: int) -> None:
        super().__init__()
        self.markov_w1 = nn.Embedding(vocab_size, rank)
        self.markov_w2 = nn.Linear(rank, vocab_size, bias=False)
        nn.init.normal_(self.markov_w1.weight, std=rank**-0.5)
        nn.init.zeros_(self.markov_w2.weight)  # starts as DFlash; W1 must not be zero too, or neither ever moves

    def initial_state(self, batch: int) -> Tensor | None:
        """What the first step of `batch` rows takes as state."""
        return None

    def _latent(self, e: Tensor, hidden: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return e, state

    def step(self, previous: Tensor, hidden: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """One position while decoding: previous tokens [B], hidden [B, H] -> (bias [B, V], e [B, r], next state)."""
        e = self.markov_w1(previous)
        latent, state = self._latent(e, hidden, state)
        return self.markov_w2(latent), e, state

    def for_drawing(self) -> MarkovHead | TabulatedHead:
        """What drafts the same tokens sooner: with a small vocabulary, all biases there are, looked up."""
        size = self.markov_w2.out_features
        return TabulatedHead(self) if size**2 * self.markov_w2.weight.element_size() <= TABLE_BYTES else self

    def latents(self, previous: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """All positions while training: true previous tokens [N, K], hidden [N, K, H] -> (latent [N, K, r], e [N, K, r])."""
        e = self.markov_w1(previous)
        return self._latent(e, hidden, None)[0], e

    def teacher_forced(self, previous: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """As `latents`, with the bias [N, K, V] itself."""
        latent, e = self.latents(previous, hidden)
        return self.markov_w2(latent), e


class TabulatedHead(nn.Module):
    """A vanilla head as a table: reading a row costs a fraction of the product it replaces, which every token waits for."""

    def __init__(self, head: MarkovHead) -> None:
        super().__init__()
        self.markov_w1 = head.markov_w1
        self.biases = nn.Parameter(head.markov_w2(head.markov_w1.weight).detach(), requires_grad=False)  # [V, V]

    def initial_state(self, batch: int) -> Tensor | None:
        return None

    def step(self, previous: Tensor, hidden: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """As MarkovHead.step."""
        return self.biases[previous], self.markov_w1(previous), None


class GatedHead(MarkovHead):
    """The hidden state chooses how much of the previous token's bias to take."""

    def for_drawing(self) -> MarkovHead:
        """Itself: no table holds biases that depend on the hidden state."""
        return self  # its biases depend on more than the token

    def __init__(self, vocab_size: int, hidden_size: int, rank: int) -> None:
        super().__init__(vocab_size, hidden_size, rank)
        self.gate_proj = nn.Linear(hidden_size + rank, rank)

    def _latent(self, e: Tensor, hidden: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return torch.sigmoid(self.gate_proj(torch.cat([hidden, e], -1))) * e, state


class RnnHead(MarkovHead):
    """A gated recurrence over the drafted tokens (eq. 6): remembers more than the last one."""

    def for_drawing(self) -> MarkovHead:
        """Itself: no table holds biases that depend on all tokens before."""
        return self

    def __init__(self, vocab_size: int, hidden_size: int, rank: int) -> None:
        super().__init__(vocab_size, hidden_size, rank)
        self.joint_proj = nn.Linear(2 * rank + hidden_size, 3 * rank)

    def initial_state(self, batch: int) -> Tensor | None:
        """[B, r] zeros: s_0 of eq. 6."""
        return self.markov_w1.weight.new_zeros(batch, self.markov_w1.embedding_dim)

    def _latent(self, e: Tensor, hidden: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor | None]:
        assert state is not None
        gate, candidate, output = self.joint_proj(torch.cat([state, e, hidden], -1)).chunk(3, -1)
        gate = torch.sigmoid(gate)
        return torch.tanh(output), gate * state + (1 - gate) * torch.tanh(candidate)  # output: from the old state

    def latents(self, previous: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """As MarkovHead.latents, position after position, for each state needs the one before."""
        e = self.markov_w1(previous)
        state = self.initial_state(len(previous))
        latents = []
        for k in range(previous.shape[1]):
            latent, state = self._latent(e[:, k], hidden[:, k], state)
            latents.append(latent)
        return torch.stack(latents, 1), e


class ConfidenceHead(nn.Module):
    """Logit of the probability that the token about to be drawn survives verification (eq. 7). Knows only what is before it."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.proj = nn.Linear(num_features, 1)
        nn.init.zeros_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)

    def forward(self, features: Tensor) -> Tensor:
        """features [..., H] or [..., H + r] -> logit [...]."""
        return self.proj(features).squeeze(-1)


HEADS = {"vanilla": MarkovHead, "gated": GatedHead, "rnn": RnnHead}


def make_head(kind: str, vocab_size: int, hidden_size: int, rank: int) -> MarkovHead | NoHead:
    """The head a checkpoint asks for; rank 0 is none at all."""
    if rank == 0:
        return NoHead()
    if kind not in HEADS:
        raise CheckpointError(
            f"expected markov_head_type to be one of {', '.join(HEADS)}; got {kind!r}. Check config.json of the drafter"
        )
    return HEADS[kind](vocab_size, hidden_size, rank)
