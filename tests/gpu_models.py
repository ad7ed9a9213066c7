"""`config.json` of the models that the GPU experiment files name, from the table that plans use."""

import json

from megatron_rl.cluster.model_shape import PUBLISHED

_PUBLISHED = json.loads(PUBLISHED.read_text())
QWEN25_7B = _PUBLISHED["Qwen/Qwen2.5-7B"]
QWEN25_32B = _PUBLISHED["Qwen/Qwen2.5-32B"]
QWEN3_8B = _PUBLISHED["Qwen/Qwen3-8B"]
QWEN3_17B = _PUBLISHED["Qwen/Qwen3-1.7B"]
QWEN3_30B_A3B = _PUBLISHED["Qwen/Qwen3-30B-A3B"]
