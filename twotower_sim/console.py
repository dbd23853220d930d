"""What a person reads on the terminal."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

COLUMNS = ("avg", "min", "max", "p99", "p90", "p75", "p50", "std")
NARROW_COLUMNS = ("avg", "p50", "p90", "p99", "max")
NARROW = 100
TITLES = {
    "time_to_first_token": "Time to First Token (ms)",
    "time_to_second_token": "Time to Second Token (ms)",
    "inter_token_latency": "Inter Token Latency (ms)",
    "request_latency": "Request Latency (ms)",
    "queue_time": "Queue Time (ms)",
    "commit_gap": "Commit Gap (ms)",
    "block_latency": "Block Latency (ms)",
    "nfe_per_block": "NFE per Block",
    "tokens_per_nfe": "Tokens per NFE",
    "acceptance_length": "Tokens per Verify Pass",
    "input_sequence_length": "Input Length (tokens)",
    "output_sequence_length": "Output Length (tokens)",
    "output_token_throughput_per_user": "Output Tokens/s per User",
    "output_token_throughput": "Output Tokens/s",
    "output_token_throughput_per_gpu": "Output Tokens/s per GPU",
    "request_throughput": "Requests/s",
    "goodput": "Goodput (requests/s)",
    "good_request_fraction": "Good Requests (share)",
}

PARTS = {
    "latency": "Latency",
    "moe_routing": "MoE routing",
    "commits": "Commits",
    "acceptance": "Acceptance",
    "gpu": "GPU",
    "price": "Price",
    "power": "Power",
    "model": "Model",
}

DOING = ("computing", "waiting", "idle")
"""What GPUs do with their hours."""


def print_summary(summary: dict[str, Any], console: Console) -> None:
    """AIPerf's table, then where the time, the memory and the figures went."""
    columns = COLUMNS if console.width >= NARROW else NARROW_COLUMNS
    title = f"twotower-sim | {summary['name']}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("Metric", no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for name, metric in summary["metrics"].items():
        if metric["avg"] is not None:
            table.add_row(TITLES[name], *(_number(metric[c]) for c in columns))
    console.print(table)
    for line in _lines(summary):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _lines(summary: dict[str, Any]) -> list[str]:
    counts, use, memory, cost = (summary[key] for key in ("counts", "utilisation", "memory", "cost"))
    lines = [
        f"Requests    {counts['completed']:,} of {counts['arrived']:,} completed in {use['duration_s']:,.1f} s, "
        f"{counts['rejected']:,} rejected, {counts['preemptions']:,} preemptions, {counts['rounds']:,} rounds",
        *_measured(summary),
        f"Load        {saturation_line(summary['saturation'])}",
        f"GPUs        {use['gpus']}: {_hours(cost)} of the time",
        *_cost(cost),
    ]
    for name, shares in use["share_of_time"].items():
        lines.append(f"{name.capitalize():12}" + ", ".join(f"{kind} {share:.1%}" for kind, share in shares.items()))
    lines.append(
        f"Memory      KV blocks {memory['kv_blocks_peak']:,} of {memory['kv_blocks']:,}, "
        f"Mamba states {memory['state_slots_peak']:,} of {memory['state_slots']:,} at most in use"
    )
    if (cache := memory["prefix_cache"]) is not None:
        lines.append(
            f"Prefixes    {cache['blocks_hit']:,} of {cache['blocks_looked_up']:,} blocks hit "
            f"({cache['block_hit_ratio']:.1%}), {cache['blocks_evicted']:,} evicted"
        )
    for gamma, of in summary["quality"].items():
        kept = "not published" if of["retained"] is None else f"{of['retained']:.1%} of the autoregressive (published)"
        blocks = f"gamma {gamma} in {of['share_of_blocks']:.1%} of blocks, {of['nfe_per_block']:.1f} forwards each"
        lines.append(f"Quality     {blocks}: {kept}")
    for name, of in summary["classes"].items():
        first, whole, good = (of[key] for key in ("time_to_first_token", "request_latency", "good_request_fraction"))
        lines.append(
            f"Class       {name}: {of['requests']:,} requests, time to first token p50 {first['p50']:,.0f} ms, p99 "
            f"{first['p99']:,.0f} ms, request latency p50 {whole['p50']:,.0f} ms, p99 {whole['p99']:,.0f} ms"
            + ("" if good["avg"] is None else f", {good['avg']:.1%} good")
        )
    lines += [f"{PARTS[key]:12}{source}" for key, source in summary["provenance"].items()]
    return lines + [f"Warning     {warning}" for warning in summary["warnings"]]


def _hours(cost: dict[str, Any]) -> str:
    """Shares of GPU hours."""
    return ", ".join(f"{kind} {cost[f'gpu_hours_{kind}'] / cost['gpu_hours']:.1%}" for kind in DOING)


def _cost(cost: dict[str, Any]) -> list[str]:
    usd, kwh = cost["usd_per_million_output_tokens"], cost["kwh_per_million_output_tokens"]
    told = [] if usd is None else [f"${usd:,.2f}"]
    told += [] if kwh is None else [f"at most {_number(kwh)} kWh (modelled)"]
    return [f"Cost        {' and '.join(told)} per million output tokens"] if told else []


def _measured(summary: dict[str, Any]) -> list[str]:
    """Which requests the metrics are of, unless of all."""
    counts, window = summary["counts"], summary["scenario"]["measurement"]
    if not counts["excluded"]:
        return []
    since, most = window["warm_up_s"], window["for_s"]
    arrived = f"from {since:g} s on" if most is None else f"in [{since:g}, {since + most:g}) s"
    return [
        f"Measured    {counts['arrived'] - counts['excluded']:,} of {counts['arrived']:,} requests: those that arrived "
        f"{arrived}; GPUs, memory and cost are of the whole run"
    ]


def saturation_line(of: dict[str, Any]) -> str:
    verdict = of["verdict"]
    if of["window_s"] is None:
        return f"{verdict}: users wait for their answers (closed loop)"
    if of["limit"] is None:
        return f"{verdict}: all requests arrived at once and were done {of['drain_s']:,.1f} s later"
    queue, work, wait, chance = (
        f"{max(of[key], 0):.1%}" for key in ("queue_growth", "outstanding_growth", "wait_growth", "limit")
    )
    return (
        f"{verdict}: the queue grew by {queue} of the work that arrived, all open work by {work}, waits by {wait} of "
        f"the time (chance: {chance}); drained in {of['drain_s']:,.1f} s"
    )


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.2f}" if abs(value) < 1000 else f"{value:,.0f}"


@contextmanager
def progress_bar(console: Console, total: int | None, what: str, over_s: float = 30) -> Iterator[Callable[..., None]]:
    """A bar that moves as it hears how much is done, and of how much, with an estimate of the time left from what was
    done in the last ``over_s``. ``total``: None where it is heard later; silent where the console is no terminal."""
    if not console.is_terminal or console.quiet:
        yield lambda done, of=None: None
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    shown = TextColumn(what), BarColumn(), TextColumn("{task.completed:,} of {task.total:,}"), TimeRemainingColumn()
    with Progress(*shown, console=console, transient=True, speed_estimate_period=over_s) as bar:
        task = bar.add_task(what, total=total or 0)
        yield lambda done, of=None: bar.update(task, completed=done, total=of)
