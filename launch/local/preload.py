"""What the fork server imports once, so that no rank on CPU pays the seconds of importing torch and Megatron-Core.

Importing this module imports everything that a rank needs. It starts no thread, so forking afterwards is safe.
Only the fork server imports it, for it also changes how the process ends.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import os

from launch import quiet

# Imports make hundreds of thousands of objects that stay. Looking through them again and again for garbage takes a
# fifth of the time of the imports. In a rank it would also write to, and so copy, the memory that ranks share.
gc.disable()
quiet.silence()
# Optimizers import torch._dynamo in their first step, and ranks import Hydra to read their config: each of them for
# itself if it is not there yet.
_MODULES = (
    "torch.distributed", "megatron.core", "megatron.core.models.gpt", "moe_train.train", "torch._dynamo",
    "moe_train.config.composition.compose",
)  # fmt: skip
# An import that fails here fails again in the rank, which can explain it.
with contextlib.suppress(Exception):
    from parallel.runtime.imports import without_compilation

    with without_compilation():
        for _module in _MODULES:
            with contextlib.suppress(Exception):
                importlib.import_module(_module)
    from moe_train.config.composition import compose

    compose.schema()  # that ranks read their config with
gc.freeze()
gc.enable()
# Nothing is left to do when the server ends, and taking down all those modules takes a second.
atexit.register(os._exit, 0)
