import { clone, fromBinary, toBinary } from "@bufbuild/protobuf";
import fc from "fast-check";
import { describe, expect, it } from "vitest";
import type { ErrorCode } from "./error-catalogue.ts";
import { ClusterError } from "./errors.ts";
import { type KvBlockHeader, KvBlockHeaderSchema } from "./gen/kivimesh/v1/kv_block_pb.ts";
import {
  blockChunks,
  collectBlock,
  collectBlocks,
  describeBlock,
  type ExpectedKvBlock,
  type KvBlockPart,
  kvBlockMagic,
  verifyBlock,
  verifyPayload,
} from "./kv-block.ts";

const shape = { layers: 2, kvHeads: 3, headDim: 64, blockTokens: 32, residualTokens: 128 };
const expected: ExpectedKvBlock = {
  modelDigest: new Uint8Array(32).fill(1),
  formatId: 9,
  blockId: new Uint8Array(32).fill(2),
  parentId: new Uint8Array(32).fill(3),
  shape,
};
const payload = Uint8Array.from({ length: 2500 }, (_, index) => (index * 31) % 256);

function block(bytes: Uint8Array = payload): KvBlockHeader {
  return describeBlock({ ...expected, provenance: "prefill", payload: bytes });
}

function codeOf(action: () => void): ErrorCode | "none" {
  try {
    action();
    return "none";
  } catch (error) {
    expect(error).toBeInstanceOf(ClusterError);
    return (error as ClusterError).code;
  }
}

describe("verifyBlock", () => {
  it("accepts a block as it was described, also after the wire", () => {
    const header = fromBinary(KvBlockHeaderSchema, toBinary(KvBlockHeaderSchema, block()));
    expect(header.magic).toBe(kvBlockMagic);
    expect(Buffer.from(toBinary(KvBlockHeaderSchema, header)).subarray(1, 5).toString("latin1")).toBe("KVM1");
    verifyBlock(header, payload, expected);
  });

  const changes: [name: string, change: (header: KvBlockHeader) => void, code: ErrorCode][] = [
    ["magic", (header) => header.magic++, "KV_BLOCK_CORRUPT"],
    ["version", (header) => header.version++, "KV_BLOCK_CORRUPT"],
    ["formatId", (header) => header.formatId++, "MODEL_MISMATCH"],
    ["modelDigest", (header) => flip(header, "modelDigest"), "MODEL_MISMATCH"],
    ["blockId", (header) => flip(header, "blockId"), "KV_BLOCK_CORRUPT"],
    ["parentId", (header) => flip(header, "parentId"), "KV_BLOCK_CORRUPT"],
    ["a short id", (header) => Object.assign(header, { blockId: new Uint8Array(31) }), "KV_BLOCK_CORRUPT"],
    ["layers", (header) => header.layers++, "MODEL_MISMATCH"],
    ["kvHeads", (header) => header.kvHeads--, "MODEL_MISMATCH"],
    ["headDim", (header) => header.headDim++, "MODEL_MISMATCH"],
    ["blockTokens", (header) => header.blockTokens++, "MODEL_MISMATCH"],
    ["residualTokens", (header) => header.residualTokens++, "MODEL_MISMATCH"],
    ["a size of 0", (header) => Object.assign(header, { layers: 0 }), "KV_BLOCK_CORRUPT"],
    ["provenance", (header) => Object.assign(header, { provenance: 0 }), "KV_BLOCK_CORRUPT"],
    ["payloadBytes", (header) => header.payloadBytes++, "KV_BLOCK_CORRUPT"],
    ["a giant payload", (header) => Object.assign(header, { payloadBytes: 1n << 40n }), "KV_BLOCK_CORRUPT"],
    ["crc32", (header) => Object.assign(header, { crc32: (header.crc32 ^ 1) >>> 0 }), "KV_BLOCK_CORRUPT"],
  ];

  it.each(changes)("refuses a wrong %s", (_, change, code) => {
    const header = clone(KvBlockHeaderSchema, block());
    change(header);
    expect(codeOf(() => verifyBlock(header, payload, expected))).toBe(code);
  });

  it("refuses every flipped bit and every truncation of the payload", () => {
    const header = block();
    fc.assert(
      fc.property(fc.nat(payload.length - 1), fc.nat(7), (index, bit) => {
        const damaged = payload.slice();
        damaged[index]! ^= 1 << bit;
        expect(codeOf(() => verifyBlock(header, damaged, expected))).toBe("KV_BLOCK_CORRUPT");
        expect(codeOf(() => verifyPayload(header, payload.subarray(0, index)))).toBe("KV_BLOCK_CORRUPT");
      }),
    );
  });

  it("will not describe a block with a wrong id", () => {
    expect(() => describeBlock({ ...expected, parentId: new Uint8Array(4), provenance: "decode", payload })).toThrow(
      /parentId has 4 bytes/,
    );
  });
});

