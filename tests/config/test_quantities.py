"""From segments of a config to values by progress: published schedules, presets, steps and tokens, wrong segments."""

from __future__ import annotations

import numpy as np
import pytest

from moe_train.config.composition.compose import compose
from moe_train.config.composition.validate import validate
from moe_train.config.quantities import LR, RunProgress, fixed_ends, schedule_of
from moe_train.config.resolve import follows_length, progress_of
from moe_train.config.schedule import ScheduleSegment
from moe_train.config.schema import Config
from moe_train.schedules import BatchSchedule, Schedule
from parallel.errors import ConfigError

T, B = 10**12, 10**9
DEEPSEEK = ["experiment=deepseek_v3/pretrain", "runtime=cuda"]


def schedules(*words: str) -> tuple[Config, RunProgress]:
    cfg = compose(list(words))
    validate(cfg)
    return cfg, progress_of(cfg)


def test_deepseek_v3_at_the_published_points() -> None:
    """Technical report, section 4.2."""
    cfg, run = schedules(*DEEPSEEK)
    rate = schedule_of(cfg, LR, run)
    warm = run.tokens_after(2000)
    assert warm == 2000 * 3072 * 4096
    assert rate.value_at(0) == 0
    assert rate.value_at(warm // 2) == 1.1e-4
    assert [rate.value_at(at) for at in (warm, 5 * T, 10 * T)] == [2.2e-4] * 3
    assert rate.value_at(10 * T + 4300 * B // 2) == pytest.approx((2.2e-4 + 2.2e-5) / 2, rel=1e-12)
    assert [rate.value_at(at) for at in (14_300 * B, 14_633 * B - 1)] == [2.2e-5] * 2
    assert [rate.value_at(at) for at in (14_633 * B, 14_800 * B)] == [7.3e-6] * 2
    sizes = [run.batches.size_at(at // 4096) for at in (0, 469 * B - 4096, 469 * B + 4096 * 15360, 14 * T)]
    assert sizes == [3072, 14592, 15360, 15360]
    assert all(size % (128 * cfg.batch.micro_batch_size) == 0 for size in run.batches.sizes)
    bias, mtp = (schedule_of(cfg, name, run) for name in ("router_bias_update_rate", "mtp_loss_coeff"))
    assert [bias.value_at(at) for at in (0, 14_300 * B - 1, 14_300 * B)] == [1e-3, 1e-3, 0]
    assert [mtp.value_at(at) for at in (0, 10 * T - 1, 10 * T)] == [0.3, 0.3, 0.1]
    assert 14.8 * T <= run.run_tokens < 14.8 * T + 15360 * 4096


def test_deepseek_v3_at_1000_random_token_counts() -> None:
    cfg, run = schedules(*DEEPSEEK)
    rate, tokens = schedule_of(cfg, LR, run), np.random.default_rng(1).integers(0, 14_800 * B, 1000)
    tokens[:20] //= 600  # in the warm-up too
    warm = 2000 * 3072 * 4096
    cosine = 2.2e-5 + (2.2e-4 - 2.2e-5) * (1 + np.cos(np.pi * (tokens - 10 * T) / 4.3 / T)) / 2
    expected = np.select(
        [tokens < warm, tokens < 10 * T, tokens < 14.3 * T, tokens < 14.633 * T],
        [2.2e-4 * tokens / warm, 2.2e-4, cosine, 2.2e-5],
        7.3e-6,
    )
    np.testing.assert_allclose([rate.value_at(int(one)) for one in tokens], expected, rtol=1e-12)
    ramp = 3072 + np.minimum(tokens / (469 * B), 1) * (15360 - 3072)
    found = np.array([run.batches.size_at(int(one) // 4096) for one in tokens])
    # A size changes with a step, so it is behind the ramp by at most the tokens of a step.
    late = 3072 + np.clip((tokens - 15360 * 4096) / (469 * B), 0, 1) * (15360 - 3072)
    assert (found <= np.floor(ramp / 768 + 1e-9) * 768).all()
    assert (found >= np.floor(late / 768) * 768).all()


PRESETS = {
    "wsd": lambda x: 1e-3 * np.where(x < 0.8, 1, 1 - np.sqrt(np.maximum(x - 0.8, 0) / 0.2)),
    "multi_step": lambda x: 1e-3 * np.select([x < 0.8, x < 0.9], [1, 0.316], 0.1),
    "inverse_sqrt": lambda x: 1e-3 * np.sqrt(0.1 / x),
    "power": lambda x: np.where(
        x < 0.9,
        1e-3 * (x / 0.1) ** -0.51,
        1e-3 * 9**-0.51 * np.exp(np.log(1e-5 / (1e-3 * 9**-0.51)) * (x - 0.9) * 10),
    ),
}


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_at_1000_random_token_counts(preset: str) -> None:
    """200 steps of 1,024 tokens, of which 20 are warm-up."""
    cfg, run = schedules(f"schedule={preset}", "train.steps=200")
    tokens = np.random.default_rng(2).integers(0, 204_800, 1000)
    share = np.maximum(tokens / 204_800, 1e-9)
    expected = np.where(share < 0.1, 1e-3 * share / 0.1, PRESETS[preset](share))
    found = [schedule_of(cfg, LR, run).value_at(int(one)) for one in tokens]
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-9 * 1e-3)
    assert schedule_of(cfg, LR, run).value_at(20_480) == 1e-3


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_fit_a_short_run(preset: str) -> None:
    cfg, run = schedules(f"schedule={preset}", "train.steps=20")
    assert schedule_of(cfg, LR, run).end == 20 * 1024


def test_segments_with_warm_up_are_the_short_form() -> None:
    """The same cosine in segments as Megatron-Core computes it in steps."""
    from moe_train.config.learning_rate import rate_of

    short, run = schedules("train.steps=100", "schedule.decay_steps=80")
    long, _ = schedules("train.steps=100", "schedule.lr=[{shape:cosine,until_steps:80},{}]")
    for step in range(100):
        tokens = run.tokens_after(step)
        assert rate_of(long, run, tokens, step) == pytest.approx(rate_of(short, run, tokens, step), rel=1e-12)


def test_values_start_where_they_are_told() -> None:
    cfg, run = schedules(
        "schedule.lr=[{shape:linear,until_steps:50,start:1e-5,value:1e-4},{shape:cosine,start:2e-4,ratio:0.5}]",
        "schedule.warmup_steps=0", "schedule.weight_decay=[{value:0.5,until_fraction:0.25},{ratio:2}]",
        "schedule.mtp_loss_coeff=[{until_steps:0},{shape:linear,start:1}]", "model.mtp_num_layers=1",
    )  # fmt: skip
    rate, decay, mtp = (schedule_of(cfg, name, run) for name in (LR, "weight_decay", "mtp_loss_coeff"))
    assert [rate.value_at(at * 1024) for at in (0, 50, 200)] == [1e-5, 2e-4, 5e-4]
    assert rate.value_at(50 * 1024 - 1) == pytest.approx(1e-4, rel=1e-4)
    assert [decay.value_at(at * 1024) for at in (0, 49, 50, 200)] == [0.5, 0.5, 0.2, 0.2]
    assert [mtp.value_at(at * 1024) for at in (0, 100, 200)] == [1, 0.5, 0]


RAMP = "schedule.batch_size=[{shape:linear,start:2,until_tokens:10240,value:8},{}]"


def test_steps_and_tokens_of_a_ramp_are_as_counted_one_by_one() -> None:
    _, run = schedules(RAMP, "train.steps=40")
    assert run.batches.sizes == (2, 4, 6, 8)
    tokens = 0
    for step in range(40):
        assert (run.tokens_after(step), run.steps_after(tokens)) == (tokens, step)
        if tokens:
            assert run.steps_after(tokens - 1) == step
        size = int((2 + 6 * min(1, tokens / 10240)) // 2) * 2
        tokens += 128 * size
    assert run.run_tokens == tokens
    by_tokens = compose([RAMP, f"train.tokens={tokens}"])
    assert progress_of(by_tokens).steps == 40


def test_steps_to_come_are_counted_from_the_progress_of_a_run() -> None:
    """Batches of another size before the run resumed do not move the end of its schedule."""
    cfg, run = schedules("train.steps=40", "schedule=wsd", "batch.global_batch_size=16")
    resumed = progress_of(cfg, 10, 10 * 8 * 128)
    assert resumed.tokens_after(10) == 10 * 8 * 128
    assert resumed.run_tokens == (10 * 8 + 30 * 16) * 128
    assert resumed.steps_after(resumed.run_tokens) == 40
    assert resumed.tokens_after(9) == 10 * 8 * 128  # in the past: not after the tokens so far
    assert schedule_of(cfg, LR, resumed).end == resumed.run_tokens < run.run_tokens


def test_ends_can_be_fixed() -> None:
    cfg, run = schedules("schedule=wsd")
    assert follows_length(cfg)
    cfg.schedule.lr = fixed_ends(cfg, LR, run)
    assert not follows_length(cfg)
    before = compose(["schedule=wsd"])
    longer = compose(["schedule=wsd", "train.steps=300"])
    longer.schedule.lr = cfg.schedule.lr
    for tokens in range(0, 204_800, 1000):
        expected = schedule_of(before, LR, run).value_at(tokens)
        assert schedule_of(longer, LR, progress_of(longer)).value_at(tokens) == expected
    assert schedule_of(longer, LR, progress_of(longer)).value_at(250_000) == 0


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("schedule=cosine", True), ("schedule=constant", False), ("schedule.decay_steps=9", False),
        ("schedule.lr=[{until_tokens:9},{}]", False), ("schedule.lr=[{shape:cosine}]", True),
        ("schedule.lr=[{shape:cosine,until_steps:9},{}]", False), ("schedule.lr=[{until_fraction:0.5},{}]", True),
        ("schedule=inverse_sqrt", False),
    ],
)  # fmt: skip
def test_what_follows_the_length_of_a_run(words: str, expected: bool) -> None:
    assert follows_length(compose([words])) is expected


def test_without_segments_a_value_is_that_of_the_config() -> None:
    cfg = Config()
    run = progress_of(cfg)
    assert schedule_of(cfg, "weight_decay", run) == Schedule.constant(cfg.optimizer.weight_decay)
    assert schedule_of(cfg, "balance_loss_scale", run) == Schedule.constant(1.0)
    assert run.batches.segments == BatchSchedule.constant(8).segments


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["schedule.lr=[{shape:1-sqrt,exponent:2}]"], r"schedule.lr\[0\] has exponent=2, which 1-sqrt does not have"),
        (["schedule.lr=[{shape:power,exponent:2}]"], r"exponent=2, which is not below 0; use .*exponent:-2.0"),
        (["schedule.lr=[{shape:cosine,value:1,ratio:1}]"], r"schedule.lr\[0\] has value=1 and ratio=1"),
        (["schedule.lr=[{until_steps:30},{until_steps:30},{}]"], r"lr\[1\] ends at 30,720 tokens, not after 30,720"),
    ],
)
def test_segments_that_cannot_be(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(compose(words))


def test_a_segment_of_no_length_at_the_beginning_counts_for_nothing() -> None:
    cfg = Config()
    cfg.schedule.warmup_steps, cfg.schedule.lr = 0, [ScheduleSegment(until_steps=0, value=5.0), ScheduleSegment()]
    assert schedule_of(cfg, LR, progress_of(cfg)).value_at(0) == 5.0
