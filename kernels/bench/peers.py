"""What PyTorch does at the shapes of the kernel bench: SDPA with f16 keys and values, cuBLAS, sampling, norms.

Run it on the machine of the bench, right before it: `python3 peers.py [FILTER ...]` prints a JSON line for each shape and writes
`peers.json` (the variable PEERS names another file; $OUT, where set, another folder), which the bench's table is joined with by `key`.

Where several benches share the GPU, the variable GPU_LOCK names a folder that one of them makes while it measures.

Times are medians over CUDA graphs after 0.25 s of the same work, so that clocks are up. Weights rotate over more memory than the chip's cache holds.
"""

import contextlib
import json
import os
import sys
import time

import torch
import torch.nn.functional as F
from torch.nn.attention import bias

DEVICE = "cuda"
HALF = torch.float16
WARM_SECONDS = 0.25
SAMPLES = 7
ROTATE_BYTES = 400e6

# batch, context, heads, KV heads, head size
DECODE = [
    (64, 4096, 32, 32, 128),
    (64, 8192, 32, 8, 128),
    (1, 32768, 32, 32, 128),
    (16, 4096, 32, 8, 128),
    (1, 4096, 32, 32, 128),
    (16, 4096, 32, 32, 128),
    (1, 4096, 32, 8, 128),
    (64, 4096, 32, 8, 128),
    (16, 4096, 9, 3, 64),
    (64, 4096, 9, 3, 64),
    (1, 4096, 9, 3, 64),
    (16, 4096, 71, 1, 64),
    (64, 4096, 71, 1, 64),
    (64, 384, 32, 32, 128),
]
# new tokens, cached tokens, heads, KV heads, head size; one sequence
PREFILL = [
    (4096, 4096, 32, 8, 128),
    (4096, 0, 32, 8, 128),
    (4096, 4096, 32, 32, 128),
    (4096, 0, 32, 32, 128),
    (512, 4096, 32, 8, 128),
    (512, 4096, 32, 32, 128),
]
ROWS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048]
# inputs, outputs, rows
MATMUL = [
    (4096, 11008, ROWS),
    (576, 1536, [1, 2, 4, 8, 16, 64, 512]),
    (4096, 4096, [1, 16, 64, 512, 2048]),
    (4096, 12288, [1, 16, 64, 512, 2048]),
    (4096, 22016, [1, 16, 64, 512, 2048]),
    (4096, 28672, [1, 16, 64, 512, 2048]),
    (11008, 4096, [1, 16, 64, 512, 2048]),
    (14336, 4096, [1, 16, 64, 512, 2048]),
    (4096, 32000, [1, 16, 64]),
    (4096, 128256, [1, 16, 64]),
]
VOCABULARIES = [(64, 128256), (1, 128256), (64, 32000)]

results = {}


@contextlib.contextmanager
def exclusively():
    path = os.environ.get("GPU_LOCK")
    while path:
        try:
            os.mkdir(path)
            break
        except FileExistsError:
            time.sleep(0.02)
    try:
        yield
    finally:
        if path:
            torch.cuda.synchronize()
            os.rmdir(path)


