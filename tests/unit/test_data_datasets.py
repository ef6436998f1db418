"""Datasets from arguments: what is refused, what decides the order, caches on several nodes."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from pretraining.datasets import ParallelInfo, build_datasets, make_loader
from pretraining.indexed_file import open_indexed, token_dtype, write_index
from pretraining.tokenizers import ByteLevelTokenizer, NullTokenizer

from ds_efficient.errors import UserError

TOKENIZER = ByteLevelTokenizer()


@pytest.fixture(scope="module", autouse=True)
def one_rank(tmp_path_factory):
    """megatron-core's blends need a process group, with one rank too."""
    if dist.is_initialized():
        yield
        return
    store = tmp_path_factory.mktemp("store") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def write_dataset(prefix: Path, lengths: list[int], *, first: int = 0, sidecar: bool = True) -> str:
    """Documents of one repeated id each, so that a sample shows where it comes from."""
    dtype = token_dtype(TOKENIZER.vocab_size)
    with open(f"{prefix}.bin", "wb") as stream:
        for index, length in enumerate(lengths):
            ids = np.full(length, first + index % 50, dtype)
            ids[-1] = TOKENIZER.eod
            stream.write(ids.tobytes())
    with open(f"{prefix}.idx", "wb") as stream:
        write_index(stream, dtype, [np.array(lengths, np.int32)])
    if sidecar:
        facts = {"tokenizer": TOKENIZER.identity(), "max_token": TOKENIZER.eod}
        Path(f"{prefix}.json").write_text(json.dumps(facts))
    return str(prefix)


def arguments(**changes: Any) -> argparse.Namespace:
    values: dict[str, Any] = {
        "data_path": None,
        "train_data_path": None,
        "valid_data_path": None,
        "test_data_path": None,
        "split": None,
        "mock_data": False,
        "data_cache_path": None,
        "seq_length": 16,
        "seed": 1234,
        "reset_position_ids": False,
        "reset_attention_mask": False,
        "eod_mask_loss": False,
        "train_iters": 10,
        "eval_iters": 2,
        "global_batch_size": 4,
    }
    assert changes.keys() <= values.keys()
    return argparse.Namespace(**{**values, **changes})


def build(**changes: Any) -> Any:
    return build_datasets(arguments(**changes), TOKENIZER, ParallelInfo())


def refused(message: str, **changes: Any) -> None:
    with pytest.raises(UserError, match=message):
        build(**changes)


@pytest.fixture
def data(tmp_path):
    return write_dataset(tmp_path / "a", [40] * 100)


def test_samples_and_counts_follow_the_arguments(data):
    datasets = build(data_path=[data], split="90,10", eval_iters=3)
    assert len(datasets.train) >= 40 and len(datasets.valid) >= 12 and datasets.test is None
    sample = datasets.train[0]
    assert {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in sample.items()} == {
        "tokens": ((16,), torch.int64),
        "labels": ((16,), torch.int64),
        "loss_mask": ((16,), torch.float32),
        "position_ids": ((16,), torch.int64),
    }
    assert torch.equal(sample["tokens"][1:], sample["labels"][:-1])


def test_more_samples_than_one_epoch_are_there(data):
    datasets = build(data_path=[data], train_iters=1000, split="95,5")
    batches = make_loader(datasets.train, 3996, 4, 0, 1, 0)
    assert next(iter(batches))["tokens"].shape == (4, 16)


def test_no_split_for_which_no_samples_are_asked(data):
    datasets = build(data_path=[data], eval_iters=0, split="100,0,0")
    assert datasets.valid is None and datasets.test is None


def test_the_test_split_is_built_when_it_is_asked_for(data):
    assert len(build(data_path=[data], split="80,10,10").test) >= 8


def test_the_same_arguments_give_the_same_order_and_another_seed_another(data):
    def order(seed: int) -> list[list[int]]:
        train = build(data_path=[data], split="90,10", seed=seed).train
        return [train[index]["tokens"].tolist() for index in range(40)]

    first = order(1)
    assert first == order(1)
    assert first != order(2)


def test_identity_tells_what_changes_the_order(data):
    before = build(data_path=[data], split="90,10")
    assert before.changes_since(json.loads(json.dumps(before.identity))) == []
    (change,) = build(data_path=[data], split="90,10", train_iters=11).changes_since(before.identity)
    assert change == "num_samples: was [40, 8, 0], is [44, 8, 0]"


def test_weights_decide_the_shares_of_a_blend(tmp_path):
    one = write_dataset(tmp_path / "one", [50] * 60, first=0)
    other = write_dataset(tmp_path / "other", [50] * 60, first=100)
    train = build(data_path=["0.8", one, "0.2", other], train_iters=50, split="90,10").train
    from_other = sum(int(train[index]["tokens"][0] >= 100) for index in range(200))
    assert 35 <= from_other <= 45


def test_a_blend_without_weights_goes_by_size_and_has_samples_enough(tmp_path):
    large = write_dataset(tmp_path / "large", [50] * 90, first=0)
    small = write_dataset(tmp_path / "small", [50] * 30, first=100)
    train = build(data_path=[large, small], train_iters=400, eval_iters=0, split="100").train
    assert len(train) >= 1600
    from_small = sum(int(train[index]["tokens"][0] >= 100) for index in range(1600))
    assert 360 <= from_small <= 440


