"""What a rank holds through all stages of a launch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hsmn_dist.config.run import RunConfig
from hsmn_dist.distributed.collectives import any_rank, broadcast_object
from hsmn_dist.distributed.world import World
from hsmn_dist.foundation.errors import Preempted, StageFailed
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

    def leave_if_asked(self) -> None:
        """Leave outside the training loop, where there is nothing to save: the stage's last checkpoint is whole.

        Raises:
            Preempted: this rank sees that the run was asked to leave.
        """
        if self.wants_to_stop():
            raise _asked()

    def leave_together(self) -> None:
        """`leave_if_asked` where the ranks work in step: all of them leave at the same place. Collective."""
        if any_rank(self.wants_to_stop()):
            raise _asked()

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


def _asked() -> Preempted:
    return Preempted(
        "asked to leave; this part of the stage is done again from its last checkpoint",
        allowed="starting the same command again",
        action="resume the run",
    )
