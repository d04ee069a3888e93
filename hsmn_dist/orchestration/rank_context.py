"""What a rank holds through all stages of a launch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hsmn_dist.config.run import RunConfig
from hsmn_dist.distributed.collectives import broadcast_object
from hsmn_dist.distributed.world import World
from hsmn_dist.foundation.errors import StageFailed
from hsmn_dist.orchestration.attempt import Fence
from hsmn_dist.orchestration.heartbeat import Heart
from hsmn_dist.orchestration.journal import append_event
from hsmn_dist.orchestration.run_folder import RunFolder


@dataclass(frozen=True)
class RankContext:
    """Settings, folder, place among the ranks, right to commit, sign of life, and where the prepared data is."""

    config: RunConfig
    folder: RunFolder
    world: World
    fence: Fence
    heart: Heart
    prepared: dict[str, Any]

    def wants_to_stop(self) -> bool:
        """True when this rank sees that the run was asked to checkpoint and leave."""
        return self.folder.stop_request.exists()

    def check_together(self) -> None:
        """Raise on every rank when this group may no longer commit. Collective."""
        problem: StageFailed | None = None
        if self.world.is_first:
            try:
                self.fence.check()
            except StageFailed as error:
                problem = error
        problem = broadcast_object(problem)
        if problem is not None:
            raise problem

    def note(self, event: str, **fields: Any) -> None:
        """One line of the journal, from rank 0, while this group owns the run."""
        if self.world.is_first:
            self.fence.check()
            append_event(self.folder.journal, event, attempt=self.fence.attempt, group=self.fence.group, **fields)
