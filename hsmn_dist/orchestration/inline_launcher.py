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
        self._has_asked = False

    def launch(self, specs: Sequence[StageSpec]) -> None:
        """Run every stage; a failure is raised as the launchers raise it."""
        from hsmn_dist.orchestration.stage_runner import run_stages

        self._folder, self._has_asked = specs[0].folder, False
        clear_failures(self._folder, specs[0].attempt)
        message, caught = "it ended", None
        try:
            run_stages(specs, has_driver=True)
        except Exception as error:
            # Written down by `run_stages`; what is raised below explains it in three parts.
            message, caught = repr(error), error
        finally:
            folder, self._folder = self._folder, None
            if self._has_asked:  # answered; a request of the driver's own stays for the driver
                folder.stop_request.unlink(missing_ok=True)
        raise_for_records(specs, message, caught)

    def stop(self) -> None:
        """Ask for a checkpoint and an end. The rank is this very process: the driver's grace time ends it where it does not listen."""
        folder = self._folder
        if folder is not None and not folder.stop_request.exists():
            self._has_asked = True
            write_text(folder.stop_request, "stop\n")
