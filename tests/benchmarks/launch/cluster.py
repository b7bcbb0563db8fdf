"""A real SLURM of two nodes on this machine, without systemd: munged, slurmctld and two slurmd on loopback."""

import os
import shutil
import signal
import socket
import stat
import subprocess
import tempfile
import time
from pathlib import Path

from tests.fixtures.ports import free_ports

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "sinfo")
# Names would have to resolve where the nodes of a job meet: addresses do.
NODES = ("127.0.0.1", "127.0.0.2")
CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={base}/munge/socket,cred_expire=5
StateSaveLocation={base}/state
SlurmdSpoolDir={base}/spool.%n
SlurmctldPidFile={base}/slurmctld.pid
SlurmdPidFile={base}/slurmd.%n.pid
SlurmctldLogFile={base}/slurmctld.log
SlurmdLogFile={base}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=2,batch_sched_delay=0,sched_min_interval=0
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
JobRequeue=1
ReturnToService=2
KillWait=30
MinJobAge=600
SlurmdParameters=config_overrides
{nodes}
PartitionName=low Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=120
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


class Cluster:
    """environment: for programs that are to find it."""

    def __init__(self) -> None:
        # Munge wants a folder that every user may enter, which pytest's are not.
        self.base = base = Path(tempfile.mkdtemp(prefix="slurm-"))
        base.chmod(0o755)
        (base / "munge").mkdir(mode=0o755)
        (base / "state").mkdir()
        (base / "bin").mkdir()
        # A requeue's own SIGTERM can end the `scontrol requeue` that a job has called for itself.
        wrapper = base / "bin" / "scontrol"
        wrapper.write_text(f"#!/bin/sh\ntrap '' TERM\nexec {shutil.which('scontrol')} \"$@\"\n")
        wrapper.chmod(wrapper.stat().st_mode | stat.S_IXUSR)
        port, *ports = free_ports(3)
        host = socket.gethostname().split(".")[0]
        lines = [
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={own} CPUs=4 RealMemory=64000 State=UNKNOWN"
            for name, own in zip(NODES, ports)
        ]
        conf = base / "slurm.conf"
        conf.write_text(CONF.format(host=host, port=port, base=base, nodes="\n".join(lines)))
        self.environment = {
            **os.environ,
            "SLURM_CONF": str(conf),
            "PATH": f"{wrapper.parent}:{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
        }
        try:
            self.start(base)
        except BaseException:
            self.stop()
            raise

    def start(self, base: Path) -> None:
        key = base / "munge" / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        own = [f"--{name}-file={base}/munge/{name}" for name in ("pid", "log", "seed")]
        self.call("munged", f"--key-file={key}", f"--socket={base}/munge/socket", *own)
        self.call("slurmctld", "-i")
        for name in NODES:
            self.call("slurmd", "-N", name)
        self.wait(lambda: self.call("sinfo", "-h", "-N", "-p", "low", "-o", "%T").split() == ["idle"] * 2, 300)

    def call(self, *command: str) -> str:
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        return done.stdout

    def wait(self, condition, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, self.call("squeue", "-r")
            time.sleep(0.2)

    def queue(self) -> dict[str, str]:
        """Id -> state of all jobs that are not over."""
        lines = self.call("squeue", "-h", "-r", "-o", "%i %T").splitlines()
        return dict(line.split() for line in lines)

    def stop(self) -> None:
        subprocess.run(["scancel", "--full", "-u", "root"], env=self.environment, capture_output=True, timeout=60)
        for file in [*self.base.glob("*.pid"), self.base / "munge" / "pid"]:
            try:
                os.kill(int(file.read_text()), signal.SIGTERM)
            except (OSError, ValueError):
                continue
        shutil.rmtree(self.base, ignore_errors=True)