def test_separate_paths_for_each_split(tmp_path):
    train = write_dataset(tmp_path / "train", [40] * 20, first=0)
    valid = write_dataset(tmp_path / "valid", [40] * 20, first=100)
    datasets = build(train_data_path=[train], valid_data_path=[valid])
    assert all(int(datasets.valid[index]["tokens"].min()) >= 100 for index in range(8))
    assert datasets.test is None
    refused("no valid data: --valid-data-path is missing", train_data_path=[train])
    refused("only --data-path is split", train_data_path=[train], valid_data_path=[valid], split="9,1")


def test_masks_and_positions_restart_after_a_document(tmp_path):
    prefix = write_dataset(tmp_path / "a", [5] * 200)
    options = {"reset_position_ids": True, "reset_attention_mask": True, "eod_mask_loss": True}
    datasets = build(data_path=[prefix], split="90,10", **options)
    assert datasets.attention_mask
    sample = datasets.train[0]
    assert int(sample["position_ids"].max()) == 4
    ends = (sample["tokens"] == TOKENIZER.eod).nonzero().flatten()
    assert sample["loss_mask"][ends].sum() == 0 and sample["loss_mask"].sum() == 16 - len(ends)
    first = int(ends[0])
    assert sample["attention_mask"].shape == (1, 16, 16)
    assert bool(sample["attention_mask"][0, first + 1, first])  # True: cut off


def test_an_index_cache_is_not_used_for_data_that_changed(tmp_path, data):
    build(data_path=[data], split="90,10")
    write_dataset(tmp_path / "a", [80] * 50)
    datasets = build(data_path=[data], split="90,10")
    assert [len(datasets.train[index]["tokens"]) for index in range(40)] == [16] * 40
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_a_broken_off_cache_is_not_taken_for_a_finished_one(tmp_path, data):
    whole = build(data_path=[data], split="90,10").train[3]["tokens"]
    (folder,) = (tmp_path / "cache").iterdir()
    partial = folder.with_name(f".{folder.name}.99999")
    shutil.copytree(folder, partial)
    shutil.rmtree(folder)
    for path in partial.glob("*.npy"):
        path.write_bytes(path.read_bytes()[:-10])
    assert torch.equal(build(data_path=[data], split="90,10").train[3]["tokens"], whole)


def test_missing_data_names_both_files(tmp_path):
    refused(rf"looked for {tmp_path}/none.bin and {tmp_path}/none.idx", data_path=[str(tmp_path / "none")])


def test_a_path_with_suffix_gets_a_hint(data):
    refused("give the prefix, without .bin", data_path=[data + ".bin"])


@pytest.mark.parametrize(
    ("suffix", "keep", "message"),
    [
        (".bin", 0, "a.bin: has 0 bytes, the index asks for 8000"),
        (".bin", 7000, "a.bin: has 7000 bytes.*truncated"),
        (".idx", 0, "not an index"),
        (".idx", 500, "a.idx: has 500 bytes.*truncated"),
    ],
)
def test_truncated_files_are_named(data, suffix, keep, message):
    content = Path(data + suffix).read_bytes()
    Path(data + suffix).write_bytes(content[:keep])
    refused(message, data_path=[data])


def test_a_foreign_index_is_refused(data):
    Path(data + ".idx").write_bytes(b"x" * 100)
    refused("not an index of megatron-core", data_path=[data])


def test_another_vocabulary_is_refused_and_both_are_named(data):
    args = arguments(data_path=[data], split="90,10")
    with pytest.raises(UserError) as caught:
        build_datasets(args, NullTokenizer(500), ParallelInfo())
    assert "ByteLevelTokenizer of 257 ids" in str(caught.value)
    assert "NullTokenizer of 501 ids" in str(caught.value)


def test_ids_are_checked_where_there_is_no_sidecar(tmp_path, caplog):
    prefix = write_dataset(tmp_path / "a", [40] * 100, sidecar=False)
    args = arguments(data_path=[prefix], split="90,10")
    with pytest.raises(UserError, match="holds id 256, but the tokenizer in use is NullTokenizer of 101 ids"):
        build_datasets(args, NullTokenizer(100), ParallelInfo())
    assert "a.json is missing" in caplog.text
    assert build_datasets(args, NullTokenizer(400), ParallelInfo()).train is not None


def test_a_wrong_id_deep_in_the_data_is_found_when_it_is_read(data):
    sidecar = {"tokenizer": NullTokenizer(10).identity(), "max_token": 5}
    Path(data + ".json").write_text(json.dumps(sidecar))
    train = build_datasets(
        arguments(data_path=[data], split="90,10"), NullTokenizer(10), ParallelInfo()
    ).train
    with pytest.raises(UserError, match="the tokenizer has 11 ids"):
        [train[index] for index in range(40)]


