import { blockIds, chainRoot, hex } from "@kivimesh/proto";
import type { KvGeometry } from "./model/index.ts";

/** Ids of a sequence's blocks, made as its tokens become known. Ids are hex; `parentOf(0)` is the chain's root. */
export class BlockChain {
  readonly #blockTokens: number;
  readonly #root: string;
  readonly #ids: string[] = [];
  #last: Uint8Array;

  /** @param namespace tenant namespace, 32 bytes. @throws ClusterError INVALID_ARGUMENT on a wrong width. */
  constructor(modelDigest: Uint8Array, kv: KvGeometry, namespace: Uint8Array) {
    const { formatId, blockTokens, residualTokens } = kv;
    this.#blockTokens = blockTokens;
    this.#last = chainRoot({ modelDigest, formatId, blockTokens, residualTokens, tenantNamespace: namespace });
    this.#root = hex(this.#last);
  }

  /** Ids of the first `count` blocks of `tokens`, which must only ever grow at its end. */
  ids(tokens: readonly number[], count: number): readonly string[] {
    const known = this.#ids.length;
    if (count > known) {
      const fresh = tokens.slice(known * this.#blockTokens, count * this.#blockTokens);
      for (const id of blockIds(this.#last, fresh, this.#blockTokens)) {
        this.#ids.push(hex(id));
        this.#last = id;
      }
    }
    return count === this.#ids.length ? this.#ids : this.#ids.slice(0, count);
  }

  /** Of a block whose id, or whose successor's id, was made already. */
  parentOf(index: number): string {
    return index === 0 ? this.#root : this.#ids[index - 1]!;
  }
}

/** The bytes of a hex id. */
export function idBytes(id: string): Uint8Array {
  return Uint8Array.from(Buffer.from(id, "hex"));
}
