"""What a drafter's weights are before its first step."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch

from dspark.checkpoints.folder import open_checkpoint
from dspark.errors import CheckpointError, InvalidConfiguration
from dspark.target.modules import decoder_layers
from dspark.train.texts import Text

_log = logging.getLogger(__name__)

WHERE_IT_FITS = "where it fits"  # of start_from_target: with targets of other families, drawn weights
_PRIOR = 20.0  # pairs of a token that must be seen before they count for half


@torch.no_grad()
def start_as_identity(model: Any) -> None:
    """Layers that add nothing at first: the same start for every drafter of a shape, and a calmer one."""
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            parameter.zero_()


@torch.no_grad()
def start_from_target(model: Any, target: Any) -> None:
    """Layers, norms and keys of the target's own last layers, where names and shapes agree (Llama- and Qwen-style).

    fc hands on the highest feature, and hidden_norm is what the first copied layer expects before its keys: so the
    draft starts out reading context as the target does, which saves a short training its first thousand steps.
    """
    layers: Any = decoder_layers(target, target.config.get_text_config(decoder=True).num_hidden_layers)
    first = len(layers) - len(model.layers)
    if first <= min(model.config.target_layer_ids):
        raise InvalidConfiguration(
            f"start_from_target copies layers {first} and up, and needs a feature layer below; target_layer_ids are "
            f"{list(model.config.target_layer_ids)}: use fewer draft layers, an earlier feature layer, or random weights"
        )
    pairs = []
    for layer, own in zip(model.layers, layers[first:], strict=True):
        theirs = own.state_dict()
        parameters = layer.named_parameters()
        pairs += [(p, theirs[name]) for name, p in parameters if name in theirs and theirs[name].shape == p.shape]
    copied = sum(parameter.numel() for parameter, _ in pairs)
    whole = sum(parameter.numel() for parameter in model.layers.parameters())
    if copied < 0.9 * whole or not hasattr(layers[first], "input_layernorm"):
        raise InvalidConfiguration(
            f"start_from_target needs a target built like Llama or Qwen3; of the draft layers' {whole} values {copied} "
            f"have a counterpart in {type(target).__name__}: leave start_from_target out of the recipe, or set it to "
            f'"{WHERE_IT_FITS}"'
        )
    for parameter, value in pairs:
        parameter.copy_(value)
    width = model.config.hidden_size
    model.fc.weight.normal_(std=0.02 * model.fc.in_features**-0.5)
    nearest = max(i for i, layer in enumerate(model.config.target_layer_ids) if layer < first)
    model.fc.weight[:, nearest * width : (nearest + 1) * width] += torch.eye(width)
    model.hidden_norm.weight.copy_(layers[first].input_layernorm.weight)
    final_norm = getattr(target.get_decoder(), "norm", None)
    if final_norm is not None:
        model.norm.weight.copy_(final_norm.weight)


@torch.no_grad()
def start_from_drafter(model: Any, name: str) -> None:
    """The weights of a drafter of the same shape: a folder or a hub id."""
    checkpoint = open_checkpoint(name)
    expected = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    found = {key: header.shape for key, header in checkpoint.tensors.items()}
    different = [key for key, shape in expected.items() if found.get(key) != shape]
    if different:
        key = different[0]
        raise CheckpointError(
            f"start_from: {name} has another shape than the recipe's [drafter]: {key} is {found.get(key, 'missing')} "
            f"there and {expected[key]} here ({len(different)} tensors differ). Copy its shape into the recipe"
        )
    model.load_state_dict(checkpoint.read(list(expected)))


@torch.no_grad()
def start_head_from_texts(model: Any, texts: Sequence[Text]) -> None:
    """The Markov head as the best of its rank that pairs of tokens in the answers give: what follows what, and how often.

    bias[previous, next] = log(1 + c(previous, next) / (_PRIOR p(next))). That is log p(next | previous) / p(next), shrunk
    where pairs are few, up to a constant of the row, which no softmax sees: so pairs that never occur are 0, and the
    matrix is sparse. Errors weigh as often as their tokens occur. The same in every process.
    """
    head, size, rank = model.markov_head, model.config.vocab_size, model.config.markov_rank
    if rank == 0 or model.config.markov_head_type != "vanilla":
        raise InvalidConfiguration(
            "start_head_from_texts is for the vanilla Markov head: leave it out of the recipe, or set markov_rank and "
            'markov_head_type = "vanilla"'
        )
    pairs = torch.cat([text.token_ids[:-1].long() * size + text.token_ids[1:] for text in texts])
    learned = torch.cat([text.loss_mask[1:] for text in texts])
    pairs, counts = pairs[learned].unique(return_counts=True)
    where = torch.stack([pairs // size, pairs % size])
    before = torch.zeros(size).index_add_(0, where[0], counts.float())
    after = torch.zeros(size).index_add_(0, where[1], counts.float()) + 0.5
    law = after / after.sum()
    bias = torch.log1p(counts / (_PRIOR * law[where[1]]))
    rows, columns = (before + 1).sqrt(), law.sqrt()
    weighted = torch.sparse_coo_tensor(
        where, bias * rows[where[0]] * columns[where[1]], (size, size), check_invariants=True
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        u, s, v = torch.svd_lowrank(weighted, q=min(size, rank + 16), niter=4)
    w1 = u[:, :rank] * s[:rank].sqrt() / rows[:, None]
    w2 = v[:, :rank] * s[:rank].sqrt() / columns[:, None]
    length = w1.norm(dim=1).mean()  # as drawn weights have it: about 1 per row
    head.markov_w1.weight.copy_(w1 / length)
    head.markov_w2.weight.copy_(w2 * length)


def start(model: Any, settings: Any, target: Any, texts: Sequence[Text]) -> None:
    """By the recipe: drawn weights, the target's last layers, or another drafter's; the head from texts if wanted."""
    if settings.start_from:
        start_from_drafter(model, settings.start_from)
    elif settings.start_from_target == WHERE_IT_FITS:
        try:
            start_from_target(model, target)
        except InvalidConfiguration as error:
            _log.warning("starting from drawn weights, not from the target's: %s", str(error).partition(":")[0])
            start_as_identity(model)
    elif settings.start_from_target:
        start_from_target(model, target)
    else:
        start_as_identity(model)
    if settings.start_head_from_texts:
        start_head_from_texts(model, texts)
