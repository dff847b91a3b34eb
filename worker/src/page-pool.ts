import assert from "node:assert/strict";

/** Blocks that entered or left the prefix index since the last time somebody asked. Ids are hex. */
export interface PrefixIndexChange {
  readonly added: readonly string[];
  readonly removed: readonly string[];
}

interface IndexedBlock {
  readonly id: string;
  readonly parentId: string;
}

/**
 * Who holds which page of GPU memory, and which page holds which sealed block.
 *
 * Every page is in exactly one of three states:
 *
 *     free ──allocate──▶ referenced ──last release, not indexed──▶ free
 *                          │    ▲
 *      last release, indexed    │ acquire (a prefix hit)
 *                          ▼    │
 *                         cached ──allocate with no free page: evicted──▶ referenced by the allocator
 *
 * A page from `allocate` or `acquire` stays valid until its holder releases it. A referenced page is never evicted.
 * Among cached pages the least recently released one goes first, but never a block before its cached successors.
 * (A referenced successor does not keep its parent: its holder has a copy of the parent of its own.)
 */
export class PagePool {
  readonly numPages: number;
  readonly #references: Uint32Array;
  readonly #free: number[] = [];
  /** Insertion order is the order of release. */
  readonly #cached = new Set<number>();
  readonly #pageOf = new Map<string, number>();
  readonly #blockOf: (IndexedBlock | undefined)[];
  readonly #children = new Map<string, Set<string>>();
  #added = new Set<string>();
  #removed = new Set<string>();
  #evictions = 0;

  constructor(numPages: number) {
    assert(Number.isInteger(numPages) && numPages > 0, `a pool of ${numPages} pages`);
    this.numPages = numPages;
    this.#references = new Uint32Array(numPages);
    this.#blockOf = new Array<IndexedBlock | undefined>(numPages).fill(undefined);
    for (let page = numPages - 1; page >= 0; page--) this.#free.push(page);
  }

  /** Pages that `allocate` can give: free and cached ones. */
  get available(): number {
    return this.#free.length + this.#cached.size;
  }

  get referenced(): number {
    return this.numPages - this.available;
  }

  get indexed(): number {
    return this.#pageOf.size;
  }

  /** Cached pages that were given to somebody else, since the start. */
  get evictions(): number {
    return this.#evictions;
  }

  /** A page with one reference and unknown contents, evicting a cached block if it must; undefined if all are referenced. */
  allocate(): number | undefined {
    const page = this.#free.pop() ?? this.#evict();
    if (page !== undefined) this.#references[page] = 1;
    return page;
  }

  /** Pages of the longest indexed prefix of `ids`, without taking references. */
  match(ids: readonly string[]): number[] {
    const pages: number[] = [];
    for (const id of ids) {
      const page = this.#pageOf.get(id);
      if (page === undefined) break;
      pages.push(page);
    }
    return pages;
  }

  /** How many holders a page has. */
  references(page: number): number {
    return this.#references[page] ?? 0;
  }

  has(id: string): boolean {
    return this.#pageOf.has(id);
  }

  /** The page of an indexed block with one more reference; undefined if it is not held. */
  acquire(id: string): number | undefined {
    const page = this.#pageOf.get(id);
    if (page === undefined) return undefined;
    this.#references[page]! += 1;
    this.#cached.delete(page);
    return page;
  }

