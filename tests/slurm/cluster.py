"""A real SLURM of one node on loopback: munged, slurmctld and slurmd with all their files in one folder.

Nothing is installed as a service, and nothing is left running. The packages are Debian's slurm-wlm and munge. By hand,
until Ctrl-C:

python -m tests.slurm.cluster
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.processes import DEADLINE_SECONDS

NODE = "pacemark"
CORES = 2
_SBIN = "/usr/sbin:/sbin"
_DAEMONS = ("munged", "slurmctld", "slurmd")
_COMMANDS = ("sbatch", "srun", "scancel", "scontrol", "sinfo", "squeue")

# Without accounting, as on a small cluster: sacct cannot be asked. Two partitions share the node; a job of `urgent`
# takes it from one of `normal`, which is put in the queue again.
_CONFIGURATION = """\
ClusterName=pacemark
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
KillWait=5
MinJobAge=300
NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 CPUs={cores} Boards=1 SocketsPerBoard=1 CoresPerSocket={cores} \
ThreadsPerCore=1 State=UNKNOWN
PartitionName=normal Nodes={node} Default=YES MaxTime=INFINITE State=UP PriorityTier=1
PartitionName=urgent Nodes={node} MaxTime=INFINITE State=UP PriorityTier=10
"""


class Cluster:
    """The daemons of a SLURM; a context manager."""

    def __init__(self) -> None:
        # Below a folder that everyone can pass, as munged wants it: those of pytest are private.
        self.folder = folder = Path(tempfile.mkdtemp(prefix="pacemark-slurm-"))
        self._daemons: list[subprocess.Popen[bytes]] = []
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": f"{os.environ['PATH']}:{_SBIN}"}
        """What commands of SLURM need to reach this one."""

    def __enter__(self) -> Cluster:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start the daemons and wait until the node is idle. Raises RuntimeError where it does not become so."""
        self.folder.chmod(0o755)
        for name in ("state", "spool"):
            (self.folder / name).mkdir()
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        values = {"host": socket.gethostname().partition(".")[0], "node": NODE, "cores": CORES, "folder": self.folder}
        ports = _free_ports(2)
        values |= {"user": _user(), "controller_port": ports[0], "node_port": ports[1]}
        (self.folder / "slurm.conf").write_text(_CONFIGURATION.format(**values))
        socket_path = self.folder / "munge.socket"
        self._run("munged", "--foreground", f"--key-file={key}", f"--socket={socket_path}",
                  f"--pid-file={self.folder}/munge.pid", f"--log-file={self.folder}/munged.log",
                  f"--seed-file={self.folder}/munge.seed", "--num-threads=2")  # fmt: skip
        self._wait("munged", socket_path.exists)
        self._run("slurmctld", "-D", "-c")
        self._run("slurmd", "-D", "-N", NODE)
        self._wait("the node", lambda: self.node_state() == "idle")

    def node_state(self) -> str:
        """The state of the node as sinfo has it; empty where the controller does not answer."""
        with contextlib.suppress(subprocess.SubprocessError):
            return self.call("sinfo", "--noheader", "--partition=normal", "--format=%t").strip()
        return ""

    def call(self, *command: str) -> str:
        """What a command of SLURM prints. Raises CalledProcessError."""
        environment = os.environ | self.environment
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=60)
        return done.stdout

    def list_jobs(self) -> dict[str, str]:
        """The state of every job that has not ended, by its id. One that waits for a while after it was put back into
        the queue may start at once from now on."""
        jobs = {}
        for line in self.call("squeue", "--noheader", "--array", "--format=%i %T %r").splitlines():
            job_id, state, reason = line.split(maxsplit=2)
            jobs[job_id] = state
            if reason == "BeginTime":
                with contextlib.suppress(subprocess.SubprocessError):
                    self.call("scontrol", "update", f"JobId={job_id}", "StartTime=now")
        return jobs

    def stop(self) -> None:
        """Cancel all jobs, end the daemons and remove what they wrote."""
        if len(self._daemons) == len(_DAEMONS):
            with contextlib.suppress(subprocess.SubprocessError):
                self.call("scancel", "--full", f"--user={_user()}")
                self._wait("the jobs", lambda: not self.list_jobs())
        for process in reversed(self._daemons):
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._daemons.clear()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _run(self, *command: str) -> None:
        # The kernel ends them with this process, however it ends.
        bound = [*(["setpriv", "--pdeathsig", "TERM"] if shutil.which("setpriv") else []), *command]
        with (self.folder / f"{command[0]}.output").open("wb") as output:
            # A session of its own: Ctrl-C is for the tests, which stop the daemons then.
            self._daemons.append(
                subprocess.Popen(bound, env=os.environ | self.environment, stdout=output, stderr=output,
                                 stdin=subprocess.DEVNULL, start_new_session=True)
            )  # fmt: skip

    def _wait(self, name: str, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + DEADLINE_SECONDS / 2
        while not condition():
            ended = [str(process.args) for process in self._daemons if process.poll() is not None]
            if ended or time.monotonic() > deadline:
                logs = "\n".join(path.read_text()[-2000:] for path in sorted(self.folder.glob("*.output")))
                raise RuntimeError(f"{name} is not ready; ended: {ended or 'none'}\n{logs}")
            time.sleep(0.1)


def missing() -> str | None:
    """Why no cluster can be started here; None where all programs are there."""
    path = f"{os.environ['PATH']}:{_SBIN}"
    absent = [name for name in (*_DAEMONS, *_COMMANDS) if shutil.which(name, path=path) is None]
    return f"{', '.join(absent)} are not installed (Debian: slurm-wlm, munge)" if absent else None


def _user() -> str:
    return pwd.getpwuid(os.getuid()).pw_name


def _free_ports(number: int) -> list[int]:
    sockets = [socket.socket() for _ in range(number)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def main() -> None:
    """Run a cluster until Ctrl-C."""
    with Cluster() as cluster:
        print(f"export SLURM_CONF={cluster.environment['SLURM_CONF']}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()


if __name__ == "__main__":
    main()
