"""What is shown at 60 and 120 columns, on a terminal and without one."""

from __future__ import annotations

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from vcpo.monitor import words
from vcpo.monitor.progress import Phase, RichProgress, SilentProgress, print_summary, render_phase

FIGURES = {
    "reward": 0.413, "accuracy": 0.5, "greedy_accuracy": 0.612, "ess_ratio": 0.723, "lag_mean": 1.75,
    "step_scale": 0.851, "tokens_per_second": 41234.0, "loss": -0.02,
}  # fmt: skip

SUMMARY = {
    "accuracy_before": 0.402, "accuracy_before_interval": [0.36, 0.445],
    "accuracy_after": 0.697, "accuracy_after_interval": [0.656, 0.735],
    "greedy_accuracy_before": 0.301, "greedy_accuracy_before_interval": [0.263, 0.342],
    "greedy_accuracy_after": 0.724, "greedy_accuracy_after_interval": [0.684, 0.761],
    "wall_seconds": 200.0, "seconds_sampling": 100.0, "seconds_training": 84.0, "seconds_waiting": 30.0,
    "tokens_per_second": 44800.0, "lag_mean": 1.7, "lag_max": 3, "ess_ratio_mean": 0.72,
    "run_folder": "runs/maze-vcpo", "report": "runs/maze-vcpo/report.html",
    "model_folder": "runs/maze-vcpo/model",
}  # fmt: skip


