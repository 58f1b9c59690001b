"""Rules of a run's data."""

from __future__ import annotations

import pytest

from moe_train.config.composition.compose import compose
from moe_train.config.composition.validate import validate
from parallel.errors import ConfigError

PACKED = ["runtime=cpu", "data.reset_at_eod=true", "batch.micro_batch_size=2"]


def test_a_balance_loss_of_sequences_excludes_packing_several_of_them() -> None:
    with pytest.raises(ConfigError, match=r"packs the 2 sequences .* but model\.balance_losses has seq_aux_loss"):
        validate(compose(PACKED))
    validate(compose([*PACKED, "batch.micro_batch_size=1"]))
    losses = "model.balance_losses=[aux_loss,seq_aux_loss]"
    with pytest.raises(ConfigError, match="seq_aux_loss"):
        validate(compose([*PACKED, losses, "model.balance_loss_coeffs=[0,1e-4]"]))


@pytest.mark.parametrize(
    ("losses", "coefficients"), [("seq_aux_loss", "0"), ("aux_loss,seq_aux_loss", "1e-4,0"), ("aux_loss", "1e-4")]
)
def test_one_with_a_coefficient_of_0_does_not(losses: str, coefficients: str) -> None:
    """Megatron-Core then neither computes nor logs it (tests/data/test_packing.py)."""
    words = [f"model.balance_losses=[{losses}]", f"model.balance_loss_coeffs=[{coefficients}]"]
    validate(compose([*PACKED, *words]))
