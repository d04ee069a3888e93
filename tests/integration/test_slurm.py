"""Slurm scripts as text: what is printed, what is shipped, what is refused."""

from __future__ import annotations

import itertools
import re
import subprocess
from pathlib import Path

import pytest

from hsmn_dist.cli.main import run_command
from hsmn_dist.config.load import load_run_config
from hsmn_dist.foundation.errors import ConfigError
from hsmn_dist.orchestration.slurm_script import slurm_script
from hsmn_dist.orchestration.slurm_settings import KINDS, SlurmSettings
from tests.support import manifests

ROOT = Path(__file__).resolve().parents[2]
LARGE = "configs/runs/hope_large_builtin_multi_node.yaml"
DEMO = "configs/runs/hsmn_debug_demo_cpu.yaml"


def script(path: str = LARGE, changes: tuple[str, ...] = (), **settings: object) -> str:
    return slurm_script(load_run_config(ROOT / path, changes), path, SlurmSettings(**settings))  # type: ignore[arg-type]


def directives(text: str) -> dict[str, str]:
    rows = [line.removeprefix("#SBATCH --") for line in text.splitlines() if line.startswith("#SBATCH --")]
    return {key: value for key, _, value in (row.partition("=") for row in rows)}


@pytest.mark.parametrize("kind", KINDS)
def test_shipped_scripts_are_what_the_command_prints(kind: str) -> None:
    shipped = (ROOT / "cluster" / "slurm" / f"{kind}.sbatch").read_text(encoding="utf-8")
    assert shipped == script(kind=kind), f"hsmn-dist slurm {LARGE} --kind {kind} > cluster/slurm/{kind}.sbatch"


def test_directives_follow_the_configuration() -> None:
    many = directives(script())
    assert (many["nodes"], many["gpus-per-node"], many["cpus-per-task"]) == ("8", "8", "64")
    assert "requeue" in many and many["signal"] == "B:USR1@300"
    assert directives(script(kind="one_node"))["nodes"] == "1"
    assert directives(script(kind="preemptible"))["qos"] == "preemptible"
    demo = directives(script(DEMO, kind="one_node"))
    assert "gpus-per-node" not in demo and demo["cpus-per-task"] == "2"


def test_no_placeholder_is_left_and_options_reach_the_script() -> None:
    text = script(container="/images/hsmn dist.sif", setup="", mlflow_uri="http://tracker:5000", account="lab")
    assert re.findall("@[a-z]+@", text) == []
    assert "image='/images/hsmn dist.sif'" in text
    assert "tracking.uri=http://tracker:5000" in text
    assert directives(text)["account"] == "lab"


def test_an_array_gives_each_task_a_name_and_a_seed() -> None:
    text = script(DEMO, array="0-3")
    assert directives(text)["array"] == "0-3"
    assert directives(text)["output"] == "slurm-%x-%A_%a.log"
    assert '--name "hsmn_debug_demo_cpu-many_nodes-$SLURM_ARRAY_TASK_ID"' in text
    assert '--set "seed=$((42 + SLURM_ARRAY_TASK_ID))"' in text


def test_a_name_belongs_to_one_kind_because_it_belongs_to_one_number_of_nodes() -> None:
    names = {kind: re.findall(r'--name "(.*?)"', script(kind=kind)) for kind in KINDS}
    assert names == {kind: [f"hope_large_builtin_multi_node-{kind}"] for kind in KINDS}
    assert '--name "mine"' in script(name="mine")


def test_memory_is_the_whole_node_where_the_node_is_ours() -> None:
    assert directives(script())["mem"] == "0"
    assert "exclusive" in directives(script())
    assert directives(script(mem="900G"))["mem"] == "900G"
    shared = directives(script(DEMO, kind="one_node"))
    assert "mem" not in shared and "exclusive" not in shared


def test_further_directives_come_last_and_folders_reach_the_container() -> None:
    text = script(directives=("--constraint=h100&ib", "--nvme"), container="/i.sif", binds=("/scratch", "/a b:/c:ro"))
    rows = [line for line in text.splitlines() if line.startswith("#SBATCH")]
    assert rows[-2:] == ["#SBATCH --constraint=h100&ib", "#SBATCH --nvme"]
    assert "binds=(--bind /scratch --bind '/a b:/c:ro')" in text
    assert 'in "$PWD" runs configs/runs; do' in text
    assert "--set run_root=/shared/runs" in script(run_root="/shared/runs")


