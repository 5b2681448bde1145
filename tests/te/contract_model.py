"""A whole model over the library's modules, against the reference."""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from parallel.pipeline.segments import Segments
from tests.te.contract_engine import KeepsInput
from tests.te.twin import LOG
from tests.train.model_cases import build, random_tokens, small_config
from train.model.config import ModelConfig
from train.model.loss import loss_terms
from train.model.recompute import Recompute, RecomputeConfig
from train.model.transformer import Transformer
from train.precision.grads import main_grad
from train.precision.linear import Engines, TorchEngine
from train.precision.recipe import FP8_MODULES, Table, build_engines, matrices
from train.precision.reference import Fp8Engine, QuantisedWeights
from train.precision.transformer_engine import TransformerEngine
from train.stage import Stage, WeightGradients
