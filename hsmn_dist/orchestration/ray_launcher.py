"""Ray Train as a launcher: one `TorchTrainer` whose workers run every pending stage.

Ray places the ranks, replaces lost workers and nodes (`FailureConfig`), and forms the process group. State lives in the run folder,
so a restarted group resumes from our own checkpoints, at another number of ranks too: with `cluster.num_workers: [min, max]` Ray Train
looks for nodes that joined and starts the group anew with more ranks, or with fewer after a node was lost. Nothing is reported through
Ray but the end of a stage. All of Ray Train that we use is in this file.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray
import ray.train
from ray.train.torch import TorchConfig, TorchTrainer

from hsmn_dist.config.cluster import ClusterConfig
from hsmn_dist.foundation.errors import ConfigError
from hsmn_dist.foundation.log import logger
from hsmn_dist.foundation.redact import redact
from hsmn_dist.orchestration.launcher import clear_failures, raise_for_records, rank_environment
from hsmn_dist.orchestration.oom_kills import OomKills
from hsmn_dist.orchestration.private_ray import PrivateRay
from hsmn_dist.orchestration.stage import StageSpec

log = logger(__name__)

QUIET = {"RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}


class _Trainer(TorchTrainer):
    """Ctrl-C is the driver's business: Ray's own handler aborts without a checkpoint, ends with code 0, and stays behind."""

    def _register_sigint_handler(self, controller: Any) -> None:
        return


class RayLauncher:
    """Runs stages on a Ray cluster: the one named by `cluster.ray_address`, or a local one that ends with this process."""

    def __init__(self, cluster: ClusterConfig) -> None:
        self._cluster = cluster
        self._started_ray = False
        self._private = PrivateRay()

    def launch(self, specs: Sequence[StageSpec]) -> None:
        """Start the worker group for all stages and wait."""
        folder = specs[0].folder
        clear_failures(folder, specs[0].attempt)
        self._connect()
        self._check_resources()
        trainer = _Trainer(
            _run_on_worker,
            train_loop_config={"specs": [spec.to_json() for spec in specs]},
            torch_config=TorchConfig(backend="nccl" if self._cluster.device == "gpu" else "gloo"),
            scaling_config=self._scaling(),
            run_config=ray.train.RunConfig(
                name=f"{folder.run_id}-{specs[0].attempt}",
                storage_path=str(folder.path / "ray"),
                failure_config=ray.train.FailureConfig(max_failures=self._cluster.max_failures),
            ),
        )
        message, caught, kills = "the worker group ended", None, OomKills()
        try:
            trainer.fit()
        except Exception as error:
            # TrainingFailedError: the restarts are used up. RayError: the cluster itself died under us, as it does when a machine is
            # told to leave. Anything else is an error of this process (a full disk); the ranks' records still explain more.
            message, caught = f"Ray Train gave up: {error or repr(error)}", error
        raise_for_records(specs, message, kills.error_since_start() or caught)

    def stop(self) -> None:
        """Leave the cluster; a local one ends."""
        if self._started_ray and ray.is_initialized():
            if self._cluster.ray_address:
                ray.shutdown()
            else:
                self._private.stop()
            self._started_ray = False

    def _connect(self) -> None:
        if ray.is_initialized():
            return
        os.environ.update(QUIET)
        cluster = self._cluster
        environment = rank_environment(cluster)
        names = ("OMP_NUM_THREADS", "DS_ACCELERATOR", "PYTHONPATH", "PYTHONUNBUFFERED")
        variables = {name: environment[name] for name in names if name in environment}
        runtime_env = {"env_vars": variables}
        with _keeping_signal_handlers():
            if cluster.ray_address:
                quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.WARNING}
                ray.init(address=cluster.ray_address, runtime_env=runtime_env, **quiet)
            else:
                self._private.start(num_cpus=_local_cores(cluster), runtime_env=runtime_env)
        self._started_ray = True

    def _check_resources(self) -> None:
        cluster, have = self._cluster, ray.cluster_resources()
        ranks = cluster.world_sizes[0]
        wanted = {"CPU": ranks * cluster.cpus_per_rank}
        if cluster.device == "gpu":
            wanted["GPU"] = float(ranks)
        for name, amount in wanted.items():
            if have.get(name, 0.0) < amount:
                raise ConfigError(
                    f"the run wants {amount:g} {name} for {ranks} ranks and the Ray cluster has {have.get(name, 0.0):g}",
                    allowed=f"at most {have.get(name, 0.0):g} {name}",
                    action="lower cluster.num_nodes or cluster.ranks_per_node (elastic: the first of cluster.num_workers), or "
                    "add nodes to the cluster",
                )

    def _scaling(self) -> ray.train.ScalingConfig:
        cluster = self._cluster
        uses_gpu = cluster.device == "gpu"
        resources = {"CPU": cluster.cpus_per_rank, **({"GPU": 1} if uses_gpu else {})}
        sizes = cluster.world_sizes
        elastic: dict[str, Any] = {  # Ray's own annotations are those of its older version
            "num_workers": (sizes[0], sizes[-1]),
            "elastic_resize_monitor_interval_s": cluster.resize_seconds,
        }
        return ray.train.ScalingConfig(
            use_gpu=uses_gpu,
            resources_per_worker=resources,
            placement_strategy="PACK",
            **(elastic if cluster.num_workers else {"num_workers": sizes[0]}),
        )


def _local_cores(cluster: ClusterConfig) -> int:
    """Cores of a local Ray cluster; a run that wants more is refused before Ray starts."""
    needed = cluster.world_sizes[0] * cluster.cpus_per_rank
    cores = max(os.cpu_count() or 1, 1)
    if needed > cores:
        raise ConfigError(
            f"the run wants {needed:g} CPU cores ({cluster.world_sizes[0]} ranks x {cluster.cpus_per_rank:g}) "
            f"and this machine has {cores}",
            allowed=f"at most {cores} cores on a local Ray cluster",
            action="lower cluster.ranks_per_node, or name a larger cluster with cluster.ray_address",
        )
    return cores


@contextmanager
def _keeping_signal_handlers() -> Iterator[None]:
    """Ray takes over SIGTERM when it starts; the driver's own handler, which asks for a checkpoint, comes back after."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _run_on_worker(config: dict[str, Any]) -> None:
    """What each Ray Train worker executes: the stages, from the run folder."""
    from hsmn_dist.orchestration.stage_runner import run_stages

    try:
        run_stages([StageSpec.from_json(text) for text in config["specs"]], has_driver=True)
    except Exception as error:
        # Ray copies the error into its logs and to the driver; the failure record has the kind and the traceback.
        text = "".join(traceback.format_exception(error))
        if redact(text) == text:
            raise
        raise RuntimeError(redact(str(error))) from None
