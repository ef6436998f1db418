"""Sections: defaults, small notations, every rule that joins keys, and round trips of any valid section."""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from ds_efficient.config import GeneralConfig
from ds_efficient.config.base import SKIP_RULES, Section
from ds_efficient.config.fields import GROUP_SIZES, parse_layers, parse_pattern
from ds_efficient.config.sections import check_section
from ds_efficient.lgreco.config import LgrecoConfig
from ds_efficient.mkor.config import MkorConfig
from ds_efficient.random_ltd.config import RandomLtdConfig
from ds_efficient.registry import TECHNIQUES, resolve
from ds_efficient.rmm.config import RmmConfig
from ds_efficient.slope.config import SlopeConfig

SECTIONS = {"slope": SlopeConfig, "rmm": RmmConfig, "mkor": MkorConfig, "lgreco": LgrecoConfig}
SECTIONS["random_ltd"] = RandomLtdConfig
LTD = {"random_ltd_schedule": {"schedule_config": {"require_steps": 10}}}

# (section, data, path of the problem, part of its text); one line or more for every rule.
BROKEN = [
    ("mkor", {"gamma": 0.9}, "stabilizer", "zeta = 0.9 is not below gamma = 0.9"),
    ("mkor", {"form": "factored", "state_dtype": "bf16"}, "state_dtype", 'use "fp32"'),
    (
        "slope",
        {"adapter": {"start_step": 5, "last_fraction": 0.1}},
        "adapter.start_step",
        "exclude each other",
    ),
    ("slope", {"adapter": {"last_fraction": None}}, "adapter.rank", "would never start"),
    (
        "slope",
        {"patterns": [{"layers": "0-5", "pattern": "2:8"}, {"layers": "5", "pattern": "1:2"}]},
        "patterns",
        'layer 5 stands both in "0-5" and in "5"',
    ),
    ("slope", {"backend": "cusparselt", "pattern": "4:8"}, "backend", 'pattern "4:8" does not keep to'),
    (
        "slope",
        {"enabled": True, "modules": ["a"], "exclude": ["a", "b"]},
        "exclude",
        "nothing would be sparse",
    ),
    ("rmm", {"ratio": 0.001, "block_size": 512}, "ratio", "less than one row; use at least 0.00195312"),
    ("rmm", {"sketch": "srht", "block_size": 384}, "block_size", "use 256 or 512"),
    ("rmm", {"enabled": True, "modules": [], "exclude": []}, "exclude", "no layer would be projected"),
    ("rmm", {"enabled": True, "ratio": "auto"}, "variance_interval", "0 never measures the variance"),
    ("rmm", {"ratio": "auto", "block_size": 4}, "ratio", "0.125 of block_size 4 is less than one row"),
    ("lgreco", {"range": [64, 8]}, "range", "write [8, 64]"),
    ("lgreco", {"default": 4, "range": [8, 64]}, "default", "4 is outside range [8, 64]"),
    ("lgreco", {"range": [8, 16]}, "default", "32 is outside range [8, 16]"),
    ("lgreco", {"default": 8.5}, "default", "8.5 is not a rank"),
    ("lgreco", {"compressor": "qsgd", "default": 16}, "default", "16 bits do not exist"),
    ("lgreco", {"compressor": "topk", "default": 32}, "default", "32 is not a density"),
    ("lgreco", {"accordion": {"enabled": True, "low": 8, "high": 16}}, "accordion", "must be larger than"),
    ("lgreco", {"accordion": {"enabled": True, "low": 65}}, "accordion", "low = 65 is outside range [8, 64]"),
    (
        "random_ltd",
        {"random_ltd_schedule": {"min_value": 256, "max_value": 128}},
        "random_ltd_schedule.min_value",
        "256 is larger than max_value 128",
    ),
    (
        "random_ltd",
        {"layer_token_lr_schedule": {"warmup_layer_tokens": 9, "decay_layer_tokens": 9}},
        "layer_token_lr_schedule.decay_layer_tokens",
        "9 is not larger than warmup_layer_tokens 9",
    ),
    (
        "random_ltd",
        {"layer_token_lr_schedule": {"enabled": True}},
        "layer_token_lr_schedule.decay_layer_tokens",
        'needed with decay_style "cosine"',
    ),
    ("random_ltd", {"enabled": True}, "random_ltd_schedule", "schedule_config.require_steps is needed"),
    ("random_ltd", {"random_ltd_layer_id": [1, 2, 1]}, "random_ltd_layer_id", "layer 1 stands twice"),
    (
        "random_ltd",
        {"random_ltd_layer_id": [1, 4], "total_layer_num": 4},
        "random_ltd_layer_id",
        "layer 4 does not exist: total_layer_num 4 allows 0 to 3",
    ),
    (
        "random_ltd",
        {"random_ltd_layer_id": [1, 2], "random_ltd_layer_num": 3},
        "random_ltd_layer_num",
        "3 differs from the 2 entries",
    ),
    (
        "random_ltd",
        {"random_ltd_layer_num": 5, "total_layer_num": 4},
        "random_ltd_layer_num",
        "5 is more than total_layer_num 4",
    ),
]

