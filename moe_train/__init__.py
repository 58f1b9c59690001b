"""Trains MoE language models on Megatron-Core.

In a clone this file does nothing. A wheel holds the code in `moe_train/_code`, with the folders of the repository
(setup.py says why); there this file puts that folder first on the path, so that `launch`, `parallel` and `tools` are
ours, and takes the modules of `moe_train` from it too. Each module has one name and one file either way.
"""

import os
import sys

_CODE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "_code")


def _use_private_folder() -> None:
    for name in ("launch", "parallel", "tools"):
        loaded = sys.modules.get(name)
        folders = [] if loaded is None else list(getattr(loaded, "__path__", ()))
        if loaded is not None and os.path.join(_CODE, name) not in folders:
            raise ImportError(
                f"moe_train has a package {name}, and this process has already imported another one "
                f"({getattr(loaded, '__file__', None) or folders}); import moe_train first, or run it as a command"
            )
    if _CODE not in sys.path:
        sys.path.insert(0, _CODE)
    __path__[:] = [os.path.join(_CODE, "moe_train")]


if os.path.isdir(_CODE):
    _use_private_folder()
