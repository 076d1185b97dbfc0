"""What the rows of `bench.inference_latency` say: the figures that were to be reached, a table, a plot."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from bench.latency_runs import MAIN, SHORT, Row
from bench.plot import draw_bars
from builders.paper import SECONDS_PER_1000, SOURCE

AT_MOST, AT_LEAST = "<=", ">="

SHAPES: Mapping[str, str] = {
    "one_user": "one user, all candidates",
    "distinct_users": "every candidate another user's",
    "folded": "few users, many candidates each",
    "single": "one user, one candidate",
}

ENGINES: Mapping[str, str] = {
    "liber": "LIBER, the whole way from ids",
    "liber_graph": "LIBER's graph alone",
    "liber_graph_int8": "the same, int8 weights",
    "torch_eager": "the same model, PyTorch eager",
    "onnx_export": "the same model, plain ONNX export",
    "deepctr_torch": "deepctr-torch 0.3.0 eager",
    "fastapi": "FastAPI, PyTorch eager, same store",
}


def paper_row() -> dict[str, Any]:
    """The paper's Table 7 as milliseconds for 1000 samples."""
    return {
        "source": f"{SOURCE}, Table 7",
        "ms_per_1000": {name: round(1000 * seconds, 1) for name, seconds in SECONDS_PER_1000.items()},
        "liber_over_backbone": round(SECONDS_PER_1000["LIBER"] / SECONDS_PER_1000["DIEN"], 3),
        "hardware": "not stated",
    }


