"""Golden answers of SmolLM2-135M-Instruct (Q4_1 GGUF) from Hugging Face transformers in f32, and of its tokenizer.

    python make_golden.py path/to/SmolLM2-135M-Instruct.Q4_1.gguf

writes smollm2.json (greedy tokens, logits) and smollm2-tokenizer.json (ids of difficult strings, chat renderings).
README.md describes both, and names the package versions.
"""

import argparse
import hashlib
import json
import re
from pathlib import Path

import gguf
import numpy as np
import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

HERE = Path(__file__).parent
GREEDY_TOKENS = 32
CONTROL_TOKEN = 3  # tokenizer.ggml.token_type of special tokens

SHORT_PLAIN = {
    "capital": "The capital of France is",
    "story": "Once upon a time, in a small village by the sea,",
    "code": "def fibonacci(n):\n    ",
    "list": "The days of the week are Monday, Tuesday,",
}
CHATS = {
    "chat-short": [{"role": "user", "content": "What is gravity?"}],
    "chat-system": [
        {"role": "system", "content": "You answer in one short sentence."},
        {"role": "user", "content": "Why is the sky blue?"},
    ],
    "chat-turns": [
        {"role": "user", "content": "My name is Ada and I like bridges."},
        {"role": "assistant", "content": "Nice to meet you, Ada! What do you like about bridges?"},
        {"role": "user", "content": "That they carry weight without moving. What was my name again?"},
    ],
}
RENDERINGS = [
    [{"role": "user", "content": "Hi"}],
    [{"role": "user", "content": ""}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
    [{"role": "user", "content": "  spaces, a line\nand <tags> & 'quotes' \"too\"  "}],
    [{"role": "user", "content": "Grüße, 你好 👋🏽"}],
    [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
    ],
    [{"role": "assistant", "content": "I speak first."}, {"role": "user", "content": "So you do."}],
]
STRINGS = [
    "",
    " ",
    "Hello world",
    " Hello world",
    "hello  world",
    "a   b    c",
    "   leading and trailing   ",
    "\n",
    "\n\n\n",
    "line one\nline two\r\nline three",
    "\ttabs\t\tand\tspaces \t ",
    "1234567890",
    "3.14159 and -42 and 1,000,000",
    "  12",
    "x1 y22 z333",
    "½ ² Ⅷ ٣ 五",
    "I'm you're we've it'll he'd don't I'M",
    "'s 't're",
    "naïve café résumé",
    "cafe\u0301 (combining accent)",
    "Straße, ÆØÅ, ßẞ",
    "Привет, мир!",
    "你好，世界",
    "こんにちは世界",
    "안녕하세요",
    "مرحبا بالعالم",
    "שלום",
    "हिन्दी",
    "😀",
    "👍🏽 👩‍👩‍👧‍👦 🇫🇷",
    "zero\u200bwidth and nbsp\u00a0here",
    "\ufeffbyte order mark",
    "math: ∑∫√∞ ≤ ≥ ≠ αβγ",
    "def f(x):\n    return x ** 2  # square\n",
    'if (a && b) { s = "q\\n"; }',
    "https://example.org/path?query=1&b=%20#frag",
    "snake_case camelCase PascalCase SCREAMING_CASE kebab-case",
    "...!!!???---___***",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "<|im_start|>user\nHi<|im_end|>\n",
    "<|endoftext|>",
    "text<|im_end|>text <|im_end|> text",
    "<|im_start| >not special<|im_endoftext|>",
    "<repo_name>a<file_sep>b",
    "null\u0000byte",
    "control \u0004 has no token",
    "\U000f0000 private plane",
    "The quick brown fox jumps over the lazy dog.",
    "ﬁ ligature, ǅ titlecase, İ dotted",
    "\u3000ideographic space\u2028line separator\u2029",
]


def field(reader, name):
    return reader.fields[name].contents()


def make_tokenizer(reader, with_special=True):
    """The model's tokenizer, from the GGUF's vocabulary and merges: each digit alone, then GPT-2's byte-level BPE.

    transformers' own conversion of this file leaves the digit split of `tokenizer.ggml.pre = smollm` out.
    """
    tokens = field(reader, "tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in field(reader, "tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    if with_special:
        types = field(reader, "tokenizer.ggml.token_type")
        special = [tokens[index] for index, kind in enumerate(types) if kind == CONTROL_TOKEN]
        tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer


def render(reader, messages, add_generation_prompt):
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=make_tokenizer(reader))
    return wrapped.apply_chat_template(
        messages,
        chat_template=field(reader, "tokenizer.chat_template"),
        add_generation_prompt=add_generation_prompt,
        tokenize=False,
    )


def tokenizer_golden(reader):
    tokenizer, plain = make_tokenizer(reader), make_tokenizer(reader, with_special=False)
    strings = []
    for text in STRINGS:
        ids = tokenizer.encode(text).ids
        entry = {"text": text, "ids": ids, "decoded": tokenizer.decode(ids, skip_special_tokens=False)}
        as_text = plain.encode(text).ids
        if as_text != ids:
            entry["idsWithoutSpecial"] = as_text
        strings.append(entry)
    chats = []
    for messages in RENDERINGS:
        for add_generation_prompt in (True, False):
            text = render(reader, messages, add_generation_prompt)
            chats.append(
                {
                    "messages": messages,
                    "addGenerationPrompt": add_generation_prompt,
                    "text": text,
                    "ids": tokenizer.encode(text).ids,
                }
            )
    return {"template": field(reader, "tokenizer.chat_template"), "strings": strings, "chats": chats}


# ------------------------------------------------------------------------------------------------ weights


def dequantize_q4_1(raw):
    """32 weights in 20 bytes: f16 scale, f16 minimum, 16 bytes whose low nibbles come first."""
    blocks = raw.reshape(-1, 20)
    scale, low = blocks[:, 0:2].copy().view(np.float16), blocks[:, 2:4].copy().view(np.float16)
    nibbles = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1)
    return nibbles.astype(np.float32) * scale.astype(np.float32) + low.astype(np.float32)


