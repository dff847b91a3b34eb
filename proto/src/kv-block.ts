import { crc32 } from "node:zlib";
import { create } from "@bufbuild/protobuf";
import { ClusterError } from "./errors.ts";
import { type KvBlockHeader, KvBlockHeader_Provenance, KvBlockHeaderSchema } from "./gen/kivimesh/v1/kv_block_pb.ts";
import { plainBytes } from "./plain-bytes.ts";
import { blockIdBytes, hex } from "./prefix-hash.ts";

/** "KVM1", little-endian. */
export const kvBlockMagic = 0x314d564b;
/** Version of the header's meaning. */
export const kvBlockVersion = 1;
/** Largest piece of a payload in one message, in bytes. */
export const kvChunkBytes = 1024 * 1024;
/** Largest payload that anyone accepts, in bytes. */
export const maxKvPayloadBytes = 256 * 1024 * 1024;

/** The sizes that fix a payload's layout, besides its format id. */
export interface KvBlockShape {
  layers: number;
  kvHeads: number;
  headDim: number;
  blockTokens: number;
  residualTokens: number;
}

export interface KvBlockDescription {
  formatId: number;
  /** SHA-256 of the weights, 32 bytes. */
  modelDigest: Uint8Array;
  blockId: Uint8Array;
  /** The previous block's id, or the chain's root. */
  parentId: Uint8Array;
  shape: KvBlockShape;
  provenance: "prefill" | "decode";
  /** All layers of the block, as in GPU memory. */
  payload: Uint8Array;
}

/** What the consumer of a block knows about it already. */
export interface ExpectedKvBlock {
  modelDigest: Uint8Array;
  formatId: number;
  blockId: Uint8Array;
  parentId: Uint8Array;
  shape: KvBlockShape;
}

/** The header that travels before `payload`. Throws INVALID_ARGUMENT if an id is not 32 bytes. */
export function describeBlock(block: KvBlockDescription): KvBlockHeader {
  for (const name of ["modelDigest", "blockId", "parentId"] as const) {
    if (block[name].length !== blockIdBytes) {
      throw new ClusterError("INVALID_ARGUMENT", `${name} has ${block[name].length} bytes, not ${blockIdBytes}`);
    }
  }
  return create(KvBlockHeaderSchema, {
    magic: kvBlockMagic,
    version: kvBlockVersion,
    formatId: block.formatId,
    modelDigest: block.modelDigest,
    blockId: block.blockId,
    parentId: block.parentId,
    ...block.shape,
    provenance: block.provenance === "prefill" ? KvBlockHeader_Provenance.PREFILL : KvBlockHeader_Provenance.DECODE,
    payloadBytes: BigInt(block.payload.length),
    crc32: crc32(block.payload),
  });
}

/**
 * Checks that a header is one of ours and that `payload` is its payload, without knowing what was asked for: what a store
 * can check. Throws KV_BLOCK_CORRUPT.
 */
export function verifyPayload(header: KvBlockHeader, payload: Uint8Array): void {
  verifyHeader(header);
  if (BigInt(payload.length) !== header.payloadBytes) {
    corrupt(header, `has ${payload.length} of ${header.payloadBytes} payload bytes`);
  }
  if (crc32(payload) !== header.crc32) {
    corrupt(header, "does not match its CRC-32");
  }
}

/** Checks magic, version, widths and limits of a header that came from outside. Throws KV_BLOCK_CORRUPT. */
export function verifyHeader(header: KvBlockHeader): void {
  if (header.magic !== kvBlockMagic || header.version !== kvBlockVersion) {
    corrupt(header, `has magic 0x${header.magic.toString(16)}, version ${header.version}`);
  }
  if ([header.modelDigest, header.blockId, header.parentId].some((id) => id.length !== blockIdBytes)) {
    corrupt(header, `has an id that is not ${blockIdBytes} bytes`);
  }
  const sizes = [header.layers, header.kvHeads, header.headDim, header.blockTokens, header.residualTokens];
  if (sizes.some((size) => size === 0) || header.payloadBytes === 0n) {
    corrupt(header, "has a size of 0");
  }
  if (header.payloadBytes > BigInt(maxKvPayloadBytes)) {
    corrupt(header, `has ${header.payloadBytes} payload bytes; at most ${maxKvPayloadBytes} are allowed`);
  }
  const { PREFILL, DECODE } = KvBlockHeader_Provenance;
  if (header.provenance !== PREFILL && header.provenance !== DECODE) {
    corrupt(header, `has provenance ${header.provenance}`);
  }
}

/**
 * Checks a received block against what was asked for, before attention may read a byte of it.
 * Throws MODEL_MISMATCH if it belongs to another model, format or shape, KV_BLOCK_CORRUPT for anything else.
 */
