"""Every setting, and the only home of defaults.

Importing this package does not import torch, so that `--help`, `validate` and configuration errors are quick.
"""

from selm_fast.config.run import API_KEY as API_KEY
from selm_fast.config.run import PAIRRM as PAIRRM
from selm_fast.config.run import PER_ITERATION as PER_ITERATION
from selm_fast.config.run import EvaluationConfig as EvaluationConfig
from selm_fast.config.run import PairRMConfig as PairRMConfig
from selm_fast.config.run import RankConfig as RankConfig
from selm_fast.config.run import RolloutConfig as RolloutConfig
from selm_fast.config.run import RunConfig as RunConfig
from selm_fast.config.run import parse_function as parse_function
from selm_fast.config.training import BatchConfig as BatchConfig
from selm_fast.config.training import CacheConfig as CacheConfig
from selm_fast.config.training import CheckpointConfig as CheckpointConfig
from selm_fast.config.training import Config as Config
from selm_fast.config.training import DataConfig as DataConfig
from selm_fast.config.training import LogConfig as LogConfig
from selm_fast.config.training import ModelConfig as ModelConfig
from selm_fast.config.training import OptimConfig as OptimConfig
from selm_fast.config.training import Section as Section
