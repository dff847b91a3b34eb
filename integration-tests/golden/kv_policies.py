"""Perplexity of SmolLM2 under each KV format's policy: an f32 simulation in PyTorch, for kernels to be measured against.

    python kv_policies.py path/to/SmolLM2-135M-Instruct.Q4_1.gguf

The model is written out here, from the GGUF's tensors. Per layer, K and V of a whole window are computed, rounded to f16, quantized and
dequantized; a query at position t then reads the dequantized tokens before its frontier floor(t / R) * R, and the f16
ones from there to itself. README.md describes kv_policies.json.
"""

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

import gguf
import torch
import torch.nn.functional as nn

from make_golden import dequantize, field, make_tokenizer, write_json

HERE = Path(__file__).parent
CONTEXT = 1536
RESIDUAL = 128
GROUP = 32
HEAD_ROWS = 256  # positions whose logits are held at once


@dataclass(frozen=True)
class Format:
    key_bits: int
    value_bits: int
    rotated: bool = False


FORMATS = {
    "f16": Format(16, 16),
    "kivi4": Format(4, 4),
    "kivi2": Format(2, 2),
    "kivi4r": Format(4, 4, rotated=True),
    "kivi2r": Format(2, 2, rotated=True),
    "kivi-k4v2": Format(4, 2),
    "kivi-k2v4": Format(2, 4),
    "kivi-k4v2r": Format(4, 2, rotated=True),
}


# ------------------------------------------------------------------------------------------------ the quantizer


def round_to_half(x):
    return x.half().float()


def through_codes(groups, bits):
    """Quantizes along the last axis and dequantizes again."""
    top = 2**bits - 1
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    zero, scale = round_to_half(low), round_to_half((high - low) / top)
    divisor = torch.where(scale > 0, scale, torch.ones_like(scale))
    codes = torch.where(scale > 0, torch.round((groups - zero) / divisor).clamp(0, top), torch.zeros_like(groups))
    return codes * scale + zero


def hadamard(size):
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / math.sqrt(size)


def sealed(keys, values, form):
    """K and V [tokens][kvHeads][headDim] as attention reads them once they are sealed."""
    if form.key_bits == 16:
        return keys, values
    tokens, heads, dim = keys.shape
    rotation = hadamard(dim) if form.rotated else torch.eye(dim)
    norms = torch.ones(tokens, 1, 1)
    if form.rotated:
        norms = round_to_half(keys.pow(2).mean((1, 2), keepdim=True).sqrt())
    keys, values = keys @ rotation / norms, values @ rotation
    by_channel = keys.view(tokens // GROUP, GROUP, heads, dim).permute(0, 2, 3, 1)
    keys = through_codes(by_channel, form.key_bits).permute(0, 3, 1, 2).reshape(tokens, heads, dim)
    by_token = values.reshape(tokens, heads, dim // GROUP, GROUP)
    values = through_codes(by_token, form.value_bits).view(tokens, heads, dim)
    return keys * norms @ rotation.T, values @ rotation.T


# ------------------------------------------------------------------------------------------------ the model


class Model:
    """Llama in f32 from a GGUF file, rotary pairs interleaved as GGUF keeps them."""

    def __init__(self, reader):
        self.layers = field(reader, "llama.block_count")
        self.heads = field(reader, "llama.attention.head_count")
        self.kv_heads = field(reader, "llama.attention.head_count_kv")
        self.dim = field(reader, "llama.rope.dimension_count")
        self.epsilon = field(reader, "llama.attention.layer_norm_rms_epsilon")
        self.theta = field(reader, "llama.rope.freq_base")
        self.weights = {tensor.name: torch.from_numpy(dequantize(tensor)) for tensor in reader.tensors}

    def norm(self, x, name):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.epsilon) * self.weights[name]

    def rotary(self, x):
        """x [tokens][heads][dim], the pair (2i, 2i + 1) turned by position * theta^(-2i/dim)."""
        tokens, heads, dim = x.shape
        frequency = self.theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        angle = torch.arange(tokens, dtype=torch.float64)[:, None] * frequency
        cos, sin = angle.cos().float()[:, None], angle.sin().float()[:, None]
        even, odd = x[..., 0::2], x[..., 1::2]
        return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).view(tokens, heads, dim)

    def attention(self, q, keys, values, form):
        """q [tokens][heads][dim] over f16-rounded K and V under the format's policy -> [tokens][heads * dim]."""
        keys, values = round_to_half(keys), round_to_half(values)
        old_keys, old_values = sealed(keys, values, form)
        share = self.heads // self.kv_heads
        out = torch.empty_like(q)
        for start in range(0, len(q), RESIDUAL):
            end = start + RESIDUAL
            k = torch.cat([old_keys[:start], keys[start:end]]).repeat_interleave(share, 1).transpose(0, 1)
            v = torch.cat([old_values[:start], values[start:end]]).repeat_interleave(share, 1).transpose(0, 1)
            scores = q[start:end].transpose(0, 1) @ k.transpose(1, 2) / math.sqrt(self.dim)
            scores[:, :, start:].masked_fill_(torch.ones(RESIDUAL, RESIDUAL).triu(1).bool(), -torch.inf)
            out[start:end] = (scores.softmax(-1) @ v).transpose(0, 1)
        return out.flatten(1)

    def hidden(self, ids, form):
        """Final hidden states [tokens][hidden], teacher forced."""
        w = self.weights
        x = w["token_embd.weight"][ids]
        for layer in range(self.layers):
            p = f"blk.{layer}."
            h = self.norm(x, p + "attn_norm.weight")
            q = self.rotary((h @ w[p + "attn_q.weight"].T).view(len(ids), self.heads, self.dim))
            k = self.rotary((h @ w[p + "attn_k.weight"].T).view(len(ids), self.kv_heads, self.dim))
            v = (h @ w[p + "attn_v.weight"].T).view(len(ids), self.kv_heads, self.dim)
            x = x + self.attention(q, k, v, form) @ w[p + "attn_output.weight"].T
            h = self.norm(x, p + "ffn_norm.weight")
            inner = nn.silu(h @ w[p + "ffn_gate.weight"].T) * (h @ w[p + "ffn_up.weight"].T)
            x = x + inner @ w[p + "ffn_down.weight"].T
        return self.norm(x, "output_norm.weight")

    def logits(self, hidden):
        return hidden @ self.weights["token_embd.weight"].T