# Neighbours of the broken ones that are right.
WHOLE = [
    ("slope", {"adapter": {"start_step": 5}}),
    ("slope", {"adapter": {"rank": 0, "last_fraction": None}}),
    ("slope", {"patterns": [{"layers": "0-4", "pattern": "2:8"}, {"layers": "5", "pattern": "1:2"}]}),
    ("slope", {"backend": "cusparselt", "patterns": [{"layers": "0", "pattern": "1:2"}]}),
    ("slope", {"backend": "dense", "pattern": "4:8"}),
    ("slope", {"modules": ["a"], "exclude": ["a"]}),
    ("rmm", {"ratio": 0.001, "block_size": 1000}),
    ("rmm", {"ratio": 0.001, "block_size": 0}),
    ("rmm", {"sketch": "srht", "block_size": 0}),
    ("lgreco", {"default": 4}),
    ("lgreco", {"compressor": "topk", "default": 1.0}),
    ("lgreco", {"compressor": "qsgd", "range": [2, 8]}),
    ("lgreco", {"accordion": {"enabled": True}}),
    ("random_ltd", {"enabled": True, **LTD}),
    ("random_ltd", {"enabled": True, "random_ltd_schedule": {"schedule_type": "constant"}}),
    ("random_ltd", {"token_budget": 3e11, "layer_token_budget": 48e11}),
    ("random_ltd", {"layer_token_lr_schedule": {"enabled": True, "decay_style": "constant"}}),
    ("random_ltd", {"random_ltd_layer_id": [2, 1], "random_ltd_layer_num": 2, "total_layer_num": 3}),
]

WARNED = [
    ("rmm", {"enabled": True, "ratio": 1}, "x.ratio: 1 keeps every row"),
    (
        "rmm",
        {"enabled": True, "target_variance_ratio": 4},
        "x.target_variance_ratio: has no effect with ratio 0.125",
    ),
    ("mkor", {"enabled": True, "gamma": 1}, "x.gamma: 1 gives new statistics no weight"),
    ("mkor", {"hybrid": {"enabled": True, "ema": 300}}, "x.hybrid.min_steps: 200 is shorter than"),
    ("mkor", {"enabled": True, "max_rank": 8}, 'x.max_rank: has no effect with form "dense"'),
    ("mkor", {"enabled": True, "form": "factored", "max_rank": 8, "statistics_rank": 8}, "x.statistics_rank"),
]


@pytest.mark.parametrize(("name", "data", "path", "text"), BROKEN)
def test_broken_rule_is_the_only_problem_and_names_its_key(name, data, path, text):
    section, problems, _ = check_section(SECTIONS[name], data, ("x",))
    assert section is None
    assert [problem.path for problem in problems] == [f"x.{path}"]
    assert text in problems[0].text
    with pytest.raises(ValidationError, match=path.rpartition(".")[2]):
        SECTIONS[name](**data)


@pytest.mark.parametrize(("name", "data"), WHOLE)
def test_neighbours_of_broken_rules_are_accepted(name, data):
    section, problems, _ = check_section(SECTIONS[name], data, ("x",))
    assert problems == []
    assert section == SECTIONS[name](**data)


@pytest.mark.parametrize(("name", "data", "text"), WARNED)
def test_pointless_combinations_are_warned_about_once_enabled(name, data, text):
    section, problems, warnings = check_section(SECTIONS[name], data, ("x",))
    assert section is not None and problems == []
    assert len(warnings) == 1 and warnings[0].startswith(text)
    quiet = json.loads(json.dumps(data).replace("true", "false"))
    assert check_section(SECTIONS[name], quiet, ("x",))[2] == []


def test_every_rule_has_a_case_above():
    def rules(model):
        yield from model.rules
        for field in model.model_fields.values():
            if isinstance(field.default, Section):
                yield from rules(type(field.default))

    existing = {rule.check.__name__ for model in SECTIONS.values() for rule in rules(model)}
    broken = set()
    for name, data in [(case[0], case[1]) for case in BROKEN + WARNED]:
        section = SECTIONS[name].model_validate(data, context={SKIP_RULES: True})
        parts = [section, *(getattr(section, key) for key in type(section).model_fields)]
        parts += [inner for part in list(parts) for inner in getattr(part, "__dict__", {}).values()]
        for part in parts:
            if hasattr(part, "broken_rules"):
                broken |= {rule.check.__name__ for rule, _ in part.broken_rules()}
    assert existing == broken


