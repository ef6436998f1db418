"""Keys: stable values, no confusion between paths."""

from __future__ import annotations

import copy
import hashlib
import pickle
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_efficient.core.keys import Key, Subkeys, derive_key

PARTS = st.lists(st.one_of(st.integers(-(2**70), 2**70), st.text(max_size=12)), max_size=5)


def test_key_is_blake2b_of_the_documented_encoding():
    encoded = b"i1234\0i7\0i-1\0s5:a\xc3\xa4\x00b\0"
    digest = hashlib.blake2b(encoded, digest_size=8, person=b"ds_efficient.k1").digest()
    assert Key(1234).fold(7, -1, "aä\0b").value == int.from_bytes(digest, "little")


def test_values_never_change():
    """Fixed values: a change here silently changes every run that is resumed."""
    assert Key(0).value == 14748788981746233481
    assert (
        derive_key(1234, step=5, micro_batch=1, layer="decoder.layers.3", rank=2, stream="rmm.sketch")
        == 6251338746951376327
    )


def test_derive_key_equals_folding():
    folded = Key(9).fold(1, 2, "layer", 3, "purpose")
    assert (
        derive_key(9, step=1, micro_batch=2, layer="layer", rank=3, stream="purpose")
        == int(folded)
        == folded.value
    )


@settings(deadline=None)
@given(PARTS, PARTS, st.integers(), st.integers())
def test_equal_keys_mean_equal_paths(a, b, seed_a, seed_b):
    same = (seed_a, a) == (seed_b, b)
    assert (Key(seed_a).fold(*a).value == Key(seed_b).fold(*b).value) is same
    assert (Key(seed_a).fold(*a) == Key(seed_b).fold(*b)) is same
    assert 0 <= Key(seed_a).fold(*a).value < 2**64


@pytest.mark.parametrize("name", ["step", "micro_batch", "layer", "rank"])
def test_every_argument_matters_in_its_own_place(name):
    names = ("step", "micro_batch", "layer", "rank")
    keys = {derive_key(1)} | {derive_key(1, **{n: 1}) for n in names}
    assert len(keys) == len(names) + 1
    values = [derive_key(1, **{name: i}) for i in range(1000)]
    assert len(set(values)) == 1000
    ones = np.unpackbits(np.array(values, dtype=np.uint64).view(np.uint8)).mean()
    assert abs(ones - 0.5) < 4 * 0.5 / np.sqrt(64 * 1000)


def test_integer_and_string_layers_differ_and_numpy_integers_do_not():
    assert derive_key(1, layer=3) != derive_key(1, layer="3")
    assert derive_key(1, layer=3) == derive_key(1, layer=np.int64(3))
    assert Key(1).fold("ab", "c") != Key(1).fold("a", "bc")


@pytest.mark.parametrize("part", [1.0, None, True, b"x"])
def test_other_types_are_refused(part):
    with pytest.raises(TypeError, match="integers and strings"):
        Key(1).fold(part)


@settings(deadline=None)
@given(PARTS, PARTS, st.integers())
def test_subkeys_have_the_values_of_folded_keys(a, b, seed):
    key = Key(seed).fold(*a)
    for subkeys in (made := Subkeys(key), copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert subkeys.value(*b) == subkeys.value(*b) == key.fold(*b).value


def test_subkeys_refuse_what_keys_refuse_also_beside_an_equal_integer():
    subkeys = Subkeys(Key(1))
    assert subkeys.value(1, 0) == subkeys.value(np.int64(1), 0) == Key(1).fold(1, 0).value
    for part in (True, 1.0, None):
        with pytest.raises(TypeError, match="folded from integers and strings"):
            subkeys.value(part, 0)


def test_value_does_not_depend_on_the_hash_seed():
    code = "from ds_efficient.core.keys import derive_key; print(derive_key(3, layer='a.b', stream='s'))"
    environments = [{"PYTHONHASHSEED": seed, "PATH": ""} for seed in ("1", "2")]
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=e)
        for e in environments
    ]
    assert [int(run.stdout) for run in runs] == [derive_key(3, layer="a.b", stream="s")] * 2
