#!/usr/bin/env bash
# nodes.sh: several nodes on one machine, joined by links of a chosen speed.
#   network/nodes.sh up N [RATE] [DELAY]  makes N nodes (RATE as for tc: 100mbit, 1gbit; 0: not
#                                         shaped; DELAY in microseconds, one way)
#   network/nodes.sh run -n R [--spread] COMMAND...
#                                         mpiexec over all nodes: the first R/N ranks on node 1, or
#                                         with --spread each next rank on the next node
#   network/nodes.sh on NODE COMMAND...   runs a command on a node
#   network/nodes.sh cable NODE up|down   plugs or pulls a node's cable
#   network/nodes.sh sent NODE            bytes that it has sent so far, by its interface's count
#   network/nodes.sh down                 ends what runs there and removes everything
# LAB names the nodes (default: 3f), so that several labs can be up at once.
#
#     node 1: eth0 10.77.0.1 ==cable== +--------+ ==cable== node 2: eth0 10.77.0.2
#                                      | switch |
#                  mpiexec: 10.77.0.254 +--------+ ==cable== node 3: eth0 10.77.0.3
#
# node      a network namespace, and for what runs there a host name, an IPC namespace and a
#           /dev/shm of its own: ranks of a node share memory, those of two nodes cannot; and
#           processor cores of its own, which the nodes take in turn where there are too few
# cable     a veth pair on a bridge; both ends let through RATE (tbf). With a DELAY, the switch and
#           its cables are a program (delay.cpp), since many kernels lack what would do it (netem).
# launcher  mpiexec is told to reach other hosts by this script in the place of rsh
# The machine's own network is never touched. Needs root and iproute2.
set -euo pipefail
self=$(realpath "$0")
cd "$(dirname "$self")/.."
lab=${LAB:-3f} net=10.77.0 mtu=9000
switch=$lab-switch
MPICXX=${MPICXX:-$(command -v mpicxx.mpich || echo mpicxx)}
MPIEXEC=${MPIEXEC:-${MPICXX/mpicxx/mpiexec}}

refuse() {
  echo "network/nodes.sh: $*" >&2
  exit 1
}
[[ $lab =~ ^[A-Za-z0-9_-]+$ ]] || refuse "LAB is '$lab', expected letters, digits, - and _"
is_up() { [ -e "/run/netns/$switch" ]; }
nodes() { ls /run/netns | grep -cE "^$lab-[0-9]+$"; }

# shape NAMESPACE INTERFACE RATE: a burst of 100 us, but at least two frames: shorter messages pass
# at once; the queue is longer than any socket's buffer and so never drops
shape() {
  [ "$3" = 0 ] && return
  local bytes
  bytes=$(($(bits "$3") / 8 / 10000))
  [ $bytes -lt $((2 * mtu)) ] && bytes=$((2 * mtu))
  tc -n "$1" qdisc add dev "$2" root tbf rate "$3" burst $bytes limit 64mb
}
bits() {
  local number=${1%bit}
  number=$(tr kmg KMG <<<"$number")
  numfmt --from=si "$number" 2>/dev/null || refuse "'$1' is no rate: write 100mbit or 1gbit, or 0"
}

up() {
  local n=${1:-} rate=${2:-0} delay=${3:-0} i
  [ "$(id -u)" = 0 ] || refuse "only root may make namespaces"
  command -v ip >/dev/null && command -v tc >/dev/null || refuse "needs iproute2 (ip and tc)"
  [[ $n =~ ^[2-9]$ ]] || refuse "'$n' is no number of nodes from 2 to 9"
  [[ $delay =~ ^[0-9]+$ ]] || refuse "'$delay' is no number of microseconds"
  [ "$rate" = 0 ] || bits "$rate" >/dev/null
  is_up && refuse "a lab named $lab is up: LAB=$lab network/nodes.sh down ends it"
  is_made=no # a signal ends this with the status of what came before it, which may be 0
  trap '[ $is_made = yes ] || down || true' EXIT
  ip netns add "$switch"
  ip -n "$switch" link set lo up
  # mpiexec gives a lost node up in seconds, not in a quarter of an hour
  ip netns exec "$switch" sysctl -qw net.ipv4.tcp_retries2=3
  for i in $(seq "$n"); do
    ip netns add "$lab-$i"
    ip -n "$lab-$i" link set lo up
  done
  if [ "$delay" = 0 ]; then
    ip -n "$switch" link add hub mtu $mtu type bridge
    for i in $(seq "$n"); do
      ip -n "$switch" link add "port$i" mtu $mtu type veth peer name eth0 mtu $mtu netns "$lab-$i"
      ip -n "$switch" link set "port$i" master hub up
      shape "$switch" "port$i" "$rate"
    done
  else
    make -s --no-print-directory BACKEND=cpu build/delay
    local mbit=0 first="" said=build/delay-$lab.log
    [ "$rate" = 0 ] || mbit=$(bits "$rate")e-6
    ! chrt -f 10 true 2>/dev/null || first="chrt -f 10" # without it delays vary more
    ip netns exec "$switch" $first build/delay $((n + 1)) "$delay" $mbit \
      </dev/null >/dev/null 2>"$said" &
    for i in $(seq 100); do
      ip -n "$switch" link show "port$n" >/dev/null 2>&1 && break
      [ "$i" -lt 100 ] || refuse "build/delay made no interfaces: $(cat "$said")"
      sleep 0.05
    done
    rm "$said"
    ip -n "$switch" link set port0 name hub mtu $mtu
    for i in $(seq "$n"); do
      ip -n "$switch" link set "port$i" netns "$lab-$i" name eth0
      ip -n "$lab-$i" link set eth0 mtu $mtu txqueuelen 1000
    done
  fi
  ip -n "$switch" addr add $net.254/24 dev hub
  ip -n "$switch" link set hub up
  for i in $(seq "$n"); do
    ip -n "$lab-$i" addr add "$net.$i/24" dev eth0
    ip -n "$lab-$i" link set eth0 up
    shape "$lab-$i" eth0 "$rate"
  done
  is_made=yes
}