def test_sequences_longer_than_the_data_name_the_numbers(data):
    refused(
        "train part has 3600 tokens in 90 of 100 documents.*takes 5001",
        data_path=[data],
        split="90,10",
        seq_length=5000,
    )
    refused(
        "valid part has 40 tokens in 1 of 100 documents.*takes 65",
        data_path=[data],
        split="99,1",
        seq_length=64,
    )


def test_a_split_that_gets_no_document_is_refused_instead_of_hanging(tmp_path):
    prefix = write_dataset(tmp_path / "a", [4000])
    refused("valid part has 0 tokens in 0 of 1 documents", data_path=[prefix], split="99,1")


def test_contradictions_are_refused(data):
    refused("no data", data_path=None)
    refused("--data-path and --mock-data: give one", data_path=[data], mock_data=True)
    refused("--data-path and --train/valid", data_path=[data], train_data_path=[data])
    refused("no valid data: the share in --split is 0", data_path=[data], split="1,0,0")
    refused("weights are malformed", data_path=["0.5", data, data])


def test_a_cache_that_cannot_be_written_is_named(tmp_path, data):
    (tmp_path / "file").touch()
    refused(
        "--data-cache-path", data_path=[data], split="90,10", data_cache_path=str(tmp_path / "file" / "x")
    )


def test_a_damaged_sidecar_is_named(data):
    Path(data + ".json").write_text("{")
    refused("a.json: cannot be read", data_path=[data])


def test_ranks_that_read_nothing_hold_no_dataset(data):
    datasets = build_datasets(
        arguments(data_path=[data], split="90,10"), TOKENIZER, ParallelInfo(tensor_parallel_rank=1)
    )
    assert datasets.train is None and datasets.valid is None
    assert datasets.identity == build(data_path=[data], split="90,10").identity


def test_synthetic_data_needs_no_files():
    datasets = build(mock_data=True, reset_attention_mask=True)
    assert (len(datasets.train), len(datasets.valid), len(datasets.test)) == (40, 8, 8)
    assert datasets.train[0]["attention_mask"].shape == (1, 16, 16)


def test_numbers_of_the_index(data):
    file = open_indexed(data)
    assert (file.num_tokens, file.num_documents, file.max_token()) == (4000, 100, 256)


NODES = """
import argparse, json, multiprocessing, os, sys
import torch, torch.distributed as dist
import megatron.core.datasets.gpt_dataset
sys.path[:0] = {paths!r}
from pretraining.datasets import ParallelInfo, batch_specs, broadcast_batch, build_datasets, make_loader
from pretraining.tokenizers import ByteLevelTokenizer
from ds_efficient.errors import UserError

def work(rank, folder, values):
    dist.init_process_group("gloo", init_method="file://" + folder + "/store", rank=rank, world_size=2)
    parallel = ParallelInfo(rank=rank, world_size=2, local_rank=0, tensor_parallel_rank=0)
    args = argparse.Namespace(**values, data_cache_path=folder + "/node" + str(rank))
    datasets = build_datasets(args, ByteLevelTokenizer(), parallel)
    loader = iter(make_loader(datasets.train, 0, 2, 0, 1, 0))
    specs = batch_specs(2, args.seq_length)
    own, sent = [], []
    for _ in range(5):
        batch = next(loader)
        own.append(batch["tokens"].tolist())
        got = broadcast_batch(batch if rank == 0 else None, dist.group.WORLD, 0, specs, torch.device("cpu"))
        sent.append([got[name].tolist() for name in specs])
    args.data_path = [args.data_path[1] if rank == 0 else folder + "/missing"]
    try:
        build_datasets(args, ByteLevelTokenizer(), parallel)
        error = None
    except UserError as found:
        error = str(found)
    with open(folder + "/result" + str(rank), "w") as stream:
        json.dump(dict(own=own, sent=sent, error=error), stream)
    dist.destroy_process_group()

if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, values = sys.argv[1], json.loads(sys.argv[2])
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=work, args=(rank, folder, values)) for rank in range(2)]
    for process in processes: process.start()
    for process in processes: process.join()
    sys.exit(max(process.exitcode for process in processes))
"""


@pytest.mark.distributed
def test_nodes_without_a_shared_file_system_get_the_cache_and_the_same_batches(tmp_path):
    one = write_dataset(tmp_path / "one", [50] * 60, first=0)
    other = write_dataset(tmp_path / "other", [50] * 60, first=100)
    values = vars(arguments(data_path=["3", one, "1", other], split="90,10"))
    del values["data_cache_path"]
    script = tmp_path / "nodes.py"
    script.write_text(NODES.format(paths=[path for path in sys.path if path]))
    command = [sys.executable, str(script), str(tmp_path), json.dumps(values)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"result{rank}").read_text()) for rank in range(2))
    assert first["own"] == second["own"]
    assert first["sent"] == second["sent"]
    assert [batch[0] for batch in second["sent"]] == first["own"]
    # One rank's missing data stops both, with its message.
    assert first["error"] == second["error"] and "/missing" in first["error"]
    caches = [sorted(path.name for path in (tmp_path / f"node{rank}").rglob("*.npy")) for rank in range(2)]
    assert caches[0] == caches[1] != []