describe("chunks", () => {
  it("come back together, whatever the sizes", async () => {
    const sizes = fc.array(fc.integer({ min: 1, max: 5000 }), { minLength: 1, maxLength: 4 });
    await fc.assert(
      fc.asyncProperty(sizes, fc.integer({ min: 1, max: 2048 }), async (lengths, chunkBytes) => {
        const payloads = lengths.map((length) => payload.slice(0, length % payload.length || 1));
        const received = [];
        for await (const each of collectBlocks(stream(payloads, chunkBytes))) {
          received.push(Buffer.from(each.payload).toString("hex"));
        }
        expect(received).toEqual(payloads.map((each) => Buffer.from(each).toString("hex")));
      }),
    );
  });

  it("are views, not copies, of at most 1 MiB", () => {
    const large = new Uint8Array(2.5 * 1024 * 1024);
    const chunks = [...blockChunks(large)];
    expect(chunks.map((chunk) => chunk.length)).toEqual([1 << 20, 1 << 20, 1 << 19]);
    expect(chunks.every((chunk) => chunk.buffer === large.buffer)).toBe(true);
  });

  it("end quietly at a missing block", async () => {
    const parts = async function* (): AsyncGenerator<KvBlockPart> {
      yield* stream([payload], 1000);
      yield { part: { case: "missing", value: expected.blockId } };
    };
    const received = [];
    for await (const each of collectBlocks(parts())) {
      received.push(each);
    }
    expect(received.length).toBe(1);
    await expect(collectBlock(missing())).rejects.toMatchObject({ code: "KV_BLOCK_NOT_FOUND" });
  });

  const header: KvBlockPart = { part: { case: "header", value: block() } };
  const chunk: KvBlockPart = { part: { case: "chunk", value: payload.subarray(0, 1500) } };
  const bad: [string, KvBlockPart[]][] = [
    ["a chunk before the header", [chunk]],
    ["two headers", [header, header]],
    ["a cut stream", [header, chunk]],
    ["too many bytes", [header, chunk, chunk]],
    ["an empty chunk", [header, { part: { case: "chunk", value: new Uint8Array(0) } }]],
    ["missing inside a block", [header, { part: { case: "missing", value: expected.blockId } }]],
    ["an empty part", [{ part: { case: undefined } }]],
  ];
  it.each(bad)("refuse %s", async (_, parts) => {
    await expect(collectBlock(each(parts))).rejects.toMatchObject({ code: "KV_BLOCK_CORRUPT" });
  });

  it("refuse a payload over the limit before memory is taken", async () => {
    await expect(collectBlock(stream([payload], 1000), 2499)).rejects.toThrow(/at most 2499/);
  });
});

async function* stream(payloads: Uint8Array[], chunkBytes: number): AsyncGenerator<KvBlockPart> {
  for (const bytes of payloads) {
    yield { part: { case: "header", value: block(bytes) } };
    for (const value of blockChunks(bytes, chunkBytes)) {
      yield { part: { case: "chunk", value } };
    }
  }
}

async function* missing(): AsyncGenerator<KvBlockPart> {
  yield { part: { case: "missing", value: expected.blockId } };
}

async function* each(parts: KvBlockPart[]): AsyncGenerator<KvBlockPart> {
  yield* parts;
}

function flip(header: KvBlockHeader, name: "modelDigest" | "blockId" | "parentId"): void {
  header[name] = header[name].slice();
  header[name][31]! ^= 0x80;
}
