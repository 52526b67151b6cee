"""img2dataset itself, in an environment of its own, downloads what ``prepare urls`` wrote (docs/data.md)."""

import csv
import json
import subprocess
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
from shard_files import jpeg, tokenize
from tiny import clean_environment

from dreamlip_train import cli
from dreamlip_train.captions.columns import caption_pool
from dreamlip_train.config.schema import DataConfig
from dreamlip_train.data.loader import train_loader
from dreamlip_train.data.shards.shards import read_shard, record_of

COLUMNS = ["raw_caption", "shortSV_captions", "longSV_captions"]


@pytest.fixture
def served(tmp_path):
    """The URL of a folder of twelve pictures."""
    for i in range(12):
        (tmp_path / "www").mkdir(exist_ok=True)
        (tmp_path / "www" / f"{i}.jpg").write_bytes(jpeg(i, 300))

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(tmp_path / "www"))

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_from_urls_to_training_batches(tmp_path, served, capsys):
    environment = tmp_path / "img2dataset-venv"
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    subprocess.run([environment / "bin" / "pip", "install", "-q", "img2dataset"], check=True, env=clean_environment())
    with (tmp_path / "c.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["Image Path", *COLUMNS])
        for i in range(14):  # two of them are gone
            writer.writerow([f"{served}/{i}.jpg", f"raw {i}", f"short, {i}", f'A "dog" {i}.\nIt runs, fast.'])
    cli.main(["prepare", "urls", str(tmp_path / "c.csv"), "--output", str(tmp_path / "urls.parquet")])
    (said,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("img2dataset: ")]
    columns = said.split("'")[1]
    assert json.loads(columns) == COLUMNS
    words = "--input_format parquet --url_col url --output_format webdataset --image_size 256 --resize_mode keep_ratio"
    words += " --resize_only_if_bigger True --processes_count 1 --thread_count 4 --number_sample_per_shard 7"
    words += f" --url_list {tmp_path}/urls.parquet --output_folder {tmp_path}/shards"
    command = [environment / "bin" / "img2dataset", *words.split(), "--save_additional_columns", columns]
    subprocess.run(command, check=True, env=clean_environment(), timeout=300)
    with pytest.raises(SystemExit) as ended:
        cli.main(["prepare", "validate", str(tmp_path / "shards")])
    assert ended.value.code == 0, capsys.readouterr().out
    records = [record_of(s) for tar in sorted((tmp_path / "shards").glob("*.tar")) for s in read_shard(str(tar))]
    assert sorted(record["raw_caption"] for record in records) == sorted(f"raw {i}" for i in range(12))
    pool = [piece.text for piece in caption_pool(records[0]) if piece.source == "longSV_captions"]
    assert len(pool) == 2 and pool[1] == "It runs, fast."
    config = DataConfig(shards=str(tmp_path / "shards"), num_workers=0, shuffle_buffer=4)
    loader = train_loader(config, image_size=32, tokenize=tokenize, batch_size=6)
    assert sum(len(batch["keys"]) for batch in loader.epoch(0)) == 12 and loader.bad.total == 0
