"""A real standalone Spark cluster on loopback, from pyspark's own spark-class: a Master and two Workers."""

import contextlib
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pyspark

SPARK_CLASS = Path(pyspark.__file__).parent / "bin" / "spark-class"
QUICK = "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC"
SECRET = "only-for-tests-on-loopback"


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def properties(port: int) -> dict[str, str]:
    return {
        "spark.master": f"spark://127.0.0.1:{port}",
        "spark.authenticate": "true",
        "spark.authenticate.secret": SECRET,
        "spark.network.crypto.enabled": "true",
        "spark.io.encryption.enabled": "true",
        "spark.executor.memory": "1g",
        "spark.executor.extraJavaOptions": QUICK,
        "spark.driver.host": "127.0.0.1",
        "spark.driver.bindAddress": "127.0.0.1",
    }


@contextlib.contextmanager
def standalone_cluster(folder: Path, conf: Path) -> Iterator[Path]:
    """Start the cluster; gives a properties file for jobs on it, made from `conf`."""
    port = free_port()
    lines = [line for line in conf.read_text().splitlines() if not line.startswith("spark.master")]
    submit = folder / "cluster.conf"
    submit.write_text("\n".join([*lines, *(f"{k} {v}" for k, v in properties(port).items())]) + "\n")
    daemon = folder / "daemon"
    daemon.mkdir()
    (daemon / "spark-defaults.conf").write_text("\n".join(f"{k} {v}" for k, v in properties(port).items()) + "\n")
    environment = {**os.environ, "SPARK_CONF_DIR": str(daemon), "SPARK_DAEMON_JAVA_OPTS": QUICK}
    master = ["org.apache.spark.deploy.master.Master", "--host", "127.0.0.1", "--port", str(port), "--webui-port", "0"]
    worker = ["org.apache.spark.deploy.worker.Worker", "--host", "127.0.0.1", "--cores", "1", "--memory", "2g"]
    worker += ["--webui-port", "0", f"spark://127.0.0.1:{port}"]
    processes = []
    try:
        for i, arguments in enumerate([master, worker, worker]):
            work = ["--work-dir", str(folder / f"work{i}")] if i else []
            with (folder / f"daemon{i}.log").open("w") as log:
                command = [str(SPARK_CLASS), *arguments[:1], *work, *arguments[1:]]
                processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
            if not i:
                _wait_for(port)
        yield submit
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()


def _wait_for(port: int) -> None:
    for _ in range(300):
        with socket.socket() as client:
            if client.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise TimeoutError("the Master did not start")
