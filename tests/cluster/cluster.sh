#!/usr/bin/env bash
# A Slurm of two nodes, n0 and n1, both played by this machine. Needs root, for Debian's packages and for slurmd.
#   tests/cluster/cluster.sh install         Debian's slurm-wlm and munge, where they are missing
#   tests/cluster/cluster.sh start FOLDER    starts the daemons; then: export SLURM_CONF=FOLDER/slurm.conf
#   tests/cluster/cluster.sh stop FOLDER     ends them
set -euo pipefail
if [ $# -lt 1 ] || { [ "$1" != install ] && [ $# -ne 2 ]; }; then
  sed -n '2,5s/^# //p' "$0" >&2
  exit 2
fi

install() {
  if ! command -v slurmctld slurmd munged > /dev/null; then
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends slurm-wlm munge
  fi
}

# Nodes have to be found by name, also by Ray and torch.
name_nodes() {
  for node in n0 n1; do
    getent hosts "$node" > /dev/null || echo "127.0.0.1 $node # tests/slurm" >> /etc/hosts
  done
}

start() {
  mkdir -p "$folder"/{state,spool-n0,spool-n1}
  name_nodes
  [ -e "$folder/munge.key" ] || (umask 077; head -c 1024 /dev/urandom > "$folder/munge.key")
  cat > "$folder/slurm.conf" <<CONF
ClusterName=test
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmctldPort=17000
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket,cred_expire=10
CredType=cred/munge
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool-%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd-%n.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
MpiDefault=none
ReturnToService=2
KillWait=5
SlurmctldTimeout=30
SlurmdTimeout=60
NodeName=n[0-1] NodeHostname=$(hostname -s) NodeAddr=127.0.0.1 Port=[17010-17011] CPUs=$(nproc) State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
  export SLURM_CONF=$folder/slurm.conf
  munged --force --socket "$folder/munge.socket" --key-file "$folder/munge.key" --log-file "$folder/munged.log" \
    --pid-file "$folder/munged.pid" --seed-file "$folder/munged.seed" 2> "$folder/munged.err"
  slurmctld
  for node in n0 n1; do slurmd -N "$node"; done
  for _ in {1..60}; do
    if [ "$(sinfo --noheader --states idle --Node | wc -l)" -eq 2 ]; then return; fi
    sleep 1
  done
  echo "the nodes did not come up; logs in $folder" >&2
  exit 1
}

# By the process ids that the daemons have written, and no other; jobs first, which would outlive them.
stop() {
  export SLURM_CONF=$folder/slurm.conf
  squeue --noheader --format %i | xargs --no-run-if-empty scancel
  for _ in {1..30}; do
    [ -n "$(squeue --noheader)" ] || break
    sleep 1
  done
  for name in slurmd-n0 slurmd-n1 slurmctld munged; do
    if [ -e "$folder/$name.pid" ]; then kill "$(cat "$folder/$name.pid")" 2> /dev/null || true; fi
  done
  sed '/# tests\/slurm$/d' /etc/hosts > "$folder/hosts"
  cat "$folder/hosts" > /etc/hosts # in place: a container's hosts file cannot be replaced
}

folder=${2:+$(realpath -m "$2")}
"$1"
