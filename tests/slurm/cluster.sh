#!/usr/bin/env bash
# A real Slurm on one Debian machine: two nodes of 16 CPUs and 8 GPUs each, which are character devices and no GPUs.
#
#   cluster.sh up                   install what is missing, start, wait until a job runs; a healthy cluster is left alone
#   cluster.sh status               say how it is; exit code 0 only when healthy
#   cluster.sh node n1 start|stop   start a node's slurmd, or kill it (SIGKILL); jobs on it live on
#   cluster.sh down                 end all that was started, remove all state (n1 and n2 stay in /etc/hosts)
#
# MEDMASK_SLURM_DIR         state, logs and configuration (/tmp/medmask-slurm)
# MEDMASK_SLURM_ACCOUNTING  0: no database, so that sacct says that accounting is off (1)
# MEDMASK_SLURM_PORT        first of 20 ports (16800); with a folder of its own a second cluster can run beside the first
#
# Exit codes: 0 fine, 1 something is wrong, 3 this machine cannot have one (not root, no apt-get).
set -euo pipefail

DIR=${MEDMASK_SLURM_DIR:-/tmp/medmask-slurm}
ACCOUNTING=${MEDMASK_SLURM_ACCOUNTING:-1}
PORT=${MEDMASK_SLURM_PORT:-16800}
NODES=(n1 n2)
PACKAGES=(slurm-wlm slurmdbd munge mariadb-server)
WAIT=60 # seconds that a daemon may take

export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
export SLURM_CONF=$DIR/slurm.conf
LINK=/etc/slurm/slurm.conf # the executor plugin unsets SLURM_CONF inside a job, so there has to be a default too
unset "${!SLURM_JOB@}" "${!SBATCH_@}" "${!SRUN_@}" # this may itself be run inside a job

say() { echo "cluster: $*"; }

fail() {
    echo "cluster: error: $1" >&2
    exit "${2:-1}"
}

# Repeat a command until it succeeds; the first argument says what was waited for.
wait_for() {
    local what=$1 end=$((SECONDS + WAIT))
    shift
    until "$@" >/dev/null 2>&1; do
        ((SECONDS < end)) || fail "$what: not after $WAIT s; logs are in $DIR/log"
        sleep 0.2
    done
}

# Start a daemon in the foreground of a session of its own: daemon NAME COMMAND...
daemon() {
    local name=$1
    shift
    setsid "$@" </dev/null >>"$DIR/log/$name.out" 2>&1 9>&- &
    echo $! >"$DIR/run/$name.pid"
    disown $!
}

# Process of a daemon, when it lives; the name guards against a process id that was given to another.
pid_of() {
    local pid
    pid=$(cat "$DIR/run/$1.pid" 2>/dev/null) || return 1
    [[ -d /proc/$pid ]] && tr '\0' ' ' <"/proc/$pid/cmdline" | grep -q "$2" && echo "$pid"
}

program() {
    case $1 in
    n?) echo slurmd ;;
    munge) echo munged ;;
    database) echo mariadbd ;;
    *) echo "$1" ;;
    esac
}

# stop NAME [SIGNAL]: end a daemon that was started here, and wait for its end.
stop() {
    local pid end=$((SECONDS + 10))
    pid=$(pid_of "$1" "$(program "$1")") || return 0
    kill -"${2:-TERM}" "$pid"
    while [[ -d /proc/$pid ]] && ! grep -q '^State:.Z' "/proc/$pid/status" 2>/dev/null; do
        ((SECONDS < end)) || kill -KILL "$pid" 2>/dev/null || true
        sleep 0.1
    done
    rm -f "$DIR/run/$1.pid"
}

