"""The training loader: whole epochs, exact resume, disjoint ranks, and every bad sample counted by name."""

import itertools
import multiprocessing
import os
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from shard_files import jpeg, keys, loader, same, sample, tokenize, write_index, write_shards, write_tar

from dreamlip_train.config.schema import DataConfig
from dreamlip_train.data.validation import val_samples
from dreamlip_train.training.prefetch import prefetched


def test_batches_are_as_described(tmp_path):
    batches = list(loader(write_shards(tmp_path, [20, 20])).epoch(0))
    assert len(batches) == 5
    batch = batches[0]
    assert set(batch) == {"images", "text", "text_mask", "cut", "keys", "shards"}
    assert {os.path.basename(shard) for shard in batch["shards"]} <= {"00000.tar", "00001.tar"}
    assert batch["images"].shape == (8, 3, 16, 16) and batch["images"].dtype == torch.uint8
    assert batch["text"].shape == (8, 3, 12) and batch["text"].dtype == torch.int64
    assert batch["text_mask"].all() and batch["text_mask"].dtype == torch.bool


def test_an_epoch_has_every_sample_once(tmp_path):
    write_shards(tmp_path, [20, 20, 24])
    for workers in (0, 1):
        found = keys(loader(tmp_path, workers=workers).epoch(0))
        assert sorted(found) == [f"{i:06d}" for i in range(64)]


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_resume_is_exact_after_any_number_of_batches(tmp_path, workers):
    made = loader(write_shards(tmp_path, [20, 31, 17, 26, 9]), workers=workers)
    whole = list(made.epoch(2))
    assert len(whole) == made.steps_per_epoch >= 11
    for start in (1, 4, 7, len(whole) - 1, len(whole)):
        rest = list(made.epoch(2, made.after(start)))
        assert len(rest) == len(whole) - start
        assert all(same(a, b) for a, b in zip(whole[start:], rest, strict=True)), f"workers {workers}, start {start}"


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_is_exact_with_bad_samples_on_the_way(tmp_path, workers):
    """Skipping does not decode, so what was found broken before the stop comes from the quarantine file."""
    write_shards(tmp_path, [24, 24, 24])
    for shard in range(3):
        members = [
            m
            for i in range(24)
            for m in (
                sample(f"{shard}{i:03d}", i)
                if i % 5
                else [(f"{shard}{i:03d}.jpg", b"\xff\xd8 no"), (f"{shard}{i:03d}.json", b"{}")]
            )
        ]
        write_tar(tmp_path / f"{shard:05d}.tar", members)
    quarantine = tmp_path / "quarantine.jsonl"
    options = dict(workers=workers, quarantine=quarantine, max_bad_fraction=1.0)
    whole = list(loader(tmp_path, **options).epoch(0))
    assert quarantine.exists()
    for start in (1, 3, 6):
        made = loader(tmp_path, **options)
        rest = list(made.epoch(0, made.after(start)))
        assert all(same(a, b) for a, b in zip(whole[start:], rest, strict=True)), start


def test_epochs_and_seeds_differ_and_repeat(tmp_path):
    write_shards(tmp_path, [20, 20])
    orders = {
        (seed, epoch): tuple(keys(loader(tmp_path, seed=seed).epoch(epoch))) for seed in (0, 1) for epoch in (0, 1)
    }
    assert len(set(orders.values())) == 4
    assert orders[0, 1] == tuple(keys(loader(tmp_path).epoch(1)))
    first, second = next(loader(tmp_path).epoch(0)), next(loader(tmp_path).epoch(0))
    assert same(first, second)


@pytest.mark.parametrize("world_size, workers", [(2, 0), (2, 1), (3, 1)])
def test_ranks_are_disjoint_and_complete(tmp_path, world_size, workers):
    write_shards(tmp_path, [16] * 6)
    per_rank = [loader(tmp_path, rank=r, world_size=world_size, workers=workers) for r in range(world_size)]
    assert len({made.steps_per_epoch for made in per_rank}) == 1
    found = [key for made in per_rank for key in keys(made.epoch(0))]
    assert sorted(found) == [f"{i:06d}" for i in range(96)]


def test_ranks_take_the_same_number_of_steps_in_every_epoch(tmp_path):
    """A rank that stopped early would leave the others waiting in a collective."""
    write_shards(tmp_path, [9, 40, 12, 33, 8, 8, 21])
    per_rank = [loader(tmp_path, rank=r, world_size=3) for r in range(3)]
    steps = per_rank[0].steps_per_epoch
    for epoch in range(12):
        assert [len(list(made.epoch(epoch))) for made in per_rank] == [steps] * 3