# ------------------------------------------------------------------------------------------------ perplexity


@torch.inference_mode()
def score(model, ids, form):
    """(negative log-likelihood of each token after the first, in f64; best token at each of those positions)"""
    hidden = model.hidden(ids, form)[:-1]
    losses, best = [], []
    for start in range(0, len(hidden), HEAD_ROWS):
        logits = model.logits(hidden[start : start + HEAD_ROWS])
        targets = ids[1 + start : 1 + start + len(logits)]
        losses.append(nn.cross_entropy(logits, targets, reduction="none").double())
        best.append(logits.argmax(-1))
    return torch.cat(losses), torch.cat(best)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("gguf", type=Path)
    reader = gguf.GGUFReader(parser.parse_args().gguf)
    torch.set_num_threads(1)
    ids = torch.tensor(make_tokenizer(reader).encode((HERE / "english.txt").read_text(encoding="utf-8")).ids)
    windows = [ids[start : start + CONTEXT] for start in range(0, len(ids) - CONTEXT + 1, CONTEXT)]
    model = Model(reader)
    formats, exact, exact_best = {}, None, None
    for name, form in FORMATS.items():
        losses, best = zip(*(score(model, window, form) for window in windows))
        perplexity = math.exp(torch.cat(losses).mean())
        if exact is None:
            exact, exact_best = perplexity, torch.cat(best)
        formats[name] = {
            "perplexity": round(perplexity, 5),
            "tokens": sum(len(window) for window in losses),
            "relativeToF16": round(perplexity / exact - 1, 6),
            "top1Agreement": round((torch.cat(best) == exact_best).double().mean().item(), 5),
            "windows": [round(math.exp(window.mean()), 5) for window in losses],
        }
        print(name, formats[name], flush=True)
    settings = {"text": "english.txt", "textTokens": len(ids), "context": CONTEXT, "residualTokens": RESIDUAL, "groupSize": GROUP}
    write_json(HERE / "kv_policies.json", {**settings, "formats": formats})


if __name__ == "__main__":
    main()
