"""Section ``data_efficiency.data_routing.random_ltd``: random token dropping (arXiv 2211.11586).

The keys are DeepSpeed's own; ``layer_token_lr_schedule``, which DeepSpeed reads but refuses to run, is ours.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ds_efficient.config.base import Section, TechniqueSection, rule
from ds_efficient.config.fields import Count, LayerIds, Natural


class ScheduleStepsConfig(Section):
    """Speed of the schedule."""

    require_steps: Count | None = None
    """Steps until max_value tokens are kept; null: never, which needs schedule_type "constant"."""

    seq_per_step: Count = 16
    """Tokens by which the kept length grows at a time; a multiple of 8 or 16 suits GPUs."""


@rule("min_value", "max_value")
def schedule_grows(schedule: TokenScheduleConfig) -> str | None:
    """min_value is at most max_value."""
    if schedule.max_value is not None and schedule.min_value > schedule.max_value:
        return f"{schedule.min_value} is larger than max_value {schedule.max_value}"
    return None


class TokenScheduleConfig(Section):
    """How many tokens of each sequence the chosen layers keep, over the steps."""

    rules = (schedule_grows,)

    min_value: Count = 128
    """Tokens kept at the first step."""

    max_value: Count | None = None
    """Tokens kept at the end; null: the sequence length."""

    schedule_type: Literal["fixed_linear", "constant"] = "fixed_linear"
    """Shape of the growth: steady, or none before step require_steps."""

    schedule_config: ScheduleStepsConfig = ScheduleStepsConfig()
    """Speed of the growth."""


@rule("decay_layer_tokens", "warmup_layer_tokens")
def warmup_ends_before_decay(schedule: LayerTokenLrConfig) -> str | None:
    """decay_layer_tokens is larger than warmup_layer_tokens; both count from the first step."""
    decay, warmup = schedule.decay_layer_tokens, schedule.warmup_layer_tokens
    if decay is not None and decay <= warmup:
        return (
            f"{decay} is not larger than warmup_layer_tokens {warmup}; both count from the start of the run"
        )
    return None


@rule("decay_layer_tokens", "decay_style", "enabled")
def decay_has_an_end(schedule: LayerTokenLrConfig) -> str | None:
    """decay_layer_tokens is needed once enabled, unless decay_style is "constant"."""
    if schedule.enabled and schedule.decay_style != "constant" and schedule.decay_layer_tokens is None:
        return (
            f'needed with decay_style "{schedule.decay_style}": layer tokens (tokens times layers) '
            'at which the decay ends; or set decay_style to "constant"'
        )
    return None


class LayerTokenLrConfig(Section):
    """LayerToken learning rate: warm-up and decay follow the tokens that layers really saw, not the steps."""

    rules = (warmup_ends_before_decay, decay_has_an_end)

    enabled: bool = False
    """Switch the schedule on; it replaces the scheduler section."""

    warmup_layer_tokens: Natural = 0
    """Layer tokens (tokens times layers that processed them) until the peak learning rate is reached."""

    decay_layer_tokens: Count | None = None
    """Layer tokens, from the start of the run, at which min_lr is reached."""

    decay_style: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the decay."""

    min_lr: Annotated[float, Field(ge=0)] = 1e-6
    """Learning rate at the end of the decay."""


@rule("random_ltd_schedule", "enabled")
def steps_are_given(ltd: RandomLtdConfig) -> str | None:
    """random_ltd_schedule.schedule_config.require_steps is needed once enabled, with "fixed_linear"."""
    schedule = ltd.random_ltd_schedule
    grows = schedule.schedule_type != "constant"
    if ltd.enabled and grows and schedule.schedule_config.require_steps is None:
        return "schedule_config.require_steps is needed: steps until no token is dropped any more"
    return None


@rule("random_ltd_layer_id")
def layer_ids_are_distinct(ltd: RandomLtdConfig) -> str | None:
    """random_ltd_layer_id names each layer once."""
    ids = ltd.random_ltd_layer_id or ()
    repeated = sorted({one for one in ids if ids.count(one) > 1})
    return f"layer {repeated[0]} stands twice" if repeated else None


@rule("random_ltd_layer_id", "total_layer_num")
def layer_ids_exist(ltd: RandomLtdConfig) -> str | None:
    """Layer numbers run from 0 to total_layer_num - 1."""
    largest = max(ltd.random_ltd_layer_id or (0,))
    total = ltd.total_layer_num
    if total is not None and largest >= total:
        return f"layer {largest} does not exist: total_layer_num {total} allows 0 to {total - 1}"
    return None


@rule("random_ltd_layer_num", "random_ltd_layer_id", "total_layer_num")
def layer_numbers_agree(ltd: RandomLtdConfig) -> str | None:
    """random_ltd_layer_num is the length of random_ltd_layer_id and at most total_layer_num."""
    number, ids, total = ltd.random_ltd_layer_num, ltd.random_ltd_layer_id, ltd.total_layer_num
    if number is not None and ids is not None and number != len(ids):
        return f"{number} differs from the {len(ids)} entries of random_ltd_layer_id; leave one of them out"
    if number is not None and total is not None and number > total:
        return f"{number} is more than total_layer_num {total}"
    return None


class RandomLtdConfig(TechniqueSection):
    """random-LTD: middle layers process a random part of the tokens, growing to all of them."""

    rules = (steps_are_given, layer_ids_are_distinct, layer_ids_exist, layer_numbers_agree)

    total_layer_num: Count | None = None
    """Transformer layers of the model; null: counted."""

    random_ltd_layer_num: Count | None = None
    """Number of layers that drop tokens; null: all but the first and the last."""

    random_ltd_layer_id: LayerIds | None = None
    """The layers that drop tokens; null: the middle ones, random_ltd_layer_num of them."""

    model_mask_name: str | None = None
    """Keyword argument under which the layers get their attention mask; null: none, or found by itself."""

    model_type: Literal["decoder", "encoder"] | None = None
    """Whether attention is causal (decoder); null: taken from the model."""

    hidden_state_order: Literal["batch_seq_dim", "seq_batch_dim"] | None = None
    """Layout of the hidden states; null: taken from the model."""

    random_ltd_schedule: TokenScheduleConfig = TokenScheduleConfig()
    """Tokens kept, over the steps."""

    layer_token_lr_schedule: LayerTokenLrConfig = LayerTokenLrConfig()
    """Learning rate by layer tokens."""

    token_budget: Count | None = None
    """Training stops after the step that reaches so many tokens of data; null: no such end."""

    layer_token_budget: Count | None = None
    """Training stops after the step that reaches so many layer tokens; null: no such end."""