def milliseconds(runs):
    """Median milliseconds of one run; `runs` is a list of functions, each one run with its own buffers."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for run in runs[:3] * 2:
            run()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    started = time.perf_counter()
    runs[0]()
    torch.cuda.synchronize()
    # Enough runs in a graph that its start does not show, few enough that long ones do not take minutes.
    rough = max(time.perf_counter() - started, 2e-6)
    count = max(len(runs), min(40, max(3, round(0.01 / rough))))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(count):
            runs[index % len(runs)]()
    torch.cuda.synchronize()
    deadline = time.perf_counter() + WARM_SECONDS
    while time.perf_counter() < deadline:
        graph.replay()
        torch.cuda.synchronize()
    times = []
    for _ in range(SAMPLES):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / count)
    times.sort()
    return times[len(times) // 2], times[0], times[-1]


def report(key, make, bytes=0, flops=0):
    """Times what `make` returns; a failure is a line that says so."""
    filters = sys.argv[1:]
    if filters and not any(text in key for text in filters):
        return
    try:
        with exclusively():
            median, least, most = milliseconds(make())
        entry = {"key": key, "ms": round(median, 6), "min": round(least, 6), "max": round(most, 6)}
        if bytes:
            entry["gbPerSecond"] = round(bytes / median / 1e6, 1)
        if flops:
            entry["tflops"] = round(flops / median / 1e9, 2)
        results[key] = entry
    except Exception as error:  # a shape that PyTorch refuses must not lose the others
        entry = {"key": key, "error": f"{type(error).__name__}: {str(error)[:200]}"}
    print(json.dumps(entry), flush=True)
    torch.cuda.empty_cache()


def half(*shape):
    return torch.randn(*shape, device=DEVICE, dtype=HALF)


def decode(batch, context, heads, kv_heads, size):
    def make():
        query, key, value = half(batch, heads, 1, size), half(batch, kv_heads, context, size), half(batch, kv_heads, context, size)
        return [lambda: F.scaled_dot_product_attention(query, key, value, enable_gqa=heads != kv_heads)]

    name = f"sdpa decode {batch}x{context} {heads}/{kv_heads} d{size}"
    report(name, make, bytes=batch * context * kv_heads * size * 4)


def prefill(new, cached, heads, kv_heads, size):
    """Causal: new token i sees the cached tokens and new tokens 0 to i. The best of the ways that PyTorch offers."""
    context = new + cached
    mask = None if cached == 0 else bias.causal_lower_right(new, context)

    def grouped():
        query, key, value = half(1, heads, new, size), half(1, kv_heads, context, size), half(1, kv_heads, context, size)
        if mask is None:
            return [lambda: F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=heads != kv_heads)]
        return [lambda: F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=heads != kv_heads)]

    def repeated():
        query, key, value = half(1, heads, new, size), half(1, heads, context, size), half(1, heads, context, size)
        if mask is None:
            return [lambda: F.scaled_dot_product_attention(query, key, value, is_causal=True)]
        return [lambda: F.scaled_dot_product_attention(query, key, value, attn_mask=mask)]

    pairs = new * cached + new * (new + 1) // 2
    name = f"sdpa prefill {new}+{cached} {heads}/{kv_heads} d{size}"
    ways = {"grouped": grouped} if heads == kv_heads else {"grouped": grouped, "repeated": repeated}
    for way, make in ways.items():
        report(f"{name} {way}", make, flops=4 * heads * size * pairs)
    found = [results[f"{name} {way}"] for way in ways if f"{name} {way}" in results]
    if found:
        results[name] = {**min(found, key=lambda entry: entry["ms"]), "key": name}
        print(json.dumps(results[name]), flush=True)


def matmul(rows, inputs, outputs):
    def make():
        count = max(1, min(256, round(ROTATE_BYTES / (2 * inputs * outputs))))
        value, weights = half(rows, inputs), [half(outputs, inputs) * inputs**-0.5 for _ in range(count)]
        result = torch.empty(rows, outputs, device=DEVICE, dtype=HALF)
        return [lambda weight=weight: torch.matmul(value, weight.t(), out=result) for weight in weights]

    report(f"matmul f16 M={rows} {inputs}->{outputs}", make, bytes=2 * inputs * outputs, flops=2 * rows * inputs * outputs)


def sample(rows, vocabulary):
    def with_logits(run):
        def make():
            logits = torch.randn(rows, vocabulary, device=DEVICE) * 3
            return [lambda: run(logits)]

        return make

    def draw(probabilities):
        # torch.multinomial waits for the host; this is what serving engines do instead.
        return torch.argmax(probabilities / torch.empty_like(probabilities).exponential_(), -1, keepdim=True)

    def top_k_top_p(logits):
        values, indices = torch.topk(logits / 0.8, 40)
        probabilities = torch.softmax(values, -1)
        probabilities.masked_fill_(torch.cumsum(probabilities, -1) - probabilities > 0.95, 0)
        return indices.gather(-1, draw(probabilities))

    def top_p(logits):
        values, indices = torch.sort(logits / 0.8, descending=True)
        probabilities = torch.softmax(values, -1)
        probabilities.masked_fill_(torch.cumsum(probabilities, -1) - probabilities > 0.95, 0)
        return indices.gather(-1, draw(probabilities))

    ways = {
        "greedy": lambda logits: torch.argmax(logits, -1),
        "temperature": lambda logits: draw(torch.softmax(logits / 0.8, -1)),
        "top-k": top_k_top_p,
        "top-p": top_p,
    }
    for way, run in ways.items():
        report(f"sample {rows}x{vocabulary} {way}", with_logits(run), bytes=rows * vocabulary * 4)


def elementwise(rows, hidden, feed_forward):
    def norm():
        value, weight = half(rows, hidden), half(hidden)
        return [lambda: F.rms_norm(value, (hidden,), weight, 1e-5)]

    def silu():
        gate, up = half(rows, feed_forward), half(rows, feed_forward)
        return [lambda: F.silu(gate) * up]

    report(f"rms-norm f16 {rows}x{hidden}", norm, bytes=rows * hidden * 4)
    report(f"silu-mul f16 {rows}x{feed_forward}", silu, bytes=rows * feed_forward * 6)


def copy():
    def make():
        source = torch.empty(2**30, device=DEVICE, dtype=torch.uint8)
        target = torch.empty_like(source)
        return [lambda: target.copy_(source)]

    report("copy", make, bytes=2 * 2**30)


def save():
    name = os.environ.get("PEERS") or os.path.join(os.environ.get("OUT", "."), "peers.json")
    versions = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": torch.version.cuda}
    with open(name, "w", encoding="utf-8") as file:
        json.dump({**versions, "peers": results}, file, indent=1)


def main():
    print(json.dumps({"device": torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": torch.version.cuda}), flush=True)
    copy()
    for shape in DECODE:
        decode(*shape)
    for shape in PREFILL:
        prefill(*shape)
    save()
    for inputs, outputs, rows in MATMUL[:2]:
        for count in rows:
            matmul(count, inputs, outputs)
    for shape in VOCABULARIES[:1]:
        sample(*shape)
    save()
    for inputs, outputs, rows in MATMUL[2:]:
        for count in rows:
            matmul(count, inputs, outputs)
    for shape in VOCABULARIES[1:]:
        sample(*shape)
    for rows in (1, 64, 2048):
        elementwise(rows, 4096, 11008)
    save()


main()
