"""A workload's YAML file as one frozen, checked Config."""

from pipelines.config.load import load_config
from pipelines.config.workload import Config

__all__ = ["Config", "load_config"]