def test_a_rule_is_left_out_while_a_key_it_reads_is_wrong():
    _, problems, _ = check_section(RmmConfig, {"sketch": "srht", "block_size": "384"}, ("rmm",))
    assert [problem.path for problem in problems] == ["rmm.block_size"]


def test_rules_are_checked_beside_problems_of_other_keys():
    data = {"sketch": "srht", "block_size": 384, "min_rows": 0, "ratoi": 1}
    _, problems, _ = check_section(RmmConfig, data, ("rmm",))
    assert {problem.path for problem in problems} == {"rmm.block_size", "rmm.min_rows", "rmm.ratoi"}


@pytest.mark.parametrize("text", ["1:2", "2:4", "1:4", "2:8", "4:8", "2:16", "31:32"])
def test_patterns_are_parsed(text):
    assert "{}:{}".format(*parse_pattern(text)) == text


@pytest.mark.parametrize(
    "text", ["", "2", "2:", "4:4", "4:2", "0:4", "2:6", "2:64", "-1:4", "2:4 ", "2/4", "٢:٤"]
)
def test_other_patterns_are_refused(text):
    with pytest.raises(ValueError):
        parse_pattern(text)
    assert check_section(SlopeConfig, {"pattern": text}, ("slope",))[1]


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 40))
def test_a_pattern_is_allowed_exactly_when_it_prunes_in_a_known_group(kept, group):
    allowed = kept < group and group in GROUP_SIZES
    assert (not check_section(SlopeConfig, {"pattern": f"{kept}:{group}"}, ("slope",))[1]) == allowed


@settings(deadline=None)
@given(st.sets(st.integers(0, 200), min_size=1))
def test_layers_round_trip(numbers):
    assert parse_layers(",".join(map(str, numbers))) == tuple(sorted(numbers))


@settings(deadline=None)
@given(st.integers(0, 100), st.integers(0, 100))
def test_ranges_include_both_ends(low, length):
    assert parse_layers(f"{low}-{low + length}") == tuple(range(low, low + length + 1))


@pytest.mark.parametrize("text", ["", "a", "1-", "-1", "3-1", "1,,2", "1 - 2", "0-10000000000", "1-2-3"])
def test_other_layer_texts_are_refused(text):
    with pytest.raises(ValueError):
        parse_layers(text)


def test_left_out_settings_of_lgreco_suit_the_compressor():
    assert (LgrecoConfig().default, LgrecoConfig().range) == (32, (8, 64))
    qsgd = LgrecoConfig(compressor="qsgd")
    assert (qsgd.default, qsgd.range) == (4, (2, 8))
    topk = LgrecoConfig(compressor="topk")
    assert topk.default == 0.01 and topk.range == pytest.approx((0.001, 0.1))
    assert LgrecoConfig(default=16).range == (4, 32)


def test_start_step_replaces_the_default_fraction():
    assert SlopeConfig(adapter={"start_step": 7}).adapter.last_fraction is None
    assert SlopeConfig().adapter.last_fraction == 0.01


@pytest.mark.parametrize("value", ["64", True, 64.5, None, [64], float("inf"), float("nan")])
def test_integers_are_not_guessed_from_other_types(value):
    assert check_section(RmmConfig, {"min_rows": value}, ("rmm",))[1]


def test_an_integer_may_be_written_in_exponent_form():
    assert type(LgrecoConfig(buckets=1e4).buckets) is int


@pytest.mark.parametrize("row", TECHNIQUES, ids=lambda row: row.name)
def test_sections_and_their_parts_are_frozen_and_off_by_default(row):
    section = resolve(row.config)()
    assert section.enabled is False
    for key in type(section).model_fields:
        with pytest.raises(ValidationError, match="frozen"):
            setattr(section, key, getattr(section, key))
    assert hash(section) == hash(resolve(row.config)())


def names(**kwargs):
    return st.lists(
        st.sampled_from(["linear_qkv", "linear_fc1", "a.*.b", "output_layer"]), unique=True, **kwargs
    )


PATTERNS = st.sampled_from(["1:2", "2:4", "2:8", "4:8", "2:16"])
COUNTS = st.integers(1, 10**6)
OPEN = st.floats(0.01, 0.99)


def some(required=None, **optional):
    return st.fixed_dictionaries(required or {}, optional=optional)


def lgreco_of(compressor):
    setting = {
        "topk": st.floats(1e-4, 1.0),
        "qsgd": st.integers(2, 8),
    }.get(compressor, st.integers(1, 512))

    def finish(three):
        low, middle, high = sorted(three)
        return some(
            {"compressor": st.just(compressor), "default": st.just(middle), "range": st.just([low, high])},
            enabled=st.booleans(),
            interval=COUNTS,
            start_step=st.integers(0, 99),
            buckets=st.integers(10, 10**5),
            error=st.sampled_from(["l2", "l2_squared"]),
            objective=st.sampled_from(["size", "time"]),
            backend=st.sampled_from(["auto", "nccl", "gloo", "mpi"]),
        )

    return st.tuples(setting, setting, setting).flatmap(finish)


