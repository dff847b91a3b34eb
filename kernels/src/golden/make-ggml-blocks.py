"""Writes ggml-blocks.json: random blocks of each ggml type as bytes, and what the `gguf` package (0.19.0) decodes them to.

Run with `pip install gguf numpy`, in this folder. The seed is fixed, so the file only changes with the package.
"""

import base64
import json

import gguf
import numpy as np

ELEMENTS = 512
HALF_FIELDS = {
    "F16": [0],
    "Q4_0": [0],
    "Q4_1": [0, 2],
    "Q5_0": [0],
    "Q5_1": [0, 2],
    "Q8_0": [0],
    "Q4_K": [0, 2],
    "Q5_K": [0, 2],
    "Q6_K": [208],
}


def encode(array):
    return base64.b64encode(array.tobytes()).decode()


def main():
    random = np.random.default_rng(20261123)
    golden = {}
    for name, fields in HALF_FIELDS.items():
        kind = gguf.GGMLQuantizationType[name]
        block_elements, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        blocks = random.integers(0, 256, (ELEMENTS // block_elements, block_bytes), dtype=np.uint8)
        for field in fields:
            halves = random.normal(0, 1, len(blocks)).astype("<f2")
            blocks[:, field : field + 2] = halves.view(np.uint8).reshape(-1, 2)
        values = gguf.quants.dequantize(blocks.view(np.float16) if name == "F16" else blocks, kind)
        golden[name] = {"bytes": encode(blocks), "values": encode(values.astype("<f4").reshape(-1))}
    with open("ggml-blocks.json", "w") as file:
        json.dump(golden, file, indent=1)
        file.write("\n")


main()
