"""hsmn-dist plan: what a run needs and how long it takes on given machines, before any of them is taken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from hsmn_dist.foundation.errors import PlanError
from hsmn_dist.foundation.units import format_bytes, format_count, format_seconds

if TYPE_CHECKING:
    from hsmn_dist.planner.plan import Plan
    from hsmn_dist.planner.sweep import Question

EXAMPLE = (
    "Example: hsmn-dist plan configs/runs/hope_large_builtin_multi_node.yaml --nodes 8 --gpus-per-node 8 --device h100"
)
SWEEP_ROWS = 12


def command(
    config: Path = typer.Argument(help="Run configuration (YAML)."),
    nodes: int = typer.Option(0, min=0, help="Machines; the configuration's when 0."),
    gpus_per_node: int = typer.Option(0, min=0, help="Devices per machine; the configuration's when 0."),
    device: str = typer.Option("", help="h100, h200, a100, ... or cpu (timed here); the configuration's when absent."),
    network: str = typer.Option("", help="Between machines, such as infiniband_400 or ethernet_100; the device's own."),
    price_per_gpu_hour: float | None = typer.Option(None, min=0, help="Price of one device for an hour."),
    context_tokens: int = typer.Option(0, min=0, help="Mean context of an example; the longest allowed when 0."),
    target_tokens: int = typer.Option(0, min=0, help="Mean target of an example; the longest allowed when 0."),
    efficiency: float = typer.Option(0.0, min=0, max=1, help="Share of the peak rate while computing; 0.45 when 0."),
    sweep: bool = typer.Option(False, "--sweep", help="Find the cheapest layout on up to that many machines."),
    scaling: bool = typer.Option(False, "--scaling", help="Table up to 4,096 devices."),
    plot: Path | None = typer.Option(None, help="Write the scaling figure there (.png, .svg, .pdf)."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
    assignments: list[str] = typer.Option([], "--set", help="Change one setting: section.key=value. May be repeated."),
) -> None:
    """Bytes per rank, fit, FLOPs, step time, tokens per second, MFU, hours and cost."""
    from hsmn_dist.config.load import load_run_config
    from hsmn_dist.planner.flops import Lengths
    from hsmn_dist.planner.hardware import find_device, find_network
    from hsmn_dist.planner.sweep import Question
    from hsmn_dist.planner.throughput import COMPUTE_EFFICIENCY, Machines

    run = load_run_config(config, assignments)
    name = device or run.cluster.device_name or ("cpu" if run.cluster.device == "cpu" else "")
    if not name:
        raise PlanError(
            "no device: cluster.device_name is empty", allowed="a device name", action="add --device h100, for example"
        )
    found = find_device(name)
    machines = Machines(
        found,
        find_network(network or found.network),
        nodes or run.cluster.num_nodes,
        gpus_per_node or run.cluster.ranks_per_node,
        efficiency or COMPUTE_EFFICIENCY,
    )
    mean = None
    if context_tokens or target_tokens:
        mean = Lengths(context_tokens or run.data.max_context_tokens, target_tokens or run.data.max_target_tokens)
    question = Question(run, machines, price_per_gpu_hour, mean)
    if sweep:
        _sweep(question, as_json)
    elif scaling or plot is not None:
        _scaling(question, plot, as_json)
    else:
        _single(question, as_json)


def _single(question: Question, as_json: bool) -> None:
    from hsmn_dist.planner.plan import plan

    answer = plan(question.config, question.machines, question.price_per_gpu_hour, question.mean)
    if as_json:
        typer.echo(json.dumps({**answer.to_json(), "device_source": question.machines.device.source}, indent=2))
    else:
        typer.echo(plan_text(answer, question.machines.device.source))
    if not answer.fits:
        raise answer.refusal()


def _sweep(question: Question, as_json: bool) -> None:
    from hsmn_dist.planner.sweep import sweep

    plans = sweep(question)
    if as_json:
        typer.echo(json.dumps([answer.to_json() for answer in plans[:SWEEP_ROWS]], indent=2))
        return
    typer.echo(f"{len(plans)} layouts fit; the cheapest {min(SWEEP_ROWS, len(plans))}:")
    typer.echo(table(plans[:SWEEP_ROWS]))
    best = plans[0]
    changes = {
        "training.zero_stage": best.layout.zero_stage,
        "training.micro_batch_examples": best.layout.micro_batch_examples,
        "training.activation_checkpointing": best.layout.activation_checkpointing,
        "cluster.num_nodes": best.num_nodes,
        "cluster.ranks_per_node": best.gpus_per_node,
    }
    typer.echo("use it: " + " ".join(f"--set {key}={value}" for key, value in changes.items()))


def _scaling(question: Question, plot: Path | None, as_json: bool) -> None:
    from hsmn_dist.planner.sweep import scaling, scaling_efficiency

    plans = scaling(question)
    if plot is not None:
        from hsmn_dist.planner.chart import write_chart

        write_chart(plans, plot)
    shares = scaling_efficiency(plans)
    if as_json:
        rows = [{**answer.to_json(), "scaling_efficiency": share} for answer, share in zip(plans, shares, strict=True)]
        typer.echo(json.dumps(rows, indent=2))
    else:
        typer.echo(table(plans, shares))
        typer.echo(f"source: {question.machines.device.source}; {question.machines.network.source}")
    if plot is not None and not as_json:
        typer.echo(f"figure: {plot}")


def plan_text(answer: Plan, source: str) -> str:
    """The page that a person reads."""
    layout, step = answer.layout, answer.step
    gpus = answer.num_nodes * answer.gpus_per_node
    verdict = "fits" if answer.fits else "DOES NOT FIT"
    cost = "" if answer.cost is None else f", cost {answer.cost:,.0f}"
    rows = [
        f"{answer.name}: {answer.parameters:,} parameters on {answer.num_nodes} x {answer.gpus_per_node} {answer.device} "
        f"over {answer.network} ({source})",
        f"layout: ZeRO {layout.zero_stage}, {'bf16' if layout.element == 2 else 'fp32'}, micro-batch "
        f"{layout.micro_batch_examples} x {answer.micro_batches} accumulated x {gpus} ranks = "
        f"{answer.global_batch_examples} examples, checkpointing {layout.activation_checkpointing}",
        f"memory per rank: {format_bytes(answer.memory.total)} of {format_bytes(answer.usable_bytes)}: {verdict}; "
        f"fullest in the {answer.memory.fullest.name}, largest: {answer.memory.largest}",
        *(f"  {kind:<12} {format_bytes(size):>12}" for kind, size in answer.memory.kinds.items()),
    ]
    if answer.memory.host:
        rows.append(f"  in host memory {format_bytes(answer.memory.host)}")
    rows += [
        f"FLOPs per token: {format_count(answer.flops_per_token)}",
        f"step: {step.total:.3f} s (compute {step.compute:.3f}, launches {step.launches:.3f}, optimizer "
        f"{step.optimizer:.4f}, communication {step.communication:.3f} of which {step.exposed:.3f} shows); {format_bytes(answer.communication_bytes)} a rank",
        f"rate: {answer.tokens_per_second:,.0f} tokens/s, MFU {answer.mfu:.1%}",
        f"run: {format_seconds(answer.hours * 3600)}, {answer.gpu_hours:,.1f} GPU hours{cost} (scoring not included)",
        f"storage: checkpoint {format_bytes(answer.checkpoint_bytes)}, wants "
        f"{format_bytes(answer.checkpoint_bytes_per_second)}/s; shards {format_bytes(answer.shard_bytes_per_second)}/s",
        *(f"note: {note}" for note in answer.notes),
    ]
    return "\n".join(rows)


def table(plans: list[Plan], shares: list[float] | None = None) -> str:
    """Plans side by side, as text."""
    head = ["nodes", "GPUs", "ZeRO", "micro", "accum", "checkpointing", "batch", "memory", "largest", "step s", "tok/s"]
    head += ["MFU", "hours", "GPU hours", "cost", "cost/1e9 tok"]
    rows = [[*head, *(["scaling"] if shares else [])]]
    for index, p in enumerate(plans):
        row = [str(p.num_nodes), str(p.num_nodes * p.gpus_per_node), str(p.layout.zero_stage)]
        row += [str(p.layout.micro_batch_examples), str(p.micro_batches), p.layout.activation_checkpointing]
        row += [str(p.global_batch_examples), format_bytes(p.memory.total), p.memory.largest, f"{p.step.total:.3f}"]
        row += [format_count(p.tokens_per_second), f"{p.mfu:.1%}", f"{p.hours:.1f}", f"{p.gpu_hours:,.0f}"]
        per_billion = p.cost_per_billion_tokens
        row += ["-" if p.cost is None else f"{p.cost:,.0f}", "-" if per_billion is None else f"{per_billion:,.2f}"]
        rows.append([*row, *([f"{shares[index]:.0%}"] if shares else [])])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
