#!/bin/bash
# "Hosts" with an address each, as network namespaces on one bridge, for tests. Root and iproute2.
#   net_hosts.sh up NET N          hosts NET-1 .. NET-N at 10.77.0.1 .. N; the machine itself is 10.77.0.254 (NET: at most 8 letters)
#   net_hosts.sh on NET I CMD...   a command on host I, which also has a host name of its own
#   net_hosts.sh cut NET I         pull host I's cable; `heal` puts it back
#   net_hosts.sh down NET N        end what runs on the hosts, and remove them
set -euo pipefail
action=$1 net=$2
shift 2
case $action in
up)
  ip link add "$net" type bridge
  ip addr add 10.77.0.254/24 dev "$net"
  ip link set "$net" up
  for i in $(seq "$1"); do
    ip netns add "$net-$i"
    ip link add "$net-v$i" type veth peer name eth0 netns "$net-$i"
    ip link set "$net-v$i" master "$net" up
    ip -n "$net-$i" link set lo up
    ip -n "$net-$i" addr add "10.77.0.$i/24" dev eth0
    ip -n "$net-$i" link set eth0 up
    ip -n "$net-$i" route add default via 10.77.0.254
  done
  ;;
on) # nsenter, not `ip netns exec`, which hides /sys/fs/cgroup
  host=$net-$1
  shift
  # shellcheck disable=SC2016
  exec nsenter --net="/run/netns/$host" unshare --uts bash -c 'hostname "$1"; shift; exec "$@"' on "$host" "$@"
  ;;
cut) ip link set "$net-v$1" down ;;
heal) ip link set "$net-v$1" up ;;
down)
  for i in $(seq "$1"); do
    ip netns pids "$net-$i" 2>/dev/null | xargs -r kill -KILL 2>/dev/null || true
    ip netns del "$net-$i" 2>/dev/null || true
    ip link del "$net-v$i" 2>/dev/null || true
  done
  ip link del "$net" 2>/dev/null || true
  ;;
*)
  echo "unknown: $action" >&2
  exit 2
  ;;
esac
