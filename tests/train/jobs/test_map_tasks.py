"""join and recaption on a Ray cluster of two nodes, one of whose workers is killed in the middle."""

import contextlib
import csv
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from chat_server import ChatServer
from shard_files import jpeg, write_tar
from tiny import clean_environment

from dreamlip_train.data.shards.shards import read_shard
from dreamlip_train.jobs import progress_line
from dreamlip_train.prepare.join.join import join_captions
from dreamlip_train.prepare.options import RecaptionOptions
from dreamlip_train.prepare.recaption.recaption import recaption_shards


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


NODE = "start --disable-usage-stats --num-cpus 1 --object-store-memory 100000000 --include-log-monitor false".split()
HEAD = "--head --include-dashboard false --no-monitor --node-ip-address 127.0.0.1".split()
ENVIRONMENT = {
    "RAY_ENABLE_MULTI_TENANCY": "1",
    "OMP_NUM_THREADS": "1",
    "RAY_worker_niceness": "0",  # 15 by default: beside other programs its workers hardly run
    "RAY_prestart_worker_first_driver": "0",  # workers that nobody asked for
    "RAY_enable_worker_prestart": "0",
    "RAY_enable_metrics_collection": "0",
}

pytestmark = pytest.mark.slow  # Ray's own processes take 20 CPU seconds


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """The address of a head and a second node, started as on two machines, here both on this one."""
    temporary = tmp_path_factory.mktemp("r")
    command = [str(Path(sys.executable).with_name("ray")), *NODE]
    address = f"127.0.0.1:{free_port()}"
    environment = clean_environment() | ENVIRONMENT
    head = [*HEAD, "--port", address.split(":")[1], "--temp-dir", str(temporary)]
    nodes = []
    for words in (head, ["--address", address]):
        nodes.append(
            subprocess.Popen(
                [*command, *words, "--block"],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        )
        deadline = time.time() + 60
        while words is head and time.time() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", int(address.split(":")[1]))) == 0:
                    break
            time.sleep(0.2)
    import ray

    handler = signal.getsignal(signal.SIGTERM)
    os.environ["PYTHONPATH"] = clean_environment()["PYTHONPATH"]
    ray.init(address=address, log_to_driver=False, configure_logging=False)
    deadline = time.time() + 60
    while len(ray.nodes()) < 2 and time.time() < deadline:
        time.sleep(0.2)
    assert len(ray.nodes()) == 2 and ray.cluster_resources()["CPU"] == 2
    yield address
    ray.shutdown()
    signal.signal(signal.SIGTERM, handler)  # ray puts its own in place
    for node in nodes:
        os.killpg(node.pid, signal.SIGKILL)
        node.wait()
    for process in psutil.process_iter(["cmdline"]):
        if str(temporary) in " ".join(process.info["cmdline"] or []):
            process.kill()


def make_shards(folder: Path, shards: int, each: int) -> Path:
    for shard in range(shards):
        members = []
        for i in range(shard * each, (shard + 1) * each):
            members += [
                (f"{i:04d}.jpg", jpeg(i)),
                (f"{i:04d}.json", json.dumps({"url": f"http://a.com/{i}.jpg"}).encode()),
            ]
        write_tar(folder / f"{shard:05d}.tar", members)
    return folder


def records(folder) -> dict[str, dict]:
    return {
        sample["key"]: json.loads(sample["json"])
        for shard in sorted(Path(folder).glob("*.tar"))
        for sample in read_shard(str(shard))
    }


def test_join_gives_what_it_gives_without_ray(cluster, tmp_path):
    shards = make_shards(tmp_path / "in", 6, 5)
    with (tmp_path / "c.csv").open("w", newline="") as file:
        csv.writer(file).writerows(
            [("Image Path", "longSV_captions"), *((f"http://a.com/{i}.jpg", f"Long {i}. Two.") for i in range(30))]
        )
    manifests = [
        join_captions(str(tmp_path / "c.csv"), str(shards), tmp_path / name, ray=address)
        for name, address in (("ray", cluster), ("here", ""))
    ]
    assert manifests[0] == manifests[1]
    assert {path.name: path.read_bytes() for path in (tmp_path / "ray").glob("*.tar")} == {
        path.name: path.read_bytes() for path in (tmp_path / "here").glob("*.tar")
    }


def test_recaption_survives_a_killed_worker(cluster, tmp_path, capsys, monkeypatch):
    """The worker that has just written answers is killed; its shard is done by another, which asks for none of them
    again. What is done is counted in images as they come.
    """
    monkeypatch.setattr(progress_line, "_style", "json")
    monkeypatch.setattr(progress_line, "_JSON_SECONDS", 0.0)
    shards = make_shards(tmp_path / "in", 4, 6)

    def slowly(attempt, image):
        time.sleep(0.2)
        return "ok"

    killed = []

    def kill_a_worker():
        journals = tmp_path / "out" / ".recaption"
        while not killed:
            time.sleep(0.05)
            written = {str(path) for path in journals.glob("*.jsonl") if path.read_text().count("\n") >= 2}
            for process in psutil.process_iter(["cmdline"]) if written else ():
                with contextlib.suppress(psutil.Error):  # it has just ended
                    if "ray::run" in " ".join(process.info["cmdline"] or []) and written & {
                        file.path for file in process.open_files()
                    }:
                        process.kill()
                        killed.append(process.pid)
                        return

    with ChatServer(slowly) as server:
        killer = threading.Thread(target=kill_a_worker, daemon=True)
        killer.start()
        counts = recaption_shards(
            RecaptionOptions(
                str(shards),
                str(tmp_path / "out"),
                model="served",
                endpoint=server.url,
                name="X",
                batch_size=1,
                timeout=20.0,
                ray=cluster,
            )
        )
        killer.join(timeout=5)
    assert killed and counts["shards done"] == 4
    told = [json.loads(line) for line in capsys.readouterr().err.splitlines() if line.startswith("{")]
    done = [line["done"] for line in told]
    assert done == sorted(done) and done[-1] == 24 and {line["total"] for line in told} == {24}
    assert any(number % 6 for number in done), "between whole shards too"
    found = records(tmp_path / "out")
    assert len(found) == 24 and all("longX_captions" in record for record in found.values())
    assert counts["kept from before"] >= 2  # the dead worker's
    assert sum(times - 1 for times in server.asked.values()) <= 2  # at most the two questions that were under way