def test_nothing_but_the_remainder_is_left_out(tmp_path):
    """Shards of unequal size, readers that share one: an epoch is floor(samples / global batch) steps on every rank,
    no sample twice.
    """
    counts = [9, 40, 12, 33, 8, 8, 21]
    write_shards(tmp_path, counts)
    for world_size, workers in ((1, 2), (2, 3), (3, 1)):
        per_rank = [
            loader(tmp_path, rank=r, world_size=world_size, workers=workers, batch_size=4) for r in range(world_size)
        ]
        found = [key for made in per_rank for key in keys(made.epoch(3))]
        assert len(found) == len(set(found)) == sum(counts) // (4 * world_size) * 4 * world_size


@pytest.mark.parametrize("workers", [0, 2])
def test_other_readers_go_on_with_the_samples_nobody_has_read(tmp_path, workers):
    """Two changes of ranks and workers in one epoch, the global batch staying 12."""
    counts = [9, 40, 12, 33, 8, 8, 21]
    write_shards(tmp_path, counts)
    found, past = [], []
    for ranks, workers_now, steps in ((3, 1, 3), (2, workers, 4), (1, 3, None)):
        per_rank = [
            loader(tmp_path, rank=r, world_size=ranks, workers=workers_now, batch_size=12 // ranks)
            for r in range(ranks)
        ]
        for made in per_rank:
            found += keys(itertools.islice(made.epoch(1, past), steps))
        past += per_rank[0].after(steps or 0)
    assert len(found) == len(set(found)) == sum(counts) // 12 * 12


@pytest.fixture
def stuck(tmp_path):
    """Two shards behind a server; the second opens, and never gives a byte."""
    write_shards(tmp_path, [16, 16])
    over = threading.Event()

    class Handler(SimpleHTTPRequestHandler):
        def do_GET(self):
            if self.path == "/00001.tar":
                over.wait(60)
            else:
                super().do_GET()

        def log_message(self, *_):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(tmp_path)))
    threading.Thread(target=http.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{http.server_port}/{{00000..00001}}.tar"
    over.set()
    http.shutdown()


def test_a_stuck_reader_is_named_with_its_shard(stuck):
    made = loader(stuck, workers=2, stall_seconds=2)
    with pytest.raises(
        RuntimeError,
        match=r"data.stall_seconds: no batch for 2 s: worker \d has read nothing from .*00001.tar for \d+ s",
    ):
        list(made.epoch(0))
    deadline = time.time() + 20
    while multiprocessing.active_children() and time.time() < deadline:
        time.sleep(0.1)
    assert (
        not multiprocessing.active_children()
    )  # or the training process would wait for the stuck worker when it exits


def test_who_waits_for_a_stuck_reader_can_leave(stuck):
    """A signal ends a run although another thread waits for the next batch, for ever as far as anybody knows."""
    made = loader(stuck, workers=2, stall_seconds=0)
    threading.Timer(1.0, made.leave).start()
    began = time.time()
    assert len(list(prefetched(made.epoch(0), lambda batch: batch, torch.device("cpu")))) <= 1
    assert time.time() - began < 20


def test_missing_captions_are_masked_slots_never_repeats(tmp_path):
    write_tar(tmp_path / "00000.tar", [m for i in range(8) for m in sample(f"{i}", i, raw_caption="only one")])
    write_index(tmp_path, [8])
    (batch,) = loader(tmp_path).epoch(0)
    assert batch["text_mask"].tolist() == [[True, False, False]] * 8
    assert torch.equal(batch["text"][0, 1:], tokenize(["", ""])[0])


def test_txt_alone_is_a_raw_caption(tmp_path):
    write_tar(tmp_path / "00000.tar", [m for i in range(8) for m in ((f"{i}.jpg", jpeg(i)), (f"{i}.txt", b"a dog"))])
    write_index(tmp_path, [8])
    (batch,) = loader(tmp_path).epoch(0)
    assert torch.equal(batch["text"][0, 0], tokenize(["a dog"])[0][0])


def test_captions_that_are_cut_are_counted(tmp_path):
    write_tar(
        tmp_path / "00000.tar",
        [m for i in range(8) for m in sample(f"{i}", i, raw_caption="thirteen char", shortSV_captions="twelve chars")],
    )
    write_index(tmp_path, [8])
    (batch,) = loader(tmp_path).epoch(0)
    assert batch["cut"] == 8


def test_impossible_splits_name_the_field(tmp_path):
    write_shards(tmp_path, [8])
    with pytest.raises(
        ValueError, match="data.num_workers: 1 shards for 2 ranks x 1 workers = 2 readers; use --data.num-workers 1"
    ):
        loader(tmp_path, world_size=2)
    with pytest.raises(ValueError, match="data.num_workers: 1 shards for 1 ranks x 2 workers = 2 readers"):
        loader(tmp_path, workers=2)
    with pytest.raises(ValueError, match="train.global_batch_size: 9 images per step, but 1 shards have 8 samples"):
        loader(tmp_path, batch_size=9)


def test_held_out_samples(tmp_path):
    members = [
        *sample("0", 0, raw_caption="web text", longIB_captions="From IB. Two."),
        *sample("1", 1, longSV_captions=["listed one", "listed two"], longIB_captions="From IB."),
        ("2.jpg", b"broken"),
        ("2.json", b"{}"),
        *sample("3", 3, raw_caption="no long caption"),
    ]
    write_tar(tmp_path / "00000.tar", members)
    config = DataConfig(val_shards=str(tmp_path))
    found = list(val_samples(config, image_size=16))
    assert [(s["key"], s["sentences"], s["raw"]) for s in found] == [
        ("0", ["From IB.", "Two."], "web text"),
        ("1", ["listed one", "listed two"], None),
        ("3", [], "no long caption"),
    ]
    assert found[0]["image"].shape == (3, 16, 16) and found[0]["mask"] is None
    assert [s["key"] for s in val_samples(config, image_size=16, max_samples=2)] == ["0", "1"]
    with pytest.raises(ValueError, match="data.val_shards"):
        list(val_samples(DataConfig(), image_size=16))


def mixed(tmp_path, **options):
    for name, counts in (("big", [40, 30, 34]), ("small", [9, 7])):
        if not (tmp_path / name).exists():
            write_shards(tmp_path / name, counts)
    sets = {name: str(tmp_path / name) for name in ("small", "big")}
    return loader("", **({"mixture": sets, "batch_size": 8} | options))


@pytest.mark.parametrize(("workers", "proportions"), [(0, {}), (2, {"big": 1.0, "small": 1.0})])
def test_a_mixture_resumes_exactly_and_every_step_has_all_sets(tmp_path, workers, proportions):
    made = mixed(tmp_path, workers=workers, proportions=proportions)
    assert made.steps_per_epoch == 15 and "120 samples (big 104, small 16)" in made.fingerprint
    whole = list(made.epoch(1))
    for start in (1, 6, 14):
        rest = list(mixed(tmp_path, workers=workers, proportions=proportions).epoch(1, made.after(start)))
        assert len(rest) == 15 - start and all(same(a, b) for a, b in zip(whole[start:], rest, strict=True)), start
    small = [sum("/small/" in shard for shard in batch["shards"]) for batch in whole]
    assert set(small) == ({4} if proportions else {1, 2})
    drawn = made.drawn(1, 15)
    if proportions:
        assert drawn == {"draws": {"big": 120, "small": 120}, "set_epochs": {"big": 120 / 104, "small": 7.5}}
    assert made.fingerprint != mixed(tmp_path, mixture={"big": str(tmp_path / "small")}).fingerprint


def test_a_set_with_bad_samples_at_the_end_of_a_pass_goes_on(tmp_path):
    """A mixture cuts a set where a pass ends; a cut of a few bad samples must not end the run."""
    (tmp_path / "small").mkdir(parents=True)
    bad = [m for i in range(3) for m in [(f"s{i}.jpg", b"\xff\xd8 no"), (f"s{i}.json", b"{}")]]
    write_tar(tmp_path / "small/00000.tar", [*sample("s9", 9), *bad])
    write_index(tmp_path / "small", [4])
    options = dict(proportions={"big": 1.0, "small": 1.0}, max_bad_fraction=1.0, quarantine=tmp_path / "q.jsonl")
    whole = [batch for epoch in (0, 1) for batch in mixed(tmp_path, **options).epoch(epoch)]
    assert all(sum(key == "s9" for key in batch["keys"]) == 4 for batch in whole)
    made = mixed(tmp_path, **options)
    rest = list(made.epoch(1, made.after(5)))
    assert all(same(a, b) for a, b in zip(whole[len(whole) // 2 + 5 :], rest, strict=True))
    write_tar(tmp_path / "small/00000.tar", bad)
    with pytest.raises(RuntimeError, match="data.mixture: small: no usable sample in"):
        list(mixed(tmp_path, **options | {"quarantine": None}).epoch(0))


def test_wrong_mixtures_are_named(tmp_path):
    mixed(tmp_path)
    with pytest.raises(ValueError, match=r"data.mixture: '.*/small/00000.tar' is in two sets"):
        mixed(tmp_path, mixture={"a": str(tmp_path / "small"), "b": f"{tmp_path}/small/00000.tar"})
    with pytest.raises(ValueError, match=r"data.mixture.b: '.*none' matches no shard"):
        mixed(tmp_path, mixture={"a": str(tmp_path / "small"), "b": str(tmp_path / "none")})
