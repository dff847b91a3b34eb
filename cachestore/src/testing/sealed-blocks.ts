import { createHash } from "node:crypto";
import { mkdtemp } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { blockIds, chainRoot, describeBlock } from "@kivimesh/proto";
import type { StoredBlock } from "../block-store.ts";

const shape = { layers: 2, kvHeads: 2, headDim: 64, blockTokens: 4, residualTokens: 8 };
const modelDigest = new Uint8Array(32).fill(1);

/** A chain of blocks with ids as a worker makes them; payloads are pseudo-random and differ for each block. */
export function chain(name: string, length: number, payloadBytes = 10_000): StoredBlock[] {
  const tenantNamespace = createHash("sha256").update(name).digest();
  const root = chainRoot({ modelDigest, formatId: 3, blockTokens: 4, residualTokens: 8, tenantNamespace });
  const tokens = Array.from({ length: length * 4 }, (_, index) => index);
  const ids = blockIds(root, tokens, 4);
  return ids.map((blockId, index) => {
    const payload = payloadOf(blockId, payloadBytes);
    const parentId = index === 0 ? root : ids[index - 1]!;
    const header = describeBlock({
      formatId: 3,
      modelDigest,
      blockId,
      parentId,
      shape,
      provenance: "prefill",
      payload,
    });
    return { header, payload };
  });
}

/** Bytes that only this block has. */
function payloadOf(blockId: Uint8Array, bytes: number): Uint8Array {
  return new Uint8Array(Buffer.alloc(bytes, blockId));
}

export function idsOf(blocks: readonly StoredBlock[]): Uint8Array[] {
  return blocks.map((block) => block.header.blockId);
}

export function temporaryDirectory(): Promise<string> {
  return mkdtemp(join(tmpdir(), "kivimesh-cachestore-"));
}
