"""Writes tests/data/peft-tiny with Hugging Face PEFT, to test adapters against.

Run once, where torch, transformers and peft are installed:
`python tests/make_peft_fixture.py`. It makes a random LLaMA of a few thousand
parameters (`base.safetensors`), a random LoRA adapter of it as PEFT saves one
(`adapter_config.json`, `adapter_model.safetensors`), with two ranks, two scales and an
adapted embedding, and the weights after PEFT's merge (`merged.safetensors`).
"""

from pathlib import Path


def main() -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    directory = Path(__file__).parent / "data" / "peft-tiny"
    torch.manual_seed(0)
    shape = dict(hidden_size=8, intermediate_size=12, vocab_size=20)
    model = LlamaForCausalLM(
        LlamaConfig(**shape, num_hidden_layers=2, num_attention_heads=2)
    )
    # A copy: merging changes the tensors in place.
    base = {name: x.clone() for name, x in model.state_dict().items()}
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=3,
        lora_alpha=6,
        target_modules=["q_proj", "v_proj", "down_proj", "embed_tokens"],
        rank_pattern={"layers.1.mlp.down_proj": 2},
        alpha_pattern={"layers.1.mlp.down_proj": 1},
        init_lora_weights=False,
    )
    model = get_peft_model(model, config)
    model.peft_config["default"].base_model_name_or_path = "tiny/llama"
    model.save_pretrained(directory, save_embedding_layers=False)
    (directory / "README.md").unlink()  # a model card to be filled in
    merged = model.merge_and_unload().state_dict()
    merged = {name: x.contiguous() for name, x in merged.items()}
    save_file(base, directory / "base.safetensors")
    save_file(
        {k: x.contiguous() for k, x in merged.items()}, directory / "merged.safetensors"
    )


if __name__ == "__main__":
    main()