class Clock:
    """A clock that moves when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def text_console(width: int, terminal: bool = False) -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    return Console(
        file=file, width=width, force_terminal=terminal, color_system=None, legacy_windows=False
    ), file


def rendered(phase: Phase, width: int) -> list[str]:
    console, file = text_console(width)
    console.print(render_phase(phase, width))
    return file.getvalue().splitlines()


def training_phase(clock: Clock) -> Phase:
    phase = Phase("training", 600, clock)
    for _ in range(30):
        clock.now += 2.0
        phase.advance(FIGURES)
    return phase


def test_a_wide_terminal_shows_everything():
    bar, figures = rendered(training_phase(Clock()), 120)
    # 30 of 600 units took 60 s: 570 more take 1140 s.
    assert bar.startswith("training ━") and bar.endswith(" 30/600  1:00 < 19:00") and len(bar) == 120
    assert figures == "reward 0.41  greedy 0.61  acc 0.50  ESS 0.72  lag 1.8  scale 0.85  tok/s 41.2 k"
    assert rendered(training_phase(Clock()), 80)[1] == figures


def test_a_narrow_terminal_drops_figures_and_never_wraps():
    bar, figures = rendered(training_phase(Clock()), 60)
    assert bar.endswith(" 30/600  1:00 < 19:00") and len(bar) == 60
    assert figures == "reward 0.41  greedy 0.61  acc 0.50  ESS 0.72  lag 1.8"


@given(st.integers(24, 200), st.integers(0, 40), st.integers(0, 9), st.text("abc 界", max_size=30))
def test_two_lines_at_any_width(width: int, done: int, hours: int, title: str):
    clock = Clock()
    phase = Phase(title, 40, clock)
    for _ in range(done):
        phase.advance(FIGURES)
    clock.now += hours * 3600
    console, file = text_console(width)
    console.print(render_phase(phase, width))
    lines = file.getvalue().splitlines()
    assert len(lines) == 2
    assert all(len(line) <= width for line in lines)


def test_a_phase_without_a_total_pulses_and_one_without_a_reward_shows_the_loss():
    phase = Phase("warm start", None, Clock())
    phase.advance({"loss": 1.25, "grad_norm": 3.0})
    bar, figures = rendered(phase, 60)
    assert bar.endswith(" 1  0:00") and figures == "loss 1.25"


def test_figures_stay_until_they_are_measured_again_and_nan_is_not_shown():
    phase = Phase("training", 10, Clock())
    phase.advance({"reward": 0.5, "greedy_accuracy": 0.25})
    phase.advance({"reward": float("nan"), "ess_ratio": 0.5})
    assert phase.labelled() == [("reward", "0.50"), ("greedy", "0.25"), ("ESS", "0.50")]


def test_without_a_terminal_every_twentieth_is_one_plain_line():
    clock = Clock()
    console, file = text_console(40)
    progress = RichProgress(console, clock)
    progress.phase("training", 600)
    for _ in range(600):
        clock.now += 0.5
        progress.advance(FIGURES)
    progress.note("[bold] is not markup, and " + "a long line is not folded " * 3)
    progress.close()
    lines = file.getvalue().splitlines()
    assert len(lines) == 22
    assert lines[0] == "training: 600 steps, started"
    assert lines[1] == (
        "training 30/600, reward 0.41, greedy 0.61, acc 0.50, ESS 0.72, lag 1.8, scale 0.85, tok/s 41.2 k, "
        "0:15 gone, about 4:45 left"
    )
    assert lines[20].startswith("training 600/600") and lines[20].endswith("5:00 gone")
    assert lines[21].startswith("[bold] is not markup")
    assert "\x1b" not in file.getvalue()


def test_a_short_phase_prints_each_unit_once():
    console, file = text_console(80)
    progress = RichProgress(console, Clock())
    progress.phase("training", 3)
    for _ in range(3):
        progress.advance({})
    assert [line.split(",")[0] for line in file.getvalue().splitlines()[1:]] == [
        "training 1/3", "training 2/3", "training 3/3",
    ]  # fmt: skip


def test_a_terminal_gets_a_live_bar_with_notes_above_it():
    console, file = text_console(60, terminal=True)
    progress = RichProgress(console, Clock())
    progress.phase("training", 4)
    progress.advance(FIGURES)
    progress.note("checkpoint written")
    progress.close()
    progress.close()
    shown = file.getvalue()
    assert "checkpoint written" in shown
    assert "1/4" in shown[shown.index("checkpoint written") :]


def test_silence_takes_every_call():
    progress = SilentProgress()
    progress.phase("training", None)
    progress.advance(FIGURES)
    progress.note("nothing")
    progress.close()


@pytest.mark.parametrize("width", [60, 120])
def test_the_summary_says_what_came_of_the_run(width: int):
    console, file = text_console(width)
    print_summary(SUMMARY, console)
    lines = [" ".join(line.split()) for line in file.getvalue().splitlines()]
    assert lines == [
        "held-out before → after [95 % interval]",
        "greedy accuracy 30.1 % [26, 34] → 72.4 % [68, 76]",
        "sampled accuracy 40.2 % [36, 44] → 69.7 % [66, 74]",
        "wall time 3 min 20 s",
        "sampling 1 min 40 s, 50 % of it",
        "training 1 min 24 s, 42 % of it",
        "waiting 30.0 s, 15 % of it",
        "tokens per second 44.8 k",
        "policy lag mean 1.7, max 3",
        "mean ESS ratio 0.72",
        "run folder runs/maze-vcpo",
        "report runs/maze-vcpo/report.html",
        "model runs/maze-vcpo/model",
    ]


def test_a_summary_of_little_shows_little():
    console, file = text_console(60)
    print_summary({"accuracy_after": 0.5, "run_folder": "runs/[x]", "lag_mean": None}, console)
    assert [" ".join(line.split()) for line in file.getvalue().splitlines()] == [
        "held-out before → after [95 % interval]",
        "sampled accuracy 50.0 %",
        "run folder runs/[x]",
    ]


@pytest.mark.parametrize(
    ("form", "value", "text"),
    [
        (words.duration, 4.24, "4.2 s"),
        (words.duration, 59.96, "1 min 00 s"),
        (words.duration, 3599.7, "1 h 00 min"),
        (words.duration, 7640.0, "2 h 07 min"),
        (words.clock, 59.6, "1:00"),
        (words.clock, 3723.0, "1:02:03"),
        (words.clock, None, "-:--"),
        (words.percent, 0.125, "12 %"),
        (words.amount, 0.0, "0"),
        (words.amount, 0.01234, "0.0123"),
        (words.amount, 1234.0, "1 234"),
        (words.amount, 45678.0, "45.7 k"),
        (words.amount, 999600.0, "1 M"),
        (words.amount, None, "–"),
    ],
)  # fmt: skip
def test_numbers_in_words(form, value: float | None, text: str):
    assert form(value) == text


def test_a_phase_that_fails_is_not_called_done() -> None:
    console, file = text_console(80)
    progress = RichProgress(console)
    progress.phase("loading", None)
    progress.close(completed=False)
    assert "loading: stopped after" in file.getvalue()
    assert "done" not in file.getvalue()
