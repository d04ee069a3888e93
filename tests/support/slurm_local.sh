#!/bin/bash
# Slurm of several nodes on one machine, without systemd, for tests. Root only.
#   slurm_local.sh install        Debian's packages, where they are missing
#   slurm_local.sh up DIR N       munge, one controller and N slurmd that share this machine; files in DIR (a short path)
#   slurm_local.sh down DIR N     end exactly the daemons that `up` started
# No cgroups (proctrack/linuxproc, task/none), so it also runs inside a container. Every credential lives 3 s, so that a requeued job is
# not refused for the old one's. Clients find it by SLURM_CONF=DIR/slurm.conf.
set -euo pipefail

install() {
  if command -v slurmctld >/dev/null && command -v slurmd >/dev/null && command -v munged >/dev/null; then return 0; fi
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -qq
  apt-get install -y -qq --no-install-recommends slurm-wlm slurmctld slurmd munge
}

configuration() { # DIR N
  local host
  host=$(hostname -s)
  cat <<CONF
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$((base))
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$1/munge/socket,cred_expire=3
CredType=cred/munge
StateSaveLocation=$1/state
SlurmctldPidFile=$1/slurmctld.pid
SlurmctldLogFile=$1/log/slurmctld.log
SlurmdPidFile=$1/slurmd.%n.pid
SlurmdSpoolDir=$1/spool.%n
SlurmdLogFile=$1/log/slurmd.%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
KillWait=90
MinJobAge=3600
SlurmdTimeout=60
InactiveLimit=0
Waittime=0
JobRequeue=1
CONF
  for index in $(seq "$2"); do
    echo "NodeName=n$index NodeHostname=$host NodeAddr=127.0.0.1 Port=$((base + index)) CPUs=2 RealMemory=4000 State=UNKNOWN"
  done
  echo "PartitionName=test Nodes=n[1-$2] Default=YES MaxTime=INFINITE State=UP"
}

up() { # DIR N
  local dir=$1 count=$2
  base=$((17000 + RANDOM % 1000 * 10))
  mkdir -p "$dir"/{state,munge,log}
  chmod 755 "$dir" "$dir/munge"
  head -c 1024 /dev/urandom > "$dir/munge/key"
  chmod 400 "$dir/munge/key"
  munged --force --key-file="$dir/munge/key" --socket="$dir/munge/socket" --pid-file="$dir/munge/pid" \
    --log-file="$dir/munge/log" --seed-file="$dir/munge/seed"
  configuration "$dir" "$count" > "$dir/slurm.conf"
  export SLURM_CONF=$dir/slurm.conf
  slurmctld -c
  for index in $(seq "$count"); do
    mkdir -p "$dir/spool.n$index"
    slurmd -c -N "n$index" -f "$SLURM_CONF"
  done
  for _ in $(seq 300); do
    if [ "$(sinfo --noheader --states=idle --format=%D 2>/dev/null)" = "$count" ]; then return 0; fi
    sleep 0.2
  done
  sinfo --long --Node || true
  tail -n 20 "$dir"/log/*.log
  return 1
}

down() { # DIR N: the nodes, then the controller, then munge
  local dir=$1 pid
  for file in "$dir"/slurmd.n*.pid "$dir/slurmctld.pid" "$dir/munge/pid"; do
    if [ ! -s "$file" ]; then continue; fi
    pid=$(cat "$file")
    kill "$pid" 2>/dev/null || continue
    for _ in $(seq 50); do
      if ! kill -0 "$pid" 2>/dev/null; then break; fi
      sleep 0.2
    done
    kill -KILL "$pid" 2>/dev/null || true
  done
}

"$@"