install() {
    local missing=()
    for package in "${PACKAGES[@]}"; do
        dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
    done
    ((${#missing[@]})) || return 0
    say "installing ${missing[*]}"
    # policy-rc.d keeps the packages from starting daemons of their own
    local policy=/usr/sbin/policy-rc.d made=
    [[ -e $policy ]] || { printf '#!/bin/sh\nexit 101\n' >"$policy" && chmod 755 "$policy" && made=1; }
    apt-get update -qq >"$DIR/log/apt.out" 2>&1 || true
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" \
        >>"$DIR/log/apt.out" 2>&1 || { rm -f ${made:+"$policy"} && fail "apt-get install failed, see $DIR/log/apt.out"; }
    rm -f ${made:+"$policy"}
}

write_conf() {
    local host accounting=none
    host=$(hostname -s)
    ((ACCOUNTING)) && accounting=slurmdbd
    cat >"$DIR/slurm.conf" <<CONF
ClusterName=medmask
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$PORT
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$DIR/run/munge.socket
StateSaveLocation=$DIR/state
SlurmctldPidFile=$DIR/run/slurmctld.own.pid
SlurmctldLogFile=$DIR/log/slurmctld.log
SlurmdPidFile=$DIR/run/%n.own.pid
SlurmdLogFile=$DIR/log/%n.log
SlurmdSpoolDir=$DIR/spool/%n
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=bf_interval=1,sched_interval=1,sched_min_interval=100000,batch_sched_delay=0
PriorityType=priority/basic
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PropagateResourceLimits=NONE
MpiDefault=none
GresTypes=gpu
JobRequeue=1
EnforcePartLimits=ALL
OverTimeLimit=0
KillWait=5
MinJobAge=3600
InactiveLimit=0
SlurmctldTimeout=20
SlurmdTimeout=20
MessageTimeout=30
BatchStartTimeout=30
ReturnToService=1
AccountingStorageType=accounting_storage/$accounting
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=10
NodeName=n[1-2] NodeHostname=$host NodeAddr=127.0.0.1 Port=[$((PORT + 11))-$((PORT + 12))] CPUs=16 RealMemory=64000 Gres=gpu:8
PartitionName=cpu Nodes=n[1-2] Default=YES MaxTime=2-00:00:00 DefaultTime=00:10:00 State=UP
PartitionName=gpu Nodes=n[1-2] MaxTime=2-00:00:00 DefaultTime=00:10:00 State=UP
PartitionName=urgent Nodes=n[1-2] MaxTime=1-00:00:00 DefaultTime=00:10:00 State=UP PriorityTier=10
CONF
    for node in "${NODES[@]}"; do
        echo "NodeName=$node Name=gpu File=$DIR/dev/$node/gpu[0-7]"
    done >"$DIR/gres.conf"
    ((ACCOUNTING)) || return 0
    cat >>"$DIR/slurm.conf" <<CONF
AccountingStorageHost=127.0.0.1
AccountingStoragePort=$((PORT + 1))
AccountingStoragePass=$DIR/run/munge.socket
AccountingStorageTRES=gres/gpu
AccountingStoreFlags=job_comment
AccountingStorageEnforce=associations
CONF
    (umask 077 && cat >"$DIR/slurmdbd.conf") <<CONF
AuthType=auth/munge
AuthInfo=socket=$DIR/run/munge.socket
DbdHost=$host
DbdAddr=127.0.0.1
DbdPort=$((PORT + 1))
SlurmUser=root
LogFile=$DIR/log/slurmdbd.log
PidFile=$DIR/run/slurmdbd.own.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort=$((PORT + 2))
StorageUser=slurm
StoragePass=$(cat "$DIR/password")
StorageLoc=slurm
CONF
}

write_files() {
    for node in "${NODES[@]}"; do
        mkdir -p "$DIR/dev/$node" "$DIR/spool/$node"
        for i in {0..7}; do mknod "$DIR/dev/$node/gpu$i" c 1 3; done
        # torch looks up the names of the nodes
        getent hosts "$node" >/dev/null || echo "127.0.0.1 $node" >>/etc/hosts
    done
    mkdir -p "$DIR/state"
    (umask 077 && head -c 18 /dev/urandom | base64 | tr -d '/+=' >"$DIR/password" && head -c 128 /dev/urandom >"$DIR/munge.key")
    write_conf
    mkdir -p "${LINK%/*}"
    [[ -e $LINK ]] || ln -sfn "$SLURM_CONF" "$LINK"
}

start_database() {
    mariadb-install-db --no-defaults --user=root --datadir="$DIR/database" --skip-test-db >"$DIR/log/database.out" 2>&1 ||
        fail "mariadb-install-db failed, see $DIR/log/database.out"
    daemon database mariadbd --no-defaults --user=root --datadir="$DIR/database" --socket="$DIR/run/database.socket" \
        --pid-file="$DIR/run/database.own.pid" --bind-address=127.0.0.1 --port=$((PORT + 2)) \
        --innodb-buffer-pool-size=64M --innodb-flush-log-at-trx-commit=0 --innodb-lock-wait-timeout=900
    local client=(mariadb --no-defaults --user=root --socket="$DIR/run/database.socket" --execute)
    wait_for "database" "${client[@]}" "select 1"
    "${client[@]}" "create database slurm; grant all on slurm.* to slurm@'127.0.0.1' identified by '$(cat "$DIR/password")'"
}

start_accounting() {
    start_database
    daemon slurmdbd slurmdbd -D
    wait_for "slurmdbd" sacctmgr --noheader list cluster
    {
        sacctmgr -i add cluster medmask
        sacctmgr -i add account lab Cluster=medmask Description=lab Organization=lab
        sacctmgr -i add user "$(id -un)" Cluster=medmask Account=lab DefaultAccount=lab
    } >"$DIR/log/sacctmgr.out" 2>&1 || fail "sacctmgr failed, see $DIR/log/sacctmgr.out"
}

start_node() {
    pid_of "$1" slurmd >/dev/null || daemon "$1" slurmd -D -N "$1" -f "$SLURM_CONF"
}

is_idle() { [[ $(sinfo --noheader --Node --partition=cpu --format=%T | sort -u) == idle ]]; }

# Nothing when healthy, else one line with the first thing that is wrong.
trouble() {
    local name daemons=(munge slurmctld "${NODES[@]}") state
    [[ -e $SLURM_CONF ]] || { echo "not running" && return; }
    grep -q accounting_storage/slurmdbd "$SLURM_CONF" && daemons+=(database slurmdbd)
    for name in "${daemons[@]}"; do
        pid_of "$name" "$(program "$name")" >/dev/null || { echo "$name does not run" && return; }
    done
    scontrol ping 2>&1 | grep -q 'is UP' || { echo "slurmctld does not answer" && return; }
    for name in "${NODES[@]}"; do
        state=$(sinfo --noheader --nodes="$name" --partition=cpu --format=%T)
        [[ $state =~ ^(idle|mixed|allocated|completing)$ ]] || { echo "node $name is $state" && return; }
    done
}

up() {
    local began=$SECONDS wrong has=0
    [[ $EUID == 0 ]] || fail "need root to start Slurm's daemons" 3
    command -v apt-get >/dev/null || fail "need a Debian machine: there is no apt-get here" 3
    exec 9>"$DIR.lock" && flock 9
    wrong=$(trouble)
    if [[ ! $wrong ]]; then
        grep -q accounting_storage/slurmdbd "$SLURM_CONF" && has=1
        [[ $has == "$ACCOUNTING" ]] || fail "a cluster with MEDMASK_SLURM_ACCOUNTING=$has runs in $DIR; take it down first"
        say "runs already"
        echo "export SLURM_CONF=$SLURM_CONF"
        return
    fi
    [[ ! -e $SLURM_CONF ]] || say "starting anew: $wrong"
    clear_away
    mkdir -p "$DIR"/{log,run} && touch "$DIR/.cluster"
    install
    write_files
    daemon munge munged --foreground --force --key-file="$DIR/munge.key" --socket="$DIR/run/munge.socket" \
        --pid-file="$DIR/run/munge.own.pid" --log-file="$DIR/log/munge.log" --seed-file="$DIR/run/munge.seed"
    wait_for "munge" munge --socket="$DIR/run/munge.socket" --no-input
    if ((ACCOUNTING)); then start_accounting; fi
    daemon slurmctld slurmctld -D -f "$SLURM_CONF"
    for node in "${NODES[@]}"; do start_node "$node"; done
    wait_for "both nodes idle" is_idle
    wait_for "a job" timeout 20 srun --nodes=2 --time=1 sleep 1
    say "up after $((SECONDS - began)) s, accounting $( ((ACCOUNTING)) && echo on || echo off)"
    echo "export SLURM_CONF=$SLURM_CONF"
}

# End jobs, daemons and steps that outlived their daemon, and remove the folder.
clear_away() {
    local pid
    [[ -e $DIR/.cluster || ! $(ls -A "$DIR" 2>/dev/null) ]] || fail "$DIR holds other things; name an empty folder"
    if pid_of slurmctld slurmctld >/dev/null; then
        timeout 10 scancel --user="$(id -un)" --hurry 2>/dev/null || true
        for _ in {1..40}; do
            [[ $(timeout 10 squeue --noheader --states=running,completing 2>/dev/null) ]] || break
            sleep 0.2
        done
    fi
    for name in slurmctld "${NODES[@]}" slurmdbd database munge; do stop "$name"; done
    for pid in $(pgrep slurmstepd || true); do
        { tr '\0' '\n' <"/proc/$pid/environ" | grep -qx "SLURM_CONF=$SLURM_CONF" && kill -KILL "$pid"; } 2>/dev/null || true
    done
    [[ $(readlink "$LINK" 2>/dev/null) != "$SLURM_CONF" ]] || rm -f "$LINK"
    rm -rf "$DIR"
}

down() {
    exec 9>"$DIR.lock" && flock 9
    clear_away
    say "down"
}

status() {
    local wrong
    wrong=$(trouble)
    [[ ! $wrong ]] || fail "$wrong ($DIR)"
    sinfo --Node --long
    echo "export SLURM_CONF=$SLURM_CONF"
}

node() {
    [[ " ${NODES[*]} " == *" ${1:-} "* && ${2:-} =~ ^(start|stop)$ ]] || fail "usage: cluster.sh node n1|n2 start|stop"
    [[ -e $SLURM_CONF ]] || fail "not running ($DIR)"
    if [[ $2 == stop ]]; then
        stop "$1" KILL
    else
        start_node "$1"
        wait_for "slurmd of $1" pid_of "$1" slurmd
    fi
}

case ${1:-} in
up | down | status) "$1" ;;
node) node "${@:2}" ;;
*) fail "usage: cluster.sh up | down | status | node n1|n2 start|stop" ;;
esac
