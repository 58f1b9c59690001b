"""Login nodes read and check configs without torch and without waiting."""

from __future__ import annotations

import json
import subprocess
import sys


def _python(code: str) -> dict[str, float]:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    result: dict[str, float] = json.loads(done.stdout)
    return result


def test_config_and_layout_import_no_torch() -> None:
    composition = "moe_train.config.composition"
    modules = f"moe_train.config, {composition}.compose, {composition}.validate, parallel.layout, parallel.pipeline"
    loaded = _python(f"import json, sys, {modules}; print(json.dumps({{'n': len([m for m in sys.modules "
                     "if m.split('.')[0] in ('torch', 'megatron', 'numpy', 'transformers')])}))")  # fmt: skip
    assert loaded == {"n": 0}


def test_composing_and_validating_takes_well_under_a_second() -> None:
    """CPU seconds, so that a busy machine does not count; the best of three, so that a cold disk cache does not."""
    code = (
        "import json, time\n"
        "from moe_train.config.composition.compose import compose\n"
        "from moe_train.config.composition.validate import validate\n"
        "validate(compose(['parallel=tp2_pp2_ep2']))\n"
        "print(json.dumps({'cpu_s': time.process_time()}))\n"
    )
    assert min(_python(code)["cpu_s"] for _ in range(3)) < 0.8
