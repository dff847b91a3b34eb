import { createHash, createHmac } from "node:crypto";
import { ClusterError } from "./errors.ts";
import { plainBytes } from "./plain-bytes.ts";

/** Bytes of every block id, chain root, model digest and tenant namespace. */
export const blockIdBytes = 32;

/** Longest client salt, in UTF-8 bytes. */
export const maxCacheSaltBytes = 64;

/** Everything that must be equal for two sequences to share blocks, besides their tokens. */
export interface ChainRootParts {
  /** SHA-256 of the weights, 32 bytes. */
  modelDigest: Uint8Array;
  /** Quantizer, bits, group size, rotation and byte layout. */
  formatId: number;
  blockTokens: number;
  /** R of the frontier rule: another R gives other values for the same tokens. */
  residualTokens: number;
  /** From `tenantNamespace`, 32 bytes. */
  tenantNamespace: Uint8Array;
}

/**
 * The parent of a chain's first block: SHA-256 of
 * `"kivimesh/chain/1" ‖ model digest ‖ format id ‖ blockTokens ‖ residualTokens ‖ tenant namespace`, numbers as u32 LE.
 * Every field has a fixed width, so no two inputs give the same bytes. Throws INVALID_ARGUMENT on a wrong width or number.
 */
export function chainRoot(parts: ChainRootParts): Uint8Array {
  const numbers = new Uint8Array(12);
  const view = new DataView(numbers.buffer);
  view.setUint32(0, uint32(parts.formatId, "formatId"), true);
  view.setUint32(4, positive(parts.blockTokens, "blockTokens"), true);
  view.setUint32(8, positive(parts.residualTokens, "residualTokens"), true);
  const hash = createHash("sha256")
    .update("kivimesh/chain/1", "ascii")
    .update(digest(parts.modelDigest, "modelDigest"))
    .update(numbers)
    .update(digest(parts.tenantNamespace, "tenantNamespace"));
  return plainBytes(hash.digest());
}

/**
 * Ids of the full blocks of `tokens`, in order: `id[i] = SHA-256(id[i−1] ‖ tokens of block i as u32 LE)`, where `id[−1]`
 * is `root`. The last, partial block has no id: only full blocks are shared.
 */
export function blockIds(root: Uint8Array, tokens: ArrayLike<number>, blockTokens: number): Uint8Array[] {
  positive(blockTokens, "blockTokens");
  const ids: Uint8Array[] = [];
  const bytes = new Uint8Array(blockTokens * 4);
  const view = new DataView(bytes.buffer);
  let parent = digest(root, "root");
  for (let start = 0; start + blockTokens <= tokens.length; start += blockTokens) {
    for (let index = 0; index < blockTokens; index++) {
      view.setUint32(index * 4, uint32(tokens[start + index], "token"), true);
    }
    parent = plainBytes(createHash("sha256").update(parent).update(bytes).digest());
    ids.push(parent);
  }
  return ids;
}

/**
 * The namespace of a tenant, 32 bytes: HMAC-SHA-256 under the cluster's secret of `tenant ‖ 0 ‖ salt`. Only a gateway
 * makes it, from the authenticated tenant; a client's salt narrows it and can never reach another tenant's.
 */
export function tenantNamespace(secret: string | Uint8Array, tenant: string, salt = ""): Uint8Array {
  if (Buffer.byteLength(salt) > maxCacheSaltBytes) {
    throw new ClusterError("INVALID_ARGUMENT", `cache_salt is longer than ${maxCacheSaltBytes} bytes`, {
      parameter: "cache_salt",
    });
  }
  if (tenant.includes("\0")) {
    throw new ClusterError("INVALID_ARGUMENT", "a tenant name must not contain a NUL character");
  }
  return plainBytes(createHmac("sha256", secret).update(`${tenant}\0${salt}`, "utf8").digest());
}

/** Lower-case hex of an id, for logs, keys and maps. */
export function hex(id: Uint8Array): string {
  return Buffer.from(id.buffer, id.byteOffset, id.byteLength).toString("hex");
}

function digest(bytes: Uint8Array, name: string): Uint8Array {
  if (bytes.length !== blockIdBytes) {
    throw new ClusterError("INVALID_ARGUMENT", `${name} has ${bytes.length} bytes, not ${blockIdBytes}`);
  }
  return bytes;
}

function uint32(value: number | undefined, name: string): number {
  if (value === undefined || !Number.isInteger(value) || value < 0 || value > 0xffff_ffff) {
    throw new ClusterError("INVALID_ARGUMENT", `${name} ${value} is not an unsigned 32-bit integer`);
  }
  return value;
}

function positive(value: number, name: string): number {
  if (uint32(value, name) === 0) {
    throw new ClusterError("INVALID_ARGUMENT", `${name} must be at least 1`);
  }
  return value;
}
