"""Login nodes read and check configs without torch and without waiting."""

from __future__ import annotations

from tests.startup import startup


def test_config_and_layout_import_no_torch() -> None:
    composition = "moe_train.config.composition"
    modules = f"moe_train.config, {composition}.compose, {composition}.validate, parallel.layout, parallel.pipeline"
    assert startup(f"import {modules}").slow == []


def test_composing_and_validating_is_quick() -> None:
    modules = "from moe_train.config.composition import compose, validate"
    code = f"{modules}; validate.validate(compose.compose(sys.argv[1:]))"
    assert startup(code, "parallel=tp2_pp2_ep2").calls < 1_250_000
