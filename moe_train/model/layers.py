"""Numbers of the layers that a rank's modules belong to."""

from __future__ import annotations

from typing import Any


def layer_index(name: str, module: Any, num_layers: int) -> int:
    """Index of the layer of a module with a `layer_number`: those of multi-token prediction follow the decoder's.

    Args:
        name: of the module in its chunk.
        num_layers: of the decoder, on all ranks.
    """
    number: int = module.layer_number - 1
    # Some versions number the layers of multi-token prediction from 1 again.
    return number + num_layers if ".mtp." in f".{name}" and number < num_layers else number
