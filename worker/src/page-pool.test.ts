import fc from "fast-check";
import { describe, expect, it } from "vitest";
import { PagePool } from "./page-pool.ts";

describe("PagePool", () => {
  it("finds an indexed block again after its holder released it, and evicts it only when no page is free", () => {
    const pool = new PagePool(2);
    const page = pool.allocate()!;
    expect(pool.index(page, "a", "root")).toBe(true);
    pool.release([page]);
    expect(pool.match(["a", "b"])).toEqual([page]);
    expect(pool.acquire("a")).toBe(page);
    const other = pool.allocate()!;
    expect(other).not.toBe(page);
    expect(pool.allocate()).toBeUndefined();
    pool.release([page, other]);
    expect([pool.allocate(), pool.allocate()].sort()).toEqual([0, 1]);
    expect(pool.has("a")).toBe(false);
    expect(pool.evictions).toBe(1);
  });

  it("evicts the tail of a chain before its head", () => {
    const pool = new PagePool(3);
    const pages = [pool.allocate()!, pool.allocate()!, pool.allocate()!];
    for (const [index, id] of ["a", "b", "c"].entries())
      pool.index(pages[index]!, id, index === 0 ? "root" : "abc"[index - 1]!);
    pool.release(pages);
    // Touch the tail alone: it is now the most recently released page, and still goes first.
    pool.release([pool.acquire("c")!]);
    pool.allocate();
    expect(pool.match(["a", "b", "c"])).toEqual(pages.slice(0, 2));
  });

  it("keeps the first of two pages with the same block", () => {
    const pool = new PagePool(2);
    const [first, second] = [pool.allocate()!, pool.allocate()!];
    pool.index(first, "a", "root");
    expect(pool.index(second, "a", "root")).toBe(false);
    pool.release([first, second]);
    expect(pool.match(["a"])).toEqual([first]);
    expect(pool.checkIntegrity([])).toEqual([]);
  });

  it("refuses to release a page that nobody holds", () => {
    const pool = new PagePool(1);
    expect(() => pool.release([0])).toThrow(/released more often/);
  });

  it("reports references that no holder accounts for", () => {
    const pool = new PagePool(2);
    const page = pool.allocate()!;
    expect(pool.checkIntegrity([])).toEqual([`page ${page} has 1 references, its holders have 0`]);
  });

  it("reports each change of the prefix index once, and nothing for a block that came and went", () => {
    const pool = new PagePool(1);
    pool.index(pool.allocate()!, "a", "root");
    expect(pool.takeChanges()).toEqual({ added: ["a"], removed: [] });
    pool.release([0]);
    pool.index(pool.allocate()!, "b", "root");
    pool.release([0]);
    pool.allocate();
    expect(pool.takeChanges()).toEqual({ added: [], removed: ["a"] });
  });
});

/** The pool as a list of claims, with no cleverness: what the real one must agree with. */
interface Model {
  /** Chains that are out: pages with their block ids, in order. */
  holders: { pages: number[]; ids: string[] }[];
}

interface Real {
  pool: PagePool;
  /** What was last written to each page, to notice that a held or indexed page was given away. */
  contents: (string | undefined)[];
}

const chainId = (chain: readonly number[]) => chain.join("/");

class StartSequence implements fc.Command<Model, Real> {
  readonly chain: readonly number[];
  constructor(chain: readonly number[]) {
    this.chain = chain;
  }
  check = () => true;
  run(model: Model, real: Real): void {
    const ids = this.chain.map((_, index) => chainId(this.chain.slice(0, index + 1)));
    const pages: number[] = [];
    const hit = real.pool.match(ids).length;
    for (const id of ids.slice(0, hit)) {
      const page = real.pool.acquire(id);
      expect(page).toBeDefined();
      expect(real.contents[page!]).toBe(id);
      pages.push(page!);
    }
    for (let index = hit; index < ids.length; index++) {
      const before = real.pool.available;
      const page = real.pool.allocate();
      expect(page === undefined).toBe(before === 0);
      if (page === undefined) break;
      for (const holder of [...model.holders.map((held) => held.pages), pages]) expect(holder).not.toContain(page);
      real.contents[page] = ids[index];
      const expected = !real.pool.has(ids[index]!);
      expect(real.pool.index(page, ids[index]!, index === 0 ? "root" : ids[index - 1]!)).toBe(expected);
      pages.push(page);
    }
    model.holders.push({ pages, ids: ids.slice(0, pages.length) });
    checkAll(model, real);
  }
  toString = () => `start(${this.chain})`;
}

class EndSequence implements fc.Command<Model, Real> {
  readonly pick: number;
  constructor(pick: number) {
    this.pick = pick;
  }
  check = (model: Readonly<Model>) => model.holders.length > 0;
  run(model: Model, real: Real): void {
    const [holder] = model.holders.splice(this.pick % model.holders.length, 1);
    real.pool.release(holder!.pages);
    checkAll(model, real);
  }
  toString = () => `end(${this.pick})`;
}

function checkAll(model: Model, real: Real): void {
  expect(real.pool.checkIntegrity(model.holders.flatMap((holder) => holder.pages))).toEqual([]);
  for (const holder of model.holders) {
    expect(holder.pages.map((page) => real.contents[page])).toEqual(holder.ids);
  }
  for (const id of real.pool.indexedIds()) expect(real.contents[real.pool.match([id])[0]!]).toBe(id);
}

describe("PagePool against a model", () => {
  it("never gives away a held page and never serves a wrong one", () => {
    const chain = fc.array(fc.integer({ min: 0, max: 2 }), { minLength: 1, maxLength: 5 });
    const commands = [chain.map((ids) => new StartSequence(ids)), fc.nat(20).map((pick) => new EndSequence(pick))];
    fc.assert(
      fc.property(fc.integer({ min: 1, max: 8 }), fc.commands(commands, { maxCommands: 40 }), (numPages, run) => {
        fc.modelRun(() => ({ model: { holders: [] }, real: { pool: new PagePool(numPages), contents: [] } }), run);
      }),
      { numRuns: 300 },
    );
  });
});
