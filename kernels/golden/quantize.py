"""Golden vectors of the KIVI quantizer, made from its formula with NumPy alone.

Run `python quantize.py` in this folder: it writes quantize.json (see README.md for the file's format). The seed is
fixed, so the output is the same each time. Nothing here is shared with the TypeScript or WGSL code: that is the point.

The quantizer (KIVI, arXiv 2402.02750), per group of 32 elements x and b bits:

    zero  = f16(min x)
    scale = f16((max x - min x) / (2^b - 1))        the division in f32; both roundings to nearest, ties to even
    code  = clamp(roundHalfEven((x - zero) / scale), 0, 2^b - 1)      f32, against the *rounded* scale and zero
    x'    = code * scale + zero

A group whose rounded scale is 0 has only codes 0. The rotated variant first multiplies K and V of each head by the
orthonormal Hadamard matrix and divides each K token by one f16 norm (see `rotate_page`).
"""

import json
from pathlib import Path

import numpy as np

GROUP = 32
SEED = 20260601
# No golden decision (rounding of a scale, a zero or a norm to f16, rounding of a quotient to a code) may lie closer to
# its tie than this share of the magnitudes that went into it: 16 units in the last place of f32. Any order of f32
# additions over these sizes and any division good to a few units then gives the same answer.
MARGIN = 16 * 2.0**-23


# ------------------------------------------------------------------------------------------------ the formula


def quantize_group(x, bits):
    """Quantizes f32 values along the last axis (a group each). Returns (scale f16, zero f16, codes u8)."""
    x = np.asarray(x, np.float32)
    top = np.float32(2**bits - 1)
    low, high = x.min(-1), x.max(-1)
    zero = low.astype(np.float16)
    scale = ((high - low) / top).astype(np.float16)
    divisor = np.where(scale > 0, scale, np.float16(1)).astype(np.float32)[..., None]
    quotient = (x - zero.astype(np.float32)[..., None]) / divisor
    codes = np.clip(np.rint(quotient), 0, top).astype(np.uint8)
    codes[np.broadcast_to((scale == 0)[..., None], codes.shape)] = 0
    return scale, zero, codes


def dequantize_group(scale, zero, codes):
    """code * scale + zero in f32. The product is exact, so a fused multiply-add gives the same bits."""
    return codes.astype(np.float32) * scale.astype(np.float32)[..., None] + zero.astype(np.float32)[..., None]


def hadamard(size):
    """Orthonormal Hadamard matrix in natural (Sylvester) order: H[i][j] = (-1)^popcount(i & j) / sqrt(size)."""
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix / np.sqrt(size)


def rotate_page(keys, values):
    """[tokens][heads][dim] -> (norms f16 [tokens], keys to quantize, values to quantize), in f64.

    One norm a token over all KV heads: f16(sqrt(mean(k^2))). It is the same before and after the rotation. A token whose
    rounded norm is 0 has normalized keys of 0.
    """
    matrix = hadamard(keys.shape[-1])
    norms = np.sqrt((keys.astype(np.float64) ** 2).mean((1, 2))).astype(np.float16)
    rotated_keys = keys.astype(np.float64) @ matrix
    divisor = np.where(norms > 0, norms, np.float16(1)).astype(np.float64)[:, None, None]
    rotated_keys = np.where((norms > 0)[:, None, None], rotated_keys / divisor, 0.0)
    return norms, rotated_keys, values.astype(np.float64) @ matrix


