"""Console scripts of pyproject.toml. Only `moe_train` is importable in an installed package before it is imported
itself (`moe_train/__init__.py`), so the scripts begin here and name the module that they run.

Nothing else in `moe_train` refers to `launch` or `tools`.
"""

from __future__ import annotations

import importlib
from functools import partial


def _run(module: str) -> int | None:
    """Call `main` of a module. Returns the exit code, where it does not exit itself."""
    code: int | None = importlib.import_module(module).main()
    return code


train = partial(_run, "launch.main")
submit = partial(_run, "launch.slurm.submit")
preflight = partial(_run, "launch.preflight")
data = partial(_run, "tools.prepare_data")
dryrun = partial(_run, "tools.dryrun")
memory = partial(_run, "tools.memory")
plan = partial(_run, "tools.plan")
schedule = partial(_run, "tools.schedule")
convert = partial(_run, "tools.convert")
inspect = partial(_run, "tools.inspect")
evaluate = partial(_run, "tools.evaluate")
generate = partial(_run, "tools.generate")
chat = partial(_run, "tools.chat")
serve = partial(_run, "tools.serve")
