/** A held block, as far as it is known without reading it. */
export interface IndexedBlock {
  readonly id: Uint8Array;
  readonly key: string;
  readonly parentKey: string;
  readonly parentId: Uint8Array;
  /** What it takes on disk. */
  readonly bytes: number;
  /** Number of the event that stored it. */
  readonly storedNumber: bigint;
  lastUsed: number;
  /** Milliseconds since 1970; 0: not pinned. */
  pinnedUntil: number;
}

/** All held blocks by id and by parent, with their bytes. */
export class BlockIndex {
  readonly #blocks = new Map<string, IndexedBlock>();
  readonly #children = new Map<string, Set<string>>();
  #bytes = 0;
  #uses = 0;

  get size(): number {
    return this.#blocks.size;
  }

  get bytes(): number {
    return this.#bytes;
  }

  get(key: string): IndexedBlock | undefined {
    return this.#blocks.get(key);
  }

  values(): IterableIterator<IndexedBlock> {
    return this.#blocks.values();
  }

  add(block: IndexedBlock): void {
    this.remove(block.key);
    this.#blocks.set(block.key, block);
    this.#bytes += block.bytes;
    const siblings = this.#children.get(block.parentKey);
    if (siblings === undefined) {
      this.#children.set(block.parentKey, new Set([block.key]));
    } else {
      siblings.add(block.key);
    }
  }

  remove(key: string): void {
    const block = this.#blocks.get(key);
    if (block === undefined) {
      return;
    }
    this.#blocks.delete(key);
    this.#bytes -= block.bytes;
    const siblings = this.#children.get(block.parentKey);
    siblings?.delete(key);
    if (siblings?.size === 0) {
      this.#children.delete(block.parentKey);
    }
  }

  /** Marks blocks as just used. */
  touch(blocks: readonly IndexedBlock[]): void {
    this.#uses++;
    for (const block of blocks) {
      block.lastUsed = this.#uses;
    }
  }

  /** A block with all held blocks after it, each before its own successors. */
  withSuccessors(key: string): IndexedBlock[] {
    const found: IndexedBlock[] = [];
    const keys = [key];
    for (const each of keys) {
      const block = this.#blocks.get(each);
      if (block !== undefined) {
        found.push(block);
      }
      keys.push(...(this.#children.get(each) ?? []));
    }
    return found;
  }

  checkIntegrity(): string[] {
    const violations: string[] = [];
    let bytes = 0;
    let children = 0;
    for (const block of this.#blocks.values()) {
      bytes += block.bytes;
      if (!this.#children.get(block.parentKey)?.has(block.key)) {
        violations.push(`block ${block.key} is missing among its parent's children`);
      }
    }
    for (const siblings of this.#children.values()) {
      children += siblings.size;
    }
    if (bytes !== this.#bytes) {
      violations.push(`blocks take ${bytes} bytes but ${this.#bytes} are counted`);
    }
    if (children !== this.#blocks.size) {
      violations.push(`${children} children are known of ${this.#blocks.size} blocks`);
    }
    return violations;
  }
}