def key_groups(keys):
    """[tokens][heads][dim] -> [tokens/32][heads][dim][32]: per channel, over 32 consecutive tokens."""
    tokens, heads, dim = keys.shape
    return keys.reshape(tokens // GROUP, GROUP, heads, dim).transpose(0, 2, 3, 1)


def value_groups(values):
    """[tokens][heads][dim] -> [tokens][heads][dim/32][32]: per token, over 32 consecutive channels."""
    tokens, heads, dim = values.shape
    return values.reshape(tokens, heads, dim // GROUP, GROUP)


def ungroup_keys(groups):
    """The inverse of `key_groups`."""
    windows, heads, dim, _ = groups.shape
    return groups.transpose(0, 3, 1, 2).reshape(windows * GROUP, heads, dim)


# ------------------------------------------------------------------------------------------------ robustness


def half_tie_distance(x):
    """Distance of |x| to the nearest tie of rounding to f16 (the midpoint of two neighbouring halves)."""
    x = np.abs(np.asarray(x, np.float64))
    exponent = np.clip(np.floor(np.log2(np.maximum(x, 2.0**-14))), -14, 15)
    unit = 2.0 ** (exponent - 10)
    return np.abs(x / unit - np.floor(x / unit) - 0.5) * unit


def is_robust(x, bits, exact_input):
    """Per group: True where no rounding decision is near a tie. `exact_input`: x itself carries no rounding error."""
    x = np.asarray(x, np.float64)
    top = 2**bits - 1
    low, high, biggest = x.min(-1), x.max(-1), np.abs(x).max(-1)
    noise = 0.0 if exact_input else MARGIN * biggest
    scale, zero, _ = quantize_group(x.astype(np.float32), bits)
    good = (low == zero) & exact_input | (half_tie_distance(low) > noise)
    good &= half_tie_distance((high - low) / top) > (2 * noise + MARGIN * (high - low)) / top
    good &= scale > 0
    step = np.where(scale > 0, scale, 1).astype(np.float64)[..., None]
    quotient = (x - zero.astype(np.float64)[..., None]) / step
    tie = np.abs(quotient - np.floor(quotient) - 0.5)
    allowed = (noise / step[..., 0])[..., None] + MARGIN * np.maximum(np.abs(quotient), 1)
    return good & (tie > allowed).all(-1)


def robust_groups(draw, count, attempts=1000):
    """Draws `count` groups from draw(n) -> [n][32] f16 values, keeping those that are robust at 2 and at 4 bits."""
    kept = np.empty((0, GROUP), np.float16)
    for _ in range(attempts):
        fresh = draw(count)
        good = is_robust(fresh, 2, True) & is_robust(fresh, 4, True)
        kept = np.concatenate([kept, fresh[good]])[:count]
        if len(kept) == count:
            return kept
    raise RuntimeError("no robust groups: the distribution is too coarse")


# ------------------------------------------------------------------------------------------------ text encoding


def hex16(x):
    return "".join(f"{v:04x}" for v in np.asarray(x, np.float16).ravel().view(np.uint16))


def hex32(x):
    return "".join(f"{v:08x}" for v in np.asarray(x, np.float32).ravel().view(np.uint32))


def digits(codes):
    return "".join("0123456789abcdef"[c] for c in codes.ravel())


# ------------------------------------------------------------------------------------------------ single groups


def fill(*start, rest=0.0):
    """A group that begins with `start` and is `rest` elsewhere."""
    group = np.full(GROUP, rest, np.float64)
    group[: len(start)] = start
    return group


def edge_groups(random):
    """(name, strict, values) of hand-made groups. Not strict: a device division off by one unit may change a result."""
    tiny = 2.0**-24
    k = np.arange(GROUP)
    yield "ramp of 16 steps", True, k % 16 / 4.0
    yield "ramp of 4 steps", True, (k % 4) - 1.5
    yield "ties at 2 bits, scale 1", True, fill(0, 3, 0.5, 1.5, 2.5, 1, 2)
    yield "ties at 2 bits, scale 1/16, zero -1", True, -1 + fill(0, 3, 0.5, 1.5, 2.5, 1, 2) / 16
    yield "ties at 4 bits, scale 1", True, np.where(k < 16, k, np.minimum(k - 15.5, 14.5))
    yield "ties at 4 bits, scale 4, zero -30", True, -30 + 4 * np.where(k < 16, k, np.minimum(k - 15.5, 14.5))
    for value in (0.0, 1.5, -0.099975586, 65504.0, -65504.0, tiny, -tiny):
        yield f"constant {value!r}", True, np.full(GROUP, value)
    yield "constant not a half", True, np.full(GROUP, np.float32(0.1))
    yield "largest halves alternate", True, np.where(k % 2, 65504.0, -65504.0)
    yield "largest halves and zeros", True, fill(65504, -65504)
    yield "one outlier", True, fill(6.0)
    yield "one negative outlier", True, fill(0, 0, -6.0, rest=0.015625)
    yield "all negative", True, -1.0 - (k % 8) * 0.375
    for steps in (1, 2, 3, 4, 5, 15, 16, 1000):
        yield f"subnormal, range {steps} units", True, fill(steps, 1 if steps > 1 else 0) * tiny
    yield "subnormal below 0", True, fill(-7, 8, 3, -2) * tiny
    yield "zero rounds up past the minimum", True, np.maximum(1 + 0.75 * 2.0**-10, 1 + k * 2.0**-12)
    yield "zero rounds down", True, 1 + 0.25 * 2.0**-10 + (k % 7) / 8.0
    yield "scale rounds to even, down", False, fill(3 * (1 + 2.0**-11), 1, 2)
    yield "scale rounds to even, up", False, fill(3 * (1 + 3 * 2.0**-11), 1, 2)
    yield "scale rounds to even, down (4 bits)", False, fill(15 * (1 + 2.0**-11), 1, 2, 7.25)
    for spread in (1e-3, 1.0, 100.0, 8000.0):
        half = robust_groups(lambda n: (random.standard_normal((n, GROUP)) * spread).astype(np.float16), 3)
        for index, group in enumerate(half):
            yield f"normal halves x {spread:g} #{index}", True, group
        for index in range(3):
            group = (random.standard_normal(GROUP) * spread + spread / 2).astype(np.float32)
            while not (is_robust(group[None], 2, False) & is_robust(group[None], 4, False)).all():
                group = (random.standard_normal(GROUP) * spread + spread / 2).astype(np.float32)
            yield f"normal f32 x {spread:g} #{index}", True, group


def make_groups(random):
    out = []
    for name, strict, values in edge_groups(random):
        x = np.asarray(values, np.float32)
        for bits in (2, 4):
            scale, zero, codes = quantize_group(x, bits)
            out.append(
                {
                    "name": name,
                    "bits": bits,
                    "strict": strict,
                    "input": hex32(x),
                    "scale": hex16(scale),
                    "zero": hex16(zero),
                    "codes": digits(codes),
                }
            )
    return out


def make_non_finite():
    """Inputs that must be refused, never quantized."""
    k = np.arange(GROUP) / 8.0
    cases = []
    for name, value in (("NaN", np.nan), ("+infinity", np.inf), ("-infinity", -np.inf)):
        for place in (0, 17, 31):
            group = k.copy()
            group[place] = value
            cases.append({"name": f"{name} at {place}", "input": hex16(group)})
    return cases


# ------------------------------------------------------------------------------------------------ whole pages


def page_vectors(name, keys, values, rotated):
    """The JSON entry of one page: its f16 inputs and what the 2-bit and the 4-bit format make of it."""
    tokens, heads, dim = keys.shape
    entry = {
        "name": name,
        "rotated": rotated,
        "tokens": tokens,
        "kvHeads": heads,
        "headDim": dim,
        "keys": hex16(keys),
        "values": hex16(values),
    }
    k, v = keys.astype(np.float32), values.astype(np.float32)
    norms = np.ones(tokens, np.float16)
    if rotated:
        norms, k, v = rotate_page(keys, values)
        entry["keyNorms"] = hex16(norms)
    for bits in (2, 4):
        k_scale, k_zero, k_codes = quantize_group(key_groups(k), bits)
        v_scale, v_zero, v_codes = quantize_group(value_groups(v), bits)
        decoded_k = ungroup_keys(dequantize_group(k_scale, k_zero, k_codes)).astype(np.float64)
        decoded_v = dequantize_group(v_scale, v_zero, v_codes).reshape(values.shape).astype(np.float64)
        if rotated:
            matrix = hadamard(dim)
            decoded_k = (decoded_k * norms.astype(np.float64)[:, None, None]) @ matrix.T
            decoded_v = decoded_v @ matrix.T
        entry[f"bits{bits}"] = {
            "keyScales": hex16(k_scale),
            "keyZeros": hex16(k_zero),
            "keyCodes": digits(ungroup_keys(k_codes)),
            "valueScales": hex16(v_scale),
            "valueZeros": hex16(v_zero),
            "valueCodes": digits(v_codes),
            "decodedTokens": [0, tokens - 1],
            "decodedKeys": hex32(decoded_k[[0, tokens - 1]]),
            "decodedValues": hex32(decoded_v[[0, tokens - 1]]),
        }
    return entry


def plain_page(random, name, tokens, heads, dim):
    """Channel outliers in K, token outliers in V, as models have them."""

    def draw_keys(n):
        offset = random.standard_normal((n, 1)) * np.where(random.random((n, 1)) < 0.1, 12, 1)
        return (offset + random.standard_normal((n, GROUP))).astype(np.float16)

    def draw_values(n):
        return (random.standard_normal((n, GROUP)) * random.uniform(0.05, 3, (n, 1))).astype(np.float16)

    keys = robust_groups(draw_keys, tokens // GROUP * heads * dim).reshape(tokens // GROUP, heads, dim, GROUP)
    values = robust_groups(draw_values, tokens * heads * dim // GROUP).reshape(tokens, heads, dim)
    return page_vectors(name, ungroup_keys(keys), values, rotated=False)


def dyadic(random, shape, spread):
    """Small multiples of 1/16: sums of 128 of them and of their products by +-1 are exact in f32, in any order."""
    return np.clip(np.rint(random.standard_normal(shape) * spread * 16), -512, 512) / 16


def norms_are_robust(keys):
    norms = np.sqrt((keys**2).mean((1, 2)))
    return (half_tie_distance(norms) > MARGIN * norms) | (norms == 0)


def fragile_key_groups(keys):
    """How many groups of this window of 32 tokens are too near a tie; every group if a norm is."""
    groups = key_groups(rotate_page(keys.astype(np.float16), keys)[1])
    good = is_robust(groups, 2, False) & is_robust(groups, 4, False)
    return int((~good).sum()) if norms_are_robust(keys).all() else good.size


def robust_rotated_keys(random, heads, dim, zero_token):
    """32 tokens with channel outliers and very different norms (a sink first). Tokens are redrawn until all is robust."""
    token_size = np.exp2(random.uniform(-1, 1, GROUP))
    token_size[0] = 0.25
    token_size[5] = 4
    offset = dyadic(random, (heads, dim), 0.5) * (random.random((heads, dim)) < 0.2) * 6

    def draw_token(token):
        row = np.rint((dyadic(random, (heads, dim), 1) + offset) * token_size[token] * 16) / 16
        return np.zeros_like(row) if token == zero_token else row

    keys = np.stack([draw_token(token) for token in range(GROUP)])
    fragile = fragile_key_groups(keys)
    for _ in range(20000):
        if fragile == 0:
            return keys
        token = random.integers(GROUP)
        kept = keys[token].copy()
        keys[token] = draw_token(token)
        now = fragile_key_groups(keys)
        if now <= fragile:
            fragile = now
        else:
            keys[token] = kept
    raise RuntimeError("no robust keys")


def rotated_page(random, name, tokens, heads, dim, zero_token=None):
    """A page whose Hadamard products are exact in f32 up to the factor 1/sqrt(dim)."""
    windows = [robust_rotated_keys(random, heads, dim, zero_token) for _ in range(tokens // GROUP)]
    keys = np.concatenate(windows)
    values = np.zeros((tokens, heads, dim))
    for token in range(tokens):
        for _ in range(5000):
            values[token] = dyadic(random, (heads, dim), random.uniform(0.3, 2))
            groups = value_groups(values[token : token + 1] @ hadamard(dim))
            if (is_robust(groups, 2, False) & is_robust(groups, 4, False)).all():
                break
        else:
            raise RuntimeError(f"{name}: no robust values")
    assert (keys.astype(np.float16) == keys).all() and (values.astype(np.float16) == values).all()
    return page_vectors(name, keys.astype(np.float16), values.astype(np.float16), rotated=True)


def main():
    random = np.random.default_rng(SEED)
    document = {
        "comment": "Made by quantize.py. README.md describes the format.",
        "groupSize": GROUP,
        "groups": make_groups(random),
        "nonFinite": make_non_finite(),
        "pages": [
            plain_page(random, "plain 32 tokens, 2 heads of 64", 32, 2, 64),
            plain_page(random, "plain 128 tokens, 1 head of 32", 128, 1, 32),
            rotated_page(random, "rotated 32 tokens, 3 heads of 64", 32, 3, 64),
            rotated_page(random, "rotated 64 tokens, 2 heads of 32", 64, 2, 32),
            rotated_page(random, "rotated 32 tokens, 1 head of 128", 32, 1, 128),
            rotated_page(random, "rotated 32 tokens, 1 head of 32, token 9 all zero", 32, 1, 32, zero_token=9),
        ],
    }
    body = json.dumps(document, indent=1)
    Path(__file__).with_name("quantize.json").write_text(body + "\n", encoding="utf-8")
    print(f"{len(document['groups'])} groups, {len(document['pages'])} pages, {len(body)} bytes")


if __name__ == "__main__":
    main()
