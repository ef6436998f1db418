"""Order of samples, synthetic data, broadcast layout: independent of ranks and loader processes."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pretraining.blend import parse_blend, parse_split
from pretraining.broadcast import batch_specs, broadcast_batch
from pretraining.sampler import PretrainingSampler, make_loader
from pretraining.synthetic import SyntheticDataset

from ds_efficient.errors import UserError


def sampler(rank: int, size: int, micro: int, consumed: int = 0, samples: int = 1000) -> PretrainingSampler:
    return PretrainingSampler(
        samples,
        consumed_samples=consumed,
        micro_batch_size=micro,
        data_parallel_rank=rank,
        data_parallel_size=size,
    )


def synthetic(samples: int = 64, seed: int = 1) -> SyntheticDataset:
    return SyntheticDataset(samples, seq_length=8, vocab_size=50, seed=seed, split=0)


@given(
    size=st.integers(1, 6),
    micro=st.integers(1, 4),
    accumulation=st.integers(1, 3),
    step=st.integers(0, 4),
)
@settings(deadline=None, max_examples=100)
def test_a_step_uses_the_same_samples_at_every_data_parallel_size(size, micro, accumulation, step):
    batch = size * micro * accumulation
    used = []
    for rank in range(size):
        lists = list(sampler(rank, size, micro, consumed=step * batch))[:accumulation]
        assert all(len(indices) == micro for indices in lists)
        used += [index for indices in lists for index in indices]
    assert sorted(used) == list(range(step * batch, (step + 1) * batch))


@given(size=st.integers(1, 4), micro=st.integers(1, 3), steps=st.integers(0, 5))
@settings(deadline=None, max_examples=50)
def test_resuming_by_consumed_samples_goes_on_where_it_was(size, micro, steps):
    for rank in range(size):
        whole = list(sampler(rank, size, micro))
        assert list(sampler(rank, size, micro, consumed=steps * size * micro)) == whole[steps:]


def stream(num_workers: int, consumed: int = 0) -> list[dict[str, torch.Tensor]]:
    loader = make_loader(synthetic(), consumed, 2, 1, 2, num_workers)
    batches = iter(loader)
    return [next(batches) for _ in range(len(loader))]


def test_loader_processes_give_the_same_batches():
    alone, several = stream(0), stream(2)
    assert len(alone) == len(several) == 16
    for one, other in zip(alone, several, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_loader_resumes_and_draws_nothing_from_the_global_generator():
    state = torch.get_rng_state()
    whole, rest = stream(0), stream(0, consumed=40)
    assert torch.equal(whole[10]["tokens"], rest[0]["tokens"])
    assert len(rest) == 6
    assert torch.equal(state, torch.get_rng_state())


def test_used_up_data_is_an_error_and_never_starts_again():
    batches = iter(make_loader(synthetic(4), 0, 2, 0, 1, 0))
    next(batches), next(batches)
    with pytest.raises(UserError, match="the dataset has 4 samples"):
        next(batches)
    with pytest.raises(UserError, match="4 are consumed"):
        make_loader(synthetic(4), 4, 2, 0, 1, 0)


class Failing(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        raise UserError(f"sample {index}: bad")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_users_error_in_a_loader_process_stays_one_message(num_workers):
    with pytest.raises(UserError) as caught:
        next(iter(make_loader(Failing(), 0, 1, 0, 1, num_workers)))
    assert str(caught.value) == "sample 0: bad"


def test_a_loader_process_outlives_signals_to_all():
    before = set(multiprocessing.active_children())
    batches = iter(make_loader(synthetic(), 0, 2, 0, 1, 1))
    next(batches)
    (worker,) = set(multiprocessing.active_children()) - before
    for name in ("-TERM", "-INT"):
        subprocess.run(["kill", name, str(worker.pid)], check=True)
    next(batches), next(batches), next(batches)
    assert worker.is_alive()


def test_an_error_with_loader_processes_ends_the_program():
    code = """
from pretraining.sampler import make_loader
from pretraining.synthetic import SyntheticDataset
batches = iter(make_loader(SyntheticDataset(64, seq_length=8, vocab_size=50, seed=1, split=0), 0, 2, 0, 1, 1))
next(batches)
raise RuntimeError("a bug in the training step")
"""
    paths = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 1 and "a bug in the training step" in done.stderr


def test_synthetic_samples_depend_on_seed_split_and_index_alone():
    first, again, other = synthetic(), synthetic(), synthetic(seed=2)
    for index in (5, 0, 63):
        assert torch.equal(first[index]["tokens"], again[index]["tokens"])
    assert not torch.equal(first[0]["tokens"], other[0]["tokens"])
    assert not torch.equal(first[0]["tokens"], first[1]["tokens"])
    sample = first[3]
    assert torch.equal(sample["tokens"][1:], sample["labels"][:-1])
    assert 0 <= int(sample["tokens"].min()) and int(sample["tokens"].max()) < 50
    with pytest.raises(IndexError):
        first[64]


def test_a_batch_alone_is_moved_unchanged():
    batch = {name: torch.ones(shape).to(dtype) for name, (shape, dtype) in batch_specs(3, 5).items()}
    batch["tokens"] = torch.arange(15).view(3, 5)
    result = broadcast_batch(
        {**batch, "dataset_id": torch.zeros(3)}, None, 0, batch_specs(3, 5), torch.device("cpu")
    )
    assert result.keys() == batch.keys()
    assert all(torch.equal(result[name], batch[name]) for name in batch)


@pytest.mark.parametrize("wrong", [None, torch.zeros(2, 5, dtype=torch.int64), torch.zeros(3, 5)])
def test_a_batch_of_another_shape_or_dtype_is_refused(wrong):
    specs = batch_specs(3, 5, attention_mask=True)
    batch = {name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in specs.items()}
    if wrong is None:
        del batch["labels"]
    else:
        batch["labels"] = wrong
    with pytest.raises(ValueError, match="batch\\['labels'\\]"):
        broadcast_batch(batch, None, 0, specs, torch.device("cpu"))


def test_blends_with_and_without_weights():
    assert parse_blend(None, "--data-path") is None
    plain = parse_blend(["/a", "/b"], "--data-path")
    assert plain is not None and plain.prefixes == ("/a", "/b") and plain.weights is None
    weighed = parse_blend(["0.7", "/a", "30", "/b"], "--data-path")
    assert weighed is not None and weighed.prefixes == ("/a", "/b") and weighed.weights == (0.7, 30.0)


@pytest.mark.parametrize(
    "values", [["0.7", "/a", "/b"], ["0.7", "0.3"], ["/a", "0.3"], ["0.7", "/a", "x", "/b"]]
)
def test_malformed_weights_are_refused(values):
    with pytest.raises(UserError, match=r"--data-path .*weights are malformed"):
        parse_blend(values, "--data-path")


@pytest.mark.parametrize("weight", ["0", "-1", "nan", "inf"])
def test_weights_must_be_above_zero_and_finite(weight):
    with pytest.raises(UserError, match="must be above 0"):
        parse_blend([weight, "/a", "1", "/b"], "--data-path")


def test_a_prefix_twice_is_refused():
    with pytest.raises(UserError, match="/a stands twice"):
        parse_blend(["/a", "/a"], "--data-path")


def test_splits():
    assert parse_split("969,30,1") == (969, 30, 1)
    assert parse_split("9, 1") == (9, 1, 0)
    for split in ("", "a,b", "1,2,3,4", "-1,2", "0,0,0", "nan,1", "1;2"):
        with pytest.raises(UserError, match="--split"):
            parse_split(split)
