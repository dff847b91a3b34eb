"""Two tiny Llama models with random weights, as safetensors folders, and their golden answers from transformers in f32.

    python make_tiny_llama.py

writes tiny-llama-gqa/, tiny-llama-mha/ and, beside each, NAME.json. README.md describes them. The seed is fixed. Weights are
drawn wide enough that attention is peaked; prompts are redrawn until every greedy choice is clear.
"""

import json
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from make_golden import write_json

HERE = Path(__file__).parent
GREEDY_TOKENS = 32
LEAST_MARGIN = 0.1
SEED = 7
PROMPT_LENGTHS = (1, 5, 33, 128, 150, 200, 300)

BASE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "head_dim": 32,
    "vocab_size": 256,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": None,
    "eos_token_id": 0,
}
MODELS = {
    "tiny-llama-gqa": {
        **BASE,
        "num_key_value_heads": 2,
        "intermediate_size": 128,
        "tie_word_embeddings": False,
        "rope_theta": 10000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        "torch_dtype": "float16",
    },
    "tiny-llama-mha": {
        **BASE,
        "num_key_value_heads": 4,
        "intermediate_size": 96,
        "tie_word_embeddings": True,
        "rope_theta": 500.0,
        "rope_scaling": None,
        "torch_dtype": "bfloat16",
    },
}
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def byte_symbols():
    """The printable character that byte-level BPE writes for each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def write_tokenizer(folder):
    """Byte-level, without merges: a token's id is its byte."""
    tokenizer = Tokenizer(models.BPE({symbol: byte for byte, symbol in enumerate(byte_symbols())}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    text = "Hello, Wörld 🌊\n 12"
    assert tokenizer.encode(text).ids == list(text.encode()) and tokenizer.decode(tokenizer.encode(text).ids) == text
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": CHAT_TEMPLATE, "model_max_length": 512}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def random_weights(config):
    """Name -> tensor in the model's own dtype."""
    random = np.random.default_rng(SEED)
    dtype = getattr(torch, config["torch_dtype"])
    hidden, inner, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * head, config["num_key_value_heads"] * head

    def matrix(rows, columns, gain):
        return torch.from_numpy(random.standard_normal((rows, columns)) * gain / columns**0.5).to(dtype)

    def norm():
        return torch.from_numpy(random.uniform(0.5, 1.5, hidden)).to(dtype)

    weights = {"model.embed_tokens.weight": matrix(config["vocab_size"], hidden, 4), "model.norm.weight": norm()}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        weights |= {
            prefix + "input_layernorm.weight": norm(),
            prefix + "self_attn.q_proj.weight": matrix(q, hidden, 1.5),
            prefix + "self_attn.k_proj.weight": matrix(kv, hidden, 1.5),
            prefix + "self_attn.v_proj.weight": matrix(kv, hidden, 1.5),
            prefix + "self_attn.o_proj.weight": matrix(hidden, q, 1.5),
            prefix + "post_attention_layernorm.weight": norm(),
            prefix + "mlp.gate_proj.weight": matrix(inner, hidden, 1.5),
            prefix + "mlp.up_proj.weight": matrix(inner, hidden, 1.5),
            prefix + "mlp.down_proj.weight": matrix(hidden, inner, 1.5),
        }
    if not config["tie_word_embeddings"]:
        weights["lm_head.weight"] = matrix(config["vocab_size"], hidden, 4)
    return weights


@torch.inference_mode()
def greedy(model, ids):
    """Greedy continuation, recomputed without a cache at each step. Stops early at an unclear choice."""
    sequence, out = list(ids), {"tokens": [], "margins": []}
    for index in range(GREEDY_TOKENS):
        logits = model(input_ids=torch.tensor([sequence]), use_cache=False).logits[0, -1]
        top = torch.topk(logits, 5)
        if index == 0:
            out["top5"] = [{"id": int(i), "logit": round(float(v), 5)} for v, i in zip(top.values, top.indices)]
            out["logits"] = [round(float(v), 5) for v in logits]
        sequence.append(int(top.indices[0]))
        out["tokens"].append(sequence[-1])
        out["margins"].append(round(float(top.values[0] - top.values[1]), 5))
        if out["margins"][-1] < LEAST_MARGIN:
            return out
    return out


def clear_prompts(model):
    """One random prompt of each length, redrawn until every greedy choice is clear and none is the end token."""
    random = np.random.default_rng(SEED)
    for length in PROMPT_LENGTHS:
        for _ in range(1000):
            ids = [int(token) for token in random.integers(1, 256, length)]
            answer = greedy(model, ids)
            if min(answer["margins"]) >= LEAST_MARGIN and 0 not in answer["tokens"]:
                break
        else:
            raise RuntimeError(f"no clear prompt of {length} tokens")
        yield {"promptTokens": length, "ids": ids, **answer}


def make_model(name, config):
    folder = HERE / name
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    write_tokenizer(folder)
    weights = folder / "model.safetensors"
    save_file(random_weights(config), weights, metadata={"format": "pt"})
    weights.chmod(0o644)
    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    model.eval()
    entries = list(clear_prompts(model))
    made = {"torch": torch.__version__, "transformers": transformers.__version__, "dtype": "float32"}
    write_json(HERE / f"{name}.json", {"model": name, "made": made, "prompts": entries})
    rope = model.model.rotary_emb
    print(name, "least margin", min(min(e["margins"]) for e in entries), rope.rope_type, rope.inv_freq[:6])
    for entry in entries:
        print(entry["promptTokens"], entry["tokens"][:12], entry["top5"][0])
    print(weights.stat().st_size, "bytes of weights")


def main():
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    for name, config in MODELS.items():
        make_model(name, config)


if __name__ == "__main__":
    main()
