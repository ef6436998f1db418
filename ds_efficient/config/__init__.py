"""The configuration: sections of the DeepSpeed JSON, validated with every problem reported at once."""

from ds_efficient.config.efficiency import EfficiencyConfig, GeneralConfig, load_config

__all__ = ["EfficiencyConfig", "GeneralConfig", "load_config"]