down() {
  local name status=0
  for name in $(ls /run/netns 2>/dev/null | grep -E "^$lab-([0-9]+|switch)$"); do
    ip netns pids "$name" | xargs -r kill -9 2>/dev/null || true
    ip netns del "$name" || status=1
  done
  rm -f "build/delay-$lab.log"
  return $status
}

# a_node NUMBER: that is up, or a refusal
a_node() {
  is_up || refuse "no lab named $lab is up"
  [[ $1 =~ ^[1-9]$ && -e /run/netns/$lab-$1 ]] || refuse "'$1' is no node of the lab named $lab"
}

# cores NODE: those that are its own: "0,1"
cores() {
  local all=() range each n i
  n=$(nodes)
  for range in $(sed -n 's/^Cpus_allowed_list://p' /proc/self/status | tr , ' '); do
    all+=($(seq "${range%-*}" "${range#*-}"))
  done
  each=$((${#all[@]} > n ? ${#all[@]} / n : 1))
  for ((i = ($1 - 1) * each; i < $1 * each; i++)); do echo ${all[i % ${#all[@]}]}; done | paste -sd,
}

# on NODE COMMAND: as the words of a shell
on() {
  local node=$1
  shift
  a_node "$node"
  exec taskset -c "$(cores "$node")" \
    ip netns exec "$lab-$node" unshare --uts --ipc --mount bash -c \
    "hostname node$node && mount -t tmpfs tmpfs /dev/shm && exec $*"
}

run() {
  local ranks n each
  [ "${1:-}" = -n ] && [ $# -ge 3 ] \
    || refuse "usage: network/nodes.sh run -n RANKS [--spread] COMMAND..."
  is_up || refuse "no lab named $lab is up"
  ranks=$2 n=$(nodes)
  shift 2
  each=$(((ranks + n - 1) / n))
  if [ "$1" = --spread ]; then
    shift
    each=1
  fi
  # what has up to 1 MiB is sent unasked: else sender and receiver first agree, which takes three
  # ways over the link, and each of them looks only now and then while its core computes
  exec ip netns exec "$switch" \
    env UCX_TLS=tcp,self,sm UCX_NET_DEVICES=eth0 UCX_RNDV_THRESH="${UCX_RNDV_THRESH:-1m}" \
    "$MPIEXEC" -launcher rsh -launcher-exec "$self" -iface hub \
    -hosts "$(seq -s, -f "$net.%g" "$n")" -ppn "$each" -n "$ranks" "$@"
}

case ${1:-} in
  up) up "${@:2}" ;;
  down) down ;;
  run) run "${@:2}" ;;
  on) on "${2:-}" "${*:3}" ;;
  cable)
    a_node "${2:-}"
    [[ ${3:-} =~ ^(up|down)$ ]] || refuse "usage: network/nodes.sh cable NODE up|down"
    ip -n "$lab-$2" link set eth0 "$3"
    ;;
  sent)
    a_node "${2:-}"
    ip netns exec "$lab-$2" cat /sys/class/net/eth0/statistics/tx_bytes
    ;;
  $net.*) on "${1##*.}" "${*:2}" ;; # mpiexec: HOST COMMAND...
  *)
    sed -n '2,11s/^# \{0,1\}//p' "$self"
    exit 1
    ;;
esac