def compare_with_targets(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Each figure that was to be reached and that these rows tell: its value, its target, and whether it is met.

    A figure whose rows were not measured is not there.
    """
    return [
        {
            "figure": name,
            "value": round(value, 4),
            "target": f"{sign} {target:g}",
            "met": value <= target if sign == AT_MOST else value >= target,
        }
        for name, value, sign, target in _figures(rows)
    ]


def _figures(rows: Sequence[Row]) -> Iterator[tuple[str, float, str, float]]:
    yield from _over_backbone(rows)
    graph = {"model": MAIN, "history": SHORT, "liber": True, "engine": "liber_graph", "part": "served"}
    distinct, one = _find(rows, shape="distinct_users", **graph), _find(rows, shape="one_user", **graph)
    of = f"{MAIN} + LIBER, T={SHORT}"
    for engine, target in (("deepctr_torch", 5.0), ("onnx_export", 2.0)):
        other = _find(rows, **{**graph, "engine": engine, "shape": "distinct_users"})
        if distinct and other:
            yield f"{of}, distinct users: {engine} / liber_graph", _ratio(other, distinct), AT_LEAST, target
    if distinct:
        yield f"{of}, distinct users: liber_graph / floor", distinct["p50_ms"] / distinct["floor_ms"], AT_MOST, 1.5
    if distinct and one:
        yield f"{of}: distinct users / one user, liber_graph", _ratio(distinct, one), AT_LEAST, 3.0
    if one:
        yield f"{of}, one user: liber_graph / floor", one["p50_ms"] / one["floor_ms"], AT_MOST, 2.5
    yield from _over_in_process(rows)
    single = _find(rows, **{**graph, "engine": "liber", "path": "grpc", "shape": "single"})
    if single:
        yield f"{of}, a single sample through gRPC, ms", single["p50_ms"], AT_MOST, 1.5
    yield from _linear(rows)
    yield from _flat(rows)


def _over_backbone(rows: Sequence[Row]) -> Iterator[tuple[str, float, str, float]]:
    for row in rows:
        if row["path"] == "grpc" and row["candidates"] > 1 and row.get("ratio_to_backbone"):
            where = f"{row['model']}, T={row['history']}, {row['shape']}"
            yield f"{where}: LIBER / its backbone through gRPC", row["ratio_to_backbone"], AT_MOST, 1.03


def _over_in_process(rows: Sequence[Row]) -> Iterator[tuple[str, float, str, float]]:
    for row in _select(rows, path="grpc", liber=True, part="served"):
        same = {name: row[name] for name in ("model", "history", "shape", "engine", "liber", "part")}
        inside = _find(rows, path="in_process", **same)
        if inside and row["candidates"] > 1:
            where = f"{row['model']} + LIBER, T={row['history']}, {row['shape']}"
            yield f"{where}: gRPC / in process", _ratio(row, inside), AT_MOST, 1.15


def _linear(rows: Sequence[Row]) -> Iterator[tuple[str, float, str, float]]:
    """Time for each sample must not grow with how many there are, nor time for each step with how many there are."""
    for shape in SHAPES:
        sized = sorted(_select(rows, part="samples", shape=shape), key=lambda row: row["candidates"])
        if len(sized) > 1:
            few, many = sized[-2], sized[-1]
            value = _ratio(many, few) * few["candidates"] / many["candidates"]
            counts = f"{many['candidates']} against {few['candidates']}"
            yield f"{MAIN} + LIBER, {shape}: time for each sample, {counts}", value, AT_MOST, 1.1
        lengths = sorted(
            _select(rows, part="served", model=MAIN, engine="liber_graph", liber=True, shape=shape),
            key=lambda row: row["history"],
        )
        if len(lengths) > 2:
            first, middle, last = lengths[-3:]
            slope = (middle["p50_ms"] - first["p50_ms"]) / (middle["history"] - first["history"])
            expected = first["p50_ms"] + slope * (last["history"] - first["history"])
            what = f"T={last['history']} against the line through {first['history']} and {middle['history']}"
            yield f"{MAIN} + LIBER, {shape}: {what}", last["p50_ms"] / expected, AT_MOST, 1.1


def _flat(rows: Sequence[Row]) -> Iterator[tuple[str, float, str, float]]:
    """The slowest of the sizes over the fastest."""
    for part, noun, target in (("partitions", "partitions", 1.1), ("catalogue", "items", 1.3)):
        for shape in SHAPES:
            for engine in ("liber", "liber_graph"):
                sized = _select(rows, part=part, shape=shape, engine=engine)
                if len(sized) > 1:
                    times = [row["p50_ms"] for row in sized]
                    sizes = [row[noun] for row in sized]
                    where = f"{MAIN} + LIBER, {shape}, {engine} in process"
                    what = f"{min(sizes)} to {max(sizes)} {noun}"
                    yield f"{where}: {what}, slowest / fastest", max(times) / min(times), AT_MOST, target


def write_markdown(figures: Mapping[str, Any]) -> str:
    """The figures as Markdown: targets, then a table for each backbone and length, then what varies."""
    rows: list[Row] = figures["rows"]
    machine, paper = figures["machine"], figures["paper"]
    lines = [
        "# Latency of scoring",
        "",
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB; {machine['platform']}. "
        f"Fastest matrix product: {figures['gemm_gflops']:.0f} GFLOP/s. Kernels: {figures['kernels'] or 'none'}. "
        f"Seed {figures['seed']}. "
        f"Cost: at {figures['usd_per_hour']:g} USD an hour, one call at a time.",
        "",
        f"The paper ({paper['source']}, hardware {paper['hardware']}): "
        + ", ".join(f"{name} {value:g} ms" for name, value in paper["ms_per_1000"].items())
        + f" for 1000 samples; LIBER / DIEN {paper['liber_over_backbone']:g}.",
        "",
        "## Figures",
        "",
        "| figure | value | target | |",
        "|---|---:|---:|---|",
        *(
            f"| {each['figure']} | {each['value']:.3g} | {each['target']} | {'met' if each['met'] else 'missed'} |"
            for each in figures["ratios"]
        ),
    ]
    served = [row for row in rows if row["part"] == "served"]
    for model, history in dict.fromkeys((row["model"], row["history"]) for row in served):
        lines += ["", f"## {model}, T={history}", ""]
        lines += _table(_select(served, model=model, history=history))
    for part, heading in (("samples", "samples"), ("partitions", "partitions"), ("catalogue", "items")):
        varied = _select(rows, part=part)
        if varied:
            column = {"samples": "candidates", "partitions": "partitions", "catalogue": "items"}[part]
            lines += ["", f"## {MAIN} + LIBER, T={SHORT}: more and more {heading}", ""]
            lines += [f"| {column} | shape | engine | p50 ms | p99 ms | floor ms |", "|---:|---|---|---:|---:|---:|"]
            lines += [
                f"| {row[column]:,} | {row['shape']} | {row['engine']} | {_number(row['p50_ms'])} | "
                f"{_number(row['p99_ms'])} | {_number(row['floor_ms'])} |"
                for row in varied
            ]
    if "tallrec" in figures:
        lines += _tallrec(figures["tallrec"]["rows"])
    if figures["notes"]:
        lines += ["", "## Left out", "", *(f"- {note}" for note in figures["notes"])]
    return "\n".join(lines) + "\n"


def _tallrec(rows: Sequence[Row]) -> list[str]:
    lines = [
        "",
        "## An LLM that scores each candidate (TALLRec)",
        "",
        "A batch gives what its questions give alone. Not comparable with the figures above where the model is a tiny "
        "one: that shows that it works and nothing else.",
        "",
        "| model | shape | U | N | precision | device | seconds per 1000 | largest difference |",
        "|---|---|---:|---:|---|---|---:|---:|",
    ]
    return lines + [
        f"| {row['model']} | {row['shape']} | {row['users']} | {row['candidates']} | {row['precision']} | "
        f"{row['device']} | {_number(row['seconds_per_1000'])} | {row['max_difference']:.1g} |"
        for row in rows
    ]


def _table(rows: Sequence[Row]) -> list[str]:
    heading = (
        "| shape | U | N | engine | path | LIBER | p50 ms | p99 ms | CPU ms | floor ms | RSS MiB | USD per million |"
    )
    lines = [heading, "|---|---:|---:|---|---|---|---:|---:|---:|---:|---:|---:|"]
    for row in sorted(rows, key=lambda row: (list(SHAPES).index(row["shape"]), not row["liber"])):
        values = [_number(row[name]) for name in ("p50_ms", "p99_ms", "cpu_ms", "floor_ms", "rss_mib")]
        lines.append(
            f"| {row['shape']} | {row['users']} | {row['candidates']} | {ENGINES[row['engine']]} | {row['path']} | "
            f"{'with' if row['liber'] else 'without'} | {' | '.join(values)} | {row['usd_per_million']:.4f} |"
        )
    return lines


def draw(rows: Sequence[Row]) -> str:
    """The engines beside each other on the paper's shape, as SVG; empty if they were not measured."""
    chosen = _select(rows, model=MAIN, history=SHORT, shape="distinct_users", liber=True, part="served")
    if not chosen:
        return ""
    bars = [(f"{ENGINES[row['engine']]} ({row['path']})", row["p50_ms"]) for row in chosen]
    samples = chosen[0]["candidates"]
    return draw_bars(
        sorted(bars, key=lambda bar: bar[1]),
        title=f"{MAIN} + LIBER, T={SHORT}: {samples} samples of as many users, ms (median)",
        limit=next(row["floor_ms"] for row in chosen if row["floor_ms"]),
        limit_name="FLOP floor",
    )


def _select(rows: Sequence[Row], **wanted: Any) -> list[Row]:
    return [row for row in rows if all(row.get(name) == value for name, value in wanted.items())]


def _find(rows: Sequence[Row], **wanted: Any) -> Row | None:
    return next(iter(_select(rows, **wanted)), None)


def _ratio(row: Row, other: Row) -> float:
    return float(row["p50_ms"] / other["p50_ms"])


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}" if value < 100 else f"{value:,.0f}"