  /**
   * Gives references back: `pages` in the order of a sequence's blocks, so that its tail is evicted before its head.
   */
  release(pages: readonly number[]): void {
    for (let index = pages.length - 1; index >= 0; index--) {
      const page = pages[index]!;
      const left = this.#references[page];
      assert(left !== undefined && left > 0, `page ${page} is released more often than it was taken`);
      this.#references[page] = left - 1;
      if (left > 1) continue;
      if (this.#blockOf[page] === undefined) this.#free.push(page);
      else this.#cached.add(page);
    }
  }

  /**
   * Makes a referenced page findable as block `id`. False, and nothing changes, if another page holds the block already:
   * the first one stays.
   */
  index(page: number, id: string, parentId: string): boolean {
    assert((this.#references[page] ?? 0) > 0, `page ${page} is indexed without a reference`);
    assert(this.#blockOf[page] === undefined, `page ${page} is indexed twice`);
    if (this.#pageOf.has(id)) return false;
    this.#pageOf.set(id, page);
    this.#blockOf[page] = { id, parentId };
    let siblings = this.#children.get(parentId);
    if (siblings === undefined) {
      siblings = new Set();
      this.#children.set(parentId, siblings);
    }
    siblings.add(id);
    if (!this.#removed.delete(id)) this.#added.add(id);
    return true;
  }

  /** Ids in the prefix index. */
  indexedIds(): string[] {
    return [...this.#pageOf.keys()];
  }

  /** Changes of the prefix index since the last call, each id at most once. */
  takeChanges(): PrefixIndexChange {
    const change = { added: [...this.#added], removed: [...this.#removed] };
    this.#added = new Set();
    this.#removed = new Set();
    return change;
  }

  /**
   * Everything that is wrong inside, empty if nothing is.
   * @param holders references that are known to be out, page by page; left out, only the pool itself is checked.
   */
  checkIntegrity(holders?: Iterable<number>): string[] {
    const violations: string[] = [];
    const free = new Set(this.#free);
    if (free.size !== this.#free.length) violations.push("a page is free twice");
    for (let page = 0; page < this.numPages; page++) {
      const states = [free.has(page), this.#cached.has(page), this.#references[page]! > 0].filter(Boolean).length;
      if (states !== 1) violations.push(`page ${page} is in ${states} states at once`);
      const block = this.#blockOf[page];
      if (block === undefined && this.#cached.has(page)) violations.push(`page ${page} is cached without a block`);
      if (block !== undefined && free.has(page)) violations.push(`page ${page} is free but indexed`);
      if (block !== undefined && this.#pageOf.get(block.id) !== page) violations.push(`page ${page} has a stale block`);
      if (block !== undefined && !this.#children.get(block.parentId)?.has(block.id)) {
        violations.push(`block ${block.id} is not among its parent's`);
      }
    }
    const children = [...this.#children.values()].reduce((sum, ids) => sum + ids.size, 0);
    const blocks = this.#blockOf.filter((block) => block !== undefined).length;
    if (blocks !== this.#pageOf.size || blocks !== children) {
      violations.push(`${blocks} pages hold blocks, ${this.#pageOf.size} are indexed, ${children} are children`);
    }
    if (holders !== undefined) this.#checkHolders(holders, violations);
    return violations;
  }

  #checkHolders(holders: Iterable<number>, violations: string[]): void {
    const held = new Uint32Array(this.numPages);
    for (const page of holders) held[page]! += 1;
    for (let page = 0; page < this.numPages; page++) {
      if (held[page] !== this.#references[page]) {
        violations.push(`page ${page} has ${this.#references[page]} references, its holders have ${held[page]}`);
      }
    }
  }

  #evict(): number | undefined {
    const [oldest] = this.#cached;
    if (oldest === undefined) return undefined;
    const page = this.#tailOf(oldest);
    this.#forget(page);
    this.#cached.delete(page);
    this.#evictions += 1;
    return page;
  }

  /** The end of a chain of cached blocks that starts at `page`. */
  #tailOf(page: number): number {
    for (let tail = page; ; ) {
      const next = this.#cachedChild(tail);
      if (next === undefined) return tail;
      tail = next;
    }
  }

  #cachedChild(page: number): number | undefined {
    for (const id of this.#children.get(this.#blockOf[page]!.id) ?? []) {
      const child = this.#pageOf.get(id)!;
      if (this.#cached.has(child)) return child;
    }
    return undefined;
  }

  #forget(page: number): void {
    const block = this.#blockOf[page]!;
    this.#blockOf[page] = undefined;
    this.#pageOf.delete(block.id);
    const siblings = this.#children.get(block.parentId)!;
    siblings.delete(block.id);
    if (siblings.size === 0) this.#children.delete(block.parentId);
    if (!this.#added.delete(block.id)) this.#removed.add(block.id);
  }
}
