"""Machines, ranks, retries and time limits."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from hsmn_dist.config.section import Section


class ClusterConfig(Section):
    """What the run may use."""

    launcher: Literal["ray", "local", "inline"] = Field(
        "ray", description="ray: Ray Train; local: torchrun on this machine; inline: one rank in this very process."
    )
    num_nodes: int = Field(1, ge=1, description="Machines.")
    ranks_per_node: int = Field(
        2, ge=1, description="Training processes per machine; one per GPU where there are GPUs."
    )
    num_workers: tuple[int, ...] = Field(
        (),
        description="Elastic range [min, max] of ranks for the ray launcher: a stage goes on with what the cluster has, and is "
        "resized when nodes leave or join. Empty: always num_nodes x ranks_per_node.",
    )
    resize_seconds: float = Field(
        60.0,
        gt=0,
        description="How often an elastic run looks for nodes that joined; a resize goes back to the last checkpoint.",
    )
    device: Literal["cpu", "gpu"] = Field("cpu", description="What each rank computes on.")
    device_name: str = Field("", description="Device type for the planner (h100, a100, ...).")
    cpus_per_rank: float = Field(1.0, gt=0, description="CPU cores that Ray reserves per rank.")
    ray_address: str = Field("", description="Existing Ray cluster; empty starts a local one.")
    max_failures: int = Field(3, ge=0, description="Times that lost workers are replaced before the run fails.")
    stall_seconds: float = Field(600.0, gt=0, description="Silence of a rank after which the group is called hung.")
    grace_seconds: float = Field(30.0, gt=0, description="Time to checkpoint after SIGTERM.")
    threads_per_rank: int = Field(1, ge=1, description="torch CPU threads per rank.")

    @property
    def world_sizes(self) -> range:
        """Numbers of ranks that a stage may run with."""
        if self.num_workers:
            return range(self.num_workers[0], self.num_workers[-1] + 1)
        ranks = self.num_nodes * self.ranks_per_node
        return range(ranks, ranks + 1)
