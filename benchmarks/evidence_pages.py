"""Tables and figures of docs/evidence, made from the rows in docs/evidence/data.

    python -m benchmarks.evidence_pages [--pages FOLDER]

A page says by a comment which table it wants; what is between that comment and the next ``<!-- end -->`` is
written anew from ``data/STUDY/results.jsonl``:

    <!-- table: lag, over lags -->            a line a method, a column a lag
    <!-- table: lag, at lag 64 -->            a line a method, best first
    <!-- table: lag, against lag 0 -->        each method's change from its own runs at lag 0, by seed
    <!-- table: lag, against topr -->         each method's difference from another at the same lag, by seed;
                                              the other may have its rate: against topr at 8e-4
    <!-- table: rates, over rates -->         a line a method, a column a learning rate

``, only NAME NAME`` at the end leaves other methods out, controls too. A cell is a mean of accuracies of
completed runs ± the 95 % interval of that mean (Student's t), and the number of runs:
``.947 ± .012 (5)``. A dagger says how many of them collapsed. Greedy accuracy over lags, sampled accuracy
in differences. Over rates: the mean sampled accuracy and that of each seed; bold is the rule's choice
(:mod:`benchmarks.evidence`).
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.evidence import best_rate
from benchmarks.lag_figure import draw_lags
from vcpo.monitor.statistics import student_interval

PAGES = Path("docs/evidence")
GREEDY, SAMPLED = "greedy_accuracy_after", "accuracy_after"
_COLLAPSED = "†"
_BLOCK = re.compile(r"(<!-- table: (?P<order>.+?) -->\n).*?(?=<!-- end -->)", re.DOTALL)
_RATE = re.compile(r";?learner\.learning_rate=([^;\]]+)")

Row = Mapping[str, Any]
Line = Sequence[str]


def completed_rows(results: Path) -> list[Row]:
    """In the file's order."""
    rows = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if row["status"] == "completed"]


def plain_name(method: str) -> str:
    """The method without the learning rate that it runs at."""
    return _RATE.sub("", method).replace("[;", "[").replace("[]", "")


def _shown(method: str) -> str:
    """``vcpo`` at 2e-4 if it has a rate of its own; settings without their section."""
    rate = _RATE.search(method)
    short = re.sub(r"(algorithm|pipeline|learner)\.", "", plain_name(method)).replace(";", ", ")
    name = short.replace("[", ", ").replace("]", "").replace("=", " = ").replace("_", " ")
    return f"{name} at {rate[1]}" if rate else name


def _number(value: float, *, signed: bool = False) -> str:
    text = f"{value:+.3f}" if signed else f"{value:.3f}"
    return text.replace("0.", ".", 1).replace("-", "−")


def cell(values: Sequence[float], collapsed: int = 0, *, signed: bool = False) -> str:
    """``.947 ± .012 (5)``; one run has no interval."""
    if not values:
        return "–"
    text = _number(statistics.fmean(values), signed=signed)
    if len(values) > 1:
        low, high = student_interval(values)
        text += f" ± {_number((high - low) / 2)}"
    return f"{text} ({len(values)})" + (f" {_COLLAPSED}{collapsed}" if collapsed else "")


