"""What is measured about sparse products: the file it is kept in, and the choice that follows."""

from __future__ import annotations

import json
import logging
import math
import threading
from pathlib import Path

import fake_cusparselt as fakes
import pytest
import torch
from fake_cusparselt import check, fake_library, make  # noqa: F401

from ds_efficient.errors import OpBuildError, UserError
from ds_efficient.ops import cusparselt as face
from ds_efficient.ops import cusparselt_cache as caches
from ds_efficient.ops import cusparselt_plans as plans
from ds_efficient.ops import cusparselt_tuning as tuning
from ds_efficient.ops.cusparselt_cache import TuningCache

# Kept measurements


def test_cache_file_round_trip_and_merge(tmp_path):
    path = tmp_path / "deep" / "file.json"
    first, second = TuningCache(path), TuningCache(path)
    assert first.get("a") is None and second.get("a") is None
    first.put({"a": {"x": 1}})
    second.put({"b": {"x": 2}})
    third = TuningCache(path)
    assert third.get("a") == {"x": 1} and third.get("b") == {"x": 2}
    assert json.loads(path.read_text())["format"] == caches.FORMAT
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["file.json", "file.json.lock"]


def test_concurrent_writers_lose_nothing(tmp_path):
    path = tmp_path / "file.json"

    def write(writer):
        own = TuningCache(path)
        for number in range(10):
            own.put({f"{writer}.{number}": {"x": number}})

    threads = [threading.Thread(target=write, args=(writer,)) for writer in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(json.loads(path.read_text())["entries"]) == 40


@pytest.mark.parametrize("content", [
    b"", b"{", b"[1]", b'{"format": 99, "entries": {}}', b'{"format": 1, "entries": {"a": 3}}', b"\xff\xfe",
])  # fmt: skip
def test_unreadable_cache_file_is_left_alone_with_one_warning(tmp_path, content, caplog):
    path = tmp_path / "file.json"
    path.write_bytes(content)
    own = TuningCache(path)
    assert own.get("a") is None
    own.put({"a": {"x": 1}})
    own.put({"b": {"x": 1}})
    assert own.get("a") == {"x": 1}, "still kept in memory"
    assert path.read_bytes() == content
    assert len(caplog.records) == 1 and str(path) in caplog.text and caches.VARIABLE in caplog.text


def test_unwritable_cache_file_costs_one_warning(tmp_path, caplog):
    (tmp_path / "file").touch()
    own = TuningCache(tmp_path / "file" / "below.json")
    own.put({"a": {"x": 1}})
    own.put({"b": {"x": 1}})
    assert own.get("b") == {"x": 1} and len(caplog.records) == 1


def test_cache_path_follows_the_variables(monkeypatch, tmp_path):
    monkeypatch.delenv(caches.VARIABLE, raising=False)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert caches.cache_path() == tmp_path / "ds_efficient" / "cusparselt_tuning.json"
    monkeypatch.setenv(caches.VARIABLE, str(tmp_path / "mine.json"))
    assert caches.cache_path() == Path(tmp_path / "mine.json")


def test_nonsense_in_entries_counts_as_nothing_known(fake):
    operand, _ = make(32, 64)
    shape = operand.layout.tile_shape(16)
    key = caches.choice_key(32, 64, 16, torch.bfloat16, 0)
    caches.cache.put({caches.algorithm_key(shape): {"config_id": "x"}, key: {"tiles": None}})
    assert caches.kept_algorithm(shape) is None and caches.kept_choice(key) is None


# Choice


def test_tiles_and_splits_worth_trying():
    assert tuning.tile_counts(1024, 4096) == [1] and tuning.tile_counts(1024, 1024) == [1]
    assert tuning.tile_counts(4096, 1024) == [1, 2, 4]
    assert tuning.tile_counts(14336, 4096) == [1, 2, 4]
    assert tuning.tile_counts(48, 32) == [1], "halves of 24 rows are no multiple of 16"
    assert tuning.token_splits(8192) == [1, 2, 4]
    assert tuning.token_splits(16) == [1] and tuning.token_splits(20) == [1, 2]
    assert tuning.token_splits(48) == [1]


def candidate(tiles, splits, milliseconds):
    shape = plans.PlanShape(0, torch.bfloat16, 64, 32, 64, 16)
    return tuning.Candidate(tiles, splits, milliseconds, shape, None)


def test_plainer_way_wins_unless_another_is_faster_by_a_margin():
    plain, split, tiled, both = (
        candidate(1, 1, 1.0),
        candidate(1, 2, 0.97),
        candidate(2, 1, 0.93),
        candidate(2, 2, 0.915),
    )
    assert tuning.plainest([candidate(1, 2, 0.985), plain]) == plain
    assert tuning.plainest([plain, split]) == split
    assert tuning.plainest([plain, split, candidate(2, 1, 0.95)]) == split, "tiles must gain 6 %"
    assert tuning.plainest([plain, tiled]) == tiled
    assert tuning.plainest([plain, tiled, both]) == tiled
    assert tuning.plainest([candidate(1, 2, 1.0), candidate(2, 1, 1.0)]).tiles == 1


@pytest.mark.parametrize(("dense", "backend"), [(1.1, "cusparselt"), (1.0, "cusparselt"), (0.99, "dense")])
def test_slower_than_dense_means_dense(dense, backend):
    choice = tuning.decide(caches.Tuned(2, 1, 1.0, dense))
    assert choice.backend == backend and choice.tiles == 2 and math.isclose(choice.speedup, dense)


@pytest.fixture
def timed(fake, monkeypatch):
    """Times by number of tiles and token splits, and 2 ms for the dense product."""
    speeds: dict[tuple[int, int], float] = {}
    original = tuning.Bench.sparse_call

    def sparse_call(self, plan, operands, splits):
        call = original(self, plan, operands, splits)
        call.way = (operands[0].tiles, splits)
        return call

    def times(self, call, batches):
        call(0)
        return [speeds.get(getattr(call, "way", (0, 0)), 2.0)] * batches

    monkeypatch.setattr(tuning.Bench, "sparse_call", sparse_call)
    monkeypatch.setattr(tuning.Bench, "times", times)
    monkeypatch.setattr(tuning, "unavailable", lambda device: None)
    monkeypatch.setattr(tuning, "cache_bytes", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    return speeds


def tune(tokens=64):
    return face.tune(128, 32, tokens, torch.bfloat16, "cpu")


def test_tuning_measures_once_and_products_run_as_chosen(fake, timed, monkeypatch, caplog):
    timed.update({(1, 1): 1.0, (2, 1): 0.9, (4, 1): 0.5, (4, 2): 0.4})
    state = torch.get_rng_state()
    with caplog.at_level(logging.INFO):
        choice = tune()
    assert torch.equal(state, torch.get_rng_state())
    assert choice == ("cusparselt", 4, 2, 5.0, 0.4, 2.0)
    assert len([record for record in caplog.records if record.levelno == logging.INFO]) == 1
    assert "128x32, 64 tokens, bfloat16: sparse 0.4000 ms (algorithm 7/2/1/1, tiles 4, token splits 2)" in (
        caplog.text
    )
    searches = fake.calls["cusparseLtMatmulSearch"]
    assert searches == 5, "three tilings, then two more splits of the best"

    for _ in range(2):
        assert tune() == choice and tune(50) == choice
        operand, pattern = make(128, 32, tiles=4)
        before = fake.calls["cusparseLtMatmul"]
        check(operand, pattern, 64)
        assert fake.calls["cusparseLtMatmul"] - before == 8
        fakes.restart(monkeypatch)
    assert fake.calls["cusparseLtMatmulSearch"] == searches


def test_tuning_again_when_the_library_does_not_know_the_algorithm(fake, timed, monkeypatch):
    timed[1, 1] = 1.0
    tune()
    fakes.restart(monkeypatch)
    entries = json.loads(caches.cache._path.read_text())
    for entry in entries["entries"].values():
        if "config_id" in entry:
            entry["config_id"] = 99
    caches.cache._path.write_text(json.dumps(entries))
    searches = fake.calls["cusparseLtMatmulSearch"]
    assert tune().backend == "cusparselt"
    assert fake.calls["cusparseLtMatmulSearch"] > searches


def test_tuning_leaves_out_ways_that_fail_or_are_wrong(fake, timed, monkeypatch):
    timed.update({(1, 1): 1.0, (2, 1): 0.1, (4, 1): 0.1})
    run = fake.cusparseLtMatmul.run

    def wrong_in_tiles(*arguments):
        run(*arguments)
        result = fake.described[arguments[1]][0][3]
        if result[0] == 64:
            fakes.matrix(arguments[7], *result).zero_()

    monkeypatch.setattr(fake.cusparseLtMatmul, "run", wrong_in_tiles)

    def refuse_32_rows(handle, address, rows, *rest):
        return fakes.NOT_SUPPORTED if rows == 32 and rest[1] == 128 else 0

    fake.fail["cusparseLtDenseDescriptorInit"] = refuse_32_rows
    assert tune()[:4] == ("cusparselt", 1, 1, 2.0)


def test_tuning_with_nothing_that_works_is_dense_and_not_kept(fake, timed):
    tuning.find_layout(128, 32, torch.bfloat16, torch.device("cpu"), 1)
    fake.fail["cusparseLtMatmulPlanInit"] = fakes.NOT_SUPPORTED
    assert tune()[0] == "dense"
    del fake.fail["cusparseLtMatmulPlanInit"]
    timed[1, 1] = 1.0
    assert tune()[0] == "cusparselt"


def test_tuning_refuses_what_cannot_run(fake, monkeypatch):
    with pytest.raises(OpBuildError, match=r'CUDA devices, not on .*"backend": "dense"'):
        tune()
    with pytest.raises(UserError, match="k=40"):
        face.tune(128, 40, 64, torch.bfloat16, "cuda")
    with pytest.raises(UserError, match="tokens=0"):
        tune(0)