STRATEGIES = {
    "slope": some(
        enabled=st.booleans(),
        pattern=PATTERNS,
        patterns=st.lists(
            st.tuples(st.integers(0, 50), PATTERNS), unique_by=lambda pair: pair[0], max_size=4
        ).map(lambda pairs: [{"layers": str(layer), "pattern": pattern} for layer, pattern in pairs]),
        modules=st.just(["linear_proj"]),
        exclude=st.just(["output_layer"]),
        mask=st.sampled_from(["random", "magnitude"]),
        double_prune=st.booleans(),
        column_mask_interval=COUNTS,
        adapter=some(rank=st.integers(0, 512), start_step=st.integers(0, 10**6))
        | some(last_fraction=st.floats(1e-6, 1.0)),
        backend=st.sampled_from(["auto", "dense"]),
    ),
    "rmm": some(
        ratio=st.floats(0.1, 1.0) | st.just("auto"),
        target_variance_ratio=st.floats(1e-3, 1e3),
        sketch=st.sampled_from(["gaussian", "rademacher", "srht", "count", "rows"]),
        block_size=st.sampled_from([0, 16, 128, 2048]),
        min_rows=COUNTS,
        modules=names(),
        exclude=names(),
        variance_interval=st.integers(0, 99),
    ),
    "mkor": st.sampled_from([("dense", "fp32"), ("dense", "bf16"), ("dense", "fp16"), ("factored", "fp32")])
    .map(lambda pair: {"form": pair[0], "state_dtype": pair[1]})
    .flatmap(
        lambda form: some(
            {
                "gamma": st.floats(0.6, 1.0),
                "stabilizer": some({"zeta": st.floats(0, 0.5)}, threshold=st.floats(0.1, 1e6)),
                **{key: st.just(value) for key, value in form.items()},
            },
            enabled=st.booleans(),
            inversion_interval=COUNTS,
            warmup_steps=COUNTS,
            sides=st.sampled_from(["both", "left", "right"]),
            max_rank=COUNTS,
            statistics_rank=st.integers(1, 64),
            comm_dtype=st.sampled_from(["fp32", "bf16", "fp16"]),
            tensor_parallel=st.sampled_from(["exact", "block"]),
            exclude=names(),
            hybrid=some(enabled=st.booleans(), beta=OPEN, ema=COUNTS, min_steps=COUNTS),
        )
    ),
    "lgreco": st.sampled_from(["powersgd", "qsgd", "topk", "mixed"]).flatmap(lgreco_of),
    "random_ltd": some(
        {"random_ltd_schedule": st.just({"schedule_config": {"require_steps": 5, "seq_per_step": 8}})},
        enabled=st.booleans(),
        total_layer_num=st.integers(12, 96),
        random_ltd_layer_id=st.sets(st.integers(0, 11)).map(list),
        token_budget=st.none() | COUNTS,
        layer_token_budget=st.none() | COUNTS,
        model_mask_name=st.none() | st.just("attention_mask"),
        model_type=st.sampled_from(["decoder", "encoder", None]),
        hidden_state_order=st.sampled_from(["batch_seq_dim", "seq_batch_dim", None]),
        layer_token_lr_schedule=some(
            {"decay_layer_tokens": st.integers(100, 10**15)},
            enabled=st.booleans(),
            warmup_layer_tokens=st.integers(0, 99),
            decay_style=st.sampled_from(["cosine", "linear", "constant"]),
            min_lr=st.floats(0, 1e-3),
        ),
    ),
}


@pytest.mark.parametrize("name", sorted(SECTIONS))
def test_any_valid_section_survives_dump_and_load(name):
    @settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
    @given(STRATEGIES[name])
    def holds(data):
        section, problems, _ = check_section(SECTIONS[name], data, (name,))
        assert problems == [] and section is not None
        assert section == SECTIONS[name](**data)
        again = json.loads(json.dumps(section.model_dump(mode="json")))
        assert check_section(SECTIONS[name], again, (name,))[0] == section
        assert SECTIONS[name](**section.model_dump()) == section

    holds()


def test_the_general_section_has_its_documented_defaults():
    general = GeneralConfig()
    assert general.model_dump() == {
        "seed": 1234,
        "run_dir": None,
        "evidence_steps": 3,
        "allow_untested_megatron": False,
    }
    assert GeneralConfig(seed=2**63 - 1).seed == 2**63 - 1
    for bad in (-1, 2**63):
        with pytest.raises(ValidationError):
            GeneralConfig(seed=bad)
