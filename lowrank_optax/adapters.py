"""A fine-tuned model's difference from its base as a LoRA adapter, and as PEFT's files.

>>> import jax.numpy as jnp, tempfile, lowrank_optax as lro
>>> base = {"up_proj": {"kernel": jnp.ones((4, 6))}}
>>> tuned = {"up_proj": {"kernel": base["up_proj"]["kernel"].at[0].add(1.0)}}
>>> adapters = lro.adapters.extract_lora(tuned, base, rank=1)
>>> with tempfile.TemporaryDirectory() as directory:
...     path = lro.adapters.save_peft(adapters, directory, base_model_name="tiny")
...     sorted(file.name for file in path.iterdir())
['adapter_config.json', 'adapter_model.safetensors']
"""

from lowrank_optax._src.report.adapters import LoraAdapter as LoraAdapter
from lowrank_optax._src.report.adapters import extract_lora as extract_lora
from lowrank_optax._src.report.adapters import module_name as module_name
from lowrank_optax._src.report.adapters import save_peft as save_peft

__all__ = ["LoraAdapter", "extract_lora", "module_name", "save_peft"]
