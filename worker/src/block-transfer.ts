/** Between an engine and the stores that hold blocks elsewhere. Ids are hex. Nothing here may fail a request. */

export interface BlockFetch {
  /** Names the fetch in its answers. */
  readonly fetchId: number;
  /** Consecutive blocks of one chain. */
  readonly ids: readonly string[];
  /** Parent of the first of them. */
  readonly parentId: string;
}

/** A block that was just sealed and entered the prefix index. */
export interface SealedBlock {
  readonly id: string;
  readonly parentId: string;
  readonly provenance: "prefill" | "decode";
}

/** How a fetch went: bytes of payload and seconds from request to end. */
export interface FetchReport {
  readonly bytes: number;
  readonly seconds: number;
}

/** What an engine needs from outside; every fetch gets its `ended`, soon. */
export interface BlockTransfer {
  fetch(fetch: BlockFetch, sink: BlockSink): void;
  /** Offers blocks for storing elsewhere; the transfer reads those that it wants with `Engine.readBlock`. */
  sealed(blocks: readonly SealedBlock[]): void;
}

/** Takes verified blocks in chain order: the first that is missing or bad ends the fetch. */
export interface BlockSink {
  block(fetchId: number, id: string, payload: Uint8Array): void;
  ended(fetchId: number, report: FetchReport): void;
}