def dequantize_q8_0(raw):
    """32 weights in 34 bytes: f16 scale, 32 signed bytes."""
    blocks = raw.reshape(-1, 34)
    return blocks[:, 2:].copy().view(np.int8).astype(np.float32) * blocks[:, 0:2].copy().view(np.float16).astype(np.float32)


def dequantize(tensor):
    """A GGUF tensor as f32 [rows][columns], decoded by this file from its raw bytes."""
    shape = [int(n) for n in reversed(tensor.shape)]
    raw = np.asarray(tensor.data)
    kind = tensor.tensor_type.name
    if kind == "F32":
        return np.array(raw, np.float32).reshape(shape)
    decode = {"Q4_1": dequantize_q4_1, "Q8_0": dequantize_q8_0}[kind]
    return decode(np.ascontiguousarray(raw).view(np.uint8).ravel()).reshape(shape)


def to_half_rotary(weight, heads):
    """GGUF keeps q and k rows so that rotary pairs are neighbours; Hugging Face has the pair (i, i + D/2)."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def check_weights(reader, model):
    """Every tensor of the loaded model must be the file's, bit for bit, under two decoders."""
    heads = {"attn_q": field(reader, "llama.attention.head_count"), "attn_k": field(reader, "llama.attention.head_count_kv")}
    names = {
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    state = model.state_dict()
    counts = {}
    for tensor in reader.tensors:
        counts[tensor.tensor_type.name] = counts.get(tensor.tensor_type.name, 0) + 1
        ours = dequantize(tensor)
        theirs = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(ours.shape)
        assert np.array_equal(ours, theirs), tensor.name
        if tensor.name.startswith("blk."):
            _, layer, part, _ = tensor.name.split(".")
            name = f"model.layers.{layer}.{names[part]}.weight"
            ours = to_half_rotary(ours, heads[part]) if part in heads else ours
        else:
            name = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}[tensor.name]
        assert np.array_equal(ours, state[name].numpy()), tensor.name
    assert torch.equal(state["lm_head.weight"], state["model.embed_tokens.weight"])
    return dict(sorted(counts.items()))


