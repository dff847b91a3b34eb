import fc from "fast-check";
import { describe, expect, it } from "vitest";
import { chooseVictims, type EvictableBlock } from "./evictor.ts";

function block(id: string, parentId: string, lastUsed: number, more: Partial<EvictableBlock> = {}): EvictableBlock {
  return { id, parentId, bytes: 10, lastUsed, isProtected: false, ...more };
}

describe("chooseVictims", () => {
  it("takes the least recently used chain, from its tail", () => {
    const blocks = [
      block("a1", "root", 5),
      block("a2", "a1", 5),
      block("a3", "a2", 5),
      block("b1", "root2", 9),
      block("b2", "b1", 9),
    ];
    expect(chooseVictims(blocks, 1)).toEqual(["a3"]);
    expect(chooseVictims(blocks, 25)).toEqual(["a3", "a2", "a1"]);
    expect(chooseVictims(blocks, 1000)).toEqual(["a3", "a2", "a1", "b2", "b1"]);
    expect(chooseVictims(blocks, 0)).toEqual([]);
  });

  it("keeps a head as long as any of its branches is in use", () => {
    const blocks = [
      block("head", "root", 1),
      block("old", "head", 2),
      block("new", "head", 8),
      block("other", "root2", 5),
    ];
    expect(chooseVictims(blocks, 25)).toEqual(["old", "other", "new"]);
  });

  it("spares protected blocks and all blocks before them, not those after", () => {
    const blocks = [
      block("a1", "root", 1),
      block("a2", "a1", 1, { isProtected: true }),
      block("a3", "a2", 1),
      block("b1", "root2", 2),
    ];
    expect(chooseVictims(blocks, 1000)).toEqual(["a3", "b1"]);
  });

  it("holds its promises on any forest", () => {
    const forest = fc.array(
      fc.record({
        parent: fc.nat(40),
        lastUsed: fc.nat(10),
        bytes: fc.integer({ min: 1, max: 9 }),
        isProtected: fc.boolean(),
      }),
      { maxLength: 40 },
    );
    fc.assert(
      fc.property(forest, fc.nat(200), (nodes, bytesToFree) => {
        const blocks = nodes.map((node, index) =>
          // Parents come earlier, or are not held.
          block(`${index}`, node.parent < index ? `${node.parent}` : "gone", node.lastUsed, node),
        );
        const victims = chooseVictims(blocks, bytesToFree);
        const gone = new Set<string>();
        for (const id of victims) {
          const children = blocks.filter((each) => each.parentId === id);
          expect(children.every((child) => gone.has(child.id))).toBe(true);
          expect(blocks[Number(id)]!.isProtected).toBe(false);
          gone.add(id);
        }
        const freed = victims.reduce((sum, id) => sum + blocks[Number(id)]!.bytes, 0);
        const last = blocks[Number(victims.at(-1))]?.bytes ?? 0;
        expect(freed - last).toBeLessThanOrEqual(Math.max(bytesToFree, 0));
        if (freed < bytesToFree) {
          // All that may go, goes.
          const stay = blocks.filter((each) => !gone.has(each.id));
          const guarded = (id: string): boolean =>
            blocks[Number(id)]!.isProtected || stay.some((each) => each.parentId === id && guarded(each.id));
          expect(stay.every((each) => guarded(each.id))).toBe(true);
        }
      }),
    );
  });
});