export function verifyBlock(header: KvBlockHeader, payload: Uint8Array, expected: ExpectedKvBlock): void {
  verifyHeader(header);
  if (!sameBytes(header.blockId, expected.blockId) || !sameBytes(header.parentId, expected.parentId)) {
    corrupt(header, `is not the asked block ${hex(expected.blockId)} or has another parent`);
  }
  if (!sameBytes(header.modelDigest, expected.modelDigest)) {
    mismatch(header, "belongs to another model");
  }
  if (header.formatId !== expected.formatId) {
    mismatch(header, `has format id ${header.formatId}, not ${expected.formatId}`);
  }
  for (const name of ["layers", "kvHeads", "headDim", "blockTokens", "residualTokens"] as const) {
    if (header[name] !== expected.shape[name]) {
      mismatch(header, `has ${name} ${header[name]}, not ${expected.shape[name]}`);
    }
  }
  verifyPayload(header, payload);
}

/** The payload as views of at most `chunkBytes` (1 MiB), in order; nothing is copied. */
export function* blockChunks(payload: Uint8Array, chunkBytes: number = kvChunkBytes): Generator<Uint8Array> {
  for (let start = 0; start < payload.length; start += chunkBytes) {
    yield payload.subarray(start, start + chunkBytes);
  }
}

/** One message of a stream that carries blocks (FetchResponse and StoreRequest). */
export interface KvBlockPart {
  part:
    | { case: "header"; value: KvBlockHeader }
    | { case: "chunk"; value: Uint8Array }
    | { case: "missing"; value: Uint8Array }
    | { case: undefined; value?: undefined };
}

export interface ReceivedKvBlock {
  header: KvBlockHeader;
  payload: Uint8Array;
}

/**
 * Reads a stream of parts into whole blocks, each checked with `verifyPayload` before it is handed over. Ends quietly at a
 * `missing` part. Throws KV_BLOCK_CORRUPT on parts out of order, too many or too few bytes, or a payload over `limitBytes`.
 */
export async function* collectBlocks(
  parts: AsyncIterable<KvBlockPart>,
  limitBytes: number = maxKvPayloadBytes,
): AsyncGenerator<ReceivedKvBlock> {
  let pending: PendingBlock | undefined;
  for await (const { part } of parts) {
    if (part.case === "chunk" && pending !== undefined) {
      pending.append(part.value);
    } else if (part.case === "header" && pending === undefined) {
      pending = new PendingBlock(part.value, limitBytes);
    } else if (part.case === "missing" && pending === undefined) {
      return;
    } else {
      throw new ClusterError("KV_BLOCK_CORRUPT", `a KV block stream has an unexpected ${part.case ?? "empty"} part`);
    }
    const block = pending?.complete();
    if (block !== undefined) {
      pending = undefined;
      yield block;
    }
  }
  pending?.truncated();
}

/** Reads exactly one block, as `collectBlocks` does; KV_BLOCK_NOT_FOUND if the stream holds none. */
export async function collectBlock(
  parts: AsyncIterable<KvBlockPart>,
  limitBytes: number = maxKvPayloadBytes,
): Promise<ReceivedKvBlock> {
  let only: ReceivedKvBlock | undefined;
  for await (const block of collectBlocks(parts, limitBytes)) {
    if (only !== undefined) {
      throw new ClusterError("KV_BLOCK_CORRUPT", "a KV block stream has more than the one block");
    }
    only = block;
  }
  if (only === undefined) {
    throw new ClusterError("KV_BLOCK_NOT_FOUND", "the stream ended without a KV block");
  }
  return only;
}

class PendingBlock {
  readonly #header: KvBlockHeader;
  readonly #payload: Uint8Array;
  #filled = 0;

  constructor(header: KvBlockHeader, limitBytes: number) {
    verifyHeader(header);
    if (header.payloadBytes > BigInt(limitBytes)) {
      corrupt(header, `has ${header.payloadBytes} payload bytes; at most ${limitBytes} are allowed`);
    }
    this.#header = header;
    // Every byte is written before `complete` hands the payload over.
    this.#payload = plainBytes(Buffer.allocUnsafeSlow(Number(header.payloadBytes)));
  }

  append(chunk: Uint8Array): void {
    if (chunk.length === 0 || this.#filled + chunk.length > this.#payload.length) {
      corrupt(this.#header, `got a chunk of ${chunk.length} bytes at ${this.#filled} of ${this.#payload.length}`);
    }
    this.#payload.set(chunk, this.#filled);
    this.#filled += chunk.length;
  }

  complete(): ReceivedKvBlock | undefined {
    if (this.#filled < this.#payload.length) {
      return undefined;
    }
    verifyPayload(this.#header, this.#payload);
    return { header: this.#header, payload: this.#payload };
  }

  truncated(): never {
    corrupt(this.#header, `was cut off after ${this.#filled} of ${this.#payload.length} payload bytes`);
  }
}

function sameBytes(left: Uint8Array, right: Uint8Array): boolean {
  return Buffer.compare(left, right) === 0;
}

function corrupt(header: KvBlockHeader, what: string): never {
  throw new ClusterError("KV_BLOCK_CORRUPT", `KV block ${hex(header.blockId)} ${what}`);
}

function mismatch(header: KvBlockHeader, what: string): never {
  throw new ClusterError("MODEL_MISMATCH", `KV block ${hex(header.blockId)} ${what}`);
}
