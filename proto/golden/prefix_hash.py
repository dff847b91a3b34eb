"""Prints the vectors of src/prefix-hash.test.ts, computed from the definition alone."""

import hashlib
import hmac
import struct


def namespace(secret: bytes, tenant: bytes, salt: bytes = b"") -> bytes:
    return hmac.new(secret, tenant + b"\0" + salt, hashlib.sha256).digest()


def root(digest: bytes, format_id: int, block_tokens: int, residual_tokens: int, tenant: bytes) -> bytes:
    numbers = struct.pack("<III", format_id, block_tokens, residual_tokens)
    return hashlib.sha256(b"kivimesh/chain/1" + digest + numbers + tenant).digest()


def chain(parent: bytes, tokens: list[int], block_tokens: int) -> list[bytes]:
    ids = []
    for start in range(0, len(tokens) - block_tokens + 1, block_tokens):
        block = tokens[start : start + block_tokens]
        parent = hashlib.sha256(parent + struct.pack(f"<{block_tokens}I", *block)).digest()
        ids.append(parent)
    return ids


default = namespace(b"kivimesh-local", b"default")
model = bytes(range(32))
print("namespace", default.hex())
print("salted   ", namespace(b"kivimesh-local", b"default", b"salt").hex())
print("root 128 ", root(model, 0x00020203, 128, 128, default).hex())
small = root(model, 7, 4, 8, default)
print("root 4   ", small.hex())
for block_id in chain(small, [0, 1, 2, 3, 4, 5, 6, 7, 8, 0xFFFFFFFF], 4):
    print("block    ", block_id.hex())
print("extremes ", chain(small, [0xFFFFFFFF, 70000], 2)[0].hex())
