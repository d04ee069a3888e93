"""InlineLauncher: one rank in this very process. For a laptop, a notebook, and many small runs in a row.

A fresh process costs seconds of imports for each run; nothing else differs from one rank under torchrun.
"""

from __future__ import annotations

from collections.abc import Sequence

from hsmn_dist.config.cluster import ClusterConfig
from hsmn_dist.foundation.errors import ConfigError
from hsmn_dist.foundation.files import write_text
from hsmn_dist.orchestration.launcher import clear_failures, raise_for_records
from hsmn_dist.orchestration.run_folder import RunFolder
from hsmn_dist.orchestration.stage import StageSpec


class InlineLauncher:
    """Runs stages here. `stop` asks the loop to checkpoint and leave."""

    def __init__(self, cluster: ClusterConfig) -> None:
        num_ranks = cluster.num_nodes * cluster.ranks_per_node
        if num_ranks != 1:
            raise ConfigError(
                f"{num_ranks} ranks with the inline launcher",
                allowed="one rank with `--launcher inline`",
                action="use `--launcher local`, or set cluster.ranks_per_node to 1",
            )
        self._folder: RunFolder | None = None

    def launch(self, specs: Sequence[StageSpec]) -> None:
        """Run every stage; a failure is raised as the launchers raise it."""
        from hsmn_dist.orchestration.stage_runner import run_stages

        self._folder = specs[0].folder
        clear_failures(self._folder)
        message = "it ended"
        try:
            run_stages(specs)
        except Exception as error:
            # Written down by `run_stages`; what is raised below explains it in three parts.
            message = repr(error)
        finally:
            folder, self._folder = self._folder, None
        raise_for_records(specs, message)
        folder.stop_request.unlink(missing_ok=True)

    def stop(self) -> None:
        """Ask for a checkpoint and an end."""
        if self._folder is not None:
            write_text(self._folder.stop_request, "stop\n")
