"""The FP8 and FP4 recipes of linear layers: one row each, which everything else reads. No torch import.

A further recipe is a row here, its name among the choices of `precision.fp8`, a file in `conf/precision/`, and, where
the `local` backend should emulate it, its tiles in `moe_train.model.fp8`.
"""

from __future__ import annotations

from dataclasses import dataclass

ADA, HOPPER, BLACKWELL = (8, 9), (9, 0), (10, 0)
GENERATIONS = {ADA: "Ada, Hopper or newer", HOPPER: "Hopper or newer", BLACKWELL: "Blackwell"}
"""Compute capability -> the generations of GPUs that have it or more."""


@dataclass(frozen=True)
class FP8Recipe:
    """Properties of one recipe.

    Args:
        name: value of `precision.fp8`, or of `precision.fp4`.
        field: `fp8` or `fp4`.
        option: file of `conf/precision/` that sets it.
        megatron: Megatron-Core's name (core/enums.py, `Fp8Recipe` and `Fp4Recipe`).
        capability: compute capability from which Transformer Engine has its kernels.
        alignment: what rows and columns of an operand must be a multiple of: 16 bytes (TE's cublaslt_gemm.cu and
            pytorch/utils.py `assert_dim_for_fp8_exec`), or whole blocks of 32 where scales are laid out by them
            (cast/mxfp8, cast/nvfp4).
        tile: values along the reduction dimension that share a scale; None for one scale a tensor.
        power_of_two_scales: default of Transformer Engine's recipe.
        settable_scales: whether a user may choose between powers of two and other scales: both ways, or never. MXFP8's
            E8M0 scales are powers of two by definition; delayed scaling and NVFP4 have no such option.
        scales_variable: environment variable from which Transformer Engine reads that choice while it is imported.
        variable_means_power_of_two: whether 1 asks for powers of two there; else for fp32 scales.
        delayed: scales come from the largest values of earlier steps. Then Megatron-Core enters one FP8 region for all
            layers, a recomputed tensor would be counted twice, and Transformer Engine pickles the history.
        sent_by_dispatch: whether `precision.fp8_dispatch` can send its tiles.
        gathers_high_precision: weights in FP8 are gathered in 16 bits and cast along rows and columns afterwards.
        element_bytes: an element with its share of the scales.
        cast_bytes: bytes that a cast of one 16-bit element moves. One scale a tensor takes its maximum first; smaller
            blocks are cast in one pass, along rows and along columns.
        cast_kernels: kernels of a cast.
        reordered_scales: scales must lie in the order of the tensor cores.
        e8m0_scales: scales are exponents alone (E8M0), rounded up so that nothing saturates.
        sent_bytes: of an element sent to other tensor-parallel ranks (transformer_engine/pytorch/module/linear.py).
        sent_copies: how often the gradient of outputs is sent: recipes with blocks send what was cast along rows and
            what was cast along columns.
    """

    name: str
    field: str
    option: str
    megatron: str
    capability: tuple[int, int]
    alignment: int
    tile: int | None
    power_of_two_scales: bool
    element_bytes: float
    cast_bytes: float
    cast_kernels: int
    sent_bytes: float
    sent_copies: int
    settable_scales: bool = False
    scales_variable: str = ""
    variable_means_power_of_two: bool = True
    delayed: bool = False
    sent_by_dispatch: bool = False
    gathers_high_precision: bool = False
    reordered_scales: bool = False
    e8m0_scales: bool = False

    @property
    def generation(self) -> str:
        """GPUs that have its kernels, in words."""
        return GENERATIONS[self.capability]

    @property
    def scaled_blocks(self) -> bool:
        """Whether a GEMM takes blocks with scales of their own."""
        return self.tile is not None


_BLOCK, _MX, _NV = 1 + 4 / 128, 1 + 1 / 32, 1 / 2 + 1 / 16
_ROWS = (
    FP8Recipe(
        name="block", field="fp8", option="fp8_block", megatron="blockwise", capability=HOPPER, alignment=16, tile=128,
        power_of_two_scales=True, settable_scales=True, scales_variable="NVTE_FP8_BLOCK_SCALING_FP32_SCALES",
        variable_means_power_of_two=False, sent_by_dispatch=True,
        element_bytes=_BLOCK, cast_bytes=2 + 2 * _BLOCK, cast_kernels=1, sent_bytes=_BLOCK, sent_copies=2,
    ),
    FP8Recipe(
        name="tensor", field="fp8", option="fp8_tensor", megatron="tensorwise", capability=ADA, alignment=16, tile=None,
        power_of_two_scales=False, settable_scales=True, scales_variable="NVTE_FP8_CURRENT_SCALING_POWER_2_SCALES",
        element_bytes=1.0, cast_bytes=2 + 2 + 1, cast_kernels=2, sent_bytes=1.0, sent_copies=1,
    ),
    FP8Recipe(
        name="delayed", field="fp8", option="fp8_delayed", megatron="delayed", capability=ADA, alignment=16, tile=None,
        power_of_two_scales=False, delayed=True,
        element_bytes=1.0, cast_bytes=2 + 1, cast_kernels=1, sent_bytes=1.0, sent_copies=1,
    ),
    FP8Recipe(
        name="mxfp8", field="fp8", option="mxfp8", megatron="mxfp8", capability=BLACKWELL, alignment=32, tile=32,
        power_of_two_scales=True, gathers_high_precision=True, reordered_scales=True, e8m0_scales=True,
        element_bytes=_MX, cast_bytes=2 + 2 * _MX, cast_kernels=1, sent_bytes=_MX, sent_copies=2,
    ),
    FP8Recipe(
        name="nvfp4", field="fp4", option="nvfp4", megatron="nvfp4", capability=BLACKWELL, alignment=32, tile=16,
        power_of_two_scales=False, reordered_scales=True,
        element_bytes=_NV, cast_bytes=2 + 2 * _NV, cast_kernels=1, sent_bytes=_NV, sent_copies=2,
    ),
)  # fmt: skip
RECIPES = {row.name: row for row in _ROWS}
FP8 = tuple(row.name for row in _ROWS if row.field == "fp8")
FP4 = tuple(row.name for row in _ROWS if row.field == "fp4")
