"""The parts of a transformers model that this package touches: its decoder layers, and what comes out of them."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from dspark.errors import InvalidConfiguration, UnsupportedModel


def decoder_layers(model: nn.Module, num_layers: int) -> nn.ModuleList:
    """The list of decoder layers, whatever the family calls it."""
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_layers and len(list(module[0].parameters())) > 1:
            return module
    raise UnsupportedModel(
        f"{type(model).__name__} has no list of {num_layers} decoder layers; a decoder-only language model was expected"
    )


def with_layers(model: nn.Module, layers: nn.ModuleList, replacement: nn.ModuleList) -> nn.Module:
    """The module tree with `replacement` in the place of `layers`; all other modules and all weights are shared."""
    if model is layers:
        return replacement
    clone = copy.copy(model)
    clone._modules = {
        name: with_layers(child, layers, replacement) if child is not None and _contains(child, layers) else child
        for name, child in model._modules.items()
    }
    return clone


def with_own_hooks(layers: nn.ModuleList) -> nn.ModuleList:
    """The same layers as modules that can be hooked without the original noticing."""
    clones = [copy.copy(layer) for layer in layers]
    for clone in clones:
        clone._forward_hooks, clone._forward_pre_hooks = OrderedDict(), OrderedDict()
        clone._forward_hooks_with_kwargs, clone._forward_pre_hooks_with_kwargs = OrderedDict(), OrderedDict()
    return nn.ModuleList(clones)


def capture_outputs(layers: nn.ModuleList, wanted: Sequence[int], captured: list[Any]) -> list[Any]:
    """Hook the wanted layers so that each forward leaves their raw outputs [T, H] in `captured`, in the order of
    `wanted`; -1 is what the first layer reads. Returns the handles of the hooks."""
    handles: list[Any] = []
    for place, layer in enumerate(wanted):
        if not -1 <= layer < len(layers):
            raise InvalidConfiguration(
                f"features of layer {layer} were asked for; the target has layers 0 to {len(layers) - 1} "
                "(-1: its embeddings)"
            )
        if layer == -1:
            handles.append(layers[0].register_forward_pre_hook(_leave_input(captured, place), with_kwargs=True))
        else:
            handles.append(layers[layer].register_forward_hook(_leave_output(captured, place)))
    return handles


@contextmanager
def captured_outputs(layers: nn.ModuleList, wanted: Sequence[int]) -> Iterator[list[Tensor]]:
    """The raw outputs [T, H] of the wanted layers in a forward run inside the block."""
    captured: list[Any] = [None] * len(wanted)
    handles = capture_outputs(layers, wanted, captured)
    try:
        yield captured
    finally:
        for handle in handles:
            handle.remove()


def shared_kv_sources(model: nn.Module) -> dict[int, int]:
    """{layer: the layer whose keys and values it attends to}, for families whose last layers have none of their own."""
    stores: dict[str, int] = {}
    readers: list[tuple[int, str]] = []
    for module in model.modules():
        if getattr(module, "store_full_length_kv", False):
            stores[str(module.layer_type)] = int(module.layer_idx)  # type: ignore[arg-type]
        if getattr(module, "is_kv_shared_layer", False):
            readers.append((int(module.layer_idx), str(module.layer_type)))  # type: ignore[arg-type]
    return {layer: stores[kind] for layer, kind in readers if kind in stores}


def _contains(module: nn.Module, part: nn.Module) -> bool:
    return any(child is part for child in module.modules())


def _leave_output(captured: list[Any], place: int) -> Callable[..., None]:
    def hook(_module: nn.Module, _args: Any, output: Any) -> None:
        captured[place] = (output if isinstance(output, Tensor) else output[0])[0]

    return hook


def _leave_input(captured: list[Any], place: int) -> Callable[..., None]:
    def hook(_module: nn.Module, args: Any, kwargs: Any) -> None:
        captured[place] = (args[0] if args else kwargs["hidden_states"])[0]

    return hook
