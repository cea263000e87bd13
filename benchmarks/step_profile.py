"""What a step of :mod:`benchmarks.step` needs at most of memory, and where its time goes."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from benchmarks.step_variants import VARIANTS, Variant
from benchmarks.step_workbench import Bench, Setting
from vcpo.scores.choice import METHODS

FEW = 2
"""Groups from which on neither peak memory nor the algebra depends on their number."""

PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "addmv", "mv", "dot"}
COPIES = {"copy", "cat", "index", "index_select", "index_put", "_index_put_impl", "fill", "zero", "embedding"}
OPTIMIZER = {"_fused_adamw", "linalg_vector_norm", "_foreach_norm", "_foreach_mul"}
VIEWS = {"empty", "empty_strided", "empty_like", "view", "as_strided", "transpose", "slice", "select", "t"}


# Memory


def peak_memory(bench: Bench, variant: Variant) -> int:
    """Bytes that all tensors alive hold at the peak of a step: weights, gradients, optimizer, activations."""
    if bench.device == "cuda":
        return peak_on_gpu(lambda: bench.run(variant))
    few = min(FEW * bench.setting.group, bench.setting.trajectories)

    def two_steps() -> None:
        anew = Bench(replace(bench.setting, trajectories=few), bench.device)
        for _ in range(2):  # the first makes the optimizer's state
            anew.run(variant)

    return peak_on_cpu(two_steps)


def peak_on_gpu(work: Callable[[], object]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def peak_on_cpu(work: Callable[[], object]) -> int:
    """Added up from the allocator's events, so ``work`` must itself make all that shall count.

    What the process holds beside tensors does not, nor memory that was freed and not yet given back.
    """
    gc.collect()  # what is freed while it is watched must be its own
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    assert profiler.profiler
    results: Any = profiler.profiler.kineto_results
    events = sorted((e for e in results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns())
    return max(accumulate(e.nbytes() for e in events))


# Time


def print_profile(setting: Setting, device: str) -> None:
    """Milliseconds of one step of plain and of sketched, by kind of operation."""
    bench = Bench(setting, device)
    plain, sketched = (_milliseconds(bench, VARIANTS[name]) for name in ("plain", "sketched"))
    whole = plain.total()
    table = Table("kind", "plain, ms", "sketched, ms", "more, % of plain", title=setting.name, box=SIMPLE)
    for kind, time in [*sketched.most_common(), ("all", sketched.total())]:
        before = whole if kind == "all" else plain[kind]
        table.add_row(kind, f"{before:.1f}", f"{time:.1f}", f"{100 * (time - before) / whole:+.1f}")
    Console().print(table)


def _milliseconds(bench: Bench, variant: Variant) -> Counter[str]:
    """Of each kind of operation: on a GPU the time of their kernels, on a CPU their own wall time."""
    bench.run(variant)
    gpu = bench.device == "cuda"
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA] if gpu else [ProfilerActivity.CPU]
    with profile(activities=activities, record_shapes=True) as profiler:
        bench.run(variant)
    spent: Counter[str] = Counter()
    for event in profiler.key_averages(group_by_input_shape=True):
        if event.device_type.name == "CPU":  # else a kernel, which counts for the operation that started it
            own = event.self_device_time_total if gpu else event.self_cpu_time_total
            spent[_kind(event.key, event.input_shapes)] += own / 1e3
    return spent


def _kind(key: str, shapes: list[list[int]]) -> str:
    """A product one of whose sides is as narrow as a sketch belongs to the sketch."""
    name = key.removeprefix("aten::").rstrip("_")
    if name in PRODUCTS:
        narrow = any(METHODS["sketched"].columns in shape[-2:] for shape in shapes)
        return "sketch" if narrow else "matrix products"
    if "attention" in name:
        return "attention"
    if name in OPTIMIZER:
        return "optimizer"
    if name in COPIES:
        return "copies, look-ups"
    known = key.startswith("aten::") and name not in VIEWS
    return "elementwise, sums" if known else "rest"