@pytest.mark.parametrize(
    "settings",
    [
        {"kind": "two_nodes"},
        {"mem": "lots"},
        {"partition": "gpu\n#SBATCH --nodes=9"},
        {"account": "a b"},
        {"name": "a/b"},
        {"directives": ("constraint=h100",)},
        {"directives": ("-C h100",)},
        {"directives": ("--comment=a\nrm -rf x",)},
        {"directives": ("--nodes=3",)},
        {"directives": ("--no-requeue",)},
        {"binds": ("/scratch",)},
        {"binds": ("",), "container": "/i.sif"},
        {"binds": ("/a:/b:ro:x",), "container": "/i.sif"},
        {"array": "0-"},
        {"array": "7-0"},
        {"array": "0-7%0"},
        {"time_limit": "1 day"},
        {"time_limit": "5", "signal_seconds": 300},
        {"signal_seconds": 70000, "time_limit": "7-0"},
        {"mlflow_uri": "tracker:5000"},
        {"mlflow_uri": "http://me:password@tracker"},
    ],
    ids=str,
)
def test_what_slurm_or_the_script_cannot_take_is_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ConfigError) as refusal:
        SlurmSettings(**settings)  # type: ignore[arg-type]
    assert refusal.value.allowed and refusal.value.action
    assert "password@" not in str(refusal.value)


@pytest.mark.parametrize("time_limit", ["90", "90:00", "1:00:00", "1-0", "1-0:30", "1-0:30:00", "UNLIMITED"])
def test_every_form_of_slurms_time_is_taken(time_limit: str) -> None:
    assert directives(script(time_limit=time_limit))["time"] == time_limit


@pytest.mark.parametrize(("kind", "num_nodes"), [("one_node", 1), ("many_nodes", 2), ("many_nodes", 200)])
def test_ports_lie_between_rays_workers_and_outgoing_connections(kind: str, num_nodes: int) -> None:
    text = script(changes=(f"cluster.num_nodes={num_nodes}", "training.global_batch_examples=12800"), kind=kind)
    base, ports = (re.findall(rf"^ *{name}=(\$\(\(.*?\)\))", text, re.MULTILINE)[0] for name in ("base", "ports"))
    loop = f"for SLURM_JOB_ID in $(seq 1 1400) 67108863; do base={base}; echo $base; done; base=0"
    shown = f"{loop}; echo; for index in $(seq 0 {num_nodes - 1}); do echo {ports}; done"
    bases, nodes = subprocess.run(["bash", "-c", shown], capture_output=True, text=True, check=True).stdout.split(
        "\n\n"
    )
    starts, offsets = [int(word) for word in bases.split()], [int(word) for word in nodes.split()]
    used = {0, 1, 2} | {offset + port for offset in offsets for port in range(6)}  # of the head, and of every node
    assert min(starts) >= 20000 and max(starts) + max(used) < 32768
    gaps = {abs(first - second) for first, second in itertools.pairwise(starts)}
    assert min(gaps) > max(used), "two jobs in a row share no port"
    assert min(offsets) >= 3
    assert num_nodes > 16 or len(set(offsets)) == num_nodes, "nodes of one host differ"


def test_a_database_in_the_run_root_is_explained_and_a_server_is_asked_for() -> None:
    assert "MLflow is an SQLite file" in script()
    assert "Tracking is off" in script(changes=("tracking.backend=none",))
    asked = script(mlflow_uri="http://tracker:5000")
    assert 'python -c "$mlflow_script" http://tracker:5000 ||' in asked
    assert script(changes=("tracking.uri=http://tracker:5000",)).count("mlflow_script") == 2
    assert "to the store that the configuration names" in script(changes=("tracking.uri=postgresql://db/mlflow",))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"array": "0-7"},
        {"container": "/images/a b.sif", "setup": "", "binds": ("/a b",)},
        {"mlflow_uri": "http://t:5000"},
        {"kind": "one_node", "directives": ("--constraint=h100&ib",)},
    ],
    ids=str,
)
def test_every_filled_in_script_passes_shellcheck_and_bash(settings: dict[str, object], tmp_path: Path) -> None:
    path = tmp_path / "job.sbatch"
    path.write_text(script(LARGE, (), **settings), encoding="utf-8")
    assert subprocess.run(["bash", "-n", str(path)], capture_output=True, timeout=30).returncode == 0
    assert manifests.shell_errors(path) == ""


def test_a_run_cannot_smuggle_shell_into_the_script() -> None:
    text = slurm_script(load_run_config(ROOT / DEMO), "a; rm -rf $HOME.yaml", SlurmSettings())
    assert "'a; rm -rf $HOME.yaml'" in text


def test_the_command_takes_repeated_options_and_refuses_in_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "slurm",
        str(ROOT / LARGE),
        "--directive=--constraint=h100",
        "--directive",
        "--nvme",
        "--container",
        "i.sif",
    ]
    assert run_command([*words, "--bind", "/a", "--bind", "/b"]) == 0
    text = capsys.readouterr().out
    assert "#SBATCH --constraint=h100\n#SBATCH --nvme\n" in text and "(--bind /a --bind /b)" in text
    assert f"{ROOT}/configs/runs/../models" in text, "what the configuration includes"
    assert run_command([*words, "--directive=--time=1"]) == 2
    assert "it is decided by --time-limit" in capsys.readouterr().err
    assert run_command(["slurm", str(ROOT / DEMO)]) == 0
    assert '--name "hsmn_debug_demo_cpu-one_node"' in capsys.readouterr().out
