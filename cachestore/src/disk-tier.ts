import { accessSync, constants, existsSync, mkdirSync } from "node:fs";
import { dirname, join, resolve } from "node:path";
import { crc32 } from "node:zlib";
import { fromBinary, toBinary } from "@bufbuild/protobuf";
import { ClusterError, hex, type KvBlockHeader, KvBlockHeaderSchema, plainBytes, verifyHeader } from "@kivimesh/proto";
import { type Database, open, type RootDatabase } from "lmdb";
import type { StoredBlock } from "./block-store.ts";

/** What is kept beside a payload. */
export interface DiskEntry {
  readonly id: Uint8Array;
  readonly header: KvBlockHeader;
  readonly storedNumber: bigint;
  readonly pinnedUntil: number;
}

/** Changes that reach the disk together or not at all. */
export interface DiskChange {
  put?: { block: StoredBlock; storedNumber: bigint; pinnedUntil: number };
  remove?: readonly Uint8Array[];
  repin?: readonly { entry: DiskEntry; pinnedUntil: number }[];
  lastEvent: bigint;
}

const pageBytes = 4096;
/** Head of an entry: CRC-32 of the rest (u32), event number (u64), pinned until (f64); then the block's header. */
const entryHeadBytes = 20;
const lastEventKey = "last-event";
/** "entries" and "payloads"; single values lie in the root. */
const maxDatabases = 2;

/** Disk space of a block in whole LMDB pages: its payload with LMDB's own head, and a page for its header and tree nodes. */
export function diskBytesOf(payloadBytes: number): number {
  return Math.ceil((payloadBytes + 16) / pageBytes) * pageBytes + pageBytes;
}

/**
 * Blocks in LMDB. Each change is one transaction: after a crash at any moment a block is there whole or not at all.
 * Reads return what lies there; the caller verifies.
 */
export class DiskTier {
  readonly #root: RootDatabase<Buffer, string>;
  readonly #entries: Database<Buffer, Uint8Array>;
  readonly #payloads: Database<Buffer, Uint8Array>;

  private constructor(root: RootDatabase<Buffer, string>) {
    this.#root = root;
    this.#entries = root.openDB({ name: "entries", encoding: "binary", keyEncoding: "binary" });
    this.#payloads = root.openDB({ name: "payloads", encoding: "binary", keyEncoding: "binary" });
  }

  /** Opens or creates the store in `directory`. @throws ClusterError INVALID_ARGUMENT where it cannot be written. */
  static open(directory: string): DiskTier {
    createFolder(resolve(directory));
    const root = open<Buffer, string>({
      path: join(directory, "blocks.mdb"),
      encoding: "binary",
      maxDbs: maxDatabases,
    });
    return new DiskTier(root);
  }

  get lastEvent(): bigint {
    return this.#root.get(lastEventKey)?.readBigUInt64LE() ?? 0n;
  }

  /** Every entry, without payloads; `damaged` gets the ids of those that fail their checks. */
  *entries(damaged: (id: Uint8Array) => void): Generator<DiskEntry> {
    for (const { key, value } of this.#entries.getRange()) {
      const id = new Uint8Array(key);
      const entry = decodeEntry(id, value);
      if (entry === undefined) {
        damaged(id);
      } else {
        yield entry;
      }
    }
  }

  /** The block as it lies there, or undefined if either half is missing or the header is damaged. */
  async read(id: Uint8Array): Promise<StoredBlock | undefined> {
    // Touches the pages off this thread, so that a slow disk does not stop the event loop.
    await this.#payloads.prefetch([id]);
    const entry = this.entry(id);
    const payload = this.#payloads.getBinary(id);
    return entry === undefined || payload === undefined
      ? undefined
      : { header: entry.header, payload: plainBytes(payload) };
  }

  entry(id: Uint8Array): DiskEntry | undefined {
    const bytes = this.#entries.getBinary(id);
    return bytes && decodeEntry(id, bytes);
  }

  hasPayload(id: Uint8Array): boolean {
    return this.#payloads.doesExist(id);
  }

  payloadCount(): number {
    return this.#payloads.getKeysCount();
  }

  /** Resolves when the change is committed: it survives the death of the process from then on. */
  async write(change: DiskChange): Promise<void> {
    const lastEvent = Buffer.alloc(8);
    lastEvent.writeBigUInt64LE(change.lastEvent);
    await this.#root.batch(() => {
      for (const id of change.remove ?? []) {
        this.#entries.remove(id);
        this.#payloads.remove(id);
      }
      for (const { entry, pinnedUntil } of change.repin ?? []) {
        this.#entries.put(entry.id, encodeEntry({ ...entry, pinnedUntil }));
      }
      if (change.put !== undefined) {
        const { block, storedNumber, pinnedUntil } = change.put;
        const id = block.header.blockId;
        this.#entries.put(id, encodeEntry({ id, header: block.header, storedNumber, pinnedUntil }));
        this.#payloads.put(id, asBuffer(block.payload));
      }
      this.#root.put(lastEventKey, lastEvent);
    });
  }

  async close(): Promise<void> {
    await this.#root.flushed;
    await this.#root.close();
  }
}

function encodeEntry(entry: DiskEntry): Buffer {
  const header = toBinary(KvBlockHeaderSchema, entry.header);
  const bytes = Buffer.alloc(entryHeadBytes + header.length);
  bytes.writeBigUInt64LE(entry.storedNumber, 4);
  bytes.writeDoubleLE(entry.pinnedUntil, 12);
  bytes.set(header, entryHeadBytes);
  bytes.writeUInt32LE(crc32(bytes.subarray(4)), 0);
  return bytes;
}

function decodeEntry(id: Uint8Array, bytes: Buffer): DiskEntry | undefined {
  if (bytes.length < entryHeadBytes || bytes.readUInt32LE(0) !== crc32(bytes.subarray(4))) {
    return undefined;
  }
  try {
    // Copied: LMDB's memory is not ours to keep.
    const header = fromBinary(KvBlockHeaderSchema, new Uint8Array(bytes.subarray(entryHeadBytes)));
    verifyHeader(header);
    const isOwn = hex(header.blockId) === hex(id);
    const storedNumber = bytes.readBigUInt64LE(4);
    return isOwn ? { id, header, storedNumber, pinnedUntil: bytes.readDoubleLE(12) } : undefined;
  } catch {
    // Whatever is wrong with the bytes: the block is damaged, and the caller counts it.
    return undefined;
  }
}

function asBuffer(bytes: Uint8Array): Buffer {
  return Buffer.from(bytes.buffer, bytes.byteOffset, bytes.byteLength);
}

/** Folder by folder: mkdir's `recursive` never returns where a file system refuses new folders with ENOENT (/proc). */
function createFolder(directory: string): void {
  try {
    const missing: string[] = [];
    for (let folder = directory; !existsSync(folder); folder = dirname(folder)) missing.push(folder);
    for (const folder of missing.reverse()) mkdirSync(folder);
    accessSync(directory, constants.W_OK | constants.X_OK);
  } catch (cause) {
    throw new ClusterError("INVALID_ARGUMENT", `data directory ${directory} cannot be written: ${String(cause)}`, {
      parameter: "dataDirectory",
      cause,
    });
  }
}