# ------------------------------------------------------------------------------------------------ generation


@torch.inference_mode()
def greedy(model, ids):
    """Greedy continuation. Returns the JSON fields: tokens, log-probabilities, margins, top five of the first step."""
    cache = transformers.DynamicCache()
    step = torch.tensor([ids])
    out = {"tokens": [], "logprobs": [], "margins": []}
    for index in range(GREEDY_TOKENS):
        logits = model(input_ids=step, past_key_values=cache, logits_to_keep=1).logits[0, -1]
        top = torch.topk(logits, 5)
        if index == 0:
            out["top5"] = [{"id": int(i), "logit": round(float(v), 5)} for v, i in zip(top.values, top.indices)]
        token = int(top.indices[0])
        out["tokens"].append(token)
        out["logprobs"].append(round(float(torch.log_softmax(logits, -1)[token]), 6))
        out["margins"].append(round(float(top.values[0] - top.values[1]), 5))
        step = torch.tensor([[token]])
    return out


def prompts(reader, tokenizer):
    """(name, messages or None, text, ids)"""
    article = (HERE / "english.txt").read_text(encoding="utf-8")
    article_ids = tokenizer.encode(article).ids
    for name, text in SHORT_PLAIN.items():
        yield name, None, text, tokenizer.encode(text).ids
    # 128 tokens is a whole residual window at the defaults, 129 one more; 400 spans several windows and prefill chunks.
    for count in (128, 129, 400):
        ids = article_ids[:count]
        text = tokenizer.decode(ids, skip_special_tokens=False)
        assert tokenizer.encode(text).ids == ids
        yield f"article-{count}", None, text, ids
    paragraphs = [line for line in article.split("\n") if len(line) > 100]
    question = "Summarize this text in one sentence.\n\n" + paragraphs[4] + "\n\n" + paragraphs[5]
    long_chat = {"chat-long": [{"role": "user", "content": question}]}
    for name, messages in {**CHATS, **long_chat}.items():
        text = render(reader, messages, True)
        yield name, messages, text, tokenizer.encode(text).ids


def write_json(path, document):
    """JSON with arrays of plain numbers on one line each."""
    text = json.dumps(document, indent=1, ensure_ascii=True)
    number = r"-?\d+(?:\.\d+)?(?:e-?\d+)?"
    text = re.sub(rf"\[\s+({number}(?:,\s+{number})*)\s+\]", lambda m: "[" + re.sub(r",\s+", ",", m[1]) + "]", text)
    text = re.sub(rf'\{{\s+"id": (\d+),\s+"logit": ({number})\s+\}}', r'{"id": \1, "logit": \2}', text)
    assert json.loads(text) == document
    path.write_text(text + "\n", encoding="utf-8")
    print(path.name, len(text), "bytes")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("gguf", type=Path)
    path = parser.parse_args().gguf.resolve()
    torch.set_num_threads(1)
    reader = gguf.GGUFReader(path)
    write_json(HERE / "smollm2-tokenizer.json", tokenizer_golden(reader))

    model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    model.eval()
    counts = check_weights(reader, model)
    print("weights checked:", counts)
    tokenizer = make_tokenizer(reader)
    entries = []
    for name, messages, text, ids in prompts(reader, tokenizer):
        entry = {"name": name, "promptTokens": len(ids), "text": text, "ids": ids, **greedy(model, ids)}
        if messages is not None:
            entry["messages"] = messages
        entry["completion"] = tokenizer.decode(entry["tokens"], skip_special_tokens=False)
        entries.append(entry)
        print(name, len(ids), repr(entry["completion"][:60]), "least margin", min(entry["margins"]))
    document = {
        "model": {
            "file": path.name,
            "bytes": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "tensorTypes": counts,
        },
        "made": {"torch": torch.__version__, "transformers": transformers.__version__, "dtype": "float32"},
        "prompts": entries,
    }
    write_json(HERE / "smollm2.json", document)


if __name__ == "__main__":
    main()
