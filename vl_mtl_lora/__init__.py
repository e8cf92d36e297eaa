"""Adapts frozen vision-language models to many tasks at once with MTL-LoRA."""

from vl_mtl_lora.backbones import load_backbone
from vl_mtl_lora.checkpoint import load_run
from vl_mtl_lora.config import load_config, parse_config
from vl_mtl_lora.data.shards import write_shards
from vl_mtl_lora.errors import UserError
from vl_mtl_lora.lora import AdapterConfig, AdapterSummary, MTLLoRALinear, inject
from vl_mtl_lora.model import MultiTaskModel, build_model
from vl_mtl_lora.predict import predict
from vl_mtl_lora.routing import TaskRouter

__all__ = ["AdapterConfig", "AdapterSummary", "MTLLoRALinear", "MultiTaskModel", "TaskRouter", "UserError",
           "build_model", "inject", "load_backbone", "load_config", "load_run", "parse_config", "predict",
           "write_shards"]
