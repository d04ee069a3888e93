"""One figure of a scaling table: tokens per second against GPUs, with the straight line that perfect scaling would be."""

from __future__ import annotations

from pathlib import Path

from hsmn_dist.planner.plan import Plan
from hsmn_dist.planner.sweep import scaling_efficiency


def write_chart(plans: list[Plan], path: Path) -> None:
    """Write the figure; its format follows the file's suffix."""
    from matplotlib.figure import Figure

    gpus = [p.num_nodes * p.gpus_per_node for p in plans]
    rates = [p.tokens_per_second for p in plans]
    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.loglog(gpus, [rates[0] * n / gpus[0] for n in gpus], "--", color="grey", label="perfect")
    left.loglog(gpus, rates, "o-", label=plans[0].name)
    left.set_xlabel("GPUs")
    left.set_ylabel("tokens per second")
    left.legend()
    right.semilogx(gpus, scaling_efficiency(plans), "o-", label="scaling efficiency")
    right.semilogx(gpus, [p.mfu for p in plans], "s-", label="MFU")
    right.set_xlabel("GPUs")
    right.set_ylim(0, 1.05)
    right.legend()
    figure.suptitle(f"{plans[0].name} on {plans[0].device}, {plans[0].network} (predicted)")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