class Cells:
    """The runs of a study by method and lag."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self._runs: dict[tuple[str, int], dict[int, Row]] = defaultdict(dict)
        for row in rows:
            self._runs[row["method"], row["lag"]][row["seed"]] = row

    @property
    def lags(self) -> list[int]:
        return sorted({lag for _, lag in self._runs})

    @property
    def methods(self) -> list[str]:
        return list(dict.fromkeys(method for method, _ in self._runs))

    def by_seed(self, method: str, lag: int) -> Mapping[int, Row]:
        return self._runs.get((method, lag), {})

    def values(self, method: str, lag: int, key: str) -> list[float]:
        return [row[key] for row in self.by_seed(method, lag).values()]

    def collapses(self, method: str, lag: int) -> int:
        return sum(row["collapsed"] for row in self.by_seed(method, lag).values())

    def mean(self, method: str, lag: int, key: str) -> float:
        return statistics.fmean(self.values(method, lag, key))

    def differences(self, first: tuple[str, int], second: tuple[str, int]) -> list[float]:
        """Sampled accuracy of ``first`` minus that of ``second``, for the seeds that both have."""
        ours, others = self.by_seed(*first), self.by_seed(*second)
        return [ours[seed][SAMPLED] - others[seed][SAMPLED] for seed in ours if seed in others]


def over_lags(cells: Cells) -> Iterator[Line]:
    """Greedy accuracy; those with the best mean over their lags first."""
    lags = cells.lags
    yield ["method", *(f"lag {lag}" for lag in lags)]

    def standing(method: str) -> float:
        known = [cells.mean(method, lag, GREEDY) for lag in lags if cells.by_seed(method, lag)]
        return -statistics.fmean(known)

    for method in sorted(cells.methods, key=standing):
        yield [
            _shown(method),
            *(cell(cells.values(method, lag, GREEDY), cells.collapses(method, lag)) for lag in lags),
        ]


def at_lag(cells: Cells, lag: int) -> Iterator[Line]:
    yield ["method", "greedy", "sampled", "mean ESS ratio", "mean step scale", "collapsed"]
    methods = [method for method in cells.methods if cells.by_seed(method, lag)]
    for method in sorted(methods, key=lambda m: -cells.mean(m, lag, GREEDY)):
        yield [
            _shown(method),
            *(cell(cells.values(method, lag, key)) for key in (GREEDY, SAMPLED)),
            *(f"{cells.mean(method, lag, key):.2f}" for key in ("ess_ratio_mean", "step_scale_mean")),
            f"{cells.collapses(method, lag)} of {len(cells.by_seed(method, lag))}",
        ]


def against_lag(cells: Cells, reference: int) -> Iterator[Line]:
    lags = [lag for lag in cells.lags if lag != reference]
    yield ["method", *(f"lag {lag} − lag {reference}" for lag in lags)]
    for method in cells.methods:
        changes = [cells.differences((method, lag), (method, reference)) for lag in lags]
        if any(changes):
            yield [_shown(method), *(cell(change, signed=True) for change in changes)]


def against_method(cells: Cells, reference: str) -> Iterator[Line]:
    names = {plain_name(method): method for method in cells.methods}
    other = (names | {_shown(method): method for method in cells.methods})[reference]
    yield ["method", *(f"lag {lag}" for lag in cells.lags)]
    for method in cells.methods:
        if method == other:
            continue
        differences = [cells.differences((method, lag), (other, lag)) for lag in cells.lags]
        if any(differences):
            yield [_shown(method), *(cell(difference, signed=True) for difference in differences)]


def over_rates(cells: Cells) -> Iterator[Line]:
    """The runs of all lags; the best method first."""
    found: dict[str, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for method in cells.methods:
        rate = _RATE.search(method)
        runs = [run for lag in cells.lags for run in cells.by_seed(method, lag).values()]
        if rate and runs:
            found[plain_name(method)][rate[1]] += runs
    rates = sorted({rate for own in found.values() for rate in own}, key=float)
    yield ["method", *(f"at {rate}" for rate in rates)]

    def chosen(own: Mapping[str, Sequence[Row]]) -> str:
        return best_rate({rate: [run[SAMPLED] for run in runs] for rate, runs in own.items()})

    def best(own: Mapping[str, Sequence[Row]]) -> float:
        return statistics.fmean(run[SAMPLED] for run in own[chosen(own)])

    for method, own in sorted(found.items(), key=lambda item: -best(item[1])):
        shown = [_seeds(own[rate], bold=rate == chosen(own)) if rate in own else "–" for rate in rates]
        yield [_shown(method), *shown]


def _seeds(runs: Sequence[Row], *, bold: bool) -> str:
    mean = _number(statistics.fmean(run[SAMPLED] for run in runs))
    seeds = ", ".join(_number(run[SAMPLED]) for run in runs)
    collapsed = sum(run["collapsed"] for run in runs)
    text = f"**{mean}**" if bold else mean
    return f"{text} ({seeds})" + (f" {_COLLAPSED}{collapsed}" if collapsed else "")


FORMS: Mapping[str, Callable[[Cells, str], Iterator[Line]]] = {
    "over lags": lambda cells, _: over_lags(cells),
    "over rates": lambda cells, _: over_rates(cells),
    "at lag": lambda cells, lag: at_lag(cells, int(lag)),
    "against lag": lambda cells, lag: against_lag(cells, int(lag)),
    "against": against_method,
}
"""By the words that ask for a form; longer ones before those they begin with."""


def table(order: str, data: Path) -> str:
    """The Markdown table that ``order`` asks for, as in ``lag, at lag 64``.

    Raises ValueError for an order that is none of the forms.
    """
    study, _, rest = (part.strip() for part in order.partition(","))
    rest, _, only = (part.strip() for part in rest.partition(", only "))
    rows = completed_rows(data / study / "results.jsonl")
    if only:
        rows = [row for row in rows if plain_name(row["method"]) in only.split()]
    for words, form in FORMS.items():
        if rest.startswith(words):
            first, *others = form(Cells(rows), rest.removeprefix(words).strip())
            lines = [first, ["---"] * len(first), *others]
            return "".join(f"| {' | '.join(line)} |\n" for line in lines)
    raise ValueError(f"no table {order!r}; there are {', '.join(FORMS)}")


def with_tables(page: str, data: Path) -> str:
    """The text of a page with all of its tables made anew."""
    return _BLOCK.sub(lambda block: f"{block[1]}\n{table(block['order'], data)}\n", page)


def draw_study(results: Path, figure: Path) -> None:
    """The sampled accuracies of a study over lags. A method that ran at several rates is drawn at that
    with the most lags, and then the most runs; one without a second lag is not drawn."""
    cells = Cells(completed_rows(results))
    chosen: dict[str, Mapping[int, Sequence[float]]] = {}

    def size(points: Mapping[int, Sequence[float]]) -> tuple[int, int]:
        return len(points), sum(map(len, points.values()))

    for method in cells.methods:
        points = {lag: cells.values(method, lag, SAMPLED) for lag in cells.lags if cells.by_seed(method, lag)}
        name = plain_name(method)
        if len(points) > 1 and size(points) > size(chosen.get(name, {})):
            chosen[name] = points
    draw_lags(chosen, cells.lags, figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pages", type=Path, default=PAGES, help="folder of the pages")
    pages = parser.parse_args().pages
    data = pages / "data"
    for page in sorted(pages.glob("*.md")):
        before = page.read_text(encoding="utf-8")
        after = with_tables(before, data)
        if after != before:
            page.write_text(after, encoding="utf-8")
            print(f"{page}: tables written anew")
    for study, figure in (("lag", "lag.svg"), ("lag-collect", "lag-collect.svg")):
        if (results := data / study / "results.jsonl").exists():
            draw_study(results, pages / figure)
            print(f"{pages / figure}: drawn")


if __name__ == "__main__":
    main()
