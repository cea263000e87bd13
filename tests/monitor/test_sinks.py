"""The metrics file survives what happens to it, and TensorBoard's own reader finds what was written."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vcpo.errors import CheckpointError, VcpoError
from vcpo.monitor.glossary import GLOSSARY, HISTOGRAM
from vcpo.monitor.sinks import MetricsWriter, read_metrics

ROW_KEYS = """step version reward reward_std accuracy greedy_accuracy loss ess ess_ratio ess_ratio_truncated
on_policy_ratio step_scale learning_rate grad_norm kl ratio_variance log_weight_mean log_weight_max
truncated_fraction baseline_mean advantage_std score_norm_mean score_norm_max top_weight_share equal_groups
score_norm_error masked_tokens skipped_groups skipped_tokens skipped_failed_episodes
teacher_error teacher_prediction value_loss value_explained
tokens action_tokens response_length lag_mean lag_max token_lag_mean failed_episodes truncated_episodes
tokens_per_second seconds_training seconds_waiting seconds_publishing seconds_sampling elapsed
lag_histogram samplers"""


def write_steps(folder: Path, first: int, last: int, reward: float = 0.5, resume: int | None = None) -> None:
    with MetricsWriter(folder, resume_step=resume) as writer:
        for step in range(first, last + 1):
            writer.write({"step": step, "reward": reward + step / 100})


def tensorboard_curve(folder: Path, tag: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_the_glossary_describes_every_key_of_a_row_in_whole_sentences():
    assert set(ROW_KEYS.split()) == set(GLOSSARY)
    for name, metric in GLOSSARY.items():
        assert metric.name == name
        assert metric.meaning.endswith(".") and metric.suspect.endswith(".")


def test_rows_come_back_as_they_were_written(tmp_path: Path):
    row = {
        "step": 1,
        "reward": 0.1 + 0.2,
        "tokens": np.int64(7),
        "kl": np.float32(0.5),
        HISTOGRAM: {2: 3, 4: 1},
    }
    with MetricsWriter(tmp_path) as writer:
        writer.write(row)
        # Flushed row by row: a reader need not wait for the end.
        assert read_metrics(tmp_path) == [
            {"step": 1, "reward": 0.1 + 0.2, "tokens": 7, "kl": 0.5, HISTOGRAM: {"2": 3, "4": 1}}
        ]
    assert tensorboard_curve(tmp_path, "learning/reward") == [(1, pytest.approx(0.3))]


def test_values_that_are_not_finite_become_null_and_leave_tensorboard_alone(tmp_path: Path):
    with MetricsWriter(tmp_path) as writer:
        writer.write({"step": 1, "kl": math.nan, "loss": math.inf, "reward": -math.inf, "ess": 4.0})
    line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON")) == {
        "step": 1, "kl": None, "loss": None, "reward": None, "ess": 4.0,
    }  # fmt: skip
    assert tensorboard_curve(tmp_path, "variance/ess") == [(1, 4.0)]
    with pytest.raises(KeyError):
        tensorboard_curve(tmp_path, "variance/kl")


def test_an_unknown_metric_is_refused_before_anything_is_written(tmp_path: Path):
    with MetricsWriter(tmp_path) as writer:
        with pytest.raises(VcpoError, match=r"unknown metric 'grad_nrom' \(did you mean 'grad_norm'"):
            writer.write({"step": 1, "grad_nrom": 1.0})
        with pytest.raises(VcpoError, match="'reward' must be a number, got str"):
            writer.write({"step": 1, "reward": "high"})
        with pytest.raises(VcpoError, match="needs its 'step'"):
            writer.write({"reward": 1.0})
    assert read_metrics(tmp_path) == []


def test_a_torn_last_line_is_ignored_and_gone_after_resuming(tmp_path: Path):
    write_steps(tmp_path, 1, 3)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "rew')
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]
    write_steps(tmp_path, 4, 5, resume=3)
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4, 5]


def test_every_truncation_of_the_file_can_be_read(tmp_path: Path):
    write_steps(tmp_path, 1, 3)
    whole = (tmp_path / "metrics.jsonl").read_bytes()
    line_ends = [i for i, byte in enumerate(whole) if byte == ord("\n")]
    for length in range(len(whole) + 1):
        (tmp_path / "metrics.jsonl").write_bytes(whole[:length])
        complete = sum(end <= length for end in line_ends)  # a line is whole even without its newline
        assert [row["step"] for row in read_metrics(tmp_path)] == list(range(1, complete + 1))


def test_resuming_drops_the_rows_that_will_be_written_again(tmp_path: Path):
    write_steps(tmp_path, 1, 6, reward=0.0)
    write_steps(tmp_path, 4, 8, reward=0.5, resume=3)
    assert [(r["step"], round(r["reward"], 2)) for r in read_metrics(tmp_path)] == [
        (1, 0.01), (2, 0.02), (3, 0.03), (4, 0.54), (5, 0.55), (6, 0.56), (7, 0.57), (8, 0.58),
    ]  # fmt: skip
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["metrics.jsonl"]


def test_resuming_tells_tensorboard_to_forget_what_it_had(tmp_path: Path):
    write_steps(tmp_path, 1, 6, reward=0.0)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    time.sleep(1.1)  # TensorBoard reads files in the order of their names, which have the second
    with MetricsWriter(tmp_path, resume_step=3) as writer:
        writer.write({"step": 4, "reward": 0.5})
    events.Reload()
    points = [(event.step, round(event.value, 2)) for event in events.Scalars("learning/reward")]
    assert points == [(1, 0.01), (2, 0.02), (3, 0.03), (4, 0.5)]


def test_resuming_at_zero_starts_over(tmp_path: Path):
    write_steps(tmp_path, 1, 3)
    write_steps(tmp_path, 1, 2, resume=0)
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]


def test_a_folder_without_metrics_or_with_a_broken_middle_is_named(tmp_path: Path):
    with pytest.raises(CheckpointError, match="not a run folder"):
        read_metrics(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(CheckpointError, match="line 2"):
        read_metrics(tmp_path)


def test_closing_twice_is_fine(tmp_path: Path):
    writer = MetricsWriter(tmp_path)
    writer.close()
    writer.close()


def test_nothing_in_the_monitor_imports_torch(tmp_path: Path):
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "from vcpo.monitor import diagnosis, figures, progress, report, sinks\n"
        f"w = sinks.MetricsWriter({str(tmp_path)!r}); w.write({{'step': 1, 'reward': 1.0}}); w.close()\n"
        f"report.write_report({str(tmp_path)!r})\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
