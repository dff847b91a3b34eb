import fc from "fast-check";
import { describe, expect, it } from "vitest";
import { chooseWorker, defaultRouterAssumptions, type RouterRequest, type RouterWorker } from "./router.ts";

const ids = Array.from({ length: 8 }, (_, index) => `block${index}`);

function worker(id: string, changes: Partial<RouterWorker> = {}): RouterWorker {
  return {
    id,
    format: "f",
    blockTokens: 128,
    blockBytes: 1e6,
    held: new Set(),
    running: 0,
    waiting: 0,
    waitingPromptTokens: 0,
    prefillTokensPerSecond: 100,
    ...changes,
  };
}

function request(promptTokens: number): RouterRequest {
  return { promptTokens, blockIds: new Map([["f", ids.slice(0, Math.floor(promptTokens / 128))]]) };
}

describe("chooseWorker", () => {
  it("has no choice without workers", () => {
    expect(chooseWorker(request(10), [])).toBeUndefined();
  });

  it("goes where the prefix is held", () => {
    const choice = chooseWorker(request(300), [worker("a"), worker("b", { held: new Set(ids.slice(0, 2)) })]);
    expect(choice).toMatchObject({ workerId: "b", heldTokens: 256, fetchTokens: 0, prefillSeconds: 0.44 });
  });

  it("leaves the holder where waiting for it costs more than computing again", () => {
    const busy = worker("b", { held: new Set(ids), waitingPromptTokens: 2000, waiting: 4 });
    expect(chooseWorker(request(300), [worker("a"), busy])?.workerId).toBe("a");
  });

  it("counts blocks of other workers as fetchable only with a cachestore, and only where fetching is faster", () => {
    const idle = worker("a");
    const holder = worker("b", { held: new Set(ids), running: 100 });
    expect(chooseWorker(request(300), [idle, holder])).toMatchObject({ workerId: "a", fetchTokens: 0 });
    const fetchable = { ...defaultRouterAssumptions, fetchable: true };
    expect(chooseWorker(request(300), [idle, holder], fetchable)).toMatchObject({ workerId: "a", fetchTokens: 256 });
    const slow = { ...fetchable, fetchBytesPerSecond: 1e5 };
    expect(chooseWorker(request(300), [idle, holder], slow)).toMatchObject({ fetchTokens: 0, fetchSeconds: 0 });
  });

  it("does not count blocks of another format, blocks after a gap, or one that ends with the prompt's last token", () => {
    const fetchable = { ...defaultRouterAssumptions, fetchable: true };
    const other = worker("b", { format: "g", held: new Set(ids) });
    expect(chooseWorker(request(300), [other], fetchable)).toMatchObject({ heldTokens: 0, fetchTokens: 0 });
    const gap = worker("b", { held: new Set(["block1"]) });
    expect(chooseWorker(request(300), [gap])).toMatchObject({ heldTokens: 0 });
    const all = worker("b", { held: new Set(ids) });
    expect(chooseWorker(request(256), [all])).toMatchObject({ heldTokens: 128 });
  });

  it("is indifferent to the order of workers, and never estimates less than zero", () => {
    const anyWorker = fc.record({
      held: fc.subarray(ids).map((held) => new Set(held)),
      running: fc.nat(9),
      waiting: fc.nat(9),
      waitingPromptTokens: fc.nat(5000),
      prefillTokensPerSecond: fc.constantFrom(0, 40, 5000),
    });
    fc.assert(
      fc.property(
        fc.array(anyWorker, { minLength: 1, maxLength: 6 }),
        fc.integer({ min: 1, max: 1024 }),
        (list, size) => {
          const workers = list.map((changes, index) => worker(`w${index}`, changes));
          const choice = chooseWorker(request(size), workers);
          expect(chooseWorker(request(size), [...workers].reverse())).toEqual(choice);
          expect(choice?.prefillSeconds).toBeGreaterThan(0);
          expect(choice?.seconds).toBeGreaterThan(0);
        },
      ),
    );
  });
});
